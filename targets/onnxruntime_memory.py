"""What ONNX Runtime's CPU provider allocates for activations: its plan, and its own account.

The plan repeats the single-stream allocation planner of ONNX Runtime (allocation_planner.cc of
1.31): an output is written into an operand's buffer where the kernel may work in place and nobody
else needs the operand, else into the buffer of a dead tensor of the same shape, the one that died
last, else into a new one. A buffer is given back after the last tensor that lies in it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import onnx

from compress.liveness import Program, Step
from targets.onnxruntime_shapes import Shape, tensor_types

_ALIASES = frozenset(["Flatten", "Identity", "Reshape", "Squeeze", "Unsqueeze"])
_IN_PLACE = frozenset([
    "Cast", "Celu", "Clip", "Elu", "HardSigmoid", "LeakyRelu", "LogSoftmax", "Relu", "Selu",
    "Sigmoid", "Softmax", "Softplus", "Softsign", "Tanh", "ThresholdedRelu",
])  # fmt: skip
"""Kernels that may write over their first operand. Arithmetic (Add, Mul, Sqrt, ...) may not."""
_ADDED_INPUT = 3
"""Operand of a convolution that its result is added to, which the NCHWc kernel overwrites."""


def planned(optimized: onnx.ModelProto, batch: int = 1) -> Program | None:
    """The schedule of an optimized graph; None where a shape is not known beforehand.

    Args:
        optimized: as a session writes it. The planner tells symbolic sizes apart by their names
            alone, so that a graph with a symbolic batch shares fewer buffers.
        batch: what the symbolic sizes of the inputs are.
    """
    graph = optimized.graph
    constants = {one.name for one in graph.initializer}
    inputs = tuple(v.name for v in graph.input if v.name not in constants)
    types = tensor_types(optimized, batch)
    produced = [name for node in graph.node for name in node.output if name]
    if not all(name in types for name in (*inputs, *produced)):
        return None
    kinds = {name: types[name][1] for name in (*inputs, *produced)}
    sizes = {name: math.prod(types[name][0]) * _item_bytes(kind) for name, kind in kinds.items()}
    told = tensor_types(optimized)
    shapes = {name: told[name][0] if name in told else None for name in kinds}
    plan = _Plan(shapes, kinds, inputs, [one.name for one in graph.output], graph.node)
    steps = tuple(plan.step(node, sizes) for node in graph.node)
    outputs = tuple(one.name for one in graph.output)
    return Program(steps, sizes, inputs, outputs, held=frozenset(inputs))


class _Plan:
    """Buffers of one graph while its nodes are gone through in order."""

    def __init__(
        self,
        shapes: Mapping[str, Shape | None],
        kinds: Mapping[str, int],
        inputs: Sequence[str],
        outputs: Sequence[str],
        nodes: Iterable[onnx.NodeProto],
    ) -> None:
        self.shapes, self.kinds, self.outputs = shapes, kinds, frozenset(outputs)
        self.buffer = {name: name for name in shapes}
        # Inputs and outputs have one reader more, the caller, so that they are never free.
        self.uses = Counter([*inputs, *outputs])
        self.uses.update(name for node in nodes for name in reads_of(node) if name in shapes)
        self.free: list[str] = []

    def step(self, node: onnx.NodeProto, sizes: Mapping[str, int]) -> Step:
        """One node: what it writes, and where."""
        reads = [name for name in reads_of(node) if name in self.shapes]
        writes, views = [], {}
        for index, name in enumerate(node.output):
            if not name:
                continue
            source = None
            if name not in self.outputs:
                source = self._operand(node, index, name) or self._dead(name)
            if source is None:
                writes.append(name)
            else:
                views[name] = self.buffer[name] = self.buffer[source]
                self.uses[self.buffer[name]] += self.uses[name]
        for name in (*reads, *filter(None, node.output)):
            buffer = self.buffer[name]
            self.uses[buffer] -= name in reads
            if not self.uses[buffer] and buffer not in self.free:
                self.free.insert(0, buffer)
        return Step(node.name, node.op_type, tuple(reads), tuple(writes), (), views, scratch=0)

    def _operand(self, node: onnx.NodeProto, index: int, name: str) -> str | None:
        if index == 0 and node.op_type in _ALIASES and node.input[0] in self.shapes:
            return str(node.input[0])
        operands = list(node.input[:1]) if node.op_type in _IN_PLACE else []
        if node.op_type == "Conv" and node.domain == "com.microsoft.nchwc":
            operands = list(node.input[_ADDED_INPUT : _ADDED_INPUT + 1])
        for operand in operands:
            fits = operand in self.shapes and self._alike(operand, name)
            if fits and self.uses[self.buffer[operand]] == 1:
                return str(operand)
        return None

    def _dead(self, name: str) -> str | None:
        if not self.shapes[name]:
            return None  # Scalars, and what has no shape, always get a new one.
        for buffer in self.free:
            if self._alike(buffer, name):
                self.free.remove(buffer)
                return buffer
        return None

    def _alike(self, one: str, other: str) -> bool:
        same_item = _item_bytes(self.kinds[one]) == _item_bytes(self.kinds[other])
        known = self.shapes[one] is not None
        return known and self.shapes[one] == self.shapes[other] and same_item


def reads_of(node: onnx.NodeProto) -> list[str]:
    """What a node reads, also from inside its subgraphs."""
    inner = [a.g for a in node.attribute if a.type == onnx.AttributeProto.GRAPH]
    return [*filter(None, node.input), *(n for g in inner for one in g.node for n in reads_of(one))]


def _item_bytes(kind: int) -> int:
    return int(onnx.helper.tensor_dtype_to_np_dtype(kind).itemsize)


def most_in_use(events: Sequence[Mapping[str, Any]]) -> int | None:
    """The most that the arena had given out at once, less what it had before the first kernel.

    Only what was asked for counts, not the pieces that the arena gave, and not what a kernel took
    and gave back. None where the profiler says nothing about it.
    """
    kernels = [event["args"] for event in events if event.get("cat") == "Node"]
    facts = [one for one in kernels if "mem_bytes_requested_in_use" in one]
    if not facts:
        return None
    first = facts[0]
    before = int(first["mem_bytes_requested_in_use"]) - int(first["mem_requested_in_use_delta"])
    return max(int(one["mem_bytes_requested_in_use"]) for one in facts) - before
