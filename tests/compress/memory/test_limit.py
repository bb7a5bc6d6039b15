"""--max-memory: what it accepts, and what a run does where nothing, or only int8, fits."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from compress.errors import UsageError
from compress.memory.limit import memory_facts, parse_memory, show_memory
from compress.testing import tiny_exported
from targets.onnxruntime import OnnxRuntime

QUICK = ("--target", "onnxruntime", "--time", 0, "--seconds", 0.5, "--threads", 1)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("320kB", 320_000),
        ("320 KiB", 327_680),
        ("2MiB", 2 * 1024**2),
        ("1.5MB", 1_500_000),
        ("2gb", 2 * 1000**3),
        ("512B", 512),
        (4096, 4096),
    ],
    ids=str,
)
def test_amounts_of_memory(text: str | int, size: int) -> None:
    assert parse_memory(text) == size


@pytest.mark.parametrize(
    "text", ["9", "kB", "-1kB", "0MB", "3 apples", "1TB", 0, -5, True], ids=str
)
def test_what_is_no_amount_of_memory_is_refused(text: Any) -> None:
    with pytest.raises(UsageError, match="is no amount of memory"):
        parse_memory(text)


def test_bytes_for_people() -> None:
    assert [show_memory(n) for n in (12, 320_000, 1_505_280)] == ["12 B", "320 kB", "1.51 MB"]


def test_facts_of_an_engine_name_the_operator_and_scale_with_the_batch() -> None:
    engine = OnnxRuntime(threads=1).build(tiny_exported(21))
    one, four = memory_facts(engine), memory_facts(engine, batch=4)
    # A few bytes are of arithmetic on the batch size, which does not grow.
    assert four["bytes"] == pytest.approx(4 * one["bytes"], abs=64)
    assert one["op_type"] == "Conv"
    assert one["fits"] is None
    assert memory_facts(engine, limit=one["bytes"])["fits"] is True
    assert memory_facts(engine, limit=one["bytes"] - 1)["fits"] is False
    assert memory_facts(object())["how"] == "not known for this runtime"  # type: ignore[arg-type]


def test_where_nothing_fits_the_run_says_so_first_and_what_patches_reach(
    cli: Callable[..., Any], tiny_onnx: Path, tiny_images: Path, tmp_path: Path
) -> None:
    out = tmp_path / "artifact"
    given = ("run", tiny_onnx, "--calibration", tiny_images, "--out", out, *QUICK)
    result = cli(*given, "--max-memory", "100B", "--json")
    assert result.code == 1
    report = json.loads(result.out)["report"]
    assert report["headline"][0].startswith("Budget not met: nothing that is allowed fits into")
    assert report["headline"][1].startswith("Analysis, not executed: no split")
    assert report["chosen"] == "float32"
    assert report["budget"]["max_memory"] == 100
    assert not any(one["memory"]["fits"] for one in report["candidates"])
    assert "too much" in (out / "report.md").read_text()


def test_where_only_int8_fits_it_is_the_artifact(
    cli: Callable[..., Any], tiny_onnx: Path, tiny_images: Path, tmp_path: Path
) -> None:
    # The image has 768 bytes, what the convolution writes 2048 in float32 and 512 in int8.
    out = tmp_path / "artifact"
    given = ("run", tiny_onnx, "--calibration", tiny_images, "--out", out, *QUICK)
    result = cli(*given, "--max-memory", "2kB", "--json")
    assert result.code == 0
    report = json.loads(result.out)["report"]
    chosen = next(c for c in report["candidates"] if c["name"] == report["chosen"])
    assert chosen["precision"] == "int8"
    assert chosen["memory"]["bytes"] <= 2000 < report["candidates"][0]["memory"]["bytes"]
    assert "it is the fastest whose activations fit into 2 kB" in report["headline"][0]


def test_a_target_that_is_built_elsewhere_refuses_the_limit(
    cli: Callable[..., Any], tiny_onnx: Path
) -> None:
    result = cli("run", tiny_onnx, "--target", "tensorrt", "--max-memory", "1MB")
    assert result.code == 2
    assert "--max-memory 1MB cannot be checked for tensorrt" in result.err


def test_inspect_shows_the_peak_and_patches(cli: Callable[..., Any], tiny_onnx: Path) -> None:
    text = cli("inspect", tiny_onnx, "--patches")
    assert "Activations in float32: at most 2.75 KiB alive at once, at conv (Conv)" in text.out
    assert "Activations in int8 (estimated): at most 704 B" in text.out
    assert "2 along each axis" in text.out
    found = json.loads(cli("inspect", tiny_onnx, "--patches", "--json").out)
    assert found["memory"]["float32"]["peak"]["bytes"] == 768 + 2048
    assert found["memory"]["int8"]["best_is_exact"]
    assert [row["split"] for row in found["patches"]["rows"]] == [2, 3, 4]
