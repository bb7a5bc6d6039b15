"""The waterline of a sequence of kernels: what its arithmetic and bytes allow, and what it does.

A roofline for a sequence ("On the Efficiency of CNNs", arXiv 2404.03617). Kernel k with n_k
multiply-accumulates and b_k bytes, on a machine with the peak rate R_k of its precision and the
memory bandwidth BW, takes at least

    t_k = max(n_k / R_k, b_k / BW)

The sequence as a whole attains at most sum(n_k) / sum(t_k), the waterline. Kernels without
multiply-accumulates add to the time alone. Bandwidth is of the memory: tensors that stay in a cache
may let a kernel be faster than it is said to attain.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from compress.errors import UsageError
from compress.target import TensorType


class Peaks(Protocol):
    """What a machine can do at most: the part of `compress.estimate.peaks.Peaks` needed here."""

    @property
    def bandwidth_gb_s(self) -> float:
        """Of the memory, in 10^9 bytes per second."""

    def gmacs(self, precision: str) -> float:
        """10^9 multiply-accumulates per second; float32's where the precision has no own."""


@dataclass(frozen=True)
class Bar:
    """One kernel of the sequence.

    Attributes:
        name: its site, or its own name.
        precision: that its peak rate is of.
        macs: of one run.
        bytes: moved; None where unknown, then the arithmetic alone limits it.
        peak_gmacs: of its precision.
        attainable_us: t_k.
        actual_us: measured.
    """

    name: str
    precision: str
    macs: int
    bytes: int | None
    peak_gmacs: float
    attainable_us: float
    actual_us: float

    @property
    def attainable_gmacs(self) -> float:
        """Rate that its arithmetic and its bytes allow; 0 without multiply-accumulates."""
        return _rate(self.macs, self.attainable_us)

    @property
    def actual_gmacs(self) -> float:
        """Measured rate; 0 where the runtime's clock shows no time."""
        return _rate(self.macs, self.actual_us)


@dataclass(frozen=True, kw_only=True)
class Waterline:
    """The sequence in numbers.

    Attributes:
        macs: of all kernels.
        peak_gmacs: R, the mean of the kernels' peak rates that the sequence would reach if no byte
            were moved (harmonic, weighted by multiply-accumulates).
        waterline_gmacs: attainable rate, at most R.
        actual_gmacs: measured rate.
        efficiency: C of the source, actual over R.
        attainable_us: sum of t_k.
        actual_us: sum of the measured times.
        memory_bound: share of `attainable_us` in which memory is the limit, 0..1.
        without_macs: share of `attainable_us` in kernels without multiply-accumulates, 0..1.
        unknown_bytes: kernels whose bytes the runtime does not tell.
    """

    macs: int
    peak_gmacs: float
    waterline_gmacs: float
    actual_gmacs: float
    efficiency: float
    attainable_us: float
    actual_us: float
    memory_bound: float
    without_macs: float
    unknown_bytes: int

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def bars(rows: Sequence[Mapping[str, Any]], peaks: Peaks) -> tuple[Bar, ...]:
    """Kernels in order of execution with the times that the machine allows.

    Args:
        rows: as `compress.kernel_rows.kernel_rows` makes them.
        peaks: of the machine that they were measured on.

    Raises:
        UsageError: a time or a number of bytes is no finite number from 0 on.
    """
    return tuple(_bar(row, peaks) for row in rows)


def waterline(rows: Sequence[Mapping[str, Any]], peaks: Peaks) -> Waterline:
    """What the sequence attains at most, and what it does.

    Raises:
        UsageError: see `bars`.
    """
    found = bars(rows, peaks)
    macs = sum(bar.macs for bar in found)
    attainable = sum(bar.attainable_us for bar in found)
    actual = sum(bar.actual_us for bar in found)
    arithmetic = sum(_arithmetic_us(bar) for bar in found)
    peak = _rate(macs, arithmetic)
    starved = sum(b.attainable_us for b in found if b.attainable_us > _arithmetic_us(b))
    idle = sum(b.attainable_us for b in found if not b.macs)
    return Waterline(
        macs=macs,
        peak_gmacs=peak,
        waterline_gmacs=_rate(macs, attainable),
        actual_gmacs=_rate(macs, actual),
        efficiency=_rate(macs, actual) / peak if peak else 0.0,
        attainable_us=attainable,
        actual_us=actual,
        memory_bound=starved / attainable if attainable else 0.0,
        without_macs=idle / attainable if attainable else 0.0,
        unknown_bytes=sum(bar.bytes is None for bar in found),
    )


def fused_bytes(rows: Sequence[Mapping[str, Any]]) -> int:
    """Bytes of consecutive kernels computed as one, whose tensors in between stay inside.

    Args:
        rows: of `compress.kernel_rows.kernel_rows`, each kernel reading what the one before wrote.
            Tensors have no names there: an output that the next kernel has among its inputs, with
            the same shape and type, counts as the same.

    Returns:
        At most the sum of their bytes.
    """
    moved = sum(_size(tensor) for row in rows for tensor in _tensors(row))
    for before, after in itertools.pairwise(rows):
        inputs = [_tensor(one) for one in after["inputs"]]
        for one in map(_tensor, before["outputs"]):
            if one in inputs:
                inputs.remove(one)
                moved -= 2 * one.bytes
    return moved


def _bar(row: Mapping[str, Any], peaks: Peaks) -> Bar:
    name = str(row.get("site") or row["kernel"])
    macs, moved = row["macs"], row.get("bytes")
    for what, value in (("p50_us", row["p50_us"]), ("macs", macs), ("bytes", moved or 0)):
        if not isinstance(value, (int, float)) or not math.isfinite(value) or value < 0:
            raise UsageError(
                f"{what} of kernel {name} is {value!r}, and a finite number from 0 on is needed. "
                f"Profile the model again."
            )
    precision = str(row["precision"])
    peak = peaks.gmacs(precision)
    arithmetic = macs / peak / 1e3
    memory = (moved or 0) / peaks.bandwidth_gb_s / 1e3
    limit = max(arithmetic, memory)
    return Bar(name, precision, macs, moved, peak, limit, float(row["p50_us"]))


def _arithmetic_us(bar: Bar) -> float:
    return bar.macs / bar.peak_gmacs / 1e3


def _rate(macs: int, us: float) -> float:
    return macs / us / 1e3 if us else 0.0


def _tensors(row: Mapping[str, Any]) -> list[Any]:
    return [*row["inputs"], *row["weights"], *row["outputs"]]


def _tensor(value: Any) -> TensorType:
    shape, dtype = value
    return TensorType(tuple(shape), str(dtype))


def _size(value: Any) -> int:
    return _tensor(value).bytes
