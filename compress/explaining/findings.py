"""Sentences about a table of lines: what costs time, what saves it, what is left to gain.

Every sentence is made from lines and facts that are handed in; nothing is measured here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from compress.explaining import Finding, Part, Side
from compress.explaining.case import Case, Facts
from compress.explaining.costs import slower, unfused
from compress.explaining.inserted import conversions, moves, own_kernels
from compress.explaining.kept import faster, kept_float, outside
from compress.explaining.lines import NOISE, NOISE_US, Table
from compress.explaining.words import number, time

SMALL = 0.01
"""What moves less than this part of the longer latency gets no sentence of its own."""


_SAME = 0.02
"""Latencies that differ by less are called equal."""


def find(before: Side, after: Side, table: Table, facts: Facts) -> list[Finding]:
    """Every sentence that the tables support, by microseconds at stake."""
    if not before.rows or not after.rows:
        return []
    least = max(SMALL * max(before.latency_us, after.latency_us), NOISE_US / 2)
    steps: tuple[Callable[[Case], Iterator[Finding]], ...] = (
        unfused, slower, conversions, moves, own_kernels, kept_float, faster, outside
    )  # fmt: skip
    case = Case(before, after, table, facts)
    found = [finding for step in steps for finding in step(case)]
    return sorted((f for f in found if f.us >= least), key=lambda f: -f.us)


def headline(
    before: Side,
    after: Side,
    parts: Sequence[Part],
    interval: tuple[float, float] | None = None,
) -> str:
    """The answer in two sentences.

    Args:
        before: the original.
        after: the compressed model.
        parts: of the difference.
        interval: of 95 %, of the speed-up; None where it is not known.
    """
    ratio = before.latency_us / after.latency_us
    change = after.latency_us - before.latency_us
    low, high = interval or (ratio, ratio)
    if low <= 1 <= high and low != high:
        verdict = f"which of them is faster cannot be told ({low:.2f}x to {high:.2f}x)"
    elif abs(ratio - 1) < _SAME:
        verdict = "equally fast"
    else:
        verdict = f"{ratio:.2f}x as fast" if ratio > 1 else f"{1 / ratio:.2f}x slower"
        verdict += f" (95 % interval of the speed-up {low:.2f}x to {high:.2f}x)" * bool(interval)
    text = (
        f"{after.name} takes {time(after.latency_us)} in {after.runtime} and {before.name} "
        f"{time(before.latency_us)}: {verdict}."
    )
    largest = max(
        (p for p in parts if p.change_us * change > 0), key=lambda p: abs(p.change_us), default=None
    )
    if largest is None or abs(ratio - 1) < _SAME or not (before.rows and after.rows):
        return text
    direction = "more" if change > 0 else "less"
    return (
        f"{text} Of the {time(abs(change))} {direction}, most lies in: {largest.label} "
        f"({time(abs(largest.change_us))} {direction})."
    )


def nothing(before: Side, after: Side, table: Table) -> list[Finding]:
    """One sentence where both models do the same in the same time."""
    changed = [line for line in table.lines if line.kind not in ("float", "move")]
    moved = [part for part in table.parts if abs(part.change_us) > NOISE * before.latency_us]
    if not before.rows or not after.rows or changed or moved:
        return []
    return [
        Finding(
            "nothing",
            f"There is nothing to explain: both run the same {number(len(after.rows), 'kernel')} "
            f"in the same precisions, and no group of them differs by more than {NOISE:.0%} of "
            f"the latency.",
            0.0,
        )
    ]
