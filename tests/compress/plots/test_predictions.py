from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from compress.errors import UsageError
from compress.plots.predictions import prediction_errors, predictions_figure
from compress.plots.style import legend_texts

LATENCIES = st.lists(st.floats(0.01, 1000), min_size=1, max_size=20)


def row(name: str, measured: Any, predicted: Any, source: str = "table") -> dict[str, Any]:
    return {"name": name, "measured_ms": measured, "predicted_ms": predicted, "source": source}


ROWS = [
    row("a", 1.0, 1.05), row("b", 2.0, 2.4), row("c", 4.0, 3.6),
    row("a", 1.0, 0.5, "roofline"), row("b", 2.0, 1.0, "roofline"),
]  # fmt: skip


def test_errors_by_hand() -> None:
    found = prediction_errors([1.0, 2.0, 4.0], [1.05, 2.4, 3.6])
    assert found.n == 3
    assert found.within == pytest.approx(2 / 3)  # 3.6 for 4 lies on the edge
    assert found.mape == pytest.approx((0.05 + 0.2 + 0.1) / 3)
    assert found.spearman == pytest.approx(1.0)
    assert prediction_errors([1.0, 2.0], [2.0, 1.0]).spearman == pytest.approx(-1.0)
    assert prediction_errors([1.0], [2.0]).spearman is None
    assert prediction_errors([1.0, 1.0], [2.0, 1.0]).spearman is None


@given(LATENCIES, st.floats(0.5, 2))
def test_a_constant_factor_changes_the_error_and_not_the_ranks(
    measured: list[float], factor: float
) -> None:
    found = prediction_errors(measured, [value * factor for value in measured])
    assert found.mape == pytest.approx(abs(factor - 1), abs=1e-9)
    assert found.spearman is None or found.spearman == pytest.approx(1.0)


def test_points_band_and_legend() -> None:
    figure = predictions_figure(ROWS)
    (axes,) = figure.axes
    points = {one.get_label(): np.asarray(one.get_offsets()) for one in axes.collections}
    assert points["source table"].tolist() == [[1.0, 1.05], [2.0, 2.4], [4.0, 3.6]]
    assert points["source roofline"].tolist() == [[1.0, 0.5], [2.0, 1.0]]
    (diagonal,) = axes.lines
    assert np.array_equal(*np.asarray(diagonal.get_xydata()).T)
    band = next(one for one in axes.collections if one.get_label() == "band")
    corners = {tuple(np.round(y / x, 6) for x, y in [corner]) for corner in
               band.get_paths()[0].vertices.tolist()}  # fmt: skip
    assert corners == {(0.9,), (1.1,)}
    assert legend_texts(figure) == [
        "table (n 3): 67% within 10%, MAPE 11.7%, ρ 1.00",
        "roofline (n 2): 0% within 10%, MAPE 50.0%, ρ 1.00",
    ]
    assert figure.get_suptitle().endswith("table is nearest, MAPE 11.7%")


@pytest.mark.parametrize(
    ("rows", "part"),
    [
        ([], "no predictions"),
        ([row("a", math.nan, 1.0)], "measured_ms of a is nan"),
        ([row("a", 1.0, 0.0)], "predicted_ms of a is 0"),
        ([row("a", 1.0, None)], "predicted_ms of a is None"),
        ([{"name": "a"}], "lacks 'source'"),
    ],
    ids=["none", "nan", "zero", "missing value", "missing field"],
)
def test_bad_rows(rows: list[dict[str, Any]], part: str) -> None:
    with pytest.raises(UsageError, match=part):
        predictions_figure(rows)


def test_pairs_are_pairs() -> None:
    with pytest.raises(UsageError, match="make no pairs"):
        prediction_errors([1.0], [])
