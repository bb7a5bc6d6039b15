"""Measuring on a device that is reached through a command: copy, run, fetch, clean up.

Everything happens in one folder on the device that belongs to one measurement. It is removed
when the measurement ends, in whatever way; what a killed run left is removed by the next one.
A lost connection is tried again from the start, in a new folder.
"""

from __future__ import annotations

import contextlib
import json
import re
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Protocol, TypeVar

import numpy as np

from compress.errors import DeviceError
from compress.remote import Answer, Job, Packed
from targets.process import MOST_BYTES, Ran
from targets.remote_answer import answer_of, arrays_of, files_of, lines_of, result_of
from targets.remote_folder import PREPARE, new_name, stale
from targets.remote_options import Options
from targets.remote_tools import FIRST_RUNS, TOOLS, Times, Tool, time_in_turns

T = TypeVar("T")
RUNNER = Path(__file__).with_name("remote_runner.py")
MODULES = {".onnx": "onnxruntime", ".ort": "onnxruntime", ".xml": "openvino", ".pte": "executorch"}
"""What the device's Python needs to run a model, by the suffix of its file."""
_PROBE = (
    "import importlib.util as u, sys; "
    'print("hwcompress: modules", *[m for m in sys.argv[1:] if u.find_spec(m)])'
)
_KEEP_CODE = '"$@"; exit $?'
"""A shell stays above the command, so that a signal becomes an exit code."""
_DISK = re.compile(r"No space left|File too large|quota exceeded|Read-only file system", re.I)
_SHORT_SECONDS = 30.0
_SLOWEST_BYTES_PER_SECOND = 100_000.0
_PATIENCE = 5.0
"""Times the seconds asked for, since slow models need their fewest rounds."""


class LostError(DeviceError):
    """The connection could not be made, or broke; it is worth another try."""


class Transport(Protocol):
    """How commands and files get to a device."""

    @property
    def options(self) -> Options:
        """How the device is used."""

    @property
    def address(self) -> str:
        """What errors call the device."""

    def shell(
        self,
        command: Sequence[str],
        *,
        timeout_seconds: float,
        stop: threading.Event,
        stdin: IO[bytes] | None = None,
        hold: bool = False,
        most_bytes: int = MOST_BYTES,
    ) -> Ran:
        """Run a command there; the arguments as in `targets.process.call`.

        Raises:
            LostError: the connection could not be made, or broke.
            DeviceError: it is refused for a reason that another try does not change.
            TimeoutError: it took too long.
        """

    def put(self, local: Path, path: str, *, timeout_seconds: float, stop: threading.Event) -> Ran:
        """Copy a file; its folder is made where it is missing. Raises as `shell`."""


def check(transport: Transport, stop: threading.Event) -> None:
    """See whether a device answers, and has a Python with numpy or one of the tools.

    Raises:
        DeviceError: it does not.
    """

    def look(session: _Session) -> None:
        tools = [tool.program for tool in TOOLS.values() if session.tool(tool)]
        if "numpy" not in session.modules(["numpy"]) and not tools:
            raise DeviceError(session.nothing_runs("numpy", "onnxruntime_perf_test"))

    _tried(transport, stop, look)


def measure(transport: Transport, job: Job, stop: threading.Event) -> Answer:
    """Copy, run, fetch and clean up.

    Raises:
        DeviceError: the device dropped out, or cannot run the baseline.
    """
    return _tried(transport, stop, lambda session: session.measure(job))


def _tried(transport: Transport, stop: threading.Event, work: Callable[[_Session], T]) -> T:
    attempt = 1
    while True:
        try:
            with _opened(transport, stop) as session:
                return work(session)
        except LostError as error:
            if attempt >= transport.options.attempts:
                tries = f" Tried {attempt} times." if attempt > 1 else ""
                raise DeviceError(f"{error}{tries}") from error
            if stop.wait(transport.options.pause_seconds * attempt):
                raise
        attempt += 1


@contextlib.contextmanager
def _opened(transport: Transport, stop: threading.Event) -> Iterator[_Session]:
    """A new folder on the device, and its removal."""
    session = _Session(transport, stop, new_name())
    reached = True
    try:
        try:
            session.prepare()
        except LostError:
            reached = False
            raise
        yield session
    finally:
        if reached:
            session.remove()


@dataclass
class _Session:
    """One measurement on one device."""

    transport: Transport
    stop: threading.Event
    name: str
    base: str = ""
    system: str = ""
    programs: dict[str, str] = field(default_factory=dict)

    @property
    def folder(self) -> str:
        return f"{self.base}/{self.name}"

    @property
    def python(self) -> str:
        return self.programs.get(self.transport.options.python, "")

    def prepare(self) -> None:
        """Make the folder, see what is installed, remove what earlier runs left."""
        options = self.transport.options
        tools = [options.tool(tool.program) for tool in TOOLS.values()]
        command = ["sh", "-c", PREPARE, "sh", options.folder, self.name, options.python, *tools]
        said = lines_of(self.run(command, "making a folder").out)
        self.base = next(iter(said["folder"]), "").removesuffix(f"/{self.name}")
        self.system = " ".join(said["is"])
        self.programs = dict(line.partition(" ")[::2] for line in said["has"])
        if not self.base.startswith("/"):
            raise DeviceError(
                f"{self.transport.address} has no POSIX shell: it did not say where its folder "
                f"is. Its login shell must run `sh -c`."
            )
        if gone := stale(said["ours"], said["old"]):
            self._delete(gone)

    def remove(self) -> None:
        """Remove the folder, even after a stop; what cannot be removed is the next run's work."""
        if self.base:
            self._delete([self.name])

    def _delete(self, names: Sequence[str]) -> None:
        with contextlib.suppress(DeviceError, TimeoutError):
            paths = [f"{self.base}/{name}" for name in names]
            self.transport.shell(
                ["rm", "-rf", *paths], timeout_seconds=_SHORT_SECONDS, stop=threading.Event()
            )

    def run(
        self, command: Sequence[str], what: str, seconds: float = _SHORT_SECONDS, **how: Any
    ) -> Ran:
        """A command; a failure becomes a sentence with `what` in it."""
        address = self.transport.address
        try:
            ran = self.transport.shell(command, timeout_seconds=seconds, stop=self.stop, **how)
        except TimeoutError:
            raise DeviceError(_too_slow(address, what, seconds)) from None
        self.succeeded(ran, what)
        return ran

    def succeeded(self, ran: Ran, what: str) -> None:
        """Refuse an exit code that is not 0."""
        if ran.code == 0:
            return
        said = " ".join(ran.err.split()) or " ".join(ran.out.decode(errors="replace").split())
        if _DISK.search(said):
            raise DeviceError(self.full(what, said))
        if ran.code in (137, -9):
            said = f"it was killed there, most likely because memory ran out. {said}"
        raise DeviceError(
            f"{self.transport.address}: {what} failed with exit code {ran.code}: {said[-500:]}"
        )

    def full(self, what: str, said: str) -> str:
        """That the disk took no more, and what to do."""
        address = self.transport.address
        return (
            f"The disk of {address} cannot take the files: {what} failed ({said[-200:]}). Free "
            f"some space in {self.base or 'its temporary folder'}, or name a folder that has some: "
            f"{address}?folder=/path."
        )

    def put(self, local: Path, name: str) -> None:
        """Copy a file into the folder."""
        seconds = _SHORT_SECONDS + local.stat().st_size / _SLOWEST_BYTES_PER_SECOND
        what = f"copying {local.name}"
        try:
            ran = self.transport.put(
                local, f"{self.folder}/{name}", timeout_seconds=seconds, stop=self.stop
            )
        except TimeoutError:
            raise DeviceError(_too_slow(self.transport.address, what, seconds)) from None
        self.succeeded(ran, what)

    def modules(self, wanted: Sequence[str]) -> list[str]:
        """Those that the device's Python has."""
        if not self.python:
            return []
        ran = self.run([self.python, "-c", _PROBE, *wanted], "asking Python for its packages")
        return " ".join(lines_of(ran.out)["modules"]).split()

    def tool(self, tool: Tool | None) -> str:
        """Where a tool is on the device, or ""."""
        return self.programs.get(self.transport.options.tool(tool.program), "") if tool else ""

    def nothing_runs(self, module: str, program: str = "") -> str:
        """Why a model cannot be run, and what to install."""
        address, python = self.transport.address, self.transport.options.python
        has = f"{self.python} has no {module}" if self.python else f"it has no {python}"
        packages = " ".join(dict.fromkeys(["numpy", module]))
        tool = f", and {program} is not installed either" if program else ""
        return (
            f"{address} cannot run this: {has}{tool}. Run `{python} -m "
            f"pip install {packages}` there, or name the Python of another environment: "
            f"{address}?python=/path/to/bin/python."
        )

    def measure(self, job: Job) -> Answer:
        """With the device's Python where it can run the baseline, else with the runtimes' tools."""
        first = _model(job.artifacts[0])
        needed = {one.name: MODULES.get(_model(one).suffix, "") for one in job.artifacts}
        has = self.modules(["numpy", *filter(None, dict.fromkeys(needed.values()))])
        if "numpy" in has and needed[job.artifacts[0].name] in has:
            runs = [one for one in job.artifacts if needed[one.name] in has]
            missing = {
                one.name: self.nothing_runs(needed[one.name] or "runtime for it")
                for one in job.artifacts
                if one not in runs
            }
            return self._by_python(job, runs, missing)
        tool = TOOLS.get(first.suffix)
        if self.tool(tool):
            return self._by_tools(job)
        module = needed[job.artifacts[0].name] or f"runtime for {first.name}"
        lacks = "numpy" if module in has else module
        raise DeviceError(self.nothing_runs(lacks, tool.program if tool else ""))

    def _by_python(self, job: Job, runs: Sequence[Packed], missing: Mapping[str, str]) -> Answer:
        seconds = self.transport.options.spare_seconds + _PATIENCE * job.seconds
        entries = self._send(job, runs)
        with tempfile.TemporaryDirectory(prefix="hwcompress-") as folder:
            inputs = {}
            for index, (name, array) in enumerate(job.inputs.items()):
                local = Path(folder) / f"input-{index}.npy"
                np.save(local, np.ascontiguousarray(array), allow_pickle=False)
                self.put(local, local.name)
                inputs[name] = local.name
            text = {
                "artifacts": entries,
                "inputs": inputs,
                "seconds": job.seconds,
                "sessions": job.sessions,
                "seed": job.seed,
                "deadline_seconds": seconds + _SHORT_SECONDS,
            }
            (Path(folder) / "job.json").write_text(json.dumps(text))
            self.put(Path(folder) / "job.json", "job.json")
        self.put(RUNNER, RUNNER.name)
        program = [self.python, f"{self.folder}/{RUNNER.name}", self.folder]
        ran = self.run(["sh", "-c", _KEEP_CODE, "sh", *program], "measuring", seconds, hold=True)
        address = self.transport.address
        result = result_of(ran, address)
        if error := str(result.get("error", "")):
            said = f"{address}: measuring failed: {error[-500:]}"
            raise DeviceError(self.full("measuring", error) if _DISK.search(error) else said)
        answer = answer_of(result, runs, address)
        return Answer(
            answer.sessions,
            self._outputs(result, runs),
            {**missing, **answer.failures},
            {"runner": self.python, **answer.machine},
            answer.seconds,
        )

    def _send(self, job: Job, packed: Sequence[Packed]) -> list[dict[str, Any]]:
        """Copy the models; what the runner has to know of each."""
        entries = []
        for one in packed:
            index = job.artifacts.index(one)
            for file in one.files:
                self.put(file, f"{index}/{file.name}")
            entries.append(
                {
                    "name": one.name,
                    "file": f"{index}/{_model(one).name}",
                    "settings": dict(one.settings),
                    "inputs": list(one.inputs),
                    "outputs": list(one.outputs),
                }
            )
        return entries

    def _outputs(self, result: Mapping[str, Any], runs: Sequence[Packed]) -> dict[str, Any]:
        found = {}
        for one in runs:
            files = files_of(result, one, self.transport.address)
            if not files:
                continue
            total = sum(size for _, size in files)
            paths = [f"{self.folder}/{name}" for name, _ in files]
            # Start-up files of the device may print before it; the end is ours.
            most = total + 1_000_000
            ran = self.run(["cat", *paths], "fetching outputs", most_bytes=most)
            found[one.name] = arrays_of(ran.out[-total:], files, one, self.transport.address)
        return found

    def _by_tools(self, job: Job) -> Answer:
        entries = {entry["name"]: entry for entry in self._send(job, job.artifacts)}
        calls, firsts, failures = {}, {}, {}
        for one in job.artifacts:
            tool = TOOLS.get(_model(one).suffix)
            if tool is None or not self.tool(tool):
                lacks = tool.program if tool else f"tool for {_model(one).suffix} files"
                failures[one.name] = f"{self.transport.address} has no {lacks}."
                continue
            calls[one.name] = _Tool(self, tool, entries[one.name], job.seconds)
            try:
                firsts[one.name] = calls[one.name](FIRST_RUNS)
            except LostError:
                raise
            except DeviceError as error:
                del calls[one.name]
                failures[one.name] = str(error)
        blocks = time_in_turns(calls, firsts, job.seconds) if calls else {}
        programs = sorted({call.tool.program for call in calls.values()})
        notes = (
            f"Measured with {', '.join(programs)}, which make inputs of their own (1 for a dynamic "
            f"batch) and keep their outputs: those were not compared.",
        )
        machine = {"runner": ", ".join(programs), "os": self.system}
        return Answer([blocks] if blocks else [], {}, failures, machine, job.seconds, notes)


@dataclass(frozen=True)
class _Tool:
    """One model in a runtime's own tool; called with a number of inferences."""

    session: _Session
    tool: Tool
    entry: Mapping[str, Any]
    seconds: float

    def __call__(self, runs: int) -> Times:
        session, options = self.session, self.session.transport.options
        model = f"{session.folder}/{self.entry['file']}"
        program = [
            session.tool(self.tool),
            *self.tool.arguments(model, runs, self.entry["settings"]),
        ]
        # Beside a tool lie the libraries that it was built with.
        libraries = ["env", f"LD_LIBRARY_PATH={options.tools}"] if options.tools else []
        limit = options.spare_seconds + _PATIENCE * self.seconds
        ran = session.run([*libraries, *program], f"running {self.tool.program}", limit)
        return self.tool.parse(ran.out.decode(errors="replace").replace("\r", "") + ran.err)


def _model(packed: Packed) -> Path:
    """The file that the runtime is given; others lie beside it."""
    known = (file for file in packed.files if file.suffix in {*MODULES, *TOOLS})
    return next(known, packed.files[0])


def _too_slow(address: str, what: str, seconds: float) -> str:
    return (
        f"{address} timed out: {what} took more than {seconds:.0f} s. If the device is that slow, "
        f"give it more time ({address}?timeout=600) or fewer models."
    )
