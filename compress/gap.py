"""How far an artifact in its runtime is from the simulation that its plan was made with."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from compress.candidates import Built
from compress.data import Data
from compress.errors import UnsupportedError
from compress.graph import graph_sites
from compress.model import Arrays, Model
from compress.passes import Pass
from compress.running import class_scores
from compress.target import Engine

SAMPLES = 256
MAC_BUDGET = 20e9
"""Of the simulation, which computes in float: some seconds on two cores."""


@runtime_checkable
class Simulating(Pass, Protocol):
    """A pass whose result can be simulated without the runtime."""

    def simulate_outputs(self, model: Model, inputs: Arrays) -> Arrays | None:
        """Outputs by name; None where the model cannot be simulated."""


def simulation_gap(chosen: Built, passes: Sequence[Pass], data: Data | None) -> Mapping[str, Any]:
    """Agreement of artifact and simulation on real samples, as plain values for the report.

    Empty without data, for models that no pass can simulate, and for the original.
    """
    step = next((one for one in passes if isinstance(one, Simulating)), None)
    model = chosen.variant.model
    if step is None or data is None or not model.dynamic_batch:
        return {}
    macs = sum(site.macs for site in graph_sites(model.graph_model)) or 1
    count = int(np.clip(MAC_BUDGET // macs, 8, SAMPLES))
    batch = next(iter(data.take(count).batches(count)))
    try:
        simulated = step.simulate_outputs(model, batch.inputs)
    except UnsupportedError:
        return {}
    return compare_outputs(simulated, chosen.engine, batch.inputs) if simulated is not None else {}


def compare_outputs(simulated: Arrays, engine: Engine, inputs: Arrays) -> Mapping[str, Any]:
    """How well an engine agrees with these outputs, as plain values for the report."""
    got = _run(engine, inputs)
    noise = sum(float(np.square(got[n] - a, dtype=np.float64).sum()) for n, a in simulated.items())
    signal = sum(float(np.square(a, dtype=np.float64).sum()) for a in simulated.values())
    first, second = class_scores(simulated), class_scores(got)
    agreement = None
    if first is not None and second is not None:
        agreement = float(np.mean(first.argmax(1) == second.argmax(1)))
    return {
        "samples": len(next(iter(simulated.values()))),
        "top1_agreement": agreement,
        "sqnr_db": 10 * math.log10(signal / noise) if noise and signal else None,
    }


def _run(engine: Engine, inputs: Arrays) -> Arrays:
    """All samples, one by one where the engine's batch is 1."""
    sizes = {spec.shape[0] for spec in engine.inputs if spec.shape}
    if all(isinstance(size, str) for size in sizes):
        return engine(inputs)
    count = len(next(array for array in inputs.values() if array.ndim))
    rows = [
        engine({k: v[i : i + 1] if v.ndim else v for k, v in inputs.items()}) for i in range(count)
    ]
    return {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}
