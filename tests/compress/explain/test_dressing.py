from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from compress.explaining.dressing import dressing
from compress.loading import load
from compress.model import Model
from targets.onnxruntime import OnnxRuntime

C = 8


@dataclass(frozen=True)
class Planted:
    """A dressed convolution with one thing in the way.

    Attributes:
        kind: of the obstacle; "" where ONNX Runtime fuses it.
        text: part of the reason.
        scales: of the input: 1, or one for each channel.
        written: of the output: the same.
        between: operators between the convolution and its QuantizeLinear.
        before: an operator between the input's DequantizeLinear and the convolution.
        second_reader: a Sigmoid reads the result in float.
        leaves: the result is an output of the model.
        quantized: a QuantizeLinear stands behind.
        weight: the weight is dressed.
        bias: "int32", "float" or "".
    """

    kind: str = ""
    text: str = ""
    scales: int = 1
    written: int = 1
    between: tuple[str, ...] = ()
    before: str = ""
    second_reader: bool = False
    leaves: bool = False
    quantized: bool = True
    weight: bool = True
    bias: str = "int32"


CASES = {
    "nothing": Planted(),
    "float bias": Planted(bias="float"),
    "no bias": Planted(bias=""),
    "relu": Planted(between=("Relu",)),
    "scale per channel": Planted("scale per channel", "has 8 values", scales=C),
    "relu and scales": Planted(
        "Relu before a scale per channel", "with 8 scales", between=("Relu",), written=C
    ),
    "clip": Planted("Clip between", "Clip stands between it", between=("Clip",)),
    "norm": Planted("BatchNormalization between", "between", between=("BatchNormalization",)),
    "norm and relu": Planted(
        "BatchNormalization and Relu between", "stand", between=("BatchNormalization", "Relu")
    ),
    "sigmoid": Planted("Sigmoid between", "Sigmoid stands", between=("Sigmoid",)),
    "two readers": Planted("read in float", "also read in float, by Sigmoid", second_reader=True),
    "output": Planted("model output", "leaves the model in float", leaves=True),
    "no weight": Planted("float weight", "its weight is not quantized", weight=False),
    "pad": Planted(before="Pad"),
    "two obstacles": Planted(
        "scale per channel and Sigmoid between", ", and Sigmoid stands", scales=C,
        between=("Sigmoid",),
    ),
}  # fmt: skip


def planted(case: Planted) -> Model:
    rng = np.random.default_rng(0)
    constants: list[Any] = []
    nodes: list[Any] = []

    def constant(name: str, values: Any) -> str:
        constants.append(numpy_helper.from_array(np.asarray(values), name))
        return name

    def node(op: str, inputs: list[str], output: str, **attributes: Any) -> str:
        nodes.append(helper.make_node(op, inputs, [output], name=output, **attributes))
        return output

    def pair(source: str, name: str, scale: Any) -> str:
        zero = np.zeros(np.shape(scale), np.uint8)
        params = [constant(f"{name}_s", scale), constant(f"{name}_z", zero)]
        node("QuantizeLinear", [source, *params], f"{name}_q", axis=1)
        return node("DequantizeLinear", [f"{name}_q", *params], f"{name}_dq", axis=1)

    step = np.float32(0.05)
    x = pair("x", "in", np.full(C, step) if case.scales > 1 else step)
    if case.before == "Pad":
        x = node("Pad", [x, constant("pads", [0, 0, 1, 1, 0, 0, 1, 1])], "pad")
    if case.weight:
        constant("w", rng.integers(-127, 127, (C, C, 3, 3)).astype(np.int8))
        weight = [constant("w_s", np.full(C, 0.01, np.float32)), constant("w_z", np.zeros(C, "i1"))]
        w = node("DequantizeLinear", ["w", *weight], "w_dq", axis=0)
    else:
        w = constant("w", rng.normal(size=(C, C, 3, 3)).astype(np.float32))
    inputs = [x, w]
    if case.bias == "int32":
        constant("b", rng.integers(-9, 9, C).astype(np.int32))
        scale = constant("b_s", np.full(C, 0.05 * 0.01, np.float32))
        inputs.append(node("DequantizeLinear", ["b", scale], "b_dq", axis=0))
    elif case.bias == "float":
        inputs.append(constant("b", rng.normal(size=C).astype(np.float32)))
    y = node("Conv", inputs, "conv", pads=[1, 1, 1, 1])
    outputs = []
    if case.second_reader:
        outputs.append(node("Sigmoid", [y], "sigmoid"))
    if case.leaves:
        outputs.append(y)
    for op in case.between:
        more = {
            "BatchNormalization": [
                constant(f"bn{i}", np.full(C, 1.5, np.float32))
                for i in range(4 if op == "BatchNormalization" else 0)
            ],
            "Clip": [
                constant(name, np.float32(value))
                for name, value in (("low", 0), ("high", 6))
                if op == "Clip"
            ],
        }.get(op, [])  # fmt: skip
        y = node(op, [y, *more], op.lower())
    last = np.full(C, step) if case.written > 1 else step
    outputs.append(pair(y, "out", last) if case.quantized else y)
    size = 10 if case.before == "Pad" else 8
    shapes = [
        helper.make_tensor_value_info(o, TensorProto.FLOAT, [1, C, size, size]) for o in outputs
    ]
    graph = helper.make_graph(
        nodes,
        "planted",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, C, 8, 8])],
        shapes,
        constants,
    )
    opset = [helper.make_opsetid("", 21)]
    model = helper.make_model(graph, opset_imports=opset, ir_version=10)
    onnx.checker.check_model(model)
    return load(model)


@pytest.mark.parametrize("name", CASES)
def test_obstacles_are_those_that_keep_onnxruntime_from_fusing(name: str) -> None:
    case = CASES[name]
    target = OnnxRuntime(threads=1)
    model = planted(case)
    kernels = target.build(model).kernels()
    fused = any(kernel.op_type == "QLinearConv" for kernel in kernels)
    assert fused == (case.kind == "")
    found = dressing(model.graph_model, target.capabilities)
    assert found.dressed == {"conv"}
    if case.kind:
        assert found.obstacles["conv"].kind == case.kind
        assert case.text in found.obstacles["conv"].text
        assert found.obstacles["conv"].advice
    else:
        assert found.obstacles == {}


GEMM = """g (float[4,2,8] x) => (float[4,8] y) {{
    q = QuantizeLinear(x, xs, xz)
    d = DequantizeLinear(q, xs, xz)
    f = {before}
    v = DequantizeLinear<axis=0>(w, ws, wz)
    c = DequantizeLinear<axis=0>(b, bs)
    {result} = Gemm<transB=1>(f, v, {bias})
    {behind}
}}"""


@pytest.mark.parametrize("before", ["Reshape(d, shape)", "Flatten(d)"])
@pytest.mark.parametrize("bias", ["c", "fb"])
@pytest.mark.parametrize("quantized", [True, False])
def test_obstacles_of_a_linear_layer(
    onnx_model: Any, before: str, bias: str, quantized: bool
) -> None:
    behind = "r = QuantizeLinear(o, xs, xz) y = DequantizeLinear(r, xs, xz)" if quantized else ""
    text = GEMM.format(before=before, bias=bias, behind=behind, result="o" if quantized else "y")
    step = np.full(8, 0.01, np.float32)
    model = onnx_model(
        text, infer=False, shape=np.array([4, 16]), xs=np.float32(0.05), xz=np.uint8(0),
        w=np.ones((8, 16), np.int8), ws=step, wz=np.zeros(8, np.int8),
        b=np.ones(8, np.int32), bs=step, fb=np.ones(8, np.float32),
    )  # fmt: skip
    target = OnnxRuntime(threads=1)
    fused = any(kernel.op_type == "QGemm" for kernel in target.build(model).kernels())
    found = dressing(model.graph_model, target.capabilities)
    assert fused == (not found.obstacles)
    kinds = [one.kind for one in found.obstacles.values()]
    flat, plain = before.startswith("Flatten"), bias == "fb" and not quantized
    expected = " and ".join(["Flatten before"] * flat + ["float bias"] * plain)
    assert kinds == ([expected] if expected else [])


def test_conversions_know_what_they_lie_between() -> None:
    found = dressing(planted(CASES["norm"]).graph_model, OnnxRuntime().capabilities)
    assert found.ends["in_q"] == (("",), ("conv",))
    assert found.ends["in_dq"] == (("",), ("conv",))
    assert found.ends["w_dq"] == ((), ("conv",))
    assert found.ends["out_q"] == (("batchnormalization",), ("",))
    assert found.chains == {"batchnormalization": "conv"}


def test_a_conversion_that_serves_a_shape_alone(onnx_model: Any) -> None:
    model = onnx_model(
        """g (float[2,3,4,4] x) => (int64[4] y, float[2,3,4,4] z) {
            q = QuantizeLinear(x, s, zp)
            d = DequantizeLinear(q, s, zp)
            y = Shape(d)
            e = DequantizeLinear(q, s, zp)
            z = Relu(e)
        }""",
        s=np.float32(0.1), zp=np.uint8(0),
    )  # fmt: skip
    found = dressing(model.graph_model, OnnxRuntime().capabilities)
    nodes = {out.name: node.name for node in model.graph_model.graph for out in node.outputs}
    assert found.shape_only == {nodes["d"]}
