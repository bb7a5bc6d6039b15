"""The memory of a model before anything is built: what an interpreter with an arena would need."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from compress.graph import infer_shapes
from compress.graph_liveness import Reading, program_of
from compress.liveness import Peak, peak
from compress.memory.order import best_order
from compress.memory.packing import arena

if TYPE_CHECKING:
    import onnx_ir as ir

_STATES = 10_000
"""Enough for branches of a few operators each; a search that takes a second at most."""


@dataclass(frozen=True)
class ModelMemory:
    """Activations of a model with batch 1, in one reading of its element types.

    Attributes:
        peak: in the graph's own order.
        arena_bytes: one block that holds the tensors in that order, packed greedily.
        best_bytes: the peak in the best order of branches.
        best_is_exact: no order has a lower one; else the best that was found.
    """

    peak: Peak
    arena_bytes: int
    best_bytes: int
    best_is_exact: bool

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return dataclasses.asdict(self)


def model_memory(graph_model: ir.Model, reading: Reading = "as written") -> ModelMemory:
    """Peak, arena and best order of a graph (see `compress.graph_liveness.program_of`)."""
    program = program_of(graph_model.graph, infer_shapes(graph_model), reading)
    order = best_order(program, states=_STATES)
    return ModelMemory(peak(program), arena(program).bytes, order.bytes, order.exact)
