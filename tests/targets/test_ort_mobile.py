"""The ORT-format model is the runtime's own, portable, complete, and gives the outputs expected."""

from __future__ import annotations

import json
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
from compress.errors import EngineError, LoadError, UsageError
from compress.exits import USAGE
from compress.graph import graph_sites
from compress.model import Model
from compress.pipeline import RunResult
from compress.target import Elsewhere, Shipped
from compress.testing import TargetContract, tiny_exported
from targets.onnxruntime import OnnxRuntime
from targets.ort_mobile import OrtMobile
from targets.ort_mobile_engine import OrtMobileEngine, to_ort_format, usability
from targets.ort_mobile_tools import CONFIGS

ONE = OrtMobile(threads=1)
CONVERT = """
import pathlib, sys
from onnxruntime.tools.convert_onnx_models_to_ort import OptimizationStyle as Style
from onnxruntime.tools.convert_onnx_models_to_ort import convert_onnx_models_to_ort as convert
for folder in ("float32", "int8"):
    for types in (False, True):
        model = pathlib.Path(folder, "model.onnx")
        convert(model, None, [Style.Fixed], None, "arm", False, False, types)
"""
WIDE = """
wide (float[batch, 32, 12, 12] x) => (float[batch, 10] y)
{
    [a] c = Conv<pads = [1, 1, 1, 1]>(x, w)
    [r] d = Relu(c)
    [b] e = Conv<pads = [1, 1, 1, 1]>(d, w2)
    [s] s = Add(e, d)
    [t] f = Relu(s)
    [p] p = GlobalAveragePool(f)
    [q] q = Flatten(p)
    [m] y = Gemm(q, v)
}
"""
WEIGHTS = {"w": (32, 32, 3, 3), "w2": (32, 32, 3, 3), "v": (32, 10)}


class TestOrtMobile(TargetContract):
    """One thread."""

    target = ONE


@pytest.fixture(scope="module", autouse=True)
def _home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The cache belongs to the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(tmp_path_factory.mktemp("home")))
        yield


@pytest.fixture(scope="module")
def wide(onnx_model: Callable[..., Model]) -> Model:
    return onnx_model(WIDE, **WEIGHTS)


@pytest.fixture(scope="module")
def ran(wide: Model, tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    """A whole run on the wide network, with labels that the float network gives."""
    folder = tmp_path_factory.mktemp("ran")
    onnx.save(ir.to_proto(wide.graph_model), folder / "wide.onnx")
    x = np.random.default_rng(0).normal(size=(32, 32, 12, 12)).astype(np.float32)
    labels = OnnxRuntime(threads=1).build(wide)({"x": x})["y"].argmax(1)
    np.savez(folder / "data.npz", x=x, y=labels)
    return compress.run(
        folder / "wide.onnx",
        target="ort-mobile",
        device="pixel-8",
        reparam="off",  # the checker should find an Add
        calibration=folder / "data.npz",
        evaluate=folder / "data.npz",
        max_drop="10%",
        threads=1,
        search_seconds=5,
        seconds=0.5,
        out=folder / "artifact",
    )


def _int8_types(path: Path) -> dict[str, str]:
    """The types that the reduced build needs, by operator."""
    lines = path.read_text().splitlines()
    body = ",".join(line.split(";", 2)[2] for line in lines if not line.startswith("#"))
    return {name: body for name in ("QLinearConv", "QuantizeLinear") if name in body}


def test_activations_are_int8_with_zero_points() -> None:
    facts = ONE.capabilities
    assert (facts.activation, facts.weight, facts.asymmetric) == ("int8", "int8", True)
    assert not facts.reduced_weights
    assert facts.per_channel
    assert not {"HardSwish", "HardSigmoid"} & {pattern.op for pattern in facts.patterns}
    assert "say nothing about a phone" in facts.notes[0]
    assert isinstance(ONE, Elsewhere)


@pytest.fixture(scope="module")
def folders(
    wide: Model, ran: RunResult, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[Path, Path]]:
    """For each precision our files, and what ONNX Runtime's converter makes of the same model."""
    ours, theirs = tmp_path_factory.mktemp("ours"), tmp_path_factory.mktemp("theirs")
    ONE.build(wide).save(ours)
    made = {"float32": (ours, theirs / "float32"), "int8": (ran.directory, theirs / "int8")}
    for source, copy in made.values():
        copy.mkdir()
        (copy / "model.onnx").write_bytes((source / "model.onnx").read_bytes())
    subprocess.run([sys.executable, "-c", CONVERT], cwd=theirs, check=True, capture_output=True)
    return made


@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_the_files_are_those_of_the_runtimes_own_converter(
    precision: str, folders: dict[str, tuple[Path, Path]]
) -> None:
    ours, theirs = folders[precision]
    # The bytes differ from one conversion to the next in the order of a hash table.
    assert (ours / "model.ort").stat().st_size == (theirs / "model.ort").stat().st_size
    for name in CONFIGS:
        expected = (theirs / f"model.{name}").read_text().splitlines()
        lines = (ours / name).read_text().splitlines()
        assert lines[:2] == ["# Generated from model/s:", "# - model.ort"]
        assert lines[2:] == expected[2:]
        assert any(line.startswith("ai.onnx;") for line in lines)


def test_no_layout_of_one_processor_is_baked_in(
    wide: Model, folders: dict[str, tuple[Path, Path]]
) -> None:
    ours, _ = folders["float32"]
    for name in CONFIGS:
        assert "nchwc" not in (ours / name).read_text()
    blocked = {kernel.op_type for kernel in OnnxRuntime(threads=1).build(wide).kernels()}
    if "ReorderInput" not in blocked:
        pytest.skip("this CPU has no blocked layout to leave out")
    here = {kernel.op_type for kernel in ONE.build(wide).kernels()}
    assert not {"ReorderInput", "ReorderOutput"} & here


def test_loading_needs_the_packed_model_and_a_whole_one(
    folders: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    for name in ("model.onnx", "model.ort"):
        (tmp_path / name).write_bytes((folders["float32"][0] / name).read_bytes())
    whole = (tmp_path / "model.ort").read_bytes()
    (tmp_path / "model.ort").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(EngineError, match=r"does not run this model\.ort"):
        ONE.load(tmp_path)
    (tmp_path / "model.ort").unlink()
    with pytest.raises(LoadError, match=r"holds no model\.ort"):
        ONE.load(tmp_path)


def test_a_refused_model_is_an_engine_error() -> None:
    model = tiny_exported(21)
    model.graph_model.graph[0].op_type = "NoSuchOperator"
    with pytest.raises(EngineError, match="refuses the model"):
        to_ort_format(model.graph_model)


def test_profile_covers_the_kernels() -> None:
    model = tiny_exported(21)
    times = ONE.build(model).profile(model.example(), runs=3)
    assert {"0", "4.depthwise", "4.pointwise", "8"} <= {one.kernel.site for one in times}


def test_the_checker_speaks_in_sentences(ran: RunResult) -> None:
    assert isinstance(compress.load(ran.directory), Shipped)
    verdict, shapes, run = ran.report.headline[-3:]
    # Two convolutions with the Relu and the Q and DQ around them; the rest is left.
    assert "XNNPACK takes" in verdict
    assert "leaves Add, " in verdict
    assert "Conv" not in verdict.partition("leaves")[2].partition(".")[0]
    assert "CoreML: MLProgram" in verdict
    assert "NNAPI is deprecated" in verdict
    assert shapes.startswith("Inputs x have open sizes")
    assert "onnxruntime_perf_test" in run
    assert "-e xnnpack model.onnx" in run


def test_a_checker_that_fails_costs_its_verdict_only(
    folders: dict[str, tuple[Path, Path]],
) -> None:
    command = [sys.executable, "-m", "targets.ort_mobile_tools", "missing.onnx", "model.ort"]
    folder, _ = folders["float32"]
    ran = subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True)
    found = json.loads(ran.stdout.splitlines()[-1])
    assert "missing.onnx" in found["failure"]
    assert set(found["configs"]) == set(CONFIGS)
    (sentence,) = usability(found)
    assert sentence.startswith("ONNX Runtime's mobile checker gave no verdict: ")


def test_a_run_takes_int8_and_says_what_was_not_measured(ran: RunResult) -> None:
    report = ran.report
    assert report.chosen == "ort-mobile int8"
    assert ran.met
    assert report.candidate("ort-mobile int8").int8_macs == pytest.approx(1)
    assert report.candidate("ort-mobile int8").buys == "device"
    assert any("chosen without a measurement on the device" in line for line in report.headline)
    assert any("say nothing about a phone" in line for line in report.headline)
    assert any("XNNPACK takes" in line for line in report.headline)
    assert any("on this machine" in line for line in report.headline)
    # Nothing is placed or tuned by the speed of a machine that it will not run on.
    assert report.regions == ()
    assert {row["name"] for row in report.tried} <= {
        "float32", "ort-mobile float32", "ort-mobile int8"
    }  # fmt: skip


def test_the_size_is_that_of_what_the_device_gets(ran: RunResult) -> None:
    packed = ran.directory / "model.ort"
    assert ran.report.candidate("ort-mobile int8").size_bytes == packed.stat().st_size
    assert set(ran.report.files) >= {"model.ort", "model.onnx", *CONFIGS, "plan.json"}


def test_the_artifact_loads_from_ort_format_with_equal_outputs(ran: RunResult, wide: Model) -> None:
    engine = compress.load(ran.directory)
    assert isinstance(engine, OrtMobileEngine)
    inputs = wide.example(3)
    from_qdq = OnnxRuntime(threads=1).load(ran.directory)(inputs)["y"]
    got = engine(inputs)["y"]
    # The optimizer here turns int8 activations into uint8 with the same scales.
    np.testing.assert_allclose(got, from_qdq, atol=np.abs(from_qdq).max() * 0.02)
    again = ONE.build(Model(engine.graph_model, engine.inputs, "again"))(inputs)["y"]
    np.testing.assert_array_equal(got, again)


def test_int8_activations_use_all_of_their_range(ran: RunResult) -> None:
    plan = json.loads((ran.directory / "plan.json").read_text())
    behind_relu = plan["activations"]["d"]
    assert behind_relu["zero_point"] == -128
    kinds = _int8_types(ran.directory / CONFIGS[1])
    assert "int8_t" in kinds["QLinearConv"]
    assert "uint8_t" not in kinds["QLinearConv"]


def test_the_sheet_predicts_and_says_so(ran: RunResult) -> None:
    predicted = ran.report.predicted
    assert predicted["device"]["name"] == "pixel-8"
    by_precision = {row["precision"]: row["predicted_ms"] for row in predicted["rows"]}
    assert 0 < by_precision["int8"] < by_precision["float32"]
    text = (ran.directory / "report.md").read_text()
    assert "## Predicted on pixel-8" in text
    assert "latency (predicted)" in text
    assert "not measured" in text
    assert json.loads((ran.directory / "report.json").read_text())["predicted"] == predicted


def test_sites_are_found_in_the_packed_model(wide: Model) -> None:
    macs = {site.name for site in graph_sites(wide.graph_model) if site.macs}
    assert macs == {"a", "b", "m"}
    assert macs <= {kernel.site for kernel in ONE.build(wide).kernels()}


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"device": "pixle-8"}, "Did you mean 'pixel-8'"),
        ({"min_speedup": 1.5}, "speed there is not measured"),
    ],
    ids=["device", "speed-up"],
)
def test_what_cannot_be_done_is_refused_before_work(
    options: dict[str, Any], part: str, tiny_onnx: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=part):
        compress.run(tiny_onnx, target="ort-mobile", out=tmp_path / "a", **options)
    assert not (tmp_path / "a").exists()


def test_the_command_takes_a_device(cli: Callable[..., Any], tiny_onnx: Path) -> None:
    result = cli("run", tiny_onnx, "--target", "ort-mobile", "--device", "pixel-0")
    assert result.code == USAGE
    assert "There is no device sheet called 'pixel-0'" in result.err
