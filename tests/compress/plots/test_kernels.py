from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from compress.errors import UsageError
from compress.plots.kernels import MOST, kernel_groups, kernels_figure
from compress.plots.style import PALETTE, legend_texts

Tables = dict[str, dict[str, Any]]


def bars(figure: Figure) -> list[tuple[float, float, str]]:
    """Left end, length and colour of every piece."""
    (axes,) = figure.axes
    pieces = [patch for container in axes.containers for patch in container]
    return [(p.get_x(), p.get_width(), to_hex(p.get_facecolor())) for p in pieces]


def labels(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.axes[0].get_yticklabels()]


def test_sites_are_in_order_of_execution(tables: Tables) -> None:
    groups, rest = kernel_groups(tables)
    # `late` comes after its predecessor in the second variant; what belongs to no site comes last.
    names = ["stem", "body", "late", "act", "head", "(Reorder)", "(QuantizeLinear)", "(LSTM)"]
    assert [group.label for group in groups] == names
    assert not rest.label
    stem = groups[0]
    assert stem.times == {
        "float32": {"float32": 40.0},
        "onnxruntime int8": {"int8": 15.0, "convert": 1.0},
    }
    assert groups[-1].times == {"onnxruntime int8": {"inserted": 6.0}}


def test_bars_have_the_length_of_their_times_and_the_colour_of_their_precision(
    tables: Tables,
) -> None:
    figure = kernels_figure(tables, "net")
    found = bars(figure)
    times = [row["p50_us"] for table in tables.values() for row in table["rows"]]
    assert sorted(length for _, length, _ in found) == pytest.approx(sorted(times))
    assert (0.0, 40.0, PALETTE["float32"]) in found
    assert (0.0, 15.0, PALETTE["int8"]) in found
    assert (15.0, 1.0, PALETTE["convert"]) in found  # stacked behind the site's own kernel
    assert (0.0, 6.0, PALETTE["inserted"]) in found
    assert legend_texts(figure) == [
        "float32", "int8", "conversion of numbers", "move (layout or shape)", "of no site",
    ]  # fmt: skip
    title = figure.get_suptitle()
    assert title == "net: time by site, in all float32 168 µs and onnxruntime int8 76 µs (2.21x)"


def test_small_sites_are_summed(many: Tables) -> None:
    groups, rest = kernel_groups(many)
    assert len(groups) == MOST
    assert [group.times["float32"]["float32"] for group in groups] == [471 + i for i in range(30)]
    assert rest.label == "470 more, together"
    assert rest.total("float32") == sum(range(1, 471))
    figure = kernels_figure(many)
    assert len(bars(figure)) == MOST
    assert labels(figure)[-1] == "470 more, together"
    assert "110.69 ms" not in figure.get_suptitle()
    assert "111 ms" in [text.get_text() for text in figure.axes[0].texts]
    assert all(len(label) <= 38 for label in labels(figure))
    assert len(set(labels(figure))) == MOST + 1  # shortened names still differ


def test_one_more_site_is_shown_and_not_summed(many: Tables) -> None:
    rows = many["float32"]["rows"][: MOST + 1]
    groups, rest = kernel_groups({"a": {"runtime": "r", "rows": rows}})
    assert len(groups) == MOST + 1
    assert not rest.times


def test_what_runtimes_insert_is_shown_however_short(
    many: Tables, kernel: Callable[..., dict[str, Any]]
) -> None:
    inserted = kernel("", 0.1, "convert", op_type="Cast", macs=0)
    rows = [*many["float32"]["rows"], inserted]
    groups, _ = kernel_groups({"a": {"runtime": "r", "rows": rows}})
    assert groups[-1].label == "(Cast)"
    assert len(groups) == MOST


def test_a_silent_runtime_is_named(tables: Tables) -> None:
    figure = kernels_figure({"float32": tables["float32"]}, "net", ("executorch int8",))
    texts = " ".join(text.get_text().replace("\n", " ") for text in figure.texts)
    assert "The runtime of executorch int8 tells no times" in texts
    assert "from top to bottom" not in texts


@pytest.mark.parametrize("value", [math.nan, math.inf, -1.0, "3", True], ids=str)
def test_what_is_no_time_is_refused(value: object, kernel: Callable[..., Any]) -> None:
    with pytest.raises(UsageError, match="p50_us of kernel a is"):
        kernels_figure({"a": {"runtime": "r", "rows": [kernel("a", value)]}})


def test_nothing_is_refused() -> None:
    with pytest.raises(UsageError, match="no kernels"):
        kernels_figure({"a": {"runtime": "r", "rows": []}})
