"""Type an ONNX model in float16 or bfloat16: a runtime without precision flags does as it says.

What is kept in float32 follows what half precision is known to lose (Micikevicius et al. 2018,
arXiv 1710.03740, section 3): sums over many elements, exponentials and normalizations, constants
out of range, and layers whose outputs may be. Casts stand where the two meet.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Literal, TypeAlias

import ml_dtypes
import numpy as np
import onnx.defs
import onnx_ir as ir
import onnx_ir.convenience as convenience

from compress.element_types import Types, element_types, output_type
from compress.errors import UnsupportedError, UsageError
from compress.rewrites import Statistics, new_constant, remove_unused

HalfType: TypeAlias = Literal["float16", "bfloat16"]

SENSITIVE = frozenset(
    """
    CumSum Exp GroupNormalization InstanceNormalization LayerNormalization Log LogSoftmax
    LpNormalization MeanVarianceNormalization Pow ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp
    ReduceMean ReduceProd ReduceSum ReduceSumSquare RMSNormalization Softmax Softplus
    """.split()
)
"""Sums of many elements, and functions that leave the range of float16."""
_LEFT_ALONE = {
    **dict.fromkeys(("GRU", "LSTM", "RNN"), "its state sums up over many steps"),
    **dict.fromkeys(("If", "Loop", "Scan"), "it has subgraphs"),
    **dict.fromkeys(("Constant", "ConstantOfShape", "EyeLike", "Range"), "it makes float32"),
    **dict.fromkeys(("RandomNormal", "RandomNormalLike", "RandomUniform"), "it makes float32"),
    "RandomUniformLike": "it makes float32",
}
_ARITHMETIC = frozenset(
    """
    Add Cast Ceil Concat Div Floor Gather Max Min Mul Neg Reciprocal Reshape Round Slice Squeeze
    Sqrt Sub Unsqueeze
    """.split()
)
"""What sizes and positions are computed with; above 2048 float16 does not count in ones."""
_DEVIATIONS = 6
"""Of an output from its mean, within which its values are taken to lie."""
_SCALE_ERROR = 2.0**-8
"""Largest relative error of a scale: half a step of 8 bits at the end of the range."""
_QUANTIZING = ("QuantizeLinear", "DequantizeLinear")
_LEAST_OPSET = 19
"""In which QuantizeLinear and DequantizeLinear take scales in half precision."""
_BFLOAT16_OPSET = 22
"""In which convolutions and poolings take bfloat16; 21 differs from it in types alone."""


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
    opset = model.opset_imports.get("", 0)
    if dtype == "bfloat16" and opset == _BFLOAT16_OPSET - 1:
        opset = model.opset_imports[""] = _BFLOAT16_OPSET
    pairs = any(node.op_type in _QUANTIZING for node in model.graph)
    least = _BFLOAT16_OPSET if dtype == "bfloat16" else _LEAST_OPSET if pairs else 0
    if opset < least:
        raise UnsupportedError(
            f"The model has ONNX opset {opset}, and {dtype} needs {least}: before, operators and "
            f"the scales of Q/DQ do not take it. Export the model again."
        )


def float_operators(
    graph: ir.Graph,
    dtype: HalfType = "float16",
    keep_float: Collection[str] = (),
    statistics: Statistics | None = None,
) -> dict[str, str]:
    """Operators that stay in float32, by name, with the reason.

    Args:
        graph: the float graph, or one with Q/DQ.
        dtype: the type of the others.
        keep_float: names of operators that stay in float32 whatever they are.
        statistics: see `to_half`.

    Raises:
        UsageError: there is no such type, or no operator of a name in `keep_float`.
    """
    if dtype not in ("float16", "bfloat16"):
        raise UsageError(f"There is no half type {dtype!r}; choose float16 or bfloat16.")
    names = {node.name or "" for node in graph}
    unknown = [name for name in keep_float if name not in names]
    if unknown:
        raise UsageError(
            f"keep_float names {', '.join(unknown)}, which the graph does not have; `compress "
            f"inspect MODEL` lists the names."
        )
    limits, opset = ml_dtypes.finfo(dtype), graph.opset_imports.get("", 0)
    reasons: dict[str, str] = {}
    for node in graph:
        name = node.name or ""
        if name in keep_float:
            reasons[name] = "kept in float32 on request"
        elif node.domain not in ("", "ai.onnx"):
            reasons[name] = f"operators of {node.domain} are left as they are"
        elif node.op_type in SENSITIVE:
            reasons[name] = f"{node.op_type} loses too much in half precision"
        elif node.op_type in _LEFT_ALONE:
            reasons[name] = _LEFT_ALONE[node.op_type]
        elif not takes(node, 0, opset, dtype):
            reasons[name] = f"{node.op_type} has no {dtype} form in ONNX opset {opset}"
        elif node.op_type not in _QUANTIZING and (reason := _out_of_range(node, opset, dtype)):
            reasons[name] = f"{reason} in {dtype}"
        elif statistics is not None and name in statistics:
            mean, deviation = statistics[name]
            if np.any(np.abs(mean) + _DEVIATIONS * deviation > float(limits.max)):
                reasons[name] = f"its outputs may overflow in {dtype}"
    return reasons


def takes(node: ir.Node, index: int, opset: int, dtype: HalfType) -> bool:
    """Whether ONNX allows a type for an input of an operator; true where it has no such input."""
    try:
        schema = onnx.defs.get_schema(node.op_type, opset, "")
    except onnx.defs.SchemaError:
        return False
    if not schema.inputs:
        return True
    declared = schema.inputs[min(index, len(schema.inputs) - 1)]
    return f"tensor({dtype})" in declared.types or "tensor(float)" not in declared.types


def _out_of_range(node: ir.Node, opset: int, dtype: HalfType) -> str:
    """Whether a constant overflows, or a single number becomes 0."""
    limits = ml_dtypes.finfo(dtype)
    for index, value in enumerate(node.inputs):
        tensor = convenience.get_const_tensor(value) if value is not None else None
        if tensor is None or tensor.dtype != ir.DataType.FLOAT:
            continue
        if not takes(node, index, opset, dtype):
            continue
        numbers = np.abs(tensor.numpy())
        finite = numbers[np.isfinite(numbers)]
        if finite.size and finite.max() > float(limits.max):
            return f"its constant {tensor.name} overflows"
        if finite.size == 1 and 0 < finite.max() < float(limits.smallest_subnormal):
            return f"its constant {tensor.name} becomes 0"
    return ""


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
        integers, scale = (
            convenience.get_const_tensor(value) if value is not None else None
            for value in node.inputs[:2]
        )
        if integers is None or scale is None or len(scale.shape) > 1:
            return
        old = scale.numpy().astype(np.float64)
        least = float(ml_dtypes.finfo(self.numpy).smallest_subnormal) / _SCALE_ERROR
        new = np.maximum(old, least)
        axis = node.attributes.get_int("axis", 1)
        shape = [-1 if i == axis % len(integers.shape) else 1 for i in range(len(integers.shape))]
        factor = (old / new).reshape(shape if old.ndim else ())
        numbers = np.rint(integers.numpy() * factor).astype(integers.numpy().dtype)
        stored = new_constant(self.graph, numbers, f"{integers.name}/widened")
        wider = new_constant(self.graph, new.astype(np.float32), f"{scale.name}/widened")
        for value in (stored, wider):
            self.types[value] = value.const_value.dtype if value.const_value else ir.DataType.FLOAT
        node.replace_input_with(0, stored)
        node.replace_input_with(1, wider)

    def holds(self, scale: ir.Value) -> bool:
        """Whether the type can hold the scales well enough."""
        tensor = convenience.get_const_tensor(scale)
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
