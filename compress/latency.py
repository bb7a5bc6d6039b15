"""Latency of several candidates on this machine, measured so that the ratio can be trusted.

Candidates are timed in short blocks that alternate within one process (A B B A ...), because a
clock that sinks or a neighbour that wakes up then hurts all of them alike. One round holds one
block of each; the ratio is taken within each round and its median over the rounds is reported
with a percentile bootstrap interval (Efron & Tibshirani, An Introduction to the Bootstrap,
1993, chapter 13) whose unit is the round: calls within a block are not independent. A block begins
when the threads of the one before have gone to sleep.
"""

from __future__ import annotations

import dataclasses
import gc
import math
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter, sleep
from typing import Any, Literal

import numpy as np

from compress.errors import EngineError, UsageError
from compress.machine import clock_mhz
from compress.progress import Progress, silent

Verdict = Literal["faster", "slower", "cannot tell"]

BLOCK_SECONDS = 0.005
"""Shortest block: long against the resolution of the clock and the noise of a thread's wake-up."""
MAX_BLOCK_CALLS = 1000
MAX_QUIET_SECONDS = 0.5
"""How long to wait at most for threads that spin."""
_TASKS = Path("/proc/self/task")
STEADY = 0.05
"""Largest relative spread that counts as steady, for warm-up and for noise."""
NARROW = 0.01
"""Half width of an interval, relative, below which more rounds would change nothing."""
FEWEST_ROUNDS = 6
"""With six rounds the range of the values holds the median with 1 - 2 * 0.5**6 = 97 %."""
ENOUGH_RUNS, ENOUGH_SECONDS = 50, 2.0


@dataclass(frozen=True)
class Timing:
    """Latency of one candidate.

    Attributes:
        p50_ms: median over the blocks of each block's median.
        p90_ms: ninth decile over all calls.
        low_ms: lower end of the 95 % bootstrap interval of `p50_ms`.
        high_ms: upper end.
        runs: number of timed calls.
        cv: standard deviation of the block medians over their mean.
        steady: warm-up ended by itself, and the last third of the blocks was as fast as the first.
    """

    p50_ms: float
    p90_ms: float
    low_ms: float
    high_ms: float
    runs: int
    cv: float
    steady: bool

    def __str__(self) -> str:
        places = _places(self.p50_ms)
        numbers = (f"{value:.{places}f}" for value in (self.p50_ms, self.low_ms, self.high_ms))
        return "{} ms [{}, {}]".format(*numbers)


@dataclass(frozen=True)
class Ratio:
    """Speedup of a candidate over the baseline, with its 95 % bootstrap interval."""

    value: float
    low: float
    high: float
    verdict: Verdict

    def __str__(self) -> str:
        return f"{self.value:.2f}x [{self.low:.2f}, {self.high:.2f}] {self.verdict}"


@dataclass(frozen=True)
class Comparison:
    """What one interleaved measurement found.

    Attributes:
        baseline: name of the candidate that the ratios refer to.
        timings: by name, the baseline among them.
        ratios: by name, without the baseline.
        rounds: number of rounds that counted.
        seconds: time that all of it took, warm-up included.
        notes: sentences about what disturbed it.
    """

    baseline: str
    timings: Mapping[str, Timing]
    ratios: Mapping[str, Ratio]
    rounds: int
    seconds: float
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain values for reports."""
        return {
            "baseline": self.baseline,
            "rounds": self.rounds,
            "seconds": self.seconds,
            "timings": {name: dataclasses.asdict(t) for name, t in self.timings.items()},
            "ratios": {name: dataclasses.asdict(r) for name, r in self.ratios.items()},
            "notes": list(self.notes),
        }


@dataclass(frozen=True)
class Blocks:
    """What timing one candidate leaves: from here, or sent by a device.

    Attributes:
        medians_ms: of each block (blocks,), in the order of the rounds.
        p90_ms: ninth decile over all calls.
        runs: number of timed calls.
        warm: whether the warm-up ended by itself.
    """

    medians_ms: np.ndarray
    p90_ms: float
    runs: int
    warm: bool


@dataclass
class _Candidate:
    """A callable and the blocks timed so far, in milliseconds."""

    name: str
    call: Callable[[], object]
    own_clock: bool = False
    calls_per_block: int = 1
    warm: bool = False
    blocks: list[np.ndarray] = field(default_factory=list)

    def run(self) -> float:
        """Seconds that one call took."""
        start = perf_counter()
        try:
            returned = self.call()
        except Exception as error:
            raise EngineError(f"{self.name} failed while it was being timed: {error}") from error
        return float(returned) if self.own_clock else perf_counter() - start  # type: ignore[arg-type]

    def block(self) -> None:
        _wait_until_quiet()
        if self.calls_per_block > 1:
            self.run()  # untimed: fills the caches that the candidate before it took
        self.blocks.append(np.array([self.run() for _ in range(self.calls_per_block)]) * 1e3)

    @property
    def medians(self) -> np.ndarray:
        return np.array([np.median(block) for block in self.blocks])

    def summary(self) -> Blocks:
        runs = np.concatenate(self.blocks)
        return Blocks(self.medians, float(np.quantile(runs, 0.9)), len(runs), self.warm)


def measure(
    calls: Mapping[str, Callable[[], object]],
    *,
    baseline: str | None = None,
    seconds: float = 10.0,
    min_blocks: int = 20,
    block_seconds: float = BLOCK_SECONDS,
    margin: float = 0.0,
    own_clock: bool = False,
    seed: int = 0,
    progress: Progress = silent,
) -> Comparison:
    """Time every callable against the baseline in interleaved blocks.

    Warm-up runs until three consecutive block medians of a candidate agree within 5 %, for at
    most a quarter of `seconds`. Then rounds follow, in an order shuffled by `seed`, until the
    time is spent or every interval is within 1 % of its value; there are at least `min_blocks`
    rounds, unless the candidates are so slow that these would take four times as long.

    Args:
        calls: by name; each call runs one inference and returns when the outputs are ready.
        baseline: a name in `calls`; the first by default.
        seconds: time to spend on all candidates together.
        min_blocks: smallest number of rounds.
        block_seconds: shortest block.
        margin: a candidate is "faster" only if the interval lies above 1 + margin.
        own_clock: the calls return their seconds, read from a device's clock.
        seed: of the order and the bootstrap.
        progress: opens a tracker in seconds.

    Raises:
        UsageError: nothing to time, or the baseline is not among the candidates.
        EngineError: a candidate raised; the message names it.
    """
    baseline = _check(calls, baseline, seconds, min_blocks)
    candidates = [_Candidate(name, call, own_clock) for name, call in calls.items()]
    rng = np.random.default_rng(seed)
    start, before_mhz = perf_counter(), clock_mhz()
    with _no_garbage_collection(), progress("Measuring latency", seconds) as advance:
        _warm_up(candidates, rng, seconds / 4, block_seconds)
        advance(perf_counter() - start)
        _rounds(candidates, rng, start + seconds, min_blocks, advance)
    return summarise(
        {candidate.name: candidate.summary() for candidate in candidates},
        baseline,
        seconds=perf_counter() - start,
        min_blocks=min_blocks,
        margin=margin,
        seed=seed,
        clocks_mhz=(before_mhz, clock_mhz()),
    )


def summarise(
    blocks: Mapping[str, Blocks],
    baseline: str,
    *,
    seconds: float,
    min_blocks: int = 20,
    margin: float = 0.0,
    seed: int = 0,
    clocks_mhz: tuple[float | None, float | None] = (None, None),
) -> Comparison:
    """Timings, ratios within the rounds, and notes about what disturbed them.

    Args:
        blocks: by name; all have as many blocks, one in each round.
        baseline: a name in `blocks`.
        seconds: time that the measurement took.
        min_blocks: rounds that were wanted.
        margin: a candidate is "faster" only if the interval lies above 1 + margin.
        seed: of the bootstrap.
        clocks_mhz: before and after, where known.
    """
    rng = np.random.default_rng(seed)
    timings = {name: _timing(one, rng) for name, one in blocks.items()}
    base = blocks[baseline].medians_ms
    ratios = {
        name: ratio(base / one.medians_ms, margin=margin, seed=seed)
        for name, one in blocks.items()
        if name != baseline
    }
    notes = _notes(timings, len(base), min_blocks, *clocks_mhz)
    return Comparison(baseline, timings, ratios, len(base), seconds, notes)


def _wait_until_quiet() -> None:
    """Wait until no other thread of this process runs.

    Runtimes let idle threads spin for a while (ONNX Runtime: tens of milliseconds), which would
    slow the next candidate down and not their own.
    """
    end = perf_counter() + MAX_QUIET_SECONDS
    while _others_run() and perf_counter() < end:
        sleep(0.001)


def _others_run() -> bool:
    """Whether another thread of this process is on a CPU or wants to be; Linux alone tells."""
    own = str(threading.get_native_id())
    for task in _TASKS.iterdir() if _TASKS.is_dir() else ():
        try:
            # "ID (NAME) STATE ..."; CPU times would only be true to a tick of the scheduler.
            running = task.name != own and (task / "stat").read_text().rpartition(")")[2][1] == "R"
        except (OSError, IndexError):  # it has ended
            continue
        if running:
            return True
    return False


def ratio(speedups: np.ndarray, *, margin: float = 0.0, seed: int = 0) -> Ratio:
    """The median of the speedups of single rounds (rounds,), its interval and the verdict."""
    low, high = median_interval(speedups, np.random.default_rng(seed))
    verdict: Verdict = "faster" if low > 1 + margin else "slower" if high < 1 else "cannot tell"
    return Ratio(float(np.median(speedups)), low, high, verdict)


def median_interval(
    values: np.ndarray, rng: np.random.Generator, resamples: int = 2000
) -> tuple[float, float]:
    """Percentile bootstrap interval (95 %) of the median of `values` (n,).

    A resample of n sorted values is n uniform ranks, so its middle ranks are order statistics
    of the uniform distribution, the k-th of n being Beta(k, n + 1 - k). Drawing these gives
    the bootstrap distribution of the median itself without an array of n x resamples.
    """
    ordered, n = np.sort(values), len(values)
    k = (n + 1) // 2
    lower = rng.beta(k, n + 1 - k, resamples)
    middle = ordered[np.minimum((lower * n).astype(int), n - 1)]
    if n % 2 == 0:
        # The next order statistic is the smallest of the n - k uniforms above the k-th.
        upper = lower + (1 - lower) * rng.beta(1, n - k, resamples)
        middle = (middle + ordered[np.minimum((upper * n).astype(int), n - 1)]) / 2
    low, high = np.quantile(middle, (0.025, 0.975))
    return float(low), float(high)


def _check(
    calls: Mapping[str, object], baseline: str | None, seconds: float, min_blocks: int
) -> str:
    if not calls:
        raise UsageError("There is nothing to time. Give at least one candidate.")
    baseline = next(iter(calls)) if baseline is None else baseline
    if baseline not in calls:
        raise UsageError(
            f"The baseline {baseline!r} is not among the candidates: {', '.join(calls)}."
        )
    if not (math.isfinite(seconds) and seconds > 0 and min_blocks >= 1):
        raise UsageError(
            f"Measuring for {seconds} seconds in {min_blocks} rounds is not possible. "
            f"Give a positive time and at least one round."
        )
    return baseline


def _warm_up(
    candidates: list[_Candidate], rng: np.random.Generator, seconds: float, block_seconds: float
) -> None:
    end = perf_counter() + seconds
    for candidate in candidates:
        candidate.run()  # first call: lazy initialization
        duration = min(candidate.run(), candidate.run())
        calls = math.ceil(block_seconds / max(duration, 1e-9))
        candidate.calls_per_block = min(calls, MAX_BLOCK_CALLS)
    while not all(c.warm for c in candidates) and perf_counter() < end:
        for candidate in _shuffled(candidates, rng):
            candidate.block()
            recent = candidate.medians[-3:]
            candidate.warm = len(recent) == 3 and _spread(recent) <= STEADY
    for candidate in candidates:
        candidate.blocks.clear()


def _rounds(
    candidates: list[_Candidate],
    rng: np.random.Generator,
    end: float,
    min_blocks: int,
    advance: Callable[[float], None],
) -> None:
    """Add one block of each candidate per round until enough is known."""
    start = last = perf_counter()
    patience = end + 3 * (end - start)
    while True:
        for candidate in _shuffled(candidates, rng):
            candidate.block()
        now = perf_counter()
        advance(now - last)
        last, rounds = now, len(candidates[0].blocks)
        if rounds < min(FEWEST_ROUNDS, min_blocks) or (rounds < min_blocks and now < patience):
            continue
        enough = now - start >= ENOUGH_SECONDS or rounds >= ENOUGH_RUNS
        if now >= end or (enough and rounds % 10 == 0 and _all_narrow(candidates)):
            return


def _all_narrow(candidates: list[_Candidate]) -> bool:
    """Whether every interval is within `NARROW` of its value; that of the only one if alone."""
    base, *others = [c.medians for c in candidates]
    samples = [base / other for other in others] or [base]
    intervals = (median_interval(sample, np.random.default_rng(0)) for sample in samples)
    return all(high - low <= NARROW * (high + low) for low, high in intervals)


def _timing(blocks: Blocks, rng: np.random.Generator) -> Timing:
    medians = blocks.medians_ms
    low, high = median_interval(medians, rng)
    third = max(1, len(medians) // 3)
    ends = np.array([np.median(medians[:third]), np.median(medians[-third:])])
    return Timing(
        p50_ms=float(np.median(medians)),
        p90_ms=blocks.p90_ms,
        low_ms=low,
        high_ms=high,
        runs=blocks.runs,
        cv=float(medians.std() / medians.mean()),
        steady=blocks.warm and _spread(ends) <= STEADY,
    )


def _notes(
    timings: Mapping[str, Timing],
    rounds: int,
    min_blocks: int,
    before_mhz: float | None,
    after_mhz: float | None,
) -> tuple[str, ...]:
    notes = [
        f"The machine was noisy: the blocks of {name} vary by {timing.cv:.0%}."
        for name, timing in timings.items()
        if timing.cv > STEADY
    ]
    drifting = [name for name, timing in timings.items() if not timing.steady]
    if drifting:
        notes.append(f"Not steady to the end: {', '.join(drifting)}.")
    if rounds < min_blocks:
        notes.append(f"Only {rounds} rounds fitted into the time; {min_blocks} were wanted.")
    if before_mhz and after_mhz and _spread(np.array([before_mhz, after_mhz])) > STEADY:
        notes.append(f"The clock changed from {before_mhz:.0f} to {after_mhz:.0f} MHz.")
    return tuple(notes)


def _shuffled(candidates: list[_Candidate], rng: np.random.Generator) -> list[_Candidate]:
    return [candidates[i] for i in rng.permutation(len(candidates))]


def _spread(values: np.ndarray) -> float:
    return float((values.max() - values.min()) / values.min())


def _places(value: float) -> int:
    """Decimal places that show three significant digits."""
    return max(0, 2 - math.floor(math.log10(value))) if value > 0 else 2


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
