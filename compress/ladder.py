"""The repair ladder: what is done, rung by rung, when int8 loses more than the budget allows.

A rung edits the recipe: it replaces the pass that places precisions, puts one before it, or one
behind it. What a rung made is built and judged in the runtime; it stays in the recipe where it
helps, and the first that keeps the limit ends the climb. So what repaired a model is an ordinary
recipe, which repeats it.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from compress.data import Data
from compress.errors import CompressError, UnsupportedError
from compress.fidelity import fidelity
from compress.graph import graph_sha256
from compress.lowering import Lowered
from compress.max_drop import MaxDrop
from compress.metrics import Evaluator, Score, paired_drop
from compress.mixed import Placement
from compress.passes import Pass, Placing
from compress.progress import Progress
from compress.target import Engine, Isolated, Target
from compress.trial import Trials
from compress.variants import Variant

DEFAULT_SECONDS = 300.0
SAMPLES = 256
"""That outputs are compared on."""
HELPS_DB = 0.1
"""A rung that comes closer to the original by less than this is left out again."""


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """One rung of the report.

    Attributes:
        rung: in words.
        passes: that it added to the recipe or changed in it.
        score: of the evaluation; None where the rung could not be tried.
        drop: what is lost against the original, in the metric's unit; negative where gained.
        points: fields of `compress.metrics.Drop`, where the score is a top-1.
        sqnr_db: distance of the outputs from the original's; None where they are equal.
        float_sites: operators that placement keeps in float.
        seconds: that it took.
        kept: whether it stays in the recipe.
        holds: whether the limit is kept.
        reason: why it could not be tried, or was not kept.
    """

    rung: str
    passes: tuple[str, ...] = ()
    score: float | None = None
    drop: float | None = None
    points: Mapping[str, Any] | None = None
    sqnr_db: float | None = None
    float_sites: int = 0
    seconds: float = 0.0
    kept: bool = False
    holds: bool = False
    reason: str = ""


@dataclass(frozen=True)
class State:
    """A recipe in the making, for one runtime.

    Attributes:
        lowered: the passes before the placing one are applied, that one and others to come.
        passes: of the whole recipe.
        target: the runtime with its settings.
        kept_float: operators that placement leaves in float besides.
    """

    lowered: Lowered
    passes: tuple[Pass, ...]
    target: Target
    kept_float: tuple[str, ...] = ()

    @property
    def placing(self) -> Pass:
        """The pass that chooses precisions."""
        return next(step for step in self.lowered.rest if isinstance(step, Placing))

    def replace(self, step: Pass) -> State:
        """With another placing pass."""
        old = self.placing
        rest = tuple(step if one is old else one for one in self.lowered.rest)
        passes = tuple(step if one is old else one for one in self.passes)
        lowered = dataclasses.replace(self.lowered, rest=rest)
        return dataclasses.replace(self, lowered=lowered, passes=passes)

    def before(self, step: Pass) -> State:
        """With one more pass before the placing one."""
        at = next(i for i, one in enumerate(self.passes) if one is self.placing)
        passes = (*self.passes[:at], step, *self.passes[at:])
        return dataclasses.replace(self, lowered=self.lowered.before(step), passes=passes)

    def behind(self, step: Pass) -> State:
        """With one more pass at the end; one of the same name makes room for it."""
        rest = tuple(one for one in self.lowered.rest if one.name != step.name)
        passes = tuple(one for one in self.passes if one.name != step.name)
        lowered = dataclasses.replace(self.lowered, rest=(*rest, step))
        return dataclasses.replace(self, lowered=lowered, passes=(*passes, step))

    def recipe(self) -> tuple[Pass, ...]:
        """The passes, with the operators in float written into the placing one."""
        old = self.placing
        kept = tuple(dict.fromkeys((*old.keep_float, *self.kept_float)))  # type: ignore[attr-defined]
        step: Pass = dataclasses.replace(old, keep_float=kept)  # type: ignore[type-var]
        return tuple(step if one is old else one for one in self.passes)


@dataclass(frozen=True)
class Climbed:
    """Where the ladder ended.

    Attributes:
        attempts: all of them, the unrepaired model first.
        variant: the best that was reached.
        passes: of the recipe that makes it.
        score: of that variant.
        holds: whether it keeps the limit.
    """

    attempts: tuple[Attempt, ...]
    variant: Variant
    passes: tuple[Pass, ...]
    score: Score
    holds: bool

    def sentence(self) -> str:
        """For the headline of the report."""
        best = next(a for a in reversed(self.attempts) if a.kept)
        if self.holds:
            return (
                f"int8 lost more than --max-drop allows; it was repaired by {best.rung} "
                f"({len(self.attempts) - 1} rungs tried)."
            )
        return (
            f"int8 loses more than --max-drop allows and could not be repaired: the best of "
            f"{len(self.attempts) - 1} rungs, {best.rung}, still loses {_loss(best)}."
        )


@dataclass
class Ladder:
    """One climb.

    Attributes:
        reference: the original's engine.
        before: its score.
        evaluator: judges.
        limit: of the drop.
        data: for the distance of the outputs.
        training: whether there are data to train with.
        placement: what regions cost at each precision; None where they were not profiled.
        seconds: for everything; the rung that runs then is finished.
    """

    reference: Engine
    before: Score
    evaluator: Evaluator
    limit: MaxDrop
    data: Data | None
    training: bool
    placement: Placement | None
    seconds: float
    progress: Progress
    trials: Trials
    attempts: list[Attempt] = field(default_factory=list)

    def climb(self, start: Variant, state: State, rungs: Sequence[tuple[str, Rung]]) -> Climbed:
        """Go up from an unrepaired variant until one holds, or the rungs or the time end."""
        self._deadline = time.monotonic() + self.seconds
        self._start, self._state = start, state
        self._best = self._judge(start, state, "unrepaired", ())
        with self.progress("Repair accuracy", total=len(rungs)) as advance:
            for name, rung in rungs:
                if self._best.attempt.holds:
                    break
                advance(1, name)
                self._try(name, rung)
        best = self._best
        return Climbed(
            tuple(self.attempts), best.variant, self._state.recipe(), best.score, best.attempt.holds
        )

    def _try(self, name: str, rung: Rung) -> None:
        if time.monotonic() > self._deadline:
            self.attempts.append(Attempt(rung=name, reason="--repair-time was over"))
            return
        begin, before = time.monotonic(), len(self.attempts)
        try:
            for state, passes in rung(self):
                found = self._make(name, state, passes, begin)
                begin = time.monotonic()
                if found is not None and found.attempt.kept:
                    self._best, self._state = found, state
                if self._best.attempt.holds or begin > self._deadline:
                    return
            if len(self.attempts) == before:
                raise UnsupportedError("it finds nothing to change in this model")
        except CompressError as error:
            reason = str(error)
            self.attempts.append(Attempt(rung=name, reason=reason, seconds=_since(begin)))

    def _make(
        self, name: str, state: State, passes: tuple[str, ...], begin: float
    ) -> _Judged | None:
        model = state.lowered.apply(state.kept_float)
        if graph_sha256(model.graph_model) == graph_sha256(self._best.variant.model.graph_model):
            reason = "changes nothing in this model"
            self.attempts.append(
                Attempt(rung=name, passes=passes, reason=reason, seconds=_since(begin))
            )
            return None
        kept = state.kept_float
        precision = (
            "mixed" if kept and self._start.buys in ("speed", "device") else self._start.precision
        )
        variant = dataclasses.replace(
            self._start,
            name=f"{state.target.name} {precision} repaired",
            target=state.target,
            model=model,
            precision=precision,
            kept_float=kept,
        )
        return self._judge(variant, state, name, passes, begin)

    def _judge(
        self,
        variant: Variant,
        state: State,
        name: str,
        passes: tuple[str, ...],
        begin: float | None = None,
    ) -> _Judged:
        begin = time.monotonic() if begin is None else begin
        if isinstance(variant.target, Isolated):
            self.trials.survives(variant.target, variant.model, variant.model.example())
        engine = variant.target.build(variant.model)
        sqnr_db = self.closeness(engine)
        score = self.evaluator(engine)
        allowed = self.limit.allowed(self.before.value)
        drop = self.before.value - score.value
        points = None
        if self.before.accuracy is not None and score.accuracy is not None:
            points = dataclasses.asdict(paired_drop(self.before.accuracy, score.accuracy))
        first = not self.attempts
        helps = first or self._helps(drop, sqnr_db, allowed)
        attempt = Attempt(
            rung=name,
            passes=passes,
            score=score.value,
            drop=drop,
            points=points,
            sqnr_db=sqnr_db if math.isfinite(sqnr_db) else None,
            float_sites=len(state.kept_float),
            seconds=_since(begin),
            kept=helps,
            holds=drop <= allowed + 1e-12,
            reason="" if helps else "no closer to the original than without it",
        )
        self.attempts.append(attempt)
        return _Judged(variant, score, attempt, sqnr_db)

    def _helps(self, drop: float, sqnr_db: float, allowed: float) -> bool:
        """Whether a rung stays: it holds, or loses less, or its outputs are closer.

        On few samples a score moves by chance, so outputs that are closer count as long as the
        score is not clearly worse.
        """
        best = self._best
        if drop <= allowed or drop < best.attempt.drop:  # type: ignore[operator]
            return True
        near = drop <= best.attempt.drop + allowed / 2  # type: ignore[operator]
        return near and sqnr_db > best.sqnr_db + HELPS_DB

    def closeness(self, engine: Engine) -> float:
        """SQNR of the outputs against the original's, in dB."""
        return fidelity(self.reference, engine, self.data, samples=SAMPLES).sqnr_db

    @property
    def seconds_left(self) -> float:
        """Until the deadline, at least one."""
        return max(1.0, self._deadline - time.monotonic())

    @property
    def state(self) -> State:
        """The recipe so far."""
        return self._state


Rung: TypeAlias = Callable[["Ladder"], Iterator[tuple[State, tuple[str, ...]]]]
"""Proposes states, each with the names of the passes that it adds or changes."""


@dataclass(frozen=True)
class _Judged:
    variant: Variant
    score: Score
    attempt: Attempt
    sqnr_db: float


def _since(begin: float) -> float:
    return round(time.monotonic() - begin, 3)


def _loss(attempt: Attempt) -> str:
    if attempt.points is not None:
        return f"{attempt.points['points']:.2f} points of top-1"
    return f"{attempt.drop:.4g} of the score"
