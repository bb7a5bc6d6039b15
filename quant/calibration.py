"""Calibration: stream data through the float graph and observe the tensors that need a range.

Memory is one batch of activations plus O(tensors x bins); it does not grow with the data.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from compress.columns import whole_inputs
from compress.data import load_data
from compress.errors import DataError
from compress.graph import graph_sha256, infer_shapes
from compress.model import Model
from compress.progress import Progress, silent
from compress.reference import reference_session, run
from quant.observers import HistogramObserver

if TYPE_CHECKING:
    from compress.data import Data
    from compress.passes import Context

ACTIVATION_BUDGET_BYTES = 256_000_000
"""Observed activations of one batch; sets the batch size of calibration."""

_CACHE_VERSION = 3


def calibration_data(model: Model, context: Context, samples: int) -> tuple[Data | None, str]:
    """Samples to look at activations with, and what they are in words.

    The user's; without them synthetic ones that match the BatchNorm statistics of the original;
    None where neither is possible.
    """
    if context.calibration is not None:
        key = f"quantize.samples {samples}"
        if key not in context.memo:
            # Samples from all of it: data sorted by class would give one class's ranges.
            context.memo[key] = context.calibration.take(samples)
        chosen: Data = context.memo[key]
        return chosen, "calibration data"
    original = context.original
    if original.stage == "torch":
        from quant.synthetic import synthesize

        if "quantize.synthetic" not in context.memo:
            made = synthesize(
                original.torch_module,
                original.inputs,
                seed=context.seed,
                progress=context.progress,
            )
            data = load_data(made.arrays, model.inputs) if made is not None else None
            context.memo["quantize.synthetic"] = data
        if context.memo["quantize.synthetic"] is not None:
            found: Data = context.memo["quantize.synthetic"]
            return found, "synthetic data from BatchNorm statistics"
    return None, "none: dynamic and weight-only"


def observe(
    model: Model,
    tensors: Iterable[str],
    data: Data,
    *,
    samples: int,
    bins: int = 2048,
    cache: Path | None = None,
    memo: dict[str, dict[str, HistogramObserver]] | None = None,
    progress: Progress = silent,
) -> dict[str, HistogramObserver]:
    """Histograms of the named tensors over the first `samples` samples.

    Only tensors that neither `memo` nor `cache` knows are observed: another placement of the same
    graph mostly asks for the same ones.

    Args:
        model: at the ONNX stage.
        tensors: names of activations in its graph.
        data: batches of the model's inputs.
        samples: how many to use; fewer where there are fewer.
        bins: of each histogram; 0 keeps only range and count.
        cache: folder for the result, keyed by hashes of graph and data.
        memo: what earlier calls found, by the same key; it is filled.
        progress: a bar over the samples.

    Raises:
        DataError: the data hold no whole batch for a model with a fixed batch size.
    """
    names = sorted(tensors)
    samples = min(samples, len(data))
    key = _key(model, data, samples, bins)
    file = cache / f"calibration-{key}.json" if cache is not None else None
    known = {} if memo is None else memo.setdefault(key, {})
    if file is not None and any(name not in known for name in names):
        known |= _read(file)
    if new := [name for name in names if name not in known]:
        known |= _observe(model, new, data, samples, bins, progress)
        if file is not None:
            _write(file, known)
    return {name: known[name] for name in names}


def _observe(
    model: Model, names: list[str], data: Data, samples: int, bins: int, progress: Progress
) -> dict[str, HistogramObserver]:
    size = _batch_size(model, names, samples)
    observers = {name: HistogramObserver(name, bins) for name in names}
    runtime = reference_session(_with_outputs(model.graph_model, names), optimize=True)
    done = 0
    with progress("Calibrate", total=samples) as advance:
        for batch in data.batches(size):
            count = len(batch)
            if done >= samples or (count < size and not model.dynamic_batch):
                break
            if model.dynamic_batch and done + count > samples:
                batch = batch.rows(0, samples - done)
                count = len(batch)
            inputs = batch.inputs
            outputs = run(runtime, inputs)
            for name, observer in observers.items():
                observer.update(inputs[name] if name in inputs else outputs[name])
            done += count
            advance(count)
    if not done:
        raise DataError(
            f"Calibration data {data.name} hold {len(data)} samples and the model takes batches "
            f"of {size}. Give at least {size} samples, or export the model with a dynamic batch."
        )
    return observers


def _with_outputs(graph_model: ir.Model, names: Iterable[str]) -> ir.Model:
    model = graph_model.clone()
    inputs = {value.name for value in model.graph.inputs}
    present = {value.name for value in model.graph.outputs}
    values = {out.name: out for node in model.graph for out in node.outputs}
    for name in names:
        if name not in present and name not in inputs:
            model.graph.outputs.append(values[name])
    return model


def _batch_size(model: Model, names: Iterable[str], samples: int) -> int:
    if not model.dynamic_batch:
        if whole_inputs(model.inputs):
            return 1
        return next((int(spec.shape[0]) for spec in model.inputs if spec.shape), 1)
    shapes = infer_shapes(model.graph_model)
    per_sample = 4 * sum(abs(math.prod(shapes.get(name, (1,)))) for name in names)
    return int(np.clip(ACTIVATION_BUDGET_BYTES // max(per_sample, 1), 1, min(32, samples)))


def _key(model: Model, data: Data, samples: int, bins: int) -> str:
    """Hash of everything that decides the histograms."""
    parts = [_CACHE_VERSION, graph_sha256(model.graph_model), data.sha256, samples, bins]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def _read(file: Path) -> dict[str, HistogramObserver]:
    try:
        stored: Mapping[str, dict[str, object]] = json.loads(file.read_text())
        return {name: HistogramObserver.from_dict(values) for name, values in stored.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}  # absent or damaged: compute it again


def _write(file: Path, observers: Mapping[str, HistogramObserver]) -> None:
    """A cache that cannot be written costs time later, not this run."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = file.with_suffix(f".{id(observers)}.tmp")
        temporary.write_text(json.dumps({n: o.to_dict() for n, o in observers.items()}))
        temporary.replace(file)
    except OSError:
        return
