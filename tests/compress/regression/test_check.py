"""`compress check` and `compress baseline` from end to end, on tiny models."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import compress
from compress.errors import LoadError, UsageError
from compress.exits import CANNOT_TELL, NOT_MET, USAGE
from compress.machine import fingerprint, this_machine
from compress.regression.budgets import load_budget
from compress.regression.fixed import Scores, accuracy_rows
from compress.regression.limits import Limit
from compress.regression.lock import measuring_alone
from compress.regression.record import RECORD, read_record

Cli = Callable[..., Any]
HASTY = ("--time", "0.5", "--threads", "1")
"""Too short for any verdict on latency."""


@pytest.fixture(autouse=True)
def _outside_of_github(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("GITHUB_ACTIONS", "GITHUB_STEP_SUMMARY", "GITHUB_OUTPUT"):
        monkeypatch.delenv(name, raising=False)


def rows(text: str) -> dict[tuple[str, str], dict[str, Any]]:
    return {(row["metric"], row["limit"]): row for row in json.loads(text)["rows"]}


@pytest.mark.usefixtures("short_pairs")
def test_a_model_keeps_the_budget_of_its_own_baseline(
    cli: Cli, tiny_onnx: Path, tiny_images: Path, recorded: Path, tmp_path: Path
) -> None:
    files = ("--junit", tmp_path / "check.xml", "--markdown", tmp_path / "check.md")
    given = ("check", tiny_onnx, "--against", recorded, "--eval", tiny_images)
    result = cli(*given, "--max-slowdown", "100%", *files)
    assert result.code == 0, result.err
    assert "PASS" in result.out
    assert "at most +100 %" in result.out
    (suite,) = ElementTree.parse(tmp_path / "check.xml").getroot()
    assert int(suite.get("failures", "-1")) == 0
    assert "### Compression check: pass" in (tmp_path / "check.md").read_text()


@pytest.mark.usefixtures("short_pairs")
def test_a_slower_larger_model_fails(
    cli: Cli, slow_onnx: Path, recorded: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "summary.md"))
    budget = tmp_path / "budgets.yaml"
    budget.write_text("budget: 1\nlimits:\n  - size: {max_growth: 10%}\n")
    result = cli("check", slow_onnx, "--against", recorded, "--budget", budget, "--json")
    assert result.code == NOT_MET, result.err
    found = json.loads(result.out)
    assert found["verdict"] == "fail"
    assert not found["ok"]
    verdicts = {row["metric"]: row["verdict"] for row in found["rows"] if row["limit"]}
    assert verdicts == {"latency_p50": "fail", "size": "fail"}
    ratio = next(row for row in found["rows"] if row["metric"] == "latency_p50")
    assert 1.5 < ratio["low"] < ratio["value"] < ratio["high"]
    assert result.err.count("::error title=compress check::") == 2
    assert "Compression check: fail" in (tmp_path / "summary.md").read_text()


@pytest.mark.parametrize(("policy", "code"), [("pass", 0), ("fail", CANNOT_TELL)])
def test_cannot_tell_is_said_and_does_what_it_is_told(
    cli: Cli, tiny_onnx: Path, policy: str, code: int
) -> None:
    given = ("check", tiny_onnx, "--against", tiny_onnx, *HASTY, "--cannot-tell", policy)
    result = cli(*given)
    assert result.code == code
    assert "Attention: CANNOT TELL" in result.err
    assert f"--cannot-tell {policy}" in result.err
    assert "Give --time" in result.out


def test_limits_that_need_no_clock_are_judged_in_any_time(
    cli: Cli, tiny_onnx: Path, tiny_images: Path, recorded: Path, tmp_path: Path
) -> None:
    budget = tmp_path / "budgets.yaml"
    budget.write_text(
        "budget: 1\n"
        "limits:\n"
        "  - accuracy: {min: 99.99%, max_drop: 0.5 points}\n"
        "    size: {max: 1 B, max_growth: 0%}\n"
        "    peak_memory: {max: 1 GB, max_growth: 0%}\n"
        "  - {machine: '000000000000', note: a phone, latency_p90: {max: 1 ms}}\n"
        "  - {target: openvino, size: {max: 1 GB}}\n"
    )
    given = ("check", tiny_onnx, "--against", recorded, "--budget", budget, *HASTY, "--json")
    result = cli(*given, "--eval", tiny_images)
    assert result.code == NOT_MET, result.err
    found = rows(result.out)
    assert found["accuracy", "at least 99.99%"]["verdict"] == "fail"
    assert found["accuracy", "loses at most 0.5 points"]["verdict"] == "pass"
    assert found["accuracy", "loses at most 0.5 points"]["value"] == 0
    assert found["size", "at most 1 B"]["verdict"] == "fail"
    assert found["size", "at most +0 %"]["value"] == 1
    assert found["peak_memory", "at most +0 %"]["verdict"] == "pass"
    assert found["peak_memory", "at most 1000.00 MB"]["verdict"] == "pass"
    away = found["latency_p90", "at most 1 ms"]
    assert away["verdict"] == "not judged here"
    assert "a phone" in away["reason"]


def test_without_eval_an_accuracy_is_that_of_a_record_or_unknown(
    cli: Cli, tiny_onnx: Path, recorded: Path, tmp_path: Path
) -> None:
    budget = tmp_path / "budgets.yaml"
    budget.write_text("budget: 1\nlimits: [{accuracy: {min: 1%, max_drop: 1%}}]\n")
    given = ("--against", tiny_onnx, "--budget", budget, *HASTY, "--json")
    unknown = rows(cli("check", tiny_onnx, *given).out)
    assert unknown["accuracy", "at least 1.00%"]["verdict"] == "cannot tell"
    assert "--eval" in unknown["accuracy", "at least 1.00%"]["reason"]
    known = rows(cli("check", recorded, *given).out)
    assert known["accuracy", "at least 1.00%"]["verdict"] == "pass"
    assert "Recorded on images.npz" in known["accuracy", "at least 1.00%"]["reason"]
    assert "baseline is not known" in known["accuracy", "loses at most 1 points"]["reason"]


def test_two_records_of_the_same_files_differ_by_nothing(
    cli: Cli, recorded: Path, baseline: Path
) -> None:
    given = ("--max-drop", "100%", *HASTY, "--json")
    found = rows(cli("check", recorded, "--against", baseline, *given).out)
    row = found["accuracy", "loses at most 100 points"]
    assert row["verdict"] == "pass"
    assert (row["low"], row["value"], row["high"]) == (0, 0, 0)  # the same files
    record = json.loads((baseline / RECORD).read_text())
    record["accuracy"]["sha256"] = "of other data"
    (baseline / RECORD).write_text(json.dumps(record))
    found = rows(cli("check", recorded, "--against", baseline, *given).out)
    assert "different data" in found["accuracy", "loses at most 100 points"]["reason"]


def test_two_records_of_the_same_data_are_compared_without_pairs() -> None:
    score = {"value": 0.9, "unit": "top-1", "n": 400, "data": "images.npz", "sha256": "1"}
    limit = Limit("accuracy", "max_drop", 0.05)
    (row,) = accuracy_rows(Scores(score, score), [limit], None)
    assert row.verdict == "pass"
    assert row.low is not None
    assert row.high is not None
    # Two binomial errors of 1.5 points each.
    assert row.low == pytest.approx(-1.96 * 100 * (2 * 0.09 / 400) ** 0.5, rel=0.01)
    assert row.high == pytest.approx(-row.low)


@pytest.mark.usefixtures("short_pairs")
def test_absolute_limits_are_judged_on_their_machine_alone(tiny_onnx: Path) -> None:
    here = fingerprint(this_machine())
    limit = {"latency_p50": {"max": "10 s"}}
    found = compress.check(tiny_onnx, budget={"machine": here, **limit}, threads=1)
    assert found.verdict == "pass"
    assert found.baseline == ""
    (row,) = [row for row in found.rows if row.limit]
    assert row.unit == "ms"
    assert row.low is not None
    away = compress.check(tiny_onnx, budget={"machine": "0", **limit}, threads=1)
    assert (away.verdict, away.ok) == ("cannot tell", True)
    assert "nothing could be judged" in away.headline


def test_a_baseline_of_another_machine_and_release_is_noted(
    cli: Cli, tiny_onnx: Path, baseline: Path
) -> None:
    record = json.loads((baseline / RECORD).read_text())
    record["machine"] |= {"fingerprint": "000000000000", "cpu": "Cortex"}
    record["versions"]["onnxruntime"] = "1.0"
    (baseline / RECORD).write_text(json.dumps(record))
    result = cli("check", tiny_onnx, "--against", baseline, *HASTY)
    assert "recorded on another machine (Cortex, 000000000000)" in result.out
    assert "onnxruntime 1.0, now" in result.out


def other_input(path: Path, folder: Path) -> Path:
    model = onnx.load(path)
    model.graph.input[0].type.tensor_type.shape.dim[2].dim_value = 16
    model.graph.input[0].type.tensor_type.shape.dim[3].dim_value = 16
    onnx.save(model, folder / "other.onnx")
    return folder / "other.onnx"


@pytest.mark.parametrize(
    ("damage", "part"),
    [
        ("input", "only models with the same inputs"),
        ("missing", "no_such"),
        ("changed", "is not what was written"),
        ("gone", "tiny.onnx is missing"),
        ("record", "is damaged"),
        ("newer", "schema version 99"),
        ("escape", "is damaged"),
        ("folder", "neither an artifact"),
        ("budget", "Did you mean"),
    ],
)
def test_what_cannot_be_checked_is_an_error_with_a_junit_file(
    cli: Cli, tiny_onnx: Path, baseline: Path, tmp_path: Path, damage: str, part: str
) -> None:
    candidate, model, record = tiny_onnx, baseline / "model" / "tiny.onnx", baseline / RECORD
    budget = tmp_path / "budgets.yaml"
    name = "latency_p5" if damage == "budget" else "latency_p50"
    budget.write_text(f"budget: 1\nlimits: [{{{name}: {{max_slowdown: 5%}}}}]\n")
    match damage:
        case "input":
            candidate = other_input(tiny_onnx, tmp_path)
        case "missing":
            candidate = tmp_path / "no_such"
        case "changed":
            model.write_bytes(model.read_bytes()[:-1] + b"x")
        case "gone":
            model.unlink()
        case "record":
            record.write_text(record.read_text()[:-40])
        case "newer":
            record.write_text(json.dumps(json.loads(record.read_text()) | {"schema_version": 99}))
        case "escape":
            outside = json.loads(record.read_text()) | {"file": "../../etc/passwd"}
            record.write_text(json.dumps(outside))
        case "folder":
            record.unlink()
    junit = tmp_path / "check.xml"
    given = ("check", candidate, "--against", baseline, "--budget", budget, "--junit", junit)
    result = cli(*given, *HASTY)
    assert result.code == USAGE, result.out
    assert part in result.err
    assert "Traceback" not in result.err
    (suite,) = ElementTree.parse(junit).getroot()
    assert suite.get("errors") == "1"
    assert part in (suite.findtext("testcase/error") or "")


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ((), "--against"),
        (("--against", "x", "--max-slowdown", "5"), "--max-slowdown 5"),
        (("--against", "x", "--max-drop", "0.5"), "% sign"),
        (("--against", "x", "--cannot-tell", "maybe"), "maybe"),
        (("--against", "x", "--time", "0.1"), "--time"),
        (("--against", "x", "--budget", "none.yaml"), "none.yaml"),
    ],
    ids=lambda value: " ".join(value) or "nothing" if isinstance(value, tuple) else None,
)
def test_wrong_options(cli: Cli, arguments: tuple[str, ...], part: str) -> None:
    result = cli("check", "model.onnx", *arguments)
    assert result.code == USAGE
    assert part in result.err


def test_options_in_python_are_refused_as_well(tiny_onnx: Path) -> None:
    with pytest.raises(UsageError, match="choose pass or fail"):
        compress.check(tiny_onnx, tiny_onnx, cannot_tell="maybe")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="out of range"):
        compress.check(tiny_onnx, tiny_onnx, seconds=float("nan"))
    with pytest.raises(UsageError, match="--max-slowdown -1"):
        compress.check(tiny_onnx, tiny_onnx, max_slowdown=-1)


def test_a_record_holds_what_was_measured_and_runs_again(
    recorded: Path, tiny_onnx: Path, tiny_images: Path
) -> None:
    record = read_record(recorded)
    found = record.latency
    assert found["sessions"] >= 7
    for quantile in ("p50_ms", "p90_ms"):
        assert 0 < found[quantile]["low"] <= found[quantile]["value"] <= found[quantile]["high"]
    assert found["p50_ms"]["value"] <= found["p90_ms"]["value"]
    assert record.machine["fingerprint"] == fingerprint(this_machine())
    assert record.threads == 1
    assert record.accuracy is not None
    assert record.accuracy["n"] == 16
    assert len(record.accuracy["sha256"]) == 64
    copy = record.model_path(recorded)
    assert copy.read_bytes() == tiny_onnx.read_bytes()
    labels = np.load(tiny_images)["y"]
    engine = compress.artifact.open_engine(copy)  # type: ignore[attr-defined]
    right = engine({"x": np.load(tiny_images)["x"]})["y"].argmax(1) == labels
    assert record.accuracy["value"] == pytest.approx(right.mean())


def test_a_starting_budget_holds_what_was_measured(recorded: Path) -> None:
    record = read_record(recorded)
    budget = load_budget(recorded.parent / "budgets.yaml")
    applied = budget.applied(record.targets, record.machine["fingerprint"])
    found = {(one.metric, one.kind): one.value for one in applied.limits}
    for quantile, most in (("p50", 1.13), ("p90", 1.28)):
        high = record.latency[f"{quantile}_ms"]["high"]
        assert high * 1.05 < found[f"latency_{quantile}", "max"] < high * most
    assert found["latency_p50", "max_slowdown"] == 0.025
    assert record.size_bytes < found["size", "max"] < record.size_bytes * 1.1
    assert record.accuracy is not None
    least = record.accuracy["value"] - 0.01
    assert found["accuracy", "min"] == pytest.approx(max(0, least), abs=1e-4)
    assert applied.elsewhere == ()
    assert budget.applied(record.targets, "another").elsewhere


@pytest.mark.usefixtures("short_pairs")
def test_nothing_is_replaced_without_force(
    cli: Cli, tiny_onnx: Path, baseline: Path, tmp_path: Path
) -> None:
    before = (baseline / RECORD).read_bytes()
    again = ("baseline", tiny_onnx, "--out", baseline, "--seconds", "0.1", "--threads", "1")
    refused = cli(*again)
    assert refused.code == USAGE
    assert "--force" in refused.err
    budget = tmp_path / "mine.yaml"
    budget.write_text("mine")
    refused = cli("baseline", tiny_onnx, "--out", tmp_path / "new", "--budget", budget)
    assert refused.code == USAGE
    assert budget.read_text() == "mine"
    assert not (tmp_path / "new").exists()
    assert (baseline / RECORD).read_bytes() == before
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("years of work")
    refused = cli("baseline", tiny_onnx, "--out", foreign, "--force")
    assert refused.code == USAGE
    assert (foreign / "thesis.txt").exists()
    done = cli(*again, "--budget", budget, "--force", "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["directory"] == str(baseline)
    assert load_budget(budget).entries
    assert (baseline / RECORD).read_bytes() != before


@pytest.mark.parametrize("source", ["no_such.onnx", "baseline"])
def test_a_baseline_of_nothing_leaves_nothing(
    cli: Cli, baseline: Path, tmp_path: Path, source: str
) -> None:
    result = cli("baseline", tmp_path / source, "--out", tmp_path / "new")
    assert result.code == USAGE
    assert not (tmp_path / "new").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["baseline"]


def test_a_check_waits_for_another_and_says_if_it_gives_up() -> None:
    with measuring_alone() as first, measuring_alone(longest=0.2) as second:
        assert first == ()
        (note,) = second
        assert "both ran together" in note
    with measuring_alone(longest=0) as third:
        assert third == ()


def test_a_damaged_record_is_a_load_error(baseline: Path) -> None:
    (baseline / RECORD).write_text("[]")
    with pytest.raises(LoadError, match="damaged"):
        read_record(baseline)
