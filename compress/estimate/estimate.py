"""One function for a model's latency on a target, however it is found."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Literal, get_args

from compress.errors import LoadError, UsageError
from compress.estimate.analytical import FEWEST_RATIOS, analytical, group
from compress.estimate.held import roofline_ratios, table_ratios
from compress.estimate.peaks import cached_peaks
from compress.estimate.place import place_of
from compress.estimate.predictor import Predictor, default_path, load_predictor
from compress.estimate.result import KernelEstimate, Latency, Source, ratio_interval
from compress.estimate.samples import describe_engine
from compress.estimate.table import Table
from compress.export import to_onnx
from compress.loading import load
from compress.model import Model
from compress.progress import Progress, silent
from compress.registry import create_target, require_target
from compress.sessions import SESSIONS, measure_sessions
from compress.target import Target, runtimes

Wanted = Literal["auto", "measured", "table", "predicted", "analytical"]
SECONDS = 6.0


def latency(
    model: Any,
    target: Target | str = "cpu",
    source: str = "auto",
    *,
    predictor: Predictor | Path | str | None = None,
    sessions: int = SESSIONS,
    seconds: float = SECONDS,
    progress: Progress = silent,
) -> Latency:
    """The latency of one call at batch 1.

    | source     | a query costs         | before the first                             |
    |------------|-----------------------|----------------------------------------------|
    | measured   | seconds               | nothing                                      |
    | table      | new sites, each alone | half a minute: how far sums are off          |
    | predicted  | one build of it       | `build_predictor`, some minutes              |
    | analytical | one build of it       | half a minute: peaks, how far they are off   |

    Every one of them builds the model for the target: what is fused is read from that, and not
    guessed. What a first query measures is kept for the next one.

    Args:
        model: whatever `compress.loading.load` takes, an artifact's directory among it where it
            holds `model.onnx`.
        target: where it will run; of several runtimes the first counts.
        source: "measured", "table", "predicted", "analytical", or "auto": predicted where a
            predictor of this place knows all kernels, else measured.
        predictor: instead of the one in the cache.
        sessions: of "measured".
        seconds: of all sessions together.
        progress: opens trackers.

    Raises:
        UsageError: there is no such source, or no predictor for this place.
        UnsupportedError: the target cannot be used here, or runs on another device.
        LoadError: model or predictor cannot be read.
    """
    if source not in get_args(Wanted):
        raise UsageError(
            f"There is no source {source!r}; choose from {', '.join(get_args(Wanted))}."
        )
    target = create_target(target) if isinstance(target, str) else target
    require_target(target)
    target = runtimes(target)[0]
    exported = to_onnx(open_model(model), target.capabilities.opset)
    if source == "auto":
        found = _if_known(exported, target, predictor)
        source = "measured"
        if found is not None:
            return found
    if source == "measured":
        return _measured(exported, target, sessions, seconds, progress)
    if source == "table":
        return _table(exported, target, progress)
    if source == "predicted":
        return _predictor(target, predictor).predict(_kernels(exported, target))
    peaks = cached_peaks(target, progress=progress)
    kernels = _kernels(exported, target)
    return analytical(kernels, peaks, roofline_ratios(target, peaks, progress))


def open_model(source: Any, **options: Any) -> Model:
    """Whatever `compress.loading.load` takes; of an artifact its `model.onnx`.

    Raises:
        LoadError: it cannot be read, or the artifact holds no such file.
    """
    if isinstance(source, Model):
        return source
    if isinstance(source, (str, Path)) and Path(source).is_dir():
        path = Path(source) / "model.onnx"
        if not path.is_file():
            raise LoadError(
                f"{source} holds no model.onnx, so its operators cannot be estimated. `compress "
                f"bench {source}` measures it."
            )
        return dataclasses.replace(load(path), name=Path(source).name)
    return load(source, **options)


def _kernels(model: Model, target: Target) -> list[Any]:
    return describe_engine(target.build(model), model)


def _predictor(target: Target, given: Predictor | Path | str | None) -> Predictor:
    if isinstance(given, Predictor):
        if given.place != place_of(target):
            raise UsageError(
                f"This predictor was built for {given.place}, and the target is "
                f"{place_of(target)}. Its times mean nothing there."
            )
        return given
    path = Path(given) if given is not None else default_path(target)
    if not path.exists():
        raise UsageError(
            f"There is no predictor for {place_of(target)} at {path}. Build one with `compress "
            f"profile --build-predictor --target {target.name} --threads "
            f"{place_of(target).threads}`."
        )
    return load_predictor(path, target)


def _if_known(model: Model, target: Target, given: Predictor | Path | str | None) -> Latency | None:
    """The prediction, where there is a predictor that knows all kernels."""
    if given is None and not default_path(target).exists():
        return None
    found = _predictor(target, given).predict(_kernels(model, target))
    return None if found.outside else found


def _measured(
    model: Model, target: Target, sessions: int, seconds: float, progress: Progress
) -> Latency:
    inputs = model.example()

    def build() -> dict[str, Any]:
        engine = target.build(model)
        return {model.name: lambda: engine(inputs)}

    found = measure_sessions(build, sessions=sessions, seconds=seconds, progress=progress)
    timing = found.timings[model.name]
    notes = "".join(f" {note}" for note in found.notes)
    return Latency(
        timing.p50_ms,
        min(timing.low_ms, timing.p50_ms),
        max(timing.high_ms, timing.p50_ms),
        Source("measured", place_of(target)),
        0.95,
        f"median of {sessions} sessions, {timing.runs} calls; the interval spans those of all "
        f"sessions.{notes}",
    )


def _table(model: Model, target: Target, progress: Progress) -> Latency:
    table = Table.open(target)
    engine = target.build(model)
    total, rows, failed = table.sum(model, engine, progress)
    ratios = table_ratios(target, table, progress)
    kind = group(describe_engine(engine, model))
    found = ratios.get(kind, [])
    if len(found) < FEWEST_RATIOS:
        found = [ratio for values in ratios.values() for ratio in values]
    low, high, coverage = ratio_interval(found)
    # A sum is the figure itself; where sums are always off the other way, it ends the interval.
    return Latency(
        total / 1e3,
        total / 1e3 * min(low, 1.0),
        total / 1e3 * max(high, 1.0),
        Source("table", table.place),
        coverage,
        f"{len(found)} other networks took {low:.2f} to {high:.2f} times their sums; "
        f"{table.measured} of {len(table.times_us)} sites in the table were measured now",
        tuple(KernelEstimate(name, op_type, time) for name, op_type, time in rows),
        tuple(f"{name}: cannot be timed alone" for name in failed),
    )
