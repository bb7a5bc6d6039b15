"""What a check found: rows with verdicts, and the verdict of them all."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Verdict = Literal["pass", "fail", "cannot tell", "not judged here", "no limit"]
Policy = Literal["pass", "fail"]

SCHEMA_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Row:
    """One metric under one limit.

    Attributes:
        metric: "latency_p50", "latency_p90", "accuracy", "size" or "peak_memory".
        limit: in words, "" where there is none.
        baseline: of the baseline in words, "" where it is unknown or plays no part.
        candidate: the same of the candidate.
        value: what is compared with the limit: candidate / baseline for a relative latency, size
            or memory, the absolute value (milliseconds, bytes, accuracy), or the drop in points;
            None where it could not be found.
        low: lower end of its interval, None where it has none.
        high: upper end.
        unit: of the three: "x", "ms", "bytes", "points" or "".
        verdict: of this row; the last two kinds count for nothing.
        reason: a sentence wherever the verdict is not plain from the figures.
    """

    metric: str
    limit: str = ""
    baseline: str = ""
    candidate: str = ""
    value: float | None = None
    low: float | None = None
    high: float | None = None
    unit: str = ""
    verdict: Verdict = "no limit"
    reason: str = ""

    @property
    def found(self) -> str:
        """Value and interval in words."""
        if self.value is None:
            return ""
        middle = _figure(self.value, self.unit) + _SUFFIX.get(self.unit, "")
        if self.low is None or self.high is None:
            return middle
        return f"{middle} [{_figure(self.low, self.unit)}, {_figure(self.high, self.unit)}]"


@dataclass(frozen=True, kw_only=True)
class CheckResult:
    """A check of one candidate.

    Attributes:
        candidate: its path as given.
        baseline: what it was compared with, "" without one.
        verdict: "fail" if a row fails, else "cannot tell" if one cannot be told or none could be
            judged, else "pass".
        cannot_tell: whether "cannot tell" lets the candidate pass.
        rows: one per metric and limit.
        notes: sentences that a reader should see.
        pairs: how often both sides were built and timed.
        looks: how often the figures were judged.
        seconds: time of the whole check.
        method: how latency was judged, in a sentence.
        machine: facts and fingerprint of the machine it ran on.
        versions: of the packages that matter.
        created: UTC, ISO 8601.
    """

    candidate: str
    baseline: str
    verdict: Verdict
    cannot_tell: Policy
    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()
    pairs: int = 0
    looks: int = 0
    seconds: float = 0.0
    method: str = ""
    machine: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    created: str = ""

    @property
    def ok(self) -> bool:
        """Whether the candidate may go on."""
        return self.verdict == "pass" or (
            self.verdict == "cannot tell" and self.cannot_tell == "pass"
        )

    @property
    def headline(self) -> str:
        """The verdict in one sentence, with what it means where it is none."""
        against = f" against {self.baseline}" if self.baseline else ""
        sentence = f"{self.verdict.upper()}: {self.candidate}{against}"
        names = ", ".join(dict.fromkeys(r.metric for r in self.rows if r.verdict == self.verdict))
        if self.verdict == "pass":
            return f"{sentence}."
        if self.verdict == "fail":
            return f"{sentence}: {names}."
        consequence = "lets it pass" if self.ok else "fails the check"
        where = names or "nothing could be judged here"
        return f"{sentence}: {where}. --cannot-tell {self.cannot_tell} {consequence}."

    @property
    def ratio(self) -> Row | None:
        """The row with the ratio of the median latencies, None without a baseline."""
        fitting = (r for r in self.rows if r.metric == "latency_p50" and r.unit == "x")
        return next(fitting, None)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "schema_version": SCHEMA_VERSION,
            "ok": self.ok,
            "headline": self.headline,
            **dataclasses.asdict(self),
        }


def overall(rows: Sequence[Row]) -> Verdict:
    """The verdict of all rows together."""
    verdicts = {row.verdict for row in rows}
    if "fail" in verdicts:
        return "fail"
    return "pass" if "pass" in verdicts and "cannot tell" not in verdicts else "cannot tell"


COLUMNS = ("metric", "limit", "baseline", "candidate", "found", "verdict", "why")


def cells(row: Row) -> tuple[str, ...]:
    """A row as text, in the order of `COLUMNS`."""
    return (
        row.metric,
        row.limit,
        row.baseline,
        row.candidate,
        row.found,
        row.verdict,
        row.reason,
    )


def text_table(rows: Sequence[Row]) -> str:
    """All rows as plain text; reasons stand below, so that lines stay short."""
    lines = [COLUMNS[:-1], *(cells(row)[:-1] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    table = [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    ]
    reasons = [f"{row.metric} ({row.verdict}): {row.reason}" for row in rows if row.reason]
    return "\n".join([*table, *reasons])


_SUFFIX = {"ms": " ms", "bytes": " bytes", "points": " points"}


def _figure(value: float, unit: str) -> str:
    match unit:
        case "x":
            return f"{value:.3f}"
        case "points":
            return f"{value:+.2f}"
        case "bytes":
            return f"{value:.0f}"
        case _:
            return f"{value:.4g}"
