"""`compress build`: build, measure and judge what `compress run` prepared on another machine."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from compress import artifact, build_report, build_sheet
from compress.build_sheet import BuildSheet
from compress.built_engines import Building, build_engines, measure_engines
from compress.candidates import Limits
from compress.data import Layout
from compress.errors import LoadError, UnsupportedError
from compress.loading import load
from compress.metrics import resolve_evaluator
from compress.progress import Progress, silent
from compress.registry import create_target
from compress.report import Report
from compress.target import BuiltElsewhere
from compress.workload import make_workload


def build(
    directory: Path | str,
    *,
    evaluate: Any = None,
    layout: Layout = "auto",
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    max_drop: str | float | None = None,
    min_speedup: float | None = None,
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
        max_drop: largest loss; as the run said, or 1 %.
        min_speedup: smallest speed-up over the original; as the run said.
        seconds: of the latency measurement; as the run said.
        seed: of everything random; as the run said.
        progress: opens trackers.

    Raises:
        LoadError: it is no such directory, damaged, or a file was changed.
        UsageError: a budget that makes no sense.
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
        evaluator = resolve_evaluator(evaluate, original.inputs, layout=layout, mean=mean, std=std)
    drop = sheet.max_drop if max_drop is None and evaluator is not None else max_drop
    faster = sheet.min_speedup if min_speedup is None else min_speedup
    data = evaluator.data if evaluator is not None else None
    one = Building(
        directory,
        sheet,
        target,
        evaluator,
        Limits.parse(drop, faster, evaluator is not None),
        progress,
        models,
        make_workload(original, data, batch=sheet.batch, objective="latency", threads=1),
    )
    build_engines(one)
    measured = build_report.judge(one, measure_engines(one), earlier)
    report = build_report.write(one, build_report.report(one, measured, earlier))
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
