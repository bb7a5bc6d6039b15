"""An explanation for people: on the terminal, and as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from compress.explaining import Explanation, Finding, Line
from compress.explaining.words import share, time

if TYPE_CHECKING:
    from rich.console import Console

PARTS = ("share of the difference", "original", "compressed", "change")
LINES = ("site or kernel", "operator", "original", "compressed", "original µs", "µs", "change", "")
_SHOWN = 30


def render(explanation: Explanation, console: Console) -> None:
    """Print the sentences, then what adds up, then the lines that change most."""
    from rich.markup import escape
    from rich.table import Table

    def say(text: str, style: str = "") -> None:
        console.print(text, style=style, highlight=False, markup=False)

    faster = explanation.after.latency_us < explanation.before.latency_us
    say(explanation.headline, "bold green" if faster else "bold yellow")
    for finding in explanation.findings:
        say(f"- {sentence(finding)}")
        if finding.advice:
            say(f"  -> {finding.advice}", "cyan")
    for note in explanation.notes:
        say(note)
    say(f"Times are {explanation.measured}.")
    grids = [(PARTS, 1, part_rows(explanation)), (LINES, 4, line_rows(explanation, _SHOWN))]
    for columns, left, rows in grids:
        grid = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
        for index, column in enumerate(columns):
            right = left <= index < (len(columns) if left == 1 else 7)
            grid.add_column(
                column, justify="right" if right else "left", overflow="fold", no_wrap=right
            )
        for cells in rows:
            grid.add_row(*map(escape, cells))
        if grid.row_count:
            console.print(grid)
    left_out = len(explanation.lines) - _SHOWN
    if left_out > 0:
        say(f"and {left_out} more that change less; --json and --markdown have all.")


def markdown(explanation: Explanation) -> str:
    """The whole explanation as Markdown."""
    lines = [f"# Why {explanation.after.name} is as fast as it is", "", explanation.headline, ""]
    for finding in explanation.findings:
        lines.append(f"- {sentence(finding)}" + (f" *{finding.advice}*" if finding.advice else ""))
    lines += ["", *(f"{note}\n" for note in explanation.notes)]
    lines += [f"Times are {explanation.measured}.", "", "## What adds up", ""]
    lines += _table(PARTS, part_rows(explanation))
    lines += ["", "## Kernels", "", *_table(LINES, line_rows(explanation))]
    return "\n".join(lines) + "\n"


def sentence(finding: Finding) -> str:
    """The finding with what is at stake in front."""
    return f"{time(finding.us)}: {finding.sentence}" if finding.us > 0 else finding.sentence


def part_rows(explanation: Explanation) -> list[tuple[str, ...]]:
    """Parts with their sums."""
    before, after = explanation.before.latency_us, explanation.after.latency_us
    rows: list[tuple[str, ...]] = [
        (
            f"{part.label} ({part.lines})" if part.lines else part.label,
            _us(part.before_us),
            _us(part.after_us),
            _change(part.change_us),
        )
        for part in explanation.parts
    ]
    return [*rows, ("latency", _us(before), _us(after), _change(after - before))]


def line_rows(explanation: Explanation, most: int | None = None) -> list[tuple[str, ...]]:
    """Lines in order of execution; with `most`, those that change most, largest first."""
    lines: Sequence[Line] = explanation.lines
    if most is not None and len(lines) > most:
        lines = sorted(lines, key=lambda line: -abs(line.change_us))[:most]
    return [_cells(line, explanation.after.latency_us) for line in lines]


def _cells(line: Line, latency_us: float) -> tuple[str, ...]:
    plain = line.to_dict()
    what = line.reason or (f"of {line.owner}" if line.owner not in ("", line.site) else "")
    if not what and not line.site and line.after:
        what = f"between {line.near[0] or 'the input'} and {line.near[1] or 'the output'}"
    if not what and line.after_us > 0.1 * latency_us:
        what = f"{share(line.after_us, latency_us)} of the latency"
    return (
        line.name,
        line.op_type,
        plain["before"] or "-",
        plain["after"] or "-",
        _us(line.before_us),
        _us(line.after_us),
        _change(line.change_us),
        what,
    )


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    from compress.report.markdown import table

    return table(columns, rows)


def _us(us: float) -> str:
    return f"{us:.1f}"


def _change(us: float) -> str:
    return f"{us:+.1f}"
