"""Which part of every tensor a patch of the output needs: intervals backwards through windows.

An output interval [a, b) of an operator with kernel k, stride s, dilation d and padding p before
needs the input interval [a s - p, (b - 1) s - p + (k - 1) d + 1). What lies outside of the tensor
is the operator's real padding; what neighbouring patches need both is computed twice (Lin et al.,
"MCUNetV2: Memory-Efficient Patch-based Inference for Tiny Deep Learning", 2021, section 3.1).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

Interval = tuple[int, int]
Region = tuple[Interval, ...]
"""One half-open interval for each spatial axis."""


@dataclass(frozen=True)
class Window:
    """What an operator reads along one axis.

    Attributes:
        kernel: taps.
        stride: positions between neighbouring outputs.
        dilation: positions between neighbouring taps.
        before: positions of padding in front of the tensor.
    """

    kernel: int = 1
    stride: int = 1
    dilation: int = 1
    before: int = 0

    def needs(self, interval: Interval) -> Interval:
        """The input interval of an output interval; it may reach over the tensor's ends."""
        first, last = interval[0], interval[1] - 1
        start = first * self.stride - self.before
        return start, last * self.stride - self.before + (self.kernel - 1) * self.dilation + 1


@dataclass(frozen=True)
class Layer:
    """One operator of a stage.

    Attributes:
        name: of the operator.
        op_type: its ONNX type.
        reads: tensors of the stage that it reads.
        writes: tensors that it writes, all of one spatial size.
        windows: one for each spatial axis; every operand is read through them.
        macs: multiply-accumulates for its whole output.
    """

    name: str
    op_type: str
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    windows: tuple[Window, ...]
    macs: int = 0


def inside(interval: Interval, size: int) -> Interval:
    """The part of an interval that is within 0..size."""
    start = min(max(interval[0], 0), size)
    return start, max(min(interval[1], size), start)


def hull(one: Region, other: Region) -> Region:
    """The smallest region that holds both."""
    return tuple((min(a, c), max(b, d)) for (a, b), (c, d) in zip(one, other, strict=True))


def area(region: Region) -> int:
    """Positions in a region."""
    return math.prod(stop - start for start, stop in region)


def reach(layer: Layer, region: Region) -> Region:
    """What a layer reads for a region of its output, padding included."""
    pairs = zip(layer.windows, region, strict=True)
    return tuple(window.needs(interval) for window, interval in pairs)


def regions(
    layers: Sequence[Layer], sizes: Mapping[str, Sequence[int]], end: str, patch: Region
) -> dict[str, Region]:
    """The region of every tensor that a patch of `end` needs.

    Where several layers read a tensor, it is computed once for all of them.

    Args:
        layers: of the stage, in order.
        sizes: spatial sizes of all their tensors.
        end: the stage's output.
        patch: of it.
    """
    needed: dict[str, Region] = {end: patch}
    for layer in reversed(layers):
        written = [needed[name] for name in layer.writes if name in needed]
        if not written:
            continue
        whole = written[0]
        for other in written[1:]:
            whole = hull(whole, other)
        needed |= dict.fromkeys(layer.writes, whole)
        wanted = reach(layer, whole)
        for name in layer.reads:
            part = tuple(map(inside, wanted, sizes[name]))
            needed[name] = hull(needed[name], part) if name in needed else part
    return needed


def grid(sizes: Sequence[int], split: int) -> list[Region]:
    """`split` nearly equal parts along each axis, row by row."""
    bounds = [[round(size * i / split) for i in range(split + 1)] for size in sizes]
    return [tuple(cell) for cell in itertools.product(*(itertools.pairwise(b) for b in bounds))]
