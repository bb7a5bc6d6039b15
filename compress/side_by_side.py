"""Models side by side: latency in turns, fidelity and accuracy, from files or artifacts."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from compress.artifact import open_engine, runtime_settings
from compress.data import Layout
from compress.errors import DeviceError, UsageError
from compress.fidelity import Fidelity, fidelity
from compress.latency import Comparison, measure
from compress.metrics import Drop, Score, paired_drop, resolve_evaluator
from compress.model import Arrays, random_inputs
from compress.progress import Progress, silent
from compress.remote import Artifact, Device, OnDevice, measure_on, parse_devices
from compress.target import Engine


@dataclass(frozen=True)
class SideBySide:
    """Two models compared.

    Attributes:
        first: name of the one that the other is compared with.
        second: name of the other one.
        latency: measured in turns; the baseline is `first`.
        fidelity: how close the outputs of `second` are to those of `first`.
        scores: of both, in the same order, or None without evaluation data.
        drop: what `second` loses, where the score is top-1.
    """

    first: str
    second: str
    latency: Comparison
    fidelity: Fidelity
    scores: tuple[Score, Score] | None = None
    drop: Drop | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        scores = self.scores or ()
        return {
            "first": self.first,
            "second": self.second,
            "latency": self.latency.to_dict(),
            "fidelity": self.fidelity.to_dict(),
            "scores": [{"value": s.value, "unit": s.unit, "n": s.n} for s in scores] or None,
            "drop": dataclasses.asdict(self.drop) if self.drop else None,
        }


def bench(
    paths: Sequence[str | Path],
    *,
    threads: int | None = None,
    batch: int = 1,
    seconds: float = 10.0,
    seed: int = 0,
    progress: Progress = silent,
) -> Comparison:
    """Latency of artifacts or model files in one interleaved measurement on random inputs.

    Raises:
        UsageError: no path, or a batch size for a model whose batch is fixed.
    """
    engines = {
        name: open_engine(path, threads=threads)
        for name, path in zip(_distinct(paths), paths, strict=True)
    }
    calls = {name: _call(name, engine, batch, seed) for name, engine in engines.items()}
    return measure(calls, seconds=seconds, seed=seed, progress=progress)


def bench_on(
    devices: Sequence[str | Device],
    paths: Sequence[str | Path],
    *,
    threads: int | None = None,
    batch: int = 1,
    seconds: float = 10.0,
    seed: int = 0,
    progress: Progress = silent,
) -> tuple[OnDevice, ...]:
    """Latency of artifacts or model files on devices, in turns on each, on random inputs.

    Raises:
        UsageError: an address is wrong, the models take different inputs, or a batch size is
            given for a model whose batch is fixed.
        DeviceError: no device could measure them.
    """
    found = parse_devices(devices)
    names = _distinct(paths)
    artifacts = {
        name: Artifact(open_engine(path, threads=threads), runtime_settings(path, threads=threads))
        for name, path in zip(names, paths, strict=True)
    }
    engines = {name: one.engine for name, one in artifacts.items()}
    inputs = [_inputs(name, engine, batch, seed) for name, engine in engines.items()]
    shapes = [{k: (v.shape, v.dtype) for k, v in arrays.items()} for arrays in inputs]
    for name, shape in zip(names, shapes, strict=True):
        if shape != shapes[0]:
            raise UsageError(
                f"{names[0]} and {name} take different inputs; on a device only models with the "
                f"same inputs are measured together. Measure them one after the other."
            )
    results = measure_on(found, artifacts, inputs[0], seconds=seconds, seed=seed, progress=progress)
    if all(one.error for one in results):
        raise DeviceError(" ".join(one.error for one in results))
    return results


def compare(
    first: str | Path,
    second: str | Path,
    *,
    evaluate: Any = None,
    threads: int | None = None,
    layout: Layout = "auto",
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    seconds: float = 10.0,
    seed: int = 0,
    progress: Progress = silent,
) -> SideBySide:
    """Latency, fidelity and, with evaluation data, accuracy of two models.

    Raises:
        UsageError: the models do not take the same inputs.
        DataError: the evaluation data do not fit them.
    """
    names = _distinct([first, second])
    before, after = (open_engine(path, threads=threads) for path in (first, second))
    check_same_inputs(names, before, after)
    evaluator = None
    if evaluate is not None:
        evaluator = resolve_evaluator(evaluate, before.inputs, layout=layout, mean=mean, std=std)
    data = evaluator.data if evaluator is not None else None
    closeness = fidelity(
        before, after, data, source="evaluation data", seed=seed, progress=progress
    )
    scores = drop = None
    if evaluator is not None:
        scores = (evaluator(before, progress), evaluator(after, progress))
        accuracies = [score.accuracy for score in scores]
        if accuracies[0] is not None and accuracies[1] is not None:
            drop = paired_drop(accuracies[0], accuracies[1], seed=seed)
    calls = {
        name: _call(name, engine, 1, seed)
        for name, engine in zip(names, (before, after), strict=True)
    }
    timing = measure(calls, seconds=seconds, seed=seed, progress=progress)
    return SideBySide(names[0], names[1], timing, closeness, scores, drop)


def _call(name: str, engine: Engine, batch: int, seed: int) -> Callable[[], object]:
    return partial(engine, _inputs(name, engine, batch, seed))


def _inputs(name: str, engine: Engine, batch: int, seed: int) -> Arrays:
    if batch != 1 and not all(spec.dynamic_batch for spec in engine.inputs if spec.shape):
        shapes = ", ".join(map(str, engine.inputs))
        raise UsageError(
            f"{name} has a fixed batch ({shapes}), so --batch {batch} does not fit. Leave --batch "
            f"out, or export the model with a dynamic batch."
        )
    return random_inputs(engine.inputs, batch, np.random.default_rng(seed))


def check_same_inputs(names: Sequence[str], before: Engine, after: Engine) -> None:
    """Refuse models that cannot be run on the same arrays.

    Raises:
        UsageError: they take different inputs.
    """
    given = [
        {spec.name: (spec.concrete(), spec.dtype) for spec in engine.inputs}
        for engine in (before, after)
    ]
    if given[0] != given[1]:
        shapes = (", ".join(map(str, engine.inputs)) for engine in (before, after))
        described = " and ".join(f"{n} takes {s}" for n, s in zip(names, shapes, strict=True))
        raise UsageError(
            f"{described}; only models with the same inputs can be compared. To see their "
            f"latency alone, use compress bench."
        )


def _distinct(paths: Sequence[str | Path]) -> list[str]:
    """One name per path; a path that is given twice is numbered."""
    names: list[str] = []
    for path in map(str, paths):
        count = sum(1 for name in names if name == path or name.startswith(f"{path} ("))
        names.append(f"{path} ({count + 1})" if count else path)
    return names
