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
import itertools
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias, get_args

import numpy as np

from compress.errors import MissingExtraError, UsageError

Method = Literal["channel_svd", "spatial_svd", "tucker", "cp"]
METHODS: tuple[Method, ...] = get_args(Method)
Ranks: TypeAlias = tuple[int, ...]
"""(R,), or (R_in, R_out) of Tucker-2; for each group of channels."""
ITERATIONS = 200
"""Of HOOI and ALS at most."""


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


Maker: TypeAlias = Callable[[Ranks], list[Link]]


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


def decompose(
    weight: np.ndarray, groups: int, method: Method, bases: Sequence[np.ndarray] | None = None
) -> Maker:
    """A function from ranks to the chain that approximates a weight; the SVD is done once.

    Args:
        weight: (T, S / groups, *kernel).
        groups: of channels.
        method: one of `METHODS`.
        bases: for channel_svd, what its 1 x 1 convolution spans in place of the singular vectors:
            orthonormal columns (T / groups, T / groups) for each group, the most important first.

    Raises:
        UsageError: the method does not apply to such a layer.
        MissingExtraError: tucker and cp without tensorly.
    """
    full_ranks(weight.shape, groups, method)
    parts = np.split(np.asarray(weight, np.float64), groups)
    if method == "channel_svd" and bases is not None:
        makers = [_projected(part, basis) for part, basis in zip(parts, bases, strict=True)]
    else:
        makers = [_MAKERS[method](part) for part in parts]

    def make(ranks: Ranks) -> list[Link]:
        check_ranks(ranks, weight.shape, groups, method)
        chains = [maker(ranks) for maker in makers]
        return [_side_by_side(links) for links in zip(*chains, strict=True)]

    return make


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


def _side_by_side(links: Sequence[Link]) -> Link:
    """The same link of several groups as one."""
    weight = np.concatenate([link.weight for link in links])
    return replace(links[0], weight=weight, groups=sum(link.groups for link in links))


def _channel(weight: np.ndarray) -> Maker:
    u, s, vt = np.linalg.svd(weight.reshape(len(weight), -1), full_matrices=False)
    root = np.sqrt(s)
    return _two(weight, u * root, (root[:, None] * vt).reshape(-1, *weight.shape[1:]))


def _projected(weight: np.ndarray, basis: np.ndarray) -> Maker:
    """The weight's rows projected on the first columns of a basis: W' = B B^T W."""
    rows = basis.T @ weight.reshape(len(weight), -1)
    return _two(weight, basis, rows.reshape(-1, *weight.shape[1:]))


def _two(weight: np.ndarray, columns: np.ndarray, rows: np.ndarray) -> Maker:
    axes = weight.ndim - 2

    def make(ranks: Ranks) -> list[Link]:
        last = columns[:, : ranks[0]].reshape(len(weight), ranks[0], *[1] * axes)
        return [Link(rows[: ranks[0]], 1, (True,) * axes), Link(last, 1, (False,) * axes)]

    return make


def _spatial(weight: np.ndarray) -> Maker:
    outputs, inputs, height, width = weight.shape
    matrix = weight.transpose(1, 2, 0, 3).reshape(inputs * height, outputs * width)
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    root = np.sqrt(s)
    first = (u * root).T.reshape(-1, inputs, height, 1)
    second = (root[:, None] * vt).reshape(-1, outputs, width).transpose(1, 0, 2)[:, :, None, :]

    def make(ranks: Ranks) -> list[Link]:
        (rank,) = ranks
        return [Link(first[:rank], 1, (True, False)), Link(second[:, :rank], 1, (False, True))]

    return make


def _tucker(weight: np.ndarray) -> Maker:
    decomposition = _tensorly()
    axes = weight.ndim - 2

    def make(ranks: Ranks) -> list[Link]:
        (core, (outer, inner)), _ = decomposition.partial_tucker(
            weight,
            rank=[ranks[1], ranks[0]],
            modes=[0, 1],
            n_iter_max=ITERATIONS,
            tol=1e-7,
            random_state=0,
        )
        ones, nowhere = [1] * axes, (False,) * axes
        return [
            Link(np.ascontiguousarray(inner.T).reshape(ranks[0], -1, *ones), 1, nowhere),
            Link(core, 1, (True,) * axes),
            Link(np.ascontiguousarray(outer).reshape(-1, ranks[1], *ones), 1, nowhere),
        ]

    return make


def _cp(weight: np.ndarray) -> Maker:
    decomposition = _tensorly()
    axes = weight.ndim - 2
    (full,) = full_ranks(weight.shape, 1, "cp")

    def make(ranks: Ranks) -> list[Link]:
        (rank,) = ranks
        if rank == full:
            factors = _unit_factors(weight)
        else:
            with warnings.catch_warnings():
                # Beyond the size of an axis the start is random: said, and meant.
                warnings.filterwarnings("ignore", "Trying to compute SVD", UserWarning)
                scales, factors = decomposition.parafac(
                    weight, rank=rank, n_iter_max=ITERATIONS, tol=1e-7, random_state=0
                )
            factors = _balanced(scales, factors)
        nowhere = (False,) * axes
        links = [Link(factors[1].T.reshape(rank, -1, *[1] * axes).copy(), 1, nowhere)]
        for axis, factor in enumerate(factors[2:]):
            spans = tuple(i == axis for i in range(axes))
            window = [-1 if span else 1 for span in spans]
            links.append(Link(factor.T.reshape(rank, 1, *window).copy(), rank, spans))
        links.append(Link(factors[0].reshape(-1, rank, *[1] * axes).copy(), 1, nowhere))
        return links

    return make


def _unit_factors(weight: np.ndarray) -> list[np.ndarray]:
    """The exact CP at full rank: one term for each position outside the largest axis."""
    largest = int(np.argmax(weight.shape))
    others = [i for i in range(weight.ndim) if i != largest]
    places = list(itertools.product(*(range(weight.shape[i]) for i in others)))
    factors = [np.zeros((size, len(places))) for size in weight.shape]
    moved: Any = np.moveaxis(weight, largest, 0)
    for term, place in enumerate(places):
        factors[largest][:, term] = moved[(slice(None), *place)]
        for axis, index in zip(others, place, strict=True):
            factors[axis][index, term] = 1.0
    return factors


def _balanced(scales: Any, factors: Sequence[Any]) -> list[np.ndarray]:
    """The same terms with every factor of a term equally long."""
    arrays = [np.asarray(factor, np.float64) for factor in factors]
    norms = np.array([np.linalg.norm(a, axis=0) for a in arrays])
    share = np.abs(np.asarray(scales) * norms.prod(0)) ** (1 / len(arrays))
    found = [a / np.where(n > 0, n, 1.0) * share for a, n in zip(arrays, norms, strict=True)]
    found[0] = found[0] * np.sign(np.asarray(scales))
    return found


def _tensorly() -> Any:
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
        _tensorly()


_MAKERS: dict[Method, Callable[[np.ndarray], Maker]] = {
    "channel_svd": _channel,
    "spatial_svd": _spatial,
    "tucker": _tucker,
    "cp": _cp,
}
