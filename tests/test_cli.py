from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from compress.errors import CompressError, UsageError
from compress.exits import NOT_MET, STOPPED, UNEXPECTED, USAGE, explain
from compress.render import count, size

COMMANDS = (
    *("run", "build", "inspect", "profile", "explain", "plot"),
    *("bench", "compare", "check", "baseline", "targets", "passes", "doctor"),
)
Cli = Callable[..., Any]
QUICK = ("--time", 0, "--seconds", 0.5)


@pytest.fixture(scope="module", autouse=True)
def _home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The cache belongs to the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(tmp_path_factory.mktemp("home")))
        yield


def test_help_lists_every_command(cli: Cli) -> None:
    result = cli("--help")
    assert result.code == 0
    assert all(f"\n  {name} " in result.out for name in COMMANDS)
    assert "..." not in result.out.split("Commands:")[1].split("Start here")[0]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command_ends_with_examples(cli: Cli, command: str) -> None:
    result = cli(command, "--help")
    assert result.code == 0
    examples = result.out.split("Examples:\n")[1].strip().splitlines()
    assert len(examples) >= 2
    assert all(line.strip().startswith(f"compress {command}") for line in examples)


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["walk"], "walk"),
        (["run", "m.onnx", "--bit", "8"], "--bit"),
        (["run", "m.onnx", "--bits", "eight"], "--bits"),
        (["run", "m.onnx", "--threads", "0"], "--threads"),
        (["run", "m.onnx", "--method", "max"], "minmax"),
        (["run", "m.onnx", "--objective", "speed"], "throughput"),
        (["run", "m.onnx", "--batch", "0"], "--batch"),
        (["run", "m.onnx", "--time", "-1"], "--time"),
        (["run", "m.onnx", "--target-option", "fast"], "NAME=VALUE"),
        (["run", "m.onnx", "--target-option", "speed=2"], "no option speed"),
        (["build"], "DIR"),
        (["bench"], "A"),
        (["run", "m.onnx", "--mean", "0.5,x"], "0.485,0.456,0.406"),
        (["run", "m.onnx", "--input", "1x3x-2"], "1x3x224x224"),
        (["inspect", "no_such_file.onnx"], "no_such_file.onnx"),
        (["bench", "no_such_file.onnx"], "no_such_file.onnx"),
        (["profile", "no_such_file.onnx"], "no_such_file.onnx"),
        (["run", "no_such_file.onnx"], "no_such_file.onnx"),
        (["run"], "--model"),
    ],
    ids=lambda value: " ".join(value) or "nothing" if isinstance(value, list) else None,
)
def test_wrong_usage_is_a_sentence_and_code_2(cli: Cli, arguments: list[str], part: str) -> None:
    result = cli(*arguments)
    assert result.code == USAGE
    assert part in result.err
    assert result.out == ""
    assert "Traceback" not in result.err


def test_an_unknown_target_is_named_with_those_that_exist(cli: Cli, tiny_onnx: Path) -> None:
    result = cli("run", tiny_onnx, "--target", "cpi")
    assert result.code == USAGE
    assert "Did you mean 'cpu'" in result.err


@pytest.mark.parametrize("switch", ["--debug", "COMPRESS_DEBUG"])
def test_debug_shows_the_traceback(switch: str) -> None:
    flags = [switch] if switch.startswith("--") else []
    environment = os.environ | ({} if flags else {switch: "1"})
    command = [sys.executable, "-m", "compress.cli", "run", "m.onnx", "--mean", "x", *flags]
    ran = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert ran.returncode == USAGE
    assert "Traceback" in ran.stderr
    assert ran.stderr.splitlines()[-1].startswith("Error: --mean 'x'")


@pytest.mark.parametrize(
    ("error", "code", "part"),
    [
        (KeyboardInterrupt(), STOPPED, "no artifact was written"),
        (UsageError("one sentence"), USAGE, "Error: one sentence"),
        (CompressError("one sentence"), USAGE, "Error: one sentence"),
        (OSError(errno.ENOSPC, "No space left on device", "a/b"), USAGE, "free space"),
        (PermissionError(errno.EACCES, "Permission denied", "a/b"), USAGE, "'a/b'"),
        (MemoryError(), UNEXPECTED, "ran out of memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), UNEXPECTED, "out of memory"),
        (ZeroDivisionError("division by zero"), UNEXPECTED, "Unexpected ZeroDivisionError"),
        (AssertionError(), UNEXPECTED, "no message"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
)
def test_every_exception_becomes_one_paragraph(error: BaseException, code: int, part: str) -> None:
    found, message = explain(error)
    assert found == code
    assert part in message
    assert "\n" not in message


def test_targets_as_json(cli: Cli) -> None:
    rows = json.loads(cli("targets", "--json").out)
    assert {"cpu", "onnxruntime", "openvino"} <= {row["name"] for row in rows}
    (cpu,) = [row for row in rows if row["name"] == "cpu"]
    assert cpu["available"] is True
    assert cpu["provider"].startswith("hwcompress ")


def test_passes_as_json_show_options_and_defaults(cli: Cli) -> None:
    rows = {row["name"]: row for row in json.loads(cli("passes", "--json").out)}
    assert rows["quantize"]["stage"] == "onnx"
    assert rows["quantize"]["options"]["bits"] == "8"
    assert rows["fold_batchnorm"]["description"].endswith(".")


def test_doctor_as_json(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    facts = json.loads(cli("doctor", "--json").out)
    assert facts["directory"] == {"path": str(tmp_path), "writable": True}
    assert {"torch", "onnxruntime", "hwcompress"} <= set(facts["versions"])
    assert facts["machine"]["cores"] >= 1


@pytest.mark.parametrize("command", ["targets", "passes", "doctor"])
def test_tables_name_what_the_json_names(cli: Cli, command: str) -> None:
    result = cli(command)
    assert result.code == 0
    assert ("quantize" if command == "passes" else "cpu") in result.out


def test_a_broken_plugin_is_listed_and_the_rest_still_works(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = tmp_path / "acme-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: acme\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[compress.targets]\nnpu = acme_missing:NPU\n")
    monkeypatch.syspath_prepend(tmp_path)
    rows = {row["name"]: row for row in json.loads(cli("targets", "--json").out)}
    assert rows["cpu"]["available"] is True
    assert rows["npu"]["available"] is False
    assert "acme 1.0 is broken: ModuleNotFoundError" in rows["npu"]["reason"]


def test_inspect_counts_what_the_shapes_say(cli: Cli, tiny_onnx: Path) -> None:
    found = json.loads(cli("inspect", tiny_onnx, "--json").out)
    assert found["totals"]["macs"] == 8 * 8 * 8 * 3 * 3 * 3 + 8 * 4
    assert found["totals"]["parameters"] == 8 * 27 + 8 + 8 * 4 + 4
    assert [site["name"] for site in found["sites"]] == ["conv", "relu", "pool", "flatten", "fc"]
    table = cli("inspect", tiny_onnx)
    assert table.code == 0
    assert "13.9k MACs" in table.out


def test_bench_measures_every_model_in_turns(cli: Cli, tiny_onnx: Path) -> None:
    result = cli("bench", tiny_onnx, tiny_onnx, "--seconds", "0.3", "--threads", "1", "--json")
    assert result.code == 0, result.err
    found = json.loads(result.out)
    assert found["baseline"] == str(tiny_onnx)
    assert list(found["timings"]) == [str(tiny_onnx), f"{tiny_onnx} (2)"]
    assert all(timing["p50_ms"] > 0 for timing in found["timings"].values())


def test_compare_with_itself_finds_no_difference(
    cli: Cli, tiny_onnx: Path, tiny_images: Path
) -> None:
    given = ("compare", tiny_onnx, tiny_onnx, "--eval", tiny_images, "--seconds", "0.3")
    found = json.loads(cli(*given, "--json").out)
    assert found["fidelity"]["max_abs_difference"] == 0
    assert found["drop"]["points"] == 0
    assert found["scores"][0] == found["scores"][1]
    table = cli(*given)
    assert table.code == 0, table.err
    assert "top-1 agreement" in table.out


def test_profile_shows_the_runtimes_side_by_side(cli: Cli, tiny_onnx: Path, tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    out = tmp_path / "profile.json"
    result = cli("profile", tiny_onnx, "--threads", "1", "--runs", "3", "--out", out)
    assert result.code == 0, result.err
    found = json.loads(out.read_text())
    shares: dict[str, float] = defaultdict(float)
    for row in found["rows"]:
        shares[row["runtime"]] += row["share"]
    assert shares == {"onnxruntime": pytest.approx(1), "openvino": pytest.approx(1)}
    layers = {row["site"]: row for row in found["layers"]}
    assert next(iter(layers)) == "conv"
    for site in ("conv", "fc"):
        assert set(layers[site]["p50_us"]) == {"onnxruntime", "openvino"}
        assert set(layers[site]["precision"].values()) == {"float32"}
    assert layers["conv"]["macs"] == 8 * 8 * 8 * 3 * 3 * 3
    for runtime in shares:
        spent = sum(row["p50_us"].get(runtime, 0) for row in found["layers"])
        rows = [row["p50_us"] for row in found["rows"] if row["runtime"] == runtime]
        assert spent == pytest.approx(sum(rows))
    header, *lines = result.out.splitlines()
    assert header.split()[-5:] == ["onnxruntime", "µs", "openvino", "µs", "faster"]
    (conv,) = [line.split() for line in lines if line.startswith("conv ")]
    assert conv[1] == "Conv"
    assert any(line.startswith("sum ") for line in lines)


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_profile_of_one_runtime_prints_and_writes_every_kernel(
    cli: Cli, tiny_onnx: Path, tmp_path: Path, runtime: str
) -> None:
    pytest.importorskip(runtime)
    out = tmp_path / "profile.json"
    given = ("--target", runtime, "--threads", "1", "--runs", "3", "--out", out)
    result = cli("profile", tiny_onnx, *given)
    assert result.code == 0, result.err
    found = json.loads(out.read_text())
    assert found["layers"] == []
    assert {row["runtime"] for row in found["rows"]} == {runtime}
    assert sum(row["share"] for row in found["rows"]) == pytest.approx(1)
    assert {"conv", "fc"} <= {row["site"] for row in found["rows"]}
    assert result.out.split()[:3] == ["kernel", "operator", "precision"]
    assert any(line.startswith("conv ") for line in result.out.splitlines())


def test_profile_into_a_missing_folder_is_refused(
    cli: Cli, tiny_onnx: Path, tmp_path: Path
) -> None:
    out = tmp_path / "missing" / "profile.json"
    result = cli("profile", tiny_onnx, "--runs", "1", "--out", out)
    assert result.code == USAGE
    assert "missing" in result.err


def test_run_writes_an_artifact_that_loads(
    cli: Cli, tiny_onnx: Path, tiny_images: Path, tmp_path: Path
) -> None:
    import compress

    out = tmp_path / "artifact"
    given = ("run", tiny_onnx, "--calibration", tiny_images, "--out", out, *QUICK)
    result = cli(*given, "--json")
    found = json.loads(result.out)
    # A network this small may gain nothing from int8; the code must say what the report says.
    assert result.code == (0 if found["met"] else NOT_MET)
    assert Path(found["directory"]) == out
    assert {"report.json", "report.md", "recipe.yaml"} <= {path.name for path in out.iterdir()}
    engine = compress.load(out)
    outputs = engine({"x": np.zeros((2, 3, 8, 8), np.float32)})
    assert outputs[engine.outputs[0]].shape == (2, 4)

    before = (out / "report.json").read_bytes()
    again = cli(*given)
    assert again.code == USAGE
    assert "--force" in again.err
    assert (out / "report.json").read_bytes() == before
    assert cli(*given, "--force").code in (0, NOT_MET)
    assert (out / "report.json").read_bytes() != before


def test_a_budget_that_is_not_met_is_code_1_with_an_artifact(
    cli: Cli, tiny_onnx: Path, tiny_images: Path, tmp_path: Path
) -> None:
    out = tmp_path / "artifact"
    result = cli(
        *("run", tiny_onnx, "--calibration", tiny_images, "--min-speedup", "50"),
        *("--target", "onnxruntime", "--out", out, *QUICK),
    )
    assert result.code == NOT_MET, result.err
    assert (out / "report.json").is_file()


def test_ctrl_c_leaves_nothing_behind(tiny_onnx: Path, tiny_images: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "compress.cli", "run", str(tiny_onnx), "--seconds", "60"]
    command += ["--calibration", str(tiny_images), "--out", "artifact"]
    running = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    assert running.stderr is not None
    assert running.stderr.readline()  # work has started
    running.send_signal(signal.SIGINT)
    _, err = running.communicate(timeout=60)
    assert running.returncode == STOPPED
    assert "Stopped; no artifact was written" in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0"), (999, "999"), (1000, "1k"), (13856, "13.9k"), (4.1e9, "4.1G"), (2e15, "2e+03T")],
)
def test_counts_have_three_digits(number: float, text: str) -> None:
    assert count(number) == text


@pytest.mark.parametrize(
    ("number_bytes", "text"), [(0, "0 B"), (999, "999 B"), (1024, "1 KiB"), (3 << 30, "3 GiB")]
)
def test_sizes_are_binary(number_bytes: int, text: str) -> None:
    assert size(number_bytes) == text
