"""What OpenVINO's CPU plugin allocates for activations: its execution graph as a schedule."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

from compress.liveness import Program, Step

_VIEWS = frozenset(["Reshape", "Squeeze", "Unsqueeze"])
_PARTS = frozenset(["Gather", "Split"])
"""They look at a part of their operand where it lies in one piece, and then have no primitive."""
_IN_PLACE = frozenset(["Eltwise", "FakeQuantize", "Softmax"])
_ADDING = frozenset(["Convolution", "Deconvolution", "FullyConnected", "MatMul"])
_BITS = {"f32": 32, "f16": 16, "bf16": 16, "i64": 64, "i32": 32, "u8": 8, "i8": 8, "boolean": 8}


def planned(ops: Sequence[Any], info: Callable[[Any, str], str]) -> Program | None:
    """The schedule of an execution graph; None where a size is not known.

    Args:
        ops: of the execution graph in their order, constants among them.
        info: one entry of the runtime's information about an operator, as text.
    """
    sizes: dict[str, int] = {}
    changing: set[str] = set()
    inputs: list[str] = []
    outputs: list[str] = []
    steps = []
    for op in ops:
        name, layer = op.get_friendly_name(), info(op, "layerType")
        sources = [_port(one.get_source_output()) for one in op.inputs()]
        reads = tuple(one for one in sources if one in changing)
        if layer == "Output":
            outputs += reads
            continue
        if layer != "Input" and not reads:
            continue
        writes = tuple(_port(one) for one in op.outputs())
        changing.update(writes)
        found = [_bytes(op, index, info) for index in range(len(writes))]
        if None in found:
            return None
        sizes |= {one: size or 0 for one, size in zip(writes, found, strict=True)}
        if layer == "Input":
            inputs += writes
            continue
        part = layer in _PARTS and info(op, "primitiveType").startswith("unknown")
        views = dict.fromkeys(writes, reads[0]) if layer in _VIEWS or part else {}
        # What a multiplication adds to its result is written over by it.
        over = reads if layer in _IN_PLACE else reads[1:] if layer in _ADDING else ()
        steps.append(Step(name, layer, reads, () if views else writes, over, views))
    held = frozenset(inputs)
    return Program(tuple(steps), sizes, tuple(inputs), tuple(dict.fromkeys(outputs)), held)


def _port(output: Any) -> str:
    return f"{output.get_node().get_friendly_name()}:{output.get_index()}"


def _bytes(op: Any, index: int, info: Callable[[Any, str], str]) -> int | None:
    """Of one output, channels filled up where the layout has blocks of them (aBcd16b)."""
    shape = op.output(index).get_partial_shape()
    if shape.is_dynamic:
        return None
    sizes = [one.get_length() for one in shape]
    layout = (info(op, "outputLayouts").split(",") or [""])[0]
    if (block := re.search(r"(\d+)b$", layout)) and len(sizes) > 1:
        sizes[1] = -(-sizes[1] // int(block[1])) * int(block[1])
    kinds = info(op, "outputPrecisions").split(",")
    kind = kinds[min(index, len(kinds) - 1)].strip().lower()
    return math.prod(sizes) * _BITS[kind] // 8 if kind in _BITS else None
