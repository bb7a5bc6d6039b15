"""The folder of one measurement on a device: its name, the shell that makes it, what is stale."""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import re
import secrets
import shlex
from collections.abc import Sequence
from pathlib import Path

PREFIX = "hwcompress-"
SAYS = "hwcompress: "
"""Begins each line that is meant for us; a device's start-up files may print others."""
_PROBE = (
    "import importlib.util as u, sys; "
    f'print("{SAYS}modules", *[m for m in sys.argv[1:] if u.find_spec(m)])'
)
_MODULES = "numpy onnxruntime openvino executorch"
PREPARE = f"""umask 077
cd "${{1:-${{TMPDIR:-/tmp}}}}" || exit 1
mkdir "$2" || exit 1
echo "{SAYS}folder $PWD/$2"
echo "{SAYS}is $(uname -sm)"
for f in {PREFIX}*; do [ -d "$f" ] && [ ! -L "$f" ] && [ -O "$f" ] && echo "{SAYS}ours $f"; done
find . -maxdepth 1 -type d -name "{PREFIX}*" -mtime +0 | sed "s|^\\./|{SAYS}old |"
shift 2
for p in "$@"; do f=$(command -v "$p") && echo "{SAYS}has $p $f"; done
command -v "$1" >/dev/null && "$1" -c {shlex.quote(_PROBE)} {_MODULES}
true"""
"""POSIX shell; arguments: the folder to work in or "", the name of a new one, the Python, tools."""
_NAME = re.compile(rf"{PREFIX}([0-9a-f]{{8}})-(\d+)-[0-9a-f]{{16}}")


def new_name() -> str:
    """A name that says who made it and that nobody can guess."""
    return f"{PREFIX}{_this_machine()}-{os.getpid()}-{secrets.token_hex(8)}"


def stale(ours: Sequence[str], old: Sequence[str]) -> list[str]:
    """Folders whose measurement has ended: a day old, or made here by a process that is gone."""
    gone = []
    for name in ours:
        found = _NAME.fullmatch(name)
        if found is None:
            continue
        machine, process = found.groups()
        if name in old or (machine == _this_machine() and not _runs(int(process))):
            gone.append(name)
    return gone


@functools.cache
def _this_machine() -> str:
    """Differs wherever process numbers mean something else."""
    parts = [platform.node()]
    for path in ("/etc/machine-id", "/proc/sys/kernel/random/boot_id"):
        parts.append(Path(path).read_text() if os.access(path, os.R_OK) else "")
    namespace = "/proc/self/ns/pid"
    parts.append(os.readlink(namespace) if os.path.islink(namespace) else "")
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:8]


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True
