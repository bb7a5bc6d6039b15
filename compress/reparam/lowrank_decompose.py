"""Weights decomposed into chains, as `compress.reparam.lowrank_factors` describes them."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

import numpy as np

from compress.reparam.lowrank_factors import (
    Link,
    Method,
    Ranks,
    check_ranks,
    full_ranks,
    tensorly,
)

Maker: TypeAlias = Callable[[Ranks], list[Link]]
ITERATIONS = 200
"""Of HOOI and ALS at most."""


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
    decomposition = tensorly()
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
    decomposition = tensorly()
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


_MAKERS: dict[Method, Callable[[np.ndarray], Maker]] = {
    "channel_svd": _channel,
    "spatial_svd": _spatial,
    "tucker": _tucker,
    "cp": _cp,
}
