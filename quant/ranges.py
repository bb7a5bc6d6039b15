"""Ranges to quantize, chosen from a histogram.

Each function takes the values that are not exactly 0 and returns (low, high) with
low <= 0 <= high, within the observed range. They differ in what they call a good range:

- `percentile_range`: nearly all values are inside.
- `mse_range`: rounding and clipping together cost the smallest squared error.
- `entropy_range`: the quantized distribution diverges least from the original one.
"""

from __future__ import annotations

import math

import numpy as np

from quant.quantizer import round_to_format, scale_and_zero_point
from quant.spec import FloatFormat, QuantSpec

FINALISTS = 32
"""Ranges whose squared error is computed bin by bin after the quick estimate of all."""


class Histogram:
    """The values of a tensor other than 0, taken as spread evenly within each bin.

    Attributes:
        low: lower end of the observed range, widened to hold 0.
        high: upper end, likewise.
        width: of a bin.
        edges: shape (n + 1,); the outermost are the observed extremes.
        centers: shape (n,).
        counts: shape (n,).
        sums: of 1, x and x**2 over all values below each edge, shape (3, n + 1).
    """

    def __init__(
        self, low: float, high: float, width: float, first: int, counts: np.ndarray
    ) -> None:
        self.low, self.high, self.width = min(low, 0.0), max(high, 0.0), width
        self.edges = np.clip((first + np.arange(counts.size + 1)) * width, low, high)
        self.centers = (self.edges[:-1] + self.edges[1:]) / 2
        self.counts = counts.astype(np.float64)
        mean_squares = self.centers**2 + np.diff(self.edges) ** 2 / 12
        moments = np.stack([np.ones_like(self.centers), self.centers, mean_squares])
        self.sums = np.zeros((3, self.edges.size))
        np.cumsum(self.counts * moments, axis=1, out=self.sums[:, 1:])

    def sum_below(self, x: np.ndarray, power: int) -> np.ndarray:
        """Sum of value**power over the values below `x`, in the shape of `x`."""
        return np.asarray(np.interp(x, self.edges, self.sums[power]))

    def magnitudes(self) -> np.ndarray:
        """Distances of the edges from 0, ascending, without 0."""
        return _positive(np.abs(self.edges))


def _positive(edges: np.ndarray) -> np.ndarray:
    return np.asarray(np.unique(edges[edges > 0]))


def _candidates(edges: np.ndarray) -> np.ndarray:
    """Up to 96 of ascending edges: even steps, and geometric ones for data with far outliers."""
    if edges.size == 0:
        return np.zeros(1)
    last = edges.size - 1
    steps = np.concatenate([np.linspace(0, last, 64), np.geomspace(1, last + 1, 32) - 1])
    return np.asarray(edges[np.unique(np.rint(steps).astype(np.intp))])


def _symmetric_candidates(histogram: Histogram) -> tuple[np.ndarray, np.ndarray]:
    """Lower and upper ends that move together, as far as the data reach."""
    sizes = _candidates(histogram.magnitudes())
    return np.maximum(-sizes, histogram.low), np.minimum(sizes, histogram.high)


def _upper_candidates(histogram: Histogram) -> np.ndarray:
    return _candidates(_positive(histogram.edges))


def _lower_candidates(histogram: Histogram) -> np.ndarray:
    """Negative or 0, and descending: growing ranges, as in all candidates."""
    return 0.0 - _candidates(_positive(-histogram.edges))


def percentile_range(histogram: Histogram, fraction: float, spec: QuantSpec) -> tuple[float, float]:
    """The range that holds a fraction of the values of either sign.

    For a symmetric spec: a fraction of all magnitudes.
    """
    sizes = np.concatenate([[0.0], histogram.magnitudes()])
    negative, positive = (
        np.abs(histogram.sum_below(side * sizes, 0) - histogram.sum_below(np.zeros(1), 0))
        for side in (-1, 1)
    )
    if spec.symmetric:
        size = _quantile(sizes, negative + positive, fraction)
        return max(0.0 - size, histogram.low), min(size, histogram.high)
    low, high = (_quantile(sizes, mass, fraction) for mass in (negative, positive))
    return max(0.0 - low, histogram.low), min(high, histogram.high)


def _quantile(sizes: np.ndarray, mass: np.ndarray, fraction: float) -> float:
    """The size below which a fraction of the mass lies; `mass[i]` lies below `sizes[i]`."""
    target = fraction * mass[-1]
    # The lower end of a gap: np.interp would take the upper one, next to the outliers.
    right = int(np.searchsorted(mass, target))
    if right == 0:
        return float(sizes[0])
    return float(np.interp(target, mass[right - 1 : right + 1], sizes[right - 1 : right + 1]))


def mse_range(histogram: Histogram, spec: QuantSpec) -> tuple[float, float]:
    """The range with the smallest expected squared error of rounding and clipping.

    An estimate over a grid of both ends finds the finalists, and the quantizer itself decides
    among them: the estimate takes rounding errors as uniform, which is wrong for values that
    gather in one place, as at the 6 of ReLU6 or the minimum of hardswish. Symmetric specs move
    both ends together. The errors of a float format are not uniform anywhere, so that the
    quantizer decides among all ranges; where they are equal the widest wins.
    """
    if spec.symmetric:
        low, high = _symmetric_candidates(histogram)
        if not spec.integer:
            errors = _measured_error(histogram, low, high, spec)
            widest = len(errors) - 1 - int(np.argmin(errors[::-1]))
            return float(low[widest]), float(high[widest])
        estimate = _estimated_error(histogram, low, high, spec)
    else:
        lows, highs = _lower_candidates(histogram), _upper_candidates(histogram)
        estimate = _estimated_error(histogram, lows[:, None], highs, spec).reshape(-1)
        low, high = np.repeat(lows, highs.size), np.tile(highs, lows.size)
    best = np.append(np.argsort(estimate)[:FINALISTS], estimate.size - 1)  # and the whole range
    low, high = low[best], high[best]
    winner = np.argmin(_measured_error(histogram, low, high, spec))
    return float(low[winner]), float(high[winner])


def _estimated_error(
    histogram: Histogram, low: np.ndarray, high: np.ndarray, spec: QuantSpec
) -> np.ndarray:
    """Expected sum of squared errors for each range, in the shape that low and high broadcast to.

    Values beyond an end err by their distance to it; values closer to 0 than half a step become
    0 and err by themselves; the rest err by scale**2 / 12, the variance of a uniform error.
    """
    scale = scale_and_zero_point(low, high, spec)[0].astype(np.float64)
    total = histogram.sums[:, -1]
    low_sums = [histogram.sum_below(low, power) for power in range(3)]
    high_sums = [histogram.sum_below(high, power) for power in range(3)]
    clipped = low_sums[2] - 2 * low * low_sums[1] + low**2 * low_sums[0]
    above = [whole - part for whole, part in zip(total, high_sums, strict=True)]
    clipped = clipped + above[2] - 2 * high * above[1] + high**2 * above[0]
    sizes = np.concatenate([[0.0], histogram.magnitudes()])
    vanished, vanished_error = (
        np.interp(
            scale / 2, sizes, histogram.sum_below(sizes, power) - histogram.sum_below(-sizes, power)
        )
        for power in (0, 2)
    )
    rounded = high_sums[0] - low_sums[0] - vanished
    return np.asarray(clipped + vanished_error + rounded * scale**2 / 12)


def _measured_error(
    histogram: Histogram, lows: np.ndarray, highs: np.ndarray, spec: QuantSpec
) -> list[float]:
    """Sum of squared errors of the quantizer itself, for each range, with four points a bin."""
    occupied = histogram.counts > 0
    left, widths = histogram.edges[:-1][occupied], np.diff(histogram.edges)[occupied]
    points = (left + widths * np.array([[1], [3], [5], [7]]) / 8).reshape(-1)
    weights = np.tile(histogram.counts[occupied] / 4, 4)
    errors = []
    for scale, zero_point in zip(*scale_and_zero_point(lows, highs, spec), strict=True):
        if isinstance(spec.format, FloatFormat):
            levels = (points / scale).astype(np.float32)
            round_to_format(levels, spec.format)
        else:
            levels = np.rint(points / scale)
            np.clip(levels, spec.qmin - zero_point, spec.qmax - zero_point, out=levels)
        errors.append(float(weights @ (points - levels * scale) ** 2))
    return errors


def entropy_range(histogram: Histogram, spec: QuantSpec) -> tuple[float, float]:
    """The range whose quantized distribution has the least KL divergence from the clipped one.

    After Migacz, "8-bit inference with TensorRT", GTC 2017, which is symmetric; for an asymmetric
    spec the upper end is chosen first and then the lower one. `_divergence` says what differs.
    Its distribution has bins of equal width, which the steps of a float format do not: there the
    squared error decides, as in `mse_range`.
    """
    if not spec.integer:
        return mse_range(histogram, spec)
    if spec.symmetric:
        return _least_divergence(histogram, *_symmetric_candidates(histogram), spec)
    highs = _upper_candidates(histogram)
    _, high = _least_divergence(histogram, np.full_like(highs, histogram.low), highs, spec)
    lows = _lower_candidates(histogram)
    return _least_divergence(histogram, lows, np.full_like(lows, high), spec)


def _least_divergence(
    histogram: Histogram, lows: np.ndarray, highs: np.ndarray, spec: QuantSpec
) -> tuple[float, float]:
    """The best of the ranges, which ascend in size; the widest where they are equal."""
    scales = scale_and_zero_point(lows, highs, spec)[0]
    ranges = [(float(a), float(b), float(c)) for a, b, c in zip(lows, highs, scales, strict=True)]
    low, high, _ = min(reversed(ranges), key=lambda one: _divergence(histogram, *one))
    return low, high


def _divergence(histogram: Histogram, low: float, high: float, scale: float) -> float:
    """KL divergence from the clipped distribution to its quantized version, in nats.

    The reference keeps the mass of the outliers, in its outermost bins; the quantized version is
    made without them. Were they dropped from both, the narrowest range would always win. Both
    are divided by the number of all values, so that clipping nearly everything into one bin is
    not a perfect match either, as it would be if each were normalized by itself.
    """
    edges, counts = histogram.edges, histogram.counts
    start = int(np.searchsorted(edges, low))
    stop = int(np.searchsorted(edges, high, side="right")) - 1
    if stop <= start or scale < histogram.width:  # a step finer than the histogram can tell
        return math.inf
    reference = counts[start:stop].copy()
    reference[0] += counts[:start].sum()
    reference[-1] += counts[stop:].sum()
    occupied = reference > 0
    levels = np.rint(histogram.centers[start:stop] / scale).astype(np.intp)
    levels -= levels[0]
    mass = np.bincount(levels, counts[start:stop])
    share = mass / np.maximum(np.bincount(levels, occupied), 1)
    # An outermost bin may hold outliers only; half a value there keeps the divergence finite.
    quantized = np.maximum(share[levels[occupied]], 0.5)
    reference = reference[occupied]
    return float(np.sum(reference * np.log(reference / quantized)) / counts.sum())
