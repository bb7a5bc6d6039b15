"""Roofline: what each kernel reaches, under the arithmetic peaks and the bandwidth of the machine.

Williams, Waterman and Patterson, "Roofline", Communications of the ACM 52(4), 2009.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from compress.errors import UsageError
from compress.plots.labels import Box, Label, along, figure_of, place
from compress.plots.style import (
    INK,
    colour,
    drawing,
    log_axis,
    new_figure,
    padded,
    plain,
    rate,
    short_names,
    shortened,
)
from compress.waterline import Bar, Peaks, bars

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.text import Annotation

LABELLED = 9
"""Kernels of each variant whose names are tried, those with most time first."""
_MARKS = "osD^vP"
_LARGEST, _SMALLEST = 420.0, 12.0
"""Areas of marks in points squared."""
_HEIGHT = 4.6
_LINE = 12.0
"""Pixels from one text to the next."""


@dataclass(frozen=True)
class Point:
    """A kernel with multiply-accumulates, bytes and time.

    Attributes:
        variant: whose kernel it is.
        bar: the kernel.
    """

    variant: str
    bar: Bar

    @property
    def intensity(self) -> float:
        """MACs per byte."""
        return self.bar.macs / (self.bar.bytes or 1)


def roofline_points(
    tables: Mapping[str, Mapping[str, Any]], peaks: Mapping[str, Peaks]
) -> tuple[list[Point], dict[str, float]]:
    """What can be drawn, and by variant the share of time (0..1) of what cannot.

    Kernels without multiply-accumulates, without time and of unknown bytes have no place there.
    """
    points, hidden = [], {}
    for variant, table in tables.items():
        found = bars(table["rows"], peaks[table["runtime"]])
        good = [bar for bar in found if bar.macs and bar.bytes and bar.actual_us]
        points += [Point(variant, bar) for bar in good]
        total = sum(bar.actual_us for bar in found)
        hidden[variant] = 1 - sum(bar.actual_us for bar in good) / total if total else 0.0
    return points, hidden


def roofline_figure(
    tables: Mapping[str, Mapping[str, Any]], peaks: Mapping[str, Peaks], name: str = ""
) -> Figure:
    """Kernels as points whose area is their time, with the roofs of their precisions.

    Args:
        tables: by variant, `runtime` and the `rows` of `compress.kernel_rows.kernel_rows`.
        peaks: by runtime, of the machine that the kernels were measured on.
        name: of the model.

    Raises:
        UsageError: no kernel has both multiply-accumulates and known bytes.
    """
    points, hidden = roofline_points(tables, peaks)
    if not points:
        raise UsageError(
            "No kernel has multiply-accumulates, known bytes and a time, so there is no roofline "
            "to draw. `--kind kernels` shows the times."
        )
    roofs = _roofs(tables, points)
    bandwidth = max(peaks[table["runtime"]].bandwidth_gb_s for table in tables.values())
    with drawing():
        figure = new_figure(
            _HEIGHT,
            _title(name, points, bandwidth),
            _remark(hidden),
            legend=_legend(list(tables), points),
        )
        axes = figure.add_subplot()
        ridge = max(roofs.values()) / bandwidth
        # Some of the slope is always to be seen, with room for its words.
        axes.set_xlim(*padded([*(p.intensity for p in points), ridge, ridge / 6], 1.7))
        rates = [p.bar.actual_gmacs for p in points]
        low, _ = padded([*rates, min(roofs.values()) / 3], 1.8)
        axes.set_ylim(low, max(*roofs.values(), *rates) * 1.6)
        log_axis(axes, "x")
        log_axis(axes, "y")
        axes.grid(which="major")
        axes.set_xlabel("arithmetic intensity, MACs per byte moved")
        axes.set_ylabel("rate, GMAC/s")
        radii = _points(axes, list(tables), points)
        marks = [Label("", p.intensity, p.bar.actual_gmacs, r) for p, r in radii]
        taken = _draw_roofs(axes, roofs, bandwidth, marks)
        names = short_names((p.bar.name for p in points), 26)
        wanted = [
            Label(names[p.bar.name], p.intensity, p.bar.actual_gmacs, r)
            for p, r in _named(radii, list(tables))
        ]
        place(axes, wanted, marks, taken=taken)
    return figure


def _points(
    axes: Axes, variants: Sequence[str], points: Sequence[Point]
) -> list[tuple[Point, float]]:
    """Draw the marks, large ones first so that small ones stay on top; each with its radius."""
    longest = max(point.bar.actual_us for point in points)
    ordered = sorted(points, key=lambda p: -p.bar.actual_us)
    areas = [max(_SMALLEST, _LARGEST * p.bar.actual_us / longest) for p in ordered]
    kinds = dict.fromkeys((p.variant, p.bar.precision) for p in ordered)
    for variant, precision in kinds:
        own = [
            (p.intensity, p.bar.actual_gmacs, area)
            for p, area in zip(ordered, areas, strict=True)
            if (p.variant, p.bar.precision) == (variant, precision)
        ]
        x, y, sizes = zip(*own, strict=True)
        axes.scatter(
            x, y, s=sizes, marker=_mark(variants.index(variant)), color=colour(precision),
            alpha=0.65, edgecolors=INK, linewidths=0.5, zorder=3,
        )  # fmt: skip
    return [(p, math.sqrt(a) / 2 * 100 / 72) for p, a in zip(ordered, areas, strict=True)]


def _named(
    radii: Sequence[tuple[Point, float]], variants: Sequence[str]
) -> list[tuple[Point, float]]:
    """The kernels with most time of each variant, in turns."""
    by_variant = [[one for one in radii if one[0].variant == v][:LABELLED] for v in variants]
    longest = max(map(len, by_variant), default=0)
    return [found[at] for at in range(longest) for found in by_variant if at < len(found)]


def _roofs(
    tables: Mapping[str, Mapping[str, Any]], points: Sequence[Point]
) -> dict[tuple[str, str], float]:
    """Peak rate by runtime and precision, for what occurs."""
    runtimes = {variant: table["runtime"] for variant, table in tables.items()}
    return {(runtimes[p.variant], p.bar.precision): p.bar.peak_gmacs for p in points}


def _draw_roofs(
    axes: Axes,
    roofs: Mapping[tuple[str, str], float],
    bandwidth: float,
    marks: Sequence[Label],
) -> list[Box]:
    """The slope and the roofs with their words; what they cover."""
    left, right = axes.get_xlim()
    low, high = axes.get_ylim()
    ridge = max(roofs.values()) / bandwidth
    start = max(left, low / bandwidth)
    lines = [[(start, start * bandwidth), (ridge, ridge * bandwidth)]]
    axes.plot(*zip(*lines[0], strict=True), color=INK, linewidth=1.1, zorder=2)
    several = len({runtime for runtime, _ in roofs}) > 1
    figure_of(axes).draw_without_rendering()
    frame = axes.get_window_extent()
    scale = frame.height / math.log(high / low)
    texts = []
    above = math.inf
    for (runtime, precision), peak in sorted(roofs.items(), key=lambda item: -item[1]):
        ink = colour(precision)
        lines.append([(peak / bandwidth, peak), (right, peak)])
        axes.plot(*zip(*lines[-1], strict=True), color=ink, linewidth=1.4, zorder=2)
        # Text stands on its line; where the next roof is too near, it hangs from it.
        y = math.log(peak) * scale
        hangs = above - y < _LINE * 1.3
        where = f" in {runtime}" if several else ""
        texts.append(
            axes.annotate(
                f"{precision} peak{where} {rate(peak)}", (right, peak),
                xytext=(-2, -2 if hangs else 2), textcoords="offset points", ha="right",
                va="top" if hangs else "bottom", fontsize=7, color=ink, in_layout=False,
            )
        )  # fmt: skip
        above = y - _LINE if hangs else y
    angle = math.degrees(math.atan2(scale, frame.width / math.log(right / left)))
    texts.append(_on_slope(axes, (start, ridge), bandwidth, angle, marks))
    covered = [box for line in lines for box in along(axes, line)]
    boxes = [text.get_window_extent() for text in texts]
    return [*covered, *((box.x0, box.y0, box.x1, box.y1) for box in boxes)]


def _on_slope(
    axes: Axes,
    ends: tuple[float, float],
    bandwidth: float,
    angle: float,
    marks: Sequence[Label],
) -> Annotation:
    """The bandwidth, written above the slope where fewest points are in the way."""
    start, ridge = ends
    places = [axes.transData.transform((mark.x, mark.y)) for mark in marks]
    text = axes.annotate(
        f"memory {plain(bandwidth)} GB/s", (start, start * bandwidth), xytext=(-3, 3),
        textcoords="offset points", ha="center", va="bottom", fontsize=7, rotation=angle,
        rotation_mode="anchor", in_layout=False,
    )  # fmt: skip
    frame = axes.get_window_extent()
    best, fewest = start, math.inf
    for part in (0.5, 0.35, 0.65, 0.25, 0.75, 0.15, 0.85):
        x = start * (ridge / start) ** part
        text.xy = (x, x * bandwidth)
        box = text.get_window_extent()
        near = zip(marks, places, strict=True)
        hidden = sum(box.padded(mark.radius).contains(*at) for mark, at in near)
        hidden += len(marks) * (box.x0 < frame.x0 or box.y0 < frame.y0)
        if hidden < fewest:
            best, fewest = x, hidden
    text.xy = (best, best * bandwidth)
    return text


def _legend(variants: Sequence[str], points: Sequence[Point]) -> list[Artist]:
    from matplotlib.lines import Line2D

    found: list[Artist] = []
    for index, variant in enumerate(variants):
        for precision in dict.fromkeys(p.bar.precision for p in points if p.variant == variant):
            label = shortened(variant, 30)
            label += "" if variant.endswith(precision) else f": {precision}"
            found.append(
                Line2D(
                    [], [], linestyle="", marker=_mark(index), markersize=6, alpha=0.65,
                    color=colour(precision), markeredgecolor=INK, markeredgewidth=0.5, label=label,
                )
            )  # fmt: skip
    return found


def _mark(index: int) -> str:
    return _MARKS[index % len(_MARKS)]


def _title(name: str, points: Sequence[Point], bandwidth: float) -> str:
    """How much of the time memory limits, by variant."""
    parts = []
    for variant in dict.fromkeys(point.variant for point in points):
        own = [point.bar for point in points if point.variant == variant]
        below = [bar for bar in own if bar.macs / (bar.bytes or 1) * bandwidth < bar.peak_gmacs]
        starved = sum(bar.actual_us for bar in below)
        share = starved / sum(b.actual_us for b in own)
        parts.append(f"{share:.0%} of {shortened(variant, 30)}")
    prefix = f"{shortened(name, 40)}: m" if name else "M"
    return f"{prefix}emory is the roof of {' and '.join(parts)} (shares of time)"


def _remark(hidden: Mapping[str, float]) -> str:
    remark = "Area: time of the kernel; names of those with most time. "
    left = [f"{share:.0%} of {shortened(v, 30)}" for v, share in hidden.items() if share >= 0.005]
    if left:
        remark += f"Not shown: kernels without MACs or of unknown bytes, {', '.join(left)}. "
    return remark + (
        "Bytes are of tensors and weights, moved once each; kernels above the slope find them in a "
        "cache."
    )
