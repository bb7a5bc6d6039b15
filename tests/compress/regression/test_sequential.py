"""The sequential test by itself: exact distributions, coverage, false alarms and power."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from compress.latency import Comparison, Ratio, Timing
from compress.regression.limits import MAX_SLOWDOWN, Limit
from compress.regression.sequential import (
    ALPHA,
    Interval,
    _signed_rank_cdf,
    centre_interval,
    first_look,
    median_interval,
    next_look,
    spent,
)
from compress.regression.timing import BASELINE, CANDIDATE, judge, threshold

LIMIT = Limit("latency_p50", "max_slowdown", MAX_SLOWDOWN)
Draw = Callable[[np.random.Generator], float]


@pytest.mark.parametrize("n", [1, 2, 5, 9])
def test_the_distribution_of_signed_ranks_is_that_of_all_signs(n: int) -> None:
    ranks = np.arange(1, n + 1)
    signs = np.array(list(itertools.product((0, 1), repeat=n)))
    sums = signs @ ranks
    expected = [(sums <= t).mean() for t in range(n * (n + 1) // 2 + 1)]
    np.testing.assert_allclose(_signed_rank_cdf(n), expected)


def test_many_pairs_still_have_a_distribution() -> None:
    cdf = _signed_rank_cdf(200)
    middle = len(cdf) // 2
    assert cdf[-1] == pytest.approx(1)
    assert cdf[middle] == pytest.approx(0.5, abs=0.01)


def test_looks_never_spend_more_than_there_is() -> None:
    total = sum(spent(look) for look in range(1, 10_000))
    assert total < ALPHA
    assert total == pytest.approx(ALPHA, rel=1e-3)


def test_the_first_look_can_decide_and_no_earlier_one_could() -> None:
    for alpha in (0.2, ALPHA, ALPHA / 2, ALPHA / 5):
        n = first_look(alpha)
        values = np.arange(1.0, n + 1)
        assert math.isfinite(centre_interval(values, spent(1, alpha)).low)
        assert math.isinf(centre_interval(values[:-1], spent(1, alpha)).low)
    assert first_look() == 7
    assert next_look(7) == 10


def test_the_interval_inverts_the_test() -> None:
    """A centre lies inside exactly where the signed-rank test would not refuse it."""
    values = np.random.default_rng(3).standard_normal(12)
    alpha = 0.02
    found = centre_interval(values, alpha)
    for centre in np.linspace(-2, 2, 41):
        moved = values - centre
        ranks = np.argsort(np.argsort(abs(moved))) + 1
        positive = int(ranks[moved > 0].sum())
        total = 12 * 13 // 2
        p = min(_signed_rank_cdf(12)[positive], _signed_rank_cdf(12)[total - positive])
        assert (found.low < centre < found.high) == (p > alpha), centre


@given(
    st.lists(st.floats(-100, 100), min_size=7, max_size=40),
    st.floats(-50, 50),
    st.sampled_from([centre_interval, median_interval]),
)
def test_intervals_hold_their_middle_and_move_with_the_values(
    values: list[float], shift: float, interval: Callable[[np.ndarray, float], Interval]
) -> None:
    found = interval(np.array(values), 0.025)
    moved = interval(np.array(values) + shift, 0.025)
    assert found.low <= found.value <= found.high
    for name in ("value", "low", "high"):
        assert getattr(moved, name) == pytest.approx(getattr(found, name) + shift, abs=1e-6)


@given(st.lists(st.floats(-10, 10), min_size=8, max_size=30))
def test_less_error_means_a_wider_interval(values: list[float]) -> None:
    wide, narrow = (centre_interval(np.array(values), alpha) for alpha in (0.005, 0.05))
    assert wide.low <= narrow.low <= narrow.high <= wide.high


def test_the_median_of_skewed_values_is_covered() -> None:
    rng = np.random.default_rng(5)
    missed = 0
    for _ in range(400):
        found = median_interval(rng.exponential(size=11), 0.025)
        missed += not found.low <= math.log(2) <= found.high
    assert missed / 400 <= 0.05 + 2 * math.sqrt(0.05 * 0.95 / 400)


def test_standing_needs_the_whole_interval_on_one_side() -> None:
    assert Interval(1.0, 0.9, 1.1).standing(1.1) == "within"
    assert Interval(1.0, 0.9, 1.1).standing(1.0) == "open"
    assert Interval(1.0, 0.9, 1.1).standing(0.8) == "beyond"
    assert Interval(1.0, -math.inf, math.inf).standing(0.8) == "open"


def quiet(rng: np.random.Generator) -> float:
    """Pairs as one thread on a quiet machine gives them: half a percent."""
    return float(rng.normal(0, 0.005))


def noisy(rng: np.random.Generator) -> float:
    """As two threads beside busy neighbours: 1.5 percent, and every eighth pair is spoilt."""
    return float(rng.normal(0, 0.25 if rng.random() < 0.125 else 0.015))


def heavy(rng: np.random.Generator) -> float:
    """No variance at all."""
    return float(rng.standard_t(1.5) * 0.01)


def lucky(rng: np.random.Generator) -> float:
    """Memory placement: one of the two sides is ten percent faster, by chance."""
    return float(rng.choice([-0.1, 0.0, 0.0, 0.0, 0.1]) + rng.normal(0, 0.003))


def sessions(draw: Draw, slowdown: float, seed: int) -> Iterator[Comparison]:
    """Sessions whose pair values are drawn; all that is made up is the clock."""
    rng = np.random.default_rng(seed)
    while True:
        slower = math.exp(draw(rng)) * (1 + slowdown)
        times = {
            name: Timing(ms, 1.2 * ms, ms, ms, 100, 0.0, True)
            for name, ms in ((BASELINE, 1.0), (CANDIDATE, slower))
        }
        ratio = Ratio(1 / slower, 1 / slower, 1 / slower, "cannot tell")
        yield Comparison(BASELINE, times, {CANDIDATE: ratio}, 10, 0.1)


def verdict(draw: Draw, slowdown: float, seed: int, pairs: int = 150) -> str:
    """What the gate says within as many pairs as fit into its default time."""
    given = itertools.islice(sessions(draw, slowdown, seed), pairs)
    judged = judge(given, [LIMIT], seconds=1e9)
    return judged.pairs.interval(LIMIT, judged.alpha).standing(threshold(LIMIT))


@pytest.mark.parametrize("draw", [quiet, noisy, heavy, lucky], ids=lambda draw: draw.__name__)
def test_equal_sides_raise_no_false_alarm(draw: Draw) -> None:
    found = [verdict(draw, 0.0, seed) for seed in range(200)]
    assert found.count("beyond") <= 4
    assert found.count("within") >= 180


@pytest.mark.parametrize("draw", [quiet, noisy], ids=lambda draw: draw.__name__)
def test_five_percent_is_found(draw: Draw) -> None:
    found = [verdict(draw, 0.05, seed) for seed in range(100)]
    assert found.count("beyond") >= 95
    assert found.count("within") == 0


@pytest.mark.parametrize("draw", [quiet, noisy, heavy], ids=lambda draw: draw.__name__)
def test_at_the_limit_itself_the_error_of_all_looks_is_the_one_promised(draw: Draw) -> None:
    found = [verdict(draw, MAX_SLOWDOWN, seed, pairs=60) for seed in range(400)]
    slack = 2 * math.sqrt(ALPHA * (1 - ALPHA) / 400)
    assert found.count("beyond") / 400 <= ALPHA + slack
    assert found.count("within") / 400 <= ALPHA + slack


def test_looks_at_a_plain_test_would_have_erred_more_often() -> None:
    """The reason for spending the error: the usual 2.5 % at each look is far more in all."""

    def ever(seed: int, level: Callable[[int], float]) -> bool:
        values = np.random.default_rng(seed).standard_normal(150)
        due, look = first_look(), 1
        while due <= 150:
            if centre_interval(values[:due], level(look)).low > 0:
                return True
            due, look = next_look(due), look + 1
        return False

    plain = sum(ever(seed, lambda _: ALPHA) for seed in range(300)) / 300
    spending = sum(ever(seed, spent) for seed in range(300)) / 300
    assert plain > 2 * ALPHA
    assert spending <= ALPHA


def test_several_limits_share_the_error() -> None:
    ninth = Limit("latency_p90", "max_slowdown", MAX_SLOWDOWN)
    judged = judge(sessions(quiet, 0.0, 0), [LIMIT, ninth], seconds=1e9)
    assert judged.wanted == first_look(ALPHA / 2) == 8
    assert judged.alpha <= ALPHA / 2


def test_a_broken_limit_ends_it_whatever_else_is_open() -> None:
    near = Limit("latency_p90", "max_slowdown", 0.2)
    judged = judge(sessions(quiet, 0.2, 0), [LIMIT, near], seconds=1e9)
    assert judged.looks == 1


def test_time_that_is_up_before_the_first_look_judges_nothing() -> None:
    judged = judge(sessions(quiet, 0.0, 0), [LIMIT], seconds=0)
    assert (judged.looks, len(judged.pairs), judged.wanted) == (0, 1, 7)
    assert judged.pairs.interval(LIMIT, judged.alpha).standing(threshold(LIMIT)) == "open"
