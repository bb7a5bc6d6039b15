"""What passes did, for the Markdown report: numbers, layers that were merged, and what was left."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

LEFT = {"left": "left alone", "not_folded": "not folded", "not_expanded": "without branches"}
"""Details that give a reason by name, and what the report calls them."""
REMARK = "remark"
"""A sentence that stands at the head of the report."""
NAMES = 8
"""Named at most for one reason; `report.json` has all."""


def step_lines(step: Mapping[str, Any]) -> list[str]:
    """One item of a list, with what was merged and left alone below it."""
    details = step["details"]
    short = {k: v for k, v in details.items() if isinstance(v, (str, int, float)) and k != REMARK}
    notes = ", ".join(f"{name} {value}" for name, value in short.items())
    lines = [f"1. `{step['name']}`" + (f": {notes}" if notes else "")]
    lines += [f"   - {line}" for line in (*_merged(details), *_left(details))]
    return lines


def _merged(details: Mapping[str, Any]) -> Iterator[str]:
    """Every layer that took the place of several."""
    merged = details.get("merged")
    for name, facts in merged.items() if isinstance(merged, Mapping) else ():
        if "operators" not in facts:
            continue
        (before, _), macs, parameters = (facts[k] for k in ("operators", "macs", "parameters"))
        yield (
            f"`{name}` from {before} operators: multiply-accumulates {macs[0]:,} to {macs[1]:,}, "
            f"parameters {parameters[0]:,} to {parameters[1]:,}, equal to "
            f"{facts['max_relative_difference']:.1g}"
        )


def _left(details: Mapping[str, Any]) -> Iterator[str]:
    """Reasons, each with the names that it holds for."""
    for key, title in LEFT.items():
        reasons: dict[str, list[str]] = {}
        found = details.get(key)
        for name, reason in found.items() if isinstance(found, Mapping) else ():
            reasons.setdefault(str(reason), []).append(f"`{name}`" if name else "the network")
        for reason, names in reasons.items():
            more = f" and {len(names) - NAMES} more" if len(names) > NAMES else ""
            yield f"{title}: {', '.join(names[:NAMES])}{more}: {reason}"
