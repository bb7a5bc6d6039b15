"""Plots as standalone SVG: no library, no script, readable on light and on dark pages."""

from __future__ import annotations

import math
from collections.abc import Sequence
from xml.sax.saxutils import escape

from compress.report import Report
from compress.report.table import METRICS, sensitivities, sensitivity_metric

SENSITIVITY = "sensitivity"
"""Name of the plot of sensitivities, without its ending."""

_MOST = 60
"""Bars in that plot."""
_STEEP = 20
"""From this many times the middle value on, the largest would leave the others no length."""
_ROW = 18
_BAR = 12
_WIDTH = 720
_TITLE = 34
_MARGIN = 10
_LETTER = 6.6
"""Width of a letter of the 11 px font, on average; labels get the room they need by it."""
_LONGEST = 44
"""Letters of a label; longer ones lose their middle."""
_DECADES = 6
"""Most powers of ten that a logarithmic axis spans; smaller values get the shortest bar."""
_SHORTEST = 2.0


def plots(report: Report) -> dict[str, str]:
    """Every plot of a report, by file name."""
    return {f"{SENSITIVITY}.svg": _sensitivity(report)} if report.sensitivity else {}


def _sensitivity(report: Report) -> str:
    """The format that costs most, operator by operator."""
    figures, metric = sensitivities(report), sensitivity_metric(report)
    sums: dict[str, float] = {}
    for values in figures.values():
        for name, value in values.items():
            sums[name] = sums.get(name, 0.0) + value
    worst = max(sums, key=lambda name: sums[name])
    rows = [(name, values[worst]) for name, values in figures.items() if worst in values]
    rows = sorted(rows, key=lambda row: -row[1])[:_MOST]
    _, unit = METRICS.get(metric, (metric, ""))
    middle = rows[len(rows) // 2][1]
    title = f"Sensitivity to {worst}, one operator at a time: {metric}"
    return bar_chart_svg(title, rows, unit, log=rows[0][1] > _STEEP * middle > 0)


def bar_chart_svg(
    title: str, rows: Sequence[tuple[str, float]], unit: str, *, log: bool = False
) -> str:
    """Horizontal bars with their values, the largest first; equals keep their order.

    Args:
        title: above the bars.
        rows: label and value; a value of 0 or less has no bar.
        unit: behind every value.
        log: lengths follow the logarithm: the largest has the full length, and one less power of
            ten is the same distance shorter each time.
    """
    ordered = sorted(rows, key=lambda row: -row[1])
    title += " (logarithmic)" if log else ""
    labels = [_shortened(label) for label, _ in ordered]
    values = [f"{value:.3g} {unit}".rstrip() for _, value in ordered]
    left = _MARGIN + _LETTER * max(map(len, labels), default=0) + 8
    room = _WIDTH - left - _LETTER * max(map(len, values), default=0) - 8 - _MARGIN
    lengths = _lengths([value for _, value in ordered], room, log)
    height = _TITLE + _ROW * len(ordered) + _MARGIN
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" '
        f'width="{_WIDTH}" height="{height}" role="img" '
        f'font-family="system-ui, sans-serif" font-size="11" fill="#7d8590">',
        f"<title>{_text(title)}</title>",
        f'<text x="{_MARGIN}" y="20" font-size="13" font-weight="600">{_text(title)}</text>',
    ]
    for index, (label, value, length) in enumerate(zip(labels, values, lengths, strict=True)):
        top = _TITLE + _ROW * index
        base = top + _BAR - 2
        lines += [
            f'<text x="{left - 8:.1f}" y="{base}" text-anchor="end">{_text(label)}</text>',
            f'<rect x="{left:.1f}" y="{top}" width="{length:.1f}" height="{_BAR}" rx="2" '
            f'fill="#4f8fd0"/>',
            f'<text x="{left + length + 6:.1f}" y="{base}">{_text(value)}</text>',
        ]
    return "\n".join([*lines, "</svg>"]) + "\n"


def _lengths(values: Sequence[float], room: float, log: bool) -> list[float]:
    positive = [value for value in values if value > 0]
    if not positive:
        return [0.0] * len(values)
    if not log:
        return [max(value, 0.0) / max(positive) * room for value in values]
    high = math.log10(max(positive))
    span = min(max(high - math.log10(min(positive)), 1.0), _DECADES)
    # The smallest value keeps a tenth of the room, so that its bar can be seen.
    return [
        max(1 - 0.9 * (high - math.log10(value)) / span, _SHORTEST / room) * room
        if value > 0
        else 0.0
        for value in values
    ]


def _text(text: str) -> str:
    """Escaped for XML, which has no way to write most control characters."""
    return escape("".join(letter if letter.isprintable() else "?" for letter in text))


def _shortened(label: str) -> str:
    if len(label) <= _LONGEST:
        return label
    half = (_LONGEST - 1) // 2
    return f"{label[:half]}…{label[-half:]}"
