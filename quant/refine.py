"""Passes that improve a quantized model: another float graph, another plan, emitted again.

`quantize` leaves the float graph and the plan in its step. A refining pass changes the numbers in
them (weights, biases, scales), never what is quantized, and so never which kernels run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir

from compress.errors import UsageError
from compress.model import Model, Step
from quant.emit import emit_qdq
from quant.emulate import emit_emulated
from quant.plan import QuantPlan

STATE = "quantized"
"""Where a step keeps its `Quantized`; not part of any report."""


@dataclass(frozen=True)
class Quantized:
    """What a quantized model was emitted from.

    Attributes:
        graph_model: the float graph with what passes changed in it; not to be changed in place.
        plan: made for it.
        reference: the float graph as it was: what the quantized one should compute. It has the
            same nodes in the same order.
        emulated: its formats are emulated in float32.
    """

    graph_model: ir.Model
    plan: QuantPlan
    reference: ir.Model
    emulated: bool = False


def emit(state: Quantized) -> ir.Model:
    """The model that runs."""
    write = emit_emulated if state.emulated else emit_qdq
    return write(state.graph_model, state.plan)


def state_of(model: Model, name: str) -> Quantized:
    """What `model` was emitted from.

    Raises:
        UsageError: the last step was neither `quantize` nor a pass that refines its result.
    """
    found = model.history[-1].details.get(STATE) if model.history else None
    if not isinstance(found, Quantized):
        last = model.history[-1].name if model.history else "nothing"
        raise UsageError(
            f"Pass {name} improves a quantized model, and before it stands {last}. Put it behind "
            f"`quantize` or another pass that does the same."
        )
    return found


def emitted(
    model: Model,
    state: Quantized,
    name: str,
    options: Mapping[str, Any],
    details: Mapping[str, Any],
) -> Model:
    """The model that follows from another float graph or plan, with its step in the history."""
    facts = {**details, "plan": state.plan.to_dict(), STATE: state}
    return model.evolve(emit(state), Step(name, options, facts))
