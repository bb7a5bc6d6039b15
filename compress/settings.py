"""What a run was told: arguments and recipe together, with the defaults for the rest."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from compress.data import Data, load_data
from compress.errors import UnsupportedError, UsageError
from compress.ladder import DEFAULT_SECONDS as REPAIR_SECONDS
from compress.machine import this_machine
from compress.metrics import Evaluator, resolve_evaluator
from compress.model import Model, TensorSpec
from compress.passes import Pass, is_left_out
from compress.recipe import REPARAM, Recipe, default_passes, with_reparam
from compress.registry import create_target
from compress.search import DEFAULT_SECONDS
from compress.target import BuiltElsewhere, Elsewhere, Target

HALF = ("bfloat16", "float16")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Arguments of `run` after recipe and defaults have filled the gaps."""

    model: Any = None
    factory: str | None = None
    inputs: Sequence[str | TensorSpec] = ()
    target: str = "cpu"
    target_options: Mapping[str, Any] = field(default_factory=dict)
    device: str | None = None
    threads: int | None = None
    calibration: Any = None
    evaluate: Any = None
    layout: str = "auto"
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None
    max_drop: str | float | None = None
    min_speedup: float | None = None
    max_memory: str | int | None = None
    train: Any = None
    repair_seconds: float = REPAIR_SECONDS
    batch: int = 1
    objective: str = "latency"
    reparam: str | None = None
    search_seconds: float = DEFAULT_SECONDS
    seconds: float = 10.0
    sensitivity: bool = False
    seed: int = 0

    def create_target(self) -> Target:
        """The target with its options, for throughput with one stream for each thread."""
        streams = None
        if self.objective == "throughput":
            streams = self.threads or this_machine().cores
        given = {**self.target_options, "threads": self.threads, "streams": streams}
        target = create_target(self.target, **given)
        if isinstance(target, BuiltElsewhere) and hasattr(target, "batch"):
            return dataclasses.replace(target, batch=self.batch)  # type: ignore[type-var]
        return target

    @classmethod
    def resolve(cls, given: dict[str, Any], recipe: Recipe | None) -> Settings:
        """Arguments over the recipe's settings over the defaults.

        Raises:
            UsageError: there is no model, or a number is out of range.
        """
        values = dict(recipe.settings) if recipe is not None else {}
        empty: tuple[object, ...] = ((), [])
        values |= {
            name: value
            for name, value in given.items()
            if value is not None and not (isinstance(value, (tuple, list)) and value in empty)
        }
        settings = cls(**values)
        if settings.model is None and settings.factory is None:
            raise UsageError(
                "There is no model. Give a file, --model module:factory, or a --recipe that "
                "names one."
            )
        if settings.reparam not in (None, *REPARAM):
            raise UsageError(
                f"--reparam {settings.reparam} is none of {', '.join(REPARAM)}: merge branches "
                f"where that cannot cost time, never, or wherever it is exact."
            )
        if settings.seed < 0:
            raise UsageError(f"--seed {settings.seed} must be 0 or more.")
        if not 0.5 <= settings.seconds <= 3600:
            raise UsageError(f"--seconds {settings.seconds} is out of range: 0.5 to 3600.")
        if not 0 <= settings.search_seconds <= 86400:
            raise UsageError(
                f"--time {settings.search_seconds} is out of range: 0 to 86400 seconds; 0 tries "
                f"only whole models in float and in int8."
            )
        if not 0 <= settings.repair_seconds <= 86400:
            raise UsageError(
                f"--repair-time {settings.repair_seconds} is out of range: 0 to 86400 seconds; 0 "
                f"repairs nothing."
            )
        return settings

    def as_recipe(self) -> dict[str, Any]:
        """What a YAML file can hold; objects handed over in Python are left out."""
        plain = (str, int, float, Path)
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        values["inputs"] = [str(spec).removeprefix(":") for spec in self.inputs]
        return {
            name: value
            for name, value in values.items()
            if isinstance(value, plain)
            or (isinstance(value, (list, tuple)) and all(isinstance(v, plain) for v in value))
            or isinstance(value, Mapping)
        }


NAMES = frozenset(field.name for field in dataclasses.fields(Settings))
"""Of the arguments of `compress.run` that are settings."""


def choose_passes(
    recipe: Recipe | None, reparam: str | None = None, **quantize: Any
) -> tuple[Pass, ...]:
    """The recipe's passes, or the default ones with these options of `quantize`.

    `reparam` says for both what is merged; a recipe that has its own `merge_branches` keeps that
    where it is None.

    Raises:
        UsageError: both are given.
    """
    given = {name: value for name, value in quantize.items() if value is not None}
    if recipe is None:
        return default_passes(reparam=reparam or "auto", **given)
    if given:
        raise UsageError(
            f"--recipe says which passes run and with which options, so {', '.join(given)} cannot "
            f"be given beside it. Change the recipe's `quantize` entry, or leave --recipe out."
        )
    return recipe.passes if reparam is None else with_reparam(recipe.passes, reparam)


def capable(
    passes: Sequence[Pass], model: Model, targets: Sequence[Target]
) -> tuple[tuple[Target, ...], tuple[str, ...]]:
    """The runtimes that every pass applies to, and a sentence about each of the others.

    Raises:
        UnsupportedError: a pass needs what the first, which speed-ups refer to, does not have, or
            what none of them quantizes to by itself.
    """
    found: list[Target] = []
    sentences: list[str] = []
    for one in targets:
        try:
            for step in passes:
                if not is_left_out(step, one):
                    step.check(model, one)
            found.append(one)
        except UnsupportedError as error:
            if not found:
                raise
            sentences.append(f"{one.name} was not tried: {error}")
    for step in passes:
        if all(is_left_out(step, one) for one in found):
            _check_own(step, found)
    return tuple(found), tuple(sentences)


def _check_own(step: Pass, targets: Sequence[Target]) -> None:
    makes = getattr(step, "makes", None)
    own = [p for one in targets for p in one.capabilities.own_precisions or ()]
    if makes is not None and makes not in own:
        names = ", ".join(one.name for one in targets)
        floats = dict.fromkeys(p for one in targets for p in one.capabilities.precisions)
        others = " or --bits 8" if "int8" in own else ""
        raise UnsupportedError(
            f"Nothing in {names} computes {makes}; there is {', '.join((*floats, *own))}. Use "
            f"--bits 16{others}."
        )


def read_data(
    settings: Settings, model: Model
) -> tuple[Data | None, Evaluator | None, Data | None]:
    """Data for calibration, evaluation and training, as far as they are given."""
    how: dict[str, Any] = {
        "layout": settings.layout,
        "mean": settings.mean,
        "std": settings.std,
    }
    data = evaluator = training = None
    if settings.calibration is not None:
        data = load_data(settings.calibration, model.inputs, **how)
    if settings.evaluate is not None:
        evaluator = resolve_evaluator(settings.evaluate, model.inputs, **how)
    if settings.train is not None:
        training = load_data(settings.train, model.inputs, **how)
    return data, evaluator, training


def check_speed(min_speedup: float | None, target: Target) -> None:
    """Refuse --min-speedup where nothing is measured that it could refer to.

    Raises:
        UsageError: the artifact runs on another device.
    """
    if min_speedup is not None and isinstance(target, Elsewhere):
        raise UsageError(
            f"--min-speedup {min_speedup:g} cannot be checked for {target.name}: its artifact runs "
            f"on another device, and speed there is not measured. Leave the option out."
        )


def check_memory(max_memory: str | int | None, target: Target) -> None:
    """Refuse --max-memory where no runtime here tells what it needs.

    Raises:
        UsageError: the artifact is built, or runs, on another device.
    """
    if max_memory is not None and isinstance(target, (BuiltElsewhere, Elsewhere)):
        raise UsageError(
            f"--max-memory {max_memory} cannot be checked for {target.name}: its engine is built, "
            f"or runs, on another device. Leave the option out; `compress inspect` shows the peak "
            f"of the model itself."
        )


def check_half(bits: object, targets: Sequence[Target]) -> None:
    """Refuse --bits 16 where no runtime computes in a 16-bit float.

    Raises:
        UnsupportedError: none does.
    """
    runs = {precision for one in targets for precision in one.capabilities.precisions}
    if str(bits) == "16" and runs.isdisjoint(HALF):
        names = ", ".join(one.name for one in targets)
        raise UnsupportedError(
            f"--bits 16 needs a runtime that computes in {' or '.join(HALF)} on this CPU, and "
            f"{names} runs {', '.join(sorted(runs))}. Use --bits 8, or --simulate to see what "
            f"int16 would lose."
        )
