"""ShuffleInConvolution and ChannelsFirst: the same numbers without moving activations."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.channels_first import ChannelsFirst
from compress.data import load_data
from compress.model import Model, Step
from compress.passes import Context, Pass
from compress.reference import reference_session, run
from compress.rewrites import STATISTICS, listed, output_statistics
from compress.shuffle import ShuffleInConvolution
from compress.testing import PassContract
from compress.torch_graph.network import Network, to_torch
from quant.ptq import Quantize
from targets.onnxruntime import OnnxRuntime
from targets.openvino import OpenVINO

TARGET = OpenVINO(threads=1)
"""Its facts ask for these rewrites; they need no installed OpenVINO."""
Build = Callable[..., Model]


def outputs(model: Model) -> dict[str, np.ndarray]:
    return run(reference_session(model.graph_model), model.example(2))


def apply(step: Pass, model: Model) -> tuple[Model, int]:
    """The rewritten model, after comparing outputs and shapes, and how often it was rewritten."""
    before = outputs(model)
    after = step.apply(model, Context(target=TARGET, original=model))
    now = outputs(after)
    assert list(now) == list(before)
    for name, array in before.items():
        np.testing.assert_allclose(now[name], array, atol=2e-5, rtol=1e-4)
    return after, after.history[-1].details["rewritten"]


def operators(model: Model) -> Counter[str]:
    return Counter(node.op_type for node in model.graph_model.graph)


class TestShuffleInConvolution(PassContract):
    """The contract, on a network without shuffles."""

    step = ShuffleInConvolution()
    target = TARGET


class TestChannelsFirst(PassContract):
    """The contract, on a network without transposes."""

    step = ChannelsFirst()
    target = TARGET


def shuffled(
    build: Build, groups: int, width: int, body: str, shape: str, **weights: object
) -> Model:
    """y = body(s) with s the shuffle of x, whose channels are groups times width."""
    channels = groups * width
    text = f"""g (float[batch,{channels},5,6] x) => (float[batch,{shape}] y) {{
        i = Reshape(x, five) [shuffle] t = Transpose<perm=[0,2,1,3,4]>(i) s = Reshape(t, four)
        {body}}}"""
    five, four = np.int64([-1, groups, width, 5, 6]), np.int64([-1, channels, 5, 6])
    return build(text, five=five, four=four, **weights)


@settings(max_examples=15)
@given(
    groups=st.integers(2, 4),
    width=st.integers(1, 5),
    left=st.integers(1, 3),
    seed=st.integers(0, 99),
)
def test_a_split_behind_a_shuffle(
    onnx_model: Build, groups: int, width: int, left: int, seed: int
) -> None:
    channels = groups * width
    left = min(left, channels - 1)
    rng = np.random.default_rng(seed)
    model = shuffled(
        onnx_model,
        groups,
        width,
        "a, b = Split<axis=1>(s, parts) [dense] c = Conv(b, w) y = Concat<axis=1>(a, c)",
        f"{left + 4},5,6",
        parts=np.int64([left, channels - left]),
        w=rng.standard_normal((4, channels - left, 1, 1)).astype(np.float32),
    )
    after, count = apply(ShuffleInConvolution(), model)
    # One convolution selects what is passed on; the other reads the source itself.
    assert (count, operators(after)) == (1, {"Conv": 2, "Concat": 1})
    dense = next(node for node in after.graph_model.graph if node.name == "dense")
    assert [value.name for value in dense.inputs[:1] if value] == ["x"]


def test_a_depthwise_convolution_keeps_the_order(onnx_model: Build) -> None:
    model = shuffled(
        onnx_model,
        2,
        4,
        """[dw] d = Conv<group=8,pads=[1,1,1,1]>(s, u, b) [one] e = Conv(d, v)
        [two] f = Conv<pads=[1,1,1,1]>(s, w) y = Concat<axis=1>(e, f)""",
        "7,5,6",
        u=(8, 1, 3, 3),
        b=(8,),
        v=(3, 8, 1, 1),
        w=(4, 8, 3, 3),
    )
    # What is known of the channels moves with them.
    means = channel_means(model)
    known = Step("fold", {}, {STATISTICS: listed({"dw": (means, np.arange(8.0))})})
    model = dataclasses.replace(model, history=(*model.history, known))
    after, count = apply(ShuffleInConvolution(), model)
    assert (count, operators(after)) == (1, {"Conv": 3, "Concat": 1})
    mean, deviation = output_statistics(after)["dw"]
    np.testing.assert_allclose(mean, channel_means(after), rtol=1e-4, atol=1e-5)
    assert sorted(deviation) == list(range(8))
    assert not np.allclose(mean, means)


def channel_means(model: Model) -> np.ndarray:
    network = Network(model.graph_model)
    found = network.run(to_torch(model.example(2)), keep=["d"])["d"]
    return found.mean((0, 2, 3)).double().numpy()


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        pytest.param("y = Relu(s)", {"Conv": 1, "Relu": 1}, id="relu"),
        pytest.param("y = Identity(s)", {"Conv": 1, "Identity": 1}, id="identity"),
        pytest.param("y = Add(s, s)", {"Conv": 1, "Add": 1}, id="twice"),
        pytest.param(
            "d = Conv<group=8>(s, u) y = Relu(d)", {"Conv": 2, "Relu": 1}, id="depthwise-then-other"
        ),
        pytest.param("y = Conv<group=4>(s, g)", {"Conv": 2}, id="grouped"),
        pytest.param(
            """a, b = Split<axis=1>(s, h) d = Conv<group=4>(a, q) e = Conv(d, r)
            y = Concat<axis=1>(e, b)""",
            {"Conv": 4, "Concat": 1},
            id="depthwise-on-half",
        ),
    ],
)
def test_what_needs_the_shuffled_tensor_gets_it_from_a_convolution(
    onnx_model: Build, body: str, expected: dict[str, int]
) -> None:
    weights = {
        "u": (8, 1, 1, 1),
        "g": (8, 2, 1, 1),
        "q": (4, 1, 1, 1),
        "r": (4, 4, 1, 1),
        "h": np.int64([4, 4]),
    }
    used = {name: value for name, value in weights.items() if f" {name})" in body}
    after, count = apply(ShuffleInConvolution(), shuffled(onnx_model, 2, 4, body, "8,5,6", **used))
    assert (count, operators(after)) == (1, expected)


def test_an_output_of_the_graph_keeps_its_name(onnx_model: Build) -> None:
    text = """g (float[batch,8,5,6] x) => (float[batch,8,5,6] s, float[batch,8,5,6] y) {
        i = Reshape(x, five) t = Transpose<perm=[0,2,1,3,4]>(i) s = Reshape(t, four)
        y = Conv(s, w)}"""
    five, four = np.int64([-1, 2, 4, 5, 6]), np.int64([-1, 8, 5, 6])
    after, count = apply(
        ShuffleInConvolution(), onnx_model(text, five=five, four=four, w=(8, 8, 1, 1))
    )
    assert (count, operators(after)) == (1, {"Conv": 2})


@pytest.mark.parametrize(
    "body",
    [
        pytest.param("t = Transpose<perm=[0,1,2,4,3]>(i) y = Reshape(t, four)", id="other-axes"),
        pytest.param("t = Transpose<perm=[0,2,1,3,4]>(i) y = Reshape(t, other)", id="other-shape"),
        pytest.param(
            "t = Transpose<perm=[0,2,1,3,4]>(i) r = Relu(t) y = Reshape(r, four)", id="between"
        ),
    ],
)
def test_what_is_no_shuffle_stays(onnx_model: Build, body: str) -> None:
    shapes = {"four": np.int64([-1, 8, 5, 6]), "other": np.int64([-1, 4, 10, 6])}
    used = {name: value for name, value in shapes.items() if name in body}
    text = f"g (float[batch,8,5,6] x) => (float[batch,c,h,w] y) {{i = Reshape(x, five) {body}}}"
    model = onnx_model(text, five=np.int64([-1, 2, 4, 5, 6]), **used)
    count = operators(model)
    after, rewritten = apply(ShuffleInConvolution(), model)
    assert (rewritten, operators(after)) == (0, count)


def test_int8_selects_channels_exactly(onnx_model: Build) -> None:
    pytest.importorskip("openvino")
    model = shuffled(
        onnx_model, 2, 4, "c = Conv(s, w) y = Concat<axis=1>(s, c)", "12,5,6", w=(4, 8, 1, 1)
    )
    inputs = model.example(32, seed=1)
    context = Context(target=TARGET, original=model, calibration=load_data(inputs, model.inputs))
    done = Quantize(method="minmax").apply(ShuffleInConvolution().apply(model, context), context)
    few = {name: array[:2] for name, array in inputs.items()}
    expected = run(reference_session(model.graph_model), few)["y"][:, :8]
    got = TARGET.build(done)(few)["y"][:, :8]
    step = (inputs["x"].max() - inputs["x"].min()) / 255
    # Rounding once on the input's grid, and once on that of the concat.
    assert np.abs(got - expected).max() <= 1.1 * step


BLOCK = """[dw] d = Conv<group=8,pads=[3,3,3,3]>(x, k) [there] t = Transpose<perm=[0,2,3,1]>(d)
    [norm] n = LayerNormalization<axis=-1,epsilon=0.001>(t, gamma, beta)
    [up] m = MatMul(n, u) [ub] a = Add(m, ubias) [gelu] g = Gelu(a)
    [down] o = MatMul(g, v) [vb] p = Add(vbias, o) [back] q = Transpose<perm=[0,3,1,2]>(p)
    [scale] r = Mul(ls, q) [sum] y = Add(r, x)"""
WEIGHTS = {
    "k": (8, 1, 7, 7),
    "gamma": (8,),
    "beta": (8,),
    "u": (8, 32),
    "ubias": (32,),
    "v": (32, 8),
    "vbias": (8,),
    "ls": (8, 1, 1),
}


def block(build: Build, body: str = BLOCK, shape: str = "8,9,7") -> Model:
    text = f"g (float[batch,8,9,7] x) => (float[batch,{shape}] y) {{{body}}}"
    names = {word.strip("(),") for word in body.replace("(", " ").split()}
    return build(text, **{name: value for name, value in WEIGHTS.items() if name in names})


def test_a_convnext_block_has_no_transposes_left(onnx_model: Build) -> None:
    after, count = apply(ChannelsFirst(), block(onnx_model))
    made = operators(after)
    assert (count, made["Transpose"], made["MatMul"], made["Conv"]) == (1, 0, 0, 3)
    # Biases and the scale per channel are in the convolutions; the norm has its own, and epsilon.
    assert (made["Mul"], made["Add"], made["LayerNormalization"]) == (2, 3, 0)
    names = {node.name for node in after.graph_model.graph}
    assert {"dw", "norm", "up", "gelu", "down", "sum"} <= names


def test_every_shape_is_that_of_the_numbers(onnx_model: Build) -> None:
    model = block(onnx_model)
    after = ChannelsFirst().apply(model, Context(target=TARGET, original=model))
    values = [out for node in after.graph_model.graph for out in node.outputs]
    after.graph_model.graph.outputs.extend(v for v in values if not v.is_graph_output())
    numbers = outputs(after)
    for value in values:
        assert value.shape is not None
        assert list(value.shape)[1:] == list(numbers[value.name or ""].shape)[1:], value.name


@pytest.mark.parametrize(
    "middle",
    [
        pytest.param("m = Relu(t)", id="relu"),
        pytest.param("m = LayerNormalization(t, gamma)", id="norm-without-bias"),
        pytest.param("e = Mul(t, gamma) m = Add(beta, e)", id="scale-and-shift"),
        pytest.param("e = MatMul(t, u) f = Sigmoid(e) m = MatMul(f, v)", id="no-bias"),
        pytest.param("e = MatMul(t, u) f = Mul(e, ubias) m = MatMul(f, v)", id="scaled-product"),
    ],
)
def test_other_chains(onnx_model: Build, middle: str) -> None:
    body = f"t = Transpose<perm=[0,2,3,1]>(x) {middle} y = Transpose<perm=[0,3,1,2]>(m)"
    after, count = apply(ChannelsFirst(), block(onnx_model, body))
    assert (count, operators(after)["Transpose"]) == (1, 0)


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(
            "t = Transpose<perm=[0,2,3,1]>(x) m = Softmax(t) y = Transpose<perm=[0,3,1,2]>(m)",
            id="softmax",
        ),
        pytest.param(
            """t = Transpose<perm=[0,2,3,1]>(x) m = Relu(t) n = Transpose<perm=[0,3,1,2]>(m)
            o = Transpose<perm=[0,3,1,2]>(t) y = Add(n, o)""",
            id="two-readers",
        ),
        pytest.param(
            "t = Transpose<perm=[0,3,2,1]>(x) m = Relu(t) y = Transpose<perm=[0,3,2,1]>(m)",
            id="other-axes",
        ),
        pytest.param(
            "t = Transpose<perm=[0,2,3,1]>(x) y = Transpose<perm=[0,3,1,2]>(t)", id="empty"
        ),
        pytest.param(
            """t = Transpose<perm=[0,2,3,1]>(x) m = LayerNormalization<axis=-1>(t, gamma)
            n = Add(m, t) y = Transpose<perm=[0,3,1,2]>(n)""",
            id="residual-inside",
        ),
    ],
)
def test_what_is_no_such_chain_stays(onnx_model: Build, body: str) -> None:
    model = block(onnx_model, body)
    count = operators(model)
    after, rewritten = apply(ChannelsFirst(), model)
    assert (rewritten, operators(after)) == (0, count)


@pytest.mark.parametrize("step", [ShuffleInConvolution(), ChannelsFirst()], ids=lambda s: s.name)
def test_targets_that_move_cheaply_keep_the_graph(onnx_model: Build, step: Pass) -> None:
    for model in (block(onnx_model), shuffled(onnx_model, 2, 4, "y = Relu(s)", "8,5,6")):
        count = operators(model)
        after = step.apply(model, Context(target=OnnxRuntime(threads=1), original=model))
        assert operators(after) == count


def test_unknown_shapes_and_other_types_stay(onnx_model: Build) -> None:
    chain = "t = Transpose<perm=[0,2,3,1]>(c) m = Relu(t) n = Transpose<perm=[0,3,1,2]>(m)"
    half = block(onnx_model, f"c = Cast<to=10>(x) {chain} y = Cast<to=1>(n)")
    text = f"g (float[batch,8,9,7] x) => (float[batch,8,9,7] y) {{c = Abs(x) {chain} y = Abs(n)}}"
    for model in (half, onnx_model(text, infer=False)):
        after = ChannelsFirst().apply(model, Context(target=TARGET, original=model))
        assert after.history[-1].details["rewritten"] == 0
