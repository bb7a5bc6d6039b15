"""Latency over several sessions: what repeated calls within one session cannot show.

Two sessions of one model differ by some percent, because their memory comes to lie elsewhere; all
calls of one session share that luck. So each candidate is built anew several times.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence

from compress.latency import BLOCK_SECONDS, Comparison, Ratio, Timing, Verdict, measure
from compress.progress import Progress, silent

SESSIONS = 3
MARGIN = 0.02
"""A gain below 2 % is no reason to give up the original's exact numbers."""


def measure_sessions(
    build: Callable[[], Mapping[str, Callable[[], object]]],
    *,
    sessions: int = SESSIONS,
    seconds: float = 10.0,
    requests: int = 1,
    margin: float = MARGIN,
    seed: int = 0,
    progress: Progress = silent,
) -> Comparison:
    """Compare candidates in several sessions; the first is the baseline.

    Args:
        build: makes a fresh callable for every candidate.
        sessions: how often to build.
        seconds: for all sessions together.
        requests: that one call runs; timings are for one of them.
        margin: "faster" needs an interval above 1 + margin.
        seed: of the order of blocks.
        progress: opens a tracker in seconds.

    Returns:
        as `combine`.
    """
    found = each_session(build, seconds=seconds / sessions, seed=seed, progress=progress)
    return combine(list(itertools.islice(found, sessions)), requests=requests, margin=margin)


def each_session(
    build: Callable[[], Mapping[str, Callable[[], object]]],
    *,
    seconds: float,
    min_blocks: int = 20,
    block_seconds: float = BLOCK_SECONDS,
    seed: int = 0,
    progress: Progress = silent,
) -> Iterator[Comparison]:
    """One session after the other, without end; a caller stops when it knows enough.

    Args:
        build: makes a fresh callable for every candidate; the first is the baseline.
        seconds: for one session.
        min_blocks: smallest number of rounds in it.
        block_seconds: shortest block.
        seed: of the order of blocks; each session has its own.
        progress: opens a tracker in seconds.
    """
    for index in itertools.count():
        yield measure(
            build(),
            seconds=seconds,
            min_blocks=min_blocks,
            block_seconds=block_seconds,
            seed=seed + index,
            progress=progress,
        )


def combine(
    found: Sequence[Comparison], *, requests: int = 1, margin: float = MARGIN
) -> Comparison:
    """One comparison from those of several sessions.

    Returns:
        Medians over the sessions; an interval reaches from the lowest to the highest end of the
        sessions' bootstrap intervals, and the verdict is taken from that.
    """
    notes = dict.fromkeys(note for one in found for note in one.notes)
    return Comparison(
        found[0].baseline,
        {
            name: _timing([one.timings[name] for one in found], requests)
            for name in found[0].timings
        },
        {name: _ratio([one.ratios[name] for one in found], margin) for name in found[0].ratios},
        sum(one.rounds for one in found),
        sum(one.seconds for one in found),
        tuple(notes),
    )


def _ratio(ratios: Sequence[Ratio], margin: float) -> Ratio:
    low, high = min(one.low for one in ratios), max(one.high for one in ratios)
    verdict: Verdict = "faster" if low > 1 + margin else "slower" if high < 1 else "cannot tell"
    return Ratio(statistics.median(one.value for one in ratios), low, high, verdict)


def _timing(timings: Sequence[Timing], requests: int) -> Timing:
    return Timing(
        p50_ms=statistics.median(one.p50_ms for one in timings) / requests,
        p90_ms=statistics.median(one.p90_ms for one in timings) / requests,
        low_ms=min(one.low_ms for one in timings) / requests,
        high_ms=max(one.high_ms for one in timings) / requests,
        runs=sum(one.runs for one in timings),
        cv=statistics.median(one.cv for one in timings),
        steady=all(one.steady for one in timings),
    )
