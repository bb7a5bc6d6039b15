"""BatchNorm with running statistics folded into the layer before it, in differentiable torch.

With s = gamma / sqrt(variance + epsilon), for each output channel: W' = s W and
b' = s (b - mean) + beta (Jacob et al. 2018, arXiv 1712.05877, section 3.2). Computed with
autograd's own operations, gradients of W, b, gamma and beta are those of the two layers
(You et al. 2024, arXiv 2305.11624, section 3.2).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvTransposeNd


@dataclass(frozen=True)
class Affine:
    """What a BatchNorm with running statistics does: y = factor x + shift.

    Attributes:
        factor: gamma / sqrt(variance + epsilon), shape (C,).
        shift: beta - factor mean, shape (C,).
    """

    factor: Tensor
    shift: Tensor


def affine(norm: _BatchNorm, dtype: torch.dtype) -> Affine:
    """The affine map of a BatchNorm, differentiable in gamma and beta.

    Args:
        norm: has them, and running statistics.
        dtype: in which to compute.
    """
    if norm.running_mean is None or norm.running_var is None:
        raise TypeError("A BatchNorm without running statistics is no affine map.")
    factor = norm.weight.to(dtype) * torch.rsqrt(norm.running_var.to(dtype) + norm.eps)
    return Affine(factor, norm.bias.to(dtype) - factor * norm.running_mean.to(dtype))


def folded(
    layer: nn.Module, norm: _BatchNorm, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Weight and bias of the layer with its BatchNorm folded, in the dtype of its weight.

    Args:
        layer: a convolution, a transposed one, or a linear layer.
        norm: the BatchNorm behind it.
        dtype: computed in this one at least: 16 bits are too few for a product of factors.
    """
    weight: Tensor = layer.weight  # type: ignore[assignment]
    bias: Tensor | None = layer.bias  # type: ignore[assignment]
    dtype = torch.promote_types(weight.dtype, dtype)
    whole = affine(norm, dtype)
    new_weight = weight.to(dtype) * per_channel(whole.factor, layer)
    new_bias = whole.shift if bias is None else whole.factor * bias.to(dtype) + whole.shift
    return new_weight.to(weight.dtype), new_bias.to(weight.dtype)


def per_channel(factor: Tensor, layer: nn.Module) -> Tensor:
    """One number for each output channel, shaped to multiply the layer's weight.

    Args:
        factor: shape (O,).
        layer: its weight is (O, I/g, *k), (O, I) where it is linear, or (I, O/g, *k) where it is
            transposed: there output channel o belongs to group o // (O/g), and so to the rows
            of that group only.
    """
    weight: Tensor = layer.weight  # type: ignore[assignment]
    ones = (1,) * (weight.ndim - 2)
    if not isinstance(layer, _ConvTransposeNd):
        return factor.reshape(-1, 1, *ones)
    rows = weight.shape[0] // layer.groups
    grouped = factor.reshape(layer.groups, 1, -1).expand(-1, rows, -1)
    return grouped.reshape(weight.shape[0], -1, *ones)
