from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from compress.candidates import int8_share
from compress.data import load_data
from compress.graph import graph_sites
from compress.model import Arrays, Model
from compress.passes import Context
from compress.reference import reference_session, run
from compress.target import Engine
from quant.emit import integer_limits
from quant.plan import QuantPlan
from quant.ptq import Quantize
from quant.spec import QParams, QuantSpec
from targets.cpu import CPU

TARGET = CPU(threads=1)
IN, OUT = "float[batch,3,8,8] x", "float[batch,8,8,8] y"
PAD = "<pads=[1,1,1,1]>"
GATE = "<alpha=0.16666667,beta=0.5>"


@dataclass(frozen=True)
class Case:
    """A graph body, and the kernels that may stay in float."""

    name: str
    body: str
    weights: dict[str, Any]
    inputs: str = IN
    outputs: str = OUT
    floats: frozenset[str] = frozenset()
    share: float = 1.0


def case(name: str, body: str, floats: str = "", **rest: Any) -> Case:
    known = {key: rest.pop(key) for key in ("inputs", "outputs", "share") if key in rest}
    return Case(name, body, rest, floats=frozenset(floats.split()), **known)


W, V, B = (8, 3, 3, 3), (8, 8, 3, 3), (8,)
DEAD = np.concatenate([np.zeros((2, 3, 3, 3)), np.full((6, 3, 3, 3), 0.1)]).astype(np.float32)
ZERO, SIX = np.float32(0), np.float32(6)

CASES = (
    case("conv", f"[a] y = Conv{PAD}(x, w)", w=W),
    case("conv bias", f"[a] y = Conv{PAD}(x, w, b)", w=W, b=B),
    case("conv relu", f"[a] c = Conv{PAD}(x, w, b) [r] y = Relu(c)", w=W, b=B),
    case(
        "conv relu6",
        f"[a] c = Conv{PAD}(x, w) [r] y = Clip(c, lo, hi)",
        w=W,
        lo=ZERO,
        hi=SIX,
    ),
    # ONNX Runtime has no integer kernel called otherwise: this Clip works on uint8.
    case("conv hardswish", f"[a] c = Conv{PAD}(x, w) [h] y = HardSwish(c)", "Clip", w=W),
    case(
        "squeeze and excitation",
        f"""[a] c = Conv{PAD}(x, w) [r] d = Relu(c) [p] p = GlobalAveragePool(d)
        [f] f = Conv(p, v) [g] g = Relu(f) [e] e = Conv(g, u) [h] h = HardSigmoid{GATE}(e)
        [m] y = Mul(h, d)""",
        w=W,
        v=(4, 8, 1, 1),
        u=(8, 4, 1, 1),
    ),
    case(
        "silu",
        f"[a] c = Conv{PAD}(x, w) [s] s = Sigmoid(c) [m] y = Mul(c, s)",
        w=W,
    ),
    case("leaky relu", f"[a] c = Conv{PAD}(x, w) [s] y = LeakyRelu<alpha=0.1>(c)", w=W),
    case(
        "residual",
        f"""[a] c = Conv{PAD}(x, w) [r] d = Relu(c) [b] e = Conv{PAD}(d, v)
        [s] s = Add(d, e) [t] y = Relu(s)""",
        w=W,
        v=V,
    ),
    case(
        "concat of branches",
        f"""[a] c = Conv{PAD}(x, w) [r] d = Relu(c) [b] e = Conv(d, v) [s] e1 = Relu(e)
        [g] f = Conv{PAD}(d, u) [t] f1 = Relu(f)
        [p] q = MaxPool<kernel_shape=[3,3],pads=[1,1,1,1]>(d)
        [k] k = Concat<axis=1>(e1, f1, q) [z] y = Conv(k, o)""",
        w=W,
        v=(4, 8, 1, 1),
        u=(4, 8, 3, 3),
        o=(8, 16, 1, 1),
    ),
    case(
        "max pool",
        f"[a] c = Conv{PAD}(x, w) [p] y = MaxPool<kernel_shape=[2,2],strides=[2,2]>(c)",
        w=W,
        outputs="float[batch,8,4,4] y",
    ),
    case(
        "average pool",
        f"[a] c = Conv{PAD}(x, w) [p] y = AveragePool<kernel_shape=[2,2],strides=[2,2]>(c)",
        w=W,
        outputs="float[batch,8,4,4] y",
    ),
    case(
        "global pool and gemm",
        f"""[a] c = Conv{PAD}(x, w) [r] d = Relu(c) [p] p = GlobalAveragePool(d)
        [f] f = Flatten(p) [g] y = Gemm<transB=1>(f, v, b)""",
        w=W,
        v=(10, 8),
        b=(10,),
        outputs="float[batch,10] y",
    ),
    case(
        "resize nearest",
        f"""[a] c = Conv{PAD}(x, w)
        [s] d = Resize<mode="nearest",coordinate_transformation_mode="asymmetric",
        nearest_mode="floor">(c, , s) [b] y = Conv{PAD}(d, v)""",
        w=W,
        v=V,
        s=np.float32([1, 1, 2, 2]),
        outputs="float[batch,8,16,16] y",
    ),
    case(
        "resize linear",
        f"""[a] c = Conv{PAD}(x, w)
        [s] d = Resize<mode="linear">(c, , s) [b] y = Conv{PAD}(d, v)""",
        w=W,
        v=V,
        s=np.float32([1, 1, 2, 2]),
        outputs="float[batch,8,16,16] y",
    ),
    case(
        "channel shuffle",
        f"""[a] c = Conv{PAD}(x, w) [r] d = Relu(c) [s] l, e = Split<axis=1>(d, half)
        [b] f = Conv(e, v) [k] g = Concat<axis=1>(l, f) [h] i = Reshape(g, five)
        [t] j = Transpose<perm=[0,2,1,3,4]>(i) [u] m = Reshape(j, four) [z] y = Conv(m, o)""",
        w=W,
        v=(4, 4, 1, 1),
        o=(8, 8, 1, 1),
        half=np.int64([4, 4]),
        five=np.int64([-1, 2, 4, 8, 8]),
        four=np.int64([-1, 8, 8, 8]),
    ),
    case(
        "pad and slice",
        f"""[a] c = Conv(x, w) [p] d = Pad(c, p) [s] e = Slice(d, lo, hi, axes)
        [b] y = Conv{PAD}(e, v)""",
        w=W,
        v=V,
        p=np.int64([0, 0, 1, 2, 0, 0, 1, 0]),
        lo=np.int64([0]),
        hi=np.int64([6]),
        axes=np.int64([3]),
        outputs="float[batch,8,8,6] y",
    ),
    case(
        "depthwise",
        f"""[a] c = Conv{PAD}(x, w) [r] d = Relu(c) [b] e = Conv<pads=[1,1,1,1],group=8>(d, v)
        [s] f = Clip(e, lo, hi) [z] y = Conv(f, o)""",
        w=W,
        v=(8, 1, 3, 3),
        o=(8, 8, 1, 1),
        lo=ZERO,
        hi=SIX,
    ),
    case(
        "transposed convolution",
        f"[a] c = Conv{PAD}(x, w) [r] d = Relu(c) [t] y = ConvTranspose<strides=[2,2]>(d, v)",
        "ConvTranspose",
        w=W,
        v=(8, 4, 2, 2),
        outputs="float[batch,4,16,16] y",
        share=8 * 3 * 9 / (8 * 3 * 9 + 8 * 4 * 4),
    ),
    case(
        "attention",
        """[q] q = MatMul(x, wq) [k] k = MatMul(x, wk) [v] v = MatMul(x, wv)
        [t] kt = Transpose<perm=[0,2,1]>(k) [s] s = MatMul(q, kt) [d] sd = Mul(s, scale)
        [f] a = Softmax(sd) [o] y = MatMul(a, v)""",
        "Softmax Mul",
        wq=(16, 16),
        wk=(16, 16),
        wv=(16, 16),
        scale=np.float32(0.25),
        inputs="float[batch,6,16] x",
        outputs="float[batch,6,16] y",
    ),
    case(
        "two outputs",
        f"""[a] y = Conv{PAD}(x, w, b) [r] d = Relu(y) [c] e = Conv(d, v)
        [p] p = GlobalAveragePool(e) [f] z = Flatten(p)""",
        w=W,
        b=B,
        v=(5, 8, 1, 1),
        outputs=f"{OUT}, float[batch,5] z",
    ),
    case(
        "integer and float readers",
        f"[a] c = Conv{PAD}(x, w) [e] z = Exp(c) [b] y = Conv{PAD}(c, v)",
        "Exp",
        w=W,
        v=V,
        outputs=f"{OUT}, float[batch,8,8,8] z",
    ),
    case(
        "weight shared by two convolutions",
        f"""[a] c = Conv{PAD}(x, w) [r] d = Relu(c) [b] e = Conv{PAD}(d, v, b)
        [s] f = Relu(e) [k] y = Conv{PAD}(f, v)""",
        w=W,
        v=V,
        b=B,
    ),
    case(
        "weight shared along two axes",
        "[a] c = Gemm(x, w, b) [r] d = Relu(c) [b] y = Gemm<transB=1>(d, w, k)",
        w=(np.eye(16, 6) * np.geomspace(0.05, 1, 16)[:, None] + 0.02).astype(np.float32),
        b=(6,),
        k=(16,),
        inputs="float[batch,16] x",
        outputs="float[batch,16] y",
    ),
    case(
        "dead channels",
        f"[a] c = Conv{PAD}(x, w, b) [r] d = Relu(c) [b] y = Conv{PAD}(d, v)",
        w=DEAD,
        b=np.float32([0.5, -0.5, 0, 1, 0, 0, 0, 0]),
        v=V,
    ),
    case(
        "bias as a row and as a number",
        "[a] c = Gemm(x, w, b) [r] d = Relu(c) [b] y = Gemm(d, v, k)",
        w=(16, 8),
        b=(1, 8),
        v=(8, 4),
        k=np.float32(0.3),
        inputs="float[batch,16] x",
        outputs="float[batch,4] y",
    ),
    case(
        "gate behind a slice",
        f"""[a] c = Conv{PAD}(x, w) [h] h = HardSigmoid{GATE}(c) [s] s = Slice(h, lo, hi, axes)
        [b] y = Conv{PAD}(s, v)""",
        w=W,
        v=V,
        lo=np.int64([0]),
        hi=np.int64([4]),
        axes=np.int64([3]),
        outputs="float[batch,8,8,4] y",
    ),
    case(
        "gate beside a signed tensor",
        f"""[a] c = Conv{PAD}(x, w) [h] h = HardSigmoid{GATE}(c) [b] e = Conv{PAD}(x, v)
        [k] k = Concat<axis=1>(h, e) [z] y = Conv(k, o)""",
        w=W,
        v=(8, 3, 3, 3),
        o=(8, 16, 1, 1),
    ),
    case("gate as output", f"[a] c = Conv{PAD}(x, w) [h] y = HardSigmoid{GATE}(c)", w=W),
    case("reshaped input", f"[r] r = Reshape(x, s) [a] y = Conv{PAD}(r, w)", w=W,
         s=np.int64([-1, 3, 8, 8]), inputs="float[batch,192] x"),
)  # fmt: skip


@dataclass
class Quantized:
    case: Case
    model: Model
    done: Model
    plan: QuantPlan
    inputs: Arrays
    expected: Arrays
    engine: Engine
    outputs: Arrays = field(init=False)

    def __post_init__(self) -> None:
        self.outputs = self.engine(self.inputs)

    def step(self, name: str) -> float:
        """One integer of an output; of 255 over its range where it is not quantized."""
        params = self.plan.activations.get(name)
        array = self.expected[name]
        return float(params.scale if params else (array.max() - array.min()) / 255)


def quantize(model: Model, inputs: Arrays, **options: Any) -> Model:
    data = load_data(inputs, model.inputs)
    context = Context(target=TARGET, original=model, calibration=data)
    return Quantize(method="minmax", **options).apply(model, context)


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case.name)
def quantized(request: pytest.FixtureRequest, onnx_model: Callable[..., Model]) -> Quantized:
    one: Case = request.param
    model = onnx_model(f"g ({one.inputs}) => ({one.outputs}) {{{one.body}}}", **one.weights)
    inputs = model.example(32, seed=1)
    expected = run(reference_session(model.graph_model), inputs)
    done = quantize(model, inputs)
    plan = QuantPlan.from_dict(done.history[-1].details["plan"])
    return Quantized(one, model, done, plan, inputs, expected, TARGET.build(done))


def sqnr_db(expected: np.ndarray, got: np.ndarray) -> float:
    signal = np.square(expected, dtype=np.float64).sum()
    return float(10 * np.log10(signal / np.square(expected - got, dtype=np.float64).sum()))


def test_outputs_stay_close_under_their_names(quantized: Quantized) -> None:
    assert list(quantized.outputs) == list(quantized.expected)
    for name, array in quantized.expected.items():
        assert sqnr_db(array, quantized.outputs[name]) > 25


def test_every_multiply_accumulate_runs_in_int8(quantized: Quantized) -> None:
    kernels = quantized.engine.kernels()
    share = int8_share(kernels, graph_sites(quantized.model.graph_model))
    assert share == pytest.approx(quantized.case.share)
    left = {kernel.op_type for kernel in kernels if kernel.precision == "float32"}
    assert left <= quantized.case.floats


def test_fused_kernels_compute_what_is_written(quantized: Quantized) -> None:
    written = run(reference_session(quantized.done.graph_model), quantized.inputs)
    for name, array in written.items():
        np.testing.assert_allclose(
            quantized.outputs[name], array, rtol=0, atol=2.01 * quantized.step(name)
        )


def test_the_float_model_is_not_changed(quantized: Quantized) -> None:
    again = run(reference_session(quantized.model.graph_model), quantized.inputs)
    for name, array in quantized.expected.items():
        np.testing.assert_array_equal(again[name], array)


def test_every_operator_is_quantized_or_has_a_reason(quantized: Quantized) -> None:
    names = {node.name for node in quantized.model.graph_model.graph}
    assert set(quantized.plan.roles) | set(quantized.plan.reasons) == names
    assert not set(quantized.plan.roles) & set(quantized.plan.reasons)


def by_name(name: str) -> Case:
    return next(one for one in CASES if one.name == name)


def identity_gate(onnx_model: Callable[..., Model], op: str) -> tuple[np.ndarray, Quantized]:
    """A gate behind a 1x1 convolution that changes nothing, on inputs from -6 to 6."""
    body = f"[a] c = Conv(x, w) [h] y = {op}(c)"
    weights = {"w": np.ones((1, 1, 1, 1), np.float32)}
    io = ("float[batch,1,4,5] x", "float[batch,1,4,5] y")
    model = onnx_model(f"g ({io[0]}) => ({io[1]}) {{{body}}}", **weights)
    x = np.linspace(-6, 6, 4000, dtype=np.float32).reshape(-1, 1, 4, 5)
    done = quantize(model, {"x": x})
    plan = QuantPlan.from_dict(done.history[-1].details["plan"])
    one = Case(op, body, weights, *io)
    return x, Quantized(one, model, done, plan, {"x": x}, {"y": x}, TARGET.build(done))


def test_hardswish_in_integers_equals_its_formula(onnx_model: Callable[..., Model]) -> None:
    x, got = identity_gate(onnx_model, "HardSwish")
    formula = x * np.clip(x + 3, 0, 6) / 6
    step_in = float(got.plan.activations["c"].scale)
    # 1.5 is the steepest slope of hardswish; the input is off by half a step of each of two
    # grids (that of the graph's input and that of the gate).
    bound = got.step("y") + 1.5 * (step_in + float(got.plan.activations["x"].scale)) / 2
    assert np.abs(got.outputs["y"] - formula).max() <= bound


def test_hardsigmoid_in_integers_equals_its_formula(onnx_model: Callable[..., Model]) -> None:
    x, got = identity_gate(onnx_model, f"HardSigmoid{GATE}")
    formula = np.clip(x + 3, 0, 6) / 6
    step_in = float(got.plan.activations["c"].scale) + float(got.plan.activations["x"].scale)
    assert np.abs(got.outputs["y"] - formula).max() <= 1 / 255 + step_in / 2 / 6
    assert got.outputs["y"].min() == 0
    assert got.outputs["y"].max() == pytest.approx(1)


@pytest.mark.parametrize(
    ("activation", "low", "high"),
    [("Relu(c)", 0.0, np.inf), ("Clip(c, lo, hi)", -0.5, 0.5)],
    ids=["relu", "clip"],
)
def test_an_activation_holds_beside_a_wide_signed_tensor(
    onnx_model: Callable[..., Model], activation: str, low: float, high: float
) -> None:
    body = f"""[a] c = Conv{PAD}(x, w) [r] d = {activation} [b] e = Conv{PAD}(x, v)
    [k] y = Concat<axis=1>(d, e)"""
    bounds = {"lo": np.float32(-0.5), "hi": np.float32(0.5)} if "Clip" in activation else {}
    wide = np.random.default_rng(3).normal(0, 2, (8, 3, 3, 3)).astype(np.float32)
    text = f"g ({IN}) => (float[batch,16,8,8] y) {{{body}}}"
    model = onnx_model(text, w=W, v=wide, **bounds)
    inputs = model.example(16)
    done = quantize(model, inputs)
    kept = TARGET.build(done)(inputs)["y"][:, :8]
    step = QuantPlan.from_dict(done.history[-1].details["plan"]).activations["y"].scale / 2
    assert kept.min() >= low - (step if low else 0)
    assert kept.max() <= high + step


def test_a_scale_shared_with_a_wider_tensor_is_still_clipped() -> None:
    params = QParams(QuantSpec("uint8", symmetric=False), np.asarray(0.1), np.asarray(100))
    limits = integer_limits((0.0, 6.0), params)
    assert limits is not None
    assert (int(limits["low"]), int(limits["high"])) == (100, 160)
    assert integer_limits((-50.0, np.inf), params) is None


@given(
    scale=st.floats(1e-3, 1),
    zero=st.integers(0, 255),
    low=st.floats(-100, 0),
    width=st.floats(0, 200),
)
def test_integer_limits_saturate_as_the_float_bounds_do(
    scale: float, zero: int, low: float, width: float
) -> None:
    params = QParams(QuantSpec("uint8", symmetric=False), np.asarray(scale), np.asarray(zero))
    high = max(low + width, 0.0)
    limits = integer_limits((low, high), params)
    grid = np.arange(256)
    clipped = grid if limits is None else np.clip(grid, limits["low"], limits["high"])
    step = float(params.scale)
    reals = (clipped - zero) * step
    exact = np.clip((grid - zero) * step, low, high)
    assert np.abs(reals - exact).max() <= step / 2 * (1 + 1e-5)


def test_a_transposed_convolution_says_why_it_is_float(onnx_model: Callable[..., Model]) -> None:
    one = by_name("transposed convolution")
    model = onnx_model(f"g ({one.inputs}) => ({one.outputs}) {{{one.body}}}", **one.weights)
    done = quantize(model, model.example(4))
    reason = done.history[-1].details["reasons"]["t"]
    assert reason == "the target has no int8 kernel for ConvTranspose"


def test_max_pool_with_indices_keeps_them(onnx_model: Callable[..., Model]) -> None:
    model = onnx_model(
        f"""g ({IN}) => (float[batch,8,4,4] y, int64[batch,8,4,4] i) {{
        [a] c = Conv{PAD}(x, w) [p] y, i = MaxPool<kernel_shape=[2,2],strides=[2,2]>(c) }}""",
        w=W,
    )
    inputs = model.example(4)
    expected = run(reference_session(model.graph_model), inputs)
    got = TARGET.build(quantize(model, inputs))(inputs)
    assert got["i"].dtype == np.int64
    assert (got["i"] == expected["i"]).mean() > 0.95


def test_operators_stay_in_float_on_request(onnx_model: Callable[..., Model]) -> None:
    one = by_name("residual")
    model = onnx_model(f"g ({one.inputs}) => ({one.outputs}) {{{one.body}}}", **one.weights)
    done = quantize(model, model.example(4), keep_float=("b",))
    kernels = TARGET.build(done).kernels()
    assert {k.site for k in kernels if k.precision == "float32"} >= {"b"}
    assert done.history[-1].details["reasons"]["b"] == "kept in float on request"


def test_names_of_the_file_are_not_needed(onnx_model: Callable[..., Model]) -> None:
    body = f"c = Conv{PAD}(x, w) d = Relu(c) e = Conv{PAD}(d, v) y = Relu(e)"
    model = onnx_model(f"g ({IN}) => ({OUT}) {{{body}}}", w=W, v=V)
    inputs = model.example(8)
    expected = run(reference_session(model.graph_model), inputs)
    assert sqnr_db(expected["y"], TARGET.build(quantize(model, inputs))(inputs)["y"]) > 25


def test_shapes_of_the_file_are_not_needed(onnx_model: Callable[..., Model]) -> None:
    body = f"[a] c = Conv{PAD}(x, w) [r] d = Relu(c) [b] y = Conv{PAD}(d, v)"
    model = onnx_model(f"g ({IN}) => ({OUT}) {{{body}}}", infer=False, w=W, v=V)
    engine = TARGET.build(quantize(model, model.example(8)))
    assert int8_share(engine.kernels(), graph_sites(model.graph_model)) == 1.0


def test_bounds_may_be_constant_nodes(onnx_model: Callable[..., Model]) -> None:
    body = f"""lo = Constant<value = float {{0.0}}>() hi = Constant<value = float {{6.0}}>()
    [a] c = Conv{PAD}(x, w) [r] d = Clip(c, lo, hi) [b] y = Conv{PAD}(d, v)"""
    model = onnx_model(f"g ({IN}) => ({OUT}) {{{body}}}", w=W, v=V)
    done = quantize(model, model.example(8))
    assert done.history[-1].details["plan"]["roles"].get("r") == "activation"
