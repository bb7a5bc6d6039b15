"""One measurement's stay on a device: its folder, its commands, and what their failures mean.

Everything happens in one folder on the device. It is removed when the stay ends, in whatever way;
what a killed run left is removed by the next one. A lost connection is tried again from the
start, in a new folder.
"""

from __future__ import annotations

import contextlib
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Protocol, TypeVar

from compress.errors import DeviceError
from targets.process import MOST_BYTES, Ran
from targets.remote_answer import lines_of
from targets.remote_folder import PREPARE, new_name, stale
from targets.remote_options import Options
from targets.remote_tools import TOOLS, Tool

T = TypeVar("T")
SHORT_SECONDS = 30.0
"""For a command that has next to nothing to do."""
_SLOWEST_BYTES_PER_SECOND = 100_000.0
_DISK = re.compile(
    r"No space left|File too large|quota exceeded|Read-only file system|Wrote only \d+ of", re.I
)
"""Words of the C library, and GNU tar's where a write ends early."""


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
        """Copy what a folder holds into a folder that is there. Raises as `shell`."""


def tried(transport: Transport, stop: threading.Event, work: Callable[[Session], T]) -> T:
    """Do something on a device, as often as its options allow where the connection is lost.

    Raises:
        DeviceError: it dropped out, or `work` raised it.
    """
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
def _opened(transport: Transport, stop: threading.Event) -> Iterator[Session]:
    """A new folder on the device, and its removal."""
    session = Session(transport, stop, new_name())
    try:
        session.prepare()
        yield session
    finally:
        session.remove()


@dataclass
class Session:
    """A folder on a device, and what the device has.

    Attributes:
        transport: how to reach it.
        stop: ends what is running there, once set.
        name: of the folder.
        base: where the folder is; "" until it is made.
        system: of the device, as `uname` says.
        programs: Python and tools that are there: path by name.
        modules: packages of its Python that a model may need.
    """

    transport: Transport
    stop: threading.Event
    name: str
    base: str = ""
    system: str = ""
    programs: dict[str, str] = field(default_factory=dict)
    modules: list[str] = field(default_factory=list)

    @property
    def folder(self) -> str:
        """The folder's path."""
        return f"{self.base}/{self.name}"

    @property
    def address(self) -> str:
        """What errors call the device."""
        return self.transport.address

    @property
    def python(self) -> str:
        """Path of the device's Python, or ""."""
        return self.programs.get(self.transport.options.python, "")

    def tool(self, tool: Tool | None) -> str:
        """Path of a tool on the device, or ""."""
        return self.programs.get(self.transport.options.tool(tool.program), "") if tool else ""

    def prepare(self) -> None:
        """Make the folder, see what is installed, remove what earlier runs left."""
        options = self.transport.options
        tools = [options.tool(tool.program) for tool in TOOLS.values()]
        command = ["sh", "-c", PREPARE, "sh", options.folder, self.name, options.python, *tools]
        said = lines_of(self.run(command, "making a folder").out)
        self.base = next(iter(said["folder"]), "").removesuffix(f"/{self.name}")
        self.system = " ".join(said["is"])
        self.programs = dict(line.partition(" ")[::2] for line in said["has"])
        self.modules = " ".join(said["modules"]).split()
        if not self.base.startswith("/"):
            self.base = ""
            raise DeviceError(
                f"{self.address} did not say where its folder is. Its login shell must run `sh -c` "
                f"as a POSIX system does."
            )
        if gone := stale(said["ours"], said["old"]):
            self._delete(gone)

    def remove(self) -> None:
        """Remove the folder, even after a stop; what cannot be removed is the next run's work."""
        if self.base:
            self._delete([self.name])

    def _delete(self, names: Sequence[str]) -> None:
        command = ["rm", "-rf", *(f"{self.base}/{name}" for name in names)]
        with contextlib.suppress(DeviceError, TimeoutError):
            self.transport.shell(command, timeout_seconds=SHORT_SECONDS, stop=threading.Event())

    def run(
        self, command: Sequence[str], what: str, seconds: float = SHORT_SECONDS, **how: Any
    ) -> Ran:
        """A command on the device.

        Raises:
            DeviceError: it failed, or took too long; the sentence says `what`.
        """
        return self._succeeded(
            lambda: self.transport.shell(command, timeout_seconds=seconds, stop=self.stop, **how),
            what,
            seconds,
        )

    def put(self, folder: Path) -> None:
        """Copy what a folder of this machine holds. Raises as `run`."""
        total = sum(file.stat().st_size for file in folder.rglob("*"))
        seconds = SHORT_SECONDS + total / _SLOWEST_BYTES_PER_SECOND
        self._succeeded(
            lambda: self.transport.put(
                folder, self.folder, timeout_seconds=seconds, stop=self.stop
            ),
            f"copying {total / 1e6:.1f} MB",
            seconds,
        )

    def _succeeded(self, work: Callable[[], Ran], what: str, seconds: float) -> Ran:
        try:
            ran = work()
        except TimeoutError:
            raise DeviceError(
                f"{self.address} timed out: {what} took more than {seconds:.0f} s. If it is that "
                f"slow, give it more time ({self.address}?timeout=600) or fewer models."
            ) from None
        if ran.code == 0:
            return ran
        said = " ".join(ran.err.split()) or " ".join(ran.out.decode(errors="replace").split())
        if ran.code == 137:
            said = f"it was killed there, most likely because memory ran out. {said}"
        raise self.failed(what, f"exit code {ran.code}: {said}")

    def failed(self, what: str, said: str) -> DeviceError:
        """What a failure on the device means; a full disk has a remedy."""
        if not _DISK.search(said):
            return DeviceError(f"{self.address}: {what} failed: {said[-500:]}")
        return DeviceError(
            f"The disk of {self.address} cannot take the files: {what} failed ({said[-200:]}). "
            f"Free some space in {self.base or 'its temporary folder'}, or name a folder that has "
            f"some: {self.address}?folder=/path."
        )

    def lacks(self, module: str, program: str = "") -> str:
        """Why a model cannot be run, and what to install."""
        python, packages = self.transport.options.python, list(dict.fromkeys(["numpy", module]))
        tool = f", and {program} is not installed either" if program else ""
        if self.python:
            has = f"{self.python} has no {module}"
            install = f"Run `{python} -m pip install {' '.join(packages)}` there"
        else:
            has = f"it has no {python}"
            install = f"Install Python 3.8 or newer with {' and '.join(packages)} there"
        return (
            f"{self.address} cannot run this: {has}{tool}. {install}, or name the Python of "
            f"another environment: {self.address}?python=/path/to/bin/python."
        )
