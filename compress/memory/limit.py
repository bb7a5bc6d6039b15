"""How much memory activations may take: the option `--max-memory`, and the verdict on engines."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from compress.errors import CompressError, UsageError

if TYPE_CHECKING:
    from compress.target import Engine

_UNITS = {
    "b": 1,
    "kb": 1000, "mb": 1000**2, "gb": 1000**3,
    "kib": 1024, "mib": 1024**2, "gib": 1024**3,
}  # fmt: skip
_SHOWN = 4
"""Tensors that facts name."""
ESTIMATED = "estimated from the runtime's graph"
COUNTED = "counted by the runtime"


def parse_memory(value: str | int) -> int:
    """Read "320kB" or "2MiB"; a whole number is bytes.

    kB, MB and GB are powers of 1000, KiB, MiB and GiB powers of 1024, as on data sheets.

    Raises:
        UsageError: anything else.
    """
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return value
    match = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([kmgKMG]?i?[bB])\s*", str(value))
    size = round(float(match[1]) * _UNITS[match[2].lower()]) if match and _known(match[2]) else 0
    if size < 1:
        raise UsageError(
            f"--max-memory {value!r} is no amount of memory. Write a number with its unit: B, kB, "
            f"MB, GB (powers of 1000) or KiB, MiB, GiB (powers of 1024), for example 320kB."
        )
    return size


def _known(unit: str) -> bool:
    return unit.lower() in _UNITS


def show_memory(number: int) -> str:
    """Bytes for people, with three digits."""
    value, unit = float(number), "B"
    for unit in ("B", "kB", "MB", "GB"):
        if value < 999.5 or unit == "GB":
            break
        value /= 1000
    return f"{value:.3g} {unit}"


def memory_facts(engine: Engine, batch: int = 1, limit: int | None = None) -> dict[str, Any]:
    """Peak of an engine's activations as plain values for the report.

    Keys: `bytes`, None where nothing tells; `how` it is known; `operator`, `op_type` and `tensors`
    of the peak, where they are known; `fits`, None without a limit.

    Args:
        engine: of any runtime.
        batch: samples in one request.
        limit: bytes that are allowed.
    """
    from compress.liveness import peak
    from compress.target import Scheduled

    facts: dict[str, Any] = {"bytes": None, "how": "not known for this runtime"}
    try:
        program = engine.schedule(batch) if isinstance(engine, Scheduled) else None
        if program is not None:
            found = peak(program)
            facts = {
                "bytes": found.bytes,
                "how": ESTIMATED,
                "operator": found.step,
                "op_type": found.op_type,
                "tensors": [list(one) for one in found.alive[:_SHOWN]],
            }
        elif (counted := _counted(engine, batch)) is not None:
            facts = {"bytes": counted, "how": COUNTED}
    except CompressError as error:
        facts["how"] = f"not known: {error}"
    fits = facts["bytes"] is not None and facts["bytes"] <= (limit or 0)
    return {**facts, "fits": fits if limit is not None else None}


def fits_into(limit: int | None, batch: int) -> Callable[[Engine], bool] | None:
    """A function that says whether an engine stays within a limit; None without one."""
    if limit is None:
        return None
    return lambda engine: bool(memory_facts(engine, batch, limit)["fits"])


def _counted(engine: Engine, batch: int) -> int | None:
    import numpy as np

    from compress.model import random_inputs
    from compress.target import MemoryMeasured

    if not isinstance(engine, MemoryMeasured):
        return None
    return engine.memory_in_use(random_inputs(engine.inputs, batch, np.random.default_rng(0)))
