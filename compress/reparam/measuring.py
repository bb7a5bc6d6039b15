"""Whether a network gets faster on the target by what a pass makes of it."""

from __future__ import annotations

from typing import Any

from compress.errors import UnsupportedError
from compress.latency import Comparison
from compress.model import Model
from compress.sessions import measure_sessions
from compress.target import BuiltElsewhere, Elsewhere, Isolated, Target
from compress.trial import Trials

SESSIONS = 2


def can_time(target: Target) -> bool:
    """Whether engines of this target run on this machine."""
    away = isinstance(target, BuiltElsewhere) and not target.check().available
    return not (isinstance(target, Elsewhere) or away)


def require_timing(name: str, target: Target) -> None:
    """Refuse a target on which nothing can be timed here.

    Args:
        name: of the pass that asks.
        target: where the model will run.

    Raises:
        UnsupportedError: its engines run on another machine.
    """
    if not can_time(target):
        raise UnsupportedError(
            f"{name} chooses by measured time, and nothing can be timed for {target.name} on this "
            f"machine. Leave it out, or apply it on a machine that runs {target.name}."
        )


def compare(target: Target, before: Model, after: Model, seconds: float, seed: int) -> Comparison:
    """Time two networks with the same inputs in turns; they are called "before" and "after".

    Args:
        target: what is timed on.
        before: the baseline.
        after: what a pass made of it.
        seconds: for both, in all sessions together.
        seed: of the order of blocks.

    Raises:
        EngineError: the target refuses one of them.
    """
    inputs = before.example()
    if isinstance(target, Isolated):
        with Trials() as trials:
            trials.survives(target, after, inputs)

    def calls() -> dict[str, Any]:
        engines = {"before": target.build(before), "after": target.build(after)}
        return {name: lambda engine=engine: engine(inputs) for name, engine in engines.items()}

    return measure_sessions(calls, sessions=SESSIONS, seconds=seconds, margin=0.0, seed=seed)
