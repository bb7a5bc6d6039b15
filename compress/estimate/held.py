"""How far tables and rooflines are off on one place: measured on a few networks, once."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from compress.errors import CompressError
from compress.estimate.analytical import bound_ms, group
from compress.estimate.graphs import quantized
from compress.estimate.networks import random_network
from compress.estimate.peaks import Peaks
from compress.estimate.place import place_of
from compress.estimate.samples import Sample, append_sample, describe_engine, read_samples
from compress.estimate.store import read_json, write_json
from compress.estimate.table import Table
from compress.latency import measure
from compress.model import Model
from compress.progress import Progress, silent
from compress.target import Target

NETWORKS = 10
"""Each in float and, where the target has it, in int8: their range holds the next network with
probability 1 - 2 / 11 = 82 %."""
SECONDS = 0.3
_FIRST = 1_000_000
"""Seed of the first, far from those that predictors learn from."""

Ratios = Mapping[str, list[float]]


def held_models(target: Target, count: int = NETWORKS) -> list[Model]:
    """Random networks that no estimate was made from, in the precisions of the target."""
    models = []
    for index in range(count):
        rng = np.random.default_rng(_FIRST + index)
        model = random_network(rng, f"held {index}", target.capabilities.opset)
        models.append(model)
        if "int8" in target.capabilities.precisions:
            models.append(quantized(model, target))
    return models


def roofline_ratios(target: Target, peaks: Peaks, progress: Progress = silent) -> Ratios:
    """Measured / bound of the held-out networks, by `analytical.group`."""
    found: dict[str, list[float]] = defaultdict(list)
    for sample in held_samples(target, progress):
        bound = bound_ms(sample.kernels, peaks)
        if bound > 0:
            found[group(sample.kernels)].append(sample.total_ms / bound)
    return dict(found)


def held_samples(target: Target, progress: Progress = silent) -> list[Sample]:
    """The networks with what they took here, from the cache where they were measured before."""
    place = place_of(target)
    path = place.folder / "held.jsonl"
    try:
        known = read_samples(path, place)
    except CompressError:
        path.unlink(missing_ok=True)
        known = []
    if known:  # written when all were measured
        return known
    path.unlink(missing_ok=True)
    return _measured(target, held_models(target), path, progress)


def _measured(target: Target, models: list[Model], path: Path, progress: Progress) -> list[Sample]:
    place = place_of(target)
    samples = []
    with progress(f"Measure {len(models)} networks on {target.name}", len(models)) as advance:
        for model in models:
            engine, inputs = target.build(model), model.example()
            calls = {"network": lambda: engine(inputs)}  # noqa: B023
            took = measure(calls, seconds=SECONDS, min_blocks=8).timings["network"].p50_ms
            kernels = tuple(describe_engine(engine, model))
            samples.append(Sample(model.name, took, took, kernels, (0.0,) * len(kernels)))
            advance(1, model.name)
    temporary = path.with_suffix(".part")
    temporary.unlink(missing_ok=True)
    for sample in samples:
        append_sample(temporary, place, sample)
    temporary.replace(path)
    return samples


def table_ratios(target: Target, table: Table, progress: Progress = silent) -> Ratios:
    """Measured / sum of the table for the held-out networks, by `analytical.group`."""
    path = table.place.folder / "table_errors.json"
    try:
        stored = read_json(path)
        ratios = {str(k): [float(v) for v in values] for k, values in stored.items()}
        if all(v > 0 for values in ratios.values() for v in values) and any(ratios.values()):
            return ratios
    except (CompressError, TypeError, ValueError, AttributeError):
        pass  # none yet, or damaged
    samples = held_samples(target, progress)
    found: dict[str, list[float]] = defaultdict(list)
    models = held_models(target)
    with progress("Check the table on these networks", len(models)) as advance:
        for model, sample in zip(models, samples, strict=True):
            total, _, _ = table.sum(model, target.build(model))
            found[group(sample.kernels)].append(sample.total_ms * 1e3 / total)
            advance(1, model.name)
    write_json(path, dict(found))
    return dict(found)
