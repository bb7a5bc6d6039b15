from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from compress.errors import UsageError
from compress.plots.style import legend_texts
from compress.plots.waterline import waterline_figure
from compress.waterline import waterline

Tables = dict[str, dict[str, Any]]


def test_bars_are_rates_as_wide_as_their_share_of_the_work(tables: Tables, machine: Any) -> None:
    figure = waterline_figure(tables, {"onnxruntime": machine}, "net")
    above, below = figure.axes
    bars = [(p.get_x(), p.get_width(), p.get_height()) for p in above.containers[0]]
    # stem, body and head have 1, 5 and 1 of 7 million; act and Reorder have none and no width.
    assert [width for _, width, _ in bars] == pytest.approx([1 / 7, 5 / 7, 1 / 7])
    assert [left for left, _, _ in bars] == pytest.approx([0, 1 / 7, 6 / 7])
    assert [height for _, _, height in bars] == pytest.approx([25, 50, 50])
    (outline,) = above.patches[len(bars) :]
    values, edges, _ = outline.get_data()  # type: ignore[attr-defined]
    assert np.asarray(values) == pytest.approx([100, 100, 1e6 / 400e3])
    assert np.asarray(edges) == pytest.approx([0, 1 / 7, 6 / 7, 1])
    assert above.get_title(loc="left") == "float32: 7 M MACs in 168 µs"
    assert below.get_title(loc="left") == "onnxruntime int8: 7 M MACs in 76 µs"
    assert [tick.get_text() for tick in above.get_xticklabels()] == ["stem", "body", "head"]
    assert legend_texts(figure)[:2] == ["actual rate, float32", "actual rate, int8"]


def test_lines_are_the_peak_the_waterline_and_the_mean(tables: Tables, machine: Any) -> None:
    figure = waterline_figure(tables, {"onnxruntime": machine})
    for axes, table in zip(figure.axes, tables.values(), strict=True):
        found = waterline(table["rows"], machine)
        heights = [line.get_ydata()[0] for line in axes.lines]  # type: ignore[index]
        wanted = [found.peak_gmacs, found.waterline_gmacs, found.actual_gmacs]
        assert heights == pytest.approx(wanted)
        places = [text.get_position()[1] for text in axes.texts]
        order = np.argsort(heights)
        assert min(np.diff(np.array(places)[order])) > 0.08  # in the lines' order, and apart
        assert all(0 <= place <= 1 for place in places)
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert texts[0] == "R 100 GMAC/s"
    assert texts[2].endswith("% of R")


def test_a_far_peak_does_not_flatten_the_bars(kernel: Callable[..., Any], machine: Any) -> None:
    rows = [kernel("slow", 5000.0, bytes=10_000_000)]
    (axes,) = waterline_figure({"a": {"runtime": "r", "rows": rows}}, {"r": machine}).axes
    assert axes.get_ylim()[1] < 2
    assert axes.texts[0].get_text() == "R 100 GMAC/s, above the panel"


def test_edges(edge: Tables, machine: Any) -> None:
    rows = edge["float32"]["rows"]
    if not any(row["macs"] for row in rows):
        with pytest.raises(UsageError, match="no waterline to draw"):
            waterline_figure(edge, {"onnxruntime": machine})
        return
    figure = waterline_figure(edge, {"onnxruntime": machine})
    (axes,) = figure.axes
    assert len(axes.containers[0]) == len(rows)
    words = " ".join(text.get_text().replace("\n", " ") for text in figure.texts)
    unknown = sum(row["bytes"] is None for row in rows)
    assert ("of unknown bytes" in words) == bool(unknown)
