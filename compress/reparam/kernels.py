"""Parallel and sequential linear branches as one convolution.

The identities of RepVGG (Ding et al. 2021, arXiv 2101.03697) and the diverse branch block (Ding
et al. 2021, arXiv 2103.13425, transforms I to VI) for any number of spatial axes. They hold where
no branch pads anything but its input: a branch that pads between two of its layers is another
function at the borders.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from compress.reparam.folding import affine


@dataclass(frozen=True)
class Kernel:
    """A convolution's weight (O, I/g, *k) and bias (O,), in float64."""

    weight: Tensor
    bias: Tensor

    def __add__(self, other: Kernel) -> Kernel:
        """Two parallel convolutions with the same window (transform II)."""
        return Kernel(self.weight + other.weight, self.bias + other.bias)


def of_layer(weight: Tensor, bias: Tensor | None) -> Kernel:
    """Parameters of a convolution."""
    weight = weight.detach().double()
    return Kernel(weight, weight.new_zeros(len(weight)) if bias is None else bias.detach().double())


def identity(channels: int, groups: int, rank: int, like: Tensor) -> Kernel:
    """The convolution 1x1 that returns its input, as RepVGG has it: K[i, i mod C/g] = 1."""
    weight = torch.zeros(channels, channels // groups, dtype=torch.float64, device=like.device)
    rows = torch.arange(channels, device=like.device)
    weight[rows, rows % (channels // groups)] = 1
    return Kernel(weight.reshape(*weight.shape, *(1,) * rank), weight.new_zeros(channels))


def average(channels: int, groups: int, size: tuple[int, ...], like: Tensor) -> Kernel:
    """An average over a window as a convolution (transform V): K[i, i mod C/g] = 1 / prod(k)."""
    point = identity(channels, groups, len(size), like)
    count = int(torch.tensor(size).prod())
    return Kernel((point.weight / count).expand(-1, -1, *size).clone(), point.bias)


def then_norm(kernel: Kernel, norm: nn.Module) -> Kernel:
    """A BatchNorm with running statistics behind it (transform I)."""
    if not isinstance(norm, _BatchNorm):
        raise TypeError(f"{type(norm).__name__} is no BatchNorm.")
    whole = affine(norm, torch.float64)
    factor = whole.factor.detach()
    rows = factor.reshape(-1, *(1,) * (kernel.weight.ndim - 1))
    return Kernel(kernel.weight * rows, kernel.bias * factor + whole.shift.detach())


def point_then(first: Kernel, second: Kernel, groups: int) -> Kernel:
    """A convolution 1x1 and then one with a window, which pads nothing (transform III of DBB).

    Args:
        first: weight (M, I/g, 1...).
        second: weight (O, M/g, *k).
        groups: of both.
    """
    rank = first.weight.ndim - 2
    inner = first.weight.flatten(1).reshape(groups, -1, first.weight.shape[1])  # (g, M/g, I/g)
    outer = second.weight.reshape(groups, -1, *second.weight.shape[1:])  # (g, O/g, M/g, *k)
    weight = torch.einsum("gmi,gom...->goi...", inner, outer).flatten(0, 1)
    taps = second.weight.sum(tuple(range(2, 2 + rank))).reshape(groups, -1, inner.shape[1])
    bias = torch.einsum("gom,gm->go", taps, first.bias.reshape(groups, -1)).flatten()
    return Kernel(weight, second.bias + bias)


def placed(kernel: Kernel, size: tuple[int, ...], start: tuple[int, ...]) -> Kernel:
    """A smaller window inside a larger one, zero around it (transform VI).

    Args:
        kernel: the smaller one.
        size: of the larger window.
        start: where the smaller one begins, by axis.
    """
    weight = kernel.weight.new_zeros(*kernel.weight.shape[:2], *size)
    inside = [slice(b, b + k) for b, k in zip(start, kernel.weight.shape[2:], strict=True)]
    weight[(slice(None), slice(None), *inside)] = kernel.weight
    return Kernel(weight, kernel.bias)
