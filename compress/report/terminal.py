"""The summary that `compress run` prints."""

from __future__ import annotations

from typing import TYPE_CHECKING

from compress.report import Report
from compress.report.table import (
    COLUMNS,
    DEVICES,
    LADDER,
    PREDICTED,
    candidate_row,
    device_rows,
    fidelity,
    float_sites,
    gap,
    ladder_row,
    memory_sentence,
    predicted_row,
    predicted_sentence,
    sensitivity_sentence,
    sensitivity_table,
    tried_row,
)

if TYPE_CHECKING:
    from rich.console import Console

_FEW_SITES = 8
_FEW_ROWS = 8


def render(report: Report, console: Console) -> None:
    """Print headline, candidates, and what stayed in float."""
    from rich.markup import escape
    from rich.table import Table

    for index, sentence in enumerate(report.headline):
        style = ("bold green" if report.met else "bold yellow") if index == 0 else ""
        console.print(sentence, style=style, highlight=False, markup=False)
    grid = Table(*COLUMNS, box=None, padding=(0, 2, 0, 0), header_style="bold")
    for candidate in report.candidates:
        chosen = candidate.name == report.chosen
        grid.add_row(*candidate_row(candidate, chosen), style="bold" if chosen else "")
    console.print(grid)
    for candidate in report.candidates:
        if candidate.fidelity is not None:
            text = f"{candidate.name} against the original: {fidelity(candidate.fidelity)}."
            console.print(text, highlight=False, markup=False)
    for candidate in report.candidates if report.budget.get("max_memory") else ():
        text = memory_sentence(candidate.name, candidate.memory)
        console.print(text, highlight=False, markup=False)
    _devices(report, console)
    _repair(report, console)
    _predicted(report, console)
    finals = {candidate.name for candidate in report.candidates}
    others = [tried_row(row) for row in report.tried if row["name"] not in finals]
    for name, speed, *_ in others[:_FEW_ROWS]:
        console.print(f"  tried: {name}: {speed}", highlight=False, markup=False)
    if len(others) > _FEW_ROWS:
        console.print(f"  and {len(others) - _FEW_ROWS} more, see report.md", highlight=False)
    left = float_sites(report)
    total = sum(row["macs"] for row in report.sites) or 1
    for row in sorted(left, key=lambda row: -row["macs"])[:_FEW_SITES]:
        text = f"  float: {row['name']} ({row['macs'] / total:.1%} of MACs): {row['reason']}"
        console.print(text, highlight=False, markup=False)
    if len(left) > _FEW_SITES:
        console.print(f"  and {len(left) - _FEW_SITES} more, see report.md", highlight=False)
    if report.sensitivity:
        columns, sensitive = sensitivity_table(report)
        console.print(f"Sensitivity. {sensitivity_sentence(report)}", highlight=False, markup=False)
        lines = Table(*columns, box=None, padding=(0, 2, 0, 2), header_style="bold")
        for cells in sensitive:
            lines.add_row(*map(escape, cells))
        console.print(lines)


def _devices(report: Report, console: Console) -> None:
    """The candidates on other machines."""
    from rich.markup import escape
    from rich.table import Table

    if report.devices:
        devices = Table(*DEVICES, box=None, padding=(0, 2, 0, 0), header_style="bold")
        for cells in device_rows(report):
            devices.add_row(*map(escape, cells))
        console.print(devices)


def _repair(report: Report, console: Console) -> None:
    """What the ladder tried, and how far the artifact is from its simulation."""
    from rich.markup import escape
    from rich.table import Table

    if report.gap:
        console.print(gap(report.gap), highlight=False, markup=False)
    if report.ladder:
        ladder = Table(*LADDER, box=None, padding=(0, 2, 0, 2), header_style="bold")
        for attempt in report.ladder:
            ladder.add_row(*map(escape, ladder_row(attempt)))
        console.print("Repair of the accuracy:", highlight=False)
        console.print(ladder)


def _predicted(report: Report, console: Console) -> None:
    """What the sheet of the device predicts."""
    from rich.table import Table

    if report.predicted:
        console.print(predicted_sentence(report.predicted), highlight=False, markup=False)
        rows = Table(*PREDICTED, box=None, padding=(0, 2, 0, 2), header_style="bold")
        for row in report.predicted["rows"]:
            rows.add_row(*predicted_row(row))
        console.print(rows)
