"""What `compress run` says and writes of candidates that are built on another machine."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from compress import artifact, build_sheet
from compress.artifact import size_of
from compress.build_sheet import BuildSheet, Entry
from compress.candidates import (
    drop_facts,
    int8_share,
    keeps_limit,
    merged_sites,
    reasons,
    score_facts,
    site_rows,
)
from compress.deferred import Preparation, Prepared
from compress.facts import (
    command_line,
    data_facts,
    data_remarks,
    model_facts,
    plan_of,
    range_facts,
    step_facts,
    step_remarks,
    target_facts,
)
from compress.fidelity import fidelity
from compress.gap import MAC_BUDGET, SAMPLES
from compress.graph import graph_sites
from compress.loading import load
from compress.machine import fingerprint, this_machine, versions
from compress.reference import save_onnx
from compress.report import Candidate, Report
from compress.report.plots import add_plots
from compress.simulated import WHERE
from compress.target import Engine
from compress.variants import BASELINE, Variant, settings

PACKAGES = ("hwcompress", "torch", "onnx", "onnxruntime", "onnx-ir", "onnxscript", "numpy")


def report(given: Preparation, found: Prepared) -> Report:
    """The report of what is not built and not measured."""
    sites = graph_sites(given.exported.graph_model)
    shown = found.narrow or found.variants[-1]
    why = reasons(shown.model)
    if found.narrow is None:
        why = dict.fromkeys((site.name for site in sites), "there is no int8 candidate")
    kernels = found.engines[shown.name].kernels()
    why = {**{k.site: "it is to run in float8" for k in kernels if k.precision == "float8"}, **why}
    calibration = range_facts([v.model for v in found.variants])
    machine = this_machine()
    return Report(
        headline=(
            *_first_sentences(given),
            *_verdicts(given, found),
            *step_remarks(shown.model),
            *data_remarks(calibration, given.exported),
            *given.target.capabilities.notes,
        ),
        met=False,
        built=False,
        chosen="",
        budget=given.limits.to_dict(),
        candidates=tuple(_candidate(given, found, variant) for variant in found.variants),
        sites=site_rows(sites, kernels, why),
        ladder=tuple(map(dataclasses.asdict, found.climbed.attempts)) if found.climbed else (),
        steps=tuple(step_facts(step) for step in shown.model.history),
        latency={},
        calibration={**calibration, **data_facts(given.data)},
        evaluation=data_facts(given.evaluator.data) if given.evaluator else {},
        model=model_facts(given.original, given.exported),
        target=target_facts(given.target, given.target),
        machine={**dataclasses.asdict(machine), "fingerprint": fingerprint(machine)},
        versions=versions(*PACKAGES),
        command=command_line(),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def write(
    given: Preparation, found: Prepared, made: Report, recipe: str, directory: Path
) -> Report:
    """Write the candidates, `build.json` and the report, and read every model back."""
    with artifact.writing(directory) as folder:
        files: list[Path] = []
        entries = []
        for variant, name in zip(found.variants, found.files().values(), strict=True):
            written = save_onnx(variant.model.graph_model, folder / name)
            _check_written(variant, folder / name, found.engines[variant.name])
            hashes = {path.name: artifact.sha256_file(path) for path in written}
            notes = found.notes[variant.name]
            entry = Entry(
                name=variant.name,
                precision=variant.precision,
                file=name,
                sha256=hashes,
                notes=notes,
            )
            entries.append(entry)
            files += written
        texts = {build_sheet.NAME: _sheet(given, entries, made).to_text(), "recipe.yaml": recipe}
        plan = plan_of((found.narrow or found.variants[0]).model)
        texts |= {"plan.json": json.dumps(plan)} if plan else {}
        for name, text in texts.items():
            artifact.write_text(folder / name, text)
            files.append(folder / name)
        hashes = {path.name: artifact.sha256_file(path) for path in files}
        made = add_plots(dataclasses.replace(made, files=hashes), folder)
        artifact.write_text(folder / "report.md", made.markdown())
        text = json.dumps(made.to_dict(), indent=1, allow_nan=False)
        artifact.write_text(folder / artifact.REPORT, text)
    return made


def _sheet(given: Preparation, entries: list[Entry], made: Report) -> BuildSheet:
    return BuildSheet(
        target=given.target.name,
        options=settings(given.target),
        candidates=tuple(entries),
        max_drop=made.budget["max_drop"],
        min_speedup=given.limits.min_speedup,
        batch=given.batch,
        seconds=given.seconds,
        seed=given.seed,
        evaluation=made.evaluation,
        how=given.target.build_sheet(given.exported.inputs),
    )


def _check_written(variant: Variant, path: Path, engine: Engine) -> None:
    artifact.check_reproduces(variant.target.build(load(path)), engine)


def _first_sentences(given: Preparation) -> list[str]:
    check = given.target.check()
    if check.available:
        return []
    return [
        f"The {given.target.name} engine is not built and nothing is measured: that needs the GPU "
        f"machine. `compress build DIR` finishes the job there, where DIR is a copy of this "
        f"directory: it builds and measures every candidate, keeps the fastest that holds the "
        f"budget and completes this report.",
        f"Missing here: {check.reason}",
    ]


def _verdicts(given: Preparation, found: Prepared) -> list[str]:
    """What the simulation says of each candidate."""
    sentences = [f"{name} failed: {reason}" for name, reason in found.failures.items()]
    if found.climbed is not None:
        sentences.insert(0, found.climbed.sentence())
    if given.evaluator is None:
        return [*sentences, "Accuracy was not verified, not even in simulation (no --eval)."]
    for variant in found.variants[1:]:
        drop = drop_facts(found.scores[BASELINE], found.scores[variant.name])
        allowed = keeps_limit(found.scores[BASELINE], found.scores[variant.name], given.limits)
        limit = "" if allowed else ", more than --max-drop allows"
        if drop is None:
            value = found.scores[variant.name].value
            sentences.append(f"{variant.name} scores {value:.4g}, {WHERE}{limit}.")
            continue
        verb = "gains" if drop["points"] < 0 else "loses"
        points = abs(drop["points"])
        sentences.append(f"{variant.name} {verb} {points:.2f} points of top-1, {WHERE}{limit}.")
    return sentences


def _candidate(given: Preparation, found: Prepared, variant: Variant) -> Candidate:
    name = variant.name
    before, after = found.scores.get(BASELINE), found.scores.get(name)
    sites = graph_sites(given.exported.graph_model)
    real = given.data or (given.evaluator.data if given.evaluator else None)
    close = None
    if name != BASELINE:
        macs = sum(site.macs for site in sites) or 1
        close = fidelity(
            found.engines[BASELINE],
            found.engines[name],
            real,
            source="calibration data" if given.data else "evaluation data",
            samples=int(np.clip(MAC_BUDGET // macs, 8, SAMPLES)),
            seed=given.seed,
            progress=given.progress,
        )
    return Candidate(
        name=name,
        runtime=given.target.name,
        precision=variant.precision,
        settings=settings(given.target),
        size_bytes=size_of(found.engines[name]),
        timing={},
        score=_simulated(score_facts(after)),
        drop=drop_facts(before, after) if name != BASELINE else None,
        fidelity=close.to_dict() if close is not None else None,
        int8_macs=int8_share(found.engines[name].kernels(), merged_sites(sites, variant.model)),
        allowed=name == BASELINE or keeps_limit(before, after, given.limits),
    )


def _simulated(facts: dict[str, Any] | None) -> Mapping[str, Any] | None:
    return {**facts, "where": WHERE} if facts is not None else None
