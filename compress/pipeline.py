"""`compress run` from options to artifact. Errors come before work wherever they can."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from compress import artifact
from compress.candidates import Built, Limits, choose, measure_finals
from compress.data import Data, load_data
from compress.errors import EngineError, UsageError
from compress.facts import (
    calibration_facts,
    command_line,
    data_facts,
    model_facts,
    plan_of,
    region_rows,
    remarks,
    shown_model,
    site_rows_of,
    step_facts,
    target_facts,
)
from compress.graph import graph_sha256, graph_sites
from compress.loading import load
from compress.lowering import export, lower
from compress.machine import fingerprint, this_machine, versions
from compress.metrics import Evaluator, resolve_evaluator
from compress.model import Model, TensorSpec, random_inputs
from compress.passes import Context, Pass
from compress.progress import Progress, silent
from compress.recipe import Recipe, default_passes
from compress.registry import create_target, require_target
from compress.report import Report
from compress.search import DEFAULT_SECONDS, search
from compress.target import Engine, Target, runtimes
from compress.variants import settings as settings_of
from compress.workload import Workload, check_workload, make_workload

PACKAGES = (
    "hwcompress",
    "torch",
    "onnx",
    "onnxruntime",
    "onnx-ir",
    "onnxscript",
    "numpy",
    "openvino",
)
CACHE = Path("~/.cache/hwcompress")


@dataclass(frozen=True)
class RunResult:
    """What a run leaves: the report, and the directory of the artifact.

    Attributes:
        report: the content of `report.json`.
        directory: where the artifact is.
    """

    report: Report
    directory: Path

    @property
    def met(self) -> bool:
        """Whether the budget was met."""
        return self.report.met


def run(
    model: Any = None,
    *,
    target: str | None = None,
    bits: int | None = None,
    factory: str | None = None,
    inputs: Sequence[str | TensorSpec] = (),
    calibration: Any = None,
    evaluate: Any = None,
    max_drop: str | float | None = None,
    min_speedup: float | None = None,
    out: Path | str | None = None,
    threads: int | None = None,
    batch: int | None = None,
    objective: str | None = None,
    layout: str | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    samples: int | None = None,
    method: str | None = None,
    recipe: Path | str | Recipe | None = None,
    search_seconds: float | None = None,
    seconds: float | None = None,
    seed: int | None = None,
    trust_pickle: bool = False,
    overwrite: bool = False,
    progress: Progress = silent,
) -> RunResult:
    """Compress a model for a target and write the artifact.

    Args:
        model: a path, a torch module, an ONNX model, or None with `factory` or a recipe.
        target: name of a registered target; "cpu", which takes the fastest runtime.
        bits: of weights and activations; 8.
        factory: `module:function` that makes the network.
        inputs: shapes such as "1x3x224x224" where the model does not say.
        calibration: data for activation ranges (see `compress.data.load_data`); without it
            ranges come from synthetic data.
        evaluate: labelled data for top-1 in the target's runtime, or a callable (or
            "module:function") that takes an engine and returns a number, higher is better.
        max_drop: largest loss, "0.5%" absolute points or "0.5%rel"; 1 % where there is
            something to evaluate.
        min_speedup: smallest speed-up over the original that counts as success.
        out: directory of the artifact.
        threads: of the runtime; all usable cores.
        batch: samples in one request, where the model's batch is dynamic; 1.
        objective: "latency" of one request (the default), or "throughput" of many in flight.
        layout: of image data, "nchw", "nhwc" or "auto".
        mean: per channel, subtracted after scaling to 0..1.
        std: per channel, divided by.
        samples: calibration samples to use; 128.
        method: range method: "minmax", "percentile", "mse" (the default) or "entropy".
        recipe: a recipe or its file; fills in what the arguments leave out, and its passes
            replace the default ones.
        search_seconds: time to look for the fastest placement of int8 and the fastest settings;
            60. 0 tries only whole models in float and int8.
        seconds: time for the final latency measurement; 10.
        seed: of everything random; 0.
        trust_pickle: unpickle `model` even if that executes code.
        overwrite: replace an existing artifact.
        progress: opens a tracker for each long step.

    Raises:
        CompressError: every problem that has a name; nothing is written then.
    """
    given = {name: value for name, value in locals().items() if name in _SETTINGS}
    clock = _Clock()
    read = Recipe.from_yaml(recipe) if isinstance(recipe, (str, Path)) else recipe
    settings = _Settings.resolve(given, read)
    passes = _passes(read, bits=bits, method=method, samples=samples)
    destination = settings.create_target()
    require_target(destination)
    with clock.phase("load"):
        original = load(
            settings.model,
            factory=settings.factory,
            inputs=tuple(settings.inputs),
            trust_pickle=trust_pickle,
        )
    directory = Path(out) if out is not None else Path(f"{original.name}-{destination.name}")
    check_workload(original, batch=settings.batch, objective=settings.objective)
    artifact.check_output(directory, overwrite)
    for step in passes:
        for one in runtimes(destination):
            step.check(original, one)
    data, evaluator = _read_data(settings, original)
    limits = Limits.parse(settings.max_drop, settings.min_speedup, evaluator is not None)

    context = Context(
        target=destination,
        original=original,
        calibration=data,
        seed=settings.seed,
        progress=progress,
        cache=CACHE.expanduser(),
    )
    workload_threads = settings.threads or this_machine().cores
    with clock.phase("export"):
        exported, start = export(original, passes, context)
    workload = make_workload(
        exported,
        data or (evaluator.data if evaluator else None),
        batch=settings.batch,
        objective=settings.objective,
        threads=workload_threads,
    )
    with clock.phase("compress"):
        lowered = [
            lower(start, passes, dataclasses.replace(context, target=one))
            for one in runtimes(destination)
        ]
    with clock.phase("search"):
        searched = search(
            exported,
            lowered,
            workload,
            seconds=settings.search_seconds,
            seed=settings.seed,
            progress=progress,
            memory=_memory(exported, passes, data, destination, workload),
        )
    sites = graph_sites(exported.graph_model)
    with clock.phase("measure"):
        measured = measure_finals(
            searched,
            sites,
            data=data,
            evaluator=evaluator,
            limits=limits,
            seconds=settings.seconds,
            seed=settings.seed,
            progress=progress,
        )
    decision = choose(measured, limits)
    chosen = measured.built(decision.chosen)
    report = Report(
        headline=(*decision.sentences, *remarks(searched, exported, destination)),
        met=decision.met,
        chosen=decision.chosen,
        budget=limits.to_dict(),
        candidates=tuple(one.candidate for one in measured.all),
        sites=site_rows_of(sites, measured, decision.chosen),
        tried=tuple(searched.screening.rows()),
        regions=region_rows(searched, chosen),
        latency=measured.latency,
        command=command_line(),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        steps=tuple(step_facts(step) for step in shown_model(measured, decision.chosen).history),
        calibration={**calibration_facts(searched), **data_facts(data)},
        evaluation=data_facts(evaluator.data) if evaluator else {},
        model=model_facts(original, exported),
        target=target_facts(destination, chosen),
        machine={**dataclasses.asdict(this_machine()), "fingerprint": fingerprint(this_machine())},
        versions=versions(*PACKAGES),
    )
    recipe_text = Recipe(passes, settings.as_recipe()).to_yaml()
    with clock.phase("write"):
        report = _write(report, chosen, recipe_text, directory, clock)
    return RunResult(report, directory)


@dataclass(frozen=True, kw_only=True)
class _Settings:
    """Arguments of `run` after recipe and defaults have filled the gaps."""

    model: Any = None
    factory: str | None = None
    inputs: Sequence[str | TensorSpec] = ()
    target: str = "cpu"
    threads: int | None = None
    calibration: Any = None
    evaluate: Any = None
    layout: str = "auto"
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None
    max_drop: str | float | None = None
    min_speedup: float | None = None
    batch: int = 1
    objective: str = "latency"
    search_seconds: float = DEFAULT_SECONDS
    seconds: float = 10.0
    seed: int = 0

    def create_target(self) -> Target:
        """The target, for throughput with one stream for each thread."""
        streams = None
        if self.objective == "throughput":
            streams = self.threads or this_machine().cores
        return create_target(self.target, threads=self.threads, streams=streams)

    @classmethod
    def resolve(cls, given: dict[str, Any], recipe: Recipe | None) -> _Settings:
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
        if settings.seed < 0:
            raise UsageError(f"--seed {settings.seed} must be 0 or more.")
        if not 0.5 <= settings.seconds <= 3600:
            raise UsageError(f"--seconds {settings.seconds} is out of range: 0.5 to 3600.")
        if not 0 <= settings.search_seconds <= 86400:
            raise UsageError(
                f"--time {settings.search_seconds} is out of range: 0 to 86400 seconds; 0 tries "
                f"only whole models in float and in int8."
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
        }


def _passes(recipe: Recipe | None, **quantize: Any) -> tuple[Pass, ...]:
    given = {name: value for name, value in quantize.items() if value is not None}
    if recipe is None:
        return default_passes(**given)
    if given:
        raise UsageError(
            f"--recipe says which passes run and with which options, so {', '.join(given)} cannot "
            f"be given beside it. Change the recipe's `quantize` entry, or leave --recipe out."
        )
    return recipe.passes


_SETTINGS = frozenset(field.name for field in dataclasses.fields(_Settings))


class _Clock:
    """Seconds of each phase."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - start, 3)


def _read_data(settings: _Settings, model: Model) -> tuple[Data | None, Evaluator | None]:
    how: dict[str, Any] = {
        "layout": settings.layout,
        "mean": settings.mean,
        "std": settings.std,
    }
    data = evaluator = None
    if settings.calibration is not None:
        data = load_data(settings.calibration, model.inputs, **how)
    if settings.evaluate is not None:
        evaluator = resolve_evaluator(settings.evaluate, model.inputs, **how)
    return data, evaluator


def _memory(
    exported: Model, passes: Sequence[Pass], data: Data | None, target: Target, workload: Workload
) -> Path:
    """Where the placements of this model, data, target and machine are remembered."""
    parts = [
        graph_sha256(exported.graph_model),
        Recipe(tuple(passes)).to_yaml(),
        data.sha256 if data is not None else "",
        target.name,
        settings_of(target),
        workload.to_dict(),
        fingerprint(this_machine()),
        versions(*PACKAGES),
        os.environ.get("ONEDNN_MAX_CPU_ISA", ""),
    ]
    key = hashlib.sha256(json.dumps(parts, default=str).encode()).hexdigest()[:32]
    return CACHE.expanduser() / f"placement-{key}.json"


def _write(report: Report, chosen: Built, recipe: str, directory: Path, clock: _Clock) -> Report:
    """Write the artifact, load it again and compare before it gets its name."""
    plan, target = plan_of(chosen.variant.model), chosen.variant.target
    with artifact.writing(directory) as folder:
        files = chosen.engine.save(folder)
        if plan:
            artifact.write_text(folder / "plan.json", json.dumps(plan))
            files.append(folder / "plan.json")
        artifact.write_text(folder / "recipe.yaml", recipe)
        files.append(folder / "recipe.yaml")
        _check_loads(target, folder, chosen.engine)
        hashes = {path.name: artifact.sha256_file(path) for path in files}
        report = dataclasses.replace(report, files=hashes, seconds=dict(clock.seconds))
        artifact.write_text(folder / "report.md", report.markdown())
        text = json.dumps(report.to_dict(), indent=1, allow_nan=False)
        artifact.write_text(folder / artifact.REPORT, text)
    return report


def _check_loads(target: Target, folder: Path, engine: Engine) -> None:
    """The artifact on disk gives exactly what was measured.

    Raises:
        EngineError: it does not load, or its outputs differ.
    """
    inputs = random_inputs(engine.inputs, 1, np.random.default_rng(0))
    expected, got = engine(inputs), target.load(folder)(inputs)
    for name, array in expected.items():
        if name not in got or not np.array_equal(array, got[name], equal_nan=True):
            raise EngineError(
                f"The written artifact does not reproduce output {name} of the engine that was "
                f"measured. Nothing was kept; please report the model."
            )
