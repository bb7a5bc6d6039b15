"""`compress run` with several runtimes: what is tried, what becomes the artifact, what loads."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

import compress
from compress.artifact import sha256_file
from compress.errors import LoadError, UnsupportedError, UsageError
from compress.model import Arrays, Model
from compress.pipeline import RunResult
from compress.profiling import _profilers
from compress.registry import create_pass
from compress.report import SCHEMA_VERSION
from compress.settings import capable
from compress.testing import tiny_exported
from targets.cpu import CPU
from targets.executorch import ExecuTorch
from targets.onnxruntime import OnnxRuntime
from targets.openvino import OpenVINO

pytest.importorskip("openvino")

QUICK: dict[str, Any] = {"threads": 1, "search_seconds": 0, "seconds": 0.5}
RUNTIMES = {one.name for one in CPU().runtimes()}
"""ExecuTorch among them where it is installed."""
BODY = """
{
    [a] c = Conv<pads = [1, 1, 1, 1]>(x, w)
    [r] d = Relu(c)
    [b] e = Conv<pads = [1, 1, 1, 1]>(d, w2)
    [s] f = Relu(e)
    [p] p = GlobalAveragePool(f)
    [q] q = Flatten(p)
    [m] y = Gemm(q, v)
}
"""
WEIGHTS = {"w": (64, 32, 3, 3), "w2": (64, 64, 3, 3), "v": (64, 10)}
WITHOUT_EXTRAS = """
import sys
sys.modules["openvino"] = sys.modules["executorch"] = None
from compress.cli import main
main(sys.argv[1:])
"""


@pytest.fixture(scope="module", autouse=True)
def _home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The cache belongs to the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(tmp_path_factory.mktemp("home")))
        yield


def _network(onnx_model: Callable[..., Model], folder: Path, batch: str) -> Path:
    text = f"net (float[{batch}, 32, 16, 16] x) => (float[{batch}, 10] y) {BODY}"
    path = folder / f"net-{batch}.onnx"
    onnx.save(ir.to_proto(onnx_model(text, **WEIGHTS).graph_model), path)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def net(onnx_model: Callable[..., Model], folder: Path) -> Path:
    """A network that int8 makes clearly faster in either runtime."""
    return _network(onnx_model, folder, "batch")


@pytest.fixture(scope="module")
def x() -> np.ndarray:
    rng = np.random.default_rng(0)
    return rng.normal(size=(24, 32, 16, 16)).astype(np.float32)


@pytest.fixture(scope="module")
def pinned(net: Path, x: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    """A run for OpenVINO alone."""
    out = tmp_path_factory.mktemp("openvino") / "artifact"
    return compress.run(net, target="openvino", calibration=x, out=out, **QUICK)


@pytest.fixture(scope="module")
def chosen(net: Path, x: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    """A run that chooses the runtime, with some time to search."""
    out = tmp_path_factory.mktemp("cpu") / "artifact"
    quick = {**QUICK, "search_seconds": 2}
    return compress.run(net, target="cpu", calibration=x, out=out, **quick)


def _first(engine: compress.Engine, x: np.ndarray) -> np.ndarray:
    return engine({"x": x})["y"]


def test_an_artifact_for_openvino_holds_its_files(pinned: RunResult) -> None:
    assert pinned.report.target["name"] == pinned.report.target["asked"] == "openvino"
    names = {path.name for path in pinned.directory.iterdir()}
    assert {"model.xml", "model.bin", "recipe.yaml", "report.json", "report.md"} <= names
    assert "model.onnx" not in names
    drawn = set(pinned.report.plots.values())
    assert {"kernels.png", "roofline.png", "waterline.png"} <= drawn
    assert set(pinned.report.files) == names - {"report.json", "report.md"} - drawn
    for name, digest in pinned.report.files.items():
        assert sha256_file(pinned.directory / name) == digest


def test_it_runs_again_with_equal_outputs_at_any_batch(pinned: RunResult, x: np.ndarray) -> None:
    engine, again = compress.load(pinned.directory), compress.load(pinned.directory, threads=1)
    assert engine.name.startswith("OpenVINO")
    for batch in (1, 5):
        np.testing.assert_array_equal(_first(engine, x[:batch]), _first(again, x[:batch]))
    (kernels,) = {k.precision for k in engine.kernels() if k.site == "b"}
    (candidate,) = [one for one in pinned.report.candidates if one.name == pinned.report.chosen]
    assert kernels == candidate.precision


def test_its_outputs_are_close_to_the_original(pinned: RunResult, net: Path, x: np.ndarray) -> None:
    original = compress.artifact.open_engine(net, target="onnxruntime", threads=1)
    expected, got = _first(original, x), _first(compress.load(pinned.directory), x)
    assert 0 < np.abs(got - expected).max() < 0.2 * np.abs(expected).max()


@pytest.mark.parametrize("name", ["model.xml", "model.bin"])
def test_a_changed_file_is_refused(pinned: RunResult, tmp_path: Path, name: str) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(pinned.directory, copy)
    data = bytearray((copy / name).read_bytes())
    data[len(data) // 2] ^= 1
    (copy / name).write_bytes(data)
    with pytest.raises(LoadError, match=f"{name} is not what was written"):
        compress.load(copy)
    (copy / name).unlink()
    with pytest.raises(LoadError, match=f"{name} is missing"):
        compress.load(copy)


def test_profile_of_an_artifact_is_in_its_own_runtime(
    cli: Callable[..., Any], pinned: RunResult, tmp_path: Path
) -> None:
    out = tmp_path / "profile.json"
    result = cli("profile", pinned.directory, "--threads", 1, "--runs", 3, "--out", out)
    assert result.code == 0, result.err
    found = json.loads(out.read_text())
    assert {row["runtime"] for row in found["rows"]} == {"openvino"}
    by_site = {row["site"]: row for row in found["rows"]}
    assert by_site["b"]["macs"] == 64 * 64 * 9 * 16 * 16
    assert found["layers"] == []


def test_every_variant_of_both_runtimes_is_reported_with_its_interval(chosen: RunResult) -> None:
    tried = {row["name"]: row for row in chosen.report.tried}
    assert next(iter(tried)) == "float32"
    expected = {"onnxruntime int8", "openvino float32", "openvino int8"}
    assert expected <= set(tried)
    assert {row["runtime"] for row in tried.values()} == RUNTIMES
    for row in tried.values():
        assert row["failure"] == ""
        assert row["p50_ms"] > 0
        assert row["settings"]["threads"] == 1
        assert row["speedup"]["low"] <= row["speedup"]["value"] <= row["speedup"]["high"]
    text = (chosen.directory / "report.md").read_text()
    assert all(f"| {name} |" in text for name in tried)


def test_the_report_names_the_runtime_that_was_chosen(chosen: RunResult, x: np.ndarray) -> None:
    report = chosen.report
    assert report.target["asked"] == "cpu"
    assert report.target["name"] in RUNTIMES
    assert report.target["name"] == report.candidate(report.chosen).runtime
    assert report.target["options"] == report.candidate(report.chosen).settings
    suffix = {"onnxruntime": "model.onnx", "openvino": "model.xml", "executorch": "model.pte"}
    assert (chosen.directory / suffix[report.target["name"]]).is_file()
    assert _first(compress.load(chosen.directory), x[:2]).shape == (2, 10)
    assert {one.runtime for one in report.candidates} <= RUNTIMES
    assert "openvino was not tried" not in " ".join(report.headline)


def test_the_winner_is_the_fastest_that_was_confirmed(chosen: RunResult) -> None:
    report = chosen.report
    confirmed = [c for c in report.candidates[1:] if c.speedup and c.speedup["verdict"] == "faster"]
    best = max(confirmed, key=lambda c: c.speedup["value"], default=report.candidates[0])  # type: ignore[index]
    assert report.chosen == best.name


def test_no_time_tries_whole_models_only(net: Path, x: np.ndarray, tmp_path: Path) -> None:
    result = compress.run(
        net, target="cpu", calibration=x, evaluate=_loss(x), out=tmp_path / "out", **QUICK
    )
    assert {row["runtime"] for row in result.report.tried} == RUNTIMES
    precisions = {row["precision"] for row in result.report.tried}
    assert precisions <= {"float32", "bfloat16", "int8"}
    assert not any("=" in row["name"] for row in result.report.tried)
    assert result.report.regions == ()
    # The score of what was chosen is from its own runtime.
    engine = compress.load(result.directory)
    score = result.report.candidate(result.report.chosen).score
    assert score is not None
    assert score["value"] == pytest.approx(_loss(x)(engine))


def _loss(x: np.ndarray) -> Callable[[compress.Engine], float]:
    def mean_output(engine: compress.Engine) -> float:
        return float(np.abs(_first(engine, x)).mean())

    return mean_output


def test_batch_and_threads_are_what_is_measured(net: Path, x: np.ndarray, tmp_path: Path) -> None:
    result = compress.run(
        net,
        target="openvino",
        calibration=x,
        out=tmp_path / "out",
        batch=3,
        **{**QUICK, "threads": 2},
    )
    expected = {"batch": 3, "objective": "latency", "requests": 1, "threads": 2}
    assert expected.items() <= result.report.latency.items()
    assert {row["settings"]["threads"] for row in result.report.tried} == {2}
    assert "Latency: batch 3, 2 threads" in (result.directory / "report.md").read_text()


def test_throughput_has_a_stream_for_each_thread(net: Path, x: np.ndarray, tmp_path: Path) -> None:
    result = compress.run(
        net,
        target="onnxruntime",
        calibration=x,
        out=tmp_path / "out",
        objective="throughput",
        **{**QUICK, "threads": 2},
    )
    expected = {"objective": "throughput", "requests": 4, "threads": 2, "batch": 1}
    assert expected.items() <= result.report.latency.items()
    others = [row for row in result.report.tried if row["name"] != "float32"]
    assert {row["settings"]["streams"] for row in others} == {2}
    text = (result.directory / "report.md").read_text()
    assert "Time per request with 4 requests in each call (throughput)" in text
    # Fewer threads than the artifact had streams are no reason to refuse it.
    assert _first(compress.load(result.directory, threads=1), x[:1]).shape == (1, 10)


def test_a_batch_for_a_model_that_has_one_is_refused(
    cli: Callable[..., Any], onnx_model: Callable[..., Model], folder: Path, tmp_path: Path
) -> None:
    path = _network(onnx_model, folder, "1")
    out = tmp_path / "out"
    result = cli("run", path, "--target", "onnxruntime", "--batch", 2, "--out", out)
    assert result.code == 2
    assert "--batch 2 does not fit" in result.err
    assert not out.exists()
    with pytest.raises(UsageError, match="fixed batch"):
        compress.run(path, target="onnxruntime", batch=2, out=out, **QUICK)


def _equal(first: Arrays, second: Arrays) -> bool:
    return all(np.array_equal(array, second[name]) for name, array in first.items())


@pytest.mark.parametrize(
    "target",
    [
        OpenVINO(threads=1, pinned=False),
        OpenVINO(threads=1, precision="bfloat16"),
        OnnxRuntime(threads=1, layout="plain", arena=False),
    ],
    ids=["openvino pinned", "openvino bfloat16", "onnxruntime layout"],
)
def test_settings_of_the_artifact_reach_its_engine(
    target: OpenVINO | OnnxRuntime, tmp_path: Path
) -> None:
    model = tiny_exported(21)
    engine = target.build(model)
    files = {path.name: sha256_file(path) for path in engine.save(tmp_path)}
    facts = {"name": target.name, "options": dataclasses.asdict(target)}
    report = {"schema_version": SCHEMA_VERSION, "files": files, "target": facts}
    (tmp_path / "report.json").write_text(json.dumps(report))
    again = compress.load(tmp_path)
    assert again.settings == engine.settings  # type: ignore[attr-defined]
    inputs = model.example(2)
    assert _equal(engine(inputs), again(inputs))


def _without_extras(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", WITHOUT_EXTRAS, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_without_extras_the_rest_works_and_says_so(
    tiny_onnx: Path, tiny_images: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    quick = ("--threads", 1, "--time", 0, "--seconds", 0.5, "--json")
    ran = _without_extras("run", tiny_onnx, "--calibration", tiny_images, "--out", out, *quick)
    assert ran.returncode in (0, 1), ran.stderr
    report = json.loads(ran.stdout)["report"]
    assert {row["runtime"] for row in report["tried"]} == {"onnxruntime"}
    remarks = [sentence for sentence in report["headline"] if "was not tried" in sentence]
    assert remarks == [
        f"{name.lower()} was not tried: {name} is not installed. Install it with: "
        f"pip install 'hwcompress[{name.lower()}]'."
        for name in ("OpenVINO", "ExecuTorch")
    ]
    assert compress.load(out)({"x": np.zeros((1, 3, 8, 8), np.float32)})["y"].shape == (1, 4)


def test_without_openvino_its_artifact_and_its_target_are_refused(
    pinned: RunResult, net: Path
) -> None:
    for arguments in (("bench", pinned.directory), ("run", net, "--target", "openvino")):
        ran = _without_extras(*arguments)
        assert ran.returncode == 2
        assert "Target openvino cannot be used here: OpenVINO is not installed." in ran.stderr
        assert "pip install 'hwcompress[openvino]'" in ran.stderr


def test_a_runtime_that_lacks_a_format_costs_only_itself() -> None:
    """int4 weights are for ONNX Runtime and OpenVINO alone."""
    model = tiny_exported(21)
    passes = (create_pass("quantize", bits=4),)
    able = (OnnxRuntime(threads=1), OpenVINO(threads=1))
    found, sentences = capable(passes, model, (*able, ExecuTorch(threads=1)))
    assert found == able
    (sentence,) = sentences
    assert sentence.startswith("executorch was not tried: Target executorch cannot run --bits 4")
    with pytest.raises(UnsupportedError, match="Target executorch cannot run --bits 4"):
        capable(passes, model, (ExecuTorch(threads=1), *able))


def test_a_target_without_a_profiler_says_so() -> None:
    with pytest.raises(UnsupportedError, match="Target executorch does not tell the time"):
        _profilers(ExecuTorch(threads=1))
    assert _profilers(CPU(threads=1)) == [OnnxRuntime(threads=1), OpenVINO(threads=1)]
