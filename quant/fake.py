"""The quantizer in torch: the same float32 values as `quant.quantizer`, with gradients.

Straight-through for the input (Bengio et al., arXiv 1308.3432), learned step size for the scale
(LSQ: Esser et al., arXiv 1902.08153).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from quant.quantizer import EXPONENT_MASK, check_scales
from quant.spec import FloatFormat, QuantSpec

_INSIDE = 1 + 2.0**-20
"""Widens the range that gradients pass: a min-max scale puts the largest value on the very end,
where the rounding of float32 must not decide whether it can move."""


def fake_quantize(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    spec: QuantSpec,
    axis: int | None = None,
    gradient_scale: float = 1.0,
) -> Tensor:
    """The float32 values that are left of `x` after quantization.

    With v = x / scale, q = round(v) on the grid, a = qmin - zero_point, b = qmax - zero_point:

    ========  ===========  =====  =====
    gradient  a <= v <= b  v < a  v > b
    ========  ===========  =====  =====
    of x      1            0      0
    of scale  q - v        a      b
    ========  ===========  =====  =====

    Args:
        x: any shape; arithmetic is in float32.
        scale: float32, above 0: shape () per tensor, (C,) per channel; per group the shape of
            `x` with `axis` divided by the size of a group.
        zero_point: whole numbers, same shape.
        spec: the format.
        axis: of the channels or groups; None per tensor.
        gradient_scale: factor on the gradient of the scale; see `lsq_gradient_scale`.

    Returns:
        float32, the shape of `x`.

    Raises:
        UsageError: the scale does not fit the tensor.
    """
    x = x.float()
    for parameter in (scale, zero_point):
        check_scales(tuple(x.shape), tuple(parameter.shape), spec, axis)
    scale = expand(scale, x.ndim, axis, spec.group)
    zero_point = expand(zero_point, x.ndim, axis, spec.group).float()
    if torch.is_grad_enabled() and (x.requires_grad or scale.requires_grad):
        result: Tensor = _FakeQuantize.apply(x, scale, zero_point, spec, gradient_scale)  # type: ignore[no-untyped-call]
        return result
    return _round(x / scale, zero_point, spec).mul_(scale)


def lsq_gradient_scale(count: int, spec: QuantSpec) -> float:
    """1 / sqrt(count qmax): makes updates of a scale as large, relative to it, as those of weights.

    Esser et al., arXiv 1902.08153, section 2.2.

    Args:
        count: elements that share one scale.
        spec: the format.
    """
    return 1 / math.sqrt(max(count, 1) * spec.qmax)


def expand(
    parameter: Tensor, rank: int, axis: int | None = None, group: int | None = None
) -> Tensor:
    """A scale or zero point in a shape that broadcasts against its tensor; keeps gradients.

    Args:
        parameter: shape () per tensor, (C,) per channel; per group the shape of the scales.
        rank: of the tensor.
        axis: of the channels or groups; None per tensor.
        group: elements in a group; None for the other granularities.
    """
    if axis is None:
        return parameter
    axis %= rank
    if group is None:
        return parameter.reshape([-1 if index == axis else 1 for index in range(rank)])
    return parameter.repeat_interleave(group, axis)


class _FakeQuantize(torch.autograd.Function):
    """Rounding with the gradients of `fake_quantize`; everything broadcasts against x."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        scale: Tensor,
        zero_point: Tensor,
        spec: QuantSpec,
        gradient_scale: float,
    ) -> Tensor:
        ctx.save_for_backward(x, scale, zero_point)
        ctx.spec, ctx.gradient_scale = spec, gradient_scale
        return _round(x / scale, zero_point, spec).mul_(scale)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, zero_point = ctx.saved_tensors
        spec, gradient = ctx.spec, gradients[0]
        steps = x / scale
        low, high = spec.qmin - zero_point, spec.qmax - zero_point
        inside = (steps >= low * _INSIDE) & (steps <= high * _INSIDE)
        of_x = gradient * inside if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return of_x, None, None, None, None
        rounded = _round(steps.clone(), zero_point, spec)  # outside: the nearer end, a or b
        slope = rounded.sub_(steps.masked_fill_(~inside, 0))
        of_scale = (gradient * slope).sum_to_size(scale.shape) * ctx.gradient_scale
        return of_x, of_scale, None, None, None


def _round(steps: Tensor, zero_point: Tensor, spec: QuantSpec) -> Tensor:
    """Round x / scale to q - zero_point in place; the operations are in the quantizer's order."""
    if isinstance(spec.format, FloatFormat):
        return _round_to_format(steps, spec.format)
    steps.round_().add_(zero_point).clamp_(spec.qmin, spec.qmax)
    if spec.symmetric and spec.format.signed:
        return steps
    return steps.sub_(zero_point)


def _round_to_format(steps: Tensor, form: FloatFormat) -> Tensor:
    """`quant.quantizer.round_to_format` on a tensor."""
    steps.clamp_(-form.max, form.max)
    spacing = steps.view(torch.int32).bitwise_and(EXPONENT_MASK).view(torch.float32)
    spacing.clamp_(min=2.0 ** (1 - form.bias)).mul_(2.0**-form.mantissa_bits)
    return steps.div_(spacing).round_().mul_(spacing)
