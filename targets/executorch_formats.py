"""Integer formats in programs for ExecuTorch: int8 grids, stored constants, limits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.ao.quantization.fx._decomposed  # registers torch.ops.quantized_decomposed
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from compress.errors import UnsupportedError
from compress.torch_graph.network import Step
from compress.torch_graph.operators import Attributes

QUANTIZE, DEQUANTIZE = "QuantizeLinear", "DequantizeLinear"
LOW, HIGH = -128, 127


@dataclass(frozen=True)
class Grid:
    """Scale and zero point of an activation, as int8."""

    scale: float
    zero_point: int

    def quantize(self, x: Tensor) -> Tensor:
        """Floats as integers of this grid."""
        quantize_per_tensor = torch.ops.quantized_decomposed.quantize_per_tensor
        result: Tensor = quantize_per_tensor(x, *self._numbers)
        return result

    def dequantize(self, integers: Tensor) -> Tensor:
        """The floats that integers of this grid stand for."""
        dequantize_per_tensor = torch.ops.quantized_decomposed.dequantize_per_tensor
        result: Tensor = dequantize_per_tensor(integers, *self._numbers)
        return result

    @property
    def _numbers(self) -> tuple[float, int, int, int, torch.dtype]:
        return self.scale, self.zero_point, LOW, HIGH, torch.int8


@dataclass(frozen=True)
class Stored:
    """A constant in int8: numbers, scales and zero points, and the axis of several."""

    integers: Tensor
    scale: Tensor
    zero_point: Tensor
    axis: int | None = None

    def transposed(self) -> Stored:
        """A matrix the other way round."""
        axis = None if self.axis is None else 1 - self.axis
        integers = self.integers.T.contiguous()
        return Stored(integers, self.scale, self.zero_point, axis)

    def read(self) -> Tensor:
        """The float values."""
        if self.axis is None:
            return Grid(float(self.scale), int(self.zero_point)).dequantize(self.integers)
        numbers = (self.scale, self.zero_point, self.axis, LOW, HIGH, torch.int8)
        dequantize_per_channel = torch.ops.quantized_decomposed.dequantize_per_channel
        result: Tensor = dequantize_per_channel(self.integers, *numbers)
        return result


def by_one(channels: int) -> Stored:
    """The weights of a depthwise convolution that changes no integer."""
    ones = torch.ones((channels, 1, 1, 1), dtype=torch.int8)
    return Stored(ones, torch.ones(channels), torch.zeros(channels, dtype=torch.int64), 0)


def limited(x: Tensor, limits: tuple[int, int], grid: Grid) -> Tensor:
    """The floats of integers within limits."""
    low, high = limits
    if low == grid.zero_point and high >= HIGH:
        return F.relu(x)
    least, most = ((limit - grid.zero_point) * grid.scale for limit in limits)
    return F.hardtanh(x, least, most)


def quantize_linear(
    attributes: Attributes, x: Tensor, scale: Tensor, zero_point: Tensor | None = None
) -> Tensor:
    """QuantizeLinear, to learn shapes and constants."""
    dtype = torch.uint8 if zero_point is None else zero_point.dtype
    info = torch.iinfo(dtype)
    scale, zero = _spread(attributes, x, scale), _spread(attributes, x, zero_point)
    return torch.clamp(torch.round(x / scale) + zero, info.min, info.max).to(dtype)


def dequantize_linear(
    attributes: Attributes, x: Tensor, scale: Tensor, zero_point: Tensor | None = None
) -> Tensor:
    """DequantizeLinear, to learn shapes and constants."""
    scale, zero = _spread(attributes, x, scale), _spread(attributes, x, zero_point)
    return (x.to(torch.float64) - zero).to(torch.float32) * scale


def _spread(attributes: Attributes, x: Tensor, numbers: Tensor | None) -> Tensor:
    """Scales or zero points along their axis."""
    if numbers is None:
        return torch.zeros(())
    if numbers.ndim > 1 or attributes.get("block_size", 0):
        raise UnsupportedError("Quantization in blocks has no counterpart in int8 programs.")
    if numbers.numel() == 1:
        return numbers.reshape(())
    shape = [1] * x.ndim
    shape[attributes.get("axis", 1)] = -1
    return numbers.reshape(shape)


def grid_of(step: Step, known: Mapping[str, Tensor]) -> Grid:
    """The int8 grid of a QuantizeLinear.

    Raises:
        UnsupportedError: it is none.
    """
    scale = known.get(step.inputs[1])
    zero = known.get(step.inputs[2]) if len(step.inputs) > 2 else torch.zeros((), dtype=torch.uint8)
    plain = scale is not None and zero is not None and scale.numel() == zero.numel() == 1
    if scale is None or zero is None or not plain or zero.dtype not in (torch.uint8, torch.int8):
        raise UnsupportedError(
            f"{step.name} quantizes to another format than int8 with one constant scale. "
            f"Quantize activations to 8 bits per tensor."
        )
    return Grid(float(scale), int(zero) - shift_of(zero.dtype))


def stored_of(step: Step, known: Mapping[str, Tensor]) -> Stored | None:
    """The constant that a DequantizeLinear reads, as int8; None where it is none of 8 bits."""
    integers = known[step.inputs[0]] if step.op == DEQUANTIZE else None
    if integers is None or integers.dtype not in (torch.uint8, torch.int8):
        return None
    shift = shift_of(integers.dtype)
    scale = known[step.inputs[1]]
    zero = known[step.inputs[2]] if len(step.inputs) > 2 else torch.zeros_like(scale)
    axis = None if scale.numel() == 1 else int(step.attributes.get("axis", 1)) % integers.ndim
    numbers = (integers.to(torch.int16) - shift).to(torch.int8)
    shape = () if axis is None else (-1,)
    zeros = zero.to(torch.int64).reshape(shape) - shift
    return Stored(numbers, scale.to(torch.float32).reshape(shape), zeros, axis)


def shift_of(dtype: torch.dtype) -> int:
    """128 for unsigned integers: with that less, values and zero point are those of int8."""
    return 128 if dtype == torch.uint8 else 0
