"""Whether a network gets faster on the target by what a pass makes of it, and passes that ask."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from compress.errors import UnsupportedError
from compress.fine_tuning import FineTuning
from compress.latency import Comparison
from compress.model import Model, Step
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


@dataclass(frozen=True, kw_only=True)
class TimedFineTuning(FineTuning):
    """A pass that trains parts of a network away, where the target gets faster without them.

    Attributes:
        share: of these parts that may go, those that change the outputs least.
        count: of parts at most, in place of `share`.
        anneal: share of the training in which they go.
        search_seconds: to time what the network would be.
    """

    share: float = 1.0
    count: int | None = None
    anneal: float = 0.5
    search_seconds: float = 10.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check("share", 0 < self.share <= 1, "above 0 and at most 1")
        self._check("count", self.count is None or self.count > 0, "above 0")
        self._check("anneal", 0 < self.anneal <= 1, "above 0 and at most 1")
        self._check("search_seconds", self.search_seconds > 0, "above 0")

    def check(self, model: Model, target: Target) -> None:
        """Refuse what cannot be trained, and a target on which nothing can be timed here.

        Raises:
            UnsupportedError: it says which.
        """
        super().check(model, target)
        require_timing(self.name, target)

    def most(self, parts: int) -> int:
        """How many of so many parts may go."""
        return self.count or max(1, round(self.share * parts))

    def _where(self, target: Target) -> str:
        return f"{self.name} on {target.name}"

    def _done(self, model: Model, details: dict[str, Any]) -> Model:
        return model.evolve(model.graph_model, Step(self.name, asdict(self), details))


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
