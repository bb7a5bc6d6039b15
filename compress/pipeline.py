"""`compress run` from options to artifact. Errors come before work wherever they can."""

from __future__ import annotations

import dataclasses
import json
import shlex
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from compress import artifact
from compress.candidates import Limits, Measured, choose, measure_candidates
from compress.data import Data, load_data
from compress.errors import EngineError, UsageError
from compress.export import to_onnx
from compress.graph import graph_sites, macs_in_subgraphs
from compress.loading import load, to_torch
from compress.machine import fingerprint, this_machine, versions
from compress.metrics import Evaluator, resolve_evaluator
from compress.model import Model, Step, TensorSpec, random_inputs
from compress.passes import Context, Pass
from compress.progress import Progress, silent
from compress.recipe import Recipe, default_passes
from compress.registry import create_target, require_target
from compress.report import Report
from compress.target import Engine, Target

PACKAGES = ("hwcompress", "torch", "onnx", "onnxruntime", "onnx-ir", "onnxscript", "numpy")
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
    layout: str | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    samples: int | None = None,
    method: str | None = None,
    recipe: Path | str | Recipe | None = None,
    seconds: float | None = None,
    seed: int | None = None,
    trust_pickle: bool = False,
    overwrite: bool = False,
    progress: Progress = silent,
) -> RunResult:
    """Compress a model for a target and write the artifact.

    Args:
        model: a path, a torch module, an ONNX model, or None with `factory` or a recipe.
        target: name of a registered target; "cpu".
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
        threads: of one operator; all usable cores.
        layout: of image data, "nchw", "nhwc" or "auto".
        mean: per channel, subtracted after scaling to 0..1.
        std: per channel, divided by.
        samples: calibration samples to use; 128.
        method: range method: "minmax", "percentile", "mse" (the default) or "entropy".
        recipe: a recipe or its file; fills in what the arguments leave out, and its passes
            replace the default ones.
        seconds: time for the latency measurement; 10.
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
    destination = create_target(settings.target, threads=settings.threads)
    require_target(destination)
    with clock.phase("load"):
        original = load(
            settings.model,
            factory=settings.factory,
            inputs=tuple(settings.inputs),
            trust_pickle=trust_pickle,
        )
    directory = Path(out) if out is not None else Path(f"{original.name}-{destination.name}-int8")
    artifact.check_output(directory, overwrite)
    for step in passes:
        step.check(original, destination)
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
    with clock.phase("export"):
        exported, compressed = _apply(original, Recipe(passes), context)
    sites = graph_sites(exported.graph_model)
    with clock.phase("measure"):
        measured = measure_candidates(
            destination,
            exported,
            compressed,
            sites,
            data=data,
            evaluator=evaluator,
            limits=limits,
            seconds=settings.seconds,
            seed=settings.seed,
            progress=progress,
        )
    decision = choose(measured, limits)
    report = Report(
        headline=(*decision.sentences, *_remarks(compressed, destination)),
        met=decision.met,
        chosen=decision.chosen,
        budget=limits.to_dict(),
        candidates=tuple(one.candidate for one in measured.all),
        sites=measured.site_rows,
        latency=measured.latency,
        command=_command(),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        steps=tuple(_step(step) for step in compressed.history),
        calibration={**_calibration(compressed), **_data(data)},
        evaluation=_data(evaluator.data) if evaluator else {},
        model=_describe_model(original, exported),
        target=_describe_target(destination),
        machine={**dataclasses.asdict(this_machine()), "fingerprint": fingerprint(this_machine())},
        versions=versions(*PACKAGES),
    )
    recipe_text = Recipe(passes, settings.as_recipe()).to_yaml()
    with clock.phase("write"):
        plan = _plan(compressed)
        report = _write(report, measured, recipe_text, plan, directory, destination, clock)
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
    seconds: float = 10.0
    seed: int = 0

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


def _apply(original: Model, recipe: Recipe, context: Context) -> tuple[Model, Model]:
    """The exported original, and the model after every pass."""
    opset = context.target.capabilities.opset
    model = original
    for step in recipe.passes:
        if step.stage == "torch":
            model = step.apply(to_torch(model), context)
    exported = to_onnx(original, opset, context.progress, context.calibration)
    start = exported if model is original else to_onnx(model, opset, context.progress)
    compressed = dataclasses.replace(start, program=start.graph_model.clone())
    for step in recipe.passes:
        if step.stage == "onnx":
            before = [value.name for value in compressed.graph_model.graph.outputs]
            compressed = step.apply(compressed, context)
            after = [value.name for value in compressed.graph_model.graph.outputs]
            if before != after:
                raise EngineError(
                    f"Pass {step.name} changed the outputs from {before} to {after}; a pass must "
                    f"keep them. Please report it to its author."
                )
    return exported, compressed


def _remarks(compressed: Model, target: Target) -> list[str]:
    """What a reader must know about ranges and machine."""
    remarks = []
    source = _calibration(compressed)["ranges_from"]
    if source and source != "calibration data":
        remarks.append(f"No calibration data were given; ranges come from {source}.")
    if hidden := macs_in_subgraphs(compressed.graph_model):
        remarks.append(
            f"{hidden} operators with multiply-accumulates are inside If, Loop or Scan: they stay "
            f"in float, and the shares of MACs do not count them."
        )
    return [*remarks, *target.capabilities.notes]


def _calibration(compressed: Model) -> dict[str, Any]:
    found = next((s.details for s in compressed.history if "ranges_from" in s.details), {})
    return {
        "ranges_from": found.get("ranges_from", ""),
        "samples": found.get("samples", 0),
    }


def _data(data: Data | None) -> dict[str, Any]:
    return {"data": data.name, "sha256": data.sha256} if data is not None else {}


def _plan(compressed: Model) -> Mapping[str, Any]:
    found = (step.details["plan"] for step in compressed.history if "plan" in step.details)
    return next(found, {})


def _step(step: Step) -> dict[str, Any]:
    """A step without the plan, which is written to a file of its own."""
    details = {k: v for k, v in step.details.items() if k not in ("plan", "reasons")}
    return {"name": step.name, "options": dict(step.options), "details": details}


def _describe_model(original: Model, exported: Model) -> dict[str, Any]:
    return {
        "name": original.name,
        "source": original.source,
        "sha256": original.sha256,
        "inputs": [str(spec) for spec in exported.inputs],
    }


def _describe_target(target: Target) -> dict[str, Any]:
    facts = target.capabilities
    options: dict[str, Any] = {}
    if dataclasses.is_dataclass(target) and not isinstance(target, type):
        options = dataclasses.asdict(target)
    return {
        "name": target.name,
        "options": options,
        "source": facts.source,
        "opset": facts.opset,
        "activation": facts.activation,
        "reduced_weights": facts.reduced_weights,
        "int8_dot_product": facts.int8_dot_product,
    }


def _command() -> str:
    """The command line, when this is the console script."""
    if Path(sys.argv[0]).name != "compress":
        return ""
    return shlex.join(["compress", *sys.argv[1:]])


def _write(
    report: Report,
    measured: Measured,
    recipe: str,
    plan: Mapping[str, Any],
    directory: Path,
    target: Target,
    clock: _Clock,
) -> Report:
    """Write the artifact, load it again and compare before it gets its name."""
    chosen = measured.built(report.chosen)
    with artifact.writing(directory) as folder:
        files = chosen.engine.save(folder)
        if plan and report.chosen != "float32":
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
