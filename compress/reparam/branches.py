"""Parts of a graph that are one affine map of one tensor: chains, parallel branches, and both."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol, Self, TypeVar

import onnx_ir as ir

from compress.reparam.affine import NotMergeable
from compress.reparam.reading import WEIGHTED, Layout, is_affine, is_join, operands

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
    sink: ir.Node, order: dict[ir.Node, int], ignored: frozenset[ir.Node] = frozenset()
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
        NotMergeable: it is not one map.
    """
    known = {part.root: identity}
    for node in part.nodes:
        reads = operands(node)
        if not is_join(node):
            known[node.outputs[0]] = known[reads[0]].then(of(node))
            continue
        if len(reads) != len([value for value in node.inputs if value is not None]):
            raise NotMergeable(f"{node.name} joins branches and a constant")
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
        raise NotMergeable(f"{node.name} concatenates along another axis than that of the channels")
