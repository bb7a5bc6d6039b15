"""`compress run` from options to artifact. Errors come before work wherever they can."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from compress import artifact, deferred_report
from compress.building import build
from compress.candidates import Built, Limits, measure_finals
from compress.data import Data
from compress.decision import choose
from compress.deferred import Preparation, check_deferred, prepare
from compress.device_sheets import find_sheet
from compress.facts import (
    calibration_facts,
    command_line,
    data_facts,
    delegation,
    device_remarks,
    explained,
    kernel_tables,
    model_facts,
    plan_of,
    predicted_facts,
    region_rows,
    remarks,
    shipping_remarks,
    shown_model,
    site_rows_of,
    step_facts,
    step_remarks,
    target_facts,
)
from compress.gap import simulation_gap
from compress.graph import graph_sha256, graph_sites
from compress.kernel_peaks import kernel_peaks, waterlines
from compress.loading import load
from compress.lowering import export, lower
from compress.machine import fingerprint, this_machine, versions
from compress.memory.advice import what_patches_reach
from compress.memory.limit import fits_into
from compress.metrics import Score
from compress.model import Model, TensorSpec
from compress.passes import Context
from compress.progress import Progress, silent
from compress.recipe import Recipe
from compress.registry import require_target
from compress.remote import Device, check_reachable, sheet_and_devices
from compress.repair import measure_sensitivity, repair
from compress.report import Report
from compress.report.plots import add_plots
from compress.search import search
from compress.settings import NAMES as SETTING_NAMES
from compress.settings import (
    Settings,
    capable,
    check_half,
    check_memory,
    check_speed,
    choose_passes,
    read_data,
)
from compress.target import BuiltElsewhere, Target, runtimes
from compress.variants import settings as settings_of
from compress.workload import Workload, check_workload, make_workload

PACKAGES = (
    "hwcompress",
    "torch",
    "onnx",
    "onnxruntime",
    "onnxruntime-gpu",
    "onnx-ir",
    "onnxscript",
    "numpy",
    "openvino",
    "executorch",
    "nncf",
    "torchao",
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
    def built(self) -> bool:
        """Whether there is an engine; where not, `compress build` makes it."""
        return self.report.built

    @property
    def met(self) -> bool:
        """Whether the budget was met."""
        return self.report.met


def run(
    model: Any = None,
    *,
    target: str | None = None,
    target_options: Mapping[str, Any] | None = None,
    device: str | Device | Sequence[str | Device] = (),
    bits: int | str | Sequence[int | str] | None = None,
    activation_bits: int | str | None = None,
    simulate: bool = False,
    reparam: str | None = None,
    factory: str | None = None,
    inputs: Sequence[str | TensorSpec] = (),
    calibration: Any = None,
    evaluate: Any = None,
    train: Any = None,
    max_drop: str | float | None = None,
    min_speedup: float | None = None,
    max_memory: str | int | None = None,
    repair_seconds: float | None = None,
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
    sensitivity: bool | None = None,
    seed: int | None = None,
    trust_pickle: bool = False,
    overwrite: bool = False,
    progress: Progress = silent,
) -> RunResult:
    """Compress a model for a target and write the artifact.

    Args:
        model: a path, a torch module, an ONNX model, or None with `factory` or a recipe.
        target: name of a registered target; "cpu", which takes the fastest runtime.
        target_options: fields of the target's dataclass, by name.
        device: addresses such as "ssh://user@host" or "adb://serial": the final candidates are
            measured on each, and the first that answers decides which is fastest. Or the name of a
            device sheet (`compress.device_sheets`), whose peak rates predict latencies.
        bits: of weights and activations: 8, 4 (weights only), 16 (bfloat16 where the CPU has it),
            "auto", or several, such as "4,8", to choose from for each operator; with `simulate`
            any format, such as 6 or "fp8".
        activation_bits: of activations, where they differ; with `simulate` only.
        simulate: emulate formats that the target does not have, in float32; for research.
        reparam: whether branches and chains of layers become one layer: "auto", the default, where
            that cannot cost time; "off"; "all" wherever it is exact.
        factory: `module:function` that makes the network.
        inputs: shapes such as "1x3x224x224" where the model does not say.
        calibration: data for activation ranges (see `compress.data.load_data`); without it
            ranges come from synthetic data.
        evaluate: labelled data for top-1 in the target's runtime, or a callable (or
            "module:function") that takes an engine and returns a number, higher is better.
        train: data to train with, where nothing cheaper repairs the accuracy (see
            `compress.data.load_data`); labelled or not.
        max_drop: largest loss, "0.5%" absolute points or "0.5%rel"; 1 % where there is
            something to evaluate.
        min_speedup: smallest speed-up over the original that counts as success.
        max_memory: most memory of activations at once, such as "320kB" or "2MiB", or bytes; what
            needs more does not become the artifact.
        repair_seconds: time to repair accuracy where int8 loses more than `max_drop`; 300. 0 keeps
            what is not within the limit out of the artifact without trying.
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
        sensitivity: measure for the report what each operator loses when it alone is quantized.
        seed: of everything random; 0.
        trust_pickle: unpickle `model` even if that executes code.
        overwrite: replace an existing artifact.
        progress: opens a tracker for each long step.

    Raises:
        CompressError: every problem that has a name; nothing is written then.
    """
    given = {name: value for name, value in locals().items() if name in SETTING_NAMES}
    given["device"], machines = sheet_and_devices(device)
    clock = _Clock()
    read = Recipe.from_yaml(recipe) if isinstance(recipe, (str, Path)) else recipe
    settings = Settings.resolve(given, read)
    passes = choose_passes(
        read,
        settings.reparam,
        bits=bits,
        activation_bits=activation_bits,
        simulate=simulate or None,
        method=method,
        samples=samples,
    )
    alternatives = read.alternatives if read is not None else ()
    destination = settings.create_target()
    if isinstance(destination, BuiltElsewhere):
        devices = bool(machines) or settings.device is not None
        check_deferred(
            destination, simulate=simulate, objective=settings.objective, devices=devices
        )
    else:
        require_target(destination)
    sheet = find_sheet(settings.device) if settings.device is not None else None
    with clock.phase("load"):
        original = load(
            settings.model,
            factory=settings.factory,
            inputs=tuple(settings.inputs),
            trust_pickle=trust_pickle,
        )
    directory = Path(out) if out is not None else Path(f"{original.name}-{destination.name}")
    check_workload(original, batch=settings.batch, objective=settings.objective)
    check_reachable(machines, settings.objective)
    artifact.check_output(directory, overwrite)
    served = runtimes(destination)[:1] if simulate else runtimes(destination)
    check_half(bits if not simulate else None, served)
    served, unable = capable((*passes, *alternatives), original, served)
    data, evaluator, training = read_data(settings, original)
    limits = Limits.parse(
        settings.max_drop, settings.min_speedup, evaluator is not None, settings.max_memory
    )
    check_speed(limits.min_speedup, destination)
    check_memory(settings.max_memory, destination)

    context = Context(
        target=destination,
        original=original,
        calibration=data,
        training=training,
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
            lower(start, passes, dataclasses.replace(context, target=one), alternatives)
            for one in served
        ]
    if isinstance(destination, BuiltElsewhere):
        preparation = Preparation(
            target=destination,
            original=original,
            exported=exported,
            lowered=lowered[0],
            passes=passes,
            data=data,
            evaluator=evaluator,
            training=training is not None,
            limits=limits,
            batch=workload.batch,
            repair_seconds=settings.repair_seconds,
            seconds=settings.seconds,
            seed=settings.seed,
            progress=progress,
        )
        written = Recipe(passes, settings.as_recipe(), alternatives)
        return _elsewhere(preparation, written, directory, clock)
    with clock.phase("search"):
        searched = search(
            exported,
            lowered,
            workload,
            seconds=settings.search_seconds,
            seed=settings.seed,
            progress=progress,
            memory=_memory(exported, Recipe(passes, {}, alternatives), data, destination, workload),
            fits=fits_into(limits.max_memory, workload.batch),
        )
    sites = graph_sites(exported.graph_model)
    scores: dict[str, Score] = {}
    finals = functools.partial(
        measure_finals,
        sites=sites,
        data=data,
        evaluator=evaluator,
        limits=limits,
        seconds=settings.seconds,
        seed=settings.seed,
        progress=progress,
        known=scores,
        devices=machines,
    )
    with clock.phase("measure"):
        measured = finals(searched)
    with clock.phase("repair"):
        climbed, searched = repair(
            searched,
            measured,
            lowered,
            passes,
            evaluator=evaluator,
            limits=limits,
            data=data,
            training=training is not None,
            scores=scores,
            seconds=settings.repair_seconds,
            progress=progress,
        )
        if climbed is not None and climbed.holds:
            measured = finals(searched)
    if settings.sensitivity:
        with clock.phase("sensitivity"):
            measure_sensitivity(lowered)
    decision = choose(measured, limits)
    if limits.max_memory is not None and not any(one.candidate.allowed for one in measured.all):
        decision = decision.explained(what_patches_reach(exported.graph_model, limits.max_memory))
    if climbed is not None:
        decision = decision.after(climbed.sentence(), climbed.holds)
    chosen = measured.built(decision.chosen)
    if climbed is not None and chosen.variant is climbed.variant:
        passes = climbed.passes
    with clock.phase("profile"):
        shown = explained(measured, chosen)
        kernels = kernel_tables(shown, workload.inputs, sites, settings.batch)
        timed = (table["runtime"] for table in kernels.values())
        peaks, unmeasured = kernel_peaks(timed, settings.threads, progress)
    rows = site_rows_of(sites, measured, decision.chosen)
    gap = simulation_gap(chosen, passes, data or (evaluator.data if evaluator else None))
    report = Report(
        headline=(
            *device_remarks(measured),
            *decision.sentences,
            *unable,
            *delegation(chosen.engine.kernels(), sites),
            *step_remarks(shown_model(measured, decision.chosen)),
            *remarks(searched, exported, destination),
            *shipping_remarks(chosen),
        ),
        met=decision.met,
        chosen=decision.chosen,
        budget=limits.to_dict(),
        candidates=tuple(one.candidate for one in measured.all),
        sites=rows,
        tried=tuple(searched.screening.rows()),
        regions=region_rows(searched, chosen),
        ladder=tuple(map(dataclasses.asdict, climbed.attempts)) if climbed is not None else (),
        gap=gap,
        sensitivity=tuple(context.memo.get("quantize.sensitivity", ())),
        predicted=predicted_facts(sheet, sites, rows) if sheet is not None else {},
        devices=tuple(one.to_dict() for one in measured.devices),
        kernels=kernels,
        peaks={name: one.to_dict() for name, one in peaks.items()},
        waterlines=waterlines(kernels, peaks),
        unplotted=unmeasured,
        latency=measured.latency,
        command=command_line(),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        steps=tuple(step_facts(step) for step in shown_model(measured, decision.chosen).history),
        calibration={**calibration_facts(searched), **data_facts(data)},
        evaluation=data_facts(evaluator.data) if evaluator else {},
        model=model_facts(original, exported),
        target=target_facts(destination, chosen.variant.target),
        machine={**dataclasses.asdict(this_machine()), "fingerprint": fingerprint(this_machine())},
        versions=versions(*PACKAGES),
    )
    recipe_text = Recipe(passes, settings.as_recipe(), alternatives).to_yaml()
    with clock.phase("write"):
        report = _write(report, chosen, recipe_text, directory, clock)
    return RunResult(report, directory)


def _elsewhere(given: Preparation, recipe: Recipe, directory: Path, clock: _Clock) -> RunResult:
    """Prepare the build, and build at once where the hardware is."""
    with clock.phase("prepare"):
        found = prepare(given)
        report = deferred_report.report(given, found)
    passes = found.climbed.passes if found.climbed is not None else recipe.passes
    text = dataclasses.replace(recipe, passes=passes).to_yaml()
    report = dataclasses.replace(report, seconds=dict(clock.seconds))
    report = deferred_report.write(given, found, report, text, directory)
    if given.target.check().available:
        report = build(
            directory,
            evaluate=given.evaluator,
            seconds=given.seconds,
            seed=given.seed,
            progress=given.progress,
        )
    return RunResult(report, directory)


class _Clock:
    """Seconds of each phase."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - start, 3)


def _memory(
    exported: Model, recipe: Recipe, data: Data | None, target: Target, workload: Workload
) -> Path:
    """Where the placements of this model, data, target and machine are remembered."""
    parts = [
        graph_sha256(exported.graph_model),
        recipe.to_yaml(),
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
        artifact.check_reproduces(target.load(folder), chosen.engine)
        hashes = {path.name: artifact.sha256_file(path) for path in files}
        with clock.phase("plot"):
            report = add_plots(report, folder)
        report = dataclasses.replace(report, files=hashes, seconds=dict(clock.seconds))
        artifact.write_text(folder / "report.md", report.markdown())
        text = json.dumps(report.to_dict(), indent=1, allow_nan=False)
        artifact.write_text(folder / artifact.REPORT, text)
    return report
