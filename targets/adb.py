"""Android devices over adb. Its command lines have been tested, not a device: unverified."""

from __future__ import annotations

import re
import shlex
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, ClassVar, Self

from compress.errors import DeviceError, UsageError
from compress.remote import Answer, Job
from targets import remote
from targets.process import MOST_BYTES, Ran, call, find
from targets.remote_options import Options
from targets.remote_session import LostError

FOLDER = "/data/local/tmp"
"""Where the shell user may write and execute (Android's own tools and tests work there)."""
_ADDRESS = re.compile(r"adb://(?P<serial>[A-Za-z0-9][A-Za-z0-9._:-]*)/?")
_REFUSED = re.compile(r"unauthorized|more than one device|insufficient permissions", re.I)
_GONE = re.compile(
    r"device ('[^']*' )?not found|device offline|no devices/emulators found|closed|"
    r"cannot connect|failed to connect|protocol fault",
    re.I,
)


@dataclass(frozen=True, kw_only=True)
class AdbDevice:
    """A device that `adb devices` lists.

    Attributes:
        serial: as listed there.
        options: see `Options`; tools are looked for in /data/local/tmp too.
    """

    serial: str
    options: Options = field(default_factory=lambda: Options(folder=FOLDER, tools=FOLDER))

    name: ClassVar[str] = "adb"

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read `adb://serial[?python=...&folder=...&tools=...&timeout=...]`.

        Raises:
            UsageError: it has another form, or a part that adb could take for an option.
        """
        address, _, query = text.partition("?")
        found = _ADDRESS.fullmatch(address)
        if found is None:
            raise UsageError(
                f"--device {text!r} is no address for adb. Write adb://SERIAL with a serial that "
                f"`adb devices` lists, such as adb://emulator-5554 or adb://192.168.1.9:5555."
            )
        options = Options(folder=FOLDER, tools=FOLDER).read(query, address)
        return cls(serial=found["serial"], options=options)

    @property
    def address(self) -> str:
        """Without what stands behind the question mark."""
        return f"adb://{self.serial}"

    def check(self, stop: threading.Event) -> None:
        """See whether it answers and can measure anything."""
        remote.check(self, stop)

    def measure(self, job: Job, stop: threading.Event) -> Answer:
        """Copy, run, fetch and clean up."""
        return remote.measure(self, job, stop)

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
        """Run a command there; see `targets.remote_session.Transport`."""
        ran = call(
            [*self._client(), "shell", "-T", shlex.join(command)],
            timeout_seconds=timeout_seconds,
            stop=stop,
            stdin=stdin,
            hold=hold,
            most_bytes=most_bytes,
        )
        return self._answered(ran)

    def put(self, local: Path, path: str, *, timeout_seconds: float, stop: threading.Event) -> Ran:
        """Copy what a folder holds; see `targets.remote_session.Transport`."""
        command = [*self._client(), "push", f"{local}/.", f"{path}/"]
        return self._answered(call(command, timeout_seconds=timeout_seconds, stop=stop))

    def _client(self) -> list[str]:
        install = "apt install adb, or brew install android-platform-tools"
        return [find("adb", install), "-s", self.serial]

    def _answered(self, ran: Ran) -> Ran:
        """The same, unless it was adb itself that failed; that begins with `adb:` or `error:`."""
        text = " ".join(ran.err.split())
        if ran.code == 0 or not text.startswith(("adb:", "error:")):
            return ran
        if _REFUSED.search(text):
            raise DeviceError(
                f"{self.address} refuses adb: {text[-300:]} Unlock the device and agree to the "
                f"question about USB debugging, then see `adb devices`."
            )
        if _GONE.search(text):
            raise LostError(
                f"{self.address} cannot be reached, or the connection broke: {text[-200:]} See "
                f"`adb devices`."
            )
        return ran
