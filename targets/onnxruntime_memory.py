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

_ALIASES = frozenset([
    "Dropout", "Flatten", "Identity", "Reshape", "Squeeze", "Unsqueeze",
])  # fmt: skip
_IN_PLACE = frozenset([
    "Abs", "Add", "Cast", "Ceil", "Clip", "Div", "Elu", "Exp", "Floor", "HardSigmoid", "LeakyRelu",
    "Log", "Mul", "Neg", "Pow", "Reciprocal", "Relu", "Selu", "Sigmoid", "Softplus", "Softsign",
    "Sqrt", "Sub", "Tanh", "ThresholdedRelu",
])  # fmt: skip
"""Kernels that are registered with MayInplace for every operand."""
_ADDED_INPUT = 3
"""Operand of a convolution that its result is added to, which the NCHWc kernel overwrites."""

_SAME_SHAPE = _IN_PLACE | {"HardSwish", "Gelu", "QuickGelu", "Sum"}
_BLOCK = 8
"""Channels of a block, at least; with AVX-512 there are 16, and weights say so."""

_Shape = tuple[int, ...]


def planned(optimized: onnx.ModelProto) -> Program | None:
    """The schedule of an optimized graph; None where a shape is not known beforehand.

    Args:
        optimized: as a session writes it, with every size of the inputs fixed.
    """
    graph = optimized.graph
    constants = {one.name: one for one in graph.initializer}
    known = {v.name: v for v in (*graph.input, *graph.value_info, *graph.output)}
    inputs = tuple(v.name for v in graph.input if v.name not in constants)
    shapes = {name: shape for name, v in known.items() if (shape := _shape(v)) is not None}
    weights = {name: tuple(one.dims) for name, one in constants.items()}
    kinds = {name: v.type.tensor_type.elem_type for name, v in known.items()}
    for node in graph.node:
        for name in filter(None, node.output):
            shape = shapes.get(name) or blocked_shape(node, {**weights, **shapes})
            if shape is None and name not in shapes:
                return None
            shapes[name] = shape or ()
            kinds.setdefault(name, onnx.TensorProto.FLOAT)
    produced = {name for node in graph.node for name in node.output if name}
    shapes = {n: shape for n, shape in shapes.items() if n in produced or n in inputs}
    sizes = {name: math.prod(shape) * _item_bytes(kinds[name]) for name, shape in shapes.items()}
    plan = _Plan(shapes, kinds, inputs, [one.name for one in graph.output], graph.node)
    steps = tuple(plan.step(node, sizes) for node in graph.node)
    outputs = tuple(one.name for one in graph.output)
    return Program(steps, sizes, inputs, outputs, held=frozenset(inputs))


class _Plan:
    """Buffers of one graph while its nodes are gone through in order."""

    def __init__(
        self,
        shapes: Mapping[str, _Shape],
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
        operands = list(node.input) if node.op_type in _IN_PLACE else []
        if node.op_type == "Conv" and node.domain == "com.microsoft.nchwc":
            operands = list(node.input[_ADDED_INPUT : _ADDED_INPUT + 1])
        for operand in operands:
            fits = operand in self.shapes and self._alike(operand, name)
            if fits and self.uses[self.buffer[operand]] == 1:
                return str(operand)
        return None

    def _dead(self, name: str) -> str | None:
        for buffer in self.free:
            if self._alike(buffer, name):
                self.free.remove(buffer)
                return buffer
        return None

    def _alike(self, one: str, other: str) -> bool:
        same_item = _item_bytes(self.kinds[one]) == _item_bytes(self.kinds[other])
        return self.shapes[one] == self.shapes[other] and same_item


def reads_of(node: onnx.NodeProto) -> list[str]:
    """What a node reads, also from inside its subgraphs."""
    inner = [a.g for a in node.attribute if a.type == onnx.AttributeProto.GRAPH]
    return [*filter(None, node.input), *(n for g in inner for one in g.node for n in reads_of(one))]


def blocked_shape(node: onnx.NodeProto, shapes: Mapping[str, _Shape]) -> _Shape | None:
    """The output of a kernel in ONNX Runtime's blocked layout, which its files leave out.

    Channels are those of the weights, filled up to whole blocks.
    """
    first = shapes.get(node.input[0]) if node.input else None
    if first is None:
        return None
    given = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    if node.op_type == "Concat":
        parts = [shapes[name] for name in node.input if name in shapes]
        axis = given.get("axis", 1)
        return (*first[:axis], sum(part[axis] for part in parts), *first[axis + 1 :])
    if node.domain != "com.microsoft.nchwc":
        whole = [shapes[name] for name in node.input if name in shapes]
        return max(whole, key=math.prod) if node.op_type in _SAME_SHAPE else None
    if node.op_type == "ReorderInput":
        channels = first[-1] if given.get("channels_last", 0) else first[1]
        size = first[1:-1] if given.get("channels_last", 0) else first[2:]
        return (first[0], -(-channels // _BLOCK) * _BLOCK, *size)
    channels = shapes[node.input[1]][0] if node.op_type == "Conv" else first[1]
    if node.op_type.startswith("Global"):
        return (first[0], channels, *(1 for _ in first[2:]))
    if node.op_type == "Upsample":
        scales = given["scales"][2:]
        return (first[0], channels, *(n * k for n, k in zip(first[2:], scales, strict=True)))
    window = given.get("kernel_shape") or list(shapes[node.input[1]][2:])
    rank = len(window)
    strides, dilations = given.get("strides", [1] * rank), given.get("dilations", [1] * rank)
    pads = given.get("pads", [0] * (2 * rank))
    spatial = []
    for axis, length in enumerate(first[2:]):
        padded = length + pads[axis] + pads[axis + rank] - dilations[axis] * (window[axis] - 1) - 1
        up = strides[axis] - 1 if given.get("ceil_mode", 0) else 0
        automatic = given.get("auto_pad", b"NOTSET").startswith(b"SAME")
        whole_steps = -(-length // strides[axis]) if automatic else None
        spatial.append(whole_steps or (padded + up) // strides[axis] + 1)
    return (first[0], channels, *spatial)


def _shape(value: onnx.ValueInfoProto | None) -> _Shape | None:
    if value is None or not value.type.tensor_type.HasField("shape"):
        return None
    sizes = value.type.tensor_type.shape.dim
    if not all(size.HasField("dim_value") for size in sizes):
        return None
    return tuple(size.dim_value for size in sizes)


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
