"""Record a baseline: measure it, copy it, write both as a whole or not at all."""

from __future__ import annotations

import math
import shlex
import shutil
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from compress.artifact import check_output, sha256_file, write_text, writing
from compress.data import Layout
from compress.errors import LoadError, OutputError, UsageError
from compress.machine import fingerprint, this_machine, versions
from compress.memory.engines import engine_peak
from compress.metrics import resolve_evaluator
from compress.model import TensorSpec
from compress.progress import Progress, silent
from compress.regression.checking import PACKAGES
from compress.regression.files import write
from compress.regression.fixed import evaluate
from compress.regression.limits import MAX_DROP, MAX_SLOWDOWN
from compress.regression.lock import measuring_alone
from compress.regression.record import MODEL, RECORD, Record
from compress.regression.sequential import ALPHA, first_look, median_interval
from compress.regression.subject import Subject, fresh_sides, open_subject
from compress.regression.timing import CANDIDATE, measure_alone, sessions_of

GROWTH = 0.05
"""Room above the measured bytes in a starting budget."""
ROOM = {"p50": 0.10, "p90": 0.25}
"""Room above the upper end of the measured times, which another day's machine takes."""


def record_baseline(
    source: Path | str,
    out: Path | str | None = None,
    *,
    overwrite: bool = False,
    budget: Path | str | None = None,
    evaluate_on: Any = None,
    seconds: float = 10.0,
    threads: int | None = None,
    inputs: Sequence[str | TensorSpec] = (),
    layout: Layout = "auto",
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    seed: int = 0,
    progress: Progress = silent,
) -> tuple[Path, Record]:
    """Measure an artifact or a model file here and keep it with its figures.

    Args:
        source: artifact directory or model file.
        out: directory to write; NAME-baseline by default.
        overwrite: replace a baseline, and a budget, that is there.
        budget: also write starting limits to this file.
        evaluate_on: labelled data or a function; else the score that the artifact records.
        seconds: of measuring; at least so many sessions as an interval needs are measured.
        threads: of one operator; None takes the artifact's own.
        inputs: shapes that a model file leaves open.
        layout: axes of the images in the data.
        mean: subtracted from the data.
        std: divides the data.
        seed: of everything random.
        progress: opens trackers.

    Returns:
        the directory, and what its `baseline.json` holds.

    Raises:
        OutputError: `out` or `budget` exists, or cannot be written.
        UsageError: options are not allowed.
        LoadError: the source is missing or damaged.
        EngineError: its runtime failed.
    """
    path = Path(source)
    directory = Path(out) if out is not None else Path(f"{path.resolve().stem}-baseline")
    if not (math.isfinite(seconds) and 0.1 <= seconds <= 3600):
        raise UsageError(f"--seconds {seconds} is out of range: 0.1 to 3600.")
    check_output(directory, overwrite, RECORD)
    if budget is not None and Path(budget).exists() and not overwrite:
        raise OutputError(f"{budget} exists already. Give another --budget, or --force.")
    if (path / RECORD).is_file():
        raise UsageError(f"{path} is a baseline already. Give the artifact or the model file.")
    with writing(directory) as folder:
        copied = _copy(path, folder / MODEL)
        # The copy is what will run, so it is the copy that is opened and measured.
        side = open_subject(copied, threads=threads, inputs=inputs)
        record = _measured(
            side,
            path,
            copied,
            evaluator=(evaluate_on, layout, mean, std),
            seconds=seconds,
            threads=threads,
            inputs=inputs,
            seed=seed,
            progress=progress,
        )
        write_text(folder / RECORD, record.to_json())
    if budget is not None:
        write(Path(budget), starting_budget(record))
    return directory, record


def _copy(source: Path, folder: Path) -> Path:
    if source.is_dir():
        # Files only: an artifact has no folders that it needs to run.
        folder.mkdir()
        for file in sorted(source.iterdir()):
            if file.is_file():
                shutil.copyfile(file, folder / file.name)
        return folder
    if not source.is_file():
        raise LoadError(f"{source} does not exist. Give an artifact directory or a model file.")
    folder.mkdir()
    for file in (source, source.with_name(source.name + ".data")):
        if file.is_file():  # torch's exporter keeps large weights beside the graph
            shutil.copyfile(file, folder / file.name)
    return folder / source.name


def _measured(
    side: Subject,
    source: Path,
    copied: Path,
    *,
    evaluator: tuple[Any, Layout, Sequence[float] | None, Sequence[float] | None],
    seconds: float,
    threads: int | None,
    inputs: Sequence[str | TensorSpec],
    seed: int,
    progress: Progress,
) -> Record:
    given, layout, mean, std = evaluator
    scorer = None
    if given is not None:
        scorer = resolve_evaluator(given, side.engine.inputs, layout=layout, mean=mean, std=std)
    score = evaluate(side, None, scorer, seed, progress).candidate
    with measuring_alone(progress):
        pairs = measure_alone(
            sessions_of(fresh_sides({CANDIDATE: side}, seed), seed),
            seconds=seconds,
            fewest=first_look(),
            progress=progress,
        )
    machine = this_machine()
    peak = engine_peak(side.engine)
    folder = copied if copied.is_dir() else copied.parent
    latency: dict[str, Any] = {"sessions": len(pairs), "batch": side.batch}
    for quantile in ("p50", "p90"):
        found = median_interval(pairs.array(quantile), ALPHA)
        latency[f"{quantile}_ms"] = {"value": found.value, "low": found.low, "high": found.high}
    return Record(
        name=source.resolve().stem,
        source=str(source),
        file="" if copied.is_dir() else copied.name,
        files={one.name: sha256_file(one) for one in sorted(folder.iterdir())},
        inputs=tuple(str(spec).removeprefix(":") for spec in inputs),
        threads=threads,
        targets=side.targets,
        latency=latency,
        accuracy=dict(score) if score else None,
        size_bytes=side.size_bytes,
        peak_memory_bytes=peak.bytes if peak is not None else None,
        machine=machine.to_dict() | {"fingerprint": fingerprint(machine)},
        versions=versions(*PACKAGES),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        command=shlex.join(["compress", *sys.argv[1:]]),
    )


def starting_budget(record: Record) -> str:
    """Text of a budgets.yaml with limits from what was measured."""
    lines = [
        "# Limits for `compress check`. Written by `compress baseline` from what it measured;",
        "# change them as you like.",
        "budget: 1",
        "limits:",
        "  # Against the baseline, on any machine: both run in turns where the check runs.",
        f"  - latency_p50: {{max_slowdown: {MAX_SLOWDOWN * 100:g}%}}",
    ]
    accuracy = record.accuracy
    if accuracy is not None and accuracy["unit"] == "top-1":
        least = max(0.0, accuracy["value"] - MAX_DROP)
        found = f"{accuracy['value']:.2%} of {accuracy['n']} samples"
        lines += [
            f"    # measured: {found} of {_plain(accuracy['data'])}",
            f"    accuracy: {{max_drop: {MAX_DROP * 100:g} points, min: {least * 100:.2f}%}}",
        ]
    lines += _bytes_lines("size", record.size_bytes)
    if record.peak_memory_bytes is not None:
        lines += _bytes_lines("peak_memory", record.peak_memory_bytes)
    machine = record.machine
    lines += ["", "  # Times mean something on one machine only; elsewhere they are not judged."]
    lines += [
        f"  - target: {record.targets[0]}",
        f'    machine: "{machine["fingerprint"]}"',
        f'    note: "{_plain(machine["cpu"])}, {machine["cores"]} cores"',
    ]
    for quantile, room in ROOM.items():
        found = record.latency[f"{quantile}_ms"]
        most = found["high"] * (1 + room)
        lines += [
            f"    # measured: {found['value']:.4g} ms, at most {found['high']:.4g} ms",
            f"    latency_{quantile}: {{max: {_up(most)} ms}}",
        ]
    return "\n".join(lines) + "\n"


def _bytes_lines(metric: str, measured: int) -> list[str]:
    return [
        f"    # measured: {measured} bytes",
        f"    {metric}: {{max: {_up(measured * (1 + GROWTH) / 1e3)} kB, "
        f"max_growth: {GROWTH * 100:g}%}}",
    ]


def _up(value: float) -> str:
    """Three significant digits, rounded up."""
    places = 2 - math.floor(math.log10(value)) if value > 0 else 0
    raised = math.ceil(value * 10**places) / 10**places
    return f"{raised:.{max(0, places)}f}"


def _plain(text: Any) -> str:
    """Text that cannot leave a YAML comment or a quoted string."""
    return "".join(sign for sign in str(text) if sign.isprintable() and sign not in '"\\')
