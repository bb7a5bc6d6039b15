"""When accuracy is repaired, and what is measured again afterwards."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from compress.candidates import FLOAT, Limits, Measured
from compress.data import Data
from compress.errors import UnsupportedError
from compress.ladder import Climbed, Ladder, State
from compress.lowering import Lowered
from compress.metrics import Evaluator, Score
from compress.passes import Pass, Repairable
from compress.progress import Progress
from compress.rungs import RUNGS
from compress.search import Searched, region_costs
from compress.target import FLOATS
from compress.trial import Trials
from compress.variants import Variant


def repair(
    searched: Searched,
    measured: Measured,
    lowered: Sequence[Lowered],
    passes: tuple[Pass, ...],
    *,
    evaluator: Evaluator | None,
    limits: Limits,
    data: Data | None,
    training: bool,
    scores: dict[str, Score],
    seconds: float,
    progress: Progress,
) -> tuple[Climbed | None, Searched]:
    """Climb the ladder from the fastest candidate that loses too much, if it is worth that.

    It is where no faster or equally fast candidate keeps the limit.

    Returns:
        the climb, None where there was none; and the finals to measure again, with what it made.
    """
    start = broken(searched, measured)
    one = next((x for x in lowered if start is not None and _makes(x, start)), None)
    if evaluator is None or limits.max_drop is None or start is None or one is None or not seconds:
        return None, searched
    placement = searched.placements.get(start.target.name)
    if placement is None and start.precision == "int8":
        placement = region_costs(one, searched.screening, reference=one is lowered[0])
    with Trials() as trials:
        ladder = Ladder(
            searched.screening.engines[FLOAT],
            scores[FLOAT],
            evaluator,
            limits.max_drop,
            data or evaluator.data,
            training,
            placement,
            seconds,
            progress,
            trials,
        )
        state = State(one, passes, start.target, start.kept_float)
        climbed = ladder.climb(start, state, RUNGS)
    if not climbed.holds:
        return climbed, searched
    searched.screening.rebuild(climbed.variant)
    scores[climbed.variant.name] = climbed.score
    rest = [v for v in searched.finalists if v.name != climbed.variant.name]
    return climbed, dataclasses.replace(searched, finalists=(*rest, climbed.variant))


def broken(searched: Searched, measured: Measured) -> Variant | None:
    """The fastest placed candidate that loses too much and is faster than all that do not."""
    variants = {variant.name: variant for variant in searched.finalists}
    judged = [one.candidate for one in measured.all[1:] if one.candidate.score is not None]
    speed = {c.name: float(c.speedup["value"]) if c.speedup else 1.0 for c in judged}
    enough = max((speed[c.name] for c in judged if c.allowed), default=1.0)
    found = [
        c.name
        for c in judged
        if not c.allowed
        and c.memory.get("fits") is not False
        and not variants[c.name].made_by
        and c.precision not in FLOATS
        and (speed[c.name] > enough or c.buys != "speed")
    ]
    return variants[max(found, key=lambda name: speed[name])] if found else None


def measure_sensitivity(lowered: Sequence[Lowered]) -> None:
    """Have the placing pass measure what each operator loses; it leaves the rows in the memo.

    Raises:
        UnsupportedError: no pass of the recipe can.
    """
    for one in lowered:
        if isinstance(one.placing, Repairable):
            one.placing.sensitivity(one.float_model, one.context)
            return
    raise UnsupportedError("--sensitivity: no pass of the recipe tells what operators lose.")


def _makes(one: Lowered, variant: Variant) -> bool:
    return one.places and one.context.target.name == variant.target.name
