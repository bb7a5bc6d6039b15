"""Parts of a graph that are one affine map of one tensor: chains, parallel branches, and both."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, Self, TypeVar

import numpy as np
import onnx_ir as ir

from compress.reparam.affine import NotMergeableError
from compress.reparam.reading import FRAME, WEIGHTED, Layout, is_affine, is_join, operands

LARGEST = 64
"""Operators of one part. MobileOne's largest blocks have 14 after BatchNorm was folded."""


class Map(Protocol):
    """What `evaluate` combines: `AffineMap`, or `Geometry` where the numbers do not matter."""

    def plus(self, other: Self, /) -> Self:
        """The sum."""

    def stacked(self, other: Self, /) -> Self:
        """Output channels of both."""

    def then(self, second: Self, /) -> Self:
        """`second` after this one."""

    def negated(self) -> Self:
        """What is subtracted."""


AnyMap = TypeVar("AnyMap", bound=Map)


@dataclass(frozen=True)
class Part:
    """Operators between one tensor and one other that nothing else reads from.

    Attributes:
        nodes: in order of execution; the last writes the result.
        root: the only activation that they read.
    """

    nodes: tuple[ir.Node, ...]
    root: ir.Value

    @property
    def output(self) -> ir.Value:
        """What it writes."""
        return self.nodes[-1].outputs[0]

    @property
    def joins(self) -> bool:
        """Whether branches come together in it."""
        return any(map(is_join, self.nodes))

    @property
    def layers(self) -> int:
        """How many of its operators have weights."""
        return sum(node.op_type in WEIGHTED for node in self.nodes)

    @property
    def pools(self) -> int:
        """How many of its operators average."""
        return sum(node.op_type == "AveragePool" for node in self.nodes)


def parts_behind(
    sink: ir.Node, order: dict[ir.Node, float], ignored: frozenset[ir.Node] = frozenset()
) -> list[Part]:
    """Every part that ends in `sink`, the smallest first; each holds the one before.

    Args:
        sink: an affine operator.
        order: place of every operator.
        ignored: operators whose reading of a tensor does not count.
    """
    inside = {sink}
    frontier = set(operands(sink))
    found = []
    while frontier:
        if len(frontier) == 1:
            nodes = sorted(inside, key=order.__getitem__)
            found.append(Part(tuple(nodes), next(iter(frontier))))
        latest = max(frontier, key=lambda value: order.get(value.producer(), -1))  # type: ignore[arg-type]
        node = latest.producer()
        if node is None or len(inside) == LARGEST or not _belongs(latest, node, inside | ignored):
            break
        inside.add(node)
        frontier = (frontier - {latest}) | set(operands(node))
    return found


def _belongs(value: ir.Value, node: ir.Node, inside: Iterable[ir.Node]) -> bool:
    """Whether an operator may join: affine, and nothing outside needs its output."""
    return (
        is_affine(node)
        and value is node.outputs[0]
        and not value.is_graph_output()
        and all(use.node in inside for use in value.uses())
    )


def evaluate(
    part: Part, layout: Layout, identity: AnyMap, of: Callable[[ir.Node], AnyMap]
) -> AnyMap:
    """The map of a part.

    Args:
        part: in which everything is affine.
        layout: of its channels.
        identity: the map of the root.
        of: the map of one operator that is no join.

    Raises:
        NotMergeableError: it is not one map.
    """
    known = {part.root: identity}
    for node in part.nodes:
        reads = operands(node)
        if not is_join(node):
            known[node.outputs[0]] = known[reads[0]].then(of(node))
            continue
        if len(reads) != len([value for value in node.inputs if value is not None]):
            raise NotMergeableError(f"{node.name} joins branches and a constant")
        total = known[reads[0]]
        for value in reads[1:]:
            branch = known[value]
            if node.op_type == "Concat":
                total = total.stacked(branch)
            else:
                total = total.plus(branch.negated() if node.op_type == "Sub" else branch)
        if node.op_type == "Concat":
            _require_channels(node, layout)
        known[node.outputs[0]] = total
    return known[part.output]


def _require_channels(node: ir.Node, layout: Layout) -> None:
    shape = node.outputs[0].shape
    axis = node.attributes.get_int("axis", 1)
    rank = len(shape) if shape is not None else 0
    wanted = 1 if layout.dims is not None else -1
    if layout.groups or (axis != wanted and (not rank or axis % rank != wanted % rank)):
        raise NotMergeableError(
            f"{node.name} concatenates along another axis than that of the channels"
        )


OPSET = 21
"""Of the models that parts are run as; operators that are read here are the same since opset 13."""


def small_model(
    nodes: Sequence[ir.Node], roots: Mapping[ir.Value, tuple[int, ...]], output: ir.Value
) -> ir.Model:
    """Operators of a graph as a model of their own, its inputs called in0, in1 and so on.

    Args:
        nodes: in order of execution.
        roots: the activations that they read, and their shapes.
        output: of one of the operators.
    """
    known: dict[ir.Value | None, ir.Value | None] = {None: None}
    for index, (root, shape) in enumerate(roots.items()):
        kind = root.type or ir.TensorType(ir.DataType.FLOAT)
        known[root] = ir.Value(name=f"in{index}", shape=ir.Shape(shape), type=kind)
    inputs = [known[root] for root in roots]
    kept: list[ir.Value] = []
    copies: list[ir.Node] = []
    for node in nodes:
        for value in node.inputs:
            if value is not None and value not in known and value.const_value is not None:
                array = np.asarray(value.const_value.numpy())
                kept.append(stand_in(f"c{len(kept)}", array))
                known[value] = kept[-1]
        made = _copies(node, [known[value] for value in node.inputs], kept)
        for out, result in zip(node.outputs, made[-1].outputs, strict=False):
            known[out] = result
        copies += made
    for index, copy in enumerate(copies):
        for at, out in enumerate(copy.outputs):
            out.name = f"v{index}_{at}"
    last = known[output]
    assert last is not None  # one of the operators writes it
    last.type = ir.TensorType(ir.DataType.FLOAT)
    graph = ir.Graph(
        [v for v in inputs if v is not None],
        [last],
        nodes=copies,
        initializers=kept,
        opset_imports={"": OPSET},
    )
    return ir.Model(graph, ir_version=10)


def stand_in(name: str, array: np.ndarray) -> ir.Value:
    """A constant that belongs to no graph yet."""
    value = ir.Value(name=name, const_value=ir.tensor(array, name=name))
    value.shape, value.dtype = ir.Shape(array.shape), ir.DataType.from_numpy(array.dtype)
    return value


def _copies(node: ir.Node, inputs: list[ir.Value | None], kept: list[ir.Value]) -> list[ir.Node]:
    """The operator again; a frame as padding with zeros of what is above its constants."""
    if node.op_type != FRAME:
        attributes = list(node.attributes.values())
        return [ir.Node("", node.op_type, inputs, attributes, num_outputs=len(node.outputs))]
    image, filling = inputs
    assert filling is not None
    assert filling.const_value is not None
    numbers = filling.const_value.numpy()
    pads = [int(pad) for pad in node.attributes.get_ints("pads", ())]
    dims = len(pads) // 2
    widths = np.array([0, 0, *pads[:dims], 0, 0, *pads[dims:]], np.int64)
    column = stand_in(f"f{len(kept)}", numbers.reshape(-1, *[1] * dims))
    kept += [column, stand_in(f"w{len(kept)}", widths)]
    above = ir.node("Sub", [image, column])
    padded = ir.node("Pad", [above.outputs[0], kept[-1]])
    return [above, padded, ir.node("Add", [padded.outputs[0], column])]
