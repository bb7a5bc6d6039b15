from __future__ import annotations

import struct
import subprocess
import sys
import warnings
from typing import Any

import matplotlib
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.colors import to_rgb

from compress.plots import style
from compress.plots.source import KINDS, Source, draw_all

Tables = dict[str, dict[str, Any]]
ROWS = [{"name": "a", "measured_ms": 1.0, "predicted_ms": 1.1, "source": "table"}]
GAP = [{"family": "f", "name": "a", "accuracy": 0.5, "macs": 1e6, "latency_ms": 1.0}]


def size(data: bytes) -> tuple[int, int]:
    """Width and height in the header of a PNG."""
    assert data.startswith(b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR")
    return struct.unpack(">II", data[16:24])


def source(tables: Tables, machine: Any) -> Source:
    return Source(
        name="net",
        tables=tables,
        peaks={"onnxruntime": machine},
        gap=GAP,
        sensitivity=[("a", 1.0), ("b", 0.5)],
        sensitivity_words=("int8", "kl", "nats"),
        predictions=ROWS,
    )


@pytest.fixture(scope="module")
def files(tables: Tables, machine: Any) -> dict[str, bytes]:
    """Every plot of one source."""
    given_ = source(tables, machine)
    assert given_.kinds() == KINDS
    drawn = draw_all(given_)
    assert drawn.failures == {}
    return drawn.files


def test_every_kind_is_a_png_of_double_density(files: dict[str, bytes]) -> None:
    assert tuple(files) == KINDS
    for kind, data in files.items():
        width, height = size(data)
        assert width == (1360 if kind == "predictions" else 1600)
        assert 200 < height < 4000


def test_the_same_rows_give_the_same_bytes_without_a_date(
    tables: Tables, machine: Any, files: dict[str, bytes]
) -> None:
    assert draw_all(source(tables, machine)).files == files
    for data in files.values():
        for trace in (b"tEXt", b"iTXt", b"tIME", b"Matplotlib"):
            assert trace not in data


def test_edges_are_drawn_or_refused_and_never_warn(edge: Tables, machine: Any) -> None:
    given_ = Source(tables=edge, peaks={"onnxruntime": machine})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        drawn = draw_all(given_)
    assert "kernels" in drawn.files
    for text in drawn.failures.values():
        assert "--kind kernels" in text  # a sentence of ours, not a surprise


def test_a_kind_without_data_is_not_drawn(tables: Tables, machine: Any) -> None:
    assert Source().kinds() == ()
    assert Source(tables=tables).kinds() == ("kernels",)
    other = {"openvino": machine}
    assert Source(tables=tables, peaks=other, gap=GAP).kinds() == ("kernels", "gap")


def test_a_failure_is_a_sentence(
    tables: Tables, machine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", fail)
    drawn = draw_all(Source(tables=tables, peaks={"onnxruntime": machine}), ["kernels"])
    assert drawn.files == {}
    assert drawn.failures == {"kernels": "The plot of kernels could not be drawn: MemoryError"}


def test_nothing_global_is_changed(
    tables: Tables, machine: Any, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(matplotlib.rcParams, "font.size", 30.0)
    monkeypatch.setitem(matplotlib.rcParams, "axes.facecolor", "black")
    before = dict(matplotlib.rcParams)
    assert source(tables, machine).draw("gap") == files["gap"]
    assert dict(matplotlib.rcParams) == before


@pytest.mark.parametrize(
    ("code", "modules"),
    [
        ("import compress.plots", {"matplotlib", "scipy", "torch", "onnx"}),
        (
            "from compress.plots import png, sensitivity_figure\n"
            "png(sensitivity_figure([('a', 1.0)], form='int8', metric='kl'))",
            {"matplotlib.pyplot", "torch", "onnx"},
        ),
    ],
    ids=["import", "drawing"],
)
def test_nothing_is_imported_that_is_not_used(code: str, modules: set[str]) -> None:
    code = f"{code}\nimport sys; print({modules} & set(sys.modules))"
    command = [sys.executable, "-W", "error", "-c", code]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "set()"


def test_colours_stand_out_from_the_page() -> None:
    for name, one in style.PALETTE.items():
        r, g, b = to_rgb(one)
        assert 0.2126 * r + 0.7152 * g + 0.0722 * b < 0.72, name
    assert len(set(style.PALETTE.values())) == len(style.PALETTE)


@pytest.mark.parametrize(
    ("us", "text"),
    [(0, "0 µs"), (0.5, "500 ns"), (12.34, "12.3 µs"), (999.9, "1 ms"), (4116, "4.12 ms"),
     (2.5e6, "2.5 s"), (100, "100 µs")],
)  # fmt: skip
def test_times_for_people(us: float, text: str) -> None:
    assert style.microseconds(us) == text


def test_numbers_for_people() -> None:
    found = [style.plain(v) for v in (0.0, 1234.5, 100.0, 0.25, 1e-5, 2e7)]
    assert found == ["0", "1234", "100", "0.25", "1.00e-05", "2.00e+07"]


@given(st.lists(st.text(max_size=80), max_size=6), st.integers(12, 40))
def test_short_names_fit_and_can_be_drawn(names: list[str], longest: int) -> None:
    found = style.short_names(names, longest)
    assert set(found) == set(names)
    for short in found.values():
        assert len(short) <= longest
        assert style.printable(short) == short


def test_short_names_keep_what_tells_them_apart() -> None:
    names = [f"/model/encoder/encoder.{i}/reparam_conv/Conv" for i in range(3)]
    found = style.short_names(names, 26)
    assert list(found.values()) == [f"….{i}/reparam_conv/…" for i in range(3)] or len(
        set(found.values())
    ) == len(names)
    assert style.short_names(["a" * 50], 11) == {"a" * 50: "aaaaa…aaaaa"}
    assert style.shortened("conv1") == "conv1"
    assert style.printable("卷a\x00") == "\ufffda\ufffd"
