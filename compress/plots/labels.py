"""Labels beside points, as many as fit: none covers another, a point, or the frame."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from compress.plots.style import FAINT, INK

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.text import Annotation

Box = tuple[float, float, float, float]
"""Left, bottom, right and top in pixels."""
_GAP = 3.0
"""Pixels of 1/100 inch between a point's edge and its label, at the least distance."""
_DISTANCES = (1.0, 4.0, 8.0, 13.0)
_DIRECTIONS = ((1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (1, -1), (-1, 1), (-1, -1))
_SIDES: dict[int, Literal["left", "center", "right"]] = {1: "left", 0: "center", -1: "right"}
_ENDS: dict[int, Literal["bottom", "center", "top"]] = {1: "bottom", 0: "center", -1: "top"}
_MARGIN = 1.0


@dataclass(frozen=True)
class Label:
    """A text that belongs to a point.

    Attributes:
        text: as it is drawn.
        x: of the point, in data.
        y: of the point, in data.
        radius: of the point's mark, in pixels of 1/100 inch.
    """

    text: str
    x: float
    y: float
    radius: float = 3.0


def place(
    axes: Axes,
    labels: Sequence[Label],
    points: Sequence[Label],
    *,
    taken: Sequence[Box] = (),
    fontsize: float = 7.0,
    color: str = INK,
) -> list[Annotation]:
    """Draw labels, the first ones first; what finds no free place is left out.

    The figure has to be laid out: its size, its axes' limits and everything else are final.

    Args:
        axes: of the points.
        labels: what to write, the most important first.
        points: marks that no label may cover.
        taken: areas that are not free.
        fontsize: in points.
        color: of the text.

    Returns:
        What was drawn.
    """
    extent = axes.get_window_extent()
    frame = (extent.x0, extent.y0, extent.x1, extent.y1)
    used = [*taken]
    for point in points:
        x, y = axes.transData.transform((point.x, point.y))
        r = point.radius * 0.9
        used.append((x - r, y - r, x + r, y + r))
    written: list[Box] = []
    drawn = []
    for label in labels:
        annotation = axes.annotate(
            label.text, (label.x, label.y), xytext=(0, 0), textcoords="offset points",
            fontsize=fontsize, color=color, in_layout=False, annotation_clip=False, zorder=5,
            arrowprops={
                "arrowstyle": "-", "linewidth": 0.5, "color": FAINT, "shrinkA": 0, "shrinkB": 0,
            },
        )  # fmt: skip
        if _put(axes, annotation, label, frame, used, written):
            drawn.append(annotation)
        else:
            annotation.remove()
    return drawn


def along(axes: Axes, ends: Sequence[tuple[float, float]]) -> list[Box]:
    """The area that a line covers, as small boxes; the figure has to be laid out.

    Args:
        axes: of the line.
        ends: its two ends, in data.
    """
    first, last = axes.transData.transform(ends).tolist()
    return _boxes((first[0], first[1]), (last[0], last[1]))


def _put(
    axes: Axes,
    annotation: Annotation,
    label: Label,
    frame: Box,
    used: list[Box],
    written: list[Box],
) -> bool:
    """Move the label to the first free place around its point, and take that place."""
    from matplotlib.text import Text

    leader = annotation.arrow_patch
    assert leader is not None
    to_points = 72 / figure_of(axes).dpi
    extent = Text.get_window_extent(annotation)  # of the text without its leader
    width, height = extent.width + 2 * _MARGIN, extent.height + 2 * _MARGIN
    x, y = axes.transData.transform((label.x, label.y)).tolist()
    for far, (dx, dy) in itertools.product(_DISTANCES, _DIRECTIONS):
        near = label.radius * (0.7 if dx and dy else 1.0) + _GAP * far
        left = x + dx * near - width * (1 - dx) / 2
        low = y + dy * near - height * (1 - dy) / 2
        box = (left, low, left + width, low + height)
        inside = frame[0] <= left and box[2] <= frame[2] and frame[1] <= low and box[3] <= frame[3]
        if not inside or _hits(box, used) or _hits(box, written):
            continue
        line = _boxes((x, y), (left + width / 2, low + height / 2)) if far > 1.0 else []
        if any(_hits(one, written) for one in line):
            continue
        annotation.set_position((dx * near * to_points, dy * near * to_points))
        annotation.set_horizontalalignment(_SIDES[dx])
        annotation.set_verticalalignment(_ENDS[dy])
        leader.set_visible(far > 1.0)  # what is not beside its point is joined to it
        used += line
        written.append(box)
        return True
    return False


def figure_of(axes: Axes) -> Figure:
    """The figure that the axes are in."""
    figure = axes.get_figure(root=True)
    assert figure is not None
    return figure


def _hits(box: Box, others: Sequence[Box]) -> bool:
    left, low, right, high = box
    return any(a < right and left < c and b < high and low < d for a, b, c, d in others)


def _boxes(first: tuple[float, float], last: tuple[float, float]) -> list[Box]:
    """A line in pixels as small boxes."""
    (x0, y0), (x1, y1) = first, last
    steps = max(2, int(max(abs(x1 - x0), abs(y1 - y0)) / 3))
    found = []
    for step in range(steps + 1):
        x, y = x0 + (x1 - x0) * step / steps, y0 + (y1 - y0) * step / steps
        found.append((x - 1.5, y - 1.5, x + 1.5, y + 1.5))
    return found
