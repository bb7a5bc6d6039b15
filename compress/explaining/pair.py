"""The two models of an explanation: found, built in one runtime, measured in turns."""

from __future__ import annotations

import dataclasses
import shlex
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from compress import artifact
from compress.errors import CompressError, EngineError, UsageError
from compress.explaining import Row, Side
from compress.export import to_onnx
from compress.graph import Site, graph_sites
from compress.kernel_rows import kernel_rows
from compress.latency import Ratio
from compress.loading import load
from compress.model import Arrays, Model, TensorSpec, random_inputs
from compress.progress import Progress, silent
from compress.registry import create_target, require_target
from compress.sessions import SESSIONS, measure_sessions
from compress.side_by_side import check_same_inputs
from compress.target import Engine, Kernel, KernelTime, Target, runtimes

RUNS = 30
"""Runs under the profiler, in each of the rounds."""
ROUNDS = 2
_NOISY = 0.1
_ABOUT_NOISE = ("The machine was noisy", "Not steady")


@dataclass(frozen=True)
class Opened:
    """A model that can be built.

    Attributes:
        name: for people.
        target: the runtime, with its settings.
        model: at the ONNX stage; None where there is only an engine.
        sites: with their multiply-accumulates.
        build: makes the engine, with so many threads; None takes the target's own.
        report: of an artifact; empty for a file.
    """

    name: str
    target: Target
    model: Model | None
    sites: tuple[Site, ...]
    build: Callable[[int | None], Engine]
    report: Mapping[str, Any]


@dataclass(frozen=True)
class Pair:
    """Both sides, measured.

    Attributes:
        before: the original.
        after: the compressed model.
        ratio: latency of the original over that of the other.
        notes: about the measurement.
        kernels: of the compressed model, in order.
        steady: whether latencies varied little from one block of calls to the next.
    """

    before: Side
    after: Side
    ratio: Ratio
    notes: tuple[str, ...]
    kernels: tuple[Kernel, ...] = ()
    steady: bool = True


def open_model(
    source: Any,
    *,
    target: str = "cpu",
    threads: int | None = None,
    like: Opened | None = None,
    inputs: Sequence[str | TensorSpec] = (),
) -> Opened:
    """A model file, a model object or an artifact, ready to be built.

    Args:
        source: as `compress.load` or `compress.loading.load` take it.
        target: that runs a model which is no artifact; of several runtimes, the first.
        threads: of one operator; None takes an artifact's own, or all cores.
        like: the model beside which it will run: in the same runtime, in float32.
        inputs: shapes that the file does not say.

    Raises:
        LoadError: it cannot be read.
    """
    if isinstance(source, str | Path) and Path(source).is_dir():
        return _open_artifact(Path(source), threads)
    destination = _float_target(like.target) if like is not None else None
    if destination is None:
        destination = runtimes(create_target(target, threads=threads))[0]
    require_target(destination)
    loaded = load(source, inputs=tuple(inputs))
    exported = to_onnx(loaded, destination.capabilities.opset)

    def build(wanted: int | None) -> Engine:
        return with_threads(destination, wanted).build(exported)

    sites = graph_sites(exported.graph_model)
    name = Path(source).name if isinstance(source, str | Path) else loaded.name
    return Opened(name, destination, exported, sites, build, {})


def _open_artifact(directory: Path, threads: int | None) -> Opened:
    report = artifact.read_report(directory)
    settings = artifact.runtime_settings(directory, threads=threads)
    destination = create_target(report["target"]["name"], **settings)

    def build(wanted: int | None) -> Engine:
        return artifact.load(directory, threads=wanted or threads)

    model = None
    if (directory / "model.onnx").is_file():
        model = load(directory / "model.onnx")
    sites = tuple(
        Site(
            row["name"], row["op_type"], (), (), None, row["macs"], row["parameters"], live_bytes=0
        )
        for row in report["sites"]
    )
    return Opened(directory.name, destination, model, sites, build, report)


def _float_target(target: Target) -> Target:
    """The same runtime and settings, computing in float32."""
    if getattr(target, "precision", None) is not None:
        return dataclasses.replace(target, precision="float32")  # type: ignore[type-var]
    return target


def with_threads(target: Target, threads: int | None) -> Target:
    """The target with so many threads, where it has that option; None leaves it as it is."""
    names = {f.name for f in dataclasses.fields(target)} if dataclasses.is_dataclass(target) else ()
    if threads is None or "threads" not in names:
        return target
    changes: dict[str, Any] = {"threads": threads}
    if "streams" in names:
        changes["streams"] = min(int(getattr(target, "streams", 1)), threads)
    return dataclasses.replace(target, **changes)  # type: ignore[type-var]


def find_original(directory: Path, report: Mapping[str, Any]) -> Path | None:
    """The file that an artifact was made from: of the command's words, the one with its hash.

    Looked for in the present folder and beside the artifact; None where there is none.
    """
    wanted = report["model"].get("sha256", "")
    try:
        words = shlex.split(report.get("command", ""))
    except ValueError:  # an unclosed quote: no command of ours
        return None
    for word in words if wanted else ():
        for path in (Path(word), directory.parent / word, directory.parent / Path(word).name):
            try:
                if path.is_file() and artifact.sha256_file(path) == wanted:
                    return path
            except OSError:  # not readable, or no name that a file can have
                continue
    return None


def measure_pair(
    before: Opened,
    after: Opened,
    *,
    batch: int = 1,
    seconds: float = 6.0,
    sessions: int = SESSIONS,
    seed: int = 0,
    progress: Progress = silent,
) -> Pair:
    """Latency in turns over several sessions, and the kernels of both.

    Raises:
        UsageError: the models take different inputs, or a batch that does not fit.
        EngineError: one of them cannot be built or run.
    """
    names = (before.name, after.name)
    if names[0] == names[1]:
        names = (f"{names[0]} (original)", f"{names[1]} (compressed)")
    engines = [one.build(None) for one in (before, after)]
    check_same_inputs(names, *engines)
    if batch != 1 and not any(spec.dynamic_batch for spec in engines[0].inputs):
        raise UsageError(f"{names[0]} has a fixed batch, so --batch {batch} does not fit.")
    inputs = random_inputs(engines[0].inputs, batch, np.random.default_rng(seed))
    with progress("Profiling kernels", total=2 * ROUNDS) as advance:
        times: list[list[tuple[KernelTime, ...]]] = [[], []]
        for index in range(ROUNDS):
            for which in (0, 1) if index % 2 == 0 else (1, 0):
                times[which].append(profile(engines[which], inputs))
                advance(1, names[which])

    def build() -> dict[str, Callable[[], object]]:
        fresh = (before.build(None), after.build(None))
        return {n: partial(one, inputs) for n, one in zip(names, fresh, strict=True)}

    found = measure_sessions(
        build, sessions=sessions, seconds=seconds, margin=0.0, seed=seed, progress=progress
    )
    sides = [
        Side(
            name,
            one.target.name,
            found.timings[name].p50_ms * 1e3,
            rows_of(tables, one.sites, batch),
        )
        for name, one, tables in zip(names, (before, after), times, strict=True)
    ]
    steady = all(one.cv < _NOISY for one in found.timings.values())
    # One sentence for all sessions: they say the same with other numbers.
    notes = [note for note in found.notes if not note.startswith(_ABOUT_NOISE)]
    if not steady:
        spread = max(one.cv for one in found.timings.values())
        notes.append(
            f"The machine was noisy: latencies vary by {spread:.0%} from one block of calls to the "
            f"next. Measure again when it is quiet."
        )
    kernels = engines[1].kernels()
    ratio = found.ratios[names[1]]
    return Pair(sides[0], sides[1], ratio, tuple(notes), kernels, steady)


def profile(engine: Engine, inputs: Arrays) -> tuple[KernelTime, ...]:
    """Times of the kernels; empty where the runtime tells none."""
    try:
        return engine.profile(inputs, RUNS)
    except EngineError:  # it runs, and its profiler alone fails
        return ()


def rows_of(
    tables: Sequence[Sequence[KernelTime]], sites: Sequence[Site], batch: int = 1
) -> tuple[Row, ...]:
    """Rows of kernels with the mean of several profiles, where all saw the same kernels."""
    first = tables[0]
    names = [one.kernel.name for one in first]
    same = [t for t in tables if [one.kernel.name for one in t] == names]
    times = [
        KernelTime(one.kernel, statistics.mean(table[i].p50_us for table in same))
        for i, one in enumerate(first)
    ]
    return kernel_rows(times, {site.name: site.macs * batch for site in sites})


def sides_of_report(directory: Path, report: Mapping[str, Any]) -> tuple[Side, Side]:
    """What a report says about the original and the artifact, as it was measured then.

    Where the original was kept, the other candidate whose kernels were profiled takes the
    artifact's place.

    Raises:
        CompressError: the report holds no kernels of both.
    """
    by_name = {one["name"]: one for one in report["candidates"]}
    tables = report.get("kernels", {})
    first, *others = by_name
    chosen = report["chosen"]
    if chosen == first:
        chosen = next((name for name in others if name in tables), "")
    # A runtime that tells no times has no table; what it was measured with is told all the same.
    if first not in tables or chosen not in by_name:
        raise UsageError(
            f"{directory} does not tell the kernels of the original and of another candidate, and "
            f"the original is not where the run found it. Give it: compress explain {directory} "
            f"--against MODEL."
        )
    sides = []
    for name in (first, chosen):
        candidate, table = by_name[name], tables.get(name, {})
        runtime = table.get("runtime") or candidate["runtime"]
        latency_us = candidate["timing"]["p50_ms"] * 1e3
        sides.append(Side(name, runtime, latency_us, tuple(table.get("rows", ()))))
    return sides[0], sides[1]


def peaks_of(target: Target, progress: Progress) -> Any:
    """The measured peaks of a target; None where they cannot be measured."""
    from compress.estimate.peaks import cached_peaks

    try:
        return cached_peaks(target, progress=progress)
    except (CompressError, OSError):  # a target elsewhere, or a cache that cannot be written
        return None
