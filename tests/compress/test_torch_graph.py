from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx import helper

from compress.errors import UnsupportedError
from compress.reference import reference_session, run
from compress.testing import tiny_exported
from compress.torch_graph.network import Network, to_torch
from compress.torch_graph.operators import OPERATORS

RNG = np.random.default_rng(0)


def floats(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def ints(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


IMAGE, TOKENS = floats(2, 4, 9, 9), floats(2, 5, 8)
CASES: list[tuple[str, list[np.ndarray | None], dict[str, Any]]] = [
    ("Conv", [IMAGE, floats(6, 2, 3, 3), floats(6)], {"group": 2, "pads": [1, 0, 2, 1]}),
    ("Conv", [IMAGE, floats(6, 4, 3, 3)], {"auto_pad": "SAME_UPPER", "strides": [2, 2]}),
    ("Conv", [IMAGE, floats(6, 4, 3, 3)], {"auto_pad": "SAME_LOWER", "strides": [2, 2]}),
    ("Conv", [floats(2, 4, 9), floats(3, 4, 3)], {"dilations": [2], "auto_pad": "VALID"}),
    ("ConvTranspose", [IMAGE, floats(4, 3, 3, 3), floats(6)], {"group": 2, "strides": [2, 2]}),
    ("Gemm", [floats(3, 4), floats(5, 4), floats(5)], {"transB": 1}),
    ("Gemm", [floats(4, 3), floats(4, 5), floats(1, 5)], {"transA": 1, "alpha": 0.5, "beta": 2.0}),
    ("MatMul", [TOKENS, floats(8, 3)], {}),
    (
        "BatchNormalization",
        [IMAGE, floats(4), floats(4), floats(4), np.abs(floats(4))],
        {"epsilon": 1e-3},
    ),
    ("LayerNormalization", [TOKENS, floats(8), floats(8)], {"axis": -1}),
    ("InstanceNormalization", [IMAGE, floats(4), floats(4)], {}),
    ("GroupNormalization", [IMAGE, floats(4), floats(4)], {"num_groups": 2}),
    ("LRN", [IMAGE], {"size": 3}),
    ("Clip", [IMAGE, np.float32(-0.5), np.float32(0.7)], {}),
    ("Clip", [IMAGE, None, np.float32(0.7)], {}),
    ("LeakyRelu", [IMAGE], {"alpha": 0.2}),
    ("PRelu", [IMAGE, floats(4, 1, 1)], {}),
    ("Elu", [IMAGE], {}),
    ("HardSigmoid", [IMAGE], {"alpha": 1 / 6}),
    ("HardSwish", [IMAGE], {}),
    ("Gelu", [IMAGE], {}),
    ("Gelu", [IMAGE], {"approximate": "tanh"}),
    ("Softmax", [TOKENS], {"axis": 1}),
    ("LogSoftmax", [TOKENS], {}),
    ("Div", [ints(7, -7, 9), ints(2, 2, -4)], {}),
    ("Div", [TOKENS, floats(8)], {}),
    ("Mod", [ints(7, -7, 9), ints(2, 3, 4)], {}),
    ("Min", [TOKENS, floats(8), floats(1)], {}),
    ("Max", [TOKENS, floats(8)], {}),
    ("ReduceMean", [TOKENS, ints(1, 2)], {"keepdims": 0}),
    ("ReduceSum", [TOKENS], {}),
    ("ReduceMax", [TOKENS, ints(-1)], {}),
    ("ReduceMin", [TOKENS, ints(-1)], {"keepdims": 0}),
    ("ReduceL2", [TOKENS, ints(-1)], {}),
    ("GlobalAveragePool", [IMAGE], {}),
    ("GlobalMaxPool", [IMAGE], {}),
    ("MaxPool", [IMAGE], {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [0, 0, 1, 1]}),
    ("MaxPool", [IMAGE], {"kernel_shape": [2, 2], "strides": [2, 2], "ceil_mode": 1}),
    ("AveragePool", [IMAGE], {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]}),
    (
        "AveragePool",
        [IMAGE],
        {"kernel_shape": [3, 3], "pads": [1, 1, 0, 0], "count_include_pad": 1},
    ),
    ("Concat", [IMAGE, floats(2, 1, 9, 9)], {"axis": 1}),
    ("Split", [TOKENS, ints(2, 6)], {"axis": 2}),
    ("Split", [TOKENS], {"axis": 2, "num_outputs": 2}),
    ("Slice", [TOKENS, ints(1), ints(1000), ints(1)], {}),
    ("Slice", [TOKENS, ints(-1), ints(-100), ints(2), ints(-2)], {}),
    ("Gather", [TOKENS, ints(2, -1)], {"axis": 1}),
    ("Gather", [TOKENS, np.array([[0, 1], [3, 4]])], {"axis": 1}),
    ("Reshape", [TOKENS, ints(0, -1, 4)], {}),
    ("Flatten", [TOKENS], {"axis": 2}),
    ("Flatten", [TOKENS], {"axis": -1}),
    ("Transpose", [TOKENS], {"perm": [0, 2, 1]}),
    ("Transpose", [TOKENS], {}),
    ("Squeeze", [floats(2, 1, 3), ints(1)], {}),
    ("Unsqueeze", [TOKENS, ints(0, -1)], {}),
    ("Expand", [floats(1, 5, 1), ints(2, 1, 8)], {}),
    ("Tile", [floats(2, 3), ints(2, 2)], {}),
    ("Shape", [TOKENS], {"start": 1}),
    ("Cast", [TOKENS], {"to": int(onnx.TensorProto.INT32)}),
    ("ConstantOfShape", [ints(2, 3)], {}),
    ("Range", [np.int64(1), np.int64(9), np.int64(3)], {}),
    ("Pad", [IMAGE, ints(0, 0, 1, 2, 0, 1, 0, 0), np.float32(3)], {}),
    ("Pad", [IMAGE, ints(0, 0, 1, 2, 0, 0, 3, 0)], {"mode": "reflect"}),
    ("Pad", [IMAGE, ints(1, 2), None, ints(3)], {"mode": "edge"}),
    (
        "Resize",
        [IMAGE, None, np.array([1, 1, 2, 2], np.float32)],
        {
            "mode": "nearest",
            "coordinate_transformation_mode": "asymmetric",
            "nearest_mode": "floor",
        },
    ),
    (
        "Resize",
        [IMAGE, None, None, ints(2, 4, 13, 20)],
        {"mode": "linear", "coordinate_transformation_mode": "half_pixel"},
    ),
    (
        "Resize",
        [IMAGE, None, None, ints(2, 4, 13, 20)],
        {"mode": "linear", "coordinate_transformation_mode": "align_corners"},
    ),
    ("DepthToSpace", [floats(1, 8, 3, 3)], {"blocksize": 2}),
    ("DepthToSpace", [floats(1, 8, 3, 3)], {"blocksize": 2, "mode": "CRD"}),
    ("ScatterND", [floats(4, 3), np.array([[0], [2]]), floats(2, 3)], {}),
    ("Einsum", [floats(2, 3, 4), floats(2, 4, 5)], {"equation": "bij,bjk->bik"}),
    ("Where", [np.array([True, False]), floats(3, 2), floats(3, 2)], {}),
    ("Softplus", [IMAGE], {}),
    ("Mish", [IMAGE], {}),
    ("Erf", [IMAGE], {}),
    ("Pow", [np.abs(IMAGE), np.float32(1.5)], {}),
    ("Dropout", [IMAGE], {}),
]


def one_node(op: str, inputs: list[np.ndarray | None], attributes: dict[str, Any]) -> ir.Model:
    """The operator alone; its first input is the graph's, the others are initializers."""
    names = [f"i{index}" if array is not None else "" for index, array in enumerate(inputs)]
    outputs = ["y", "y2"] if op == "Split" else ["y"]
    node = helper.make_node(op, names, outputs, **attributes)
    first = helper.make_tensor_value_info("i0", helper.np_dtype_to_tensor_dtype(
        np.asarray(inputs[0]).dtype), np.shape(inputs[0]))  # fmt: skip
    constants = [
        onnx.numpy_helper.from_array(np.asarray(array), name)
        for name, array in list(zip(names, inputs, strict=True))[1:]
        if array is not None
    ]
    graph = helper.make_graph(
        [node], "one", [first], [helper.make_empty_tensor_value_info(n) for n in outputs], constants
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    return ir.from_proto(onnx.shape_inference.infer_shapes(proto))


@pytest.mark.parametrize(
    ("op", "inputs", "attributes"), CASES, ids=[f"{i}-{case[0]}" for i, case in enumerate(CASES)]
)
def test_an_operator_computes_what_onnx_runtime_computes(
    op: str, inputs: list[np.ndarray | None], attributes: dict[str, Any]
) -> None:
    model = one_node(op, inputs, attributes)
    feed = {"i0": np.asarray(inputs[0])}
    expected = run(reference_session(model), feed)
    got = Network(model).run(to_torch(feed))
    for name, array in expected.items():
        assert got[name].shape == array.shape
        np.testing.assert_allclose(got[name].numpy(), array, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("op", ["Relu", "Sigmoid", "Tanh", "Sqrt", "Abs", "Neg", "Exp", "Round"])
def test_a_function_of_one_tensor_computes_what_onnx_runtime_computes(op: str) -> None:
    feed = {"i0": np.abs(IMAGE) if op == "Sqrt" else 2 * IMAGE}
    model = one_node(op, [feed["i0"]], {})
    expected = run(reference_session(model), feed)["y"]
    np.testing.assert_allclose(Network(model).run(to_torch(feed))["y"], expected, 2e-5, 1e-6)


def test_a_network_computes_the_graph_and_keeps_what_is_asked_for() -> None:
    model = tiny_exported(21)
    inputs = model.example()
    expected = run(reference_session(model.graph_model), inputs)
    network = Network(model.graph_model)
    middle = network.steps[3].outputs[0]
    got = network.run(to_torch(inputs), keep=[middle])
    assert set(got) == {*expected, middle}
    for name, array in expected.items():
        np.testing.assert_allclose(got[name], array, rtol=1e-5, atol=1e-6)


def test_gradients_reach_every_weight() -> None:
    model = tiny_exported(21)
    network = Network(model.graph_model)
    weights = {n: t.clone().requires_grad_() for n, t in network.constants.items() if t.ndim > 1}
    network.constants |= weights
    outputs = network.run(to_torch(model.example()))
    outputs[network.outputs[0]].square().sum().backward()
    assert weights
    assert all(float(w.grad.abs().sum()) > 0 for w in weights.values() if w.grad is not None)
    assert all(w.grad is not None for w in weights.values())


def test_an_operator_without_a_counterpart_is_named() -> None:
    assert "NonZero" not in OPERATORS
    with pytest.raises(UnsupportedError, match="NonZero"):
        Network(one_node("NonZero", [IMAGE], {}))


def test_values_are_released_behind_their_last_reader() -> None:
    network = Network(tiny_exported(21).graph_model)
    values = {network.inputs[0]: torch.randn(1, 3, 16, 16)}
    for index in range(len(network.steps)):
        network.advance(index, values)
        network.release(values, index, network.outputs)
        assert len(values) <= 3
    assert set(values) == set(network.outputs)
