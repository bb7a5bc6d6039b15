"""Run an engine on samples, whatever its batch size."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from compress.columns import whole_inputs
from compress.data import Batch
from compress.errors import CompressError, EngineError
from compress.model import Arrays
from compress.target import Engine

BATCH = 32
"""Samples per call where nothing else is asked for."""


def batch_size(engine: Engine, wanted: int) -> int:
    """`wanted` where every input takes any batch, else the size that the first one is fixed to.

    Where axis 0 is not the batch, a call takes one sample.
    """
    if whole_inputs(engine.inputs):
        return 1
    sizes = [spec.concrete()[0] for spec in engine.inputs if spec.shape]
    dynamic = all(spec.dynamic_batch for spec in engine.inputs if spec.shape)
    return wanted if dynamic or not sizes else sizes[0]


def run(engine: Engine, samples: Batch) -> Arrays:
    """Outputs for the samples alone; a fixed batch is filled up with copies of the last one.

    Raises:
        EngineError: the engine failed.
    """
    count = len(samples)
    missing = batch_size(engine, count) - count
    inputs: Mapping[str, np.ndarray] = samples.inputs
    if missing > 0:
        inputs = {
            name: np.concatenate([array, np.repeat(array[-1:], missing, 0)])
            if array.ndim
            else array
            for name, array in inputs.items()
        }
    try:
        outputs = engine(inputs)
    except CompressError:
        raise
    except Exception as error:
        raise EngineError(
            f"{engine.name} failed on a batch of {count + missing} with {type(error).__name__}: "
            f"{error}"
        ) from error
    if missing <= 0:
        return outputs
    full = count + missing
    return {k: v[:count] if v.shape[:1] == (full,) else v for k, v in outputs.items()}


def class_scores(outputs: Mapping[str, np.ndarray]) -> np.ndarray | None:
    """The first output (N, classes) with at least two classes, or None."""
    fitting = (array for array in outputs.values() if array.ndim == 2 and array.shape[1] > 1)
    return next(fitting, None)
