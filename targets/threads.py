"""What the CPU runtimes share: how many threads there are, and what int8 is worth here."""

from __future__ import annotations

from compress.errors import UsageError
from compress.machine import Machine, this_machine

_MOST_THREADS = 1024


def check_threads(threads: int | None, streams: int) -> None:
    """Refuse numbers that no machine has.

    Raises:
        UsageError: out of range, or more streams than threads.
    """
    cores = this_machine().cores
    if threads is not None and not 1 <= threads <= _MOST_THREADS:
        raise UsageError(
            f"--threads {threads} is out of range, 1 to {_MOST_THREADS}: this machine has {cores} "
            f"usable cores. Leave the option out to use all of them."
        )
    if not 1 <= streams <= (threads or cores):
        raise UsageError(
            f"{streams} streams do not fit {threads or cores} threads: each stream needs one."
        )


def usable_threads(threads: int | None) -> int:
    """As given, else one for each usable core."""
    return threads or this_machine().cores


def int8_notes(machine: Machine, fast: bool) -> tuple[str, ...]:
    """What the user should know before any work, where int8 has no dot product to use."""
    if fast:
        return ()
    instruction = "VNNI" if machine.is_x86 else "the dot-product extension"
    return (
        f"This CPU ({machine.cpu}) has no int8 dot product ({instruction}): expect int8 to save "
        f"memory more than time.",
    )
