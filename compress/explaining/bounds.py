"""Layers that move more than they compute: what fewer bits can buy them at most."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from compress.explaining import Finding, Line, Row
from compress.explaining.lines import main_row
from compress.explaining.words import names, number, share, time, verb

NEAR = (0.5, 1.5)
"""A kernel waits for memory if streaming its bytes would take this part of its time. Below, it
does something else; above, its tensors come out of a cache."""


class Peaks(Protocol):
    """Rates of a machine, as `compress.estimate.peaks.Peaks` holds them."""

    @property
    def bandwidth_gb_s(self) -> float:
        """10^9 bytes per second."""

    def gmacs(self, precision: str) -> float:
        """10^9 multiply-accumulates per second."""


def memory(lines: Sequence[Line], peaks: Peaks, latency_us: float) -> list[Finding]:
    """A sentence about the layers below the machine's balance.

    A kernel is bound by memory if its arithmetic intensity (multiply-accumulates per byte) lies
    below the machine's balance, the ratio of the two peaks (Williams et al., Roofline, CACM 52(4),
    2009), and if moving its bytes at the measured bandwidth explains its time.

    Args:
        lines: of both models.
        peaks: measured.
        latency_us: of the compressed model.
    """
    bound = [line for line in lines if line.macs and line.before and line.after]
    bound = [line for line in bound if _waits(main_row(line.before), line.before_us, peaks)]
    narrow = [line for line in bound if line.kind in ("narrow", "slower")]
    narrow.sort(key=lambda line: -line.after_us)
    if not narrow:
        return []
    bytes_before = sum(main_row(line.before)["bytes"] for line in narrow)
    told = [main_row(line.after)["bytes"] for line in narrow]
    if any(size is None for size in told):
        return []
    ratio = bytes_before / sum(told)
    before = sum(line.before_us for line in narrow)
    after = sum(line.after_us for line in narrow)
    intensity = sum(line.macs for line in narrow) / bytes_before
    balance = peaks.gmacs("float32") / peaks.bandwidth_gb_s
    return [
        Finding(
            "memory",
            f"{number(len(narrow), 'layer')} {verb(len(narrow), 'do')} {intensity:.2g} "
            f"multiply-accumulates for each byte that {'they' if len(narrow) > 1 else 'it'} "
            f"{verb(len(narrow), 'move')} in float, and {balance:.2g} keep the arithmetic of this "
            f"machine busy ({names([line.site for line in narrow])}). Where bytes decide, int8, "
            f"which moves {1 / ratio:.0%} of them, makes {'them' if len(narrow) > 1 else 'it'} at "
            f"most {ratio:.1f}x as fast; measured {before / after:.1f}x ({time(before)} became "
            f"{time(after)}, {share(after, latency_us)} of the whole).",
            after,
            tuple(line.site for line in narrow),
            "",
            {
                "macs_per_byte": intensity,
                "balance": balance,
                "byte_ratio": ratio,
                "before_us": before,
                "after_us": after,
                "bandwidth_gb_s": peaks.bandwidth_gb_s,
            },
        )
    ]


def _waits(row: Row, us: float, peaks: Peaks) -> bool:
    if not row["bytes"] or not row["macs"] or us <= 0:
        return False
    moving_us = float(row["bytes"]) / peaks.bandwidth_gb_s / 1e3
    computing_us = float(row["macs"]) / peaks.gmacs(row["precision"]) / 1e3
    return moving_us > computing_us and NEAR[0] <= moving_us / us <= NEAR[1]
