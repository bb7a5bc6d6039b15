"""Labels beside points, as many as fit: none covers another, a point, or the frame."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from compress.plots.style import FAINT, INK

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.text import Annotation
    from matplotlib.transforms import Bbox

_GAP = 3.0
"""Pixels of 1/100 inch between a point's edge and its label, at the least distance."""
_DISTANCES = (1.0, 4.0, 8.0, 13.0)
_DIRECTIONS: tuple[
    tuple[int, int, Literal["left", "center", "right"], Literal["bottom", "center", "top"]], ...
] = (
    (1, 0, "left", "center"),
    (-1, 0, "right", "center"),
    (0, 1, "center", "bottom"),
    (0, -1, "center", "top"),
    (1, 1, "left", "bottom"),
    (1, -1, "left", "top"),
    (-1, 1, "right", "bottom"),
    (-1, -1, "right", "top"),
)


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
    taken: Sequence[Bbox] = (),
    fontsize: float = 7.0,
    color: str = INK,
) -> list[Annotation]:
    """Draw labels, the first ones first; what finds no free place is left out.

    The figure is laid out here, so its size, its axes' limits and everything else have to be final.

    Args:
        axes: of the points.
        labels: what to write, the most important first.
        points: marks that no label may cover.
        taken: areas in pixels that are not free.
        fontsize: in points.
        color: of the text.

    Returns:
        What was drawn.
    """
    from matplotlib.transforms import Bbox

    figure = axes.get_figure(root=True)
    assert figure is not None
    figure.draw_without_rendering()
    frame = axes.get_window_extent()
    marks = []
    for point in points:
        x, y = axes.transData.transform((point.x, point.y))
        r = point.radius * 0.9
        marks.append(Bbox([[x - r, y - r], [x + r, y + r]]))
    used = [*taken]
    written: list[Bbox] = []
    drawn = []
    for label in labels:
        found = _spot(axes, label, frame, [*used, *marks, *written], written, fontsize, color)
        if found is not None:
            drawn.append(found[0])
            written.append(found[1])
            used += found[2]
    return drawn


def along(axes: Axes, ends: Sequence[tuple[float, float]]) -> list[Bbox]:
    """The area that a line covers, as small boxes; the figure has to be laid out.

    Args:
        axes: of the line.
        ends: its two ends, in data.
    """
    first, last = axes.transData.transform(ends)
    return _boxes(tuple(first), tuple(last))


def _spot(
    axes: Axes,
    label: Label,
    frame: Bbox,
    used: Sequence[Bbox],
    written: Sequence[Bbox],
    fontsize: float,
    color: str,
) -> tuple[Annotation, Bbox, list[Bbox]] | None:
    """The label at the first free place around its point, with the areas of text and leader."""
    from matplotlib.text import Text

    figure = axes.get_figure(root=True)
    assert figure is not None
    to_points = 72 / figure.dpi
    annotation = axes.annotate(
        label.text, (label.x, label.y), xytext=(0, 0), textcoords="offset points",
        fontsize=fontsize, color=color, in_layout=False, annotation_clip=False, zorder=5,
        arrowprops={
            "arrowstyle": "-", "linewidth": 0.5, "color": FAINT, "shrinkA": 0, "shrinkB": 0,
        },
    )  # fmt: skip
    leader = annotation.arrow_patch
    assert leader is not None
    x, y = axes.transData.transform((label.x, label.y))
    for far, (dx, dy, ha, va) in itertools.product(_DISTANCES, _DIRECTIONS):
        near = (label.radius * (0.7 if dx and dy else 1.0) + _GAP * far) * to_points
        annotation.set_position((dx * near, dy * near))
        annotation.set_horizontalalignment(ha)
        annotation.set_verticalalignment(va)
        leader.set_visible(far > 1.0)  # what is not beside its point is joined to it
        annotation.update_positions(figure.canvas.get_renderer())  # type: ignore[attr-defined]
        box = Text.get_window_extent(annotation).padded(1.0)  # of the text without its line
        inside = frame.x0 <= box.x0 and box.x1 <= frame.x1
        inside = inside and frame.y0 <= box.y0 and box.y1 <= frame.y1
        if not inside or box.count_overlaps(used):
            continue
        middle = (box.x0 + box.x1) / 2, (box.y0 + box.y1) / 2
        line = _boxes((x, y), middle) if far > 1.0 else []
        if not any(one.count_overlaps(written) for one in line):
            return annotation, box, line
    annotation.remove()
    return None


def _boxes(first: tuple[float, float], last: tuple[float, float]) -> list[Bbox]:
    """A line in pixels as small boxes."""
    from matplotlib.transforms import Bbox

    (x0, y0), (x1, y1) = first, last
    steps = max(2, int(max(abs(x1 - x0), abs(y1 - y0)) / 3))
    found = []
    for step in range(steps + 1):
        x, y = x0 + (x1 - x0) * step / steps, y0 + (y1 - y0) * step / steps
        found.append(Bbox([[x - 1.5, y - 1.5], [x + 1.5, y + 1.5]]))
    return found
