"""Devices over ssh: the system's client, with the user's own configuration, keys and known hosts.

Files travel as one archive through `tar` on the device, so that it needs a shell and no SFTP
server. A host key that is wrong or unknown is an error; nothing here weakens the check.
"""

from __future__ import annotations

import re
import shlex
import tarfile
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, ClassVar, Self
from urllib.parse import parse_qsl, urlencode

from compress.errors import DeviceError, UsageError
from compress.remote import Answer, Job
from targets import remote
from targets.process import MOST_BYTES, Ran, call, find
from targets.remote_options import Options
from targets.remote_session import LostError

_ADDRESS = re.compile(
    r"ssh://(?:(?P<user>[A-Za-z_][A-Za-z0-9._-]*)@)?"
    r"(?P<host>[A-Za-z0-9][A-Za-z0-9._-]*|\[[0-9A-Fa-f:.]+(?:%[A-Za-z0-9._-]+)?\])"
    r"(?::(?P<port>[1-9]\d{0,4}))?/?"
)
_CONNECT_SECONDS = 10
FIXED = {
    "BatchMode": "yes",
    "StrictHostKeyChecking": "yes",
    "ConnectTimeout": str(_CONNECT_SECONDS),
    "ServerAliveInterval": "5",
    "ServerAliveCountMax": "3",
    "ClearAllForwardings": "yes",
    "ForwardAgent": "no",
    "ForwardX11": "no",
    "PermitLocalCommand": "no",
    "RemoteCommand": "none",
    "LogLevel": "ERROR",
}
"""Options that no configuration changes (ssh_config(5)): the command line comes first."""
_LOST = 255
"""ssh's own exit code; that of the command is passed on (ssh(1), EXIT STATUS)."""


def _nobody(member: tarfile.TarInfo) -> tarfile.TarInfo:
    """Owned by whoever unpacks it."""
    member.uid = member.gid = 0
    member.uname = member.gname = ""
    return member


@dataclass(frozen=True, kw_only=True)
class SshDevice:
    """A machine with an ssh server and a POSIX shell.

    Attributes:
        host: name or number, or a `Host` of the user's configuration.
        user: to log in as; "" leaves it to the configuration.
        port: 0 leaves it to the configuration.
        config: a configuration file in place of the user's, as `ssh -F`; "" for the user's.
        options: see `Options`.
    """

    host: str
    user: str = ""
    port: int = 0
    config: str = ""
    options: Options = field(default_factory=Options)

    name: ClassVar[str] = "ssh"

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read `ssh://[user@]host[:port][?python=...&folder=...&tools=...&timeout=...&config=...]`.

        Raises:
            UsageError: it has another form, or a part that ssh could take for an option.
        """
        address, _, query = text.partition("?")
        found = _ADDRESS.fullmatch(address)
        if found is None or int(found["port"] or 0) > 65535:
            raise UsageError(
                f"--device {text!r} is no address for ssh. Write ssh://user@host or "
                f"ssh://user@host:port; names have letters, digits and ._- and begin with a letter "
                f"or a digit, and passwords are not taken: use a key."
            )
        values = parse_qsl(query, keep_blank_values=True)
        config = dict(values).get("config", "")
        rest = urlencode([(key, value) for key, value in values if key != "config"])
        if config and not Path(config).is_file():
            raise UsageError(f"--device {address}: config={config} is no file on this machine.")
        return cls(
            host=found["host"].strip("[]"),
            user=found["user"] or "",
            port=int(found["port"] or 0),
            config=config,
            options=Options().read(rest, address),
        )

    @property
    def address(self) -> str:
        """Without what stands behind the question mark."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        user, port = f"{self.user}@" if self.user else "", f":{self.port}" if self.port else ""
        return f"ssh://{user}{host}{port}"

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
            [*self._client(), "--", self.host, shlex.join(command)],
            timeout_seconds=timeout_seconds,
            stop=stop,
            stdin=stdin,
            hold=hold,
            most_bytes=most_bytes,
        )
        if ran.code == _LOST:
            raise self._explained(ran.err)
        return ran

    def put(self, local: Path, path: str, *, timeout_seconds: float, stop: threading.Event) -> Ran:
        """Copy what a folder holds; see `targets.remote_session.Transport`."""
        with tempfile.TemporaryFile() as stream:
            with tarfile.open(fileobj=stream, mode="w") as archive:
                archive.add(local, arcname=".", filter=_nobody)
            stream.seek(0)
            command = ["tar", "-xf", "-", "-C", path]
            return self.shell(command, timeout_seconds=timeout_seconds, stop=stop, stdin=stream)

    def _client(self) -> list[str]:
        install = "apt install openssh-client, or the OpenSSH client of your system"
        arguments = [find("ssh", install), "-T"]
        arguments += ["-F", self.config] if self.config else []
        for key, value in FIXED.items():
            arguments += ["-o", f"{key}={value}"]
        arguments += ["-p", str(self.port)] if self.port else []
        return arguments + (["-l", self.user] if self.user else [])

    def _explained(self, said: str) -> DeviceError:
        """What ssh's own failure means."""
        text = " ".join(said.split())
        if "IDENTIFICATION HAS CHANGED" in text or "REVOKED HOST KEY" in text:
            return DeviceError(
                f"{self.address} shows another host key than it did before. Either the device was "
                f"installed anew, or another machine answers in its place; nothing was sent. "
                f"Compare the fingerprint with that of `ssh-keygen -lf /etc/ssh/"
                f"ssh_host_ed25519_key.pub` on the device, and only then forget the old key with "
                f"`ssh-keygen -R {self._known_as}`."
            )
        if "Host key verification failed" in text:
            return DeviceError(
                f"{self.address} is not among the known hosts, so nothing was sent. Connect once "
                f"by hand, `{self._by_hand}`, and compare the fingerprint before you agree."
            )
        if "Permission denied" in text or "Too many authentication failures" in text:
            return DeviceError(
                f"{self.address} refuses the login: {text[-200:]} It needs a key that works "
                f"without a question: `ssh-copy-id`, and ssh-agent where the key has a "
                f"passphrase. Test it with `{self._by_hand}`."
            )
        if "Bad configuration" in text or "Bad owner or permissions" in text:
            return DeviceError(f"ssh cannot read its configuration: {text[-300:]}")
        return LostError(
            f"{self.address} cannot be reached, or the connection broke: "
            f"{text[-200:] or 'ssh said nothing'}."
        )

    @property
    def _by_hand(self) -> str:
        port = ["-p", str(self.port)] if self.port else []
        return shlex.join(["ssh", *port, *(["-l", self.user] if self.user else []), self.host])

    @property
    def _known_as(self) -> str:
        return f"[{self.host}]:{self.port}" if self.port not in (0, 22) else self.host
