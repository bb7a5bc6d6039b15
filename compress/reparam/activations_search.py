"""Which activations to remove: what it gains on the target, and what it changes."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from compress.data import Data
from compress.errors import DataError, EngineError
from compress.graph import infer_shapes
from compress.latency import measure
from compress.model import Model
from compress.passes import Context
from compress.recovery import squared_error
from compress.reference import reference_session, run
from compress.reparam.activations_graph import Segment, as_linear, pair
from compress.reparam.lowrank_errors import fitting_batch

CANDIDATE_SECONDS = 0.25
"""For each candidate, and as much for the layers as they are."""
MARGIN = 0.02
"""The merged layer must be faster by so much, with confidence."""
SAMPLES = 64
BATCH = 8
SMALLEST = 1e-6
"""Sensitivity that counts as none, where gains are divided by it."""


@dataclass
class Tried:
    """A segment that was timed.

    Attributes:
        segment: which.
        before_us: of its layers, median.
        after_us: of the one in their place: `before_us` divided by the ratio within the rounds.
        faster: the interval of the ratio is above 1 + `MARGIN`.
        sensitivity: squared error of the network's outputs, relative to their power, when its
            activations alone are linear; None where it was not measured.
    """

    segment: Segment
    before_us: float
    after_us: float
    faster: bool
    sensitivity: float | None = None

    @property
    def gain_us(self) -> float:
        """Time that is saved."""
        return self.before_us - self.after_us

    def row(self) -> dict[str, Any]:
        """For the report."""
        return {
            "layers": list(self.segment.layers),
            "activations": list(self.segment.activations),
            "kernel": list(self.segment.kernel),
            "macs_before": self.segment.macs[0],
            "macs_after": self.segment.macs[1],
            "before_us": self.before_us,
            "after_us": self.after_us,
            "faster": self.faster,
            "sensitivity": self.sensitivity,
        }


class Changes:
    """How far the outputs of a network that was changed are from what they were.

    Args:
        model: as it was, at the ONNX stage.
        data: to run it on.

    Raises:
        DataError: there is no full batch for a model whose batch is fixed.
    """

    def __init__(self, model: Model, data: Data) -> None:
        size = BATCH if model.dynamic_batch else fitting_batch(model)
        batches = [dict(batch.inputs) for batch in data.take(max(SAMPLES, size)).batches(size)]
        first = model.inputs[0].name
        if not model.dynamic_batch and len(model.inputs) == 1:
            batches = [one for one in batches if len(one[first]) == size]
        if not batches:
            raise DataError(f"{data.name} has no full batch of {size} for {model.name}.")
        session = reference_session(model.graph_model)
        self._batches, self._expected = batches, [run(session, inputs) for inputs in batches]

    def __call__(self, other: Model) -> float:
        """Mean squared error relative to the outputs' power, over the float outputs."""
        session = reference_session(other.graph_model)
        errors = []
        for inputs, expected in zip(self._batches, self._expected, strict=True):
            got = run(session, inputs)
            errors += [
                squared_error(got[name], array)
                for name, array in expected.items()
                if np.issubdtype(array.dtype, np.floating)
            ]
        return float(np.mean(errors)) if errors else 0.0


def time_segments(
    model: Model,
    segments: Sequence[Segment],
    context: Context,
    seconds: float,
    advance: Callable[..., None],
) -> list[Tried]:
    """Time segments alone, each against its merged layer, the largest first, until time is over.

    Equal segments are timed once.

    Args:
        model: that holds them.
        segments: to time.
        context: of the pass.
        seconds: at most; what was begun is finished.
        advance: is told the seconds that passed.
    """
    shapes = infer_shapes(model.graph_model)
    start = time.monotonic()
    known: dict[str, tuple[float, float, bool] | None] = {}
    tried = []
    for segment in sorted(segments, key=lambda one: one.macs[1] - one.macs[0]):
        before, after = pair(model, segment, shapes)
        key = _signature(before.graph_model)
        if key not in known:
            begun = time.monotonic()
            if begun - start > seconds:
                continue
            known[key] = _timed(before, after, context)
            advance(time.monotonic() - begun)
        found = known[key]
        if found is not None:
            tried.append(Tried(segment, *found))
    return tried


def _timed(before: Model, after: Model, context: Context) -> tuple[float, float, bool] | None:
    inputs = before.example()
    try:
        engines = [context.target.build(model) for model in (before, after)]
    except EngineError:  # the runtime refuses this form: it is no candidate
        return None
    calls = {
        name: lambda engine=engine: engine(inputs)
        for name, engine in zip(("before", "after"), engines, strict=True)
    }
    seconds = CANDIDATE_SECONDS * len(calls)
    found = measure(calls, seconds=seconds, min_blocks=6, margin=MARGIN, seed=context.seed)
    took, ratio = found.timings["before"].p50_ms * 1e3, found.ratios["after"]
    return took, took / ratio.value, ratio.verdict == "faster"


def _signature(graph_model: ir.Model) -> str:
    """What the time of a model depends on."""
    rows = [
        (node.op_type, sorted(map(str, node.attributes.values())), [_shape(v) for v in node.inputs])
        for node in graph_model.graph
    ]
    source = [str(value.shape) for value in graph_model.graph.inputs]
    return hashlib.sha256(repr((source, rows)).encode()).hexdigest()


def _shape(value: ir.Value | None) -> str:
    constant = value is not None and value.const_value is not None
    return str(value.shape) if value is not None and constant else ""


def judge(model: Model, tried: Sequence[Tried], changes: Changes, move: bool) -> None:
    """Find the sensitivity of what is faster."""
    for one in tried:
        if one.faster:
            one.sensitivity = changes(as_linear(model, [one.segment], move))


def choose(tried: Sequence[Tried], most: int, max_sensitivity: float) -> list[Tried]:
    """Segments that do not overlap, those with the largest gain for their sensitivity first.

    Args:
        tried: with their sensitivity.
        most: activations in all of them at most.
        max_sensitivity: of one of them.
    """
    chosen: list[Tried] = []
    room = most
    for one in sorted(tried, key=_worth, reverse=True):
        count = len(one.segment.activations)
        fits = one.faster and one.sensitivity is not None and one.sensitivity <= max_sensitivity
        if fits and count <= room and not any(one.segment.overlaps(c.segment) for c in chosen):
            chosen.append(one)
            room -= count
    return chosen


def _worth(one: Tried) -> float:
    return one.gain_us / max(one.sensitivity or 0.0, SMALLEST)
