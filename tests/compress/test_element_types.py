from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from compress.element_types import element_types
from compress.model import Model
from compress.testing import tiny_exported


def by_name(model: Model) -> dict[str, str]:
    found = element_types(model.graph_model.graph)
    return {value.name or "": dtype.name for value, dtype in found.items()}


def test_types_agree_with_what_the_exporter_wrote_down() -> None:
    graph = tiny_exported(21).graph_model.graph
    found = element_types(graph)
    for node in graph:
        for out in node.outputs:
            assert out.dtype is None or found[out] == out.dtype


def test_operators_that_decide_a_type(onnx_model: Callable[..., Model]) -> None:
    model = onnx_model(
        """g (float[2,4] x) => (float[2,4] y) {[c] h = Cast<to=10>(x) [g] b = Greater(x, x)
        [s] s = Shape(x) [w] w = Where(b, h, h) [t] v, i = TopK(h, k) [l] l = CastLike(x, s)
        [f] f = ConstantOfShape<value = int32[1] {7}>(s) [o] z = ConstantOfShape(s)
        [q] q = QuantizeLinear(x, scale, zero) [d] y = DequantizeLinear(q, scale, zero)}""",
        k=np.int64([2]), scale=np.float32(0.1), zero=np.int8(0), infer=False,
    )  # fmt: skip
    expected = {
        "h": "FLOAT16", "b": "BOOL", "s": "INT64", "w": "FLOAT16", "v": "FLOAT16", "i": "INT64",
        "l": "INT64", "f": "INT32", "z": "FLOAT", "q": "INT8", "y": "FLOAT",
    }  # fmt: skip
    found = by_name(model)
    assert {name: found[name] for name in expected} == expected


def test_a_missing_zero_point_means_uint8(onnx_model: Callable[..., Model]) -> None:
    model = onnx_model(
        "g (float[2] x) => (float[2] y) {q = QuantizeLinear(x, s) y = DequantizeLinear(q, s)}",
        s=np.float32(0.1), infer=False,
    )  # fmt: skip
    assert by_name(model)["q"] == "UINT8"


def test_what_cannot_be_told_is_left_out(onnx_model: Callable[..., Model]) -> None:
    model = onnx_model("g (float[2] x) => (float[2] y) {a = Relu(x) y = Neg(a)}", infer=False)
    graph = model.graph_model.graph
    graph.inputs[0].type = None
    found = element_types(graph)
    assert graph[0].outputs[0] not in found
    assert found[graph.outputs[0]] == ir.DataType.FLOAT
