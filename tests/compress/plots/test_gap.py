from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from compress.errors import UsageError
from compress.plots.gap import gap_figure, gap_points
from compress.plots.style import FAMILIES, PALETTE, legend_texts

ROWS = [
    {"family": "resnet", "name": "small", "accuracy": 0.8, "macs": 1e8, "latency_ms": 4.0},
    {"family": "resnet", "name": "large", "accuracy": 0.9, "macs": 4e8, "latency_ms": 8.0},
    {
        "family": "mobile", "name": "net", "accuracy": 0.85, "latency_ms": 2.0,
        "macs": {"float32": 1e7, "int8": 4e7},
    },
]  # fmt: skip


def test_ideal_latency_is_the_work_over_the_peak(machine: Any) -> None:
    points = gap_points(ROWS, machine)
    assert [point.ideal_ms for point in points] == pytest.approx([1.0, 4.0, 0.2])
    assert [point.efficiency for point in points] == pytest.approx([0.25, 0.5, 0.1])
    narrow = gap_points([{**ROWS[0], "precision": "int8"}], machine)
    assert narrow[0].ideal_ms == pytest.approx(0.25)


def test_two_curves_for_each_family(machine: Any) -> None:
    figure = gap_figure(gap_points(ROWS, machine))
    (axes,) = figure.axes
    assert axes.get_xscale() == "log"
    lines = [np.asarray(line.get_xydata()).tolist() for line in axes.lines]
    assert [[1.0, 0.8], [4.0, 0.9]] in lines
    assert [[4.0, 0.8], [8.0, 0.9]] in lines
    assert [[0.2, 0.85]] in [
        [[pytest.approx(x), y] for x, y in line] for line in lines if len(line) == 1
    ]
    texts = {text.get_text() for text in axes.texts}
    assert {"0.60 (4×)", "0.30 (2×)", "1.00 (10×)", "small", "large", "net"} <= texts
    assert legend_texts(figure) == ["ideal", "actual", "resnet", "mobile"]
    assert "10% to 50% of the arithmetic peak" in figure.get_suptitle()


@pytest.mark.parametrize(
    ("families", "colours"),
    [
        (("float32", "openvino int8"), (PALETTE["float32"], PALETTE["int8"])),
        (("a int8", "b int8"), FAMILIES[:2]),
    ],
    ids=["precisions", "others"],
)
def test_precisions_keep_their_colours(
    families: tuple[str, str], colours: tuple[str, str], machine: Any
) -> None:
    rows = [{**ROWS[index], "family": family} for index, family in enumerate(families)]
    (axes,) = gap_figure(gap_points(rows, machine)).axes
    solid = [line.get_color() for line in axes.lines if line.get_linestyle() == "-"]
    assert tuple(solid) == colours


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"accuracy": math.nan}, "accuracy of small is nan"),
        ({"latency_ms": 0.0}, "no time"),
        ({"macs": 0}, "no multiply-accumulates"),
        ({"macs": -1}, "macs of small is -1"),
        ({"latency_ms": "fast"}, "latency_ms of small is 'fast'"),
    ],
    ids=["accuracy", "time", "work", "negative", "text"],
)
def test_bad_rows(change: dict[str, Any], part: str, machine: Any) -> None:
    with pytest.raises(UsageError, match=part):
        gap_points([{**ROWS[0], **change}], machine)


def test_a_missing_field_is_named(machine: Any) -> None:
    with pytest.raises(UsageError, match="lacks 'macs'"):
        gap_points([{k: v for k, v in ROWS[0].items() if k != "macs"}], machine)
    with pytest.raises(UsageError, match="no model"):
        gap_figure([])
