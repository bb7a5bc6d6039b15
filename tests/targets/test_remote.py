"""Addresses, what devices send, and the tools' command lines: everything but a connection."""

from __future__ import annotations

import ast
import itertools
import json
import os
import stat
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from compress.artifact import open_engine
from compress.errors import DeviceError, UsageError
from compress.remote import Artifact, Packed, measure_on, parse_device, parse_devices
from targets.adb import AdbDevice
from targets.process import Ran, call
from targets.remote import RUNNER
from targets.remote_answer import answer_of, arrays_of, files_of, lines_of, result_of
from targets.remote_folder import new_name, stale
from targets.remote_options import Options
from targets.remote_tools import (
    TOOLS,
    Times,
    parse_executor_runner,
    parse_perf_test,
    parse_trtexec,
    time_in_turns,
)
from targets.ssh import FIXED, SshDevice

PACKED = Packed("a", (Path("model.onnx"),), {}, ("x",), ("y",), 16)


def test_an_address_is_read() -> None:
    device = parse_device("ssh://pi@board.local:2222?python=/opt/venv/bin/python&timeout=600")
    assert isinstance(device, SshDevice)
    assert (device.user, device.host, device.port) == ("pi", "board.local", 2222)
    assert device.options.python == "/opt/venv/bin/python"
    assert device.options.spare_seconds == 600
    assert device.address == "ssh://pi@board.local:2222"
    six = parse_device("ssh://[fe80::1%eth0]")
    assert isinstance(six, SshDevice)
    assert six.host == "fe80::1%eth0"
    assert six.address == "ssh://[fe80::1%eth0]"
    phone = parse_device("adb://192.168.1.9:5555?tools=/data/local/tmp/et")
    assert isinstance(phone, AdbDevice)
    assert phone.serial == "192.168.1.9:5555"
    assert phone.options.tools == "/data/local/tmp/et"
    assert phone.options.folder == "/data/local/tmp"


HOSTILE = [
    "ssh://-oProxyCommand=touch${IFS}x",
    "ssh://-oProxyCommand=touch x",
    "ssh://pi@-oProxyCommand=x",
    "ssh://-l@host",
    "ssh://host;reboot",
    "ssh://host$(reboot)",
    "ssh://host reboot",
    "ssh://host\nProxyCommand x",
    "ssh://pi:secret@host",
    "ssh://pi@host:0",
    "ssh://pi@host:99999",
    "ssh://pi@host/folder",
    "ssh://",
    "ssh://host?python=-c",
    "ssh://host?python=python3;reboot",
    "ssh://host?folder=tmp",
    "ssh://host?folder=/tmp/$(reboot)",
    "ssh://host?timeout=soon",
    "ssh://host?ProxyCommand=x",
    "ssh://host?config=/no/such/file",
    "adb://-s",
    "adb://",
    "adb://serial shell",
    "adb://serial?tools=-x",
    "telnet://host",
    "pixel8",
    "",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_what_a_command_could_misread_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="--device"):
        parse_device(text)


@given(st.text(max_size=30))
def test_an_address_that_is_read_holds_nothing_strange(text: str) -> None:
    try:
        device = SshDevice.parse(f"ssh://{text}")
    except UsageError:
        return
    command = device._client()
    for value in (device.host, device.user or "x"):
        assert not value.startswith("-")
        assert not set(value) & set(" \t\n;&|$`'\"\\<>()*?")
    assert SshDevice.parse(device.address).address == device.address
    assert [f"{key}={value}" for key, value in FIXED.items()] == [
        option for flag, option in itertools.pairwise(command) if flag == "-o"
    ]


def test_a_device_cannot_be_given_twice() -> None:
    with pytest.raises(UsageError, match="given twice"):
        parse_devices(["ssh://pi@host", "ssh://pi@host?timeout=9"])


def test_a_missing_client_says_how_to_install_it(
    tiny_onnx: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    artifacts = {"a": Artifact(open_engine(tiny_onnx, threads=1))}
    inputs = {"x": np.zeros((1, 3, 8, 8), np.float32)}
    over_ssh, over_adb = measure_on(["ssh://nowhere.invalid", "adb://none"], artifacts, inputs)
    assert "apt install openssh-client" in over_ssh.error
    assert "apt install adb" in over_adb.error


# What a device sends.


def result(**changes: Any) -> dict[str, Any]:
    blocks = {"medians_ms": [1.0, 2.0, 3.0], "p90_ms": 3.0, "runs": 30, "warm": True}
    return {
        "sessions": [{"a": {**blocks, **changes}}],
        "failures": {},
        "outputs": {"a": [["0/output-0.npy", 144]]},
        "machine": {"cpu": "made up", "password": "not wanted"},
        "seconds": 1.0,
    }


def test_numbers_are_read() -> None:
    line = b"noise\nhwcompress-result " + json.dumps(result()).encode() + b"\n"
    answer = answer_of(result_of(Ran(0, line, ""), "device"), [PACKED], "device")
    assert answer.sessions[0]["a"].medians_ms.tolist() == [1, 2, 3]
    assert answer.sessions[0]["a"].runs == 30
    assert answer.machine == {"cpu": "made up"}


@pytest.mark.parametrize(
    "changes",
    [
        {"medians_ms": [1.0, float("nan")]},
        {"medians_ms": [-1.0]},
        {"medians_ms": [[1.0]]},
        {"medians_ms": "fast"},
        {"medians_ms": []},
        {"p90_ms": float("inf")},
        {"p90_ms": None},
        {"runs": "many"},
    ],
    ids=str,
)
def test_numbers_without_sense_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(DeviceError, match="device sent numbers"):
        answer_of(result(**changes), [PACKED], "device")


@pytest.mark.parametrize(
    "changes",
    [
        {"seconds": float("nan")},
        {"machine": {"load": float("nan")}},
        {"machine": {"cpu": "x" * 100_000}},
        {"machine": None},
        {"failures": ["a"]},
        {"sessions": [{}]},
    ],
    ids=["nan seconds", "nan load", "long", "no machine", "list of failures", "empty session"],
)
def test_facts_without_sense_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(DeviceError, match="device sent numbers"):
        answer_of({**result(), **changes}, [PACKED], "device")


@given(st.binary(max_size=200))
def test_any_output_of_a_device_is_a_result_or_an_error(out: bytes) -> None:
    lines_of(out)
    for ran in (Ran(0, out, ""), Ran(0, b"hwcompress-result " + out, "said")):
        with pytest.raises(DeviceError):
            answer_of(result_of(ran, "device"), [PACKED], "device")


def npy(array: np.ndarray, folder: Path, pickled: bool = False) -> bytes:
    path = folder / "array.npy"
    np.save(path, array, allow_pickle=pickled)
    return path.read_bytes()


def test_outputs_are_read_and_never_unpickled(tmp_path: Path) -> None:
    content = npy(np.arange(4, dtype=np.float32), tmp_path)
    files = [("0/output-0.npy", len(content))]
    assert arrays_of(content, files, PACKED, "device")["y"].tolist() == [0, 1, 2, 3]
    for bad in (content[:-3], b"", b"\x93NUMPY", npy(np.array([{}]), tmp_path, pickled=True)):
        with pytest.raises(DeviceError, match="damaged outputs"):
            arrays_of(bad, [("0/output-0.npy", len(bad))], PACKED, "device")
    with pytest.raises(DeviceError, match="damaged outputs"):
        arrays_of(content * 2, files * 2, PACKED, "device")


@pytest.mark.parametrize(
    "files", [[["/etc/passwd", 3]], [["0/output-0.npy", 10**9]], [["0/output-0.npy"]], "x", 3]
)
def test_names_and_sizes_of_outputs_are_checked(files: Any) -> None:
    with pytest.raises(DeviceError, match="outputs"):
        files_of({"outputs": {"a": files}}, PACKED, "device")


def test_names_of_folders_say_whose_they_are() -> None:
    ours, other = new_name(), f"hwcompress-00000000-1-{'0' * 16}"
    assert ours != new_name()
    assert stale([ours, other, "hwcompress-x"], []) == []
    assert stale([ours, other, "hwcompress-x"], [other, "hwcompress-x"]) == [other]


# The command that reaches a device.


def test_a_command_ends_in_time_and_when_told() -> None:
    stop = threading.Event()
    with pytest.raises(TimeoutError):
        call(["sleep", "9"], timeout_seconds=0.1, stop=stop)
    with pytest.raises(DeviceError, match="more than 1000 bytes"):
        call(["yes"], timeout_seconds=9, stop=stop, most_bytes=1000)
    stop.set()
    with pytest.raises(DeviceError, match="Stopped"):
        call(["sleep", "9"], timeout_seconds=9, stop=stop)


def test_a_held_stdin_stays_open_for_as_long_as_the_command_runs() -> None:
    code = "import select, sys; print(len(select.select([sys.stdin], [], [], 0.2)[0]))"
    command, stop = [sys.executable, "-S", "-c", code], threading.Event()
    assert call(command, timeout_seconds=9, stop=stop, hold=True).out == b"0\n"
    assert call(command, timeout_seconds=9, stop=stop).out == b"1\n"


def test_the_runner_is_python_3_8_and_needs_nothing_of_ours() -> None:
    tree = ast.parse(RUNNER.read_text(), feature_version=(3, 8))
    names = {
        alias.name.split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import)
        for alias in node.names
    } | {
        str(node.module).split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
    }
    others = names - set(sys.stdlib_module_names)
    assert others == {"numpy", "onnxruntime", "openvino", "executorch", "torch"}


# The runtimes' tools.

PERF_TEST = """Session creation time cost: 0.0273071 s
First inference time cost: 20 ms
Total inference time cost: 0.14188 s
Total inference requests: 8
Average inference time cost: 17.735 ms
Total inference run time: 0.141991 s
Number of inferences per second: 56.3415
Avg CPU usage: 98 %
Peak working set size: 35299328 bytes
Avg CPU usage:98
Peak working set size:35299328
Runs:8
Min Latency: 0.0159831 s
Max Latency: 0.0232702 s
P50 Latency: 0.0167086 s
P90 Latency: 0.0232702 s
P95 Latency: 0.0232702 s
P99 Latency: 0.0232702 s
P999 Latency: 0.0232702 s
"""
EXECUTOR_RUNNER = """\
I 00:00:00.005262 executorch:executor_runner.cpp:251] Method loaded.
I 00:00:00.006576 executorch:executor_runner.cpp:284] \
Model executed successfully 4 time(s) in 2.500000 ms.
I 00:00:00.006604 executorch:executor_runner.cpp:293] 1 outputs:
"""
EXECUTOR_RUNNER_NEW = """I executorch:executor_runner.cpp:718] Model loaded in 7.85 ms.
I executorch:executor_runner.cpp:880] Iteration 1 of 2: 1.62 ms
I executorch:executor_runner.cpp:880] Iteration 2 of 2: 1.82 ms
I executorch:executor_runner.cpp:889] Model executed successfully 2 time(s) in 3.44 ms.
"""
TRTEXEC = """[09/02/2024-17:14:34] [I] Timing trace has 204 queries over 3.00185 s
[09/02/2024-17:14:34] [I] === Performance summary ===
[09/02/2024-17:14:34] [I] Throughput: 1099.65 qps
[09/02/2024-17:14:34] [I] Latency: min = 1.12085 ms, max = 5.30969 ms, mean = 1.17602 ms, \
median = 1.17322 ms, percentile(90%) = 1.18164 ms, percentile(95%) = 1.18457 ms
[09/02/2024-17:14:34] [I] GPU Compute Time: min = 0.803711 ms, max = 4.93372 ms, \
mean = 0.818735 ms, median = 0.809937 ms, percentile(90%) = 0.811035 ms, \
percentile(95%) = 0.811035 ms, percentile(99%) = 0.812012 ms
"""


def test_the_tools_output_is_read() -> None:
    assert parse_perf_test(PERF_TEST) == Times(pytest.approx(16.7086), pytest.approx(23.2702), 8)
    small = PERF_TEST.replace("0.0167086", "9.53e-05")
    assert parse_perf_test(small).p50_ms == pytest.approx(0.0953)
    assert parse_executor_runner(EXECUTOR_RUNNER) == Times(0.625, None, 4)
    new = parse_executor_runner(EXECUTOR_RUNNER_NEW)
    assert (new.p50_ms, new.runs) == (pytest.approx(1.72), 2)
    assert parse_trtexec(TRTEXEC) == Times(0.809937, 0.811035, 204)


@pytest.mark.parametrize("tool", TOOLS.values(), ids=TOOLS)
def test_output_without_times_is_an_error(tool: Any) -> None:
    with pytest.raises(DeviceError, match="could not load model"):
        tool.parse("error: could not load model")


def test_the_tools_alternate_and_fill_the_time() -> None:
    asked: list[tuple[str, int]] = []

    def run(name: str, ms: float) -> Callable[[int], Times]:
        return lambda runs: (asked.append((name, runs)), Times(ms, None, runs))[1]

    runs = {"slow": run("slow", 10.0), "fast": run("fast", 1.0)}
    firsts = {"slow": Times(10.0, None, 5), "fast": Times(1.0, None, 5)}
    blocks = time_in_turns(runs, firsts, 1.6)
    assert [name for name, _ in asked[:4]] == ["slow", "fast", "fast", "slow"]
    assert dict(asked) == {"slow": 10, "fast": 100}
    assert blocks["fast"].runs == 800
    assert len(blocks["slow"].medians_ms) == len(blocks["fast"].medians_ms) == 8


FAKE_ADB = """#!/bin/sh
# A stand-in for adb that runs the commands on this machine; it proves our command lines alone.
echo "$@" | head -c 300 | tr '\\n' ' ' >> "$0.log"; echo >> "$0.log"
[ "$1" = -s ] && [ "$2" = phone ] || { echo "adb: device '$2' not found" >&2; exit 1; }
shift 2
case $1 in
    shell) [ "$2" = -T ] && shift 2; exec sh -c "$*" ;;
    push) exec cp -r "$2" "$3" ;;
esac
exit 1
"""
FAKE_PERF_TEST = f"""#!/bin/sh
for last in "$@"; do :; done
[ -f "$last" ] || {{ echo "no model" >&2; exit 1; }}
cat <<'END'
{PERF_TEST}
END
"""


def executable(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def test_the_command_lines_of_adb_with_a_fake_adb(
    tmp_path: Path, tiny_onnx: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    phone = tmp_path / "phone"
    phone.mkdir()
    executable(tmp_path / "adb", FAKE_ADB)
    executable(phone / "onnxruntime_perf_test", FAKE_PERF_TEST)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    engine = open_engine(tiny_onnx, threads=1)
    artifacts = {"a": Artifact(engine, {"threads": 2}), "b": Artifact(engine)}
    inputs = {"x": np.zeros((1, 3, 8, 8), np.float32)}
    address = f"adb://phone?python=no-python&folder={phone}&tools={phone}"
    (found,) = measure_on([address], artifacts, inputs, seconds=0.1)
    assert found.error == ""
    assert found.comparison is not None
    assert found.comparison.timings["a"].p50_ms == pytest.approx(16.7086)
    assert found.comparison.timings["a"].p90_ms == pytest.approx(23.2702)
    assert found.comparison.ratios["b"].value == pytest.approx(1)
    assert any("were not compared" in note for note in found.comparison.notes)
    assert found.machine["runner"] == "onnxruntime_perf_test"
    assert [path.name for path in phone.iterdir()] == ["onnxruntime_perf_test"]
    log = (tmp_path / "adb.log").read_text()
    assert "-s phone push " in log
    assert "onnxruntime_perf_test -I -s -m times -r 5 -e cpu -x 2 " in log

    lost = AdbDevice(serial="other", options=Options(folder=str(phone), pause_seconds=0.01))
    (found,) = measure_on([lost], artifacts, inputs, seconds=0.1)
    assert "adb://other cannot be reached" in found.error
    assert "Tried 3 times" in found.error


def test_python_over_a_fake_adb_gives_equal_outputs(
    tmp_path: Path, tiny_onnx: Path, monkeypatch: pytest.MonkeyPatch, cli: Callable[..., Any]
) -> None:
    phone = tmp_path / "phone"
    phone.mkdir()
    executable(tmp_path / "adb", FAKE_ADB)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    address = f"adb://phone?python={sys.executable}&folder={phone}"
    options = ("--threads", 1, "--seconds", 0.2, "--json", "--device", address)
    result = cli("bench", tiny_onnx, tiny_onnx, *options)
    assert result.code == 0
    (found,) = json.loads(result.out)["devices"]
    assert found["error"] == ""
    assert found["machine"]["runner"] == sys.executable
    assert [one["max_abs_difference"] for one in found["closeness"].values()] == [0, 0]
    assert list(phone.iterdir()) == []
