"""Variants: one model in one runtime at one precision, and a quick look at how fast each is."""

from __future__ import annotations

import dataclasses
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from compress.errors import EngineError, UnsupportedError
from compress.latency import Ratio, measure
from compress.lowering import Lowered
from compress.model import Model
from compress.passes import Compressing, Pass
from compress.progress import Tracker
from compress.target import FLOATS, Elsewhere, Engine, Isolated, Prepared, Target
from compress.trial import Trials
from compress.workload import Workload

BASELINE = "float32"
"""The original in the reference runtime; every speed-up refers to it."""
SCREENING_SECONDS = 0.6
"""For each variant; enough to tell 3 % apart, which finals then confirm."""


@dataclass(frozen=True)
class Variant:
    """A candidate before it is built.

    Attributes:
        name: in tables and reports.
        target: one runtime with its settings.
        model: at the ONNX stage.
        precision: one of `FLOATS`, "int8" or "mixed", what a `Compressing` pass makes, or one of a
            runtime's own.
        kept_float: operators that placement left in float, by name.
        made_by: the pass, or the runtime, that compressed it, where no placement did, or "".
        failure: why a pass could not make the model, or ""; `model` is then what it was given.
        buys: what it is made for: "speed", "size" (weights in fewer bits than the runtime computes
            with), "device" (speed where it cannot be measured) or "numbers" (formats that are only
            simulated).
    """

    name: str
    target: Target
    model: Model
    precision: str
    kept_float: tuple[str, ...] = ()
    made_by: str = ""
    failure: str = ""
    buys: str = "speed"


def uniform_variants(original: Model, lowered: Sequence[Lowered]) -> list[Variant]:
    """One variant for each runtime and precision; the original in the reference runtime first.

    A recipe's alternatives come after its own passes. A model that cannot be made has its reason
    in `Variant.failure`.
    """
    variants = [Variant(BASELINE, lowered[0].context.target, original, BASELINE)]
    for one in lowered:
        target, name = one.context.target, one.context.target.name
        unchanged = one is lowered[0] and one.float_model.history == original.history
        if not unchanged:
            rewritten = Variant(f"{name} float32", target, one.float_model, "float32")
            variants.append(dataclasses.replace(rewritten, buys=_buys(None, target)))
        for precision in _floats(target):
            # What an int8 model leaves in float is in the last of these then, too.
            target = dataclasses.replace(target, precision=precision)  # type: ignore[type-var]
            variants.append(Variant(f"{name} {precision}", target, one.float_model, precision))
        for precision in one.own_precisions:
            own = dataclasses.replace(target, precision=precision)  # type: ignore[type-var]
            label = f"{name} {precision}"
            variants.append(Variant(label, own, one.float_model, precision, made_by=name))
        variants += _compressed(one, target)
    return variants


def _floats(target: Target) -> list[str]:
    """What it computes whole models in besides float32, by its option `precision`."""
    option = getattr(target, "precision", None) is not None
    return [p for p in FLOATS[1:] if option and p in target.capabilities.precisions]


def _compressed(one: Lowered, target: Target) -> list[Variant]:
    """What the recipe's passes make of the float model, then what each alternative makes.

    Alternatives are judged by what the recipe's own result is made for.
    """
    own = one.placing or next(iter(one.rest), None)
    ways: list[tuple[Pass | None, Callable[[], Model]]] = []
    if one.rest:
        ways.append((None if one.places else own, partial(one.apply, refine=False)))
    ways += [(step, partial(one.apply_alternative, step)) for step in one.alternatives]
    names: Counter[str] = Counter()
    variants = []
    for step, make in ways:
        maker = step or own
        precision = maker.makes if isinstance(maker, Compressing) else "int8"
        name = " ".join([target.name, precision, *([step.name] if step else [])])
        names[name] += 1
        variant = Variant(
            f"{name} {names[name]}" if names[name] > 1 else name,
            target,
            one.float_model,
            precision,
            made_by=step.name if step else "",
            buys=_buys(own, target),
        )
        try:
            variants.append(dataclasses.replace(variant, model=make()))
        except (EngineError, UnsupportedError) as error:
            variants.append(dataclasses.replace(variant, failure=str(error)))
    return variants


def _buys(step: Pass | None, target: Target) -> str:
    bought = str(getattr(step, "buys", "speed"))
    return "device" if bought == "speed" and isinstance(target, Elsewhere) else bought


@dataclass
class Screening:
    """Builds variants, times them against the baseline, and keeps what it found.

    Attributes:
        workload: what is timed.
        baseline: what the ratios refer to.
        advance: is told the seconds that passed, and what is fastest.
        trials: builds models of runtimes that may crash in another process first.
        variants: by name, in the order in which they were tried.
        engines: of the variants that may become the artifact.
        ratios: speed-ups over the baseline.
        latency_ms: of one request.
        failures: why a variant could not be made, built or run.
    """

    workload: Workload
    baseline: Variant
    advance: Tracker
    trials: Trials
    seed: int = 0
    variants: dict[str, Variant] = field(default_factory=dict)
    engines: dict[str, Engine] = field(default_factory=dict)
    ratios: dict[str, Ratio] = field(default_factory=dict)
    latency_ms: dict[str, float] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.variants[self.baseline.name] = self.baseline
        self.engines[self.baseline.name] = self.baseline.target.build(self.baseline.model)
        self.ratios[self.baseline.name] = Ratio(1.0, 1.0, 1.0, "cannot tell")

    def time(self, variants: Sequence[Variant], seconds: float = SCREENING_SECONDS) -> None:
        """Measure these variants and the baseline in turns; a failing one costs only itself."""
        start = time.monotonic()
        calls = {BASELINE: self._call(self.baseline)}
        for variant in variants:
            self.variants[variant.name] = variant
            if variant.failure:
                self.failures[variant.name] = variant.failure
                continue
            try:
                if variant.name not in self.engines:
                    self.engines[variant.name] = self._build(variant)
                calls[variant.name] = self._call(variant)
                calls[variant.name]()
            except EngineError as error:
                calls.pop(variant.name, None)
                self.engines.pop(variant.name, None)
                self.failures[variant.name] = str(error)
        if len(calls) > 1:
            found = measure(calls, seconds=seconds * len(calls), min_blocks=6, seed=self.seed)
            for name, timing in found.timings.items():
                self.latency_ms[name] = timing.p50_ms / self.workload.requests
            self.ratios |= found.ratios
        best = self.fastest(list(self.engines))
        self.advance(time.monotonic() - start, note=f"{best} {self.speed(best):.2f}x")

    def rebuild(self, variant: Variant) -> None:
        """Put another model of the same name in a variant's place, with its engine.

        Raises:
            EngineError: the runtime refuses it.
        """
        self.engines[variant.name] = self._build(variant)
        self.variants[variant.name] = variant

    def speed(self, name: str) -> float:
        """Speed-up over the baseline; 0 for a variant that failed."""
        return self.ratios[name].value if name in self.ratios else 0.0

    def fastest(self, names: Sequence[str]) -> str:
        """The fastest of these; the first of equals."""
        return max(names, key=self.speed)

    def forget(self, name: str) -> None:
        """Free the engine of a variant that is out of the race."""
        self.engines.pop(name, None)

    def rename(self, old: str, new: str) -> None:
        """Give a variant another name, and keep its place."""
        tables: tuple[dict[str, Any], ...] = (
            self.variants, self.engines, self.ratios, self.latency_ms, self.failures
        )  # fmt: skip
        for table in tables:
            items = [(new if name == old else name, value) for name, value in table.items()]
            table.clear()
            table.update(items)
        self.variants[new] = dataclasses.replace(self.variants[new], name=new)

    def rows(self) -> list[Mapping[str, Any]]:
        """What was tried, for the report."""
        return [
            {
                "name": name,
                "runtime": variant.target.name,
                "precision": variant.precision,
                "settings": settings(variant.target),
                "speedup": dataclasses.asdict(self.ratios[name]) if name in self.ratios else None,
                "p50_ms": self.latency_ms.get(name),
                "float_sites": len(variant.kept_float),
                "failure": self.failures.get(name, ""),
            }
            for name, variant in self.variants.items()
        ]

    def _build(self, variant: Variant) -> Engine:
        if isinstance(variant.target, Prepared):
            variant.target.prepare(variant.model)
        if isinstance(variant.target, Isolated):
            self.trials.survives(variant.target, variant.model, self.workload.inputs)
        return variant.target.build(variant.model)

    def _call(self, variant: Variant) -> Any:
        return self.workload.call(self.engines[variant.name], variant.target)


def settings(target: Target) -> dict[str, Any]:
    """The fields of a target, as plain values."""
    if dataclasses.is_dataclass(target) and not isinstance(target, type):
        return dataclasses.asdict(target)
    return {}
