"""Latency: a time with its interval, which never goes anywhere without saying where it is from."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import numpy as np

from compress.estimate.place import Place

Kind = Literal["measured", "table", "predicted", "analytical"]
"""How a time was found:

measured    the model ran, in several sessions
table       each operator ran alone; the sum
predicted   kernels' times learned from other networks; the sum
analytical  arithmetic and bytes against measured peaks; the sum
"""


@dataclass(frozen=True)
class Source:
    """How and where a time was found.

    Attributes:
        kind: see `Kind`.
        place: machine, target, threads and versions.
    """

    kind: Kind
    place: Place

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind) or not isinstance(self.place, Place):
            raise TypeError(f"A source is one of {', '.join(get_args(Kind))} and a place.")

    def __str__(self) -> str:
        return (
            f"{self.kind} for {self.place}"
            if self.kind != "measured"
            else f"measured on {self.place}"
        )


@dataclass(frozen=True)
class KernelEstimate:
    """One kernel or site of an estimate.

    Attributes:
        name: of the site, or of the kernel where it has none.
        type: of the kernel.
        us: microseconds.
        note: why its figure is doubtful, or "".
    """

    name: str
    type: str
    us: float
    note: str = ""


@dataclass(frozen=True)
class Latency:
    """The latency of one call.

    Attributes:
        median_ms: the figure.
        low_ms: lower end of the interval.
        high_ms: upper end.
        source: how and where it was found.
        coverage: share of cases that such intervals hold the measured figure in.
        evidence: what the interval is from, for people.
        kernels: the parts, where the kind has them.
        outside: what the predictor or the table knows nothing of; the interval is wider for it.
    """

    median_ms: float
    low_ms: float
    high_ms: float
    source: Source
    coverage: float
    evidence: str
    kernels: tuple[KernelEstimate, ...] = ()
    outside: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.source, Source):
            raise TypeError("A latency needs its source: how and where it was found.")
        numbers = (self.low_ms, self.median_ms, self.high_ms)
        ordered = self.low_ms <= self.median_ms <= self.high_ms
        if not (all(math.isfinite(n) and n > 0 for n in numbers) and ordered):
            raise ValueError(
                f"A latency and its interval are positive and in order, not {numbers}."
            )

    def __str__(self) -> str:
        places = max(0, 2 - math.floor(math.log10(self.median_ms)))
        low, middle, high = (
            f"{value:.{places}f}" for value in (self.low_ms, self.median_ms, self.high_ms)
        )
        return f"{middle} ms [{low}, {high}] {self.source.kind}"

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "median_ms": self.median_ms,
            "low_ms": self.low_ms,
            "high_ms": self.high_ms,
            "source": str(self.source),
            "kind": self.source.kind,
            "place": self.source.place.to_dict(),
            "coverage": self.coverage,
            "evidence": self.evidence,
            "kernels": [asdict(one) for one in self.kernels],
            "outside": list(self.outside),
        }


def ratio_interval(ratios: Sequence[float], coverage: float = 0.9) -> tuple[float, float, float]:
    """Bounds on measured / estimated for the next model, and the coverage that they have.

    Order statistics of the ratios of models that the estimate had not seen (split conformal
    prediction, Vovk et al. 2005): the k-th smallest and the k-th largest of n hold the next one
    with probability 1 - 2k / (n + 1), if it is drawn as they were. With few ratios the range of
    all of them has to do, and the coverage is what that gives.
    """
    ordered = np.sort(np.asarray(ratios, float))
    n = len(ordered)
    k = max(1, math.floor((1 - coverage) * (n + 1) / 2))
    return float(ordered[k - 1]), float(ordered[n - k]), max(0.0, 1 - 2 * k / (n + 1))
