from __future__ import annotations

import gc
import json
import threading
from collections.abc import Callable
from time import perf_counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.errors import EngineError, UsageError
from compress.latency import Ratio, Timing, measure, median_interval, ratio
from compress.progress import silent


def busy(milliseconds: float) -> Callable[[], None]:
    def call() -> None:
        end = perf_counter() + milliseconds / 1e3
        while perf_counter() < end:
            pass

    return call


class Sinking:
    """A clock that sinks: every call of any candidate makes all later calls slower."""

    def __init__(self) -> None:
        self.calls = 0

    def candidate(self, milliseconds: float) -> Callable[[], None]:
        def call() -> None:
            self.calls += 1
            busy(milliseconds * (1 + self.calls / 300))()

        return call


def test_twice_as_slow_is_slower():
    found = measure({"one": busy(1), "two": busy(2)}, seconds=0.6)
    assert found.baseline == "one"
    assert list(found.ratios) == ["two"]
    assert found.ratios["two"].verdict == "slower"
    assert found.ratios["two"].low <= found.ratios["two"].value <= found.ratios["two"].high < 1
    assert found.timings["one"].p50_ms < found.timings["two"].p50_ms


def test_the_baseline_can_be_any_candidate():
    found = measure({"one": busy(1), "two": busy(2)}, baseline="two", seconds=0.6)
    assert found.baseline == "two"
    assert list(found.ratios) == ["one"]
    assert found.ratios["one"].verdict == "faster"


@pytest.mark.latency
def test_times_and_ratio_are_right():
    found = measure({"two": busy(2), "one": busy(1)}, seconds=1)
    assert found.timings["one"].p50_ms == pytest.approx(1, rel=0.02)
    assert found.timings["two"].p50_ms == pytest.approx(2, rel=0.02)
    assert found.ratios["one"].value == pytest.approx(2, rel=0.02)


def test_a_device_reads_its_own_clock() -> None:
    """What the host waits is not what the device took."""

    def device(seconds: float) -> Callable[[], float]:
        def call() -> float:
            busy(0.2)()
            return seconds

        return call

    calls = {"one": device(3e-3), "two": device(1e-3)}
    found = measure(calls, seconds=0.3, own_clock=True)
    assert found.timings["one"].p50_ms == pytest.approx(3)
    assert found.ratios["two"].value == pytest.approx(3)
    assert found.ratios["two"].verdict == "faster"


def test_a_candidate_is_mostly_not_faster_than_itself():
    call = busy(0.5)
    verdicts = [
        measure({"a": call, "b": call}, seconds=0.15, seed=seed).ratios["b"].verdict
        for seed in range(8)
    ]
    assert verdicts.count("cannot tell") >= 5


@pytest.mark.latency
def test_drift_cancels_in_the_paired_ratio():
    clock = Sinking()
    found = measure({"a": clock.candidate(0.5), "b": clock.candidate(1)}, seconds=0.8)
    timing, drift = found.timings["a"], found.ratios["b"]
    assert timing.cv > 0.1  # it did sink
    assert drift.verdict == "slower"
    # The median sank with the clock; the ratio knows the true half far better.
    assert drift.high - drift.low < (timing.high_ms - timing.low_ms) / timing.p50_ms
    assert any("steady" in note for note in found.notes)


def test_single_candidate_has_no_ratio():
    found = measure({"only": busy(0.2)}, seconds=0.1)
    assert found.ratios == {}
    assert 0.2 <= found.timings["only"].p50_ms <= found.timings["only"].p90_ms


def test_slow_candidates_get_fewer_rounds_and_a_note():
    found = measure({"a": busy(5), "b": busy(5)}, seconds=0.02, min_blocks=200)
    assert 6 <= found.rounds < 200
    assert any("rounds" in note for note in found.notes)


def test_a_failing_candidate_is_named():
    def broken() -> None:
        raise RuntimeError("kernel not found")

    with pytest.raises(EngineError, match=r"int8 failed .* kernel not found"):
        measure({"float32": busy(0.1), "int8": broken}, seconds=0.1)
    assert gc.isenabled()


def test_a_block_waits_for_threads_that_still_spin():
    spinning: list[threading.Thread] = []
    found_awake: list[bool] = []

    def leaves_a_thread_spinning() -> None:
        spinning.append(threading.Thread(target=busy(30)))
        spinning[-1].start()

    def looks() -> None:
        found_awake.append(any(thread.is_alive() for thread in spinning))
        busy(6)()  # so that a block is a single call

    measure({"looks": looks, "spins": leaves_a_thread_spinning}, seconds=1, min_blocks=6)
    for thread in spinning:
        thread.join()
    # Warm-up calls follow each other without a block.
    assert len(found_awake) > 8
    assert not any(found_awake[3:])


def test_garbage_collection_is_off_while_timing_and_on_after():
    seen = set()
    measure({"a": lambda: seen.add(gc.isenabled())}, seconds=0.05)
    assert seen == {False}
    assert gc.isenabled()


@pytest.mark.parametrize(
    ("calls", "options"),
    [
        pytest.param({}, {}, id="nothing"),
        pytest.param({"a": gc.isenabled}, {"baseline": "b"}, id="unknown baseline"),
        pytest.param({"a": gc.isenabled}, {"seconds": 0.0}, id="no time"),
        pytest.param({"a": gc.isenabled}, {"seconds": float("nan")}, id="nan"),
        pytest.param({"a": gc.isenabled}, {"min_blocks": 0}, id="no rounds"),
    ],
)
def test_impossible_measurements_are_refused(calls, options):
    with pytest.raises(UsageError):
        measure(calls, **options)


def test_progress_advances_by_the_seconds_spent():
    advanced = []

    class Bar:
        def __enter__(self):
            return lambda advance=1, note="": advanced.append(advance)

        def __exit__(self, *exc):
            return None

    found = measure({"a": busy(0.2)}, seconds=0.1, progress=lambda title, total=None: Bar())
    assert 0 < sum(advanced) <= found.seconds
    assert all(seconds > 0 for seconds in advanced)


def test_comparison_is_plain_json():
    found = measure({"a": busy(0.1), "b": busy(0.2)}, seconds=0.1, progress=silent)
    read = json.loads(json.dumps(found.to_dict()))
    assert read["timings"]["a"]["runs"] == found.timings["a"].runs
    assert read["ratios"]["b"]["verdict"] == found.ratios["b"].verdict


@pytest.mark.parametrize("n", [6, 25, 40])
def test_interval_covers_the_median_95_times_in_100(n):
    rng = np.random.default_rng(n)
    true, hits, trials = 1.0, 0, 600
    for _ in range(trials):
        low, high = median_interval(rng.lognormal(0, 0.3, n), rng)
        hits += low <= true <= high
    assert 0.92 <= hits / trials <= 0.99


@pytest.mark.parametrize("n", [2, 7, 20, 51])
def test_interval_equals_that_of_plain_resampling(n):
    rng = np.random.default_rng(n)
    values = rng.lognormal(0, 0.2, n)
    medians = np.median(values[rng.integers(n, size=(40_000, n))], axis=1)
    direct = median_interval(values, rng, resamples=40_000)
    assert direct == pytest.approx(np.quantile(medians, (0.025, 0.975)), abs=0.02)


@given(st.lists(st.floats(0.1, 10), min_size=1, max_size=60), st.floats(0.5, 20))
@settings(max_examples=50)
def test_interval_lies_within_the_values_and_scales_with_them(values, factor):
    low, high = median_interval(np.array(values), np.random.default_rng(0))
    scaled = median_interval(np.array(values) * factor, np.random.default_rng(0))
    assert min(values) <= low <= high <= max(values)
    assert scaled == pytest.approx((low * factor, high * factor))


@pytest.mark.parametrize(
    ("speedups", "margin", "verdict"),
    [
        pytest.param(np.linspace(1.01, 1.05, 21), 0.0, "faster", id="above one"),
        pytest.param(np.linspace(1.01, 1.05, 21), 0.03, "cannot tell", id="within the margin"),
        pytest.param(np.linspace(0.9, 0.99, 21), 0.0, "slower", id="below one"),
        pytest.param(np.linspace(0.95, 1.05, 21), 0.0, "cannot tell", id="around one"),
        pytest.param(np.ones(21), 0.0, "cannot tell", id="equal"),
    ],
)
def test_verdict_needs_the_whole_interval(speedups, margin, verdict):
    assert ratio(speedups, margin=margin).verdict == verdict


def test_no_difference_is_found_where_there_is_none_95_times_in_100():
    rng = np.random.default_rng(0)
    verdicts = [ratio(rng.lognormal(0, 0.05, 30)).verdict for _ in range(500)]
    assert verdicts.count("cannot tell") / 500 >= 0.92


@pytest.mark.parametrize(
    ("value", "text"),
    [
        pytest.param(Timing(1.834, 2.0, 1.801, 1.862, 100, 0.01, True), "1.83 ms [1.80, 1.86]"),
        pytest.param(Timing(123.4, 130, 120.1, 125.6, 9, 0.01, True), "123 ms [120, 126]"),
        pytest.param(
            Timing(0.01234, 0.02, 0.0121, 0.0129, 9, 0.01, True), "0.0123 ms [0.0121, 0.0129]"
        ),
        pytest.param(Ratio(2.061, 2.014, 2.108, "faster"), "2.06x [2.01, 2.11] faster"),
    ],
    ids=["ms", "hundreds", "microseconds", "ratio"],
)
def test_text(value, text):
    assert str(value) == text
