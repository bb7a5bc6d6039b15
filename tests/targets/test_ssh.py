"""Measuring over ssh, against a real OpenSSH server that each test starts on loopback."""

from __future__ import annotations

import contextlib
import getpass
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

SSHD = shutil.which("sshd", path=os.pathsep.join([os.environ["PATH"], "/usr/sbin", "/usr/local/sbin"]))
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
        for process in children(self.process.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)

    def wait_for(self, pattern: str) -> None:
        """Until a file such as an output of the runner is there."""
        end = time.monotonic() + 30
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
        server.cut()
        server.process.kill()
        server.process.wait()


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
    serve: Callable[..., Server], artifacts: dict[str, Artifact]
) -> None:
    server = serve()
    found = one(server.device(), artifacts)
    assert found.error == ""
    assert found.device == f"ssh://{getpass.getuser()}@127.0.0.1:{server.port}"
    assert found.comparison is not None
    assert set(found.comparison.timings) == {"a", "b"}
    for timing in found.comparison.timings.values():
        assert 0 < timing.low_ms <= timing.p50_ms <= timing.high_ms < 1000
        assert timing.p50_ms <= timing.p90_ms * 1.5
        assert timing.runs >= 6
    assert found.comparison.ratios["b"].low < 1.5
    assert found.comparison.rounds >= 6
    assert {name: one.max_abs_difference for name, one in found.closeness.items()} == {"a": 0, "b": 0}
    assert found.machine["cores"] >= 1
    assert "onnxruntime" in found.machine["versions"]
    assert found.failures == {}
    assert server.left() == []
