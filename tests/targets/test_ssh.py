"""Measuring over ssh, against a real OpenSSH server that each test starts on loopback."""

from __future__ import annotations

import contextlib
import getpass
import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from compress.artifact import open_engine
from compress.errors import DeviceError
from compress.remote import Artifact, OnDevice, check_devices, measure_on
from targets.remote_options import Options
from targets.ssh import SshDevice

SSHD = shutil.which(
    "sshd", path=os.pathsep.join([os.environ["PATH"], "/usr/sbin", "/usr/local/sbin"])
)
pytestmark = pytest.mark.skipif(
    SSHD is None or shutil.which("ssh") is None,
    reason="no OpenSSH server and client (Debian: openssh-server, openssh-client)",
)
FAST = Options(python=sys.executable, attempts=1, pause_seconds=0.1)


@dataclass
class Server:
    """One sshd, the device's folder, and a client configuration that knows its key."""

    home: Path
    port: int
    process: subprocess.Popen[bytes]
    options: Options = field(default_factory=Options)

    def device(self, **options: Any) -> SshDevice:
        return SshDevice(
            host="127.0.0.1",
            user=getpass.getuser(),
            port=self.port,
            config=str(self.home / "ssh_config"),
            options=replace(FAST, **{"folder": str(self.work), **options}),
        )

    @property
    def work(self) -> Path:
        return self.home / "device"

    def left(self) -> list[str]:
        """What is in the device's folder."""
        return sorted(path.name for path in self.work.iterdir())

    def cut(self) -> None:
        """Kill the processes of all sessions, as when the device's network goes away."""
        self._kill(children(self.process.pid))

    def die(self) -> None:
        """Cut, and answer no more."""
        sessions = children(self.process.pid)
        self.process.kill()
        self.process.wait()
        self._kill(sessions)

    def _kill(self, processes: list[int]) -> None:
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)

    def wait_for(self, pattern: str) -> None:
        """Until a file such as an output of the runner is there."""
        end = time.monotonic() + 120
        while not list(self.work.glob(pattern)):
            assert time.monotonic() < end, f"no {pattern} in {self.left()}"
            time.sleep(0.02)


def children(parent: int) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            if int(path.read_text().rpartition(")")[2].split()[1]) == parent:
                found.append(int(path.parent.name))
    return found


def keygen(path: Path) -> str:
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(path)], check=True)
    return path.with_suffix(".pub").read_text()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., Server]]:
    """Start a server; `command` is a shell line that runs in place of what the client asks for."""
    servers: list[Server] = []
    if os.getuid() == 0:
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)  # sshd wants it, as its service does

    def start(command: str = "") -> Server:
        home = tmp_path / f"server{len(servers)}"
        (home / "device").mkdir(parents=True)
        port = free_port()
        host_key = keygen(home / "host_key")
        (home / "authorized_keys").write_text(keygen(home / "key"))
        (home / "known_hosts").write_text(f"[127.0.0.1]:{port} {host_key}")
        lines = [
            f"Port {port}",
            "ListenAddress 127.0.0.1",
            f"HostKey {home}/host_key",
            f"AuthorizedKeysFile {home}/authorized_keys",
            "PidFile none",
            "StrictModes no",
            "UsePAM no",
            "PasswordAuthentication no",
            "KbdInteractiveAuthentication no",
            "PermitRootLogin prohibit-password",
            *([f"ForceCommand {command}"] if command else []),
        ]
        (home / "sshd_config").write_text("\n".join(lines) + "\n")
        (home / "ssh_config").write_text(
            f"Host *\n  IdentityFile {home}/key\n  IdentitiesOnly yes\n  IdentityAgent none\n"
            f"  UserKnownHostsFile {home}/known_hosts\n  GlobalKnownHostsFile /dev/null\n"
        )
        arguments = [str(SSHD), "-D", "-e", "-f", str(home / "sshd_config")]
        with (home / "log").open("wb") as log:
            process = subprocess.Popen(arguments, stderr=log, stdin=subprocess.DEVNULL)
        server = Server(home, port, process)
        servers.append(server)
        wait_until_listening(server)
        return server

    yield start
    for server in servers:
        server.die()


def wait_until_listening(server: Server) -> None:
    end = time.monotonic() + 10
    while time.monotonic() < end and server.process.poll() is None:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", server.port), 1):
            return
        time.sleep(0.02)
    pytest.skip(f"sshd does not start here: {(server.home / 'log').read_text()[-300:]}")


@pytest.fixture
def artifacts(tiny_onnx: Path) -> dict[str, Artifact]:
    one = Artifact(open_engine(tiny_onnx, threads=1), {"threads": 1})
    return {"a": one, "b": one}


INPUTS = {"x": np.random.default_rng(0).standard_normal((1, 3, 8, 8)).astype(np.float32)}


def one(device: SshDevice, artifacts: dict[str, Artifact], seconds: float = 0.2) -> OnDevice:
    (found,) = measure_on([device], artifacts, INPUTS, seconds=seconds)
    return found


def test_numbers_and_outputs_come_back_and_nothing_stays(
    serve: Callable[..., Server], artifacts: dict[str, Artifact], tiny_onnx: Path
) -> None:
    if importlib.util.find_spec("openvino"):
        settings = {"threads": 1, "streams": 1, "precision": "float32", "pinned": True}
        engine = open_engine(tiny_onnx, target="openvino", threads=1)
        artifacts["openvino"] = Artifact(engine, settings)
    server = serve()
    found = one(server.device(), artifacts)
    assert found.error == ""
    assert found.device == f"ssh://{getpass.getuser()}@127.0.0.1:{server.port}"
    assert found.comparison is not None
    assert set(found.comparison.timings) == set(artifacts)
    for timing in found.comparison.timings.values():
        assert 0 < timing.low_ms <= timing.p50_ms <= timing.high_ms < 1000
        assert timing.p50_ms <= timing.p90_ms * 1.5
        assert timing.runs >= 6
    assert found.comparison.ratios["b"].low < 1.5
    assert found.comparison.rounds >= 6
    differences = {name: close.max_abs_difference for name, close in found.closeness.items()}
    assert differences == dict.fromkeys(artifacts, 0)
    assert found.machine["cores"] >= 1
    assert "onnxruntime" in found.machine["versions"]
    assert found.failures == {}
    assert server.left() == []


def test_a_model_that_fails_there_costs_itself(
    serve: Callable[..., Server], artifacts: dict[str, Artifact]
) -> None:
    class Damaged:
        def __init__(self, engine: Any) -> None:
            self.inputs, self.outputs, self.call = engine.inputs, engine.outputs, engine

        def __call__(self, inputs: Any) -> Any:
            return self.call(inputs)

        def save(self, directory: Path) -> list[Path]:
            path = directory / "model.onnx"
            path.write_bytes(b"no model")
            return [path]

    damaged: Any = Damaged(artifacts["a"].engine)
    # Start-up files that print something on every login do no harm either.
    device = serve('echo Welcome; eval "$SSH_ORIGINAL_COMMAND"').device()
    found = one(device, {"a": artifacts["a"], "damaged": Artifact(damaged)})
    assert found.error == ""
    assert found.closeness["a"].max_abs_difference == 0
    assert found.comparison is not None
    assert set(found.comparison.timings) == {"a"}
    assert "model.onnx" in found.failures["damaged"]


def test_a_cut_connection_is_tried_again(
    serve: Callable[..., Server], artifacts: dict[str, Artifact]
) -> None:
    server = serve()
    found = while_measuring(server, artifacts, server.cut, server.device(attempts=2))
    assert found.error == ""
    assert found.comparison is not None
    assert server.left() == []


def while_measuring(
    server: Server, artifacts: dict[str, Artifact], act: Callable[[], None], *devices: SshDevice
) -> OnDevice:
    """Do something as soon as `server` measures; what the last device found."""
    results: list[tuple[OnDevice, ...]] = []
    thread = threading.Thread(
        target=lambda: results.append(measure_on(devices, artifacts, INPUTS, seconds=0.6))
    )
    thread.start()
    server.wait_for("*/0/output-0.npy")
    act()
    thread.join(120)
    assert not thread.is_alive()
    return results[0][-1]


def test_of_two_devices_one_dies_and_the_other_answers(
    serve: Callable[..., Server], artifacts: dict[str, Artifact]
) -> None:
    dying, living = serve(), serve()

    results: list[OnDevice] = []
    devices = [dying.device(attempts=2), living.device()]
    thread = threading.Thread(
        target=lambda: results.extend(measure_on(devices, artifacts, INPUTS, seconds=0.6))
    )
    thread.start()
    dying.wait_for("*/0/output-0.npy")
    dying.die()
    thread.join(120)
    dead, alive = results
    assert dead.comparison is None
    assert "Tried 2 times" in dead.error
    assert str(dying.port) in dead.error
    assert alive.error == ""
    assert alive.comparison is not None
    assert living.left() == []
    end = time.monotonic() + 30
    while dying.left() and time.monotonic() < end:  # nobody can reach it: the runner does it
        time.sleep(0.05)
    assert dying.left() == []


def test_another_host_key_is_explained_and_not_accepted(
    serve: Callable[..., Server], artifacts: dict[str, Artifact], tmp_path: Path
) -> None:
    server = serve()
    other = keygen(tmp_path / "other")
    known = server.home / "known_hosts"
    known.write_text(f"[127.0.0.1]:{server.port} {other}")
    found = one(server.device(attempts=3), artifacts)
    assert "another host key" in found.error
    assert f"ssh-keygen -R [127.0.0.1]:{server.port}" in found.error
    assert "Tried" not in found.error  # trying again would change nothing
    assert server.left() == []

    config = server.home / "ssh_config"
    config.write_text(config.read_text() + "  StrictHostKeyChecking no\n")
    assert "another host key" in one(server.device(), artifacts).error
    known.write_text("")
    assert "not among the known hosts" in one(server.device(), artifacts).error
    assert known.read_text() == ""


def test_a_refused_login_is_explained(
    serve: Callable[..., Server], artifacts: dict[str, Artifact]
) -> None:
    server = serve()
    (server.home / "authorized_keys").write_text("")
    with pytest.raises(DeviceError, match=r"refuses the login.*ssh-copy-id"):
        check_devices([server.device(attempts=3)])


def test_a_full_disk_is_named(serve: Callable[..., Server], artifacts: dict[str, Artifact]) -> None:
    limited = 'trap "" XFSZ; ulimit -f 4; eval "$SSH_ORIGINAL_COMMAND"'
    server = serve(limited)
    found = one(server.device(), artifacts)
    assert found.comparison is None
    assert "cannot take the files" in found.error
    assert str(server.work) in found.error
    assert "?folder=" in found.error
    assert server.left() == []


def test_a_full_file_system_is_named(
    serve: Callable[..., Server], artifacts: dict[str, Artifact]
) -> None:
    server = serve()
    mount = ["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", str(server.work)]
    if os.getuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small file system is not allowed here")
    try:
        found = one(server.device(), artifacts)
        assert "No space left" in found.error
        assert "cannot take the files" in found.error
        assert server.left() == []
    finally:
        subprocess.run(["umount", str(server.work)], check=True)


def test_a_slow_device_times_out(
    serve: Callable[..., Server], artifacts: dict[str, Artifact]
) -> None:
    server = serve()
    found = one(server.device(spare_seconds=0.01), artifacts, seconds=0.01)
    assert "timed out" in found.error
    assert "?timeout=" in found.error
    assert server.left() == []


def test_a_missing_python_and_a_missing_package_are_named(
    serve: Callable[..., Server], artifacts: dict[str, Artifact], tmp_path: Path
) -> None:
    server = serve()
    found = one(server.device(python="python3.99"), artifacts)
    assert "it has no python3.99" in found.error
    assert "?python=" in found.error
    bare = tmp_path / "bare-python"
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -I -S "$@"\n')
    bare.chmod(0o755)
    found = one(server.device(python=str(bare)), artifacts)
    assert f"{bare} has no onnxruntime" in found.error or f"{bare} has no numpy" in found.error
    assert "pip install numpy onnxruntime" in found.error
    with pytest.raises(DeviceError, match="has no numpy"):
        check_devices([server.device(python=str(bare))])
    assert server.left() == []


def test_folders_of_killed_runs_are_removed_and_others_stay(
    serve: Callable[..., Server], artifacts: dict[str, Artifact]
) -> None:
    from targets.remote_folder import new_name

    ended = subprocess.Popen(["true"])
    ended.wait()
    ours, pid = new_name(), str(os.getpid())
    running = ours.replace(f"-{pid}-", f"-{os.getppid()}-")
    killed = ours.replace(f"-{pid}-", f"-{ended.pid}-")
    foreign, aged = f"hwcompress-00000000-1-{'0' * 16}", f"hwcompress-00000000-1-{'1' * 16}"
    strange = "hwcompress-results"
    server = serve()
    for name in (running, killed, foreign, aged, strange):
        (server.work / name).mkdir()
    (server.work / killed / "model.onnx").write_bytes(b"x")
    for name in (aged, strange):
        os.utime(server.work / name, (0, 0))
    check_devices([server.device()])
    assert server.left() == sorted([running, foreign, strange])


def address(server: Server) -> str:
    query = f"python={sys.executable}&folder={server.work}&config={server.home}/ssh_config"
    return f"{server.device().address}?{query}"


def test_ctrl_c_cleans_up(serve: Callable[..., Server], tiny_onnx: Path) -> None:
    server = serve()
    code = "from compress.cli import main; main()"
    command = [sys.executable, "-c", code, "bench", str(tiny_onnx), "--seconds", "60"]
    command += ["--device", address(server)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            server.wait_for("*/0/output-0.npy")
            process.send_signal(signal.SIGINT)
            _, err = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 130
    assert "Stopped" in err
    assert server.left() == []


def test_bench_prints_each_device(
    serve: Callable[..., Server], tiny_onnx: Path, cli: Callable[..., Any]
) -> None:
    server, gone = serve(), serve()
    gone.die()
    options = [x for one in (server, gone) for x in ("--device", address(one))]
    result = cli("bench", tiny_onnx, tiny_onnx, "--seconds", 0.2, "--threads", 1, *options)
    assert result.code == 0
    assert f"127.0.0.1:{server.port} (" in result.out
    assert "there against here: equal" in result.out
    assert f"127.0.0.1:{gone.port} cannot be reached" in result.out

    result = cli("bench", tiny_onnx, "--device", address(gone))
    assert result.code == 2
    assert f"127.0.0.1:{gone.port} cannot be reached" in result.err


def test_run_chooses_by_the_first_device_that_answers(
    serve: Callable[..., Server],
    tiny_onnx: Path,
    tiny_images: Path,
    tmp_path: Path,
    cli: Callable[..., Any],
) -> None:
    count = tmp_path / "count"  # of connections; the check before the work needs two
    dying = serve(
        f'echo >> {count}; [ $(wc -l < {count}) -gt 2 ] && exit 255; eval "$SSH_ORIGINAL_COMMAND"'
    )
    living = serve()
    out = tmp_path / "artifact"
    result = cli(
        "run", tiny_onnx, "--target", "onnxruntime", "--threads", 1, "--time", 0,
        "--seconds", 0.5, "--calibration", tiny_images, "--out", out, "--json",
        "--device", address(dying), "--device", address(living),
    )  # fmt: skip
    assert result.code in (0, 1)
    report = json.loads(result.out)["report"]
    here, dropped, decided = report["devices"]
    assert here["device"] == "this machine"
    assert dropped["comparison"] is None
    assert report["headline"][0].startswith(f"Latencies are those of {decided['device']}")
    assert report["headline"][1] == f"Dropped out: {dropped['error']}"
    assert report["latency"]["device"] == decided["device"]
    timings = decided["comparison"]["timings"]
    assert len(timings) > 1
    assert {c["name"]: c["timing"] for c in report["candidates"]} == timings
    assert here["comparison"]["timings"] != timings
    text = (out / "report.md").read_text()
    assert "## Devices" in text
    assert f"| {decided['device']} |" in text
    assert living.left() == []
    assert address(living) not in (out / "recipe.yaml").read_text()


def test_run_wants_all_devices_before_it_works(
    serve: Callable[..., Server], tiny_onnx: Path, tmp_path: Path, cli: Callable[..., Any]
) -> None:
    server = serve()
    (server.home / "known_hosts").write_text("")
    out = tmp_path / "artifact"
    result = cli("run", tiny_onnx, "--out", out, "--device", address(server))
    assert result.code == 2
    assert "not among the known hosts" in result.err
    assert not out.exists()
    options = ("--objective", "throughput", "--device", address(server))
    assert "latency of single requests" in cli("run", tiny_onnx, *options).err
