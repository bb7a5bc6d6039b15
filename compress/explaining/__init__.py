"""Why a compressed model is as fast as it is: both models kernel by kernel, parts, sentences."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Row = Mapping[str, Any]
"""A kernel, as `compress.kernel_rows.kernel_rows` describes it."""

Kind = Literal["narrow", "slower", "unfused", "float", "own", "absorbed", "convert", "move"]
"""What became of a line:

narrow    executed in int8 or another format of fewer bits, and not slower than the original
slower    executed in fewer bits, and slower than the original
unfused   dressed in Q/DQ that the runtime did not fuse: computed in float between conversions
float     computed in float on both sides
own       a kernel of its own that the original computes inside another one, or does not have
absorbed  a kernel of its own in the original alone
convert   Q, DQ and casts
move      only moves values: transposes, reorders, shapes
"""


@dataclass(frozen=True)
class Side:
    """One of the two models, as it was measured.

    Attributes:
        name: of the file or the artifact.
        runtime: name of the target that ran it.
        latency_us: of one run: median.
        rows: its kernels in order of execution; empty where the runtime tells no times.
    """

    name: str
    runtime: str
    latency_us: float
    rows: tuple[Row, ...] = ()


@dataclass(frozen=True)
class Line:
    """One site with its kernels in both models, or one inserted kernel.

    Attributes:
        kind: what became of it.
        site: "" for what a tool or the runtime inserted.
        op_type: of the site, or of the kernel.
        before_us: in the original, without what the profiler adds.
        after_us: in the compressed model.
        before: its kernels in the original.
        after: its kernels in the compressed model.
        owner: the site that the time belongs to, where that is another one: of an unfused Q/DQ
            pair, the operator between.
        near: where nothing else is known, the sites that run before and after it; "" at the ends.
        around: of a conversion, the operators in float that need it.
        reason: why it is not int8, or "".
    """

    kind: Kind
    site: str
    op_type: str
    before_us: float
    after_us: float
    before: tuple[Row, ...] = ()
    after: tuple[Row, ...] = ()
    owner: str = ""
    near: tuple[str, str] = ("", "")
    around: tuple[str, ...] = ()
    reason: str = ""

    @property
    def change_us(self) -> float:
        """What it takes more than in the original."""
        return self.after_us - self.before_us

    @property
    def macs(self) -> int:
        """Multiply-accumulates, by whichever side counts them."""
        return max((int(row["macs"]) for row in (*self.before, *self.after)), default=0)

    @property
    def name(self) -> str:
        """The site, or the kernel that was inserted."""
        return self.site or str(next((r["kernel"] for r in (*self.after, *self.before)), ""))

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, one row of the table."""
        return {
            "kind": self.kind,
            "name": self.name,
            "site": self.site,
            "op_type": self.op_type,
            "before_us": self.before_us,
            "after_us": self.after_us,
            "change_us": self.change_us,
            "before": _precisions(self.before),
            "after": _precisions(self.after),
            "before_kernels": [row["kernel"] for row in self.before],
            "after_kernels": [row["kernel"] for row in self.after],
            "macs": self.macs,
            "owner": self.owner,
            "near": list(self.near),
            "around": list(self.around),
            "reason": self.reason,
        }


def _precisions(rows: Sequence[Row]) -> str:
    return "+".join(dict.fromkeys(str(row["precision"]) for row in rows))


@dataclass(frozen=True)
class Part:
    """A share of both latencies. Parts add up to the latencies, and so do their changes.

    Attributes:
        kind: of its lines, or "outside" for what no kernel takes.
        label: the same in words.
        before_us: in the original.
        after_us: in the compressed model.
        lines: how many.
    """

    kind: str
    label: str
    before_us: float
    after_us: float
    lines: int = 0

    @property
    def change_us(self) -> float:
        """What it takes more than in the original."""
        return self.after_us - self.before_us

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {**dataclasses.asdict(self), "change_us": self.change_us}


@dataclass(frozen=True)
class Finding:
    """One sentence with its number.

    Attributes:
        kind: what was found, for programs.
        sentence: what was found, for people.
        us: microseconds of one run at stake, 0 or more.
        sites: that it is about.
        advice: what to do about it, or "".
        numbers: what the sentence was made from.
    """

    kind: str
    sentence: str
    us: float
    sites: tuple[str, ...] = ()
    advice: str = ""
    numbers: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "kind": self.kind,
            "sentence": self.sentence,
            "us": self.us,
            "sites": list(self.sites),
            "advice": self.advice,
            "numbers": dict(self.numbers),
        }


@dataclass(frozen=True)
class Explanation:
    """Why a model is as fast as it is beside another one.

    Attributes:
        before: the original.
        after: the compressed model.
        speedup: latency of the original over that of the other; where both were measured now,
            fields of `compress.latency.Ratio`, else `value` alone.
        headline: the answer in short.
        findings: sentences by microseconds at stake, largest first.
        parts: shares of both latencies, whose changes add up to the difference.
        lines: sites and inserted kernels in order of execution.
        measured: when and where, in words.
        notes: what a reader must know about the measurement.
    """

    before: Side
    after: Side
    speedup: Mapping[str, Any]
    headline: str
    findings: tuple[Finding, ...]
    parts: tuple[Part, ...]
    lines: tuple[Line, ...]
    measured: str
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "before": dataclasses.asdict(self.before),
            "after": dataclasses.asdict(self.after),
            "speedup": dict(self.speedup),
            "headline": self.headline,
            "findings": [finding.to_dict() for finding in self.findings],
            "parts": [part.to_dict() for part in self.parts],
            "lines": [line.to_dict() for line in self.lines],
            "measured": self.measured,
            "notes": list(self.notes),
        }

    def markdown(self) -> str:
        """The same as a Markdown document."""
        from compress.explaining.text import markdown

        return markdown(self)
