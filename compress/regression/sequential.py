"""Repeated looks at session pairs: when is a ratio known well enough to stop measuring?

The unit is a pair: both sides built anew, then timed in turns. Its value is the logarithm of
candidate over baseline. Two equal sides change places at random, so the values of equal sides are
symmetric about zero whatever the noise looks like, and a constant slow-down shifts them. That is
what Wilcoxon's signed ranks need, and all that they need: no normal distribution, no known
variance, and a pair in which a neighbour woke up counts as one bad rank. The interval is the one
that inverts the test, from the ordered Walsh averages (Hollander, Wolfe & Chicken, Nonparametric
Statistical Methods, 3rd edition, 2014, section 3.3), so verdict and interval never disagree.

A test that is repeated until it says something says something wrong in the end. So look k spends
alpha / (k (k + 1)) of the error, which sums to alpha over any number of looks (Boole's inequality;
alpha spending in the sense of Lan & DeMets, Biometrika 70, 1983, 659-663). The intervals of all
looks together hold the truth with 1 - 2 alpha: they are repeated confidence intervals (Jennison &
Turnbull, Journal of the Royal Statistical Society B 51, 1989, 305-361), and a verdict may be taken
from any of them. The price is small because looks become rarer: each comes after 1.4 times as
many pairs.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

ALPHA = 0.025
"""Error on either side of the limit, over all looks together."""
GROWTH = 1.4
"""Pairs at a look over pairs at the look before."""

Standing = Literal["within", "beyond", "open"]


@dataclass(frozen=True)
class Interval:
    """A middle value, and ends that hold the truth with the probability asked for."""

    value: float
    low: float
    high: float

    def standing(self, limit: float) -> Standing:
        """Where the interval lies: within the limit, beyond it, or on both sides."""
        if self.low > limit:
            return "beyond"
        return "within" if self.high <= limit else "open"

    def map(self, function: Callable[[float], float]) -> Interval:
        """The same interval on another, increasing scale."""
        return Interval(function(self.value), function(self.low), function(self.high))


def spent(look: int, alpha: float = ALPHA) -> float:
    """The share of `alpha` that look 1, 2, ... may use on each side."""
    return alpha / (look * (look + 1))


def first_look(alpha: float = ALPHA) -> int:
    """Pairs at the first look: fewer could not reach its level even if all of them agreed.

    All n values lie on one side by chance with 2**-n.
    """
    return math.ceil(-math.log2(spent(1, alpha)))


def next_look(pairs: int) -> int:
    """Pairs at the look after the one with `pairs`."""
    return math.ceil(GROWTH * pairs)


def centre_interval(values: np.ndarray, alpha: float) -> Interval:
    """Centre of symmetry of `values` (n,), with its signed-rank interval.

    Args:
        values: independent, each symmetric about the centre.
        alpha: probability of missing the centre, on each side.

    Returns:
        The Hodges-Lehmann estimate (median of all averages of two values, each value with itself
        included); without enough values for the level the ends are infinite.
    """
    n = len(values)
    first, second = np.triu_indices(n)
    averages = np.sort((values[first] + values[second]) / 2)
    left_out = int(np.searchsorted(_signed_rank_cdf(n), alpha, side="right"))
    return _between(averages, left_out)


def median_interval(values: np.ndarray, alpha: float) -> Interval:
    """Median of `values` (n,) with its order-statistic interval: the sign test, inverted.

    For latencies of one side alone, whose noise only ever slows down and is not symmetric.

    Args:
        values: independent, of one distribution.
        alpha: probability of missing the median, on each side.
    """
    n = len(values)
    halves = [math.comb(n, k) / 2**n for k in range(n + 1)]
    left_out = int(np.searchsorted(np.cumsum(halves), alpha, side="right"))
    return _between(np.sort(values), left_out)


def _between(ordered: np.ndarray, left_out: int) -> Interval:
    """From the `left_out`-th smallest to the `left_out`-th largest; 0 leaves both ends open."""
    value = float(np.median(ordered))
    if left_out == 0:
        return Interval(value, -math.inf, math.inf)
    return Interval(value, float(ordered[left_out - 1]), float(ordered[-left_out]))


@functools.cache
def _signed_rank_cdf(n: int) -> np.ndarray:
    """P(T <= t) for t = 0, 1, ..., n (n + 1) / 2, T being the sum of the positive ranks of n.

    Under symmetry every rank is positive or negative with equal chance, so the distribution is
    that of a sum of independent ranks: one convolution for each.
    """
    chances = np.zeros(n * (n + 1) // 2 + 1)
    chances[0] = 1.0
    for rank in range(1, n + 1):
        moved = np.zeros_like(chances)
        moved[rank:] = chances[: len(chances) - rank]
        chances = (chances + moved) / 2
    return np.asarray(np.cumsum(chances))
