"""Observers: what is remembered of a tensor's values while calibration data stream through.

An observer keeps the exact range, the exact number of values, and a histogram of at most `bins`
bins. Memory is O(bins), whatever the amount of data. The width of a bin is a power of two and
bin edges are multiples of it, so halving the resolution merges pairs of bins without error, and
the result does not depend on how the data were cut into updates or in which order they came.

`find_range` turns an observer into the range to quantize. Exact zeros are left out of its
decisions: 0 has an integer of its own, so they cost no error, and after a ReLU they would
outweigh everything else.

The moving average of the range is the exception: it depends on the order and on the size of the
updates, each of which counts as one batch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal, get_args

import numpy as np

from compress.errors import DataError, UsageError
from quant.quantizer import BLOCK_ELEMENTS
from quant.ranges import Histogram, entropy_range, mse_range, percentile_range
from quant.spec import QuantSpec

RangeMethod = Literal["minmax", "percentile", "mse", "entropy", "moving_average"]

SMALLEST_EXPONENT = -126
"""Of a bin's width: the inverse of 2**-126 is still a float32."""

MANTISSA_BITS = 24
"""A bin narrower than the spacing of float32 at the largest value tells nothing more."""

MOMENTUM = 0.9
"""Of the moving averages: what remains of the old average after another batch."""


class HistogramObserver:
    """Range, count and histogram of one tensor.

    Attributes:
        name: the tensor, for messages.
        bins: most bins to keep; 0 keeps only ranges and count, which is all that min-max and
            the moving average need.
        low: smallest value so far, `inf` before the first.
        high: largest value so far, `-inf` before the first.
        average_low: moving average of the batches' smallest values, `inf` before the first.
        average_high: moving average of the batches' largest values, `-inf` before the first.
        count: values seen.
        zeros: how many of them were exactly 0 (not counted where `bins` is 0).
        exponent: a bin is 2**exponent wide.
        first: `counts[i]` holds the values in [first + i, first + i + 1) * 2**exponent.
        counts: int64, shape (n,) with n <= bins.
    """

    def __init__(self, name: str = "", bins: int = 2048) -> None:
        if bins < 0 or bins == 1:
            raise UsageError(
                f"An observer cannot have {bins} bins. Use 2048; 0 to keep the range only; at "
                "least 2 otherwise, one for either sign."
            )
        self.name = name
        self.bins = bins
        self.low = math.inf
        self.high = -math.inf
        self.average_low = math.inf
        self.average_high = -math.inf
        self.count = 0
        self.zeros = 0
        self.exponent = SMALLEST_EXPONENT
        self.first = 0
        self.counts = np.zeros(0, np.int64)

    def update(self, x: np.ndarray) -> None:
        """Take in every value of `x`, any shape: one batch for the moving averages.

        Raises:
            DataError: a value is NaN or infinite.
        """
        with np.errstate(over="ignore"):
            flat = np.asarray(x, np.float32).reshape(-1)
        if flat.size == 0:
            return
        low, high = float(flat.min()), float(flat.max())
        if not (math.isfinite(low) and math.isfinite(high)):
            raise DataError(
                f"Calibration met NaN or infinity in tensor {self.name!r} (range [{low}, {high}]). "
                "Look for bad values in the calibration data and for a wrong normalization; a "
                "model that overflows in float32 cannot be calibrated."
            )
        self._widen(low, high)
        self._average(low, high)
        self.count += flat.size
        if self.bins:
            self._count(flat)

    def merge(self, other: HistogramObserver) -> None:
        """Take in all that `other` has seen, as if its data had come here.

        Of the moving averages the wider one is kept on either side: a group of tensors has no
        common order of batches.

        Raises:
            UsageError: the two have a different number of bins.
        """
        if self.bins != other.bins:
            raise UsageError(
                f"Observers with {self.bins} and {other.bins} bins cannot be merged. Make both "
                "with the same number."
            )
        if other.count == 0:
            return
        self._widen(other.low, other.high)
        self.average_low = min(self.average_low, other.average_low)
        self.average_high = max(self.average_high, other.average_high)
        self.count += other.count
        self.zeros += other.zeros
        self._add(other.exponent, other.first, other.counts)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {**vars(self), "counts": self.counts.tolist()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> HistogramObserver:
        """The inverse of `to_dict`.

        Raises:
            DataError: the values are not those of an observer.
        """
        observer = cls()
        if set(values) != set(vars(observer)):
            raise DataError(
                f"A saved observer needs the fields {', '.join(vars(observer))}; these values "
                f"have {', '.join(values)}. Calibrate again."
            )
        vars(observer).update(values, counts=np.asarray(values["counts"], np.int64))
        if observer.bins and observer.counts.sum() != observer.count:
            raise DataError(
                f"The saved observer of {observer.name!r} holds {observer.counts.sum()} values in "
                f"its bins and says {observer.count}. Calibrate again."
            )
        return observer

    def nonzero_bins(self) -> tuple[float, int, np.ndarray]:
        """Width of a bin, index of the first, and counts without the values that are exactly 0."""
        counts = self.counts.copy()
        if self.zeros:
            counts[-self.first] -= self.zeros
        return 2.0**self.exponent, self.first, counts

    def _average(self, low: float, high: float) -> None:
        """Move the averages towards another batch's range; the first batch sets them."""
        if self.count == 0:
            self.average_low, self.average_high = low, high
            return
        self.average_low += (1 - MOMENTUM) * (low - self.average_low)
        self.average_high += (1 - MOMENTUM) * (high - self.average_high)

    def _widen(self, low: float, high: float) -> None:
        """Make the range hold [low, high] and the bins cover it."""
        if self.low <= low and high <= self.high:
            return
        self.low, self.high = min(low, self.low), max(high, self.high)
        if not self.bins:
            return
        exponent, first, counts = self.exponent, self.first, self.counts
        self.exponent = self._finest_exponent()
        self.first = self._index(self.low)
        self.counts = np.zeros(self._index(self.high) - self.first + 1, np.int64)
        self._add(exponent, first, counts)

    def _finest_exponent(self) -> int:
        """Of the narrowest bins that cover the range; never falls while the range grows."""
        largest = max(abs(self.low), abs(self.high))
        self.exponent = max(self.exponent, math.frexp(largest)[1] - MANTISSA_BITS)
        if self.high > self.low:
            narrowest = (self.high - self.low) / self.bins
            self.exponent = max(self.exponent, math.frexp(narrowest)[1] - 1)
        while self._index(self.high) - self._index(self.low) >= self.bins:
            self.exponent += 1
        return self.exponent

    def _index(self, value: float) -> int:
        return math.floor(math.ldexp(value, -self.exponent))

    def _add(self, exponent: int, first: int, counts: np.ndarray) -> None:
        """Add bins at least as narrow as ours; 2**k neighbours fall into one."""
        indices = np.arange(first, first + counts.size) >> (self.exponent - exponent)
        np.add.at(self.counts, indices - self.first, counts)

    def _count(self, flat: np.ndarray) -> None:
        inverse = np.float32(2.0**-self.exponent)
        first, last = np.float32(self.first), np.float32(self.first + self.counts.size - 1)
        buffer = np.empty(min(flat.size, BLOCK_ELEMENTS), np.float32)
        for start in range(0, flat.size, BLOCK_ELEMENTS):
            block = flat[start : start + BLOCK_ELEMENTS]
            work = buffer[: block.size]
            self.zeros += block.size - int(np.count_nonzero(block != 0))
            with np.errstate(under="ignore"):
                np.multiply(block, inverse, out=work)
            np.floor(work, out=work)
            # A tiny negative value may have underflowed from bin -1 into bin 0, past the last one.
            np.clip(work, first, last, out=work)
            work -= first
            self.counts += np.bincount(work.astype(np.intp), minlength=self.counts.size)


def find_range(
    observer: HistogramObserver,
    method: RangeMethod,
    spec: QuantSpec,
    percentile: float = 99.99,
) -> tuple[float, float]:
    """The range to quantize; it holds 0 and never exceeds what was observed (or 0).

    - `minmax`: what was observed, exactly.
    - `percentile`: of the positive values, `percentile` % lie below the upper end, and of the
      negative ones above the lower end; for a symmetric spec, of the magnitudes.
    - `mse`: the smallest expected squared error of quantization and clipping together.
    - `entropy`: the smallest Kullback-Leibler divergence of the quantized from the clipped
      distribution (Migacz, 8-bit inference with TensorRT, GTC 2017); for a float format the same
      as `mse`.
    - `moving_average`: the moving averages of the batches' ends (Jacob et al., arXiv
      1712.05877, section 3.1), in which a single outlier is forgotten.

    Args:
        observer: has seen the calibration data.
        method: how to choose.
        spec: the format that the range is for.
        percentile: in (0, 100]; used by `percentile` only.

    Raises:
        DataError: the observer has seen nothing.
        UsageError: no such method or percentile, or the observer kept no histogram.
    """
    if method not in get_args(RangeMethod) or not 0 < percentile <= 100:
        raise UsageError(
            f"Range method {method!r} with percentile {percentile} is not possible. Use one of "
            f"{', '.join(get_args(RangeMethod))}, and a percentile above 0, at most 100."
        )
    if observer.count == 0:
        raise DataError(
            f"Calibration never reached tensor {observer.name!r}, so it has no range. Give at "
            "least one calibration sample that runs through the whole model."
        )
    low, high = min(observer.low, 0.0), max(observer.high, 0.0)
    if method == "minmax" or observer.count == observer.zeros:
        return low, high
    if method == "moving_average":
        found = min(observer.average_low, 0.0), max(observer.average_high, 0.0)
        return found if found[1] > found[0] else (low, high)
    if not observer.bins:
        raise UsageError(
            f"The observer of {observer.name!r} keeps only the range, and {method} needs a "
            "histogram. Make the observer with bins=2048."
        )
    histogram = Histogram(observer.low, observer.high, *observer.nonzero_bins())
    if method == "percentile":
        found = percentile_range(histogram, percentile / 100, spec)
    elif method == "mse":
        found = mse_range(histogram, spec)
    else:
        found = entropy_range(histogram, spec)
    return found if found[1] > found[0] else (low, high)
