"""One measurement at a time on a machine: a lock among the processes of one user."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import monotonic, sleep

from compress.progress import Progress, silent

LONGEST_WAIT = 900.0
"""Seconds; then the measurement goes on, with a note: a stuck process must not stop everybody."""
_POLL = 0.1


def lock_path() -> Path:
    """The file that is locked; it holds nothing."""
    user = getattr(os, "getuid", lambda: 0)()
    return Path(tempfile.gettempdir()) / f"hwcompress-measuring-{user}.lock"


@contextmanager
def measuring_alone(
    progress: Progress = silent, longest: float = LONGEST_WAIT
) -> Iterator[tuple[str, ...]]:
    """Wait until no other check of this user measures; gives notes about what went wrong.

    The operating system frees the lock when the process ends, however it ends. Tests of other
    workers that do not measure still run meanwhile.
    """
    try:
        import fcntl
    except ImportError:  # no such locks on this system
        yield ()
        return
    try:
        flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
        descriptor = os.open(lock_path(), flags, 0o600)
    except OSError as error:
        yield (f"{lock_path()} cannot be locked ({error.strerror}); others may measure meanwhile.",)
        return
    try:
        end, waiting, held = monotonic() + longest, False, False
        while not held:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                held = True
            except BlockingIOError:
                if monotonic() >= end:
                    break
                if not waiting:
                    with progress("Waiting for another measurement"):
                        waiting = True
                sleep(_POLL)
        late = f"Another measurement ran for more than {longest:.0f} seconds; both ran together."
        yield () if held else (late,)
    finally:
        os.close(descriptor)
