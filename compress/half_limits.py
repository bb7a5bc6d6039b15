"""Which operators of an ONNX model stay in float32 when the others go to half precision, and why.

What half precision is known to lose (Micikevicius et al. 2018, arXiv 1710.03740, section 3): sums
over many elements, exponentials and normalizations, constants out of range, and layers whose
outputs may be.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Final, Literal, TypeAlias

import numpy as np
import onnx.defs
import onnx_ir as ir

from compress.element_types import constant_tensor
from compress.errors import UsageError
from compress.rewrites import Statistics

HalfType: TypeAlias = Literal["float16", "bfloat16"]

LARGEST: Final = {"float16": 65504.0, "bfloat16": (2 - 2.0**-7) * 2.0**127}
SMALLEST: Final = {"float16": 2.0**-24, "bfloat16": 2.0**-133}
"""Numbers above 0 that the types hold; the smallest are subnormal."""
QUANTIZING = ("QuantizeLinear", "DequantizeLinear")

SENSITIVE = frozenset((
    "CumSum", "Exp", "GroupNormalization", "InstanceNormalization", "LayerNormalization", "Log",
    "LogSoftmax", "LpNormalization", "MeanVarianceNormalization", "Pow", "ReduceL1", "ReduceL2",
    "ReduceLogSum", "ReduceLogSumExp", "ReduceMean", "ReduceProd", "ReduceSum",
    "ReduceSumSquare", "RMSNormalization", "Softmax", "Softplus",
))  # fmt: skip
"""Sums of many elements, and functions that leave the range of float16."""
_LEFT_ALONE = {
    **dict.fromkeys(("GRU", "LSTM", "RNN"), "its state sums up over many steps"),
    **dict.fromkeys(("If", "Loop", "Scan"), "it has subgraphs"),
}
_BFLOAT16_OPSET = 22
"""In which convolutions and poolings take bfloat16; 21 differs from it in types alone."""
_DEVIATIONS = 6
"""Of an output from its mean, within which its values are taken to lie."""


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
    opset = opset_for(dtype, graph.opset_imports.get("", 0))
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
        elif node.op_type not in QUANTIZING and (reason := _out_of_range(node, opset, dtype)):
            reasons[name] = f"{reason} in {dtype}"
        elif statistics is not None and name in statistics:
            mean, deviation = statistics[name]
            if np.any(np.abs(mean) + _DEVIATIONS * deviation > LARGEST[dtype]):
                reasons[name] = f"its outputs may overflow in {dtype}"
    return reasons


def opset_for(dtype: HalfType, opset: int) -> int:
    """The opset that a model gets with the type: 22 where bfloat16 and 21 meet."""
    older = dtype == "bfloat16" and opset == _BFLOAT16_OPSET - 1
    return _BFLOAT16_OPSET if older else opset


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
    for index, value in enumerate(node.inputs):
        tensor = constant_tensor(value)
        if tensor is None or tensor.dtype != ir.DataType.FLOAT:
            continue
        if not takes(node, index, opset, dtype):
            continue
        numbers = np.abs(tensor.numpy())
        finite = numbers[np.isfinite(numbers)]
        if finite.size and finite.max() > LARGEST[dtype]:
            return f"its constant {tensor.name} overflows"
        if finite.size == 1 and 0 < finite.max() < SMALLEST[dtype]:
            return f"its constant {tensor.name} becomes 0"
    return ""
