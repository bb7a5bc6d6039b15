"""Efficiency gap: accuracy over the latency that is and the latency that the arithmetic allows.

"On the Efficiency of CNNs" (arXiv 2404.03617): with n multiply-accumulates and the peak rate R the
ideal latency is t_i = n / R, the efficiency C = t_i / t_a. On a logarithmic axis the distance of
the two is log(1 / C).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from compress.errors import UsageError
from compress.plots.labels import Label, along, figure_of, place
from compress.plots.style import (
    FAINT,
    FAMILIES,
    PALETTE,
    drawing,
    log_axis,
    new_figure,
    number,
    padded,
    plain,
    short_names,
    shortened,
)
from compress.waterline import Peaks

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

_HEIGHT = 4.2


@dataclass(frozen=True)
class GapPoint:
    """One model.

    Attributes:
        family: that its curve is of.
        name: of the model or candidate.
        accuracy: higher is better.
        actual_ms: measured latency.
        ideal_ms: its multiply-accumulates at their peak rates.
    """

    family: str
    name: str
    accuracy: float
    actual_ms: float
    ideal_ms: float

    @property
    def efficiency(self) -> float:
        """C, ideal over actual."""
        return self.ideal_ms / self.actual_ms


def gap_points(rows: Iterable[Mapping[str, Any]], peaks: Peaks) -> list[GapPoint]:
    """Points from rows.

    Args:
        rows: family, name, accuracy, latency_ms and macs: a number, of the row's `precision`
            (float32 where it has none), or numbers by precision.
        peaks: of the machine that the latencies were measured on.

    Raises:
        UsageError: a field is missing, or no positive number.
    """
    return [_point(row, peaks) for row in rows]


def gap_figure(points: Sequence[GapPoint], unit: str = "top-1", title: str = "") -> Figure:
    """Two curves for each family, ideal and actual, with the distance of every pair.

    Args:
        points: of `gap_points`.
        unit: of the accuracy; "top-1" is shown as a percentage.
        title: takes the place of the usual one.

    Raises:
        UsageError: there are no points.
    """
    if not points:
        raise UsageError("There is no model whose accuracy and latency are both known.")
    families = list(dict.fromkeys(point.family for point in points))
    inks = _inks(families)
    with drawing():
        figure = new_figure(
            _HEIGHT,
            title or _title(points),
            "Ideal: the multiply-accumulates at the peak rate of their precision, no byte moved. "
            "At the lines: log10(1/C), and the factor between the two.",
            legend=_legend(inks),
        )
        axes = figure.add_subplot()
        times = [time for p in points for time in (p.ideal_ms, p.actual_ms)]
        axes.set_xlim(*padded(times, 1.6))
        log_axis(axes, "x")
        accuracies = [point.accuracy for point in points]
        room = (max(accuracies) - min(accuracies)) * 0.15 or abs(accuracies[0]) * 0.02 or 0.5
        axes.set_ylim(min(accuracies) - room, max(accuracies) + room)
        if unit == "top-1":
            from matplotlib.ticker import PercentFormatter

            axes.yaxis.set_major_formatter(PercentFormatter(xmax=1.0))
        axes.set_ylabel(f"accuracy ({shortened(unit)})")
        axes.set_xlabel("latency, ms (logarithmic)")
        axes.grid()
        lines = [line for f in families for line in _curves(axes, f, points, inks[f])]
        _texts(axes, points, lines)
    return figure


def _inks(families: Sequence[str]) -> dict[str, str]:
    """Colours by family: of precisions, where the families are called after different ones."""
    precisions = [one.rpartition(" ")[2] for one in families]
    if len(set(precisions)) == len(families) and set(precisions) <= set(PALETTE):
        return {one: PALETTE[p] for one, p in zip(families, precisions, strict=True)}
    return {one: FAMILIES[index % len(FAMILIES)] for index, one in enumerate(families)}


def _curves(
    axes: Axes, family: str, points: Sequence[GapPoint], ink: str
) -> list[list[tuple[float, float]]]:
    """The two curves of a family and the lines between them; all their ends."""
    own = sorted((p for p in points if p.family == family), key=lambda p: p.actual_ms)
    ideal = [(p.ideal_ms, p.accuracy) for p in own]
    actual = [(p.actual_ms, p.accuracy) for p in own]
    for at, (style, fill) in ((ideal, ("--", "white")), (actual, ("-", ink))):
        axes.plot(
            *zip(*at, strict=True), linestyle=style, marker="o", markersize=5.5, color=ink,
            markerfacecolor=fill, linewidth=1.3, zorder=3,
        )  # fmt: skip
    between = [[a, b] for a, b in zip(ideal, actual, strict=True)]
    for ends in between:
        axes.plot(*zip(*ends, strict=True), color=FAINT, linewidth=0.7, linestyle=":", zorder=2)
    return [*between, *([list(pair) for at in (ideal, actual) for pair in itertools.pairwise(at)])]


def _texts(
    axes: Axes, points: Sequence[GapPoint], lines: Sequence[Sequence[tuple[float, float]]]
) -> None:
    """Names at the actual points, distances at the middle of the lines."""
    names = short_names((point.name for point in points), 30)
    marks = [Label("", t, p.accuracy, 4.5) for p in points for t in (p.ideal_ms, p.actual_ms)]
    wanted = []
    for point in points:
        middle = math.sqrt(point.ideal_ms * point.actual_ms)
        distance = math.log10(1 / point.efficiency)
        text = f"{distance:.2f} ({plain(1 / point.efficiency)}×)"
        wanted.append(Label(text, middle, point.accuracy, 0.0))
    wanted += [Label(names[p.name], p.actual_ms, p.accuracy, 4.5) for p in points]
    figure_of(axes).draw_without_rendering()
    place(axes, wanted, marks, taken=[box for line in lines for box in along(axes, line)])


def _legend(inks: Mapping[str, str]) -> list[Artist]:
    from matplotlib.lines import Line2D

    def sample(label: str, ink: str, style: Literal["-", "--"], fill: str) -> Line2D:
        return Line2D(
            [], [], color=ink, linestyle=style, marker="o", markersize=5.5, markerfacecolor=fill,
            label=label,
        )  # fmt: skip

    kinds = [sample("ideal", FAINT, "--", "white"), sample("actual", FAINT, "-", FAINT)]
    return [*kinds, *(sample(shortened(f, 30), ink, "-", ink) for f, ink in inks.items())]


def _title(points: Sequence[GapPoint]) -> str:
    shares = [point.efficiency for point in points]
    low, high = f"{min(shares):.0%}", f"{max(shares):.0%}"
    found = low if low == high else f"{low} to {high}"
    return f"Accuracy over latency: {found} of the arithmetic peak is used"


def _point(row: Mapping[str, Any], peaks: Peaks) -> GapPoint:
    try:
        name, family = str(row["name"]), str(row["family"])
        macs, accuracy, latency = row["macs"], row["accuracy"], row["latency_ms"]
    except KeyError as error:
        raise UsageError(
            f"A row of the efficiency gap lacks {error}; it needs family, name, accuracy, macs and "
            f"latency_ms."
        ) from error
    parts = macs if isinstance(macs, Mapping) else {row.get("precision", "float32"): macs}
    ideal = sum(
        number(count, f"macs of {name}") / peaks.gmacs(precision) / 1e6
        for precision, count in parts.items()
    )
    actual = number(latency, f"latency_ms of {name}")
    if not ideal or not actual:
        raise UsageError(
            f"{name} has {'no time' if ideal else 'no multiply-accumulates'}, so it has no place "
            f"on a logarithmic axis. Leave the row out."
        )
    return GapPoint(family, name, number(accuracy, f"accuracy of {name}"), actual, ideal)
