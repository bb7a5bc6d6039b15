"""What is timed: one request, or a stream of them."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal, get_args

from compress.data import Data
from compress.errors import UsageError
from compress.model import Arrays, Model
from compress.target import Engine, Target

Objective = Literal["latency", "throughput"]


@dataclass(frozen=True)
class Workload:
    """Inputs of one request, and how many requests make one timed call.

    Attributes:
        inputs: of one request, by name.
        batch: samples in one request.
        objective: latency of single requests, or time per request when several are in flight.
        requests: in one timed call; 1 for latency.
    """

    inputs: Arrays
    batch: int
    objective: Objective = "latency"
    requests: int = 1

    def call(self, engine: Engine, target: Target) -> Callable[[], object]:
        """A function that runs one timed call.

        For throughput as many threads call the engine as its target has streams.
        """
        inputs = self.inputs
        streams = int(getattr(target, "streams", 1))
        if self.requests == 1:
            return lambda: engine(inputs)
        if streams == 1:
            return lambda: [engine(inputs) for _ in range(self.requests)]
        pool = ThreadPoolExecutor(streams, thread_name_prefix="compress-request")

        def run() -> object:
            waiting = [pool.submit(engine, inputs) for _ in range(self.requests)]
            return [one.result() for one in waiting]

        weakref.finalize(run, pool.shutdown, wait=False)
        return run

    def to_dict(self) -> dict[str, Any]:
        """Plain values for the report."""
        return {"batch": self.batch, "objective": self.objective, "requests": self.requests}


def check_workload(model: Model, *, batch: int, objective: str) -> None:
    """Refuse what cannot be timed, before any work.

    Raises:
        UsageError: the objective does not exist, or the batch does not fit the model.
    """
    if objective not in get_args(Objective):
        allowed = ", ".join(get_args(Objective))
        raise UsageError(f"--objective {objective} does not exist; choose from {allowed}.")
    if batch < 1:
        raise UsageError(f"--batch {batch} must be at least 1.")
    if batch != 1 and not model.dynamic_batch:
        shapes = ", ".join(map(str, model.inputs))
        raise UsageError(
            f"The model has a fixed batch ({shapes}), so --batch {batch} does not fit. Leave "
            f"--batch out, or export the model with a dynamic batch."
        )


def make_workload(
    model: Model, data: Data | None, *, batch: int, objective: str, threads: int
) -> Workload:
    """Real samples where there are some, else random ones.

    Raises:
        UsageError: as `check_workload`.
    """
    check_workload(model, batch=batch, objective=objective)
    kind: Objective = "throughput" if objective == "throughput" else "latency"
    requests = 1 if kind == "latency" else 2 * threads
    inputs = _samples(model, data, batch)
    size = batch if model.dynamic_batch else _fixed_batch(model)
    return Workload(inputs, size, kind, requests)


def _samples(model: Model, data: Data | None, batch: int) -> Arrays:
    if data is not None and model.dynamic_batch:
        for found in data.batches(batch):
            if len(found) == batch:
                return dict(found.inputs)
    return model.example(batch)


def _fixed_batch(model: Model) -> int:
    return next((int(spec.shape[0]) for spec in model.inputs if spec.shape), 1)
