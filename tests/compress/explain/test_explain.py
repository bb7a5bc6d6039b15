from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

import compress
from compress.errors import UsageError
from compress.exits import USAGE
from compress.explaining import Explanation
from compress.explaining.lines import Line
from compress.explaining.pair import find_original
from compress.explaining.widths import probe
from compress.graph import graph_sites
from compress.pipeline import run
from targets.onnxruntime import OnnxRuntime

Cli = Callable[..., Any]


@pytest.fixture(scope="module", autouse=True)
def _home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The caches belong to the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(tmp_path_factory.mktemp("home")))
        yield


@pytest.fixture(scope="module")
def artifact(tiny_onnx: Path, tiny_images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny network in int8 in ONNX Runtime, whatever is faster."""
    out = tmp_path_factory.mktemp("runs") / "artifact"
    done = run(
        tiny_onnx, target="onnxruntime", calibration=tiny_images, out=out, threads=1, seconds=0.5,
        search_seconds=0, min_speedup=0.01,
    )  # fmt: skip
    assert done.directory == out
    return out


def write(model: Any, path: Path) -> Path:
    ir.save(model.graph_model, path)
    return path


def adds_up(found: Explanation) -> bool:
    difference = found.after.latency_us - found.before.latency_us
    return math.isclose(
        sum(part.change_us for part in found.parts), difference, rel_tol=1e-9, abs_tol=1e-6
    )


@pytest.fixture(scope="module")
def blocked(onnx_model: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two convolutions and a Sigmoid, which stands before the last QuantizeLinear."""
    folder = tmp_path_factory.mktemp("blocked")
    weights = {"w": (16, 16, 3, 3), "v": (16, 16, 3, 3)}
    text = """g (float[1,16,16,16] x) => (float[1,16,16,16] y) {
        a = Conv<pads=[1,1,1,1]>(x, w)
        r = Relu(a)
        b = Conv<pads=[1,1,1,1]>(r, v)
        y = Sigmoid(b)
    }"""
    before = write(onnx_model(text, **weights), folder / "float.onnx")
    step = np.full(16, 0.01, np.float32)
    text = """g (float[1,16,16,16] x) => (float[1,16,16,16] y) {
        xq = QuantizeLinear(x, s, z)
        xd = DequantizeLinear(xq, s, z)
        wd = DequantizeLinear<axis=0>(w, ws, wz)
        a = Conv<pads=[1,1,1,1]>(xd, wd)
        r = Relu(a)
        rq = QuantizeLinear(r, s, z)
        rd = DequantizeLinear(rq, s, z)
        vd = DequantizeLinear<axis=0>(v, ws, wz)
        b = Conv<pads=[1,1,1,1]>(rd, vd)
        c = Sigmoid(b)
        yq = QuantizeLinear(c, s, z)
        y = DequantizeLinear(yq, s, z)
    }"""
    int8 = np.ones((16, 16, 3, 3), np.int8)
    model = onnx_model(
        text, w=int8, v=int8, ws=step, wz=np.zeros(16, np.int8), s=np.float32(0.05),
        z=np.uint8(0),
    )  # fmt: skip
    return before, write(model, folder / "int8.onnx")


def test_a_pair_of_files_with_unfused_q_dq(blocked: tuple[Path, Path], cli: Cli) -> None:
    before, after = blocked
    arguments = ("--against", before, "--threads", 1, "--seconds", 0.3, "--quick")
    result = cli("explain", after, *arguments, "--json")
    assert result.code == 0
    found = json.loads(result.out)
    unfused = [line for line in found["lines"] if line["kind"] == "unfused"]
    reasons = {line["site"]: line["reason"] for line in unfused if line["macs"]}
    assert list(reasons.values()) == ["Sigmoid stands between it and its QuantizeLinear"]
    precisions = {line["site"]: line["after"] for line in found["lines"] if line["macs"]}
    assert sorted(precisions.values()) == ["float32", "int8"]
    difference = found["after"]["latency_us"] - found["before"]["latency_us"]
    assert sum(p["change_us"] for p in found["parts"]) == pytest.approx(difference)
    assert "measured now" in found["measured"]


def test_markdown_and_terminal(blocked: tuple[Path, Path], cli: Cli, tmp_path: Path) -> None:
    before, after = blocked
    page = tmp_path / "why.md"
    arguments = ("--against", before, "--threads", 1, "--seconds", 0.3, "--quick")
    result = cli("explain", after, *arguments, "--markdown", page)
    assert result.code == 0
    assert "share of the difference" in result.out
    assert f"Written to {page}" in result.out
    text = page.read_text()
    assert text.startswith("# Why int8.onnx is as fast as it is")
    assert "## Kernels" in text
    assert list(tmp_path.iterdir()) == [page]
    result = cli("explain", after, *arguments, "--markdown", tmp_path / "no" / "why.md")
    assert result.code == USAGE
    assert "cannot be written" in result.err


def test_a_model_beside_itself(tiny_onnx: Path) -> None:
    found = compress.explain(tiny_onnx, against=tiny_onnx, threads=1, seconds=0.3, quick=True)
    assert adds_up(found)
    assert found.before.name != found.after.name
    assert {line.kind for line in found.lines} <= {"float", "move"}
    assert not [f for f in found.findings if f.kind in ("unfused", "slower", "conversions")]


def test_an_artifact_finds_its_original(artifact: Path, tiny_onnx: Path, tmp_path: Path) -> None:
    report = json.loads((artifact / "report.json").read_text())
    assert find_original(artifact, report) is None  # the API leaves no command
    report["command"] = f"compress run {tiny_onnx} --calibration 'some images.npz'"
    assert find_original(artifact, report) == tiny_onnx
    # By its hash: another file of that name is not it.
    moved = tmp_path / "other.onnx"
    moved.write_bytes(b"other")
    report["command"] = f"compress run {moved}"
    assert find_original(artifact, report) is None
    report["command"] = "compress run 'unclosed"
    assert find_original(artifact, report) is None


def test_an_artifact_with_its_original(artifact: Path, tiny_onnx: Path) -> None:
    found = compress.explain(artifact, against=tiny_onnx, seconds=0.3, quick=True)
    assert adds_up(found)
    assert found.after.runtime == found.before.runtime == "onnxruntime"
    assert {line.site for line in found.lines if line.macs} == {"conv", "fc"}
    assert "1 thread" in found.measured


def test_an_artifact_without_its_original(artifact: Path) -> None:
    found = compress.explain(artifact)
    assert adds_up(found)
    report = json.loads((artifact / "report.json").read_text())
    assert report["created"] in found.measured
    assert "the original is not at hand" in found.measured
    assert found.before.latency_us == report["candidates"][0]["timing"]["p50_ms"] * 1e3


def test_an_artifact_that_is_the_original(
    tiny_onnx: Path, tiny_images: Path, tmp_path: Path, cli: Cli
) -> None:
    out = tmp_path / "artifact"
    arguments = ("--calibration", tiny_images, "--out", out, "--target", "onnxruntime",
                 "--threads", 1, "--time", 0, "--seconds", 0.5, "--min-speedup", 900)  # fmt: skip
    result = cli("run", tiny_onnx, *arguments)
    assert f"Why it is not faster: compress explain {out}" in result.out
    report = json.loads((out / "report.json").read_text())
    if report["chosen"] != "float32":
        pytest.skip("int8 was faster on this machine, and a missed budget keeps it")
    found = compress.explain(out)
    assert adds_up(found)
    assert "The artifact is the original as it came in" in found.notes[0]
    assert found.after.name != "float32"


def test_what_cannot_be_explained(
    artifact: Path, tiny_onnx: Path, onnx_model: Any, cli: Cli, tmp_path: Path
) -> None:
    result = cli("explain", tiny_onnx)
    assert result.code == USAGE
    assert "--against MODEL" in result.err
    text = "g (float[1,3,4,4] z) => (float[1,3,4,4] y) { y = Relu(z) }"
    other = write(onnx_model(text), tmp_path / "other.onnx")
    result = cli("explain", artifact, "--against", other, "--seconds", 0.3)
    assert result.code == USAGE
    assert "only models with the same inputs can be compared" in result.err
    result = cli("explain", other, "--against", other, "--batch", 2, "--quick")
    assert result.code == USAGE
    assert "fixed batch" in result.err
    result = cli("explain", tmp_path / "nowhere.onnx", "--against", tiny_onnx)
    assert result.code == USAGE


def test_a_report_of_an_older_release(artifact: Path, tmp_path: Path) -> None:
    copy = tmp_path / "artifact"
    copy.mkdir()
    for file in artifact.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    report = json.loads((copy / "report.json").read_text())
    del report["kernels"]
    (copy / "report.json").write_text(json.dumps(report))
    with pytest.raises(UsageError, match="--against MODEL"):
        compress.explain(copy)


@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_a_width_is_timed_with_its_neighbours(onnx_model: Any, row: Any, precision: str) -> None:
    text = """g (float[1,8,6,6] x) => (float[1,10,6,6] y) {
        y = Conv<pads=[1,1,1,1], strides=[1,1]>(x, w)
    }"""
    [site] = graph_sites(onnx_model(text, w=(10, 8, 3, 3)).graph_model)
    line = Line("narrow", site.name, "Conv", 1, 1, (row("c", 1),), (row("c", 1, precision),))
    width = probe(line, site, "output", OnnxRuntime(threads=1), 0.05)
    assert list(width.times_us) == [8, 10, 16]
    assert all(us > 0 for us in width.times_us.values())
    assert (width.own, width.above) == (10, 16)
    assert width.macs[16] / width.macs[8] == 2
