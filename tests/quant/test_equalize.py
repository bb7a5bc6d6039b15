from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from compress.data import load_data
from compress.errors import UsageError
from compress.model import Arrays, Model, Step
from compress.passes import Context
from compress.reference import reference_session, run
from compress.registry import create_target
from compress.rewrites import FoldBatchNorm, output_statistics
from compress.testing import PassContract, tiny_model
from quant.equalize import Equalize
from quant.quantizer import fake_quantize, weight_qparams
from quant.scaling import Linear
from quant.spec import QuantSpec

TARGET = create_target("cpu", threads=1)
Build = Callable[..., Model]
Numbers = dict[str, np.ndarray]


def applied(step: Equalize, model: Model, data: np.ndarray | None = None) -> Model:
    calibration = load_data(data, model.inputs) if data is not None else None
    return step.apply(model, Context(target=TARGET, original=model, calibration=calibration))


def outputs(model: Model, x: np.ndarray | None = None, name: str = "y") -> np.ndarray:
    watched = model.graph_model.clone()
    values = {out.name: out for node in watched.graph for out in node.outputs}
    if name not in {value.name for value in watched.graph.outputs}:
        watched.graph.outputs.append(values[name])
    inputs: Arrays = model.example(3) if x is None else {model.inputs[0].name: x}
    return run(reference_session(watched), inputs)[name]


def assert_same(before: np.ndarray, after: np.ndarray, tolerance: float = 1e-5) -> None:
    scale = np.abs(before).max()
    assert scale > 0
    np.testing.assert_allclose(after, before, rtol=0, atol=tolerance * scale)


def layer(model: Model, name: str) -> Linear:
    found = filter(None, map(Linear.of, model.graph_model.graph))
    return next(one for one in found if one.name == name)


def written(model: Model, name: str) -> np.ndarray:
    """Largest weight of each output channel."""
    return np.abs(layer(model, name).weight).max((2, 3)).reshape(-1)


def read(model: Model, name: str, repeat: int = 1) -> np.ndarray:
    """Largest weight of each input channel."""
    return np.abs(layer(model, name).weight).max((1, 3)).reshape(-1, repeat).max(1)


def uneven(rng: np.random.Generator, *shape: int, axis: int = 0) -> np.ndarray:
    """Weights whose channels along an axis differ by factors of up to 1000."""
    factors = 10 ** rng.uniform(-1.5, 1.5, shape[axis])
    spread = factors.reshape([-1 if i == axis else 1 for i in range(len(shape))])
    fan = np.prod(shape[1:]) if len(shape) > 2 else shape[0]
    return (rng.normal(0, fan**-0.5, shape) * spread).astype(np.float32)


BETWEEN = {
    "relu": "Relu(@)",
    "leaky": "LeakyRelu<alpha=0.2>(@)",
    "prelu": "PRelu(@, slope)",
    "nothing": "Identity(@)",
    "clip": "Clip(@, zero)",
    "maxpool": "MaxPool<kernel_shape=[2,2],pads=[1,1,0,0]>(@)",
    "average": "AveragePool<kernel_shape=[2,2],pads=[1,0,1,0]>(@)",
    "counted": "AveragePool<kernel_shape=[2,2],pads=[1,0,1,0],count_include_pad=1>(@)",
    "pad": "Pad(@, amounts)",
}


@st.composite
def networks(draw: st.DrawFn) -> tuple[str, Numbers]:
    """Three convolutions, what is between them, and a head: ONNX text and constants."""
    rng = np.random.default_rng(draw(st.integers(0, 10_000)))
    constants: Numbers = {"zero": np.array(0, np.float32)}
    constants["amounts"] = np.array([0, 0, 1, 0, 0, 0, 0, 2])
    body, channels, value = "", 4, "x"
    for index, stride in enumerate((draw(st.integers(1, 2)), 1, 1)):
        kind = draw(st.sampled_from(["plain", "grouped", "depthwise", "transposed"]))
        groups = {"plain": 1, "grouped": 2, "depthwise": channels}.get(kind, 2 - index % 2)
        width = channels * draw(st.integers(1, 2)) if kind == "depthwise" else 4
        kernel = draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
        shape: tuple[int, ...] = (width, channels // groups, *kernel)
        if kind == "transposed":
            shape = (channels, width // groups, *kernel)
        constants[f"w{index}"] = uneven(rng, *shape)
        arguments = f"{value}, w{index}"
        if draw(st.booleans()):
            constants[f"b{index}"] = rng.normal(0, 0.3, width).astype(np.float32)
            arguments += f", b{index}"
        pad, dilation = draw(st.integers(0, 1)), draw(st.integers(1, 2))
        attributes = f"strides=[{stride},1],dilations=[1,{dilation}],pads=[{pad},{pad},0,{pad}]"
        op = "ConvTranspose" if kind == "transposed" else "Conv"
        value, channels = f"h{index}", width
        constants[f"slope{index}"] = rng.uniform(-1, 1, (width, 1, 1)).astype(np.float32)
        between = BETWEEN[draw(st.sampled_from(sorted(BETWEEN)))]
        between = between.replace("@", f"c{index}", 1).replace("slope", f"slope{index}")
        body += f" [l{index}] c{index} = {op}<group={groups},{attributes}>({arguments})"
        body += f" {value} = {between}"
    if draw(st.booleans()):
        constants["u"] = rng.normal(size=(channels, 5)).astype(np.float32)
        return f"{body} p = GlobalAveragePool(h2) f = Flatten(p) [fc] y = Gemm(f, u)", constants
    return f"{body} y = Identity(h2)", constants


@settings(max_examples=25, suppress_health_check=[HealthCheck.too_slow])
@given(network=networks())
def test_an_equalised_network_computes_the_same(
    onnx_model: Build, network: tuple[str, Numbers]
) -> None:
    body, constants = network
    used = {n: a for n, a in constants.items() if f"{n})" in body or f"{n}," in body}
    model = onnx_model(f"g (float[batch,4,17,17] x) => (float y) {{{body}}}", **used)
    before, weight = outputs(model), layer(model, "l1").weight.copy()
    done = applied(Equalize(), model)
    assert done.history[-1].details["pairs"] == 2 + ("u" in used)
    assert_same(before, outputs(done))
    assert not np.allclose(layer(done, "l1").weight, weight)


@pytest.mark.parametrize(
    ("head", "shapes", "repeat"),
    [
        ("f = Flatten(a) [fc] y = Gemm(f, u)", {"u": (36, 5)}, 9),
        ("f = Flatten(a) [fc] y = Gemm<transB=1,alpha=0.5>(f, u)", {"u": (5, 36)}, 9),
        ("f = Reshape(a, flat) [fc] y = Gemm(f, u, v)", {"u": (36, 5), "v": (5,)}, 9),
        ("p = GlobalMaxPool(a) f = Squeeze(p, axes) [fc] y = MatMul(f, u)", {"u": (4, 5)}, 1),
        ("t = Transpose<perm=[0,2,3,1]>(a) [fc] m = MatMul(t, u) y = Add(v, m)",
         {"u": (4, 5), "v": (1, 5)}, 1),
        ("t = Transpose<perm=[0,2,3,1]>(a) f = Reshape(t, rows) [fc] y = Gemm(f, u)",
         {"u": (4, 5)}, 1),
    ],
    ids=["flatten", "transposed", "reshape", "squeeze", "on tokens", "rows"],
)  # fmt: skip
def test_linear_layers_behind_a_convolution_share_its_ranges(
    onnx_model: Build, head: str, shapes: dict[str, tuple[int, ...]], repeat: int
) -> None:
    rng = np.random.default_rng(0)
    constants = {"flat": np.array([0, 36]), "axes": np.array([2, 3]), "rows": np.array([-1, 4])}
    used = {name: array for name, array in constants.items() if name in head}
    used |= {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    model = onnx_model(
        f"g (float[batch,3,3,3] x) => (float y) {{[conv] c = Conv(x, w, b) a = Relu(c) {head}}}",
        w=uneven(rng, 4, 3, 1, 1),
        b=rng.normal(size=4).astype(np.float32),
        **used,
    )
    before, product = outputs(model), written(model, "conv") * read(model, "fc", repeat)
    done = applied(Equalize(), model)
    assert_same(before, outputs(done))
    np.testing.assert_allclose(written(done, "conv"), np.sqrt(product), rtol=1e-6)
    np.testing.assert_allclose(read(done, "fc", repeat), np.sqrt(product), rtol=1e-6)


def test_a_linear_layer_on_tokens_takes_its_bias_along(onnx_model: Build) -> None:
    rng = np.random.default_rng(1)
    text = """g (float[batch,6,8] x) => (float y) {
        [a] m = MatMul(x, w) h = Add(b, m) r = Relu(h) [c] n = MatMul(r, v) y = Add(n, d)}"""
    shapes = {"b": (1, 1, 7), "v": (7, 5), "d": (5,)}
    constants = {n: rng.normal(size=shape).astype(np.float32) for n, shape in shapes.items()}
    model = onnx_model(text, w=uneven(rng, 8, 7, axis=1), **constants)
    before, product = outputs(model), written(model, "a") * read(model, "c")
    done = applied(Equalize(), model)
    assert_same(before, outputs(done))
    np.testing.assert_allclose(written(done, "a"), np.sqrt(product), rtol=1e-6)
    np.testing.assert_allclose(written(done, "a"), read(done, "c"), rtol=1e-6)


SEPARABLE = """[a] c = Conv(x, w0, b0) r = Relu(c) [b] d = Conv<group=6,pads=[1,1,1,1]>(r, w1, b1)
    s = Relu(d) [c] e = Conv(s, w2)"""


def separable(onnx_model: Build, seed: int = 2, output: str = "y = Identity(e)") -> Model:
    """Pointwise, depthwise, pointwise, with channels in all of them that differ a lot."""
    rng = np.random.default_rng(seed)
    return onnx_model(
        f"g (float[batch,3,8,8] x) => (float y) {{{SEPARABLE} {output}}}",
        w0=uneven(rng, 6, 3, 1, 1),
        b0=rng.normal(0, 0.1, 6).astype(np.float32),
        w1=uneven(rng, 6, 1, 3, 3),
        b1=rng.normal(0, 0.1, 6).astype(np.float32),
        w2=uneven(rng, 4, 6, 1, 1, axis=1),
    )


def test_three_layers_end_with_equal_ranges_in_every_channel(onnx_model: Build) -> None:
    model = separable(onnx_model)
    # Nagel et al.: what the channels of three layers have in common is the cube root.
    product = written(model, "a") * written(model, "b") * read(model, "c")
    before = outputs(model)
    done = applied(Equalize(iterations=100), model)
    details = done.history[-1].details
    assert_same(before, outputs(done))
    for ranges in (written(done, "a"), written(done, "b"), read(done, "c")):
        np.testing.assert_allclose(ranges, np.cbrt(product), rtol=1e-5)
    assert details["sweeps"] < 100
    assert applied(Equalize(), done).history[-1].details["sweeps"] == 1


def int8_error(model: Model, expected: np.ndarray) -> float:
    """Relative error of the output when each weight is int8 with one scale."""
    rounded = model.graph_model.clone()
    for one in filter(None, map(Linear.of, rounded.graph)):
        weight = one.weight
        one.replace_weight(rounded.graph, fake_quantize(weight, weight_qparams(weight, INT8)))
    got = run(reference_session(rounded), model.example(3))["y"]
    return float(np.linalg.norm(got - expected) / np.linalg.norm(expected))


INT8 = QuantSpec("int8")


@pytest.mark.parametrize("seed", range(3))
def test_int8_weights_with_one_scale_cost_less_after_it(onnx_model: Build, seed: int) -> None:
    model = separable(onnx_model, seed)
    expected = outputs(model)
    before = int8_error(model, expected)
    after = int8_error(applied(Equalize(), model), expected)
    assert after < before / 3
    assert after < 0.05


def test_dead_channels_keep_their_scale(onnx_model: Build) -> None:
    model = separable(onnx_model)
    graph = model.graph_model.graph
    first, second = layer(model, "a").weight.copy(), layer(model, "c").weight.copy()
    first[:, 1], second[:, :, 2] = 0, 0
    layer(model, "a").replace_weight(graph, first)
    layer(model, "c").replace_weight(graph, second)
    before, bias = outputs(model), layer(model, "a").bias
    assert bias is not None
    dead, depthwise = float(bias[1]), written(model, "b")[2]
    done = applied(Equalize(), model)
    assert_same(before, outputs(done))
    after = layer(done, "a").bias
    assert after is not None
    assert after[1] == pytest.approx(dead)
    np.testing.assert_allclose(written(done, "a")[2], written(done, "b")[2], rtol=1e-4)
    assert written(done, "b")[2] != depthwise


@pytest.mark.parametrize(
    ("between", "outputs_too", "reason"),
    [
        ("r = Sigmoid(c)", "", "Sigmoid"),
        ("s = Relu(c) r = Add(s, x)", "", "Add"),
        ("r = Relu(c) t = Exp(r)", ", float t", "Exp"),
        ("r = Relu(c)", ", float[batch,4,4,4] c", "c is an output"),
        ("r = Clip(c, zero, six)", "", "Clip"),
        ("r = Clip(c, low)", "", "Clip"),
        ("r = Pad(c, amounts)", "", "Pad"),
        ("r = Pad(c, amounts, six)", "", "Pad"),
        ("r = Transpose<perm=[0,2,1,3]>(c)", "", "Conv b reads it"),
        ("r = Relu(c) [e] t = Conv(r, u)", ", float t", "2 layers"),
    ],
)
def test_other_readers_are_named_and_nothing_moves(
    onnx_model: Build, between: str, outputs_too: str, reason: str
) -> None:
    along_channels = np.array([0, 1, 0, 0, 0, -1, 0, 0])
    spatial = np.array([0, 0, 1, 0, 0, 0, 0, 0])
    constants = {
        "zero": np.float32(0),
        "six": np.float32(6),
        "low": np.float32(-1),
        "amounts": spatial if "six" in between else along_channels,
    }
    used = {name: array for name, array in constants.items() if name in between}
    used |= {"u": (4, 4, 1, 1)} if "u)" in between else {}
    text = f"""g (float[batch,4,4,4] x) => (float y{outputs_too})
        {{[a] c = Conv(x, w) {between} [b] y = Conv(r, v)}}"""
    model = onnx_model(text, w=(4, 4, 1, 1), v=(4, 4, 1, 1), **used)
    before = outputs(model)
    done = applied(Equalize(), model)
    details = done.history[-1].details
    assert details["pairs"] == 0
    assert reason in details["left"]["a"]
    np.testing.assert_array_equal(outputs(done), before)


def test_a_weight_that_two_layers_share_stays(onnx_model: Build) -> None:
    text = """g (float[batch,4,4,4] x) => (float y)
        {[a] c = Conv(x, w) r = Relu(c) [b] d = Conv(r, w) s = Relu(d) [c] y = Conv(s, v)}"""
    model = onnx_model(text, w=(4, 4, 1, 1), v=(4, 4, 1, 1))
    done = applied(Equalize(), model)
    assert done.history[-1].details["pairs"] == 0
    assert len(done.graph_model.graph.initializers) == 2


RELU6 = """[a] c = Conv(x, w0, b0) r = Clip(c, zero, six) [b] d = Conv<group=6>(r, w1, b1)
    s = Clip(d, zero, six) [c] y = Conv(s, w2)"""


def relu6(onnx_model: Build) -> tuple[Model, np.ndarray]:
    """A network in which some channels reach 6 on the data and others do not, and the data."""
    rng = np.random.default_rng(5)
    x = rng.uniform(0, 1, (16, 3, 8, 8)).astype(np.float32)
    w0 = np.abs(uneven(rng, 6, 3, 1, 1))
    w0[0], w0[1] = 8, 0.01
    model = onnx_model(
        f"g (float[batch,3,8,8] x) => (float y) {{{RELU6}}}",
        w0=w0,
        b0=rng.uniform(0, 0.1, 6).astype(np.float32),
        w1=np.abs(uneven(rng, 6, 1, 3, 3)),
        b1=rng.uniform(0, 0.1, 6).astype(np.float32),
        w2=uneven(rng, 4, 6, 1, 1, axis=1),
        zero=np.float32(0),
        six=np.float32(6),
    )
    return model, x


def test_relu6_is_kept_by_default(onnx_model: Build) -> None:
    model, x = relu6(onnx_model)
    before = outputs(model, x)
    done = applied(Equalize(), model, x)
    assert done.history[-1].details["pairs"] == 0
    np.testing.assert_array_equal(outputs(done, x), before)


def test_bounded_scales_leave_every_output_on_the_data_as_it_was(onnx_model: Build) -> None:
    model, x = relu6(onnx_model)
    before, peaks = outputs(model, x), outputs(model, x, "r").max((0, 2, 3))
    ranges = written(model, "a")
    done = applied(Equalize(relu6="bounded"), model, x)
    details = done.history[-1].details
    assert details["pairs"] == 2
    assert details["compared_on"] == "calibration data"
    assert_same(before, outputs(done, x))
    assert details["largest_change"] < 1e-5
    # What reaches 6 keeps its scale; what does not may come up to 6 / 1.25.
    full = peaks >= 6
    assert 0 < full.sum() < 6
    scales = ranges / written(done, "a")
    np.testing.assert_allclose(scales[full], 1)
    assert (np.abs(scales[~full] - 1) > 0.01).all()
    after = outputs(done, x, "r").max((0, 2, 3))
    limit = np.maximum(peaks, 6 / 1.25)
    assert (after <= limit * (1 + 1e-5)).all()


def test_without_data_the_bounds_come_from_batchnorm(onnx_model: Build) -> None:
    model, _ = relu6(onnx_model)
    bare = applied(Equalize(relu6="bounded"), model)
    assert bare.history[-1].details["pairs"] == 0
    assert "nothing is known" in bare.history[-1].details["left"]["a"]
    known = {"mean": [5.0, *[0.1] * 5], "std": [1.0, *[0.1] * 5]}
    recorded = model.evolve(model.program, Step("fold", {}, {"statistics": {"a": known}}))
    done = applied(Equalize(relu6="bounded"), recorded)
    details = done.history[-1].details
    assert details["pairs"] == 1
    assert details["held"] == 1
    assert details["compared_on"] == "random inputs"


def test_replaced_relu6_is_relu_and_the_change_is_reported(onnx_model: Build) -> None:
    model, x = relu6(onnx_model)
    before = outputs(model, x)
    constants = {name: v.const_value.numpy() for name, v in
                 model.graph_model.graph.initializers.items() if v.const_value}  # fmt: skip
    text = RELU6.replace("Clip(c, zero, six)", "Relu(c)").replace("Clip(d, zero, six)", "Relu(d)")
    used = {name: array for name, array in constants.items() if name[0] in "wb"}
    relus = onnx_model(f"g (float[batch,3,8,8] x) => (float y) {{{text}}}", **used)
    done = applied(Equalize(relu6="replace"), model, x)
    details = done.history[-1].details
    after = outputs(done, x)
    assert "Clip" not in {node.op_type for node in done.graph_model.graph}
    assert details["replaced"] == 2
    assert details["pairs"] == 2
    assert_same(outputs(relus, x), after)
    change = np.abs(after - before).max() / np.abs(before).max()
    assert details["largest_change"] == pytest.approx(change, rel=1e-3)
    rms = np.linalg.norm(after - before) / np.linalg.norm(before)
    assert details["rms_change"] == pytest.approx(rms, rel=1e-3)
    assert change > 0.05


def test_no_channel_grows_beyond_the_largest_of_its_tensor(onnx_model: Build) -> None:
    model = separable(onnx_model)
    # Hardly any weight and a bias: equal ranges alone would multiply this channel by thousands.
    graph, weight = model.graph_model.graph, layer(model, "a").weight.copy()
    weight[:, 0] *= 1e-7
    layer(model, "a").replace_weight(graph, weight)
    layer(model, "a").replace_bias(graph, np.full(6, 0.5))
    x = np.random.default_rng(0).normal(size=(8, 3, 8, 8)).astype(np.float32)
    largest = outputs(model, x, "r").max()
    free = applied(Equalize(), model.evolve(model.graph_model.clone(), Step("copy")))
    assert outputs(free, x, "r").max() > 100 * largest
    held = applied(Equalize(), model, x)
    assert outputs(held, x, "r").max() <= largest * (1 + 1e-5)


BIASED = """[a] c = Conv(x, w0) n = BatchNormalization(c, gamma, beta, mean, var) r = Relu(n)
    [b] y = Conv<group=3,pads=[P,P,P,P]>(r, w1)"""


def biased(onnx_model: Build, padding: int) -> tuple[Model, np.ndarray]:
    """A folded network whose first layer is 3 to 7 above zero in one channel, and its data."""
    rng = np.random.default_rng(7)
    x = rng.uniform(-1, 1, (16, 3, 8, 8)).astype(np.float32)
    deviation = np.float32(3**-0.5)  # of x, whose values are at most 1.73 deviations from 0
    model = onnx_model(
        f"g (float[batch,3,8,8] x) => (float y) {{{BIASED.replace('P', str(padding))}}}",
        w0=(np.eye(3) * deviation).reshape(3, 3, 1, 1).astype(np.float32),
        gamma=np.float32([1, 2, 0.5]),
        beta=np.float32([5, -1, 1]),
        mean=np.zeros(3, np.float32),
        var=np.full(3, deviation**4),
        w1=rng.normal(size=(6, 1, 3, 3)).astype(np.float32),
    )
    return FoldBatchNorm().apply(model, Context(target=TARGET, original=model)), x


def test_an_absorbed_bias_changes_nothing_above_it(onnx_model: Build) -> None:
    model, x = biased(onnx_model, 0)
    before, peak = outputs(model, x), outputs(model, x, "r").max((0, 2, 3))
    scale = written(model, "a")
    done = applied(Equalize(), model)
    details = done.history[-1].details
    assert details["absorbed"] == 1
    assert details["compared_on"] == "random inputs"
    assert_same(before, outputs(done, x))
    s = scale / written(done, "a")
    after = outputs(done, x, "r").max((0, 2, 3))
    np.testing.assert_allclose(after[1:], (peak / s)[1:], rtol=1e-4)
    # c = mean - 3 std = 5 - 3 in the old scale.
    assert after[0] == pytest.approx((peak[0] - 2) / s[0], rel=1e-4)
    untouched = applied(Equalize(absorb=False), biased(onnx_model, 0)[0])
    assert untouched.history[-1].details["absorbed"] == 0


def test_padding_forbids_absorption_unless_asked_for(onnx_model: Build) -> None:
    model, x = biased(onnx_model, 1)
    before = outputs(model, x)
    careful = applied(Equalize(), biased(onnx_model, 1)[0])
    assert careful.history[-1].details["absorbed"] == 0
    assert_same(before, outputs(careful, x))
    done = applied(Equalize(absorb_padded=True), model, x)
    assert done.history[-1].details["absorbed"] == 1
    inside = (..., slice(1, -1), slice(1, -1))
    assert_same(before[inside], outputs(done, x)[inside])
    assert done.history[-1].details["largest_change"] > 0.05


@pytest.mark.parametrize(
    ("between", "second", "absorbed"),
    [
        ("r = Relu(c) q = MaxPool<kernel_shape=[2,2],pads=[1,1,0,0]>(r)", "Conv(q, w1)", 1),
        ("q = AveragePool<kernel_shape=[2,2],pads=[1,1,0,0]>(c) r = Relu(q)", "Conv(r, w1)", 1),
        ("q = AveragePool<kernel_shape=[2,2],pads=[1,1,0,0],count_include_pad=1>(c) r = Relu(q)",
         "Conv(r, w1)", 0),
        ("r = Relu(c) q = Pad(r, amounts)", "Conv(q, w1)", 0),
        ("r = Relu(c)", 'Conv<auto_pad="SAME_UPPER">(r, w3)', 0),
        ("r = Relu(c)", "ConvTranspose<strides=[2,2]>(r, w3)", 0),
        ("r = LeakyRelu(c)", "Conv(r, w1)", 0),
        ("r = Identity(c)", "Conv(r, w1)", 0),
        ("r = Relu(c) q = Transpose<perm=[0,2,3,1]>(r)", "MatMul(q, w2)", 0),
    ],
    ids=["maximum", "average", "average of padding", "pad", "same", "transposed", "leaky",
         "no relu", "no bias"],
)  # fmt: skip
def test_a_bias_is_absorbed_only_where_nothing_mixes_it_with_zeros(
    onnx_model: Build, between: str, second: str, absorbed: int
) -> None:
    rng = np.random.default_rng(8)
    shapes = {"w1": (4, 4, 1, 1), "w2": (4, 5), "w3": (4, 4, 2, 2)}
    used = {n: rng.normal(size=shape).astype(np.float32) for n, shape in shapes.items()}
    used |= {"amounts": np.array([0, 0, 1, 0, 0, 0, 0, 0])}
    used = {n: a for n, a in used.items() if f"{n})" in between + second}
    bias = np.full(4, 100, np.float32)
    text = f"""g (float[batch,4,5,5] x) => (float[batch,e,f,g] y)
        {{[a] c = Conv(x, w0, b0) {between} [b] y = {second}}}"""
    model = onnx_model(text, w0=rng.normal(size=(4, 4, 1, 1)).astype(np.float32), b0=bias, **used)
    known = {"a": {"mean": [100.0] * 4, "std": [5.0] * 4}}
    before = outputs(model)
    done = applied(Equalize(), model.evolve(model.program, Step("fold", {}, {"statistics": known})))
    assert done.history[-1].details["pairs"] == 1
    assert done.history[-1].details["absorbed"] == 4 * absorbed
    assert_same(before, outputs(done))
    after = layer(done, "a").bias
    assert after is not None
    # 100 - 85 is left of it, in units of a deviation that was 5 before the channels were scaled.
    left = (15 if absorbed else 100) / 5
    np.testing.assert_allclose(after, left * output_statistics(done)["a"][1], rtol=1e-5)


def test_statistics_follow_scales_and_shifts(onnx_model: Build) -> None:
    model, x = biased(onnx_model, 0)
    first = output_statistics(model)["a"]
    out = outputs(model, x, "c")
    done = applied(Equalize(), model)
    mean, deviation = output_statistics(done)["a"]
    assert not np.allclose(mean, first[0])
    # Measured before and after: every channel moves as its statistics do.
    after = outputs(done, x, "c")
    slope = after.std((0, 2, 3)) / out.std((0, 2, 3))
    np.testing.assert_allclose(deviation, first[1] * slope, rtol=1e-4)
    shift = after.mean((0, 2, 3)) - out.mean((0, 2, 3)) * slope
    np.testing.assert_allclose(mean, first[0] * slope + shift, rtol=1e-4, atol=1e-5)
    assert shift[0] < -0.5


@pytest.mark.parametrize(
    "options", [{"iterations": 0}, {"samples": 0}, {"relu6": "drop"}], ids=lambda o: next(iter(o))
)
def test_options_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(options))):
        Equalize(**options)


class TestEqualize(PassContract):
    step = Equalize()
    target = TARGET


class TestEqualizeBounded(PassContract):
    step = Equalize(relu6="bounded")
    target = TARGET

    def context(self, model: Model) -> Context:
        x = np.random.default_rng(0).normal(size=(8, 3, 16, 16)).astype(np.float32)
        data = load_data(x, model.inputs)
        return Context(target=self.target, original=tiny_model(), calibration=data)
