"""Latency over several sessions, on busy loops whose cost depends on the session."""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter

import pytest

from compress.sessions import measure_sessions


def busy(milliseconds: float) -> Callable[[], None]:
    def call() -> None:
        end = perf_counter() + milliseconds / 1e3
        while perf_counter() < end:
            pass

    return call


def sessions(costs: list[float]) -> Callable[[], dict[str, Callable[[], None]]]:
    """A candidate that costs something else in each session, beside a baseline of 2 ms."""
    remaining = iter(costs)
    return lambda: {"baseline": busy(2.0), "candidate": busy(next(remaining))}


def test_a_gain_in_every_session_is_faster() -> None:
    result = measure_sessions(sessions([0.5, 0.6, 0.7]), seconds=1.5)
    ratio = result.ratios["candidate"]
    assert ratio.verdict == "faster"
    assert ratio.low < 3.0 < ratio.high  # from 2 / 0.7 to 2 / 0.5
    assert set(result.timings) == {"baseline", "candidate"}
    assert result.timings["candidate"].low_ms < 0.6 < result.timings["candidate"].high_ms


def test_a_gain_that_depends_on_the_session_cannot_be_told() -> None:
    ratio = measure_sessions(sessions([1.0, 4.0, 1.0]), seconds=1.5).ratios["candidate"]
    assert ratio.verdict == "cannot tell"
    assert ratio.value > 1 > ratio.low


@pytest.mark.parametrize(("margin", "verdict"), [(0.02, "faster"), (9.0, "cannot tell")])
def test_a_gain_below_the_margin_does_not_count(margin: float, verdict: str) -> None:
    result = measure_sessions(sessions([0.5] * 3), seconds=1.5, margin=margin)
    assert result.ratios["candidate"].verdict == verdict
