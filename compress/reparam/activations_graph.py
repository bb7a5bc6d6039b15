"""Layers in a row that become one once the activations between them are linear."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from compress.graph import infer_shapes
from compress.model import Model, TensorSpec
from compress.reparam.affine import AffineMap, Axis, Geometry, NotMergeableError
from compress.reparam.branches import Part, evaluate, small_model
from compress.reparam.emit import ROOT, prove, write
from compress.reparam.reading import (
    WEIGHTED,
    Layout,
    Shapes,
    is_affine,
    layout_of,
    operands,
    read,
    same,
)
from compress.rewrites import bypass, remove_unused

ACTIVATIONS = ("Relu", "Clip", "LeakyRelu", "HardSwish", "Gelu")
"""Functions of one number that can be annealed to the identity, as ONNX calls them."""
BESIDE = ("BatchNormalization", "Mul", "Div", "Add", "Sub", "Identity")
"""Operators that belong to the layer before them, with constants."""
LONGEST = 4
"""Layers that become one; an inverted residual block has three."""
LARGEST_GROWTH = 3.0
"""A merged layer with more than so many times the multiply-accumulates is not timed."""


@dataclass(frozen=True)
class Segment:
    """Layers in a row, from a layer to the last operator before an activation or a branch.

    Attributes:
        nodes: names of its operators, in order of execution.
        layers: those with weights.
        activations: those that have to become linear.
        macs: multiply-accumulates of its layers, and of the one in their place.
        kernel: of that one; empty for a linear layer.
    """

    nodes: tuple[str, ...]
    layers: tuple[str, ...]
    activations: tuple[str, ...]
    macs: tuple[int, int] = (0, 0)
    kernel: tuple[int, ...] = ()

    def __str__(self) -> str:
        return f"{self.layers[0]} to {self.layers[-1]}"

    def overlaps(self, other: Segment) -> bool:
        """Whether one operator is in both."""
        return bool({*self.nodes} & {*other.nodes})


def is_activation(node: ir.Node) -> bool:
    """Whether an operator is one of `ACTIVATIONS` with constant bounds."""
    given = (value for value in node.inputs[1:] if value is not None)
    return (
        node.op_type in ACTIVATIONS
        and node.domain in ("", "ai.onnx")
        and all(value.const_value is not None for value in given)
    )


def find_segments(model: Model, move: bool) -> tuple[list[Segment], dict[str, str]]:
    """What could become one layer, and why each other activation has to stay, by its name.

    Args:
        model: at the ONNX stage.
        move: padding between layers may be moved in front of the first.
    """
    graph = model.graph_model.graph
    shapes = infer_shapes(model.graph_model)
    found: list[Segment] = []
    left: dict[str, str] = {}
    for node in graph:
        if node.op_type not in WEIGHTED or not is_affine(node) or not node.name:
            continue
        for nodes in _runs(node):
            segment = _named(nodes)
            try:
                found.append(_weighed(nodes, segment, shapes, move))
            except NotMergeableError as error:
                reason = f"{segment} cannot become one layer: {error}"
                left.update(dict.fromkeys(segment.activations, reason))
    within = {name for segment in found for name in segment.activations}
    for node in graph:
        if is_activation(node) and node.name and node.name not in within:
            left.setdefault(node.name, _alone_because(node))
    return found, {name: why for name, why in left.items() if name not in within}


def _runs(first: ir.Node) -> Iterable[list[ir.Node]]:
    """Every run of operators from a layer on that holds an activation between two layers."""
    nodes = [first]
    while True:
        following = _following(nodes[-1])
        ends = following is None or following.op_type not in BESIDE
        layers = [index for index, node in enumerate(nodes) if node.op_type in WEIGHTED]
        inner = [index for index, node in enumerate(nodes) if is_activation(node)]
        if ends and inner and inner[-1] < layers[-1]:
            yield list(nodes)
        if following is None:
            return
        if following.op_type in WEIGHTED and len(layers) == LONGEST:
            return
        nodes.append(following)


def _following(node: ir.Node) -> ir.Node | None:
    """The only operator that reads a node, where it may be in a segment."""
    out = node.outputs[0]
    uses = list(out.uses())
    if len(uses) != 1 or out.is_graph_output() or not uses[0].node.name:
        return None
    reader = uses[0].node
    beside = reader.op_type in (*WEIGHTED, *BESIDE) and is_affine(reader)
    fits = is_activation(reader) or (beside and len(operands(reader)) == 1)
    return reader if fits and operands(reader) == [out] else None


def _alone_because(node: ir.Node) -> str:
    source = node.inputs[0]
    maker = source.producer() if source is not None else None
    if maker is None or maker.op_type not in (*WEIGHTED, *BESIDE) or len(operands(maker)) > 1:
        return f"it follows {maker.op_type if maker is not None else 'an input'}, not a layer"
    if source is not None and len(source.uses()) > 1:
        return f"{maker.name} has a second user"
    readers = [use.node for use in node.outputs[0].uses()]
    if len(readers) != 1:
        return f"{len(readers)} operators read it" if readers else "it is an output"
    return f"{readers[0].op_type} reads it, and no layer alone"


def _named(nodes: Sequence[ir.Node]) -> Segment:
    def names(kept: Iterable[ir.Node]) -> tuple[str, ...]:
        return tuple(node.name or "" for node in kept)

    return Segment(
        names(nodes),
        names(n for n in nodes if n.op_type in WEIGHTED),
        names(n for n in nodes if is_activation(n)),
    )


def _weighed(nodes: list[ir.Node], segment: Segment, shapes: Shapes, move: bool) -> Segment:
    """With what it costs.

    Raises:
        NotMergeableError: it is not one layer, or one that is far larger.
    """
    small, inside, _ = _alone(nodes, shapes)
    own = infer_shapes(small)
    layout = layout_of(inside)
    before = sum(
        _macs(read(node, layout, own).geometry, own[node.outputs[0].name or ""])
        for node in inside
        if node.op_type in WEIGHTED
    )
    inside = linearize(small.graph, inside, own, move)
    own = infer_shapes(small)
    part = Part(tuple(inside), small.graph.inputs[0])
    start = same(own[ROOT], layout).geometry
    geometry = evaluate(part, layout, start, lambda node: read(node, layout, own).geometry)
    after = _macs(geometry, own[part.output.name or ""])
    if after > LARGEST_GROWTH * before:
        raise NotMergeableError(f"it would take {after / before:.3g} times as many MACs")
    merged_map(part, layout, own)
    return dataclasses.replace(segment, macs=(before, after), kernel=geometry.sizes)


def _macs(geometry: Geometry, shape: tuple[int, ...]) -> int:
    return geometry.macs * (math.prod(shape) // geometry.outputs)


def _alone(nodes: Sequence[ir.Node], shapes: Shapes) -> tuple[ir.Model, list[ir.Node], ir.Node]:
    """A segment as a model, with the activation behind it; its own operators, and the last one.

    Raises:
        NotMergeableError: the shape of its input is not known.
    """
    root = operands(nodes[0])[0]
    shape = shapes.get(root.name or "", ())
    if not shape or min(shape) < 1:
        raise NotMergeableError("the shape of its input is not known")
    behind = _following(nodes[-1])
    tail = [behind] if behind is not None and is_activation(behind) else []
    small = small_model([*nodes, *tail], {root: shape}, [*nodes, *tail][-1].outputs[0])
    copies = list(small.graph)
    for index, copy in enumerate(copies):
        copy.name = f"n{index}"
    return small, copies[: len(nodes)], copies[-1]


def linearize(
    graph: ir.Graph, nodes: Sequence[ir.Node], shapes: Shapes, move: bool
) -> list[ir.Node]:
    """Take the activations out of a segment; the operators that are left.

    Args:
        graph: that holds it; it is changed.
        nodes: of the segment.
        shapes: of the graph.
        move: padding moves in front of the first layer.
    """
    if move:
        move_padding(nodes, shapes)
    for node in nodes:
        source = node.inputs[0]
        if is_activation(node) and source is not None:
            bypass(graph, node, source)
    return [node for node in nodes if not is_activation(node)]


def move_padding(nodes: Sequence[ir.Node], shapes: Shapes) -> None:
    """Pad in front of the first convolution what the others of a segment pad.

    Inner tensors grow by a frame of what the layers before it make of the padding, in place of
    zeros; sizes of outputs stay. Without activations the layers then are one, exactly.
    """
    convolutions = [node for node in nodes if node.op_type == "Conv"]
    if not convolutions:
        return
    layout = layout_of(list(nodes))
    axes = [read(node, layout, shapes).geometry.axes for node in convolutions]
    if not any(pad for window in axes[1:] for axis in window for pad in axis.pads):
        return
    summed = [_summed(along) for along in zip(*axes, strict=True)]
    for index, node in enumerate(convolutions):
        pads = [0] * 2 * len(summed)
        if index == 0:
            pads = [begin for begin, _ in summed] + [end for _, end in summed]
        node.attributes.pop("auto_pad", None)
        node.attributes["pads"] = ir.AttrInt64s("pads", pads)
    for node in nodes[:-1]:
        node.outputs[0].shape = None


def _summed(axes: Iterable[Axis]) -> tuple[int, int]:
    """Padding in front of a row of windows that equals theirs, before and behind."""
    begin = end = 0
    stride = 1
    for axis in axes:
        begin, end = begin + stride * axis.pads[0], end + stride * axis.pads[1]
        stride *= axis.stride
    return begin, end


def merged_map(part: Part, layout: Layout, shapes: Shapes) -> AffineMap:
    """The one layer that linear operators are, in float64.

    Raises:
        NotMergeableError: they are none, as at borders.
    """
    start = same(shapes.get(part.root.name or "", ()), layout)
    return evaluate(part, layout, start, lambda node: read(node, layout, shapes))


def as_linear(model: Model, segments: Collection[Segment], move: bool) -> Model:
    """A copy of a network whose segments have no activations; their layers are still there."""
    graph_model = model.graph_model.clone()
    shapes = infer_shapes(graph_model)
    for segment in segments:
        linearize(graph_model.graph, nodes_of(graph_model.graph, segment), shapes, move)
    return dataclasses.replace(model, program=graph_model)


def as_merged(linear: Model, segments: Collection[Segment]) -> tuple[Model, float]:
    """What `as_linear` made with one layer for each segment, and the largest difference of one.

    Raises:
        NotMergeableError: a merged layer differs from its layers by more than rounding.
    """
    graph_model = linear.graph_model.clone()
    graph = graph_model.graph
    shapes = infer_shapes(graph_model)
    worst = 0.0
    for segment in segments:
        nodes = [node for node in nodes_of(graph, segment) if not is_activation(node)]
        worst = max(worst, _merge(graph, nodes, segment.layers[-1], shapes))
    remove_unused(graph_model)
    return dataclasses.replace(linear, program=graph_model), worst


def _merge(graph: ir.Graph, nodes: Sequence[ir.Node], name: str, shapes: Shapes) -> float:
    part, layout = Part(tuple(nodes), operands(nodes[0])[0]), layout_of(list(nodes))
    whole = merged_map(part, layout, shapes)
    difference = prove(part, whole, layout, shapes)
    write(graph, part, whole, layout, name)
    return difference


def nodes_of(graph: ir.Graph, segment: Segment) -> list[ir.Node]:
    """The operators of a segment that are in a graph."""
    wanted = {*segment.nodes}
    return [node for node in graph if node.name in wanted]


def pair(model: Model, segment: Segment, shapes: Mapping[str, tuple[int, ...]]) -> list[Model]:
    """A segment with the activation behind it as a model of its own, as it is and merged."""
    nodes = nodes_of(model.graph_model.graph, segment)
    made = []
    for merged in (False, True):
        small, inside, _ = _alone(nodes, shapes)
        if merged:
            inside = linearize(small.graph, inside, infer_shapes(small), True)
            _merge(small.graph, inside, "merged", infer_shapes(small))
            remove_unused(small)
        shape = shapes[operands(nodes[0])[0].name or ""]
        made.append(Model(small, (TensorSpec(ROOT, shape),), str(segment)))
    return made
