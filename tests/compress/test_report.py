from __future__ import annotations

import dataclasses
import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from compress.kernel_peaks import read_peaks, waterlines
from compress.report import SCHEMA_VERSION, Candidate, Report
from compress.report.markdown import table
from compress.report.plots import add_plots, gap_rows, plot_source
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
        "| int8 (artifact) | 1.83 ms [1.80, 1.86] | 2.06x [2.01, 2.11] faster | 4.56 MB |",
        "| 4.56 MB |  | 91.30% |",
        "+0.50 points [-0.10, +1.10] | 75.0% |",
        "| float32 | 1.83 ms [1.80, 1.86] | 1 | 123.5 kB |  | not evaluated |",
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
    assert lines[start + 15] == "| op2 | 0.003 | 3 |"


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


def kernel_table(precision: str, us: float) -> dict[str, Any]:
    rows = [
        {
            "kernel": name, "op_type": "Conv", "precision": precision, "site": name, "backend": "",
            "fused": "", "p50_us": us, "share": 0.5, "macs": 500, "gmacs_per_second": 0.0,
            "bytes": 100, "inputs": [], "weights": [], "outputs": [],
        }
        for name in ("a", "b")
    ]  # fmt: skip
    return {"runtime": "onnxruntime", "rows": rows}


PEAKS = {
    "gmacs_per_second": {"float32": 100.0, "int8": 400.0},
    "bandwidth_gb_s": 10.0,
    "threads": 1,
    "source": "measured",
    "place": {
        "fingerprint": "f", "cpu": "A CPU", "target": "onnxruntime", "options": "{}", "threads": 1,
        "versions": {},
    },
}  # fmt: skip


def timed(**changes: Any) -> Report:
    """A report with kernels and peaks."""
    first, second = report().candidates
    first = dataclasses.replace(first, score={"value": 0.92, "unit": "top-1", "n": 100})
    tables = {"float32": kernel_table("float32", 9.0), "int8": kernel_table("int8", 4.0)}
    values: dict[str, Any] = {
        "kernels": tables,
        "peaks": {"onnxruntime": PEAKS},
        "waterlines": waterlines(tables, read_peaks({"onnxruntime": PEAKS})),
        "candidates": (first, second),
        "sensitivity": sensitivity(),
    }
    return report(**{**values, **changes})


def test_plots_lie_beside_the_report_that_shows_them(tmp_path: Path) -> None:
    assert add_plots(report(), tmp_path) == report()
    assert list(tmp_path.iterdir()) == []
    made = add_plots(timed(), tmp_path)
    kinds = ["kernels", "roofline", "waterline", "gap", "sensitivity"]
    assert made.plots == {kind: f"{kind}.png" for kind in kinds}
    assert made.unplotted == {}
    assert {path.name for path in tmp_path.iterdir()} == set(made.plots.values())
    text = made.markdown()
    assert all(f"![{kind}]({kind}.png)" in text for kind in kinds)
    assert "| float32 | 100 GMAC/s | 50 GMAC/s | 0.0556 GMAC/s | 0% | 100% |" in text
    assert Report.from_dict(json.loads(json.dumps(made.to_dict()))).plots == made.plots


def test_the_plot_of_sensitivities_shows_the_format_that_costs_most() -> None:
    source = plot_source(report(sensitivity=sensitivity()))
    assert source.sensitivity_words == ("int4", "kl", "nats")
    assert source.sensitivity[:2] == [("op3", 30.0), ("op11", 12.0)]
    numbers = tuple({**row, "format": row["format"][3:]} for row in sensitivity())
    assert plot_source(report(sensitivity=numbers)).sensitivity_words[0] == "4 bits"


def test_rows_of_the_efficiency_gap() -> None:
    first, second = gap_rows(timed())
    assert first == {
        "family": "net", "name": "float32", "accuracy": 0.92, "latency_ms": 1.834,
        "macs": {"float32": 1000},
    }  # fmt: skip
    assert second["macs"] == {"int8": 750, "float32": 250}
    several = gap_rows(timed(), model="small")
    assert [(row["family"], row["name"]) for row in several] == [
        ("float32", "small"), ("int8", "small"),
    ]  # fmt: skip
    # Kernels that ran a batch of 8 samples multiplied 8 times as much.
    table = kernel_table("float32", 9.0)
    table["rows"] = [{**row, "macs": 8 * row["macs"]} for row in table["rows"]]
    assert gap_rows(timed(kernels={"float32": table}))[0]["macs"] == {"float32": 8000}


def test_settings_of_the_runtime_stay_out_of_plots() -> None:
    tables = timed().kernels
    named = {"float32": tables["float32"], "openvino int8, pinned=False": tables["int8"]}
    assert list(plot_source(timed(kernels=named)).tables) == ["float32", "openvino int8"]
    alike = {f"int8, arena={value}": tables["int8"] for value in (True, False)}
    assert list(plot_source(timed(kernels=alike)).tables) == list(alike)
    silent = timed(kernels={"float32": tables["float32"]}, chosen="executorch int8, x=1")
    assert plot_source(silent).untimed == ("executorch int8",)


def test_latencies_of_other_devices_are_not_put_under_peaks_of_this_one() -> None:
    assert "gap" in plot_source(timed()).kinds()
    assert "gap" not in plot_source(timed(devices=({"device": "phone"},))).kinds()


def test_what_cannot_be_drawn_is_said(tmp_path: Path) -> None:
    table = kernel_table("float32", math.nan)
    made = add_plots(timed(kernels={"float32": table}), tmp_path)
    assert "kernels" not in made.plots
    assert "sensitivity" in made.plots
    assert "The plot of kernels could not be drawn: p50_us of kernel a is nan" in made.markdown()
    made = add_plots(timed(peaks={"onnxruntime": {}}), tmp_path)
    assert made.plots == {}
    assert "The plots could not be drawn: 'gmacs_per_second'" in made.markdown()
