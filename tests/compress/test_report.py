from __future__ import annotations

import dataclasses
import io
import itertools
import json
import math
from typing import Any
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from compress.report import SCHEMA_VERSION, Candidate, Report
from compress.report.markdown import table
from compress.report.plots import bar_chart_svg
from compress.report.table import drop, fidelity, float_sites, interval, score, size, speedup
from compress.report.terminal import render

TIMING = {"p50_ms": 1.834, "low_ms": 1.8, "high_ms": 1.86}
RATIO = {"value": 2.06, "low": 2.01, "high": 2.11, "verdict": "faster"}
FIDELITY = {
    "samples": 20,
    "source": "calibration data",
    "top1_agreement": 0.95,
    "cosine": 0.999,
    "sqnr_db": 32.1,
    "max_abs_difference": 0.0123,
}


def row(name: str, macs: int, precision: str, reason: str = "") -> dict[str, Any]:
    return {
        "name": name,
        "op_type": "Conv",
        "macs": macs,
        "parameters": 1,
        "precision": precision,
        "reason": reason,
    }


def variant(name: str, runtime: str, precision: str, **changes: Any) -> dict[str, Any]:
    values = {
        "name": name,
        "runtime": runtime,
        "precision": precision,
        "settings": {"threads": 1, "layout": None},
        "speedup": RATIO,
        "p50_ms": 0.89,
        "float_sites": 0,
        "failure": "",
    }
    return {**values, **changes}


def region(name: str, precision: str, int8_us: float, float_us: float) -> dict[str, Any]:
    return {
        "name": name,
        "sites": 3,
        "macs": 2_500_000,
        "precision": precision,
        "predicted_us": {"int8": int8_us, "float32": float_us},
    }


TRIED = (
    variant("float32", "onnxruntime", "float32", p50_ms=1.834),
    variant("openvino int8", "openvino", "int8"),
    variant("openvino mixed", "openvino", "mixed", float_sites=7),
    variant(
        "openvino bfloat16", "openvino", "bfloat16", speedup=None, p50_ms=None,
        failure="It is\nrefused.",
    ),
)  # fmt: skip


def report(**changes: Any) -> Report:
    first = Candidate(name="float32", size_bytes=123_456, timing=TIMING)
    second = Candidate(
        name="int8", size_bytes=4_560_000, timing=TIMING, speedup=RATIO, fidelity=FIDELITY,
        runtime="onnxruntime", precision="int8", settings={"threads": 1, "layout": "plain"},
        score={"value": 0.913, "unit": "top-1", "n": 100},
        drop={"points": 0.5, "low": -0.1, "high": 1.1, "agreement": 0.99}, int8_macs=0.75,
    )  # fmt: skip
    values: dict[str, Any] = {
        "headline": ("int8 is faster.", "A | remark."),
        "met": True,
        "chosen": "int8",
        "budget": {"max_drop": "1%", "min_speedup": None},
        "candidates": (first, second),
        "sites": (row("a", 750, "int8"), row("b|c", 250, "float32", "kept")),
        "steps": ({"name": "quantize", "options": {}, "details": {"samples": 8, "map": {}}},),
        "latency": {
            "batch": 1,
            "objective": "latency",
            "requests": 1,
            "threads": 1,
            "rounds": 9,
            "sessions": 3,
            "seconds": 0.5,
            "notes": ["A note."],
        },
        "calibration": {},
        "evaluation": {},
        "model": {"name": "net", "source": "ONNX model", "sha256": "", "inputs": []},
        "target": {"name": "cpu"},
        "machine": {"cpu": "A CPU", "cores": 2, "features": ["avx2"], "fingerprint": "f"},
        "versions": {"torch": "2"},
        "created": "2025-01-01T00:00:00+00:00",
        "files": {"model.onnx": "abc"},
        "tried": TRIED,
    }
    return Report(**{**values, **changes})


def test_the_report_is_plain_json() -> None:
    values = json.loads(json.dumps(report().to_dict(), allow_nan=False))
    assert values["schema_version"] == SCHEMA_VERSION
    assert values["candidates"][1]["speedup"]["verdict"] == "faster"
    assert values["candidates"][1]["settings"] == {"threads": 1, "layout": "plain"}
    assert [one["name"] for one in values["tried"]] == [one["name"] for one in TRIED]
    assert set(values) == {field.name for field in dataclasses.fields(Report)}


def test_markdown_begins_with_what_matters() -> None:
    lines = report().markdown().splitlines()
    assert lines[0] == "# net on cpu: int8"
    assert lines[2] == "- int8 is faster."
    text = "\n".join(lines)
    for part in (
        "| int8 (artifact) | 1.83 ms [1.80, 1.86] | 2.06x [2.01, 2.11] faster | 4.56 MB | 91.30% |",
        "+0.50 points [-0.10, +1.10] | 75.0% |",
        "| float32 | 1.83 ms [1.80, 1.86] | 1 | 123.5 kB | not evaluated |",
        "| b\\|c | Conv | 25.00% | kept |",
        "1. `quantize`: samples 8",
        "Latency: batch 1, 1 threads, 9 interleaved rounds in 3 sessions and 0.5 s",
        "A note.",
        "sha256 none",
        "- command: Python API",
        "- file `model.onnx`: sha256 abc",
    ):
        assert part in text


def test_markdown_lists_what_was_tried() -> None:
    lines = report().markdown().splitlines()
    start = lines.index("## What was tried")
    assert lines[start + 4 : start + 8] == [
        "| float32 | 1 | 1.83 ms |  | threads 1 |",
        "| openvino int8 | 2.06x [2.01, 2.11] | 0.89 ms |  | threads 1 |",
        "| openvino mixed | 2.06x [2.01, 2.11] | 0.89 ms | 7 | threads 1 |",
        "| openvino bfloat16 | failed: It is |  |  |  |",
    ]


def test_markdown_has_a_table_of_regions_only_where_placements_were_searched() -> None:
    assert "## Regions" not in report().markdown()
    regions = (region("stem", "float32", 12.4, 9.6), region("stage|1", "int8", 20, 41.2))
    found = report(regions=regions, target={"name": "openvino"}).markdown().splitlines()
    start = found.index("## Regions (openvino)")
    assert "chosen by measuring whole models" in found[start + 2]
    assert found[start + 4 : start + 8] == [
        "| region | operators | MACs | int8, µs (predicted) | float32, µs (predicted) | runs |",
        "|---|---|---|---|---|---|",
        "| stem | 3 | 2.50 M | 12 | 10 | float32 |",
        "| stage\\|1 | 3 | 2.50 M | 20 | 41 | int8 |",
    ]


def test_markdown_says_that_throughput_was_measured() -> None:
    latency = {**report().latency, "objective": "throughput", "requests": 8, "batch": 4}
    text = report(latency=latency).markdown()
    assert "Time per request with 8 requests in each call (throughput): batch 4, 1 threads" in text
    assert "Latency: batch" not in text


@pytest.mark.parametrize(
    ("sites", "sentence"),
    [
        ((), "The model has no multiply-accumulates."),
        ((row("a", 2_000_000, "int8"), row("r", 0, "fused")), "All 2.0 M multiply-accumulates"),
    ],
    ids=["none", "all in int8"],
)
def test_sites_in_one_sentence(sites: tuple[dict[str, Any], ...], sentence: str) -> None:
    assert sentence in report(sites=sites).markdown()


def test_the_terminal_shows_the_same() -> None:
    stream = io.StringIO()
    sites = tuple(row(f"conv{index}", 100 + index, "float32", "kept") for index in range(10))
    render(report(sites=sites), Console(file=stream, width=200))
    text = stream.getvalue()
    assert text.startswith("int8 is faster.\nA | remark.\n")
    assert "int8 (artifact)" in text
    assert "top-1 agreement 95.00%" in text
    assert text.index("conv9") < text.index("conv8")
    assert "conv0" not in text
    assert "and 2 more, see report.md" in text


def test_the_terminal_shows_the_variants_that_are_no_candidates() -> None:
    stream = io.StringIO()
    names = ("int8", *(f"openvino mixed {index}" for index in range(10)))
    tried = (*TRIED, *(variant(name, "openvino", "mixed") for name in names))
    render(report(tried=tried), Console(file=stream, width=200))
    lines = stream.getvalue().splitlines()
    shown = [line.strip() for line in lines if line.startswith("  tried: ")]
    assert shown[:3] == [
        "tried: openvino int8: 2.06x [2.01, 2.11]",
        "tried: openvino mixed: 2.06x [2.01, 2.11]",
        "tried: openvino bfloat16: failed: It is",
    ]
    assert len(shown) == 8
    assert "  and 5 more, see report.md" in lines


def test_numbers_for_people() -> None:
    assert interval({"m": 0.0123, "l": 0.01, "h": 0.02}, "m", "l", "h", " ms") == (
        "0.0123 ms [0.0100, 0.0200]"
    )
    assert interval({"m": 412.4, "l": 400, "h": 420}, "m", "l", "h", " ms") == "412 ms [400, 420]"
    assert speedup(None) == "1"
    assert (size(999_999), size(1_000_000)) == ("1000.0 kB", "1.00 MB")
    assert score(None) == "not evaluated"
    assert score({"value": 12.3456789, "unit": "score", "n": None}) == "12.35"
    assert drop(None) == ""
    assert "SQNR infinite" in fidelity({**FIDELITY, "sqnr_db": None})
    assert "top-1" not in fidelity({**FIDELITY, "top1_agreement": None})


def test_only_multiply_accumulates_count_as_left_in_float() -> None:
    sites = (row("a", 1, "int8"), row("b", 1, "float32"), row("r", 0, "float32"))
    assert [one["name"] for one in float_sites(report(sites=sites))] == ["b"]


def test_a_table_escapes_its_own_sign() -> None:
    assert table(("a", "b"), [("x|y", "z")]) == ["| a | b |", "|---|---|", "| x\\|y | z |"]


def test_a_candidate_by_name() -> None:
    assert report().candidate("int8").int8_macs == 0.75


def sensitivity(count: int = 12, first: str = "kl") -> tuple[dict[str, Any], ...]:
    """Operators op0, op1, ... that suffer more and more, except for op3, which suffers most."""
    rows = []
    for index in range(count):
        for form, factor in (("int8", 1e-3), ("int4", 1.0)):
            value = factor * (1 + index if index != 3 else 2.5 * count)
            figures = {"mse": value / 100, "sqnr": 20 - 10 * math.log10(value), "kl": value}
            metrics = {first: figures[first], **figures}
            rows.append({"name": f"op{index}", "format": form, "metrics": metrics})
    return tuple(rows)


def test_markdown_shows_the_ten_most_sensitive_operators() -> None:
    assert "## Sensitivity" not in report().markdown()
    lines = report(sensitivity=sensitivity()).markdown().splitlines()
    start = lines.index("## Sensitivity")
    assert "the 10 most sensitive of 12 operators" in lines[start + 2]
    assert "kl: KL divergence" in lines[start + 2]
    assert lines[start + 4 : start + 8] == [
        "| operator | int8 | int4 |",
        "|---|---|---|",
        "| op3 | 0.03 | 30 |",
        "| op11 | 0.012 | 12 |",
    ]
    assert lines[start + 15 : start + 18] == [
        "| op2 | 0.003 | 3 |",
        "",
        "![sensitivity](sensitivity.svg)",
    ]


def test_sensitivities_in_decibels_are_ranked_by_their_error() -> None:
    text = report(sensitivity=sensitivity(4, first="sqnr")).markdown()
    assert "all 4 operators. mse: power of the outputs' error" in text
    assert text.index("| op3 | 0.0001 | 0.1 |") < text.index("| op2 | 3e-05 | 0.03 |")


def test_the_terminal_shows_the_most_sensitive_operators() -> None:
    rows = tuple({**row, "name": f"[b]{row['name']}"} for row in sensitivity())
    stream = io.StringIO()
    render(report(sensitivity=rows), Console(file=stream, width=200))
    text = stream.getvalue()
    assert "Sensitivity. One operator quantized" in text
    assert text.index("[b]op3 ") < text.index("[b]op11 ") < text.index("[b]op2 ")
    assert "[b]op1 " not in text
    stream = io.StringIO()
    render(report(), Console(file=stream, width=200))
    assert "Sensitivity" not in stream.getvalue()


SVG = "{http://www.w3.org/2000/svg}"


def bars(svg: str) -> list[float]:
    return [float(bar.attrib["width"]) for bar in ElementTree.fromstring(svg).iter(f"{SVG}rect")]


def texts(svg: str) -> list[str]:
    return [text.text or "" for text in ElementTree.fromstring(svg).iter(f"{SVG}text")]


def test_a_report_has_a_plot_of_the_format_that_costs_most() -> None:
    assert report().plots() == {}
    plots = report(sensitivity=sensitivity()).plots()
    assert list(plots) == ["sensitivity.svg"]
    svg = plots["sensitivity.svg"]
    words = texts(svg)
    assert words[0] == "Sensitivity to int4, one operator at a time: kl"
    assert words[1:5] == ["op3", "30 nats", "op11", "12 nats"]
    assert len(bars(svg)) == 12


def test_a_plot_of_many_operators_shows_the_most_sensitive() -> None:
    words = texts(report(sensitivity=sensitivity(90)).plots()["sensitivity.svg"])
    assert len(words) == 1 + 2 * 60
    assert "op89" in words
    assert "op20" not in words


def test_a_steep_plot_is_logarithmic() -> None:
    steep = tuple(
        {**row, "metrics": {"kl": 10.0 ** -int(row["name"][2:])}} for row in sensitivity(7)
    )
    svg = report(sensitivity=steep).plots()["sensitivity.svg"]
    assert "(logarithmic)" in texts(svg)[0]
    lengths = bars(svg)
    steps = [a - b for a, b in itertools.pairwise(lengths)]
    assert steps == pytest.approx([steps[0]] * 6, abs=0.2)
    assert min(steps) > 0
    assert lengths[-1] == pytest.approx(lengths[0] / 10, abs=0.2)


@pytest.mark.parametrize("log", [False, True])
@given(
    st.lists(st.tuples(st.text(max_size=60), st.floats(-1e6, 1e6)), max_size=12),
    st.text(max_size=5),
)
@settings(max_examples=60)
def test_bars_are_as_long_as_their_values_are_large(
    log: bool, rows: list[tuple[str, float]], unit: str
) -> None:
    svg = bar_chart_svg("<A & B>", rows, unit, log=log)
    lengths = bars(svg)
    assert len(lengths) == len(rows)
    assert lengths == sorted(lengths, reverse=True)
    assert all(0 <= length <= 700 for length in lengths)
    assert texts(svg)[0].startswith("<A & B>")
    values = sorted((value for _, value in rows), reverse=True)
    for value, length in zip(values, lengths, strict=True):
        assert (length > 0) <= (value > 0)
        if not log and value > 0:
            assert length == pytest.approx(value / values[0] * lengths[0], abs=0.1)


def test_long_labels_lose_their_middle() -> None:
    svg = bar_chart_svg("title", [("a" * 50 + "\x00" + "b" * 50, 1.0)], "")
    assert texts(svg)[1] == "a" * 21 + "…" + "b" * 21
    assert texts(bar_chart_svg("title", [("a\x00b", 1.0)], ""))[1] == "a?b"
