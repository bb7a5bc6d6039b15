from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Annotation, Text

from compress.errors import UsageError
from compress.plots.labels import Label, place
from compress.plots.roofline import roofline_figure, roofline_points
from compress.plots.style import drawing, legend_texts, new_figure

Tables = dict[str, dict[str, Any]]


def marks(figure: Figure) -> list[list[float]]:
    """x, y and area of every mark, as they are drawn."""
    found = []
    for one in figure.axes[0].collections:
        places = np.asarray(one.get_offsets())
        found += np.column_stack([places, np.broadcast_to(one.get_sizes(), len(places))]).tolist()
    return found


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.axes[0].texts]


def test_points_are_intensity_and_rate(tables: Tables, machine: Any) -> None:
    points, hidden = roofline_points(tables, {"onnxruntime": machine})
    assert [(p.variant, p.bar.name) for p in points] == [
        ("float32", "stem"), ("float32", "body"), ("float32", "head"),
        ("onnxruntime int8", "stem"), ("onnxruntime int8", "body"),
    ]  # fmt: skip
    assert hidden == pytest.approx({"float32": 8 / 168, "onnxruntime int8": 31 / 76})
    figure = roofline_figure(tables, {"onnxruntime": machine}, "net")
    rate = 5e6 / 30e3
    expected = [(50, 25), (50, 50), (0.25, 50), (50, 1e6 / 15e3), (5e6 / 30e3, rate)]
    found = np.array(sorted(mark[:2] for mark in marks(figure)))
    assert found == pytest.approx(np.array(sorted(expected)))
    assert legend_texts(figure) == ["float32", "onnxruntime int8"]


def test_areas_are_times(tables: Tables, machine: Any) -> None:
    figure = roofline_figure(tables, {"onnxruntime": machine})
    areas = sorted((area for _, _, area in marks(figure)), reverse=True)
    times = sorted([40, 100, 20, 15, 30], reverse=True)
    assert [area / areas[0] for area in areas] == pytest.approx([time / 100 for time in times])


def test_roofs_are_the_peaks_of_the_precisions_in_use(tables: Tables, machine: Any) -> None:
    figure = roofline_figure(tables, {"onnxruntime": machine})
    lines = [line.get_xydata() for line in figure.axes[0].lines]
    slope, *roofs = [np.asarray(line) for line in lines]
    assert slope[:, 1] == pytest.approx(slope[:, 0] * 10.0)
    assert slope[-1] == pytest.approx([40.0, 400.0])
    assert [roof[0] for roof in roofs] == [pytest.approx([40, 400]), pytest.approx([10, 100])]
    words = texts(figure)
    assert {"int8 peak 400 GMAC/s", "float32 peak 100 GMAC/s", "memory 10 GB/s"} <= set(words)
    assert {"stem", "body", "head"} <= set(words)


def test_roofs_of_several_runtimes_are_named(tables: Tables, machine: Any) -> None:
    other = {**tables["onnxruntime int8"], "runtime": "openvino"}
    peaks = {"onnxruntime": machine, "openvino": machine}
    words = texts(roofline_figure({**tables, "onnxruntime int8": other}, peaks))
    assert "int8 peak in openvino 400 GMAC/s" in words
    assert "float32 peak in onnxruntime 100 GMAC/s" in words


def test_labels_cover_neither_each_other_nor_the_frame(many: Tables, machine: Any) -> None:
    figure = roofline_figure(many, {"onnxruntime": machine})
    figure.draw_without_rendering()
    axes = figure.axes[0]
    frame = axes.get_window_extent()
    boxes = [Text.get_window_extent(one) for one in axes.texts if isinstance(one, Annotation)]
    names = boxes[2:]  # after those of the roof and the slope
    assert 1 <= len(names) <= 9
    for one, other in itertools.combinations(boxes, 2):
        assert not one.overlaps(other)
    for box in names:
        assert frame.x0 <= box.x0 < box.x1 <= frame.x1
        assert frame.y0 <= box.y0 < box.y1 <= frame.y1


def test_a_label_without_room_is_left_out() -> None:
    with drawing():
        figure = new_figure(2.0, "title")
        axes = figure.add_subplot()
        axes.set_xlim(0, 1)
        axes.set_ylim(0, 1)
        figure.draw_without_rendering()
        crowd = [Label(f"point number {i}", 0.5, 0.5) for i in range(200)]
        drawn = place(axes, crowd, crowd[:1])
    assert 1 < len(drawn) < 60
    assert drawn[0].get_text() == "point number 0"
    assert len(axes.texts) == len(drawn)


def test_nothing_to_place_is_refused(edge: Tables, machine: Any) -> None:
    rows = edge["float32"]["rows"]
    peaks = {"onnxruntime": machine}
    if any(row["macs"] and row["bytes"] and row["p50_us"] for row in rows):
        assert len(marks(roofline_figure(edge, peaks))) == len(rows)
    else:
        with pytest.raises(UsageError, match="no roofline to draw"):
            roofline_figure(edge, peaks)
