"""Type an ONNX model in float16 or bfloat16: a runtime without precision flags does as it says.

`compress.half_limits` says what stays in float32. Casts stand where the two meet.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

import numpy as np
import onnx_ir as ir

from compress.element_types import Types, constant_tensor, element_types, output_type
from compress.errors import UnsupportedError
from compress.half_limits import QUANTIZING, SMALLEST, HalfType, float_operators, opset_for, takes
from compress.rewrites import Statistics, new_constant, remove_unused

_ARITHMETIC = frozenset((
    "Add", "Cast", "Ceil", "Concat", "Div", "Floor", "Gather", "Max", "Min", "Mul", "Neg",
    "Reciprocal", "Reshape", "Round", "Slice", "Squeeze", "Sqrt", "Sub", "Unsqueeze",
))  # fmt: skip
"""What sizes and positions are computed with; above 2048 float16 does not count in ones."""
_SCALE_ERROR = 2.0**-8
"""Largest relative error of a scale: half a step of 8 bits at the end of the range."""
_LEAST_OPSET = {"float16": 19, "bfloat16": 22}
"""In which scales of Q/DQ take the type; for bfloat16 that of convolutions, too."""


def to_half(
    graph_model: ir.Model,
    dtype: HalfType = "float16",
    *,
    keep_float: Collection[str] = (),
    statistics: Statistics | None = None,
    float_interface: bool = True,
) -> ir.Model:
    """A copy of the model that computes in `dtype`, with what `float_operators` names in float32.

    In a model with Q/DQ the scales get the type too, so that DequantizeLinear gives it; scales that
    it cannot hold keep float32, and a Cast follows.

    Args:
        graph_model: float32, or with Q/DQ; not changed.
        dtype: the type.
        keep_float: names of operators that stay in float32.
        statistics: from `compress.rewrites.output_statistics`: layers whose outputs may leave the
            range of the type stay in float32.
        float_interface: inputs and outputs of the model stay float32.

    Raises:
        UsageError: there is no such type, or no operator of a name in `keep_float`.
        UnsupportedError: the model's opset does not have the type where it is needed.
    """
    model = graph_model.clone()
    _check_opset(model, dtype)
    kept = float_operators(model.graph, dtype, keep_float, statistics)
    typer = _Typer(model.graph, dtype, kept.keys())
    if not float_interface:
        typer.retype_inputs()
    for node in list(model.graph):
        typer.visit(node)
    typer.finish(float_interface)
    remove_unused(model)
    return model


def _check_opset(model: ir.Model, dtype: HalfType) -> None:
    """Raise opset 21 to 22 where bfloat16 needs it; refuse what is too old."""
    opset = model.opset_imports[""] = opset_for(dtype, model.opset_imports.get("", 0))
    pairs = any(node.op_type in QUANTIZING for node in model.graph)
    least = _LEAST_OPSET.get(dtype, 0) if pairs or dtype == "bfloat16" else 0
    if opset < least:
        raise UnsupportedError(
            f"The model has ONNX opset {opset}, and {dtype} needs {least}: before, operators and "
            f"the scales of Q/DQ do not take it. Export the model again."
        )


class _Typer:
    """Goes through the operators in order and gives each the type that it is to compute in."""

    def __init__(self, graph: ir.Graph, dtype: HalfType, kept: Collection[str]) -> None:
        self.graph, self.kept, self.dtype = graph, kept, dtype
        self.opset = graph.opset_imports.get("", 0)
        self.half = ir.DataType.FLOAT16 if dtype == "float16" else ir.DataType.BFLOAT16
        self.numpy: np.dtype = self.half.numpy()
        self.types: Types = element_types(graph)
        self.made: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}
        self.counts: set[ir.Value] = set()

    def retype_inputs(self) -> None:
        """Make the model's own inputs half."""
        for value in self.graph.inputs:
            if self.types.get(value) == ir.DataType.FLOAT:
                self.set_type(value, self.half)

    def visit(self, node: ir.Node) -> None:
        """Give an operator inputs of its type, and note what it writes."""
        if node.op_type == "QuantizeLinear":
            self.quantize(node)
        elif node.op_type == "DequantizeLinear":
            self.dequantize(node)
        elif self.computes_counts(node):
            self.counts.update(node.outputs)
        elif node.op_type == "Cast" and node.name not in self.kept:
            if node.attributes.get_int("to", 0) == ir.DataType.FLOAT:
                node.attributes["to"] = ir.AttrInt64("to", int(self.half))
        elif node.op_type in ("Shape", "Size"):
            pass
        else:
            wanted = ir.DataType.FLOAT if (node.name or "") in self.kept else self.half
            self.take(node, wanted)
        for index, out in enumerate(node.outputs):
            found = output_type(node, index, self.types)
            if found in (ir.DataType.FLOAT, self.half) and found is not None:
                self.set_type(out, found)
            elif found is not None:
                self.types[out] = found

    def computes_counts(self, node: ir.Node) -> bool:
        """Whether an operator computes sizes or positions: numbers that come from int64 alone."""
        if node.op_type not in _ARITHMETIC:
            return False
        values = [v for v in node.inputs if v is not None and v.const_value is None]
        if node.op_type == "Cast" and self.types.get(values[0]) == ir.DataType.INT64:
            return True
        floats = [v for v in values if self.types.get(v) in (ir.DataType.FLOAT, self.half)]
        return bool(floats) and all(value in self.counts for value in floats)

    def take(self, node: ir.Node, wanted: ir.DataType) -> None:
        """Let every floating-point input of an operator have the wanted type."""
        for index, value in enumerate(node.inputs):
            if value is None or not takes(node, index, self.opset, self.dtype):
                continue
            if self.types.get(value) in (ir.DataType.FLOAT, self.half):
                node.replace_input_with(index, self.typed(value, wanted))
        for attribute in node.attributes.values():
            if attribute.type == ir.AttributeType.GRAPH:
                self.restore(attribute.as_graph().all_nodes())

    def restore(self, nodes: Iterable[ir.Node]) -> None:
        """Let subgraphs read outer tensors in float32, as before."""
        for node in nodes:
            for index, value in enumerate(node.inputs):
                if value is not None and self.types.get(value) == self.half:
                    node.replace_input_with(index, self.typed(value, ir.DataType.FLOAT))

    def quantize(self, node: ir.Node) -> None:
        """Its scale has the type of what it quantizes."""
        source, scale = node.inputs[0], node.inputs[1]
        if source is None or scale is None or self.types.get(source) != self.half:
            return
        if self.holds(scale):
            node.replace_input_with(1, self.typed(scale, self.half))
        else:
            node.replace_input_with(0, self.typed(source, ir.DataType.FLOAT))

    def dequantize(self, node: ir.Node) -> None:
        """Its scale has the type that it is to give, and the numbers of its QuantizeLinear."""
        source, scale = node.inputs[0], node.inputs[1]
        if source is None or scale is None:
            return
        quantize = source.producer()
        before = quantize.inputs[1] if quantize is not None and len(quantize.inputs) > 1 else None
        typed = before is not None and self.types.get(before) == self.half
        readers = [use.node.name or "" for use in node.outputs[0].uses()]
        if not typed and readers and all(name in self.kept for name in readers):
            return
        if not self.holds(scale):
            self.widen(node)
        scale = node.inputs[1]
        if scale is None or not self.holds(scale):
            return
        rounded = self.typed(scale, self.half)
        node.replace_input_with(1, rounded)
        if quantize is not None and quantize.op_type == "QuantizeLinear" and not typed:
            quantize.replace_input_with(1, self.typed(rounded, ir.DataType.FLOAT))

    def widen(self, node: ir.Node) -> None:
        """Give weights in the file scales that the type holds: those of dead channels are tiny."""
        integers, scale = (constant_tensor(value) for value in node.inputs[:2])
        if integers is None or scale is None or len(scale.shape) > 1:
            return
        old = scale.numpy().astype(np.float64)
        least = SMALLEST[self.dtype] / _SCALE_ERROR
        new = np.maximum(old, least)
        axis = node.attributes.get_int("axis", 1)
        shape = [-1 if i == axis % len(integers.shape) else 1 for i in range(len(integers.shape))]
        factor = (old / new).reshape(shape if old.ndim else ())
        scaled = integers.numpy().astype(np.float64) * factor
        whole = np.rint(scaled) if integers.dtype.is_integer() else scaled
        numbers = whole.astype(integers.numpy().dtype)
        stored = new_constant(self.graph, numbers, f"{integers.name}/widened")
        wider = new_constant(self.graph, new.astype(np.float32), f"{scale.name}/widened")
        for value in (stored, wider):
            self.types[value] = value.const_value.dtype if value.const_value else ir.DataType.FLOAT
        node.replace_input_with(0, stored)
        node.replace_input_with(1, wider)

    def holds(self, scale: ir.Value) -> bool:
        """Whether the type can hold the scales well enough."""
        tensor = constant_tensor(scale)
        if tensor is None:
            return False
        numbers = tensor.numpy().astype(np.float64)
        rounded = numbers.astype(self.numpy).astype(np.float64)
        return bool(np.all(np.abs(rounded - numbers) <= _SCALE_ERROR * numbers))

    def typed(self, value: ir.Value, wanted: ir.DataType) -> ir.Value:
        """The tensor in a type: itself, a constant of that type, or a Cast."""
        if self.types.get(value) == wanted:
            return value
        key = (value, wanted)
        if key not in self.made:
            self.made[key] = self.make(value, wanted)
            self.types[self.made[key]] = wanted
        return self.made[key]

    def make(self, value: ir.Value, wanted: ir.DataType) -> ir.Value:
        name = f"{value.name}/{wanted.name.lower()}"
        if value.const_value is not None:
            return new_constant(self.graph, value.const_value.numpy().astype(wanted.numpy()), name)
        cast = ir.node("Cast", [value], {"to": wanted}, name=f"{name}/cast")
        out = cast.outputs[0]
        out.name, out.shape, out.type = name, value.shape, ir.TensorType(wanted)
        producer = value.producer()
        if producer is None:
            self.graph.insert_before(self.graph[0], cast)
        else:
            self.graph.insert_after(producer, cast)
        return out

    def set_type(self, value: ir.Value, dtype: ir.DataType) -> None:
        """Note the type; a new object, since clones share those of the float model."""
        self.types[value] = dtype
        value.type = ir.TensorType(dtype)

    def finish(self, float_interface: bool) -> None:
        """Let the outputs have the type that the interface says, under their own names."""
        for index, value in enumerate(self.graph.outputs):
            wanted = ir.DataType.FLOAT if float_interface else self.half
            if self.types.get(value) not in (ir.DataType.FLOAT, self.half):
                continue
            if self.types[value] != wanted:
                name = value.name
                out = self.typed(value, wanted)
                self.graph.outputs[index] = out
                value.name, out.name = f"{name}/inner", name
