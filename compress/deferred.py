"""`compress run` for a target that is built on another machine: everything but the engine.

The candidates are made, checked against the target's rules and judged in ONNX Runtime;
`compress.deferred_report` writes them with a `build.json`, and `compress build` builds and measures
them where the hardware is.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial

from compress.candidates import Limits, keeps_limit
from compress.data import Data
from compress.errors import EngineError, UnsupportedError, UsageError
from compress.half import to_half
from compress.ladder import Climbed, Ladder, State
from compress.lowering import Lowered
from compress.metrics import Evaluator, Score
from compress.model import Model
from compress.passes import Compressing, Pass
from compress.progress import Progress
from compress.rewrites import output_statistics
from compress.rungs import RUNGS
from compress.simulated import WHERE, Simulated
from compress.target import BuiltElsewhere, Engine
from compress.trial import Trials
from compress.variants import BASELINE, Variant

HALF = "float16"
MIXED = "mixed"


@dataclass(frozen=True, kw_only=True)
class Preparation:
    """What `compress run` knows when the model is lowered.

    Attributes:
        target: that was asked for.
        original: as it was loaded.
        exported: the same at the ONNX stage.
        lowered: after the passes before those that lower precisions.
        passes: of the recipe.
        data: for calibration.
        evaluator: judges.
        training: whether there are data to train with.
        limits: the budget.
        batch: samples in one request.
        repair_seconds: for the repair of accuracy.
        seconds: for the measurement, when it is built.
        seed: of everything random.
        progress: opens trackers.
    """

    target: BuiltElsewhere
    original: Model
    exported: Model
    lowered: Lowered
    passes: tuple[Pass, ...]
    data: Data | None
    evaluator: Evaluator | None
    training: bool
    limits: Limits
    batch: int
    repair_seconds: float
    seconds: float
    seed: int
    progress: Progress


@dataclass
class Prepared:
    """The candidates, judged.

    Attributes:
        variants: the original first; their target is the simulation.
        engines: simulations, by name.
        scores: by name.
        climbed: where the accuracy was repaired.
        failures: why a candidate could not be made, by name.
        notes: what the builder should know, by name.
    """

    variants: list[Variant] = field(default_factory=list)
    engines: dict[str, Engine] = field(default_factory=dict)
    scores: dict[str, Score] = field(default_factory=dict)
    climbed: Climbed | None = None
    failures: dict[str, str] = field(default_factory=dict)
    notes: dict[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def narrow(self) -> Variant | None:
        """The candidate with the lowest precision."""
        others = [v for v in self.variants if v.precision not in (BASELINE, HALF)]
        return others[0] if others else None

    def files(self) -> dict[str, str]:
        """The ONNX file of each candidate, by name: its precision, numbered where that repeats."""
        counts: Counter[str] = Counter()
        names = {}
        for variant in self.variants:
            counts[variant.precision] += 1
            number = counts[variant.precision]
            words = [*variant.precision.split(), *([str(number)] if number > 1 else [])]
            names[variant.name] = "-".join(words) + ".onnx"
        return names


def check_deferred(
    target: BuiltElsewhere, *, simulate: bool, objective: str, devices: bool
) -> None:
    """Refuse before any work what is not available for a target that is built elsewhere.

    Raises:
        UsageError: simulated formats, throughput, or devices to measure on.
    """
    if simulate:
        raise UsageError(
            f"--simulate computes formats in float32, which needs no {target.name}. Leave "
            f"--target out."
        )
    if devices:
        raise UsageError(
            f"--device is not available for --target {target.name}: `compress build` measures "
            f"where it runs. Copy the artifact there."
        )
    if objective != "latency":
        raise UsageError(
            f"--objective {objective} is not available for --target {target.name}: single requests "
            f"are measured when the engine is built. Give a larger --batch instead."
        )


def prepare(given: Preparation) -> Prepared:
    """Make the candidates, check each against the rules of the target, and judge them.

    Raises:
        UnsupportedError: one breaks a rule of the target; the message names it.
    """
    found = Prepared()
    simulation = Simulated(given.target)
    make = partial(_add, given, found, simulation)
    make(BASELINE, BASELINE, lambda: given.exported)
    make(f"{given.target.name} {HALF}", HALF, lambda: _half(given.lowered.float_model))
    for name, precision, narrow in _narrow(given):
        variant = make(name, precision, narrow)
        if variant is None:
            continue
        variant = _repaired(given, found, variant) or variant
        wider = name.replace(precision, MIXED, 1)
        make(wider, MIXED, partial(_half, variant.model))
    return found


def _narrow(given: Preparation) -> Iterator[tuple[str, str, Callable[[], Model]]]:
    """Name, precision and maker of what the recipe and each alternative compress."""
    one, target = given.lowered, given.target.name
    if one.rest:
        own = one.placing or one.rest[0]
        precision = own.makes if isinstance(own, Compressing) else "int8"
        yield f"{target} {precision}", precision, one.apply
    for step in one.alternatives:
        precision = step.makes if isinstance(step, Compressing) else "int8"
        yield f"{target} {precision} {step.name}", precision, partial(one.apply_alternative, step)


def _add(
    given: Preparation,
    found: Prepared,
    simulation: Simulated,
    name: str,
    precision: str,
    make: Callable[[], Model],
) -> Variant | None:
    """One candidate, built as a simulation and judged; None where it cannot be made."""
    try:
        model = make()
    except (EngineError, UnsupportedError) as error:
        found.failures[name] = str(error)
        return None
    variant = Variant(name, simulation, model, precision)
    _keep(given, found, variant)
    return variant


def _keep(given: Preparation, found: Prepared, variant: Variant) -> None:
    """Check a candidate, simulate and judge it."""
    found.notes[variant.name] = given.target.check_input(variant.model)
    engine = variant.target.build(variant.model)
    engine.name = f"{variant.name} {WHERE}"
    found.engines[variant.name] = engine
    if given.evaluator is not None:
        found.scores[variant.name] = given.evaluator(engine, given.progress)
    found.variants = [v for v in found.variants if v.name != variant.name] + [variant]


def _half(model: Model) -> Model:
    statistics = output_statistics(model)
    return dataclasses.replace(model, program=to_half(model.graph_model, statistics=statistics))


def _repaired(given: Preparation, found: Prepared, variant: Variant) -> Variant | None:
    """The variant after the repair ladder, where it loses too much in simulation."""
    before, after = found.scores.get(BASELINE), found.scores.get(variant.name)
    evaluator, limit = given.evaluator, given.limits.max_drop
    broken = not keeps_limit(before, after, given.limits) and given.lowered.places
    first = found.climbed is None and given.repair_seconds > 0
    if evaluator is None or limit is None or before is None or not (broken and first):
        return None
    with Trials() as trials:
        ladder = Ladder(
            found.engines[BASELINE],
            before,
            evaluator,
            limit,
            given.data or evaluator.data,
            given.training,
            None,
            given.repair_seconds,
            given.progress,
            trials,
        )
        state = State(given.lowered, given.passes, variant.target)
        found.climbed = ladder.climb(variant, state, RUNGS)
    repaired = dataclasses.replace(found.climbed.variant, name=variant.name)
    _keep(given, found, repaired)
    return repaired
