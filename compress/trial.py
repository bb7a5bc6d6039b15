"""Trials: a model is built and run in another process first, which may die instead of this one.

A runtime is native code, and on some graph it crashes, hangs or takes all memory (OpenVINO
2026.4 ends in a segmentation fault while it compiles some placements of DenseNet-121). No
exception tells of that, so it has to happen where it costs one candidate and not the run.

The worker is this module run as a program: it reads a request in JSON from every line of its
input and answers each with a line.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from compress.errors import CompressError, EngineError
from compress.model import Arrays, Model
from compress.registry import available, create_target
from compress.target import Target

_MODEL, _INPUTS, _STDERR = "model.onnx", "inputs.npz", "stderr.txt"
_SET_PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of prctl(2)


class Trials:
    """One worker process, started when it is first needed and again after it died.

    Attributes:
        timeout_seconds: for the answer to one trial, with the start of the worker.
    """

    def __init__(self, timeout_seconds: float = 120.0) -> None:
        self.timeout_seconds = timeout_seconds
        self._process: subprocess.Popen[str] | None = None
        self._folder = Path()
        self._held = ExitStack()

    def __enter__(self) -> Trials:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def survives(self, target: Target, model: Model, inputs: Arrays) -> None:
        """Build the model for the target and run it once in another process.

        A target that the worker cannot make by its registered name is not tried.

        Raises:
            EngineError: the runtime refused the model there, crashed, or did not answer in time.
        """
        request = _request(target)
        if request is None:
            return
        try:
            error = self._try(request, model, inputs)
        # An interrupt too: the answer that is still to come would be taken for the next one's.
        except BaseException:
            self.close()
            raise
        if error:
            raise EngineError(error)

    def close(self) -> None:
        """End the worker and remove its files; the next trial starts another."""
        self._process = None
        self._held.close()

    def _try(self, request: dict[str, Any], model: Model, inputs: Arrays) -> str:
        """Why the runtime refused the model, or "".

        Raises:
            EngineError: it crashed, did not answer in time, or could not be asked.
        """
        from compress.reference import save_onnx

        name = request["target"]
        try:
            process = self._running()
            with tempfile.TemporaryDirectory(dir=self._folder) as folder:
                save_onnx(model.graph_model, Path(folder) / _MODEL)
                # By position: an input may be called like an argument of savez.
                np.savez(Path(folder) / _INPUTS, *inputs.values())
                line = self._ask(process, {**request, "folder": folder, "inputs": list(inputs)})
        except OSError as error:
            raise EngineError(
                f"{name} was not tried: the process for it could not be started or given its "
                f"files ({error}). Make room in memory and in {tempfile.gettempdir()}."
            ) from error
        if line is None:
            raise EngineError(
                f"{name} did not build and run the model within {self.timeout_seconds:g} s in a "
                f"process of its own, which was ended."
            )
        try:
            return str(json.loads(line).get("error", ""))
        except ValueError:
            raise EngineError(f"{name} {self._how_it_died(process)}") from None

    def _running(self) -> subprocess.Popen[str]:
        if self._process is None or self._process.poll() is not None:
            self.close()
            self._process = self._start()
        os.truncate(self._folder / _STDERR, 0)
        return self._process

    def _start(self) -> subprocess.Popen[str]:
        # A child of the worker may be writing still.
        folder = tempfile.TemporaryDirectory(prefix="hwcompress-", ignore_cleanup_errors=True)
        self._folder = Path(self._held.enter_context(folder))
        environment = {
            **os.environ,
            # What a runtime leaves behind when it dies goes with the folder.
            "TMPDIR": str(self._folder),
            # With -P, the packages that this process finds and nothing from the current folder.
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        }
        with (self._folder / _STDERR).open("ab") as stderr:
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", "compress.trial"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                env=environment,
                encoding="utf-8",
                # Ctrl-C reaches only this process, which then ends the worker and its children.
                start_new_session=True,
            )
        self._held.callback(_end, process)
        return process

    def _ask(self, process: subprocess.Popen[str], request: dict[str, Any]) -> str | None:
        """The answer; None where there was none in time, "" where the worker is dead."""
        assert process.stdin is not None
        assert process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            ready = selector.select(self.timeout_seconds)
        return process.stdout.readline() if ready else None

    def _how_it_died(self, process: subprocess.Popen[str]) -> str:
        code = _end(process)
        names = {number.value: number.name for number in signal.Signals}
        how = f"with {names.get(-code, f'signal {-code}')}" if code < 0 else f"with code {code}"
        if code == -signal.SIGKILL:
            how += ", as happens where memory runs out"
        said = (self._folder / _STDERR).read_text(encoding="utf-8", errors="replace").split("\n")
        last = next((line.strip() for line in reversed(said) if line.strip()), "")
        return (
            f"crashed while it built or ran the model in a process of its own, which ended {how}"
            + (f". The last that it wrote: {last[:300]}" if last else ".")
        )


def _request(target: Target) -> dict[str, Any] | None:
    """Name and options that make the same target, or None where there are none."""
    if target.name not in available("compress.targets") or not dataclasses.is_dataclass(target):
        return None
    try:
        options = json.dumps(dataclasses.asdict(target))
        again: Any = create_target(target.name, **json.loads(options))
        if type(again) is not type(target) or json.dumps(dataclasses.asdict(again)) != options:
            return None
    except (TypeError, ValueError):  # options that JSON, or the registered class, does not take
        return None
    return {"target": target.name, "options": json.loads(options)}


def _end(process: subprocess.Popen[str]) -> int:
    """Kill the worker and what it started; its exit code, which stays if it was dead before."""
    if process.returncode is None:
        # Not after waiting: the number may belong to another process by then.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    for stream in (process.stdin, process.stdout):
        with contextlib.suppress(OSError):  # a request that nobody read
            if stream is not None:
                stream.close()
    return process.wait()


def main() -> None:
    """Answer requests until the process that asks is gone."""
    _leave_with_parent()
    # Runtimes print to the standard output. The copy is closed by the kernel alone, so who reads
    # its end finds the exit code settled.
    answers = os.dup(sys.stdout.fileno())
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    for line in sys.stdin:
        answer = _answer(**json.loads(line))
        gc.collect()  # before the answer: a measurement follows it
        os.write(answers, (json.dumps(answer) + "\n").encode())


def _leave_with_parent() -> None:
    """Die with the parent, before it where memory runs out, and without a core file."""
    import resource

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(_SET_PARENT_DEATH_SIGNAL, int(signal.SIGKILL))
        with contextlib.suppress(OSError):
            Path("/proc/self/oom_score_adj").write_text("1000")


def _answer(target: str, options: dict[str, Any], folder: str, inputs: list[str]) -> dict[str, Any]:
    # A third party's target may raise anything; it becomes an EngineError where it is read.
    try:
        _build_and_run(create_target(target, **options), Path(folder), inputs)
    except CompressError as error:
        return {"ok": False, "error": str(error)}
    except Exception as error:
        what = " ".join(str(error).split())
        return {"ok": False, "error": f"{target} refuses the model: {type(error).__name__}: {what}"}
    return {"ok": True}


def _build_and_run(target: Target, folder: Path, names: list[str]) -> None:
    from compress.loading import load

    with np.load(folder / _INPUTS) as arrays:
        inputs = {name: arrays[f"arr_{index}"] for index, name in enumerate(names)}
    target.build(load(folder / _MODEL))(inputs)


if __name__ == "__main__":
    main()
