"""Numbers and names in sentences."""

from __future__ import annotations

import re
from collections.abc import Sequence

NAMED = 4
"""Sites that a sentence names; the table has all."""


def time(us: float) -> str:
    """Microseconds with three digits, or milliseconds."""
    if abs(us) >= 9999.5:
        return f"{us / 1000:.1f} ms"
    return f"{us:.0f} µs" if abs(us) >= 99.95 else f"{us:.1f} µs"


def names(sites: Sequence[str], most: int = NAMED) -> str:
    """The first of some names, and how many more there are."""
    found = list(dict.fromkeys(sites))
    shown = ", ".join(found[:most])
    more = len(found) - most
    return f"{shown} and {more} more" if more > 0 else shown


def number(count: int, noun: str) -> str:
    """A count with its noun in the right form."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def share(us: float, whole_us: float) -> str:
    """Percent of a latency."""
    return f"{us / whole_us:.0%}" if whole_us else "0%"


def verb(count: int, plural: str) -> str:
    """The verb of a count of things: "take" or "takes"."""
    return (
        plural
        if count != 1
        else {"are": "is", "have": "has", "do": "does"}.get(plural, plural + "s")
    )


def of_several(reason: str) -> str:
    """A reason about one operator ("its weight is ..."), said of several."""
    text = re.sub(r"\bits\b", "their", reason)
    return re.sub(r"\b(between|left|surround|and|behind) it\b", r"\1 them", text)
