"""What `compress build` found: accuracy, verdict, report and artifact."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from compress import artifact, build_sheet
from compress.artifact import size_of
from compress.built_engines import Building
from compress.candidates import (
    Built,
    Measured,
    drop_facts,
    int8_share,
    keeps_limit,
    merged_into,
    reasons,
    score_facts,
    site_rows,
)
from compress.decision import choose
from compress.facts import command_line, data_facts, target_facts
from compress.fidelity import fidelity
from compress.gap import compare_outputs
from compress.graph import graph_sites
from compress.latency import Comparison
from compress.machine import fingerprint, this_machine, versions
from compress.metrics import Score
from compress.report import Candidate, Report
from compress.report.plots import add_plots
from compress.simulated import Simulated
from compress.target import DeviceTimed
from compress.variants import Variant, settings

PACKAGES = ("hwcompress", "torch", "tensorrt", "tensorrt-cu12", "onnx", "onnxruntime", "numpy")
_SAMPLES = 64


def judge(one: Building, comparison: Comparison, earlier: Mapping[str, Any]) -> Measured:
    """Accuracy from the fastest on, until one keeps the limit; fidelity of every candidate.

    Without evaluation data the verdicts of the simulation, which the earlier report has, stand.
    """
    limits, base = one.limits, one.baseline
    sites = graph_sites(one.models[base].graph_model)
    prepared = earlier["prepared"] or earlier
    simulated = {row["name"]: row for row in prepared["candidates"]}
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
                one.data,
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
    return Measured(tuple(built), _latency(one, comparison), one.failures)


def _latency(one: Building, comparison: Comparison) -> dict[str, Any]:
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


def report(one: Building, measured: Measured, earlier: Mapping[str, Any]) -> Report:
    """The earlier report, completed with what the engines measured."""
    decision = choose(measured, one.limits)
    chosen = measured.built(decision.chosen)
    machine = this_machine()
    narrow = chosen if decision.chosen != one.baseline else measured.all[-1]
    model = narrow.variant.model
    sites = graph_sites(one.models[one.baseline].graph_model)
    kept = ("headline", "candidates", "machine", "versions", "command", "created")
    before = earlier["prepared"] or {key: earlier[key] for key in kept}
    return dataclasses.replace(
        Report.from_dict(earlier),
        headline=(*decision.sentences, *_remarks(one, earlier)),
        met=decision.met,
        built=True,
        chosen=decision.chosen,
        budget=one.limits.to_dict(),
        candidates=tuple(built.candidate for built in measured.all),
        sites=site_rows(sites, narrow.engine.kernels(), reasons(model), merged_into(model)),
        gap=_gap(one, chosen),
        latency=measured.latency,
        evaluation=data_facts(one.data),
        target={**target_facts(one.target, one.target), "builder": dict(one.target.builder())},
        machine={**dataclasses.asdict(machine), "fingerprint": fingerprint(machine)},
        versions=versions(*PACKAGES),
        command=command_line(),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        prepared=before,
    )


def _remarks(one: Building, earlier: Mapping[str, Any]) -> list[str]:
    remarks = []
    if one.evaluator is None and one.sheet.max_drop is not None:
        remarks.append(
            f"The limit of {one.sheet.max_drop} was judged in simulation alone, before the build: "
            f"give --eval to judge the engines."
        )
    now = data_facts(one.data)
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


def _gap(one: Building, chosen: Built) -> Mapping[str, Any]:
    """The engine against ONNX Runtime on the same file: what the build rounds differently."""
    model = chosen.variant.model
    inputs = model.example(_SAMPLES, one.sheet.seed)
    if one.data is not None:
        inputs = dict(next(iter(one.data.take(_SAMPLES).batches(_SAMPLES))).inputs)
    if not model.dynamic_batch:
        return {}
    simulated = Simulated(one.target).build(model)(inputs)
    return compare_outputs(simulated, chosen.engine, inputs)


def write(one: Building, made: Report) -> Report:
    """The artifact with the engine in it, complete or not at all."""
    engine = one.engines[made.chosen]
    stale = {artifact.REPORT, "report.md", *made.plots.values()}
    with artifact.writing(one.directory) as folder:
        for path in one.directory.iterdir():
            if path.is_file() and path.name not in stale:
                shutil.copy2(path, folder / path.name)
        written = [path.name for path in engine.save(folder)]
        artifact.check_reproduces(one.target.load(folder), engine, exact=False)
        names = dict.fromkeys((*_inputs(one), *written))
        hashes = {name: artifact.sha256_file(folder / name) for name in names}
        made = add_plots(dataclasses.replace(made, files=hashes), folder)
        artifact.write_text(folder / "report.md", made.markdown())
        text = json.dumps(made.to_dict(), indent=1, allow_nan=False)
        artifact.write_text(folder / artifact.REPORT, text)
    return made


def _inputs(one: Building) -> list[str]:
    """What the build was made from, which stays in the artifact."""
    models = [name for entry in one.sheet.candidates for name in entry.sha256]
    others = [build_sheet.NAME, "recipe.yaml", "plan.json"]
    return [*models, *(name for name in others if (one.directory / name).is_file())]
