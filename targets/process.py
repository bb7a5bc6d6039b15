"""One command of this machine: bounded in time and output, and gone when it is no longer wanted."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from time import monotonic
from typing import IO

from compress.errors import DeviceError

MOST_BYTES = 64 * 1024 * 1024
"""Of output where the caller expects nothing in particular."""
_LOOK_EVERY_SECONDS = 0.05
_PATIENCE_SECONDS = 2.0


@dataclass(frozen=True)
class Ran:
    """What a command left: exit code, stdout and stderr."""

    code: int
    out: bytes
    err: str


def find(program: str, install: str) -> str:
    """The path of a program.

    Raises:
        DeviceError: it is not installed; says how to install it.
    """
    path = shutil.which(program)
    if path is None:
        raise DeviceError(f"{program} is not installed on this machine. Install it: {install}.")
    return path


def call(
    arguments: Sequence[str],
    *,
    timeout_seconds: float,
    stop: threading.Event,
    stdin: IO[bytes] | None = None,
    hold: bool = False,
    most_bytes: int = MOST_BYTES,
) -> Ran:
    """Run a command without a shell.

    It has a process group of its own, so that Ctrl-C reaches it through `stop` only.

    Args:
        arguments: the program and its arguments.
        timeout_seconds: after which it is ended.
        stop: ends it once set.
        stdin: what it reads; nothing by default.
        hold: its stdin stays open as long as it runs; the end of it tells that this side is gone.
        most_bytes: of stdout.

    Raises:
        TimeoutError: it took too long.
        DeviceError: it was stopped, or wrote more than `most_bytes`.
    """
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err, _pipe(hold) as held:
        process = subprocess.Popen(
            list(arguments),
            stdin=held if hold else stdin or subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            start_new_session=True,
        )
        try:
            _wait(process, out, monotonic() + timeout_seconds, stop, most_bytes)
        finally:
            _end(process)
        return Ran(process.returncode, _content(out, most_bytes), _text(err))


@contextlib.contextmanager
def _pipe(wanted: bool) -> Iterator[int | None]:
    """The reading end of a pipe to which nobody writes."""
    if not wanted:
        yield None
        return
    reading, writing = os.pipe()
    try:
        yield reading
    finally:
        os.close(writing)
        os.close(reading)


def _wait(
    process: subprocess.Popen[bytes],
    out: IO[bytes],
    end: float,
    stop: threading.Event,
    most_bytes: int,
) -> None:
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_LOOK_EVERY_SECONDS)
            return
        if stop.is_set():
            raise DeviceError("Stopped.")
        if monotonic() > end:
            raise TimeoutError
        if os.fstat(out.fileno()).st_size > most_bytes:
            raise DeviceError(f"{process.args!r} wrote more than {most_bytes} bytes.")


def _end(process: subprocess.Popen[bytes]) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        if process.poll() is not None:
            return
        with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
            os.killpg(process.pid, number)
            process.wait(_PATIENCE_SECONDS)


def _content(stream: IO[bytes], most_bytes: int) -> bytes:
    stream.seek(0)
    return stream.read(most_bytes)


def _text(stream: IO[bytes]) -> str:
    return _content(stream, 1_000_000).decode(errors="replace").replace("\r", "")
