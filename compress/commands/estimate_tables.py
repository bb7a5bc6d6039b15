"""Tables of estimates and of predictors' errors for the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.markup import escape
from rich.table import Table

from compress.commands.estimates import Built
from compress.estimate.result import Latency
from compress.render import console

_MOST_ROWS = 60


def estimates(name: str, found: Sequence[Latency]) -> None:
    """The tables of `compress profile --source`."""
    out = console()
    for one in found:
        if one.kernels:
            out.print(_kernels(one))
        left = len(one.kernels) - _MOST_ROWS
        if left > 0:
            out.print(f"and {left} smaller ones; --json has all.", highlight=False)
        text = f"{name}: {one}"
        out.print(text, highlight=False, markup=False, style="bold")
        lines = [
            f"  {one.source}",
            f"  interval: {one.coverage:.0%} of cases; {one.evidence}",
            *(f"  outside of what is known: {line}" for line in one.outside[:10]),
        ]
        if len(one.outside) > 10:
            lines.append(f"  and {len(one.outside) - 10} more")
        for line in lines:
            out.print(line, highlight=False, markup=False)
        if one.source.kind != "measured":
            text = "  Nothing of this was measured on the model; `compress bench` does."
            out.print(text, highlight=False, markup=False)


def _kernels(one: Latency) -> Table:
    table = _table(("kernel", "type"), (f"{one.source.kind} µs", "share"), "note")
    total = sum(kernel.us for kernel in one.kernels) or 1.0
    shown = list(one.kernels)
    if len(shown) > _MOST_ROWS:
        shown = sorted(shown, key=lambda kernel: -kernel.us)[:_MOST_ROWS]
    for kernel in shown:
        share = f"{kernel.us / total:.1%}"
        table.add_row(
            escape(kernel.name), kernel.type, f"{kernel.us:.1f}", share, escape(kernel.note)
        )
    return table


def predictors(built: Sequence[Built]) -> None:
    """The tables of `compress profile --build-predictor`: errors on what was held out."""
    out = console()
    for one in built:
        report = one.predictor.report
        table = _table(
            (f"{one.runtime}, held out",),
            ("n", "within 5%", "within 10%", "MAPE", "Spearman", "share of time"),
            "",
        )
        for name, row in report["networks_held_out"].items():
            table.add_row(f"networks, {name}", *_cells(row), "", "")
        for name, row in report["kernels_held_out"].items():
            table.add_row(escape(name), *_cells(row), f"{row['share_of_time']:.1%}", "")
        out.print(table)
        lines = (
            f"{report['networks']} networks, {report['samples']} samples, {report['kernels']} "
            f"kernels in {report['seconds'] / 60:.1f} minutes.",
            f"For {one.predictor.place}.",
            f"Written to {one.path}",
        )
        for line in lines:
            out.print(line, highlight=False, markup=False)


def _cells(row: dict[str, float | None]) -> tuple[str, ...]:
    numbers = ("within_5", "within_10", "mape")
    shown = [f"{row[name]:.1%}" if row[name] is not None else "" for name in numbers]
    rank = f"{row['spearman']:.3f}" if row["spearman"] is not None else ""
    return (str(row["n"]), *shown, rank)


def _table(left: Sequence[str], right: Sequence[str], last: str) -> Table:
    table = Table(header_style="bold", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in left:
        table.add_column(name, overflow="fold")
    for name in right:
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column(last)
    return table
