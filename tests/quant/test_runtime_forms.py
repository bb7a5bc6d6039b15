"""What each runtime makes of a plan: read from its optimized graph, for every pattern it claims."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from compress.data import load_data
from compress.machine import this_machine
from compress.model import Arrays, Model
from compress.passes import Context
from compress.reference import reference_session, run
from compress.target import Engine, Target
from quant.placement import find_pattern
from quant.plan import QuantPlan
from quant.ptq import Quantize
from targets.onnxruntime import PATTERNS as ONNXRUNTIME_PATTERNS
from targets.onnxruntime import OnnxRuntime
from targets.openvino import PATTERNS as OPENVINO_PATTERNS
from targets.openvino import OpenVINO

RUNTIMES: dict[str, Target] = {
    "openvino": OpenVINO(threads=1),
    "onnxruntime": OnnxRuntime(threads=1),
}
PAD = "<pads=[1,1,1,1]>"
GATE = "<alpha=0.16666667,beta=0.5>"
IMAGE, SAME = "float[batch,16,8,8] x", "16,8,8"
TOKENS = "float[batch,6,32] x"
W, V = (16, 16, 3, 3), (16, 16, 3, 3)


@dataclass(frozen=True)
class Form:
    """A graph, and what the runtimes must make of it.

    Attributes:
        name: of the test.
        body: operators as ONNX text.
        weights: arrays, or shapes of random ones.
        openvino: names of the operators that have an int8 kernel of their own; `*` marks float32.
        onnxruntime: the same.
        quantized: tensors with Q/DQ behind them in the graph for OpenVINO.
        converts: conversions between the first and the last kernel, by runtime.
        inputs: of the graph.
        outputs: axes of y behind the batch.
    """

    name: str
    body: str
    weights: dict[str, Any]
    openvino: str
    onnxruntime: str
    quantized: str
    converts: dict[str, int]
    inputs: str = IMAGE
    outputs: str = SAME

    def model(self, build: Callable[..., Model]) -> Model:
        text = f"g ({self.inputs}) => (float[batch,{self.outputs}] y) {{{self.body}}}"
        return build(text, **self.weights)


def form(
    name: str,
    body: str,
    *,
    openvino: str = "a z",
    onnxruntime: str = "a z",
    quantized: str = "x d y",
    inputs: str = IMAGE,
    outputs: str = SAME,
    converts: dict[str, int] | None = None,
    **weights: Any,
) -> Form:
    known = (openvino, onnxruntime, quantized, converts or {})
    return Form(name, body, weights, *known, inputs, outputs)


def behind(op: str, onnxruntime: str, openvino: str = "a z", **rest: Any) -> Form:
    """An activation between two convolutions."""
    body = f"[a] c = Conv{PAD}(x, w) [t] d = {op} [z] y = Conv{PAD}(d, v)"
    name = f"conv and {op.partition('(')[0].partition('<')[0]}"
    return form(name, body, onnxruntime=onnxruntime, openvino=openvino, **{"w": W, "v": V, **rest})


def moved(op: str, outputs: str, **rest: Any) -> Form:
    """Something that moves values between two convolutions."""
    body = f"[a] c = Conv{PAD}(x, w) [r] d = Relu(c) [o] e = {op} [z] y = Conv{PAD}(e, v)"
    name = f"behind int8: {op.partition('(')[0].partition('<')[0]}"
    return form(name, body, outputs=outputs, **{"w": W, "v": V, **rest})


FLOAT_IN_ORT: dict[str, Any] = {"onnxruntime": "a t* z", "converts": {"onnxruntime": 2}}

FORMS = (
    behind("Relu(c)", "a z"),
    behind("Clip(c, lo, hi)", "a z", lo=np.float32(0), hi=np.float32(6)),
    behind("Sigmoid(c)", "a t z"),
    behind("LeakyRelu<alpha=0.1>(c)", "a t z"),
    behind("HardSwish(c)", "a t/clip t z"),
    behind("Gelu(c)", **FLOAT_IN_ORT),
    behind("Tanh(c)", **FLOAT_IN_ORT),
    behind("Elu(c)", **FLOAT_IN_ORT),
    behind(f"HardSigmoid{GATE}(c)", "a z"),
    form(
        "conv and swish",
        f"[a] c = Conv{PAD}(x, w) [s] s = Sigmoid(c) [m] d = Mul(c, s) [z] y = Conv{PAD}(d, v)",
        onnxruntime="a s m z",
        w=W,
        v=V,
    ),
    form(
        "squeeze and excitation",
        f"""[a] c = Conv{PAD}(x, w) [r] d = Relu(c) [p] p = GlobalAveragePool(d)
        [f] f = Conv(p, s) [g] g = Relu(f) [e] e = Conv(g, u) [h] h = Sigmoid(e)
        [m] m = Mul(d, h) [z] y = Conv{PAD}(m, v)""",
        # Neither e nor h: the gate stays float between the two int8 kernels.
        quantized="x d p g m y",
        openvino="a p f e m z",
        onnxruntime="a p f e h m z",
        w=W,
        v=V,
        s=(4, 16, 1, 1),
        u=(16, 4, 1, 1),
    ),
    form(
        "residual block",
        f"""[i] i = Conv{PAD}(x, k) [j] j = Relu(i) [a] c = Conv{PAD}(j, w) [r] d = Relu(c)
        [b] e = Conv{PAD}(d, v) [s] s = Add(e, j) [t] t = Relu(s) [z] y = Conv{PAD}(t, k)""",
        quantized="x j d e t y",
        openvino="i a b z",
        onnxruntime="i a b s z",
        k=W,
        w=W,
        v=V,
    ),
    form(
        "sum of an operator's own input",
        f"""[a] c = Conv{PAD}(x, w) [r] d = Relu(c) [b] e = Conv{PAD}(d, v) [s] s = Add(d, e)
        [t] t = Relu(s) [z] y = Conv{PAD}(t, k)""",
        quantized="x d e t y",
        openvino="a b s z",
        onnxruntime="a b s z",
        k=W,
        w=W,
        v=V,
    ),
    form(
        "concat of branches",
        f"""[a] c = Conv{PAD}(x, w) [r] d = Relu(c) [b] e = Conv{PAD}(d, v) [s] f = Relu(e)
        [g] g = Conv{PAD}(d, u) [h] h = Relu(g) [k] k = Concat<axis=1>(f, h)
        [z] y = Conv{PAD}(k, w)""",
        # Not k: the branches share a scale, which OpenVINO carries through.
        quantized="x d f h y",
        openvino="a b g z",
        onnxruntime="a b g k z",
        w=W,
        v=(8, 16, 3, 3),
        u=(8, 16, 3, 3),
    ),
    form(
        "concat of a rectified and a signed branch",
        f"""[a] c = Conv{PAD}(x, w) [r] d = Relu(c) [b] e = Conv{PAD}(d, v)
        [k] k = Concat<axis=1>(d, e) [z] y = Conv{PAD}(k, w)""",
        # OpenVINO shares one scale; with two it would convert every branch again.
        quantized="x d e y",
        openvino="a b z",
        onnxruntime="a b k z",
        outputs="8,8,8",
        w=(8, 16, 3, 3),
        v=(8, 8, 3, 3),
    ),
    form(
        "concat and BatchNormalization",
        f"""[a] c = Conv{PAD}(x, w) [b] f = Conv{PAD}(c, v) [k] k = Concat<axis=1>(f, c)
        [n] n = BatchNormalization(k, gamma, beta, mean, var) [r] r = Relu(n)
        [z] y = Conv{PAD}(r, w)""",
        # Neither k nor n: scale and shift happen on the way to the convolution's input.
        quantized="x c f r y",
        openvino="a b z",
        onnxruntime="a b k n* z",
        converts={"onnxruntime": 2, "openvino": 1},
        w=(8, 16, 3, 3),
        v=(8, 8, 3, 3),
        gamma=(16,),
        beta=(16,),
        mean=(16,),
        var=np.ones(16, np.float32),
        outputs="8,8,8",
    ),
    form(
        "two halves",
        f"""[a] c = Conv{PAD}(x, w) [r] d = Relu(c) [o] l, e = Split<axis=1>(d, half)
        [b] f = Conv{PAD}(l, v) [s] g = Relu(f) [k] h = Conv{PAD}(e, v) [t] i = Relu(h)
        [m] j = Concat<axis=1>(g, i) [z] y = Conv{PAD}(j, w)""",
        quantized="x d g i y",
        openvino="a b k z",
        onnxruntime="a b k m z",
        w=W,
        v=(8, 8, 3, 3),
        half=np.int64([8, 8]),
    ),
    moved("Reshape(d, to)", "16,4,16", to=np.int64([-1, 16, 4, 16])),
    moved("Transpose<perm=[0,1,3,2]>(d)", SAME),
    moved("Gather<axis=1>(d, ids)", SAME, ids=np.arange(8), v=(16, 8, 3, 3)),
    moved(
        "Slice(d, lo, hi, axes)",
        "16,8,6",
        lo=np.int64([0]),
        hi=np.int64([6]),
        axes=np.int64([3]),
    ),
    # OpenVINO lets the convolution pad.
    moved("Pad(d, to)", "16,10,10", to=np.int64([0, 0, 1, 1, 0, 0, 1, 1])),
    moved(
        'Resize<mode="nearest",coordinate_transformation_mode="asymmetric",nearest_mode="floor">'
        "(d, , by)",
        "16,16,16",
        by=np.float32([1, 1, 2, 2]),
    ),
    moved(
        "MaxPool<kernel_shape=[2,2],strides=[2,2]>(d)",
        "16,4,4",
        openvino="a o z",
        onnxruntime="a o z",
    ),
    moved(
        "AveragePool<kernel_shape=[2,2],strides=[2,2]>(d)",
        "16,4,4",
        quantized="x d e y",
        openvino="a o z",
        onnxruntime="a o z",
    ),
    form(
        "behind int8: Flatten",
        f"""[a] c = Conv{PAD}(x, w) [r] d = Relu(c) [p] p = GlobalAveragePool(d)
        [o] e = Flatten(p) [z] y = Gemm(e, v)""",
        quantized="x d p",
        openvino="a p z",
        onnxruntime="a p z",
        outputs="8",
        w=W,
        v=(16, 8),
    ),
    form(
        "behind int8: Squeeze",
        f"""[a] c = Conv{PAD}(x, w) [r] d = Relu(c) [p] p = GlobalAveragePool(d)
        [o] e = Squeeze(p, axes) [z] y = MatMul(e, v)""",
        quantized="x d p",
        openvino="a p z",
        onnxruntime="a p z",
        outputs="8",
        w=W,
        v=(16, 8),
        axes=np.int64([2, 3]),
    ),
    form(
        "behind int8: Unsqueeze",
        f"""[a] c = MatMul(x, w) [r] d = Relu(c) [o] e = Unsqueeze(d, axes)
        [z] y = Conv{PAD}(e, v)""",
        inputs=TOKENS,
        outputs="4,6,32",
        w=(32, 32),
        v=(4, 1, 3, 3),
        axes=np.int64([1]),
    ),
    form(
        "channel shuffle",
        f"""[a] c = Conv{PAD}(x, w) [r] d = Relu(c) [h] i = Reshape(d, five)
        [t] j = Transpose<perm=[0,2,1,3,4]>(i) [u] m = Reshape(j, four) [z] y = Conv{PAD}(m, v)""",
        # Q/DQ behind the Transpose, unlike behind any other; see `OPENVINO_PATTERNS`.
        quantized="x d j y",
        w=W,
        v=V,
        five=np.int64([-1, 2, 8, 8, 8]),
        four=np.int64([-1, 16, 8, 8]),
    ),
    form(
        "matrix product and gelu",
        "[a] c = MatMul(x, w) [t] d = Gelu(c) [z] y = MatMul(d, v)",
        quantized="x d",
        onnxruntime="a t* z",
        converts={"onnxruntime": 1},
        inputs=TOKENS,
        outputs="6,32",
        w=(32, 64),
        v=(64, 32),
    ),
)  # fmt: skip


@dataclass
class Ran:
    """A form in one runtime."""

    form: Form
    runtime: str
    model: Model
    done: Model
    engine: Engine
    inputs: Arrays

    @property
    def expected(self) -> set[tuple[str, str]]:
        names = getattr(self.form, self.runtime).split()
        return {(n.rstrip("*"), "float32" if n.endswith("*") else "int8") for n in names}


def quantize(model: Model, target: Target) -> tuple[Model, Arrays]:
    inputs = model.example(32, seed=1)
    data = load_data(inputs, model.inputs)
    context = Context(target=target, original=model, calibration=data)
    return Quantize(method="minmax").apply(model, context), inputs


def plan_of(model: Model) -> QuantPlan:
    return QuantPlan.from_dict(model.history[-1].details["plan"])


def require(runtime: str) -> Target:
    if not this_machine().is_x86:
        pytest.skip("The facts were read on x86; other CPUs have other kernels.")
    if runtime == "openvino":
        pytest.importorskip("openvino")
    return RUNTIMES[runtime]


@pytest.fixture(scope="module", params=RUNTIMES)
def runtime(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    require(name)
    return name


@pytest.fixture(scope="module", params=FORMS, ids=lambda one: one.name)
def ran(request: pytest.FixtureRequest, runtime: str, onnx_model: Callable[..., Model]) -> Ran:
    one: Form = request.param
    model = one.model(onnx_model)
    done, inputs = quantize(model, RUNTIMES[runtime])
    return Ran(one, runtime, model, done, RUNTIMES[runtime].build(done), inputs)


def test_the_runtime_has_these_kernels_and_no_others(ran: Ran) -> None:
    made = {
        (kernel.site, kernel.precision)
        for kernel in ran.engine.kernels()
        if kernel.precision not in ("move", "convert")
    }
    assert made == ran.expected


def test_nothing_is_converted_between_int8_kernels(ran: Ran) -> None:
    precisions = [kernel.precision for kernel in ran.engine.kernels()]
    first = precisions.index("int8")
    last = len(precisions) - precisions[::-1].index("int8")
    between = precisions[first:last].count("convert")
    assert between == ran.form.converts.get(ran.runtime, 0)


def test_outputs_stay_close_to_those_of_the_float_model(ran: Ran) -> None:
    expected = run(reference_session(ran.model.graph_model), ran.inputs)["y"].astype(np.float64)
    noise = expected - ran.engine(ran.inputs)["y"]
    assert 10 * np.log10(np.square(expected).sum() / np.square(noise).sum()) > 25


def quantized_tensors(model: Model) -> set[str]:
    """What a QuantizeLinear reads."""
    values = [n.inputs[0] for n in model.graph_model.graph if n.op_type == "QuantizeLinear"]
    return {str(v.name).removesuffix("/float") for v in values if v is not None}


@pytest.mark.parametrize("one", FORMS, ids=lambda one: one.name)
def test_the_graph_for_openvino_has_no_other_conversions(
    one: Form, onnx_model: Callable[..., Model]
) -> None:
    done, _ = quantize(one.model(onnx_model), RUNTIMES["openvino"])
    assert quantized_tensors(done) == set(one.quantized.split())


@pytest.mark.parametrize(
    ("runtime", "patterns"),
    [("openvino", OPENVINO_PATTERNS), ("onnxruntime", ONNXRUNTIME_PATTERNS)],
    ids=["openvino", "onnxruntime"],
)
def test_every_pattern_has_a_form(
    runtime: str, patterns: tuple[Any, ...], onnx_model: Callable[..., Model]
) -> None:
    find = functools.partial(find_pattern, capabilities=RUNTIMES[runtime].capabilities)
    nodes = [node for one in FORMS for node in one.model(onnx_model).graph_model.graph]
    used = {found.op for node in nodes if (found := find(node)) is not None}
    assert used == {pattern.op for pattern in patterns}


ATTENTION = f"""g ({TOKENS}) => (float[batch,6,32] y) {{
    [q] q = MatMul(x, wq) [k] k = MatMul(x, wk) [v] v = MatMul(x, wv)
    [t] kt = Transpose<perm=[0,2,1]>(k) [s] s = MatMul(q, kt) [d] sd = Mul(s, scale)
    [f] a = Softmax(sd) [o] y = MatMul(a, v)}}"""
BOTH = f"""g ({IMAGE}) => (float[batch,16,8,4] y, float[batch,16,8,8] z) {{
    [a] c = Conv{PAD}(x, w) [b] y = MatMul(c, v) [e] z = Conv{PAD}(c, k)}}"""


@pytest.mark.parametrize(("runtime", "two_signs"), [("openvino", "int8"), ("onnxruntime", "uint8")])
def test_operands_of_matrix_products(
    runtime: str, two_signs: str, onnx_model: Callable[..., Model]
) -> None:
    weights = {"wq": (32, 32), "wk": (32, 32), "wv": (32, 32), "scale": np.float32(0.2)}
    done, _ = quantize(onnx_model(ATTENTION, **weights), RUNTIMES[runtime])
    found = plan_of(done).activations
    for name in ("x", "q", "k", "kt", "v"):
        assert found[name].spec.dtype == two_signs
        assert (int(found[name].zero_point) == 0) == (two_signs == "int8")
    assert found["k"] == found["kt"]
    # A softmax is not negative: unsigned, with nothing lost to the zero point.
    assert (found["a"].spec.dtype, int(found["a"].zero_point)) == ("uint8", 0)


@pytest.mark.parametrize("runtime", list(RUNTIMES))
def test_the_output_of_a_relu_stays_unsigned(
    runtime: str, onnx_model: Callable[..., Model]
) -> None:
    body = "[a] c = MatMul(x, w) [r] d = Relu(c) [z] y = MatMul(d, v)"
    model = onnx_model(f"g ({TOKENS}) => (float[batch,6,32] y) {{{body}}}", w=(32, 64), v=(64, 32))
    found = plan_of(quantize(model, RUNTIMES[runtime])[0]).activations["d"]
    assert (found.spec.dtype, int(found.zero_point)) == ("uint8", 0)


def test_what_a_convolution_reads_too_is_not_symmetric(onnx_model: Callable[..., Model]) -> None:
    model = onnx_model(BOTH, w=W, v=(8, 4), k=V)
    found = plan_of(quantize(model, RUNTIMES["openvino"])[0]).activations
    assert found["c"].spec.dtype == "uint8"
    assert int(found["c"].zero_point) > 0


def test_attention_runs_in_int8_in_openvino(onnx_model: Callable[..., Model]) -> None:
    target = require("openvino")
    weights = {"wq": (32, 32), "wk": (32, 32), "wv": (32, 32), "scale": np.float32(0.2)}
    model = onnx_model(ATTENTION, **weights)
    done, inputs = quantize(model, target)
    engine = target.build(done)
    made = {(k.site, k.precision) for k in engine.kernels() if k.precision not in ("convert",)}
    # One kernel computes all from the scores on; it is called after the last product.
    assert made == {(name, "int8") for name in "qkvo"}
    expected = run(reference_session(model.graph_model), inputs)["y"]
    noise = expected - engine(inputs)["y"]
    assert np.square(noise).sum() < 10**-2.5 * np.square(expected).sum()
