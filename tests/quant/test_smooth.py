from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from compress.data import load_data
from compress.errors import UsageError
from compress.export import to_onnx
from compress.model import Model, Step, TensorSpec
from compress.passes import Context
from compress.reference import reference_session, run
from compress.registry import create_target
from compress.rewrites import output_statistics
from compress.testing import PassContract, tiny_model
from quant.quantizer import fake_quantize, qparams_from_range, weight_qparams
from quant.scaling import Linear
from quant.smooth import Smooth, smoothing_scale
from quant.spec import QuantSpec

TARGET = create_target("cpu", threads=1)
Build = Callable[..., Model]
TOKENS = "float[batch,6,8] x"


def applied(step: Smooth, model: Model, data: np.ndarray | None) -> Model:
    calibration = load_data(data, model.inputs) if data is not None else None
    return step.apply(model, Context(target=TARGET, original=model, calibration=calibration))


def outputs(model: Model, x: np.ndarray, *names: str) -> list[np.ndarray]:
    watched = model.graph_model.clone()
    values = {out.name: out for node in watched.graph for out in node.outputs}
    present = {value.name for value in watched.graph.outputs}
    watched.graph.outputs.extend(values[name] for name in names if name not in present)
    found = run(reference_session(watched), {model.inputs[0].name: x})
    return [found[name] for name in names]


def assert_same(before: np.ndarray, after: np.ndarray) -> None:
    np.testing.assert_allclose(after, before, rtol=0, atol=1e-5 * np.abs(before).max())
    assert np.abs(before).max() > 0


def layer(model: Model, name: str) -> Linear:
    found = filter(None, map(Linear.of, model.graph_model.graph))
    return next(one for one in found if one.name == name)


def constant(model: Model, node: str, index: int) -> np.ndarray:
    found = next(one for one in model.graph_model.graph if one.name == node)
    value = found.inputs[index]
    assert value is not None
    assert value.const_value is not None
    return value.const_value.numpy()


def tokens(seed: int = 0, count: int = 8) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, 6, 8)).astype(np.float32)


def numbers(**shapes: tuple[int, ...]) -> dict[str, np.ndarray]:
    """Normal weights; those called gamma have a channel that is 30 times as large."""
    rng = np.random.default_rng(3)
    made = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    if "gamma" in made:
        made["gamma"] = np.abs(made["gamma"]) + 0.1
        made["gamma"][..., 2] *= 30
    return made


def test_the_scale_of_a_hand_case() -> None:
    activation, weight = np.array([16.0, 4.0, 0.0, 2.0]), np.array([1.0, 4.0, 3.0, 0.0])
    np.testing.assert_allclose(smoothing_scale(activation, weight, 0.5), [4, 1, 1, 1])
    np.testing.assert_allclose(smoothing_scale(activation, weight, 1.0), [16, 4, 1, 1])
    np.testing.assert_allclose(smoothing_scale(activation, weight, 0.0), [1, 0.25, 1, 1])
    tiny = smoothing_scale(np.array([1e-12]), np.array([100.0]), 0.5)
    np.testing.assert_allclose(tiny, [1e-5])


QKV = """[ln] h = LayerNormalization<axis=-1>(x, gamma, beta)
    [q] q = MatMul(h, wq) [k] k = MatMul(h, wk) k2 = Add(k, b)
    flat = Reshape(h, rows) [v] v = Gemm<transB=1>(flat, wv)
    v2 = Reshape(v, back) t = Transpose<perm=[0,2,1]>(k2) s = MatMul(q, t) y = MatMul(s, v2)"""


def attention(onnx_model: Build) -> Model:
    made = numbers(gamma=(8,), beta=(8,), wq=(8, 4), wk=(8, 4), wv=(5, 8), b=(4,))
    made |= {"rows": np.array([-1, 8]), "back": np.array([-1, 6, 5])}
    return onnx_model(f"g ({TOKENS}) => (float[batch,6,5] y) {{{QKV}}}", **made)


@pytest.mark.parametrize("alpha", [0.5, 0.8])
def test_query_key_and_value_share_one_scale(onnx_model: Build, alpha: float) -> None:
    model, x = attention(onnx_model), tokens()
    before, hidden = outputs(model, x, "y", "h")
    weights = {name: layer(model, name).weight.copy() for name in "qkv"}
    gamma, beta = constant(model, "ln", 1), constant(model, "ln", 2)
    bias = layer(model, "k").bias
    done = applied(Smooth(alpha=alpha), model, x)
    assert done.history[-1].details["smoothed"] == 1
    assert_same(before, outputs(done, x, "y")[0])
    other = tokens(9)
    assert_same(outputs(attention(onnx_model), other, "y")[0], outputs(done, other, "y")[0])
    # s = max|X|^alpha / max|W|^(1 - alpha), W of all three.
    largest = np.max([np.abs(weight).max((0, 1, 3)) for weight in weights.values()], 0)
    s = np.abs(hidden).max((0, 1)) ** alpha / largest ** (1 - alpha)
    np.testing.assert_allclose(constant(done, "ln", 1), gamma / s, rtol=1e-5)
    np.testing.assert_allclose(constant(done, "ln", 2), beta / s, rtol=1e-5)
    for name, weight in weights.items():
        expected = weight * s[:, None]
        np.testing.assert_allclose(layer(done, name).weight, expected, rtol=1e-5)
    np.testing.assert_array_equal(layer(done, "k").bias, bias)


def rounded_error(model: Model, x: np.ndarray) -> float:
    """Relative error of q where its input and its weight have one int8 scale each."""
    hidden, exact = outputs(model, x, "h", "q")
    weight = constant(model, "q", 1)
    spec = QuantSpec("int8", symmetric=True)
    inputs = fake_quantize(hidden, qparams_from_range(hidden.min(), hidden.max(), spec))
    got = inputs @ fake_quantize(weight, weight_qparams(weight, spec))
    return float(np.linalg.norm(got - exact) / np.linalg.norm(exact))


def test_an_outlier_channel_costs_less_in_int8(onnx_model: Build) -> None:
    model, x = attention(onnx_model), tokens()
    layer(model, "q").scale(model.graph_model.graph, inputs=np.where(np.arange(8) == 2, 0.03, 1))
    before = rounded_error(model, x)
    assert rounded_error(applied(Smooth(), model, x), x) < before / 2


PRODUCERS = {
    "norm": "[p] h = LayerNormalization(x, gamma, beta)",
    "norm without bias": "[p] h = LayerNormalization<axis=2>(x, gamma)",
    "parts": "[m] m = Mul(x, gamma) [p] h = Add(beta, m)",
    "factor": "[p] h = Mul(gamma, x)",
    "linear": "[p] m = MatMul(x, square) i = Add(m, beta) h = Relu(i)",
    "plain linear": "[p] h = MatMul(x, square)",
}
CONSUMERS = {
    "product": "[c] y = MatMul(h, w)",
    "biased": "[c] m2 = MatMul(h, w) y = Add(m2, b)",
    "rows": "r = Reshape(h, rows) [c] g = Gemm(r, w, b) y = Reshape(g, back)",
    "two": "[c] c = MatMul(h, w) l = LeakyRelu(h) [d] d = MatMul(l, w2) y = Sub(c, d)",
}


@settings(max_examples=25, suppress_health_check=[HealthCheck.too_slow])
@given(
    producer=st.sampled_from(sorted(PRODUCERS)),
    consumer=st.sampled_from(sorted(CONSUMERS)),
    alpha=st.floats(0, 1),
    seed=st.integers(0, 100),
)
def test_a_smoothed_network_computes_the_same(
    onnx_model: Build, producer: str, consumer: str, alpha: float, seed: int
) -> None:
    body = f"{PRODUCERS[producer]} {CONSUMERS[consumer]}"
    made = numbers(gamma=(8,), beta=(1, 8), square=(8, 8), w=(8, 5), w2=(8, 5), b=(5,))
    made["beta"] = made["beta"][0] if "Layer" in body else made["beta"]
    made |= {"rows": np.array([-1, 8]), "back": np.array([-1, 6, 5])}
    used = {n: a for n, a in made.items() if f" {n})" in body or f"{n}," in body}
    model = onnx_model(f"g ({TOKENS}) => (float[batch,6,5] y) {{{body}}}", **used)
    x = tokens(seed)
    before, weight = outputs(model, x, "y")[0], layer(model, "c").weight.copy()
    done = applied(Smooth(alpha=alpha), model, x)
    assert done.history[-1].details["smoothed"] == 1
    assert_same(before, outputs(done, x, "y")[0])
    assert not np.allclose(layer(done, "c").weight, weight)


@pytest.mark.parametrize(
    ("body", "left"),
    [
        ("[p] h = LayerNormalization(x, gamma) [c] c = MatMul(h, square) y = Add(c, h)",
         {"p": "Add"}),
        ("[p] h = LayerNormalization(x, gamma) i = Gelu(h) [c] y = MatMul(i, square)", {}),
        ("[p] h = LayerNormalization<axis=1>(x, plane) [c] y = MatMul(h, square)", {}),
        ("[p] h = Mul(x, one) [c] y = MatMul(h, square)", {}),
        ("[p] h = Add(x, gamma) [c] y = MatMul(h, square)", {}),
        ("m = Mul(x, gamma) [p] h = Add(m, gamma) [c] c = MatMul(h, square) y = Add(c, m)", {}),
        ("[p] h = LayerNormalization(x, gamma) [c] c = MatMul(h, square) [d] d = MatMul(c, square)"
         " y = Add(d, c)", {}),
    ],
    ids=["residual", "gelu", "whole plane", "number", "no factor", "used factor", "shared weight"],
)  # fmt: skip
def test_what_cannot_be_smoothed_stays(onnx_model: Build, body: str, left: dict[str, str]) -> None:
    made = numbers(gamma=(8,), square=(8, 8), plane=(6, 8), one=(1,))
    used = {n: a for n, a in made.items() if f" {n})" in body or f"{n}," in body}
    model, x = onnx_model(f"g ({TOKENS}) => (float[batch,6,8] y) {{{body}}}", **used), tokens()
    before = outputs(model, x, "y")[0]
    done = applied(Smooth(), model, x)
    details = done.history[-1].details
    assert details["smoothed"] == 0
    assert list(details["left"]) == list(left)
    assert all(reason in details["left"][name] for name, reason in left.items())
    np.testing.assert_array_equal(outputs(done, x, "y")[0], before)


def test_a_convolution_before_a_linear_layer_passes_its_statistics_on(onnx_model: Build) -> None:
    text = """g (float[batch,3,4,4] x) => (float[batch,5] y) {
        [a] c = Conv(x, w, b) r = Relu(c) f = Flatten(r) [fc] y = Gemm(f, v)}"""
    model = onnx_model(text, **numbers(w=(8, 3, 1, 1), b=(8,), v=(128, 5)))
    known = {"a": {"mean": [1.0] * 8, "std": [2.0] * 8}}
    model = model.evolve(model.program, Step("fold", {}, {"statistics": known}))
    x = np.random.default_rng(1).normal(size=(8, 3, 4, 4)).astype(np.float32)
    before, rectified, old = *outputs(model, x, "y", "r"), layer(model, "a").weight.copy()
    reads = np.abs(layer(model, "fc").weight).max((1, 3)).reshape(8, 16).max(1)
    done = applied(Smooth(samples=8), model, x)
    assert_same(before, outputs(done, x, "y")[0])
    s = np.sqrt(rectified.max((0, 2, 3)) / reads)
    np.testing.assert_allclose(layer(done, "a").weight[0, :, :, 0], old[0, :, :, 0] / s[:, None],
                               rtol=1e-5)  # fmt: skip
    mean, deviation = output_statistics(done)["a"]
    np.testing.assert_allclose(mean, 1 / s, rtol=1e-5)
    np.testing.assert_allclose(deviation, 2 / s, rtol=1e-5)


def test_without_calibration_data_nothing_happens_and_details_say_why(onnx_model: Build) -> None:
    model, x = attention(onnx_model), tokens()
    before = outputs(model, x, "y")[0]
    done = applied(Smooth(), model, None)
    np.testing.assert_array_equal(outputs(done, x, "y")[0], before)
    assert done.history[-1].details["smoothed"] == 0
    assert "no calibration data" in done.history[-1].details["reason"]


def test_a_fixed_batch_is_filled_up(onnx_model: Build) -> None:
    body = f"{PRODUCERS['norm']} {CONSUMERS['product']}"
    made = numbers(gamma=(8,), beta=(8,), w=(8, 5))
    model = onnx_model(f"g (float[4,6,8] x) => (float[4,6,5] y) {{{body}}}", **made)
    x = tokens(count=6)
    hidden = np.concatenate([outputs(model, x[[0, 1, 2, 3]], "h")[0],
                             outputs(model, x[[4, 5, 5, 5]], "h")[0]])  # fmt: skip
    reads = np.abs(made["w"]).max(1)
    done = applied(Smooth(), model, x)
    s = np.sqrt(np.abs(hidden).max((0, 1)) / reads)
    np.testing.assert_allclose(layer(done, "c").weight[0, :, :, 0], (made["w"] * s[:, None]).T,
                               rtol=1e-5)  # fmt: skip


def test_every_linear_layer_behind_a_norm_of_an_encoder_is_smoothed() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        block = torch.nn.TransformerEncoderLayer(
            8, 2, 16, batch_first=True, norm_first=True, activation="gelu"
        )
    model = to_onnx(Model(block.eval(), (TensorSpec("x", (1, 6, 8)),), "block"), 21)
    x = tokens()
    before = outputs(model, x[:1], model.graph_model.graph.outputs[0].name or "")[0]
    done = applied(Smooth(), model, x)
    assert done.history[-1].details["smoothed"] >= 2
    assert done.history[-1].details["left"] == {}
    assert_same(before, outputs(done, x[:1], model.graph_model.graph.outputs[0].name or "")[0])


@pytest.mark.parametrize("options", [{"alpha": 1.5}, {"alpha": -0.1}, {"samples": 0}], ids=str)
def test_options_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(options))):
        Smooth(**options)


class TestSmooth(PassContract):
    step = Smooth(samples=4)
    target = TARGET

    def context(self, model: Model) -> Context:
        x = np.random.default_rng(0).normal(size=(4, 3, 16, 16)).astype(np.float32)
        data = load_data(x, model.inputs)
        return Context(target=self.target, original=tiny_model(), calibration=data)
