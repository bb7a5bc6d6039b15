"""Waterline: attainable and actual rate of every kernel, and of the sequence they form.

The analysis of "On the Efficiency of CNNs" (arXiv 2404.03617); see `compress.waterline`.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from compress.errors import UsageError
from compress.plots.style import (
    INK,
    colour,
    drawing,
    microseconds,
    new_figure,
    plain,
    rate,
    short_names,
    shortened,
)
from compress.waterline import Bar, Peaks, Waterline, bars, waterline

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_PANEL = 2.75
"""Inches of a variant."""
_NAMED = 0.018
"""Share of the multiply-accumulates from which on a kernel's name has room under its bar."""
_LINE = 0.085
"""Least distance of two texts beside the bars, as a share of the panel's height."""
_MANY = 150
"""Bars from which on their outlines would cover them."""
_FAR = 4.0
"""Times the highest bar; an R above that would leave the bars no height and is cut off."""
_BILLION = 1e9
WATER = "#0a7f8c"
"""Colour of the waterline."""


def waterline_figure(
    tables: Mapping[str, Mapping[str, Any]], peaks: Mapping[str, Peaks], name: str = ""
) -> Figure:
    """One panel per variant: bars in order of execution, as wide as their share of the MACs.

    Args:
        tables: by variant, `runtime` and the `rows` of `compress.kernel_rows.kernel_rows`.
        peaks: by runtime, of the machine that the kernels were measured on.
        name: of the model.

    Raises:
        UsageError: no kernel has multiply-accumulates and a time.
    """
    found = {v: bars(table["rows"], peaks[table["runtime"]]) for v, table in tables.items()}
    found = {v: own for v, own in found.items() if any(b.macs and b.attainable_us for b in own)}
    if not found:
        raise UsageError(
            "No kernel has multiply-accumulates, so there is no waterline to draw. `--kind "
            "kernels` shows the times."
        )
    lines = {v: waterline(tables[v]["rows"], peaks[tables[v]["runtime"]]) for v in found}
    with drawing():
        figure = new_figure(
            _PANEL * len(found), _title(name, lines), _remark(lines), legend=_legend(found)
        )
        panels = figure.subplots(len(found), 1, squeeze=False)[:, 0]
        for axes, (variant, own) in zip(panels, found.items(), strict=True):
            _panel(axes, variant, own, lines[variant])
        panels[-1].set_xlabel("kernels in order of execution, as wide as their share of the MACs")
    return figure


def _panel(axes: Axes, variant: str, own: Sequence[Bar], line: Waterline) -> None:
    multiplying = [bar for bar in own if bar.macs]
    widths = [bar.macs / line.macs for bar in multiplying]
    lefts = [0.0, *itertools.accumulate(widths)][:-1]
    thin = len(multiplying) > _MANY
    axes.bar(
        lefts, [bar.actual_gmacs for bar in multiplying], widths, align="edge",
        color=[colour(bar.precision) for bar in multiplying], edgecolor="white",
        linewidth=0.0 if thin else 0.3, alpha=0.75, label="actual",
    )  # fmt: skip
    axes.stairs(
        [bar.attainable_gmacs for bar in multiplying], [*lefts, 1.0], baseline=None, color=INK,
        linewidth=0.5 if thin else 1.0, zorder=3, label="attainable",
    )  # fmt: skip
    highest = max(max(bar.actual_gmacs, bar.attainable_gmacs) for bar in multiplying)
    far = line.peak_gmacs > _FAR * highest
    axes.set_ylim(0, highest * 1.3 if far else max(highest, line.peak_gmacs) * 1.07)
    axes.set_xlim(0, 1)
    names = short_names((bar.name for bar in multiplying), 26)
    named = [
        (left + width / 2, names[bar.name])
        for left, width, bar in zip(lefts, widths, multiplying, strict=True)
        if width >= _NAMED
    ]
    axes.set_xticks([at for at, _ in named], [text for _, text in named], rotation=90, fontsize=6)
    axes.tick_params(axis="x", length=2)
    axes.set_ylabel("GMAC/s")
    size, unit = (1e6, "M") if line.macs < _BILLION else (1e9, "G")
    macs = f"{plain(line.macs / size)} {unit} MACs"
    axes.set_title(f"{shortened(variant, 40)}: {macs} in {microseconds(line.actual_us)}")
    _lines(axes, line, far)


def _lines(axes: Axes, line: Waterline, far: bool) -> None:
    """R, the waterline and the actual mean, with their values beside the panel."""
    top = axes.get_ylim()[1]
    above = ", above the panel" if far else ""
    share = f"{line.efficiency:.0%} of R"
    drawn = (
        (top if far else line.peak_gmacs, "--", INK, f"R {rate(line.peak_gmacs)}{above}"),
        (line.waterline_gmacs, "-", WATER, f"waterline {rate(line.waterline_gmacs)}"),
        (line.actual_gmacs, ":", INK, f"actual {rate(line.actual_gmacs)}, {share}"),
    )
    at = _spread([value / top for value, *_ in drawn])
    for (value, style, ink, text), place in zip(drawn, at, strict=True):
        axes.axhline(value, linestyle=style, color=ink, linewidth=1.3, zorder=4)
        axes.text(1.01, place, text, transform=axes.transAxes, va="center", fontsize=7, color=ink)


def _spread(wanted: Sequence[float]) -> list[float]:
    """The heights, moved apart where texts would touch; equals keep their order, first on top."""
    order = sorted(range(len(wanted)), key=lambda index: (wanted[index], -index))
    found = list(wanted)
    floor = 0.0
    for index in order:
        found[index] = max(found[index], floor)
        floor = found[index] + _LINE
    ceiling = 1.0
    for index in reversed(order):
        found[index] = min(found[index], ceiling)
        ceiling = found[index] - _LINE
    return found


def _legend(found: Mapping[str, Sequence[Bar]]) -> list[Artist]:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    multiplying = [bar for own in found.values() for bar in own if bar.macs]
    precisions = dict.fromkeys(bar.precision for bar in multiplying)
    actual = [
        Patch(facecolor=colour(one), alpha=0.75, label=f"actual rate, {one}") for one in precisions
    ]
    outline = "attainable rate: min(peak, bandwidth × intensity)"
    return [*actual, Line2D([], [], color=INK, linewidth=1.0, label=outline)]


def _title(name: str, lines: Mapping[str, Waterline]) -> str:
    parts = [f"{shortened(v, 30)} {one.efficiency:.0%}" for v, one in lines.items()]
    prefix = f"{shortened(name, 40)}: s" if name else "S"
    return f"{prefix}hare of the arithmetic peak that is reached: {', '.join(parts)}"


def _remark(lines: Mapping[str, Waterline]) -> str:
    remark = (
        "Waterline: rate of the whole if every kernel took max(MACs / peak, bytes / bandwidth). "
        "R: the same without bytes. "
    )
    idle = [f"{one.without_macs:.0%} of {shortened(v, 30)}" for v, one in lines.items()]
    if any(one.without_macs >= 0.005 for one in lines.values()):
        remark += f"Kernels without MACs have no width; attainable time there: {', '.join(idle)}. "
    unknown = sum(one.unknown_bytes for one in lines.values())
    if unknown:
        remark += f"{unknown} kernels of unknown bytes count as limited by arithmetic alone. "
    return remark + (
        "A kernel above its line finds its tensors in a cache, or multiplies less than is counted "
        "(Winograd)."
    )
