"""Artifacts as sides of a check: what their report says of them, and what can be wrong."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import compress
from compress.exits import USAGE
from compress.regression.record import read_record
from compress.regression.recording import record_baseline
from compress.regression.subject import fresh_sides, open_pair, open_subject

Cli = Callable[..., Any]


@pytest.fixture(scope="module")
def made(tiny_onnx: Path, tiny_images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `compress run` writes, for one thread."""
    result = compress.run(
        tiny_onnx,
        target="onnxruntime",
        calibration=str(tiny_images),
        evaluate=str(tiny_images),
        threads=1,
        search_seconds=0,
        repair_seconds=0,
        seconds=0.5,
        out=tmp_path_factory.mktemp("artifacts") / "artifact",
    )
    return result.directory


@pytest.fixture
def artifact(made: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(made, tmp_path / "artifact"))


def report(directory: Path) -> dict[str, Any]:
    return dict(json.loads((directory / "report.json").read_text()))


def test_an_artifact_is_described_by_its_report(made: Path) -> None:
    side, facts = open_subject(made), report(made)
    (chosen,) = [one for one in facts["candidates"] if one["name"] == facts["chosen"]]
    assert side.targets == ("onnxruntime",)
    assert side.size_bytes == chosen["size_bytes"]
    score = side.recorded_score
    assert score is not None
    assert (score["value"], score["n"]) == (chosen["score"]["value"], 16)
    assert score["sha256"] == facts["evaluation"]["sha256"]
    assert side.remarks() == ()


@pytest.mark.parametrize("reason", ["elsewhere", "no data", "no score"])
def test_a_score_that_is_not_the_artifacts_own_is_none(artifact: Path, reason: str) -> None:
    facts = report(artifact)
    chosen = next(one for one in facts["candidates"] if one["name"] == facts["chosen"])
    match reason:
        case "elsewhere":
            chosen["score"]["where"] = "simulated"
        case "no data":
            facts["evaluation"] = {}
        case "no score":
            chosen["score"] = None
    (artifact / "report.json").write_text(json.dumps(facts))
    assert open_subject(artifact).recorded_score is None


def test_an_artifact_for_throughput_says_so(artifact: Path) -> None:
    facts = report(artifact)
    facts["latency"] |= {"objective": "throughput", "batch": 4}
    (artifact / "report.json").write_text(json.dumps(facts))
    side = open_subject(artifact)
    assert any("throughput" in one for one in side.remarks())
    assert side.batch == 4


def test_the_larger_batch_is_timed_where_both_take_any(made: Path, artifact: Path) -> None:
    facts = report(artifact)
    facts["latency"]["batch"] = 4
    (artifact / "report.json").write_text(json.dumps(facts))
    own, other, notes = open_pair(artifact, made)
    assert notes == ()
    assert other is not None
    calls = fresh_sides({"a": own, "b": other}, 0)()
    for call in calls.values():
        outputs = call()
        assert isinstance(outputs, dict)
        assert next(iter(outputs.values())).shape == (4, 4)


def test_a_model_file_runs_with_the_threads_of_the_other_side(made: Path, tiny_onnx: Path) -> None:
    _, _, notes = open_pair(tiny_onnx, made)
    assert notes == (f"{tiny_onnx} runs with --threads 1, as the other side does.",)
    _, _, notes = open_pair(made, tiny_onnx, threads=2)
    assert notes == ()


def test_threads_that_differ_are_noted(made: Path, artifact: Path) -> None:
    facts = report(artifact)
    facts["target"]["options"]["threads"] = 2
    (artifact / "report.json").write_text(json.dumps(facts))
    _, _, notes = open_pair(artifact, made)
    assert any("Threads differ: 2 for" in note for note in notes)


@pytest.mark.usefixtures("short_pairs")
def test_a_baseline_of_an_artifact_keeps_all_its_files(made: Path, tmp_path: Path) -> None:
    out, record = record_baseline(made, tmp_path / "baseline", seconds=0.1)
    assert json.loads(read_record(out).to_json()) == json.loads(record.to_json())
    assert {one.name for one in (out / "model").iterdir()} == set(record.files)
    assert record.file == ""
    assert record.accuracy is not None
    assert record.accuracy["value"] == open_subject(made).recorded_score["value"]  # type: ignore[index]
    assert open_subject(out).targets == ("onnxruntime",)


@pytest.mark.parametrize(
    ("damage", "part"),
    [
        ("changed", "is not what was written"),
        ("runtime", "tensorrt"),
        ("unbuilt", "compress build"),
    ],
)
def test_an_artifact_that_cannot_run_is_an_error(
    cli: Cli, artifact: Path, made: Path, damage: str, part: str
) -> None:
    facts = report(artifact)
    match damage:
        case "changed":
            name = next(iter(facts["files"]))
            (artifact / name).write_bytes((artifact / name).read_bytes() + b"x")
        case "runtime":
            facts["target"] |= {"name": "tensorrt", "options": {}}
        case "unbuilt":
            facts["built"] = False
    (artifact / "report.json").write_text(json.dumps(facts))
    result = cli("check", artifact, "--against", made)
    assert result.code == USAGE
    assert part in result.err
