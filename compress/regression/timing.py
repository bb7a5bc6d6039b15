"""Latency of both sides in pairs of fresh sessions, until every limit is judged or time is up.

Fresh sessions in one process are enough: over 8 processes with 8 pairs each, for three networks
with one and with two threads, the means of the processes spread about as much as pairs within a
process explain (0.47 % found and 0.45 % expected for the smallest network, 2.4 % and 2.1 % with two
threads). The order of building does matter: of the smallest network the side that was built second
was half a percent faster. So the order is drawn anew for each pair.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from time import perf_counter

import numpy as np

from compress.latency import Comparison
from compress.progress import Progress, silent
from compress.regression.limits import Limit
from compress.regression.sequential import (
    ALPHA,
    Interval,
    centre_interval,
    first_look,
    median_interval,
    next_look,
    spent,
)
from compress.sessions import each_session

PAIR_SECONDS = 0.25
"""Timing of one pair: enough that the sessions' own luck, and not this, is the larger noise."""
BLOCK_SECONDS = 0.01
ROUNDS = 5

BASELINE, CANDIDATE = "baseline", "candidate"


@dataclass
class Pairs:
    """Session values so far, one entry per pair.

    Attributes:
        found: by side and quantile ("p50", "p90"), milliseconds.
        slowdowns: by quantile, logarithm of candidate over baseline; empty for one side alone.
        notes: what the sessions had to say, each once.
    """

    found: dict[tuple[str, str], list[float]] = field(default_factory=dict)
    slowdowns: dict[str, list[float]] = field(default_factory=dict)
    notes: dict[str, None] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(next(iter(self.found.values()), []))

    def add(self, session: Comparison) -> None:
        """Take in one more session of both sides."""
        for side, timing in session.timings.items():
            self.found.setdefault((side, "p50"), []).append(timing.p50_ms)
            self.found.setdefault((side, "p90"), []).append(timing.p90_ms)
        self.notes |= dict.fromkeys(note for note in session.notes if note.startswith("The clock"))
        if BASELINE not in session.timings or CANDIDATE not in session.timings:
            return
        sides = session.timings
        # Of the median the session knows more: a ratio within each of its rounds.
        self.slowdowns.setdefault("p50", []).append(-math.log(session.ratios[CANDIDATE].value))
        ninth = math.log(sides[CANDIDATE].p90_ms / sides[BASELINE].p90_ms)
        self.slowdowns.setdefault("p90", []).append(ninth)

    @property
    def sides(self) -> tuple[str, ...]:
        """Names of what was measured."""
        return tuple(dict.fromkeys(side for side, _ in self.found))

    def array(self, quantile: str, side: str = CANDIDATE) -> np.ndarray:
        """Milliseconds of each session (pairs,)."""
        return np.array(self.found[side, quantile])

    def middle_ms(self, side: str, quantile: str) -> float:
        """Median over the sessions."""
        return float(np.median(self.array(quantile, side)))

    def ratio(self, quantile: str, alpha: float) -> Interval:
        """Candidate over baseline; above 1 is slower."""
        return centre_interval(np.array(self.slowdowns[quantile]), alpha).map(math.exp)

    def absolute_ms(self, quantile: str, alpha: float) -> Interval:
        """Of the candidate alone."""
        return median_interval(self.array(quantile), alpha)

    def interval(self, limit: Limit, alpha: float) -> Interval:
        """What the limit is about: the ratio or the milliseconds."""
        quantile = limit.metric.removeprefix("latency_")
        find = self.absolute_ms if limit.absolute else self.ratio
        return find(quantile, alpha)


@dataclass(frozen=True)
class Judged:
    """The end of a measurement.

    Attributes:
        pairs: everything that was measured.
        looks: how many looks there were; 0 if the time was up before the first.
        alpha: error that the last look had, on each side of each limit.
        wanted: pairs that the first look needs.
        seconds: that it took.
    """

    pairs: Pairs
    looks: int
    alpha: float
    wanted: int
    seconds: float


def threshold(limit: Limit) -> float:
    """The limit on the scale of `Pairs.interval`."""
    return limit.value if limit.absolute else 1 + limit.value


def judge(
    sessions: Iterable[Comparison],
    limits: Sequence[Limit],
    *,
    seconds: float,
    progress: Progress = silent,
) -> Judged:
    """Measure pairs until one limit is surely broken, all are surely kept, or the time is up.

    Several limits share the error (Bonferroni). Without limits, one look ends it.

    Args:
        sessions: of both sides, or of the candidate alone, by `BASELINE` and `CANDIDATE`; each is
            asked for when it is needed.
        limits: on latency.
        seconds: for all pairs, building included; the last pair may end later.
        progress: opens a tracker in seconds.

    Raises:
        EngineError: a side failed while it was being timed.
    """
    alpha = ALPHA / max(1, len(limits))
    wanted = due = first_look(alpha)
    pairs, look = Pairs(), 0
    start = last = perf_counter()
    with progress("Measuring pairs of sessions", seconds) as advance:
        for session in sessions:
            pairs.add(session)
            now = perf_counter()
            advance(now - last)
            last, over = now, now - start >= seconds
            if over and len(pairs) < wanted:
                return Judged(pairs, 0, alpha, wanted, now - start)
            if len(pairs) < due and not over:
                continue
            look += 1
            if over or _certain(pairs, limits, spent(look, alpha)):
                break
            due = next_look(len(pairs))
    return Judged(pairs, look, spent(max(1, look), alpha), wanted, last - start)


def measure_alone(
    sessions: Iterable[Comparison],
    *,
    seconds: float,
    fewest: int,
    progress: Progress = silent,
) -> Pairs:
    """Sessions of one side, for a record: at least `fewest`, then until the time is up."""
    pairs = Pairs()
    start = last = perf_counter()
    with progress("Measuring sessions", seconds) as advance:
        for session in sessions:
            pairs.add(session)
            now = perf_counter()
            advance(now - last)
            last = now
            if now - start >= seconds and len(pairs) >= fewest:
                break
    return pairs


def sessions_of(
    build: Callable[[], Mapping[str, Callable[[], object]]], seed: int
) -> Iterator[Comparison]:
    """Sessions without end, as short as a pair may be."""
    return each_session(
        build, seconds=PAIR_SECONDS, min_blocks=ROUNDS, block_seconds=BLOCK_SECONDS, seed=seed
    )


def _certain(pairs: Pairs, limits: Sequence[Limit], alpha: float) -> bool:
    standings = [pairs.interval(one, alpha).standing(threshold(one)) for one in limits]
    return "beyond" in standings or "open" not in standings
