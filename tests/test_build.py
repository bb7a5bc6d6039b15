"""`compress run` for a target that is built elsewhere, and `compress build`, from end to end."""

from __future__ import annotations

import json
import os
import shutil
import signal
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
from compress import built_engines
from compress.artifact import sha256_file
from compress.errors import EngineError
from compress.exits import NOT_MET, PREPARED, STOPPED, USAGE
from compress.pipeline import run

Cli = Callable[..., Any]
CANDIDATES = ["float32", "tensorrt float16", "tensorrt int8", "tensorrt mixed"]
FILES = ["float32.onnx", "float16.onnx", "int8.onnx", "mixed.onnx"]
ALWAYS = {*FILES, "build.json", "plan.json", "recipe.yaml", "report.json", "report.md"}

NPU = '''
"""A device that is simulated by ONNX Runtime: a real one, behind a switch."""
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from compress.errors import EngineError
from compress.target import Check
from targets.onnxruntime import OnnxRuntime


class NpuEngine:
    def __init__(self, engine):
        self.engine = engine
        self.name, self.inputs, self.outputs = "npu", engine.inputs, engine.outputs
        self.save, self.kernels, self.profile = engine.save, engine.kernels, engine.profile

    def __call__(self, inputs):
        return self.engine(inputs)

    def timed(self, inputs):
        def run():
            start = time.perf_counter()
            self.engine(inputs)
            return time.perf_counter() - start

        return run


@dataclass(frozen=True, kw_only=True)
class Npu:
    batch: int = 1
    name: ClassVar[str] = "npu"

    @property
    def capabilities(self):
        return OnnxRuntime().capabilities

    def check(self):
        here = os.environ.get("NPU") == "here"
        return Check(here, "" if here else "There is no NPU.", "" if here else "a socket driver")

    def check_input(self, model):
        return ("as it is",)

    def build_sheet(self, inputs):
        return {"inputs": [str(spec) for spec in inputs]}

    def builder(self):
        return {"npu": "1"}

    def build(self, model):
        return NpuEngine(OnnxRuntime(threads=1).build(model))

    def build_in(self, model, folder):
        log = Path(os.environ["NPU_LOG"])
        done = log.read_text() if log.exists() else ""
        if len(done) == int(os.environ.get("NPU_STOP", "-1")):
            raise KeyboardInterrupt
        log.write_text(done + "b")
        halves = any(node.op_type == "Cast" for node in model.graph_model.graph)
        if halves and os.environ.get("NPU_HALF") == "no":
            raise EngineError("There are no halves.")
        (folder / "timing.cache").write_text("learnt")
        return self.build(model)

    def load(self, directory):
        return NpuEngine(OnnxRuntime(threads=1).load(directory))
'''


@pytest.fixture(scope="module", autouse=True)
def _home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Caches belong to the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(tmp_path_factory.mktemp("home")))
        yield


@pytest.fixture(scope="module")
def prepared(tiny_onnx: Path, tiny_images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `compress run --target tensorrt --eval` writes."""
    out = tmp_path_factory.mktemp("prepared") / "artifact"
    run(tiny_onnx, target="tensorrt", calibration=tiny_images, evaluate=tiny_images, out=out)
    return out


@pytest.fixture
def copied(prepared: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(prepared, tmp_path / "artifact"))


@pytest.fixture
def npu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A target of a third party that is built elsewhere; its log has a letter for each build."""
    package = tmp_path / "acme"
    info = package / "acme-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: acme\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[compress.targets]\nnpu = acme_npu:Npu\n")
    (package / "acme_npu.py").write_text(NPU)
    monkeypatch.syspath_prepend(package)
    monkeypatch.setenv("NPU_LOG", str(tmp_path / "log"))
    monkeypatch.setattr(built_engines, "CACHE", tmp_path / "cache")
    yield tmp_path / "log"
    sys.modules.pop("acme_npu", None)


@pytest.fixture
def unbuilt(npu: Path, tiny_onnx: Path, tiny_images: Path, tmp_path: Path) -> Path:
    """An artifact that was prepared for the NPU."""
    out = tmp_path / "npu-artifact"
    run(tiny_onnx, target="npu", calibration=tiny_images, evaluate=tiny_images, out=out)
    return out


def report_of(directory: Path) -> dict[str, Any]:
    return dict(json.loads((directory / "report.json").read_text()))


def test_run_for_tensorrt_prepares_and_says_so_first(
    cli: Cli, tiny_onnx: Path, tiny_images: Path, tmp_path: Path
) -> None:
    out = tmp_path / "artifact"
    given = ("run", tiny_onnx, "--target", "tensorrt", "--calibration", tiny_images, "--out", out)
    result = cli(*given, "--bits", 8)
    assert result.code == PREPARED, result.err
    first = result.out.replace("\n", " ")
    assert first.startswith("The tensorrt engine is not built and nothing is measured")
    assert "`compress build DIR` finishes the job" in first
    assert "unverified on hardware" in first
    assert "Accuracy was not verified, not even in simulation (no --eval)." in first
    assert {path.name for path in out.iterdir()} == ALWAYS
    text = (out / "report.md").read_text()
    title, _, sentence, *_ = text.splitlines()
    assert title == "# tiny on tensorrt: not built"
    assert sentence.startswith("- The tensorrt engine is not built and nothing is measured")
    assert "not measured" in text
    assert cli(*given).code == USAGE
    before = (out / "report.json").read_bytes()
    assert cli(*given, "--force").code == PREPARED
    assert (out / "report.json").read_bytes() != before


def test_accuracy_is_judged_in_simulation_and_labelled(prepared: Path) -> None:
    report = report_of(prepared)
    assert report["built"] is False
    assert report["met"] is False
    assert report["chosen"] == ""
    rows = {row["name"]: row for row in report["candidates"]}
    assert list(rows) == CANDIDATES
    for row in rows.values():
        assert row["score"]["where"] == "simulated in ONNX Runtime"
        assert row["timing"] == {}
        assert row["speedup"] is None
    assert rows["tensorrt int8"]["int8_macs"] == 1
    assert rows["tensorrt float16"]["int8_macs"] == 0
    assert rows["float32"]["drop"] is None
    assert rows["tensorrt mixed"]["drop"]["points"] <= 100
    assert any("points of top-1, simulated in ONNX Runtime" in s for s in report["headline"])
    assert "simulated in ONNX Runtime" in (prepared / "report.md").read_text()


def test_the_files_are_typed_as_their_names_say(prepared: Path) -> None:
    def constants(name: str) -> set[int]:
        return {one.data_type for one in onnx.load(prepared / name).graph.initializer}

    def operators(name: str) -> set[str]:
        return {node.op_type for node in onnx.load(prepared / name).graph.node}

    half, integer = onnx.TensorProto.FLOAT16, onnx.TensorProto.INT8
    assert half not in constants("float32.onnx")
    assert half in constants("float16.onnx")
    assert integer in constants("int8.onnx")
    assert {half, integer} <= constants("mixed.onnx")
    assert "DequantizeLinear" in operators("int8.onnx") & operators("mixed.onnx")
    for name in FILES:
        onnx.checker.check_model(str(prepared / name))


def test_the_build_sheet_says_what_the_build_needs(prepared: Path) -> None:
    sheet = json.loads((prepared / "build.json").read_text())
    assert sheet["target"] == "tensorrt"
    assert [one["name"] for one in sheet["candidates"]] == CANDIDATES
    assert [one["file"] for one in sheet["candidates"]] == FILES
    hashes = report_of(prepared)["files"]
    for one in sheet["candidates"]:
        assert one["sha256"] == {one["file"]: hashes[one["file"]]}
    assert sheet["max_drop"] == "1%"
    assert sheet["evaluation"]["sha256"] == report_of(prepared)["evaluation"]["sha256"]
    how = sheet["how"]
    assert how["requires"] == {"tensorrt": ">=10.0,<12"}
    assert how["profiles"] == {
        "x": {"min": [1, 3, 8, 8], "opt": [1, 3, 8, 8], "max": [32, 3, 8, 8]}
    }
    assert how["workspace_bytes"] == 4096 << 20
    assert how["timing_cache"] == "timing.cache"
    assert {"version_compatible", "hardware_compatible"} <= set(how)


def test_the_batch_reaches_the_profile_and_the_sheet(
    cli: Cli, tiny_onnx: Path, tiny_images: Path, tmp_path: Path
) -> None:
    out = tmp_path / "artifact"
    given = ("run", tiny_onnx, "--target", "tensorrt", "--calibration", tiny_images)
    assert cli(*given, "--out", out, "--batch", 64).code == PREPARED
    sheet = json.loads((out / "build.json").read_text())
    assert sheet["batch"] == sheet["options"]["batch"] == 64
    assert sheet["how"]["profiles"]["x"]["opt"] == [64, 3, 8, 8]
    assert sheet["how"]["profiles"]["x"]["max"] == [64, 3, 8, 8]


def test_options_of_the_target_reach_the_sheet_and_the_recipe(
    cli: Cli, tiny_onnx: Path, tiny_images: Path, tmp_path: Path
) -> None:
    out, again = tmp_path / "artifact", tmp_path / "again"
    given = ("run", tiny_onnx, "--target", "tensorrt", "--calibration", tiny_images)
    options = ("version_compatible=true", "hardware_compatible=ampere_plus", "workspace_mib=512")
    chosen = [word for option in options for word in ("--target-option", option)]
    assert cli(*given, "--bits", 16, *chosen, "--out", out).code == PREPARED
    sheet = json.loads((out / "build.json").read_text())
    assert sheet["how"]["version_compatible"] is True
    assert sheet["how"]["hardware_compatible"] == "ampere_plus"
    assert sheet["how"]["workspace_bytes"] == 512 << 20
    assert cli("run", "--recipe", out / "recipe.yaml", "--out", again).code == PREPARED
    assert json.loads((again / "build.json").read_text())["options"] == sheet["options"]


def test_16_bits_prepare_floats_alone(cli: Cli, tiny_onnx: Path, tmp_path: Path) -> None:
    out = tmp_path / "artifact"
    given = ("run", tiny_onnx, "--target", "tensorrt", "--bits", 16, "--out", out)
    assert cli(*given).code == PREPARED
    assert [row["name"] for row in report_of(out)["candidates"]] == CANDIDATES[:2]
    (conv, *_) = report_of(out)["sites"]
    assert (conv["precision"], conv["reason"]) == ("float16", "there is no int8 candidate")


def test_float8_is_prepared_for_a_gpu_that_has_it(
    cli: Cli, tiny_onnx: Path, tiny_images: Path, tmp_path: Path
) -> None:
    out = tmp_path / "artifact"
    given = ("run", tiny_onnx, "--target", "tensorrt", "--calibration", tiny_images, "--out", out)
    refused = cli(*given, "--bits", "fp8")
    assert refused.code == USAGE
    assert "fp8" in refused.err
    named = ("--target-option", "compute_capability=8.9")
    assert cli(*given, "--bits", "fp8", *named).code == PREPARED
    report = report_of(out)
    assert [row["name"] for row in report["candidates"]][2:] == ["tensorrt fp8", "tensorrt mixed"]
    assert (out / "fp8.onnx").is_file()
    (conv, *_) = report["sites"]
    assert (conv["precision"], conv["reason"]) == ("float8", "it is to run in float8")


@pytest.mark.parametrize(
    ("options", "part"),
    [
        (("--bits", "fp8", "--simulate"), "--simulate computes formats in float32"),
        (("--threads", 2), "no option threads"),
        (("--max-drop", "1%"), "--eval"),
        (("--device", "pixel-8"), "--device is not available for --target"),
        (("--device", "ssh://nobody@127.0.0.1:1"), "--device is not available for --target"),
    ],
)
def test_what_makes_no_sense_is_refused_before_work(
    cli: Cli, tiny_onnx: Path, tmp_path: Path, options: tuple[object, ...], part: str
) -> None:
    out = tmp_path / "artifact"
    result = cli("run", tiny_onnx, "--target", "tensorrt", "--out", out, *options)
    assert result.code == USAGE
    assert part in result.err
    assert not out.exists()


def test_a_model_that_breaks_a_rule_is_refused_with_the_rule(
    cli: Cli, onnx_model: Callable[..., Any], tmp_path: Path
) -> None:
    model = onnx_model("det (float[2,4,4] x) => (float[2] y) { y = Det (x) }")
    path = tmp_path / "det.onnx"
    ir.save(model.graph_model, path)
    result = cli("run", path, "--target", "tensorrt", "--out", tmp_path / "artifact")
    assert result.code == USAGE
    assert "documented rules do not hold" in result.err
    assert "Det" in result.err
    assert not (tmp_path / "artifact").exists()


def test_an_artifact_without_an_engine_does_not_load(cli: Cli, prepared: Path) -> None:
    with pytest.raises(EngineError, match="compress build"):
        compress.load(prepared)
    result = cli("bench", prepared)
    assert result.code == USAGE
    assert f"compress build {prepared}" in result.err


def test_build_refuses_politely_where_nothing_can_be_built(cli: Cli, copied: Path) -> None:
    before = {path.name: path.read_bytes() for path in copied.iterdir()}
    result = cli("build", copied)
    assert result.code == USAGE
    assert "cannot be built on this machine" in result.err
    assert "TensorRT is not installed" in result.err
    assert "pip install 'hwcompress[tensorrt]'" in result.err
    assert "Traceback" not in result.err
    assert {path.name: path.read_bytes() for path in copied.iterdir()} == before


def _changed(key: str, value: object) -> Callable[[dict[str, Any]], object]:
    return lambda sheet: sheet.update({key: value})


@pytest.mark.parametrize(
    ("damage", "part"),
    [
        (lambda sheet: sheet.clear(), "KeyError"),
        (_changed("version", 2), "version 2"),
        (_changed("candidates", []), "damaged"),
        (_changed("candidates", [{"name": "x"}]), "damaged"),
        (_changed("options", ["batch"]), "damaged"),
        (_changed("batch", "many"), "damaged"),
        (_changed("seconds", -1), "damaged"),
        (_changed("max_drop", "a lot"), "damaged"),
        (lambda sheet: sheet.update(target="cpu", options={}), "not built on another machine"),
        (_changed("options", {"colour": "red"}), "colour"),
        (_changed("options", {"batch": 0}), "at least 1"),
        (lambda sheet: sheet["candidates"][1].update(file="x.onnx"), "damaged"),
        (lambda sheet: sheet["candidates"][1].update(sha256={"float16.onnx": "0"}), "sha256"),
        (
            lambda sheet: sheet["candidates"][1].update(
                file="../float16.onnx", sha256={"../float16.onnx": "0"}
            ),
            "no file beside it",
        ),
    ],
)
def test_a_damaged_build_sheet_is_refused(
    cli: Cli, copied: Path, damage: Callable[[dict[str, Any]], object], part: str
) -> None:
    path = copied / "build.json"
    sheet = json.loads(path.read_text())
    damage(sheet)
    path.write_text(json.dumps(sheet))
    # With the hash in the report, too: as somebody would who edits the sheet on purpose.
    report = report_of(copied)
    report["files"]["build.json"] = sha256_file(path)
    (copied / "report.json").write_text(json.dumps(report))
    result = cli("build", copied)
    assert result.code == USAGE
    assert part in result.err


@pytest.mark.parametrize("text", ["", "[]", "{", "null", "7", '"x"', '{"version": 1}'])
def test_a_build_sheet_that_is_none_is_refused(cli: Cli, copied: Path, text: str) -> None:
    (copied / "build.json").write_text(text)
    result = cli("build", copied)
    assert result.code == USAGE
    assert "damaged" in result.err


def test_a_sheet_that_was_edited_is_no_longer_the_one_of_the_report(cli: Cli, copied: Path) -> None:
    path = copied / "build.json"
    path.write_text(path.read_text().replace('"seconds": 10.0', '"seconds": 20.0'))
    result = cli("build", copied)
    assert result.code == USAGE
    assert "build.json is not what was written" in result.err


@pytest.mark.parametrize("name", ["int8.onnx", "recipe.yaml"])
def test_a_file_that_was_changed_is_named(cli: Cli, copied: Path, name: str) -> None:
    with (copied / name).open("ab") as stream:
        stream.write(b"\n")
    result = cli("build", copied)
    assert result.code == USAGE
    assert f"{name} is not what was written" in result.err


def test_a_directory_without_a_sheet_is_refused(cli: Cli, tmp_path: Path, copied: Path) -> None:
    assert "no artifact" in cli("build", tmp_path / "nothing").err
    (copied / "build.json").unlink()
    assert "no readable build.json" in cli("build", copied).err


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGKILL], ids=["ctrl-c", "kill"])
def test_a_preparation_that_ends_early_leaves_nothing(
    tiny_onnx: Path, tmp_path: Path, kind: signal.Signals
) -> None:
    command = [sys.executable, "-m", "compress.cli", "run", str(tiny_onnx), "--target", "tensorrt"]
    running = subprocess.Popen(
        [*command, "--out", "artifact"], cwd=tmp_path, stderr=subprocess.PIPE, text=True
    )
    assert running.stderr is not None
    assert running.stderr.readline()  # work has started
    running.send_signal(kind)
    _, err = running.communicate(timeout=60)
    if kind == signal.SIGINT:
        assert running.returncode == STOPPED
        assert "Stopped; no artifact was written" in err
    assert list(tmp_path.iterdir()) == []


def test_build_completes_what_was_prepared(
    cli: Cli, unbuilt: Path, npu: Path, tiny_images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused = cli("build", unbuilt)
    assert refused.code == USAGE
    assert "There is no NPU. Install: a socket driver." in refused.err
    before = report_of(unbuilt)

    monkeypatch.setenv("NPU", "here")
    result = cli("build", unbuilt, "--eval", tiny_images, "--seconds", 0.5)
    after = report_of(unbuilt)
    assert result.code == (0 if after["met"] else NOT_MET), result.err
    assert npu.read_text() == "bbbb"
    assert after["built"] is True
    names = [row["name"] for row in after["candidates"]]
    assert names == ["float32", "npu float16", "npu int8", "npu mixed"]
    assert all(row["timing"]["p50_ms"] > 0 for row in after["candidates"])
    assert after["candidates"][0]["score"]["n"] == 16
    assert "where" not in after["candidates"][0]["score"]
    assert after["chosen"] in names
    assert after["latency"]["notes"][0].startswith("Times are of the device's own clock")
    assert after["gap"]["samples"] == 16
    assert after["target"]["builder"] == {"npu": "1"}
    assert after["prepared"]["headline"] == before["headline"]
    assert after["prepared"]["candidates"] == before["candidates"]
    text = (unbuilt / "report.md").read_text()
    assert "## Before the build" in text
    assert "simulated in ONNX Runtime" in text

    assert {"model.onnx", "timing.cache", *FILES, "build.json"} <= set(os.listdir(unbuilt))
    assert {"model.onnx", *FILES, "build.json"} <= set(after["files"])
    engine = compress.load(unbuilt)
    assert engine({"x": np.zeros((2, 3, 8, 8), np.float32)})["y"].shape == (2, 4)
    assert not list((npu.parent / "cache").iterdir())
    # What is built can be built again, for instance on another machine.
    again = compress.build(unbuilt, seconds=0.5)
    assert again.prepared["headline"] == before["headline"]
    (unbuilt / "model.onnx").write_bytes(b"another engine")
    with pytest.raises(compress.LoadError, match="not what was written"):
        compress.load(unbuilt)


def test_a_stopped_build_leaves_the_artifact_and_is_resumed(
    cli: Cli, unbuilt: Path, npu: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {path.name: path.read_bytes() for path in unbuilt.iterdir()}
    monkeypatch.setenv("NPU", "here")
    monkeypatch.setenv("NPU_STOP", "2")
    stopped = cli("build", unbuilt, "--seconds", 0.5)
    assert stopped.code == STOPPED
    assert npu.read_text() == "bb"
    now = {path.name: path.read_bytes() for path in unbuilt.iterdir()}
    assert now == before | {"timing.cache": b"learnt"}

    monkeypatch.delenv("NPU_STOP")
    # One of the two engines was damaged meanwhile, so it is built again.
    damaged = sorted((npu.parent / "cache").iterdir())[0] / "model.onnx"
    damaged.write_bytes(b"something else")
    result = cli("build", unbuilt, "--seconds", 0.5)
    assert result.code in (0, NOT_MET), result.err
    assert npu.read_text() == "bbbbb"
    assert "judged in simulation alone" in result.out


def test_a_candidate_that_cannot_be_built_costs_itself(
    cli: Cli, unbuilt: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NPU", "here")
    monkeypatch.setenv("NPU_HALF", "no")
    result = cli("build", unbuilt, "--seconds", 0.5, "--json")
    assert result.code in (0, NOT_MET), result.err
    report = json.loads(result.out)["report"]
    assert [row["name"] for row in report["candidates"]] == ["float32", "npu int8"]
    assert "npu float16 failed: There are no halves." in report["headline"]


def test_the_budget_can_be_given_when_it_is_built(
    cli: Cli, unbuilt: Path, npu: Path, tiny_images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NPU", "here")
    given = ("build", unbuilt, "--seconds", 0.5)
    refused = cli(*given, "--max-drop", "1%")
    assert refused.code == USAGE
    assert "--eval" in refused.err
    assert not npu.exists()
    budget = ("--max-drop", "2%", "--min-speedup", 900)
    assert cli(*given, "--eval", tiny_images, *budget).code == NOT_MET
    assert report_of(unbuilt)["budget"] == {"max_drop": "2%", "min_speedup": 900}


def test_where_the_hardware_is_run_builds_at_once(
    cli: Cli,
    npu: Path,
    tiny_onnx: Path,
    tiny_images: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("NPU", "here")
    out = tmp_path / "at-once"
    given = ("run", tiny_onnx, "--target", "npu", "--calibration", tiny_images, "--seconds", 0.5)
    result = cli(*given, "--out", out)
    assert result.code in (0, NOT_MET), result.err
    assert npu.read_text() == "bbbb"
    assert report_of(out)["built"] is True
    assert compress.load(out).outputs == ("y",)


def test_an_accuracy_that_is_lost_is_repaired_in_simulation(
    cli: Cli, unbuilt: Path, tiny_onnx: Path, tiny_images: Path, tmp_path: Path
) -> None:
    """The evaluation is a function that wants int8 to be nearly float."""
    scorer = tmp_path / "scorer.py"
    scorer.write_text(
        "import numpy as np\n"
        f"x = np.load({str(tiny_images)!r})['x']\n"
        "first = []\n"
        "def score(engine):\n"
        "    y = engine({'x': x})['y']\n"
        "    first.append(y)\n"
        "    return 1 - float(np.abs(y - first[0]).max())\n"
    )
    sys.path.insert(0, str(tmp_path))
    try:
        out = tmp_path / "repaired"
        given = ("run", tiny_onnx, "--target", "npu", "--calibration", tiny_images)
        budget = ("--eval", "scorer:score", "--max-drop", "0.1%", "--repair-time", 1)
        assert cli(*given, *budget, "--out", out).code == PREPARED
    finally:
        sys.path.remove(str(tmp_path))
        sys.modules.pop("scorer", None)
    report = report_of(out)
    assert report["ladder"][0]["rung"] == "unrepaired"
    assert len(report["ladder"]) > 1
    assert "int8 lost more" in " ".join(report["headline"]) or "could not be repaired" in " ".join(
        report["headline"]
    )
