"""Low-rank factors of the weight of a convolution or linear layer.

A weight (T, S / groups, *kernel) becomes a chain of convolutions without anything between them:

channel_svd  k x k to R channels, then 1 x 1: the SVD of the weight as a matrix (T, S k k)
             (Denton et al. 2014, arXiv 1404.0736; Zhang et al. 2015, arXiv 1505.06798).
spatial_svd  k x 1 to R channels, then 1 x k: the SVD of the matrix (S k, T k)
             (Jaderberg et al. 2014, arXiv 1405.3866).
tucker       1 x 1 to R_in, k x k to R_out, 1 x 1: Tucker-2 by HOOI (Kim et al. 2016,
             arXiv 1511.06530).
cp           1 x 1 to R, one depthwise convolution along each axis, 1 x 1: CP by ALS
             (Lebedev et al. 2015, arXiv 1412.6553).

Stride, padding and dilation of an axis go to the link whose window spans it, so the chain is exact
at full rank: the links are linear, and padding with zeros along one axis commutes with what is
done along the others. Each group of channels is factorised by itself.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

import numpy as np

from compress.errors import MissingExtraError, UsageError

Method = Literal["channel_svd", "spatial_svd", "tucker", "cp"]
METHODS: tuple[Method, ...] = get_args(Method)
Ranks: TypeAlias = tuple[int, ...]
"""(R,), or (R_in, R_out) of Tucker-2; for each group of channels."""


@dataclass(frozen=True)
class Link:
    """One convolution of a chain.

    Attributes:
        weight: (out, in / groups, *kernel), float64.
        groups: of channels.
        spans: for each spatial axis, whether the window reaches along it; its stride, padding and
            dilation are then the layer's.
    """

    weight: np.ndarray
    groups: int
    spans: tuple[bool, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight."""
        return self.weight.shape

    @property
    def out(self) -> int:
        """Output channels."""
        return len(self.weight)


@dataclass(frozen=True)
class Form:
    """A link without its numbers; see `Link`."""

    shape: tuple[int, ...]
    groups: int
    spans: tuple[bool, ...]


def full_ranks(shape: Sequence[int], groups: int, method: Method) -> Ranks:
    """The smallest ranks at which every weight of this shape is reproduced exactly.

    Args:
        shape: of the weight, (T, S / groups, *kernel).
        groups: of channels.
        method: one of `METHODS`.

    Raises:
        UsageError: the method does not apply to such a layer; the message says why.
    """
    per_group, inputs, *kernel = (shape[0] // groups, *shape[1:])
    window = math.prod(kernel)
    match method:
        case "channel_svd":
            return (min(per_group, inputs * window),)
        case "spatial_svd" if len(kernel) == 2:
            return (min(inputs * kernel[0], per_group * kernel[1]),)
        case "tucker" if kernel:
            return min(inputs, per_group * window), min(per_group, inputs * window)
        case "cp" if kernel:
            sizes = (per_group, inputs, *kernel)
            return (math.prod(sizes) // max(sizes),)
        case "spatial_svd" | "tucker" | "cp":
            what = "two spatial axes" if method == "spatial_svd" else "a window"
            raise UsageError(
                f"{method} needs a layer with {what}, and this one has a weight of shape "
                f"{tuple(shape)}. Use channel_svd."
            )
        case _:
            raise UsageError(f"There is no method {method!r}; choose from {', '.join(METHODS)}.")


def check_ranks(ranks: Ranks, shape: Sequence[int], groups: int, method: Method) -> None:
    """Refuse ranks that do not exist for such a layer.

    Raises:
        UsageError: the method does not apply, or a rank is out of range.
    """
    full = full_ranks(shape, groups, method)
    if len(ranks) != len(full) or not all(1 <= r <= f for r, f in zip(ranks, full, strict=False)):
        wanted = " and ".join(f"1 to {most}" for most in full)
        raise UsageError(
            f"{method} of a weight {tuple(shape)} in {groups} groups takes ranks of {wanted}, "
            f"and {', '.join(map(str, ranks))} was given."
        )


def forms(shape: Sequence[int], groups: int, method: Method, ranks: Ranks) -> list[Form]:
    """What a chain of these ranks is made of.

    Args:
        shape: of the weight, (T, S / groups, *kernel).
        groups: of channels.
        method: one of `METHODS`.
        ranks: for each group.

    Raises:
        UsageError: the method does not apply to such a layer, or a rank is out of range.
    """
    check_ranks(ranks, shape, groups, method)
    outputs, inputs, *kernel = shape
    rank, axes = ranks[0] * groups, len(kernel)
    ones, everywhere, nowhere = [1] * axes, (True,) * axes, (False,) * axes
    first = Form((rank, inputs, *ones), groups, nowhere)
    last = Form((outputs, ranks[-1], *ones), groups, nowhere)
    match method:
        case "channel_svd":
            return [Form((rank, inputs, *kernel), groups, everywhere), last]
        case "spatial_svd":
            vertical = Form((rank, inputs, kernel[0], 1), groups, (True, False))
            return [vertical, Form((outputs, ranks[0], 1, kernel[1]), groups, (False, True))]
        case "tucker":
            core = Form((ranks[1] * groups, ranks[0], *kernel), groups, everywhere)
            return [first, core, last]
        case "cp":
            along = []
            for axis in range(axes):
                window = [size if i == axis else 1 for i, size in enumerate(kernel)]
                spans = tuple(i == axis for i in range(axes))
                along.append(Form((rank, 1, *window), rank, spans))
            return [first, *along, last]


def random_links(
    shape: Sequence[int], groups: int, method: Method, ranks: Ranks, rng: np.random.Generator
) -> list[Link]:
    """A chain of these ranks with random weights of variance 1 / fan-in; see `forms`."""
    return [
        Link(
            rng.standard_normal(form.shape) / math.sqrt(math.prod(form.shape[1:])),
            form.groups,
            form.spans,
        )
        for form in forms(shape, groups, method, ranks)
    ]


def dense(links: Sequence[Link]) -> np.ndarray:
    """The weight of the one convolution that a chain equals, (T, S / groups, *kernel)."""
    found: np.ndarray = functools.reduce(_compose, links[1:], links[0].weight)
    return found


def _compose(before: np.ndarray, link: Link) -> np.ndarray:
    """Windows span different axes, so their product is an outer one: sizes of 1 broadcast."""
    groups = link.groups
    first = before.reshape(groups, -1, *before.shape[1:])
    second = link.weight.reshape(groups, -1, *link.weight.shape[1:])
    product: np.ndarray = np.einsum("gom...,gms...->gos...", second, first, optimize=True)
    return product.reshape(-1, *product.shape[2:])


def tensorly() -> Any:
    """What decomposes for tucker and cp.

    Raises:
        MissingExtraError: it is not installed.
    """
    try:
        import tensorly.decomposition as decomposition
    except ImportError as error:
        raise MissingExtraError(
            "tucker and cp need tensorly. Install it with: pip install 'hwcompress[lowrank]'. Or "
            "use channel_svd and spatial_svd, which need nothing more."
        ) from error
    return decomposition


def require(method: Method) -> None:
    """Refuse a method whose package is missing.

    Raises:
        MissingExtraError: tucker or cp without tensorly.
        UsageError: there is no such method.
    """
    if method not in METHODS:
        raise UsageError(f"There is no method {method!r}; choose from {', '.join(METHODS)}.")
    if method in ("tucker", "cp"):
        tensorly()
