from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
import yaml

import compress
from compress.artifact import sha256_file
from compress.candidates import int8_share
from compress.errors import DataError, LoadError, OutputError, UnsupportedError, UsageError
from compress.graph import graph_sites
from compress.loading import load as load_model
from compress.machine import this_machine
from compress.model import Model
from compress.pipeline import RunResult
from compress.recipe import Recipe
from compress.registry import create_pass
from compress.report import SCHEMA_VERSION
from compress.rungs import RUNGS

FAST: dict[str, Any] = {"target": "onnxruntime", "threads": 1, "search_seconds": 0, "seconds": 0.5}
INT8 = "onnxruntime int8"
KERNEL_PLOTS = ("kernels", "roofline", "waterline", "gap")
SHAPE = (32, 16, 16)
WIDE = "<pads=[1,1,1,1]>"
BODY = f"""[a] c = Conv{WIDE}(x, w) [r] d = Relu(c) [b] e = Conv{WIDE}(d, w2) [s] f = Relu(e)
[k] g = Conv{WIDE}(f, w3) [t] h = Relu(g) [p] p = GlobalAveragePool(h) [q] q = Flatten(p)
[m] y = Gemm(q, v)"""


@dataclass(frozen=True)
class Files:
    """A network that int8 makes clearly faster, data for it, and a run of it."""

    model: Path
    data: Path
    x: np.ndarray
    y: np.ndarray


@pytest.fixture(scope="module", autouse=True)
def _home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The cache belongs to the test."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(tmp_path_factory.mktemp("home")))
        yield


needs_fast_int8 = pytest.mark.skipif(
    not this_machine().int8_dot_product, reason="int8 need not be faster on this CPU"
)


@pytest.fixture(scope="module")
def files(onnx_model: Callable[..., Model], tmp_path_factory: pytest.TempPathFactory) -> Files:
    folder = tmp_path_factory.mktemp("files")
    rng = np.random.default_rng(0)
    weights = {
        name: rng.normal(0, 0.08, (64, size, 3, 3)).astype(np.float32)
        for name, size in (("w", 32), ("w2", 64), ("w3", 64))
    }
    text = f"g (float[batch,32,16,16] x) => (float[batch,10] y) {{{BODY}}}"
    model = onnx_model(text, v=rng.normal(size=(64, 10)).astype(np.float32), **weights)
    onnx.save(ir.to_proto(model.graph_model), folder / "net.onnx")
    x = rng.normal(size=(48, *SHAPE)).astype(np.float32)
    x *= np.linspace(0.5, 2, 48, dtype=np.float32)[:, None, None, None]
    scores = compress.artifact.open_engine(folder / "net.onnx", threads=1)({"x": x})["y"]
    labels = scores.argmax(1)
    np.savez(folder / "data.npz", x=x, y=labels)
    return Files(folder / "net.onnx", folder / "data.npz", x, labels)


@pytest.fixture(scope="module")
def done(files: Files, tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    out = tmp_path_factory.mktemp("run") / "artifact"
    return compress.run(
        files.model, calibration=files.data, evaluate=files.data, max_drop="20%", out=out, **FAST
    )


@needs_fast_int8
def test_an_artifact_holds_what_it_promises(done: RunResult) -> None:
    assert done.met
    names = {path.name for path in done.directory.iterdir()}
    files = {"model.onnx", "plan.json", "recipe.yaml", "report.json", "report.md"}
    assert names == files | {f"{kind}.png" for kind in KERNEL_PLOTS}
    assert set(done.report.plots) == set(KERNEL_PLOTS)
    assert set(done.report.files) == files - {"report.json", "report.md"}
    assert {path.name for path in done.directory.parent.iterdir()} == {"artifact"}


def test_the_report_on_disk_is_the_report_returned(done: RunResult) -> None:
    text = (done.directory / "report.json").read_text()
    assert json.loads(text) == json.loads(json.dumps(done.report.to_dict()))
    assert json.loads(text)["schema_version"] == SCHEMA_VERSION
    assert (done.directory / "report.md").read_text() == done.report.markdown()


@needs_fast_int8
def test_the_report_proves_what_was_gained_and_lost(done: RunResult, files: Files) -> None:
    report = done.report
    assert report.chosen == INT8
    assert "as fast as the original and loses" in report.headline[0]
    before, after = report.candidates
    assert (before.name, after.name) == ("float32", INT8)
    assert (after.runtime, after.precision) == ("onnxruntime", "int8")
    assert before.score == {"value": 1.0, "unit": "top-1", "n": 48}
    assert after.drop is not None
    assert after.drop["points"] == pytest.approx(100 * (1 - after.score["value"]))  # type: ignore[index]
    assert after.speedup is not None
    assert after.speedup["low"] > 1
    assert after.size_bytes < before.size_bytes / 3
    assert after.int8_macs == 1.0
    assert report.calibration["ranges_from"] == "calibration data"
    assert report.calibration["samples"] == 48
    assert report.model["sha256"] == sha256_file(files.model)
    assert report.budget == {"max_drop": "20%", "min_speedup": None}
    latency = {"batch": 1, "objective": "latency", "requests": 1, "threads": 1}
    assert latency.items() <= report.latency.items()
    assert {row["precision"] for row in report.sites if row["macs"]} == {"int8"}


@needs_fast_int8
def test_the_report_has_the_kernels_of_both(done: RunResult) -> None:
    tables = done.report.kernels
    assert list(tables) == ["float32", INT8]
    for table in tables.values():
        assert table["runtime"] == "onnxruntime"
        assert sum(row["share"] for row in table["rows"]) == pytest.approx(1)
        # Every multiplication is counted once, whatever the runtime made of the operators.
        macs = sum(row["macs"] for row in table["rows"])
        assert macs == sum(site["macs"] for site in done.report.sites)
        assert all(row["bytes"] > 0 for row in table["rows"])
    convs = [row for row in tables[INT8]["rows"] if row["op_type"] == "QLinearConv"]
    assert len(convs) == 3
    # ONNX Runtime lays integers out with the channels last.
    assert convs[1]["outputs"] == [[[1, 16, 16, 64], "uint8"]]


@needs_fast_int8
def test_the_files_have_the_hashes_of_the_report(done: RunResult) -> None:
    assert set(done.report.files) == {"model.onnx", "plan.json", "recipe.yaml"}
    for name, digest in done.report.files.items():
        assert sha256_file(done.directory / name) == digest


@needs_fast_int8
def test_the_artifact_runs_again_as_it_was_measured(done: RunResult, files: Files) -> None:
    engine = compress.load(done.directory)
    assert engine.inputs[0].shape == ("batch", *SHAPE)
    first, again = engine({"x": files.x})["y"], compress.load(done.directory)({"x": files.x})["y"]
    np.testing.assert_array_equal(first, again)
    assert (first.argmax(1) == files.y).mean() == done.report.candidate(INT8).score["value"]  # type: ignore[index]
    sites = graph_sites(load_model(files.model).graph_model)
    assert int8_share(engine.kernels(), sites) == 1.0


@needs_fast_int8
def test_its_recipe_repeats_the_run(done: RunResult, tmp_path: Path) -> None:
    again = compress.run(recipe=done.directory / "recipe.yaml", out=tmp_path / "again")
    assert again.report.budget == done.report.budget
    assert again.report.latency["threads"] == 1
    for name in ("model.onnx", "plan.json"):
        assert again.report.files[name] == done.report.files[name]
    first, second = (
        yaml.safe_load((one.directory / "recipe.yaml").read_text()) for one in (done, again)
    )
    assert first == second


def test_a_changed_artifact_is_refused(done: RunResult, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(done.directory, copy)
    data = bytearray((copy / "model.onnx").read_bytes())
    data[len(data) // 2] ^= 1
    (copy / "model.onnx").write_bytes(data)
    with pytest.raises(LoadError, match="is not what was written"):
        compress.load(copy)


@needs_fast_int8
def test_a_speedup_out_of_reach_is_not_met_and_still_written(files: Files, tmp_path: Path) -> None:
    result = compress.run(
        files.model, calibration=files.x, min_speedup=500, out=tmp_path / "out", **FAST
    )
    assert not result.met
    assert result.report.chosen == INT8
    assert "--min-speedup 500 is not within reach" in "".join(result.report.headline)
    assert "accuracy was not verified" in result.report.headline[0]
    assert compress.load(result.directory)({"x": files.x[:1]})["y"].shape == (1, 10)


def test_more_loss_than_allowed_leaves_the_original(files: Files, tmp_path: Path) -> None:
    seen: list[str] = []

    def loses(engine: compress.Engine) -> float:
        seen.append(engine.name)
        return 1.0 if len(seen) == 1 else 0.9

    result = compress.run(
        files.model,
        calibration=files.x,
        evaluate=loses,
        max_drop=0,
        repair_seconds=0,
        out=tmp_path / "out",
        **FAST,
    )
    assert not result.met
    assert result.report.chosen == "float32"
    assert "more than --max-drop allows" in result.report.headline[0]
    assert not any(one.allowed for one in result.report.candidates[1:])
    assert len(seen) == len(result.report.candidates)
    assert not (result.directory / "plan.json").exists()
    engine = compress.load(result.directory)
    original = compress.artifact.open_engine(files.model, threads=1)
    np.testing.assert_array_equal(engine({"x": files.x})["y"], original({"x": files.x})["y"])


def test_a_function_of_the_user_scores_the_engines(files: Files, tmp_path: Path) -> None:
    seen = []

    def mean_output(engine: compress.Engine) -> float:
        seen.append(engine.name)
        return float(np.abs(engine({"x": files.x})["y"]).mean())

    result = compress.run(
        files.model,
        calibration=files.x,
        evaluate=mean_output,
        max_drop="50%rel",
        out=tmp_path / "out",
        **FAST,
    )
    assert seen == ["ONNX Runtime float32", "ONNX Runtime int8"]
    score = result.report.candidates[0].score
    assert score is not None
    assert (score["unit"], score["n"]) == ("score", None)
    assert result.report.candidates[1].drop is None


def test_an_existing_directory_is_not_touched(files: Files, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(OutputError, match="exists"):
            compress.run(files.model, out=tmp_path / "out", overwrite=overwrite, **FAST)
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "mine.txt"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError], ids=["Ctrl-C", "failure"])
def test_an_interruption_leaves_the_old_artifact_and_nothing_else(
    files: Files, tmp_path: Path, error: type[BaseException]
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "report.json").write_text("{}")

    def fails(engine: compress.Engine) -> float:
        raise error

    with pytest.raises(KeyboardInterrupt if error is KeyboardInterrupt else DataError):
        compress.run(
            files.model, calibration=files.x, evaluate=fails, out=out, overwrite=True, **FAST
        )
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "report.json"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_drop": "1%"}, "needs something to measure the drop with"),
        ({"max_drop": 0.0}, "needs something to measure the drop with"),
        ({"min_speedup": -1}, "is no factor"),
        ({"seconds": 0.1}, "out of range"),
        ({"target": "tpu"}, "no target called 'tpu'"),
        ({"threads": 0}, "--threads 0 is out of range"),
        ({"bits": 9}, "--bits 9: 9 is no width"),
        ({"bits": "fp8"}, "cannot run --bits fp8; it runs 8, 4 .weights only"),
        ({"repair_seconds": -1}, "--repair-time -1 is out of range"),
        ({"method": "median"}, "choose from minmax"),
        ({"objective": "speed"}, "choose from latency, throughput"),
        ({"batch": 0}, "must be at least 1"),
        ({"search_seconds": -1}, "--time -1 is out of range"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_wrong_usage_is_refused_before_any_work(
    files: Files, tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises((UsageError, UnsupportedError), match=message):
        compress.run(files.model, calibration=files.x, out=tmp_path / "out", **{**FAST, **settings})
    assert not list(tmp_path.iterdir())


def test_a_run_needs_a_model() -> None:
    with pytest.raises(UsageError, match="There is no model"):
        compress.run(target="cpu")


def test_an_unavailable_target_is_refused_before_the_model_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = tmp_path / "plugin" / "acme-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: acme\nVersion: 1.0\n")
    entries = "[compress.targets]\nnull = compress.testing:NullTarget\n"
    (info / "entry_points.txt").write_text(entries)
    monkeypatch.syspath_prepend(info.parent)
    with pytest.raises(UnsupportedError, match="null cannot be used here: It exists only"):
        compress.run("no-such-file.onnx", target="null", out=tmp_path / "out", seconds=0.5)


class ConvNet(torch.nn.Sequential):
    def __init__(self) -> None:
        super().__init__(
            torch.nn.Conv2d(3, 8, 3),
            torch.nn.BatchNorm2d(8),
            torch.nn.ReLU(),
            torch.nn.AdaptiveAvgPool2d(1),
            torch.nn.Flatten(),
            torch.nn.Linear(8, 4),
        )


class MLP(torch.nn.Sequential):
    def __init__(self) -> None:
        layers = (torch.nn.Linear(16, 32, bias=False), torch.nn.Linear(32, 4, bias=False))
        super().__init__(layers[0], torch.nn.ReLU(), layers[1])


@pytest.mark.parametrize(
    ("network", "shape", "source"),
    [
        (ConvNet, "1x3x8x8", "synthetic data from BatchNorm statistics"),
        (MLP, "1x6x16", "none: dynamic and weight-only"),
    ],
    ids=["ConvBN", "MLP"],
)
def test_without_calibration_the_headline_says_where_ranges_come_from(
    tmp_path: Path, network: type[torch.nn.Module], shape: str, source: str
) -> None:
    # Optimising on two threads is slower than on one where other processes want them too.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    result = compress.run(network(), inputs=[shape], out=tmp_path / "out", **FAST)
    torch.set_num_threads(threads)
    text = " ".join(result.report.headline)
    assert f"No calibration data were given; ranges come from {source}" in text
    assert result.report.calibration["ranges_from"] == source
    assert compress.load(result.directory).inputs[0].shape[0] == "batch"


def test_a_module_of_the_user_is_not_changed(tmp_path: Path) -> None:
    module = MLP().train()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    data = np.random.default_rng(0).normal(size=(8, 6, 16)).astype(np.float32)
    compress.run(module, inputs=["1x6x16"], calibration=data, out=tmp_path / "out", **FAST)
    assert module.training
    for name, value in module.state_dict().items():
        assert torch.equal(value, before[name])


def test_formats_that_are_simulated_are_judged_by_their_numbers(
    files: Files, tmp_path: Path
) -> None:
    result = compress.run(
        files.model,
        calibration=files.data,
        evaluate=files.data,
        max_drop="100%",
        bits="fp8",
        simulate=True,
        out=tmp_path / "out",
        **FAST,
    )
    report = result.report
    assert result.met
    assert report.chosen == "onnxruntime simulated fp8"
    assert report.candidate(report.chosen).buys == "numbers"
    assert any(sentence.startswith("Simulated:") for sentence in report.headline)
    assert all(r["reason"].startswith("simulated:") for r in report.sites if r["macs"])
    assert report.gap["top1_agreement"] > 0.9
    engine = compress.load(result.directory)
    original = compress.artifact.open_engine(files.model, threads=1)
    got, expected = engine({"x": files.x})["y"], original({"x": files.x})["y"]
    assert not np.array_equal(got, expected)
    assert np.linalg.norm(got - expected) < 0.2 * np.linalg.norm(expected)


@needs_fast_int8
def test_the_report_says_how_much_of_the_machine_is_used(done: RunResult) -> None:
    report = done.report
    assert set(report.waterlines) == set(report.kernels) == {"float32", report.chosen}
    for one in report.waterlines.values():
        assert 0 < one["waterline_gmacs"] <= one["peak_gmacs"] * (1 + 1e-9)
        assert one["efficiency"] == pytest.approx(one["actual_gmacs"] / one["peak_gmacs"])
    peaks = report.peaks["onnxruntime"]
    assert peaks["threads"] == 1
    assert peaks["gmacs_per_second"]["float32"] > 0
    assert "## Where the time goes" in report.markdown()


def test_a_plot_that_fails_costs_no_run(
    files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("no font")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", fail)
    monkeypatch.setattr("compress.kernel_peaks.cached_peaks", fail)
    out = tmp_path / "out"
    result = compress.run(files.model, calibration=files.x, out=out, **FAST)
    text = (out / "report.md").read_text()
    assert "The plot of kernels could not be drawn: no font" in text
    assert "The peaks of onnxruntime could not be measured: no font" in text
    assert result.report.plots == result.report.waterlines == {}
    assert not list(out.glob("*.png"))
    assert compress.artifact.load(out)({"x": files.x[:1]})["y"].shape == (1, 10)


def test_four_bits_buy_size(files: Files, tmp_path: Path) -> None:
    result = compress.run(files.model, bits=4, out=tmp_path / "out", **FAST)
    report = result.report
    assert result.met
    assert report.chosen == "onnxruntime int4 weights"
    assert "buy size and no speed" in " ".join(report.headline)
    counted = {row["name"]: row["reason"] for row in report.sites if row["macs"]}
    assert set(counted.values()) == {"its weights are stored in 4 bits and computed with in float"}
    assert report.candidate(report.chosen).speedup is not None


def test_sixteen_bits_need_a_runtime_that_has_them(files: Files, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="--bits 16 needs a runtime"):
        compress.run(files.model, bits=16, out=tmp_path / "out", **FAST)
    assert not (tmp_path / "out").exists()


def test_sensitivity_is_measured_on_request(files: Files, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = compress.run(files.model, calibration=files.x, sensitivity=True, out=out, **FAST)
    rows = result.report.sensitivity
    assert {row["format"] for row in rows} == {"8"}
    assert {row["name"] for row in rows} <= {row["name"] for row in result.report.sites}
    assert all(row["metrics"]["mse"] >= 0 for row in rows)
    assert (out / "sensitivity.png").read_bytes().startswith(b"\x89PNG")
    assert "sensitivity.png" in (out / "report.md").read_text()


def test_training_data_are_used_where_nothing_cheaper_helps(
    files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("compress.repair.RUNGS", RUNGS[-1:])  # the others have tests of their own
    result = compress.run(
        files.model,
        calibration=files.x,
        evaluate=files.data,
        train=files.data,
        recipe=Recipe((create_pass("quantize", bits=2, edge_bits=2, simulate=True),)),
        max_drop=0,
        out=tmp_path / "out",
        **FAST,
    )
    first, last = result.report.ladder
    assert last["rung"] == "quantization-aware training"
    assert last["passes"] == ("qat",)
    assert last["score"] is not None
    assert last["sqnr_db"] != first["sqnr_db"]
