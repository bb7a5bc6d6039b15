"""An ONNX graph as a schedule: what an operator allocates, views, and writes over.

This is the ideal for the graph's own order, what an arena of a microcontroller's interpreter can
reach, and a lower bound of what other runtimes need.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import onnx_ir as ir

from compress.liveness import Program, Step

Reading = Literal["as written", "int8"]
"""Element types: those of the graph, or every float in one byte."""

VIEWS = frozenset(["Reshape", "Flatten", "Squeeze", "Unsqueeze", "Identity", "Dropout"])
POINTWISE = frozenset([
    "Abs", "Ceil", "Celu", "Clip", "Cos", "Elu", "Erf", "Exp", "Floor", "Gelu", "HardSigmoid",
    "HardSwish", "LeakyRelu", "Log", "Mish", "Neg", "Not", "Reciprocal", "Relu", "Round", "Selu",
    "Sigmoid", "Sign", "Sin", "Softplus", "Softsign", "Sqrt", "Swish", "Tanh", "ThresholdedRelu",
])  # fmt: skip
"""One number in, one number out."""
COMBINING = frozenset([
    "Add", "And", "Div", "Max", "Mean", "Min", "Mod", "Mul", "Or", "PRelu", "Pow", "Sub", "Sum",
    "Where", "Xor",
])  # fmt: skip
"""Several numbers of the same place in, one out."""
BY_ROWS = frozenset([
    "BatchNormalization", "Cast", "DequantizeLinear", "GroupNormalization",
    "InstanceNormalization", "LayerNormalization", "LogSoftmax", "LpNormalization",
    "QuantizeLinear", "RMSNormalization", "Softmax",
])  # fmt: skip
"""Read what they write over before they write it."""
_IN_PLACE = POINTWISE | COMBINING | BY_ROWS


def program_of(
    graph: ir.Graph,
    shapes: Mapping[str, tuple[int, ...]],
    reading: Reading = "as written",
    *,
    in_place: bool = True,
) -> Program:
    """The schedule of a graph in its own order, one step for each node.

    Constants, weights and arithmetic on shapes take nothing. Quantization that follows an operator
    directly is part of that operator, and so is dequantization of what reads: the float tensor
    between them does not exist. A gate of one number (x times its own sigmoid) is one operator.
    What happens inside If, Loop and Scan is not counted. A tensor of unknown type counts as
    float32, one of unknown shape as nothing.

    Args:
        graph: with batch 1 or a dynamic batch, which counts as 1.
        shapes: of all tensors by name, as `compress.graph.infer_shapes` gives them.
        reading: of the element types.
        in_place: operators write over operands that die with them, and fuse as said above.
    """
    data = data_tensors(graph)
    outputs = {value.name for value in graph.outputs}
    sizes: dict[str, int] = {}
    fused: dict[str, ir.Value] = {}
    steps: list[Step] = []

    def size(value: ir.Value) -> int:
        dtype, shape = value.dtype or ir.DataType.FLOAT, shapes.get(value.name or "")
        if shape is None:
            return 0
        narrow = reading == "int8" and dtype.is_floating_point()
        elements = math.prod(abs(one) for one in shape)
        return elements if narrow else math.ceil(elements * dtype.itemsize)

    def only_reader(value: ir.Value) -> ir.Node | None:
        uses = list(value.uses())
        return uses[0].node if len(uses) == 1 and value.name not in outputs else None

    def allocated(value: ir.Value) -> int:
        reader = only_reader(value)
        if not in_place or reader is None or value.producer() is None:
            return size(value)
        if not _same_place(value, shapes, reader):
            return size(value)
        if reader.op_type == "QuantizeLinear":
            fused[value.name or ""] = value
            return size(reader.outputs[0])
        if _is_gate(value, reader):
            fused[value.name or ""] = value
            return 0
        return size(value)

    names = [value.name or "" for value in graph.inputs if value in data]
    sizes |= {value.name or "": size(value) for value in graph.inputs if value in data}
    for node in graph:
        reads = [value for value in inputs_of(node) if value in data and reads_numbers(node)]
        writes = [value for value in node.outputs if value in data]
        views: dict[str, str] = {}
        if reads and writes and _views(node, fused, outputs):
            views[writes[0].name or ""] = reads[0].name or ""
            writes = []
        sizes |= {value.name or "": allocated(value) for value in writes}
        over = reads if in_place and node.op_type in _IN_PLACE else []
        steps.append(
            Step(
                name=node.name or "",
                op_type=node.op_type,
                reads=tuple(value.name or "" for value in reads),
                writes=tuple(value.name or "" for value in writes),
                overwrites=tuple(value.name or "" for value in over),
                views=views,
            )
        )
    kept = tuple(value.name or "" for value in graph.outputs if value in data)
    return Program(tuple(steps), sizes, tuple(names), kept)


def data_tensors(graph: ir.Graph) -> set[ir.Value]:
    """The tensors that depend on the inputs' data; only a shape goes through Shape and Size."""
    found = {value for value in graph.inputs if value.const_value is None}
    for node in graph:
        if reads_numbers(node) and any(value in found for value in inputs_of(node)):
            found.update(node.outputs)
    return found


def reads_numbers(node: ir.Node) -> bool:
    """Whether a node looks at the numbers of what it reads, and not only at its shape."""
    return node.op_type not in ("Shape", "Size")


def inputs_of(node: ir.Node) -> list[ir.Value]:
    """What a node reads, also from inside its subgraphs."""
    values = [value for value in node.inputs if value is not None]
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            inner = attribute.as_graph()
            values += [v for other in inner.all_nodes() for v in other.inputs if v is not None]
            values += list(inner.outputs)
    return values


def _views(node: ir.Node, fused: Mapping[str, ir.Value], outputs: set[str | None]) -> bool:
    """Whether the first output of a node is another name for its first input."""
    source = node.inputs[0]
    if node.op_type == "DequantizeLinear":
        return node.outputs[0].name not in outputs
    if node.op_type == "QuantizeLinear":
        return source is not None and source.name in fused
    return node.op_type in VIEWS


def _same_place(value: ir.Value, shapes: Mapping[str, tuple[int, ...]], reader: ir.Node) -> bool:
    """Whether a reader's output has the shape of what it reads, so that both can be one loop."""
    known = shapes.get(value.name or "")
    return known is not None and known == shapes.get(reader.outputs[0].name or "")


def _is_gate(value: ir.Value, reader: ir.Node) -> bool:
    """Whether a tensor is a function of one number of another operand of its only reader."""
    maker = value.producer()
    if maker is None or maker.op_type not in POINTWISE or reader.op_type not in COMBINING:
        return False
    return maker.inputs[0] in [one for one in reader.inputs if one is not value]
