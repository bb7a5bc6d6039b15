"""Measuring on a device: with its Python and our runner, or with the tools of the runtimes."""

from __future__ import annotations

import json
import shutil
import tempfile
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from compress.errors import DeviceError
from compress.model import Arrays
from compress.remote import Answer, Job, Packed
from targets.remote_answer import answer_of, arrays_of, files_of, result_of
from targets.remote_session import SHORT_SECONDS, LostError, Session, Transport, tried
from targets.remote_tools import FIRST_RUNS, TOOLS, Times, Tool, time_in_turns

RUNNER = Path(__file__).with_name("remote_runner.py")
MODULES = {".onnx": "onnxruntime", ".ort": "onnxruntime", ".xml": "openvino", ".pte": "executorch"}
"""What the device's Python needs to run a model, by the suffix of its file."""
_KEEP_CODE = '"$@"; exit $?'
"""A shell stays above the command, so that a signal becomes an exit code."""
_PATIENCE = 5.0
"""Times the seconds asked for, since slow models need their fewest rounds."""


def check(transport: Transport, stop: threading.Event) -> None:
    """See whether a device answers, and has a Python with numpy or one of the tools.

    Raises:
        DeviceError: it does not.
    """

    def look(session: Session) -> None:
        if "numpy" not in session.modules and not any(map(session.tool, TOOLS.values())):
            raise DeviceError(session.lacks("numpy"))

    tried(transport, stop, look)


def measure(transport: Transport, job: Job, stop: threading.Event) -> Answer:
    """Copy, run, fetch and clean up.

    With the device's Python where it can run the baseline, else with the runtimes' tools.

    Raises:
        DeviceError: the device dropped out, or cannot run the baseline.
    """
    return tried(transport, stop, lambda session: _measure(session, job))


def _measure(session: Session, job: Job) -> Answer:
    baseline = job.artifacts[0]
    if "numpy" in session.modules and _module(baseline) in session.modules:
        return _by_python(session, job)
    tool = TOOLS.get(_model(baseline).suffix)
    if session.tool(tool):
        return _by_tools(session, job)
    lacks = "numpy" if _module(baseline) in session.modules else _module(baseline)
    raise DeviceError(session.lacks(lacks, tool.program if tool else ""))


def _by_python(session: Session, job: Job) -> Answer:
    runs = [one for one in job.artifacts if _module(one) in session.modules]
    missing = {one.name: session.lacks(_module(one)) for one in job.artifacts if one not in runs}
    seconds = session.transport.options.spare_seconds + _PATIENCE * job.seconds
    with tempfile.TemporaryDirectory(prefix="hwcompress-") as local:
        folder = Path(local)
        shutil.copy(RUNNER, folder)
        inputs = {name: f"input-{index}.npy" for index, name in enumerate(job.inputs)}
        for name, array in job.inputs.items():
            np.save(folder / inputs[name], np.ascontiguousarray(array), allow_pickle=False)
        text = {
            "artifacts": _staged(job, runs, folder),
            "inputs": inputs,
            "seconds": job.seconds,
            "sessions": job.sessions,
            "seed": job.seed,
            "deadline_seconds": seconds + SHORT_SECONDS,
        }
        (folder / "job.json").write_text(json.dumps(text))
        session.put(folder)
    program = [session.python, f"{session.folder}/{RUNNER.name}", session.folder]
    ran = session.run(["sh", "-c", _KEEP_CODE, "sh", *program], "measuring", seconds, hold=True)
    result = result_of(ran, session.address)
    if "error" in result:
        raise session.failed("measuring", str(result["error"]))
    answer = answer_of(result, runs, session.address)
    return replace(
        answer,
        outputs=_outputs(session, result, runs),
        failures={**missing, **answer.failures},
        machine={"runner": session.python, **answer.machine},
    )


def _outputs(
    session: Session, result: Mapping[str, Any], runs: Sequence[Packed]
) -> dict[str, Arrays]:
    """What the runner wrote, in one go."""
    files = [(one, files_of(result, one, session.address)) for one in runs]
    paths = [f"{session.folder}/{name}" for _, found in files for name, _ in found]
    if not paths:
        return {}
    total = sum(size for _, found in files for _, size in found)
    most = total + 1_000_000  # start-up files of the device may print; the end is ours
    content = session.run(["cat", *paths], "fetching outputs", most_bytes=most).out[-total:]
    outputs = {}
    for one, found in files:
        size = sum(size for _, size in found)
        if found:
            outputs[one.name] = arrays_of(content[:size], found, one, session.address)
        content = content[size:]
    return outputs


def _by_tools(session: Session, job: Job) -> Answer:
    with tempfile.TemporaryDirectory(prefix="hwcompress-") as local:
        staged = _staged(job, job.artifacts, Path(local))
        session.put(Path(local))
    calls: dict[str, _Call] = {}
    firsts: dict[str, Times] = {}
    failures: dict[str, str] = {}
    for one, entry in zip(job.artifacts, staged, strict=True):
        tool = TOOLS.get(_model(one).suffix)
        if tool is None or not session.tool(tool):
            wanted = tool.program if tool else f"tool for {_model(one).suffix} files"
            failures[one.name] = f"{session.address} has no {wanted}."
            continue
        call = _Call(session, tool, entry, job.seconds)
        try:
            firsts[one.name] = call(FIRST_RUNS)
            calls[one.name] = call
        except LostError:
            raise
        except DeviceError as error:
            failures[one.name] = str(error)
    programs = ", ".join(sorted({call.tool.program for call in calls.values()}))
    notes = (
        f"Measured with {programs}, which makes inputs of its own (1 for a dynamic batch) and "
        f"keeps its outputs: those were not compared.",
    )
    blocks = time_in_turns(calls, firsts, job.seconds) if calls else {}
    machine = {"runner": programs, "os": session.system}
    return Answer([blocks] if blocks else [], {}, failures, machine, job.seconds, notes)


@dataclass(frozen=True)
class _Call:
    """One model in a runtime's own tool; called with a number of inferences."""

    session: Session
    tool: Tool
    entry: Mapping[str, Any]
    seconds: float

    def __call__(self, runs: int) -> Times:
        session, options = self.session, self.session.transport.options
        model = f"{session.folder}/{self.entry['file']}"
        arguments = self.tool.arguments(model, runs, self.entry["settings"])
        # Beside a tool lie the libraries that it was built with.
        libraries = ["env", f"LD_LIBRARY_PATH={options.tools}"] if options.tools else []
        limit = options.spare_seconds + _PATIENCE * self.seconds
        command = [*libraries, session.tool(self.tool), *arguments]
        ran = session.run(command, f"running {self.tool.program}", limit)
        return self.tool.parse(ran.out.decode(errors="replace").replace("\r", "") + ran.err)


def _staged(job: Job, packed: Sequence[Packed], folder: Path) -> list[dict[str, Any]]:
    """Put the models into a folder as they will lie there; what a runner has to know of each."""
    entries = []
    for one in packed:
        place = str(job.artifacts.index(one))
        (folder / place).mkdir()
        for file in one.files:
            try:
                (folder / place / file.name).hardlink_to(file)
            except OSError:
                shutil.copy(file, folder / place)
        entries.append(
            {
                "name": one.name,
                "file": f"{place}/{_model(one).name}",
                "settings": dict(one.settings),
                "inputs": list(one.inputs),
                "outputs": list(one.outputs),
            }
        )
    return entries


def _model(packed: Packed) -> Path:
    """The file that the runtime is given; others lie beside it."""
    known = (file for file in packed.files if file.suffix in {*MODULES, *TOOLS})
    return next(known, packed.files[0])


def _module(packed: Packed) -> str:
    """The package that runs a model, or what to say where there is none."""
    return MODULES.get(_model(packed).suffix, f"runtime for {_model(packed).name}")
