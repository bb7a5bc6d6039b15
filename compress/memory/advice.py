"""What patch-based execution could reach where no candidate fits into memory: one sentence."""

from __future__ import annotations

from typing import TYPE_CHECKING

from compress.graph_liveness import Reading
from compress.memory.limit import show_memory

if TYPE_CHECKING:
    import onnx_ir as ir


def what_patches_reach(graph_model: ir.Model, limit_bytes: int) -> str:
    """The smallest split that would fit, in int8 or else in float32, and what it costs.

    It is an analysis of the model as an interpreter with an arena would run it, and says so.
    """
    from compress.memory.splitting import smallest_fit

    limit = show_memory(limit_bytes)
    readings: tuple[tuple[Reading, str], ...] = (("as written", "float32"), ("int8", "int8"))
    for reading, name in readings:
        found = smallest_fit(graph_model, limit_bytes, reading)
        if found is not None:
            return (
                f"Analysis, not executed: in {name}, with the operators up to {found.end} run in "
                f"{found.split} patches along each axis, the model would need "
                f"{show_memory(found.reading(reading).bytes)} and {found.overhead:.1%} more "
                f"multiply-accumulates. That takes a runtime with patch-based execution, which "
                f"this target is not; see `compress inspect --patches`."
            )
    return f"Analysis, not executed: no split of the first stage into patches reaches {limit}."
