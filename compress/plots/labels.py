"""Labels beside points, as many as fit: none covers another, a point, or the frame."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from compress.plots.style import INK

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.text import Annotation
    from matplotlib.transforms import Bbox

_GAP = 3.0
"""Pixels of 1/100 inch between a point's edge and its label."""


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
    drawn = []
    for label in labels:
        found = _spot(axes, label, frame, [*used, *marks], fontsize, color)
        if found is not None:
            drawn.append(found[0])
            used.append(found[1])
    return drawn


def _spot(
    axes: Axes, label: Label, frame: Bbox, used: Sequence[Bbox], fontsize: float, color: str
) -> tuple[Annotation, Bbox] | None:
    """The label at the first free place around its point."""
    figure = axes.get_figure(root=True)
    assert figure is not None
    to_points = 72 / figure.dpi
    annotation = axes.annotate(
        label.text, (label.x, label.y), xytext=(0, 0), textcoords="offset points",
        fontsize=fontsize, color=color, in_layout=False, annotation_clip=False,
    )  # fmt: skip
    for far in (1.0, 4.0, 9.0):
        near = label.radius + _GAP * far
        slant = label.radius * 0.7 + _GAP * far
        for dx, dy, ha, va in (
            (near, 0, "left", "center"),
            (-near, 0, "right", "center"),
            (0, near, "center", "bottom"),
            (0, -near, "center", "top"),
            (slant, slant, "left", "bottom"),
            (slant, -slant, "left", "top"),
            (-slant, slant, "right", "bottom"),
            (-slant, -slant, "right", "top"),
        ):
            annotation.set_position((dx * to_points, dy * to_points))
            annotation.set_horizontalalignment(ha)
            annotation.set_verticalalignment(va)
            box = annotation.get_window_extent().padded(1.0)
            inside = frame.x0 <= box.x0 and box.x1 <= frame.x1
            inside = inside and frame.y0 <= box.y0 and box.y1 <= frame.y1
            if inside and not box.count_overlaps(used):
                return annotation, box
    annotation.remove()
    return None
