"""The memory of engines: what the runtime's form of a model needs."""

from __future__ import annotations

from pathlib import Path

from compress.liveness import Peak, peak
from compress.target import Engine, Scheduled


def engine_peak(engine: Engine) -> Peak | None:
    """The peak of what the runtime made of a model, batch 1, with inputs and outputs.

    None where the runtime's form of the model cannot be analysed.
    """
    program = engine.schedule() if isinstance(engine, Scheduled) else None
    return peak(program) if program is not None else None


def peak_bytes(path: Path | str, *, threads: int | None = None) -> int | None:
    """Peak bytes of activations of an artifact directory or a model file (then in float).

    An estimate from the runtime's own optimized graph for batch 1: nothing runs. Weights are not
    counted. None where the runtime's form of the model cannot be analysed.

    Args:
        path: what `compress run` wrote, or any model file.
        threads: of the runtime; None takes what the artifact was measured with.

    Raises:
        LoadError: it is no model and no artifact.
        EngineError: the runtime refuses it, or it holds no engine yet.
    """
    from compress.artifact import open_engine

    found = engine_peak(open_engine(path, threads=threads))
    return found.bytes if found is not None else None
