"""What an address of a device says behind its question mark."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Self
from urllib.parse import parse_qsl

from compress.errors import UsageError

_PATH = re.compile(r"/[A-Za-z0-9._/+@-]+")
_PROGRAM = re.compile(r"[A-Za-z0-9._/+@][A-Za-z0-9._/+@-]*")
KEYS = ("python", "folder", "tools", "timeout")


@dataclass(frozen=True, kw_only=True)
class Options:
    """How a device is used.

    Attributes:
        python: its Python, a name or a path.
        folder: where the folder of a measurement is made; "" takes TMPDIR, else /tmp.
        tools: where tools such as `executor_runner` are, beside those in PATH.
        spare_seconds: for a measurement, beyond the time that it takes by itself.
        attempts: to connect, before a device has dropped out.
        pause_seconds: before the second attempt; longer before later ones.
    """

    python: str = "python3"
    folder: str = ""
    tools: str = ""
    spare_seconds: float = 120.0
    attempts: int = 3
    pause_seconds: float = 1.0

    def tool(self, program: str) -> str:
        """What to call a tool."""
        return f"{self.tools}/{program}" if self.tools else program

    def read(self, query: str, address: str) -> Self:
        """These options with those of an address.

        Raises:
            UsageError: one of them does not exist, or its value is not allowed.
        """
        values = dict(parse_qsl(query, keep_blank_values=True))
        unknown = [key for key in values if key not in KEYS]
        if unknown:
            raise UsageError(
                f"--device {address} has no option {', '.join(unknown)}; it has {', '.join(KEYS)}."
            )
        python, timeout = values.get("python", self.python), values.get("timeout", "")
        paths = {key: values[key] for key in ("folder", "tools") if key in values}
        wrong = [f"{key}={path}" for key, path in paths.items() if not _PATH.fullmatch(path)]
        wrong += [] if _PROGRAM.fullmatch(python) else [f"python={python}"]
        if wrong or not re.fullmatch(r"|[1-9]\d{0,4}", timeout):
            given = ", ".join(wrong) or f"timeout={timeout}"
            raise UsageError(
                f"--device {address}: {given} is not allowed. A path begins with / and has "
                f"letters, digits and ._/+@- only; timeout is a number of seconds up to 99999."
            )
        seconds = float(timeout) if timeout else self.spare_seconds
        return replace(
            self,
            python=python,
            folder=paths.get("folder", self.folder),
            tools=paths.get("tools", self.tools),
            spare_seconds=seconds,
        )
