"""What a budget may limit, in which units, and how a limit is read and written."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from compress.errors import UsageError
from compress.max_drop import parse_max_drop

T = TypeVar("T", bound=str)
Metric = Literal["latency_p50", "latency_p90", "accuracy", "size", "peak_memory"]
Kind = Literal["max", "min", "max_slowdown", "max_growth", "max_drop"]

MAX_SLOWDOWN = 0.025
"""Default of the relative latency: half-way between no change and 5 %, the smallest slow-down that
the gate finds for certain at its default setting. Less would take longer and more."""

MAX_DROP = 0.01
"""Default of the accuracy that may be lost where there is --eval: one point."""

_MS = {"s": 1e3, "ms": 1.0, "us": 1e-3, "µs": 1e-3, "μs": 1e-3}
_BYTES = {
    "B": 1.0,
    "kB": 1e3,
    "KB": 1e3,
    "MB": 1e6,
    "GB": 1e9,
    "KiB": 1024.0,
    "MiB": 1024.0**2,
    "GiB": 1024.0**3,
}

KINDS: Mapping[Metric, tuple[Kind, ...]] = {
    "latency_p50": ("max", "max_slowdown"),
    "latency_p90": ("max", "max_slowdown"),
    "accuracy": ("min", "max_drop"),
    "size": ("max", "max_growth"),
    "peak_memory": ("max", "max_growth"),
}
"""Which limits each metric takes: first the absolute one, then the one against the baseline."""

_EXAMPLES: Mapping[tuple[str, Kind], str] = {
    ("latency", "max"): "a time with its unit: 800 us, 1.5 ms or 2 s",
    ("latency", "max_slowdown"): "a share of the baseline's latency: 3%",
    ("accuracy", "min"): "a share such as 98.5%, or a plain number for a score of your own",
    ("accuracy", "max_drop"): "0.5% or 0.5 points, or 0.5%rel for a share of the baseline's value",
    ("bytes", "max"): "bytes with their unit: 500 kB, 512 KiB, 2 MB or 2 MiB",
    ("bytes", "max_growth"): "a share of the baseline's bytes: 5%",
}


@dataclass(frozen=True)
class Limit:
    """One limit of one metric.

    Attributes:
        metric: what is limited.
        kind: "max" and "min" are absolute, the others refer to the baseline.
        value: milliseconds, bytes, or a fraction (0.03 for 3 %; 0.005 for half a point).
        relative: of `max_drop`: the fraction is one of the baseline's own value.
    """

    metric: Metric
    kind: Kind
    value: float
    relative: bool = False

    @property
    def absolute(self) -> bool:
        """Whether it needs no baseline."""
        return self.kind in ("max", "min")

    @property
    def latency(self) -> bool:
        """Whether it limits a time."""
        return self.metric.startswith("latency")

    def __str__(self) -> str:
        sign = "at least" if self.kind == "min" else "at most"
        if self.absolute:
            return f"{sign} {show(self.metric, self.value)}"
        if self.kind == "max_drop":
            amount = f"{self.value:.4g} of its value" if self.relative else points(self.value)
            return f"loses {sign} {amount}"
        return f"{sign} {self.value * 100:+.4g} %"


def read_limit(metric: str, kind: str, given: object, where: str) -> Limit:
    """A limit from what a budget says.

    Args:
        metric: one of `KINDS`.
        kind: one that the metric takes.
        given: text with a unit, or a number where that cannot be misread.
        where: file and key, for errors.

    Raises:
        UsageError: a name that does not exist, or a value that is no such limit.
    """
    metric = known(metric, KINDS, where, "metric")
    kind = known(kind, KINDS[metric], f"{where}: {metric}", "limit")
    family = _family(metric)
    try:
        value, relative = _value(family, kind, given)
    except (UsageError, ValueError, OverflowError):
        value, relative = math.nan, False
    if not math.isfinite(value) or value < 0:
        raise UsageError(
            f"{where}: {metric}.{kind} is {given!r}, and it must be {_EXAMPLES[family, kind]}."
        )
    return Limit(metric, kind, value, relative)


def known(name: object, allowed: Iterable[T], where: str, what: str) -> T:
    """`name` as one of `allowed`.

    Raises:
        UsageError: it is none of them; the message suggests the nearest.
    """
    names = list(allowed)
    for one in names:
        if name == one:
            return one
    near = difflib.get_close_matches(str(name), names, n=1, cutoff=0.5)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise UsageError(f"{where}: {name!r} is no {what} here; allowed are {', '.join(names)}.{hint}")


def show(metric: Metric, value: float) -> str:
    """A value of a metric for people."""
    family = _family(metric)
    if family == "latency":
        return f"{value * 1e3:.3g} us" if value < 1 else f"{value:.4g} ms"
    if family == "bytes" and value < 1000:
        return f"{value:.4g} B"
    if family == "bytes":
        return f"{value / 1e3:.1f} kB" if value < 1e6 else f"{value / 1e6:.2f} MB"
    return f"{value:.2%}" if 0 <= value <= 1 else f"{value:.4g}"


def points(fraction: float) -> str:
    """Percentage points of a fraction of the full scale."""
    return f"{fraction * 100:.4g} points"


def percent(given: object) -> float:
    """Read a share with its sign: 0.03 for "3%".

    Raises:
        ValueError: anything else, 0.03 and 3 among it, which could be meant either way.
    """
    return _number(given, r"%") / 100


def _family(metric: str) -> str:
    if metric.startswith("latency"):
        return "latency"
    return "bytes" if metric in ("size", "peak_memory") else "accuracy"


def _value(family: str, kind: Kind, given: Any) -> tuple[float, bool]:
    if kind in ("max_slowdown", "max_growth"):
        return percent(given), False
    if kind == "max_drop":
        text = re.sub(r"\s*points?\s*$", "%", str(given))
        drop = parse_max_drop(text)
        return drop.fraction, drop.relative
    if kind == "min":
        plain = isinstance(given, (int, float)) and not isinstance(given, bool)
        return (float(given) if plain else percent(given)), False
    units = _MS if family == "latency" else _BYTES
    pattern = "|".join(map(re.escape, units))
    value = _number(given, pattern)
    unit = str(given).strip().lstrip("+.0123456789eE ")
    return value * units[unit], False


def _number(given: object, unit: str) -> float:
    match = re.fullmatch(rf"\s*(\d+(?:\.\d*)?|\.\d+)\s*(?:{unit})\s*", str(given))
    if match is None:
        raise ValueError(given)
    return float(match[1])
