"""FoldPad, DepthwiseForm, LinearAsGemm: the same numbers from fewer or faster operators."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import numpy_helper

from compress.depthwise import DepthwiseForm
from compress.fold_pad import FoldPad
from compress.linear import LinearAsGemm
from compress.loading import load
from compress.model import Model
from compress.passes import Context, Pass
from compress.reference import reference_session, run
from compress.testing import PassContract, tiny_model
from targets.cpu import CPU
from targets.executorch import ExecuTorch

TARGET = CPU(threads=1)


def build(body: str, **weights: np.ndarray) -> Model:
    """A model of one input x (N, 4, 9, 9) and one output y."""
    proto = onnx.parser.parse_model(f"""<ir_version: 10, opset_import: ["" : 21]>
    g (float[batch,4,9,9] x) => (float[batch,c,h,w] y) {{{body}}}""")
    constants = [numpy_helper.from_array(array, name) for name, array in weights.items()]
    proto.graph.initializer.extend(constants)
    return load(onnx.shape_inference.infer_shapes(proto))


def outputs(model: Model) -> np.ndarray:
    return run(reference_session(model.graph_model), model.example(2))["y"]


def apply(step: Pass, model: Model) -> tuple[Model, np.ndarray, np.ndarray]:
    before = outputs(model)
    after = step.apply(model, Context(target=TARGET, original=model))
    return after, before, outputs(after)


def operators(model: Model) -> Counter[str]:
    return Counter(node.op_type for node in model.graph_model.graph)


class TestFoldPad(PassContract):
    """The contract, on a network without padding to fold."""

    step = FoldPad()
    target = TARGET


class TestDepthwiseForm(PassContract):
    """The contract, on a network whose BatchNorms all could be folded but are not yet."""

    step = DepthwiseForm()
    target = TARGET


@settings(max_examples=15)
@given(
    pads=st.lists(st.integers(0, 3), min_size=4, max_size=4),
    own=st.lists(st.integers(0, 2), min_size=4, max_size=4),
    stride=st.integers(1, 2),
    groups=st.sampled_from([1, 2, 4]),
)
def test_folded_padding_gives_the_same_sums(
    pads: list[int], own: list[int], stride: int, groups: int
) -> None:
    rng = np.random.default_rng(0)
    begins, ends = [0, 0, *pads[:2]], [0, 0, *pads[2:]]
    model = build(
        f"""p = Pad(x, amounts)
        y = Conv <pads: ints = {own}, strides: ints = [{stride}, {stride}], group: int = {groups}>
            (p, w)""",
        amounts=np.array([*begins, *ends], np.int64),
        w=rng.standard_normal((8, 4 // groups, 3, 3)).astype(np.float32),
    )
    after, before, now = apply(FoldPad(), model)
    assert operators(after) == {"Conv": 1}
    np.testing.assert_allclose(now, before, atol=1e-5)


@pytest.mark.parametrize(
    ("body", "value"),
    [
        pytest.param("p = Pad(x, a, v) y = Conv(p, w)", 1.0, id="filled-with-ones"),
        pytest.param('p = Pad <mode = "edge"> (x, a) y = Conv(p, w)', 0.0, id="edge-mode"),
        pytest.param("p = Pad(x, a) c = Conv(p, w) m = Abs(p) y = Max(c, m)", 0.0, id="two-users"),
        pytest.param("p = Pad(x, a) y = Abs(p)", 0.0, id="no-convolution"),
    ],
)
def test_padding_that_must_stay(body: str, value: float) -> None:
    model = build(
        body,
        a=np.array([0, 0, 1, 1, 0, 0, 1, 1], np.int64),
        v=np.array(value, np.float32),
        w=np.ones((4, 4, 1, 1), np.float32),
    )
    after, before, now = apply(FoldPad(), model)
    assert operators(after)["Pad"] == 1
    np.testing.assert_array_equal(now, before)


def test_batchnorm_becomes_a_depthwise_convolution() -> None:
    rng = np.random.default_rng(1)
    gamma, beta, mean = (rng.standard_normal(4).astype(np.float32) for _ in range(3))
    var = rng.uniform(0.1, 2, 4).astype(np.float32)
    model = build(
        "a = Relu(x) y = BatchNormalization <epsilon: float = 0.01> (a, g, b, m, v)",
        g=gamma,
        b=beta,
        m=mean,
        v=var,
    )
    after, before, now = apply(DepthwiseForm(), model)
    assert operators(after) == {"Relu": 1, "Conv": 1}
    weight = after.graph_model.graph.initializers["BatchNormalization.weight"].const_value
    assert weight is not None
    expected = gamma.astype(np.float64) / np.sqrt(var.astype(np.float64) + np.float32(0.01))
    np.testing.assert_allclose(weight.numpy().ravel(), expected, rtol=1e-6)
    np.testing.assert_allclose(now, before, atol=1e-5)


@settings(max_examples=15)
@given(
    kernel=st.integers(1, 4),
    stride=st.integers(1, 3),
    pad=st.integers(0, 1),
    counted=st.integers(0, 1),
)
def test_average_pooling_becomes_a_convolution_where_padding_counts(
    kernel: int, stride: int, pad: int, counted: int
) -> None:
    pad = min(pad, kernel - 1)
    model = build(
        f"""y = AveragePool <kernel_shape: ints = [{kernel}, {kernel}],
            strides: ints = [{stride}, {stride}], pads: ints = [{pad}, {pad}, {pad}, {pad}],
            count_include_pad: int = {counted}> (x)"""
    )
    after, before, now = apply(DepthwiseForm(), model)
    # An average that leaves padding out divides by fewer values at the border.
    expected = "AveragePool" if pad and not counted else "Conv"
    assert operators(after) == {expected: 1}
    np.testing.assert_allclose(now, before, atol=1e-5)


def test_a_pool_stays_where_the_target_averages_faster() -> None:
    model = build("y = AveragePool <kernel_shape: ints = [3, 3]> (x)")
    after = DepthwiseForm().apply(model, Context(target=ExecuTorch(threads=1), original=model))
    assert operators(after) == {"AveragePool": 1}


def test_the_tiny_networks_batchnorms_are_rewritten_when_nothing_folds_them() -> None:
    model = TestDepthwiseForm().model()
    after = DepthwiseForm().apply(model, Context(target=TARGET, original=tiny_model()))
    assert after.history[-1].details["rewritten"] == 3
    assert "BatchNormalization" not in operators(after)


class TestLinearAsGemm(PassContract):
    """The contract, on a network without linear layers on tokens."""

    step = LinearAsGemm()
    target = TARGET


def tokens(body: str, shape: str = "batch,4,9,9") -> Model:
    """Input x, weight w (9, 5), biases b (5,), c (1, 1, 5) and r (9, 1), output y."""
    proto = onnx.parser.parse_model(f"""<ir_version: 10, opset_import: ["" : 21]>
    g (float[{shape}] x) => (float y) {{{body}}}""")
    rng = np.random.default_rng(2)
    shapes = {"w": (9, 5), "b": (5,), "c": (1, 1, 5), "r": (9, 1)}
    for name, size in shapes.items():
        if f"{name})" in body or f"({name}," in body:
            array = rng.standard_normal(size).astype(np.float32)
            proto.graph.initializer.append(numpy_helper.from_array(array, name))
    return load(onnx.shape_inference.infer_shapes(proto))


@pytest.mark.parametrize("shape", ["batch,4,9,9", "batch,3,9", "2,3,9"])
@pytest.mark.parametrize("addition", ["Add(m, b)", "Add(b, m)", "Add(m, c)"])
def test_a_linear_layer_on_tokens_becomes_gemm(shape: str, addition: str) -> None:
    after, before, now = apply(
        LinearAsGemm(), tokens(f"[fc] m = MatMul(x, w) [add] y = {addition}", shape)
    )
    assert operators(after) == {"Reshape": 2, "Gemm": 1}
    assert "fc" in {node.name for node in after.graph_model.graph if node.op_type == "Gemm"}
    assert after.graph_model.graph.outputs[0].name == "y"
    np.testing.assert_allclose(now, before, atol=1e-5)


@pytest.mark.parametrize(
    "body",
    [
        pytest.param("m = MatMul(x, w) y = Add(m, r)", id="bias-of-rows"),
        pytest.param("m = MatMul(x, w) a = Add(m, b) y = Mul(a, m)", id="two-readers"),
        pytest.param("m = MatMul(x, w) y = Mul(m, b)", id="no-addition"),
        pytest.param("m = MatMul(x, x) y = Add(m, m)", id="two-activations"),
    ],
)
def test_other_products_stay(body: str) -> None:
    model = tokens(body)
    count = operators(model)
    after, before, now = apply(LinearAsGemm(), model)
    assert operators(after) == count
    np.testing.assert_array_equal(now, before)
