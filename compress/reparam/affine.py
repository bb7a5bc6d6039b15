"""Affine maps of one tensor: convolutions, and what they become after and beside each other.

A map writes y = b + sum over taps of W x, in float64. Sums, compositions and stacks of maps are
maps again (RepVGG, Ding et al. 2021, arXiv 2101.03697; Diverse Branch Block, Ding et al. 2021,
arXiv 2103.13425; dilated branches: UniRepLKNet, Ding et al. 2024, arXiv 2311.15599). Padding is
part of a map: where that cannot be kept exactly, there is no map.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

PADDING_TOLERANCE = 1e-5
"""Between what a bias makes of zeros and the constant that the graph pads with, which its exporter
computed in float32; relative to the largest."""


class NotMergeableError(Exception):
    """Two maps have no sum or composition that is one map; says why."""


@dataclass(frozen=True)
class Axis:
    """What a map reads along one spatial axis.

    Output j reads the positions j * stride + first + step * i for i < size; positions outside of
    the input hold the padding. An input of n gives floor((n + excess - 1) / stride) + 1 outputs.

    Attributes:
        extent: n; 0 where it is open.
    """

    first: int = 0
    step: int = 1
    size: int = 1
    stride: int = 1
    excess: int = 0
    extent: int = 0

    @classmethod
    def of(
        cls, size: int, stride: int, dilation: int, begin: int, end: int, extent: int = 0
    ) -> Axis:
        """That of a convolution with these attributes."""
        step = dilation if size > 1 else 1
        return cls(-begin, step, size, stride, begin + end - dilation * (size - 1), extent)

    @property
    def last(self) -> int:
        """Offset of the last tap."""
        return self.first + self.step * (self.size - 1)

    @property
    def pads(self) -> tuple[int, int]:
        """Padding in front and behind, as a convolution has it."""
        return -self.first, self.excess + self.last

    @property
    def outputs(self) -> int:
        """How many there are; only for a known extent."""
        return (self.extent + self.excess - 1) // self.stride + 1

    def beside(self, other: Axis) -> Axis:
        """The taps of both, on the coarsest grid that holds them.

        Raises:
            NotMergeableError: their outputs stand for different places.
        """
        if self.stride != other.stride:
            raise NotMergeableError(f"strides {self.stride} and {other.stride} differ")
        excess = max(self.excess, other.excess)
        if self.excess != other.excess and (
            not self.extent or not other.extent or self.outputs != other.outputs
        ):
            raise NotMergeableError(
                "their outputs are equally large only for some sizes of the input"
            )
        first, last = min(self.first, other.first), max(self.last, other.last)
        step = math.gcd(self._grid, other._grid, self.first - other.first)
        size = (last - first) // step + 1 if step else 1
        extent = self.extent or other.extent
        return Axis(first, step or 1, size, self.stride, excess, extent)

    def then(self, second: Axis) -> Axis:
        """What `second` reads of the input of this one.

        Raises:
            NotMergeableError: it pads a tensor whose continuation is not constant.
        """
        begin, end = second.pads
        # Output -1 and the one behind the last must see nothing but padding.
        if (begin > 0 and self.last >= self.stride) or (end > 0 and self.excess + self.first < 0):
            raise NotMergeableError(
                "a padded layer reads the output of a window: borders would differ"
            )
        step = math.gcd(self._grid, self.stride * second._grid)
        first = self.first + self.stride * second.first
        last = self.last + self.stride * second.last
        return Axis(
            first,
            step or 1,
            (last - first) // step + 1 if step else 1,
            self.stride * second.stride,
            self.excess + self.stride * second.excess,
            self.extent,
        )

    @property
    def _grid(self) -> int:
        return self.step if self.size > 1 else 0

    def places(self, offset: int, whole: Axis) -> list[int]:
        """Where in `whole` the taps go, moved by `offset`."""
        taps = (offset + self.first + self.step * i for i in range(self.size))
        return [(tap - whole.first) // whole.step for tap in taps]


@dataclass(frozen=True)
class Geometry:
    """A map without its numbers: what it costs.

    Attributes:
        inputs: channels that it reads, in `groups` equal parts.
        outputs: channels that it writes, in as many parts.
        axes: one for each spatial axis; none for a linear layer on tokens.
    """

    inputs: int
    outputs: int
    groups: int
    axes: tuple[Axis, ...] = ()

    @property
    def sizes(self) -> tuple[int, ...]:
        """Of the kernel along each axis."""
        return tuple(axis.size for axis in self.axes)

    @property
    def macs(self) -> int:
        """Multiply-accumulates for one position of the output."""
        return self.outputs * (self.inputs // self.groups) * math.prod(self.sizes)

    @property
    def padded(self) -> bool:
        """Whether it reads anything outside of its input."""
        return any(pad > 0 for axis in self.axes for pad in axis.pads)

    def plus(self, other: Geometry) -> Geometry:
        """Of the sum.

        Raises:
            NotMergeableError: the two do not fit on top of each other.
        """
        if (self.inputs, self.outputs) != (other.inputs, other.outputs):
            raise NotMergeableError(
                f"{self.inputs} to {self.outputs} and {other.inputs} to {other.outputs} channels "
                f"differ"
            )
        groups = math.gcd(self.groups, other.groups)
        return replace(self, groups=groups, axes=self._beside(other))

    def stacked(self, other: Geometry) -> Geometry:
        """Of both, the output channels of `other` behind these.

        Raises:
            NotMergeableError: they read different inputs, or at different places.
        """
        if self.inputs != other.inputs:
            raise NotMergeableError(f"they read {self.inputs} and {other.inputs} channels")
        # Group by group the channels would come in another order.
        return Geometry(self.inputs, self.outputs + other.outputs, 1, self._beside(other))

    def negated(self) -> Geometry:
        """Of what is subtracted: the same."""
        return self

    def then(self, second: Geometry) -> Geometry:
        """Of `second` after this one.

        Raises:
            NotMergeableError: it reads another number of channels, or padding that is no constant.
        """
        if self.outputs != second.inputs or len(self.axes) != len(second.axes):
            raise NotMergeableError(f"{second.inputs} channels are read of {self.outputs}")
        axes = tuple(a.then(b) for a, b in zip(self.axes, second.axes, strict=True))
        groups = math.gcd(self.groups, second.groups)
        return Geometry(self.inputs, second.outputs, groups, axes)

    def _beside(self, other: Geometry) -> tuple[Axis, ...]:
        if len(self.axes) != len(other.axes):
            raise NotMergeableError("one of them has no spatial axes")
        return tuple(a.beside(b) for a, b in zip(self.axes, other.axes, strict=True))


@dataclass(frozen=True, eq=False)
class AffineMap:
    """A map with its numbers, all float64.

    Attributes:
        geometry: what it reads.
        kernel: (groups, outputs of a group, inputs of a group, *sizes).
        bias: (outputs,).
        fill: what it takes to be outside of its input, (inputs,); zeros for a convolution.
    """

    geometry: Geometry
    kernel: np.ndarray
    bias: np.ndarray
    fill: np.ndarray

    @classmethod
    def of(
        cls,
        weight: np.ndarray,
        bias: np.ndarray | None = None,
        groups: int = 1,
        axes: Sequence[Axis] = (),
    ) -> AffineMap:
        """That of a convolution: weight (outputs, inputs / groups, *sizes), bias (outputs,)."""
        outputs, per_group = weight.shape[:2]
        kernel = np.asarray(weight, np.float64).reshape(groups, -1, *weight.shape[1:])
        geometry = Geometry(per_group * groups, outputs, groups, tuple(axes))
        shift = np.zeros(outputs) if bias is None else np.asarray(bias, np.float64)
        return cls(geometry, kernel, shift, np.zeros(per_group * groups))

    @classmethod
    def scale(cls, factors: np.ndarray, shift: np.ndarray, axes: Sequence[Axis]) -> AffineMap:
        """Factor and shift for each channel; with ones and zeros the identity."""
        weight = factors.reshape(-1, 1, *[1] * len(axes))
        return cls.of(weight, shift, len(factors), axes)

    @property
    def weight(self) -> np.ndarray:
        """As a convolution stores it, (outputs, inputs / groups, *sizes)."""
        return self.kernel.reshape(self.geometry.outputs, *self.kernel.shape[2:])

    def plus(self, other: AffineMap) -> AffineMap:
        """The sum of both (transforms II, III, X and XI).

        Raises:
            NotMergeableError: see `Geometry.plus`, or they pad with different constants.
        """
        geometry = self.geometry.plus(other.geometry)
        kernel = self._spread(geometry, geometry.groups) + other._spread(geometry, geometry.groups)
        return AffineMap(geometry, kernel, self.bias + other.bias, self._common_fill(other))

    def stacked(self, other: AffineMap) -> AffineMap:
        """Both, the output channels of `other` behind these (transform XII).

        Raises:
            NotMergeableError: see `Geometry.stacked`, or they pad with different constants.
        """
        geometry = self.geometry.stacked(other.geometry)
        kernel = np.concatenate([one._spread(geometry, 1) for one in (self, other)], 1)
        bias = np.concatenate([self.bias, other.bias])
        return AffineMap(geometry, kernel, bias, self._common_fill(other))

    def negated(self) -> AffineMap:
        """The map that is subtracted."""
        return replace(self, kernel=-self.kernel, bias=-self.bias)

    def then(self, second: AffineMap) -> AffineMap:
        """`second` after this one (transforms I and V to IX).

        Raises:
            NotMergeableError: see `Geometry.then`, or the padding in between is not what this map
                makes of the padding in front of it.
        """
        whole = self.geometry.then(second.geometry)
        if second.geometry.padded:
            self._require_outside(second.fill)
        groups = whole.groups
        first, last = self._regrouped(groups), second._regrouped(groups)
        kernel = np.zeros((groups, last.shape[1], first.shape[2], *whole.sizes))
        pairs = list(zip(self.geometry.axes, second.geometry.axes, whole.axes, strict=True))
        flat = last.reshape(*last.shape[:3], -1)
        taps = itertools.product(*map(range, second.geometry.sizes))
        for number, tap in enumerate(taps):
            offsets = [
                a.stride * (b.first + b.step * i) for (a, b, _), i in zip(pairs, tap, strict=True)
            ]
            places = [a.places(o, w) for (a, _, w), o in zip(pairs, offsets, strict=True)]
            product = np.einsum("gom,gmi...->goi...", flat[..., number], first, optimize=True)
            where = np.ix_(*map(range, kernel.shape[:3]), *places)
            kernel[where] += product
        constant = self.bias.reshape(groups, -1)
        bias = second.bias + np.einsum("gom,gm->go", flat.sum(-1), constant).reshape(-1)
        return AffineMap(whole, kernel, bias, self.fill)

    def _require_outside(self, fill: np.ndarray) -> None:
        """Check that this map continues with the constant that the next one pads with."""
        sums = self.kernel.reshape(*self.kernel.shape[:3], -1).sum(-1)
        made = np.einsum("goi,gi->go", sums, self.fill.reshape(sums.shape[0], -1)).reshape(-1)
        outside = self.bias + made
        scale = max(np.abs(outside).max(initial=0), np.abs(fill).max(initial=0))
        if np.abs(outside - fill).max(initial=0) > PADDING_TOLERANCE * scale:
            raise NotMergeableError(
                "zeros are padded between two layers where the first would write its bias"
                if not fill.any()
                else "the constant that is padded between two layers is not the bias of the first"
            )

    def _common_fill(self, other: AffineMap) -> np.ndarray:
        if not self.geometry.padded:
            return other.fill if other.geometry.padded else np.zeros_like(self.fill)
        if other.geometry.padded and not np.array_equal(self.fill, other.fill):
            raise NotMergeableError("they pad their input with different constants")
        return self.fill

    def _spread(self, whole: Geometry, groups: int) -> np.ndarray:
        """The kernel on the grid of `whole`, zeros between its taps."""
        kernel = self._regrouped(groups)
        spread = np.zeros((*kernel.shape[:3], *whole.sizes))
        places = [a.places(0, w) for a, w in zip(self.geometry.axes, whole.axes, strict=True)]
        spread[np.ix_(*map(range, kernel.shape[:3]), *places)] = kernel
        return spread

    def _regrouped(self, groups: int) -> np.ndarray:
        """The kernel with fewer groups: blocks on a diagonal."""
        had, outputs, inputs, *sizes = self.kernel.shape
        if had == groups:
            return self.kernel
        each = had // groups
        blocks = np.zeros((groups, each, outputs, each, inputs, *sizes))
        for block in range(each):
            blocks[:, block, :, block] = self.kernel[block::each]
        return blocks.reshape(groups, each * outputs, each * inputs, *sizes)
