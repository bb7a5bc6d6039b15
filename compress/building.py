"""`compress build`: build, measure and judge what `compress run` prepared on another machine."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from compress import artifact, build_sheet
from compress.build_sheet import BuildSheet, Entry
from compress.candidates import (
    Built,
    Measured,
    drop_facts,
    int8_share,
    keeps_limit,
    reasons,
    score_facts,
    site_rows,
    size_of,
)
from compress.data import Layout
from compress.decision import choose
from compress.errors import EngineError, LoadError, UnsupportedError
from compress.facts import command_line, data_facts, target_facts
from compress.fidelity import fidelity
from compress.gap import compare_outputs
from compress.graph import graph_sites
from compress.latency import Comparison, measure
from compress.loading import load
from compress.machine import fingerprint, this_machine, versions
from compress.metrics import Evaluator, Score, resolve_evaluator
from compress.model import Model
from compress.progress import Progress, silent
from compress.registry import create_target
from compress.report import Candidate, Report
from compress.sessions import MARGIN
from compress.simulated import Simulated
from compress.target import BuiltElsewhere, DeviceTimed, Engine
from compress.variants import Variant, settings
from compress.workload import Workload, make_workload

CACHE = Path("~/.cache/hwcompress/engines")
"""Engines of a build that was interrupted. They are executable content, so they are resumed from
the user's own folder and never from the artifact, which may have come from somebody else."""
_ENGINE_FACTS = "engine.json"
_SAMPLES = 64
PACKAGES = ("hwcompress", "torch", "tensorrt", "tensorrt-cu12", "onnx", "onnxruntime", "numpy")


@dataclass
class _Build:
    """One build: what is given, and what was found so far.

    Attributes:
        directory: of the artifact.
        sheet: its `build.json`.
        target: that builds.
        workload: what is timed.
        evaluator: judges, or None.
        progress: opens trackers.
        models: by name, the original first.
        engines: by name.
        kept: folders of engines to resume from, which the finished artifact makes superfluous.
        failures: why a candidate is not among the engines.
    """

    directory: Path
    sheet: BuildSheet
    target: BuiltElsewhere
    evaluator: Evaluator | None
    progress: Progress
    models: dict[str, Model]
    workload: Workload
    engines: dict[str, Engine] = field(default_factory=dict)
    kept: list[Path] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)

    @property
    def baseline(self) -> str:
        return self.sheet.candidates[0].name


def build(
    directory: Path | str,
    *,
    evaluate: Any = None,
    layout: Layout = "auto",
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    seconds: float | None = None,
    seed: int | None = None,
    progress: Progress = silent,
) -> Report:
    """Build every candidate of a prepared artifact, keep the best, and complete its report.

    The artifact stays as it is until everything is done; engines that were built before an
    interruption are taken from the cache.

    Args:
        directory: that `compress run` wrote.
        evaluate: labelled data or a function, as for `compress.run`; without it the accuracy of
            the simulation stands.
        layout: of image data.
        mean: per channel, subtracted after scaling to 0..1.
        std: per channel, divided by.
        seconds: of the latency measurement; as the run said.
        seed: of everything random; as the run said.
        progress: opens trackers.

    Raises:
        LoadError: it is no such directory, damaged, or a file was changed.
        UnsupportedError: engines cannot be built on this machine.
        EngineError: the original cannot be built.
    """
    directory = Path(directory)
    earlier = artifact.read_report(directory)
    sheet = build_sheet.read(directory)
    artifact.check_files(directory, earlier["files"])
    sheet = dataclasses.replace(
        sheet,
        seconds=sheet.seconds if seconds is None else seconds,
        seed=sheet.seed if seed is None else seed,
    )
    target = _target(directory, sheet)
    artifact.check_output(directory, overwrite=True)
    models = {one.name: load(directory / one.file) for one in sheet.candidates}
    original = next(iter(models.values()))
    evaluator = None
    if evaluate is not None:
        evaluator = resolve_evaluator(
            evaluate,
            original.inputs,
            layout=layout,
            mean=mean,
            std=std,
        )
    data = evaluator.data if evaluator is not None else None
    workload = make_workload(original, data, batch=sheet.batch, objective="latency", threads=1)
    one = _Build(directory, sheet, target, evaluator, progress, models, workload)
    _build_engines(one)
    comparison = _measure(one)
    measured = Measured(_judge(one, comparison, earlier), _latency(one, comparison), one.failures)
    report = _report(one, measured, earlier)
    report = _write(one, report)
    for folder in one.kept:
        shutil.rmtree(folder, ignore_errors=True)
    return report


def _target(directory: Path, sheet: BuildSheet) -> BuiltElsewhere:
    target = create_target(sheet.target, **sheet.options)
    if not isinstance(target, BuiltElsewhere):
        raise LoadError(
            f"{directory / build_sheet.NAME} names the target {sheet.target}, which is not built "
            f"on another machine. Run `compress run` again."
        )
    check = target.check()
    if not check.available:
        install = f" Install: {check.install}." if check.install else ""
        raise UnsupportedError(
            f"The {target.name} engine of {directory} cannot be built on this machine: "
            f"{check.reason}{install} Nothing was changed; run `compress build` where these are."
        )
    return target


def _build_engines(one: _Build) -> None:
    """Build what is not in the cache; a failing candidate costs only itself.

    Raises:
        EngineError: the original fails.
    """
    total = len(one.sheet.candidates)
    with one.progress(f"Build {one.target.name} engines", total) as advance:
        for entry in one.sheet.candidates:
            try:
                engine = _engine(one, entry)
                engine(one.workload.inputs)
                one.engines[entry.name] = engine
            except EngineError as error:
                if entry.name == one.baseline:
                    raise
                one.failures[entry.name] = str(error)
            advance(1, entry.name)


def _engine(one: _Build, entry: Entry) -> Engine:
    facts = [dict(entry.sha256), settings(one.target), dict(one.target.builder())]
    key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]
    folder = CACHE.expanduser() / key
    one.kept.append(folder)
    if (folder / _ENGINE_FACTS).is_file():
        try:
            hashes = json.loads((folder / _ENGINE_FACTS).read_text(encoding="utf-8"))
            artifact.check_files(folder, hashes, _ENGINE_FACTS)
            return one.target.load(folder)
        except (ValueError, LoadError, EngineError):
            shutil.rmtree(folder, ignore_errors=True)
    engine = one.target.build_in(one.models[entry.name], one.directory)
    with artifact.writing(folder) as made:
        hashes = {path.name: artifact.sha256_file(path) for path in engine.save(made)}
        artifact.write_text(made / _ENGINE_FACTS, json.dumps(hashes))
    return engine


def _measure(one: _Build) -> Comparison:
    """Latency of all engines in turns, on the device's own clock where it has one."""
    inputs = one.workload.inputs
    clocked = {n: e for n, e in one.engines.items() if isinstance(e, DeviceTimed)}
    own = len(clocked) == len(one.engines)
    calls: dict[str, Callable[[], object]] = (
        {name: engine.timed(inputs) for name, engine in clocked.items()}
        if own
        else {name: partial(engine, inputs) for name, engine in one.engines.items()}
    )
    return measure(
        calls,
        baseline=one.baseline,
        seconds=one.sheet.seconds,
        margin=MARGIN,
        own_clock=own,
        seed=one.sheet.seed,
        progress=one.progress,
    )


def _judge(one: _Build, comparison: Comparison, earlier: Mapping[str, Any]) -> tuple[Built, ...]:
    """Accuracy from the fastest on, until one keeps the limit; fidelity of every candidate."""
    limits, base = one.sheet.limits, one.baseline
    data = one.evaluator.data if one.evaluator is not None else None
    sites = graph_sites(one.models[base].graph_model)
    simulated = {row["name"]: row for row in earlier["candidates"]}
    order = sorted(comparison.ratios, key=lambda name: -comparison.ratios[name].value)
    scores: dict[str, Score] = {}
    found = False
    for name in (base, *order):
        if one.evaluator is None or (found and name != base):
            continue
        scores[name] = one.evaluator(one.engines[name], one.progress)
        found |= name != base and keeps_limit(scores[base], scores[name], limits)
    built = []
    for entry in one.sheet.candidates:
        if entry.name not in one.engines:
            continue
        name, engine = entry.name, one.engines[entry.name]
        close = None
        if name != base:
            close = fidelity(
                one.engines[base],
                engine,
                data,
                source="evaluation data",
                samples=_SAMPLES,
                seed=one.sheet.seed,
                progress=one.progress,
            )
        if one.evaluator is None:
            allowed = bool(simulated.get(name, {}).get("allowed", True))
        else:
            allowed = name in scores and keeps_limit(scores[base], scores[name], limits)
        ratio = comparison.ratios.get(name)
        candidate = Candidate(
            name=name,
            runtime=one.target.name,
            precision=entry.precision,
            settings=settings(one.target),
            size_bytes=size_of(engine),
            timing=dataclasses.asdict(comparison.timings[name]),
            speedup=dataclasses.asdict(ratio) if ratio is not None else None,
            score=score_facts(scores.get(name)),
            drop=drop_facts(scores.get(base), scores.get(name)) if name != base else None,
            fidelity=close.to_dict() if close is not None else None,
            int8_macs=int8_share(engine.kernels(), sites),
            allowed=name == base or allowed,
        )
        variant = Variant(name, one.target, one.models[name], entry.precision)
        built.append(Built(candidate, engine, variant))
    return tuple(built)


def _latency(one: _Build, comparison: Comparison) -> dict[str, Any]:
    notes = list(comparison.notes)
    if all(isinstance(engine, DeviceTimed) for engine in one.engines.values()):
        notes.insert(0, "Times are of the device's own clock, with inputs and outputs on it.")
    return {
        **one.workload.to_dict(),
        "threads": 1,
        "sessions": 1,
        "rounds": comparison.rounds,
        "seconds": comparison.seconds,
        "notes": notes,
    }


def _report(one: _Build, measured: Measured, earlier: Mapping[str, Any]) -> Report:
    decision = choose(measured, one.sheet.limits)
    chosen = measured.built(decision.chosen)
    machine = this_machine()
    data = one.evaluator.data if one.evaluator is not None else None
    narrow = chosen if decision.chosen != one.baseline else measured.all[-1]
    sites = graph_sites(one.models[one.baseline].graph_model)
    before = earlier["prepared"] or {
        key: earlier[key]
        for key in ("headline", "candidates", "machine", "versions", "command", "created")
    }
    return dataclasses.replace(
        Report.from_dict(earlier),
        headline=(*decision.sentences, *_remarks(one, earlier)),
        met=decision.met,
        built=True,
        chosen=decision.chosen,
        budget=one.sheet.limits.to_dict(),
        candidates=tuple(built.candidate for built in measured.all),
        sites=site_rows(sites, narrow.engine.kernels(), reasons(narrow.variant.model)),
        gap=_gap(one, chosen),
        latency=measured.latency,
        evaluation=data_facts(data) if data is not None else {},
        target={**target_facts(one.target, one.target), "builder": dict(one.target.builder())},
        machine={**dataclasses.asdict(machine), "fingerprint": fingerprint(machine)},
        versions=versions(*PACKAGES),
        command=command_line(),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        prepared=before,
    )


def _remarks(one: _Build, earlier: Mapping[str, Any]) -> list[str]:
    remarks = []
    if one.evaluator is None and one.sheet.max_drop is not None:
        remarks.append(
            f"The limit of {one.sheet.max_drop} was judged in simulation alone, before the build: "
            f"give --eval to judge the engines."
        )
    now = data_facts(one.evaluator.data) if one.evaluator is not None else {}
    then = dict(one.sheet.evaluation)
    if now and then and now["sha256"] != then["sha256"]:
        remarks.append(
            f"The engines were judged on {now['data']}, and the simulation before on other data "
            f"({then['data']})."
        )
    ranges = earlier["calibration"].get("ranges_from", "")
    if ranges and ranges != "calibration data":
        remarks.append(f"No calibration data were given; ranges come from {ranges}.")
    return [*remarks, *one.target.capabilities.notes]


def _gap(one: _Build, chosen: Built) -> Mapping[str, Any]:
    """The engine against ONNX Runtime on the same file: what the build rounds differently."""
    model = chosen.variant.model
    inputs = model.example(_SAMPLES, one.sheet.seed)
    if one.evaluator is not None and one.evaluator.data is not None:
        inputs = dict(next(iter(one.evaluator.data.take(_SAMPLES).batches(_SAMPLES))).inputs)
    if not model.dynamic_batch:
        return {}
    simulated = Simulated(one.target).build(model)(inputs)
    return compare_outputs(simulated, chosen.engine, inputs)


def _write(one: _Build, report: Report) -> Report:
    """The artifact with the engine in it, complete or not at all."""
    engine = one.engines[report.chosen]
    stale = {artifact.REPORT, "report.md"}
    with artifact.writing(one.directory) as folder:
        for path in one.directory.iterdir():
            if path.is_file() and path.name not in stale:
                shutil.copy2(path, folder / path.name)
        written = [path.name for path in engine.save(folder)]
        artifact.check_reproduces(one.target.load(folder), engine, exact=False)
        names = dict.fromkeys((*_inputs(one), *written))
        hashes = {name: artifact.sha256_file(folder / name) for name in names}
        report = dataclasses.replace(report, files=hashes)
        artifact.write_text(folder / "report.md", report.markdown())
        text = json.dumps(report.to_dict(), indent=1, allow_nan=False)
        artifact.write_text(folder / artifact.REPORT, text)
    return report


def _inputs(one: _Build) -> list[str]:
    """What the build was made from, which stays in the artifact."""
    models = [name for entry in one.sheet.candidates for name in entry.sha256]
    others = [build_sheet.NAME, "recipe.yaml", "plan.json"]
    return [*models, *(name for name in others if (one.directory / name).is_file())]
