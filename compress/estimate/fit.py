"""From samples to a predictor: base line, boosted trees for each kernel type, launch gaps.

The time of a kernel is learned as the logarithm of its ratio to a base line, a sum of constant,
arithmetic and bytes with coefficients that cannot be negative. Trees alone are constant beyond
their samples; the base line goes on growing. Profilers add time to each kernel and round to whole
microseconds, so labels are corrected first: what networks take in all without the profiler says
how much that is.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import nnls

from compress.errors import UsageError
from compress.estimate.analytical import group
from compress.estimate.features import RANGED, Described, matrix
from compress.estimate.samples import Sample
from compress.estimate.trees import Trees, fit_trees

FEWEST_FOR_TREES = 40
"""Kernels of one type; with fewer the base line has to do."""
FEWEST_NETWORKS = 8
FOLDS = 5
_SMALLEST_US = 0.2
"""A kernel's time after the profiler's share is taken away: never nothing."""


@dataclass(frozen=True, eq=False)
class TypePredictor:
    """Time of the kernels of one type.

    Attributes:
        coefficients: of `base_terms` (terms,), in microseconds.
        trees: of the logarithm of time / base line; None where samples were few.
        ranges: smallest and largest value in the samples, by feature of `RANGED`.
        fused: what was fused in some sample.
        samples: how many there were.
    """

    coefficients: np.ndarray
    trees: Trees | None
    ranges: dict[str, tuple[float, float]]
    fused: tuple[str, ...]
    samples: int

    def predict_us(self, rows: np.ndarray) -> np.ndarray:
        """Microseconds (kernels,) from features (kernels, features)."""
        base = base_terms(rows) @ self.coefficients
        if self.trees is None:
            return np.asarray(base)
        return np.asarray(base * np.exp(self.trees.predict(rows).astype(np.float64)))


@dataclass(frozen=True)
class Labels:
    """Samples with the profiler's share taken out of their times.

    Attributes:
        overhead_us: that the profiler adds to each kernel, by `analytical.group`; negative where
            the runtime itself leaves a gap between kernels.
        call_us: that a call takes besides its kernels.
        reference_ms: the clock that all times are normalised to.
        totals_us: of each network, normalised (networks,).
        times_us: of its kernels, which with `call_us` add up to the total.
    """

    overhead_us: dict[str, float]
    call_us: float
    reference_ms: float
    totals_us: np.ndarray
    times_us: tuple[np.ndarray, ...]


def label(samples: Sequence[Sample]) -> Labels:
    """Correct the times of kernels by those of whole networks.

    total = a * sum of kernels - p * number of kernels + c, fitted to relative errors, with a p of
    its own for networks in int8, whose kernels have more inputs for the profiler to describe. Then
    each network's kernels are scaled so that they add up to what it took in all.
    """
    reference = float(np.median([one.reference_ms for one in samples]))
    drift = np.array([reference / one.reference_ms for one in samples])
    totals = np.array([one.total_ms for one in samples]) * 1e3 * drift
    sums = np.array([sum(one.times_us) for one in samples]) * drift
    counts = np.array([len(one.times_us) for one in samples], float)
    groups = np.array([group(one.kernels) for one in samples])
    overhead, call = _overheads(totals, sums, counts, groups)
    call = min(call, 0.5 * float(totals.min()))
    times = []
    for one, factor, total, kind in zip(samples, drift, totals, groups, strict=True):
        spent = np.maximum(np.array(one.times_us) * factor - overhead[kind], _SMALLEST_US)
        times.append(spent * (total - call) / spent.sum())
    return Labels(overhead, call, reference, totals, tuple(times))


def _overheads(
    totals: np.ndarray, sums: np.ndarray, counts: np.ndarray, groups: np.ndarray
) -> tuple[dict[str, float], float]:
    """What the profiler adds to each kernel, by group, and what a call takes besides."""
    names = sorted({str(name) for name in groups})
    columns = [sums, np.ones(len(totals))]
    for name in names:
        columns += [counts * (groups == name), -counts * (groups == name)]
    terms = np.stack(columns, 1)
    weights = 1 / totals
    found = np.zeros(len(columns))
    for _ in range(5):  # towards least absolute deviations: a disturbed network counts less
        found = nnls(terms * weights[:, None], totals * weights)[0]
        off = np.abs(terms @ found / totals - 1)
        weights = 1 / totals / np.sqrt(np.maximum(off, 0.01))
    shares = {name: float(found[3 + 2 * i] - found[2 + 2 * i]) for i, name in enumerate(names)}
    return shares, float(found[1])


def base_terms(rows: np.ndarray) -> np.ndarray:
    """What the base line adds up (kernels, terms): 1, GMACs with unused lanes, and kilobytes."""
    from compress.estimate.features import FEATURES

    column = {name: rows[:, index].astype(np.float64) for index, name in enumerate(FEATURES)}
    macs, read, held, written = (
        2 ** column[name] - 1 for name in ("macs", "bytes_read", "bytes_weights", "bytes_written")
    )
    filled = macs * np.maximum(column["filled"], 1 + column["waste_out_16"])
    return np.stack(
        [np.ones(len(rows)), macs / 1e6, filled / 1e6, read / 1e3, held / 1e3, written / 1e3], 1
    )


def fit_types(
    samples: Sequence[Sample], times: Sequence[np.ndarray], *, rounds: int = 200, seed: int = 0
) -> dict[str, TypePredictor]:
    """A predictor for each kernel type among the samples.

    Args:
        samples: networks.
        times: of their kernels in microseconds, from `label`.
        rounds: trees of one type.
        seed: of the trees.
    """
    kernels: dict[str, list[Described]] = defaultdict(list)
    spent: dict[str, list[float]] = defaultdict(list)
    shares: dict[str, list[float]] = defaultdict(list)
    for sample, found in zip(samples, times, strict=True):
        for kernel, time in zip(sample.kernels, found, strict=True):
            kernels[kernel.type].append(kernel)
            spent[kernel.type].append(float(time))
            shares[kernel.type].append(float(time / found.sum()))
    return {
        kind: _fit_type(kernels[kind], np.array(spent[kind]), np.array(shares[kind]), rounds, seed)
        for kind in sorted(kernels)
    }


def _fit_type(
    kernels: Sequence[Described], times: np.ndarray, shares: np.ndarray, rounds: int, seed: int
) -> TypePredictor:
    rows = matrix(kernels)
    terms = base_terms(rows)
    coefficients, _ = nnls(terms / times[:, None], np.ones(len(times)))
    if not coefficients.any():
        coefficients = np.eye(len(coefficients))[0] * float(np.median(times))
    # A base line of zero has no logarithm.
    coefficients[0] = max(coefficients[0], 0.02)
    trees = None
    if len(kernels) >= FEWEST_FOR_TREES:
        ratio = np.log(times / (terms @ coefficients))
        weights = np.sqrt(np.maximum(shares, 1e-3))
        trees = fit_trees(rows, ratio, weights / weights.mean(), rounds=rounds, seed=seed)
    raw = [kernel.raw for kernel in kernels]
    ranges = {name: (min(r[name] for r in raw), max(r[name] for r in raw)) for name in RANGED}
    fused = tuple(sorted({kernel.fused for kernel in kernels}))
    return TypePredictor(coefficients, trees, ranges, fused, len(kernels))


def predict_kernels(kernels: Sequence[Described], types: dict[str, TypePredictor]) -> np.ndarray:
    """Microseconds (kernels,); NaN where the type was never sampled."""
    found = np.full(len(kernels), np.nan)
    places: dict[str, list[int]] = defaultdict(list)
    for index, kernel in enumerate(kernels):
        places[kernel.type].append(index)
    for kind, indices in places.items():
        if kind in types:
            found[indices] = types[kind].predict_us(matrix([kernels[i] for i in indices]))
    return found


def check_enough(samples: Sequence[Sample]) -> None:
    """Refuse to fit too little.

    Raises:
        UsageError: there are fewer than `FEWEST_NETWORKS` networks.
    """
    networks = len({sample.network for sample in samples})
    if networks < FEWEST_NETWORKS:
        raise UsageError(
            f"{networks} networks are too few to learn from; at least {FEWEST_NETWORKS} are "
            f"needed. The runtime refused the others; `compress bench` says why."
        )
