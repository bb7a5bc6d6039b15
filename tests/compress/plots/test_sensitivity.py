from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.axes import Axes

from compress.errors import UsageError
from compress.plots.sensitivity import MOST, sensitivity_figure


def lengths(axes: Axes) -> list[float]:
    """Of the bars, as shares of the axis."""
    transform = axes.transLimits
    bars = axes.containers[0]
    ends = [(p.get_x(), p.get_x() + p.get_width()) for p in bars]
    scale = axes.transScale
    points = [[transform.transform(scale.transform((x, 0)))[0] for x in pair] for pair in ends]
    return [float(right - left) for left, right in points]


def test_the_most_sensitive_operators_come_first() -> None:
    rows = [(f"op{index}", float(index)) for index in range(90)]
    figure = sensitivity_figure(rows, form="int4", metric="kl", unit="nats")
    (axes,) = figure.axes
    assert [p.get_width() for p in axes.containers[0]] == [float(89 - i) for i in range(MOST)]
    names = [text.get_text() for text in axes.get_yticklabels()]
    assert names[:2] == ["op89", "op88"]
    assert len(names) == MOST
    assert axes.texts[0].get_text() == "89 nats"
    assert figure.get_suptitle() == "Sensitivity to int4, one operator at a time: kl"
    assert axes.get_xlabel() == "kl, nats"


def test_a_steep_plot_is_logarithmic() -> None:
    rows = [(f"op{index}", 10.0**-index) for index in range(7)]
    (axes,) = sensitivity_figure(rows, form="int8", metric="kl").axes
    assert axes.get_xscale() == "log"
    found = lengths(axes)
    steps = [a - b for a, b in pairwise(found)]
    assert steps == pytest.approx([steps[0]] * 6)
    assert min(*steps, found[-1]) > 0.01  # the smallest bar can be seen


@given(st.lists(st.tuples(st.text(max_size=60), st.floats(-1e6, 1e6)), min_size=1, max_size=12))
@settings(max_examples=25)
def test_longer_bars_are_larger_values(rows: list[tuple[str, float]]) -> None:
    (axes,) = sensitivity_figure(rows, form="int8", metric="mse").axes
    found = lengths(axes)
    values = sorted((value for _, value in rows), reverse=True)
    assert len(found) == len(rows)
    assert found == sorted(found, reverse=True)
    assert all(0 <= length <= 1 for length in found)
    if axes.get_xscale() == "linear":
        assert [p.get_width() for p in axes.containers[0]] == [max(v, 0.0) for v in values]


def test_bad_values() -> None:
    with pytest.raises(UsageError, match="no sensitivities"):
        sensitivity_figure([], form="int8", metric="kl")
    with pytest.raises(UsageError, match="sensitivity of a is nan"):
        sensitivity_figure([("a", math.nan)], form="int8", metric="kl")
