"""Arithmetic on sizes in an ONNX graph: what Shape says, and what is computed from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, TypeProto, numpy_helper

_MOST_NUMBERS = 64
"""Larger tensors hold no sizes."""
_INTEGERS = (TensorProto.INT64, TensorProto.INT32, TensorProto.BOOL)


def shape_of(value: TypeProto) -> Sequence[Any]:
    """The sizes of a tensor as ONNX stores them; none where it has no shape or is no tensor."""
    sizes: Sequence[Any] = value.tensor_type.shape.dim
    return sizes


def value_of(
    node: onnx.NodeProto,
    types: Mapping[str, TypeProto],
    data: Mapping[str, TensorProto],
    opset: int,
) -> dict[str, TensorProto]:
    """The outputs of a node that computes sizes, where its operands are known; else none.

    Args:
        node: of a graph.
        types: of its operands.
        data: values that are known.
        opset: of the graph.
    """
    if node.op_type == "Shape" and not node.domain:
        sizes = shape_of(types[node.input[0]]) if node.input[0] in types else ()
        if not sizes or not all(one.HasField("dim_value") for one in sizes):
            return {}
        given = {one.name: one.i for one in node.attribute}
        part = slice(given.get("start", 0), given.get("end", len(sizes)))
        shape = np.array([one.dim_value for one in sizes], np.int64)[part]
        return {node.output[0]: numpy_helper.from_array(shape, node.output[0])}
    operands = [data.get(name) for name in node.input if name]
    if node.domain or not operands or not all(map(_holds_sizes, operands)):
        return {}
    return _computed(node, {one.name: numpy_helper.to_array(one) for one in operands if one}, opset)


def _holds_sizes(one: TensorProto | None) -> bool:
    return (
        one is not None
        and one.data_type in _INTEGERS
        and one.data_location != TensorProto.EXTERNAL
        and np.prod(one.dims) <= _MOST_NUMBERS
    )


def _computed(
    node: onnx.NodeProto, operands: Mapping[str, np.ndarray], opset: int
) -> dict[str, TensorProto]:
    from onnx.reference import ReferenceEvaluator

    outputs = [onnx.ValueInfoProto(name=name) for name in node.output if name]
    inputs = [onnx.ValueInfoProto(name=name) for name in operands]
    graph = onnx.helper.make_graph([node], "sizes", inputs, outputs)
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opset)])
    try:
        results = ReferenceEvaluator(model).run(None, dict(operands))
    except Exception:
        # Whatever it does not know, or cannot compute, is a size that is not known beforehand.
        return {}
    arrays = zip((one.name for one in outputs), map(np.asarray, results), strict=True)
    return {n: numpy_helper.from_array(a, n) for n, a in arrays if a.size <= _MOST_NUMBERS}
