"""Element types of the tensors of a graph, as the ONNX operator specification derives them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import onnx_ir as ir
import onnx_ir.convenience as convenience

Types = dict[ir.Value, ir.DataType]

_BOOL = ("And", "Equal", "Greater", "GreaterOrEqual", "IsInf", "IsNaN", "Less", "LessOrEqual",
         "Not", "Or", "Xor")  # fmt: skip
_INT64 = ("ArgMax", "ArgMin", "NonMaxSuppression", "NonZero", "Shape", "Size")
_SECOND_INT64 = ("MaxPool", "TopK", "Unique")
_LIKE: Final = {"CastLike": 1, "OneHot": 2, "Where": 1}
"""Operators whose output has the type of another input than the first."""

SAME_TYPE: Final[Mapping[str, tuple[int, ...] | None]] = {
    **dict.fromkeys(("Add", "Concat", "Div", "Max", "Mean", "Min", "Mod", "Mul", "Sub", "Sum")),
    **dict.fromkeys(("Clip", "Conv", "ConvTranspose", "Gemm", "MatMul", "PRelu", "Einsum")),
    **dict.fromkeys(("Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual")),
    "LayerNormalization": (0, 1, 2),
    "Pad": (0, 2),
    "Where": (1, 2),
}
"""Operators that want one type of several inputs, and of which; None means of all."""


def element_types(graph: ir.Graph) -> Types:
    """The type of every tensor of the graph that can be told; subgraphs are left out.

    What the graph says about an intermediate tensor counts only where the operator does not decide.
    """
    types: Types = {}
    for value in (*graph.inputs, *graph.initializers.values()):
        found = value.const_value.dtype if value.const_value is not None else value.dtype
        if found is not None:
            types[value] = found
    for node in graph:
        for index, out in enumerate(node.outputs):
            found = output_type(node, index, types)
            if found is not None:
                types[out] = found
    return types


def output_type(
    node: ir.Node, index: int, types: Mapping[ir.Value, ir.DataType]
) -> ir.DataType | None:
    """The type of one output, from those of the inputs; None where it cannot be told."""
    op, attributes = node.op_type, node.attributes
    out = node.outputs[index]
    for name in ("to", "output_dtype", "dtype"):
        if attributes.get_int(name, 0):
            return ir.DataType(attributes.get_int(name, 0))
    if op == "Constant":
        tensor = constant_tensor(out)
        return tensor.dtype if tensor is not None else None
    if op == "ConstantOfShape":
        value = attributes.get("value")
        return value.as_tensor().dtype if value is not None else ir.DataType.FLOAT
    if op == "QuantizeLinear":
        return _input_type(node, 2, types) or ir.DataType.UINT8
    if op == "DequantizeLinear":
        return _input_type(node, 1, types)
    if op in _BOOL or (op == "Dropout" and index == 1):
        return ir.DataType.BOOL
    if op in _INT64 or (op in _SECOND_INT64 and index > 0):
        return ir.DataType.INT64
    if op in ("If", "Loop", "Scan") or node.domain not in ("", "ai.onnx"):
        return out.dtype
    return _input_type(node, _LIKE.get(op, 0), types) or out.dtype


def constant_tensor(value: ir.Value | None) -> ir.TensorProtocol | None:
    """What an initializer or a Constant holds; None for anything else, also for sparse tensors."""
    try:
        return convenience.get_const_tensor(value) if value is not None else None
    except ValueError:
        return None


def _input_type(
    node: ir.Node, index: int, types: Mapping[ir.Value, ir.DataType]
) -> ir.DataType | None:
    value = node.inputs[index] if index < len(node.inputs) else None
    return types.get(value) if value is not None else None
