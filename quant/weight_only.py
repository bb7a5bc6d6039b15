"""Weights stored in 4 bits and computed with in float.

In ONNX that is a DequantizeLinear behind an int4 initializer. ONNX Runtime fuses it with a matrix
product into MatMulNBits, and OpenVINO keeps the constant compressed; before a convolution both
expand it, so that there only the file gets smaller.
"""

from __future__ import annotations

from collections.abc import Container

import numpy as np
import onnx_ir as ir

from compress.graph import weight_input
from compress.rewrites import constant_array, replace_constant
from quant.spec import QuantSpec
from quant.widths import SiteFormat

_FLOAT = QuantSpec("bfloat16")


def stored_format(node: ir.Node, group: int) -> SiteFormat:
    """int4 in groups along the input features of a linear layer; per channel elsewhere."""
    index = weight_input(node)
    array = constant_array(node.inputs[index]) if index is not None else None
    spec = QuantSpec("int4", granularity="per_channel")
    linear = node.op_type in ("MatMul", "Gemm") and index == 1
    if linear and array is not None and array.ndim == 2 and array.shape[0] % group == 0:
        spec = QuantSpec("int4", granularity="per_group", group=group)
    return SiteFormat(spec, _FLOAT)


def untransposed(graph: ir.Graph, sites: Container[str]) -> None:
    """Write Gemm weights as (in, out), the form in which runtimes fuse int4 weights."""
    for node in graph:
        if node.op_type != "Gemm" or (node.name or "") not in sites:
            continue
        array = constant_array(node.inputs[1])
        if array is None or not node.attributes.get_int("transB", 0):
            continue
        name = node.inputs[1].name if node.inputs[1] is not None else None
        replace_constant(graph, node, 1, np.ascontiguousarray(array.T), name or f"{node.name}.w")
        node.attributes["transB"] = ir.AttrInt64("transB", 0)
