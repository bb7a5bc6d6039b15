"""Weights stored in 4 bits and computed with in float.

A linear layer is written as MatMulNBits, ONNX Runtime's own operator, which OpenVINO reads too:
both read the packed weights as they multiply. (From a DequantizeLinear ONNX Runtime makes it only
where no activation follows.) Before a convolution a DequantizeLinear expands the weights in every
run, so that there only the file gets smaller.
"""

from __future__ import annotations

from collections.abc import Container

import numpy as np
import onnx_ir as ir

from compress.graph import weight_input
from compress.rewrites import constant_array, new_constant, replace_constant, replace_node
from quant.quantizer import quantize
from quant.spec import QParams, QuantSpec
from quant.widths import SiteFormat

_DOMAIN = "com.microsoft"
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


def has_groups(node: ir.Node, group: int) -> bool:
    """Whether a linear layer's input features can be stored in groups of this size."""
    array = constant_array(node.inputs[1]) if len(node.inputs) > 1 else None
    if node.op_type not in ("MatMul", "Gemm") or array is None or array.ndim != 2:
        return False
    return bool(array.shape[node.attributes.get_int("transB", 0)] % group == 0)


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


def write_product(graph: ir.Graph, node: ir.Node, params: QParams) -> None:
    """Replace a MatMul or Gemm with weights (K, N) by MatMulNBits and an Add for the bias.

    It wants unsigned numbers with zero point 8, two in a byte, the groups of each output together:
    (N, K / group, group / 2), and scales (N, K / group).
    """
    source, weight = node.inputs[0], node.inputs[1]
    array = constant_array(weight)
    if source is None or weight is None or array is None or params.spec.group is None:
        return
    group, (features, outputs) = params.spec.group, array.shape
    numbers = (quantize(array, params).T + 8).astype(np.uint8).reshape(outputs, -1, group)
    packed = numbers[..., 0::2] | (numbers[..., 1::2] << 4)
    operands = [
        source,
        new_constant(graph, packed, f"{weight.name}_int4"),
        new_constant(graph, np.ascontiguousarray(params.scale.T), f"{weight.name}/scale"),
    ]
    attributes = {"K": features, "N": outputs, "bits": 4, "block_size": group}
    product = ir.node("MatMulNBits", operands, attributes, domain=_DOMAIN, name=node.name)
    new = [product]
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if bias is not None:
        middle, out = product.outputs[0], node.outputs[0]
        middle.name, middle.shape, middle.type = f"{out.name}/product", out.shape, out.type
        new.append(ir.node("Add", [middle, bias], name=f"{node.name}/Add"))
    replace_node(graph, node, new)
    graph.opset_imports.setdefault(_DOMAIN, 1)
