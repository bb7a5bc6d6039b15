"""Sensitivity: what each operator costs alone, as bars."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from compress.errors import UsageError
from compress.plots.style import colour, drawing, new_figure, short_names

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST = 60
"""Bars; operators that suffer less are left out."""
_STEEP = 20
"""From this many times the middle value on, the largest would leave the others no length."""
_DECADES = 6
"""Most powers of ten that a logarithmic axis spans; smaller values get the shortest bar."""


def sensitivity_figure(
    rows: Sequence[tuple[str, float]], *, form: str, metric: str, unit: str = ""
) -> Figure:
    """Horizontal bars with their values, the largest first; equals keep their order.

    The axis is logarithmic where the largest value is far above the middle one.

    Args:
        rows: operator and figure; one of 0 or less has no bar.
        form: format that the operators are quantized to.
        metric: what the figures are.
        unit: of the figures.

    Raises:
        UsageError: there are no rows, or a value is not finite.
    """
    if not rows:
        raise UsageError("There are no sensitivities to plot; run with --sensitivity.")
    for name, value in rows:
        if not math.isfinite(value):
            raise UsageError(
                f"The sensitivity of {name} is {value}, and a plot takes finite numbers. Leave it "
                f"out."
            )
    from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

    shown = sorted(rows, key=lambda row: -row[1])[:MOST]
    values = [max(value, 0.0) for _, value in shown]
    log = values[0] > _STEEP * values[len(values) // 2] > 0
    names = short_names(name for name, _ in shown)
    title = f"Sensitivity to {form}, one operator at a time: {metric}"
    remark = f"The {MOST} most sensitive of {len(rows)} operators." if len(rows) > MOST else ""
    with drawing():
        figure = new_figure(0.55 + 0.185 * len(shown), title, remark)
        axes = figure.add_subplot()
        low = _floor(values) if log else 0.0
        axes.barh(
            range(len(shown)), [max(v - low, 0.0) for v in values], 0.72, left=low,
            color=colour("int8"),
        )  # fmt: skip
        if log:
            axes.set_xscale("log")
        else:
            axes.xaxis.set_major_locator(MaxNLocator(5))
        for at, value in enumerate(values):
            axes.annotate(
                f"{value:.3g} {unit}".rstrip(), (max(value, low), at), xytext=(3, 0),
                textcoords="offset points", va="center", fontsize=7,
            )  # fmt: skip
        axes.set_yticks(range(len(shown)), [names[name] for name, _ in shown], fontsize=7.5)
        axes.tick_params(axis="y", length=0)
        axes.set_ylim(len(shown) - 0.4, -0.6)
        top = values[0] or 1.0
        axes.set_xlim(low, top * (top / low) ** 0.14 if log else top * 1.16)
        axes.set_xlabel(f"{metric}{f', {unit}' if unit else ''}{' (logarithmic)' if log else ''}")
        axes.spines["left"].set_visible(False)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.grid(axis="x")
    return figure


def _floor(values: Sequence[float]) -> float:
    """Left end of a logarithmic axis, with room for the smallest bar that it shows."""
    positive = [value for value in values if value > 0]
    lowest = max(min(positive), max(positive) / 10**_DECADES)
    return float(lowest / (max(positive) / lowest) ** 0.1)
