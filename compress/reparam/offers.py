"""What merging a part of a graph would cost and save, and whether it pays."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import onnx_ir as ir

from compress.reparam.affine import AffineMap, Geometry, NotMergeableError
from compress.reparam.branches import Part, evaluate, parts_behind
from compress.reparam.reading import WEIGHTED, Layout, Shapes, is_join, layout_of, read, same

Profit = Literal["auto", "all"]
KERNEL_WORTH = 3
"""MACs for each element of a tensor that is no longer written. At 3.5 merged depthwise branches
take as long as before in ONNX Runtime and OpenVINO, at 7.5 longer (`benchmarks.reparam`)."""


@dataclass(frozen=True)
class Offer:
    """A part that is one map, and what it costs before and after.

    Attributes:
        macs: of its layers and pools, and of the layer that takes their place.
        saved: elements that are no longer written.
        reason: why it does not pay; empty where it does.
    """

    part: Part
    layout: Layout
    geometry: Geometry
    macs: tuple[int, int]
    saved: int
    reason: str = ""

    @property
    def gain(self) -> int:
        """In MACs."""
        return self.macs[0] - self.macs[1] + KERNEL_WORTH * self.saved


@dataclass(frozen=True)
class Market:
    """Looks for parts of one graph.

    Attributes:
        shapes: of every tensor.
        order: place of every operator.
        profit: "auto" takes what pays, "all" whatever is exact.
        ignored: operators whose reading of a tensor does not count.
    """

    shapes: Shapes
    order: dict[ir.Node, float]
    profit: Profit
    ignored: frozenset[ir.Node] = frozenset()

    def offers(self, sink: ir.Node) -> tuple[list[Offer], dict[ir.Node, str]]:
        """What ends in `sink` and pays, the best first, and why the rest is left alone."""
        found, left = [], {}
        for part in parts_behind(sink, self.order, self.ignored):
            if not self._is_candidate(part):
                continue
            try:
                offer = self._weigh(part)
            except NotMergeableError as error:
                left[sink] = str(error)
                continue
            if offer.reason:
                left[sink] = offer.reason
            elif self.profit == "all" or offer.gain >= self._inner_gain(part):
                found.append(offer)
        if self.profit == "all":
            return found[::-1], left
        return sorted(found, key=lambda offer: -offer.gain), left

    def ignoring(self, nodes: frozenset[ir.Node]) -> Market:
        """The same, without what these operators read."""
        return replace(self, ignored=self.ignored | nodes)

    def _is_candidate(self, part: Part) -> bool:
        if part.joins:
            return part.layers + part.pools > 0
        return part.layers >= 2 or (self.profit == "all" and part.layers > 0 and part.pools > 0)

    def _weigh(self, part: Part) -> Offer:
        layout = layout_of(list(part.nodes))
        own: dict[ir.Node, Geometry] = {}

        def geometry(node: ir.Node) -> Geometry:
            own[node] = read(node, layout, self.shapes).geometry
            return own[node]

        whole = evaluate(part, layout, identity(part, layout, self.shapes).geometry, geometry)
        counted = {n: g for n, g in own.items() if n.op_type in (*WEIGHTED, "AveragePool")}
        before = {n: g.macs * self._positions(n, g.outputs) for n, g in counted.items()}
        after = whole.macs * self._positions(part.nodes[-1], whole.outputs)
        saved = sum(self._elements(n) for n in part.nodes if n.op_type != "Identity")
        saved -= self._elements(part.nodes[-1])
        layers = sum(macs for n, macs in before.items() if n.op_type in WEIGHTED)
        reason = ""
        total = sum(before.values())
        if self.profit == "auto" and not part.joins and after >= layers:
            reason = f"one layer instead of the chain would take {_times(after, layers)}"
        elif self.profit == "auto" and after > total + KERNEL_WORTH * saved:
            reason = f"one layer would take {_times(after, total)}"
        return Offer(part, layout, whole, (total, after), saved, reason)

    def _inner_gain(self, part: Part) -> int:
        """Of merging the branches inside one by one, and leaving the rest."""
        total, covered = 0, set()
        for node in reversed(part.nodes[:-1]):
            if node not in covered and is_join(node):
                best = self.offers(node)[0][:1]
                total += sum(offer.gain for offer in best)
                covered |= {one for offer in best for one in offer.part.nodes}
        return total

    def _elements(self, node: ir.Node) -> int:
        return math.prod(map(abs, self.shapes.get(node.outputs[0].name or "", ())))

    def _positions(self, node: ir.Node, channels: int) -> int:
        return max(self._elements(node) // channels, 1)


def identity(part: Part, layout: Layout, shapes: Shapes) -> AffineMap:
    """The map of the root.

    Raises:
        NotMergeableError: its shape is not known.
    """
    return same(shapes.get(part.root.name or "", ()), layout)


def affine_map(offer: Offer, shapes: Shapes) -> AffineMap:
    """The numbers of an offer.

    Raises:
        NotMergeableError: padding between its layers is not what the first makes of zeros.
    """
    layout = offer.layout
    start = identity(offer.part, layout, shapes)
    whole = evaluate(offer.part, layout, start, lambda node: read(node, layout, shapes))
    if whole.geometry.padded and whole.fill.any():
        raise NotMergeableError("it pads with a constant other than zero")
    return whole


def _times(after: int, before: int) -> str:
    return f"{after / max(before, 1):.3g} times the multiply-accumulates"
