"""Networks as TensorRT wants them, in int8 and half precision, checked and run elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir
import pytest
from onnx.reference import ReferenceEvaluator

from compress.data import load_data
from compress.errors import UnsupportedError
from compress.half import to_half
from compress.model import Arrays, Model
from compress.passes import Context
from compress.reference import reference_session, run
from compress.target import Capabilities, Check, Engine
from quant.plan import QuantPlan
from quant.ptq import Quantize
from targets.gpu import Gpu
from targets.onnxruntime import OnnxRuntime
from targets.tensorrt_capabilities import PATTERNS, tensorrt_capabilities
from targets.tensorrt_graph import WEIGHTED
from targets.tensorrt_rules import check

IMAGE, MAPS = "float[2,3,8,8] x", "float[2,8,8,8] y"
PAD = "<pads=[1,1,1,1]>"
GATE = "<alpha=0.16666667,beta=0.5>"
W, V, B = (8, 3, 3, 3), (8, 8, 3, 3), (8,)


@dataclass(frozen=True)
class Checked:
    """TensorRT's capabilities; what is built for them here runs in ONNX Runtime."""

    gpu: Gpu | None = None
    name: ClassVar[str] = "tensorrt"

    @property
    def capabilities(self) -> Capabilities:
        return tensorrt_capabilities(self.gpu)

    def check(self) -> Check:
        return Check(available=True)

    def build(self, model: Model) -> Engine:
        return OnnxRuntime(threads=1).build(model)

    def load(self, directory: Path) -> Engine:
        return OnnxRuntime(threads=1).load(directory)


@dataclass(frozen=True)
class Case:
    name: str
    body: str
    weights: dict[str, Any]
    inputs: str = IMAGE
    outputs: str = MAPS


def case(name: str, body: str, inputs: str = IMAGE, outputs: str = MAPS, **weights: Any) -> Case:
    return Case(name, body, weights, inputs, outputs)


CASES = (
    case(
        "residual",
        f"""[a] c = Conv{PAD}(x, w, b) [r] d = Relu(c) [b] e = Conv{PAD}(d, v, k)
        [s] s = Add(e, d) [t] f = Relu(s) [z] y = Conv(f, o)""",
        w=W, b=B, v=V, k=B, o=(8, 8, 1, 1),
    ),
    case(
        "residual with projection",
        f"""[a] c = Conv{PAD}(x, w) [r] d = Relu(c) [b] e = Conv{PAD}(d, v)
        [p] q = Conv(d, u) [s] s = Add(e, q) [t] f = Relu(s) [z] y = Conv(f, o)""",
        w=W, v=V, u=(8, 8, 1, 1), o=(8, 8, 1, 1),
    ),
    case(
        "sum of tensors with other readers",
        f"""[a] c = Conv{PAD}(x, w) [b] e = Conv{PAD}(c, v) [s] s = Add(c, e)
        [g] h = Conv(e, u) [z] i = Conv(s, o) [k] y = Concat<axis=1>(h, i)""",
        w=W, v=V, u=(4, 8, 1, 1), o=(4, 8, 1, 1),
    ),
    case(
        "concat of branches",
        f"""[a] c = Conv{PAD}(x, w) [r] d = Relu(c) [b] e = Conv(d, v) [s] e1 = Relu(e)
        [g] f = Conv{PAD}(d, u) [p] q = MaxPool<kernel_shape=[3,3],pads=[1,1,1,1]>(d)
        [k] k = Concat<axis=1>(e1, f, q) [z] y = Conv(k, o)""",
        w=W, v=(4, 8, 1, 1), u=(4, 8, 3, 3), o=(8, 16, 1, 1),
    ),
    case(
        "depthwise",
        f"""[a] c = Conv{PAD}(x, w, b) [r] d = Clip(c, lo, hi)
        [b] e = Conv<pads=[1,1,1,1],group=8>(d, v) [s] f = Relu(e) [z] y = Conv(f, o)""",
        w=W, b=B, v=(8, 1, 3, 3), o=(8, 8, 1, 1), lo=np.float32(0), hi=np.float32(6),
    ),
    case(
        "transposed convolution",
        f"""[a] c = Conv{PAD}(x, w) [r] d = Relu(c) [t] e = ConvTranspose<strides=[2,2]>(d, v, k)
        [s] f = Relu(e) [g] y = ConvTranspose<strides=[2,2]>(f, u)""",
        outputs="float[2,3,32,32] y", w=W, v=(8, 4, 2, 2), k=(4,), u=(4, 3, 2, 2),
    ),
    case(
        "global pool and gemm",
        f"""[a] c = Conv{PAD}(x, w) [r] d = Relu(c) [p] p = GlobalAveragePool(d) [f] f = Flatten(p)
        [g] g = Gemm<transB=1>(f, v, b) [s] h = Relu(g) [o] y = Gemm(h, u, k)""",
        outputs="float[2,10] y", w=W, v=(16, 8), b=(16,), u=(16, 10), k=(10,),
    ),
    case(
        "attention",
        """[n] m = LayerNormalization(x, g, h) [q] q0 = MatMul(m, wq) [bq] q = Add(q0, b)
        [k] k = MatMul(m, wk) [v] v = MatMul(m, wv) [t] kt = Transpose<perm=[0,2,1]>(k)
        [s] s = MatMul(q, kt) [d] sd = Mul(s, scale) [f] a = Softmax(sd) [o] o = MatMul(a, v)
        [p] p = MatMul(o, wo) [bp] p1 = Add(p, b) [r] r = Add(x, p1)
        [n2] m2 = LayerNormalization(r, g, h) [u] u = MatMul(m2, wu) [bu] u1 = Add(bw, u)
        [e] e = Gelu(u1) [z] z = MatMul(e, wz) [bz] z1 = Add(z, b) [y] y = Add(r, z1)""",
        inputs="float[2,6,16] x", outputs="float[2,6,16] y",
        g=np.ones(16, np.float32), h=(16,), wq=(16, 16), wk=(16, 16), wv=(16, 16), wo=(16, 16),
        wu=(16, 32), bw=(32,), wz=(32, 16), b=(16,), scale=np.float32(0.25),
    ),
    case(
        "squeeze and excitation with hardswish",
        f"""[a] c = Conv{PAD}(x, w, b) [h] d = HardSwish(c) [p] p = GlobalAveragePool(d)
        [f] f = Conv(p, v) [g] g = Relu(f) [e] e = Conv(g, u) [s] s = HardSigmoid{GATE}(e)
        [m] m = Mul(s, d) [z] y = Conv(m, o)""",
        w=W, b=B, v=(4, 8, 1, 1), u=(8, 4, 1, 1), o=(8, 8, 1, 1),
    ),
    case(
        "silu",
        f"""[a] c = Conv{PAD}(x, w) [s] s = Sigmoid(c) [m] d = Mul(c, s) [z] y = Conv{PAD}(d, v)""",
        w=W, v=V,
    ),
    case(
        "channel shuffle",
        f"""[a] c = Conv{PAD}(x, w) [r] d = Relu(c) [s] l, e = Split<axis=1>(d, half)
        [b] f = Conv(e, v) [k] g = Concat<axis=1>(l, f) [h] i = Reshape(g, five)
        [t] j = Transpose<perm=[0,2,1,3,4]>(i) [u] m = Reshape(j, four) [z] y = Conv(m, o)""",
        w=W, v=(4, 4, 1, 1), o=(8, 8, 1, 1), half=np.int64([4, 4]),
        five=np.int64([-1, 2, 4, 8, 8]), four=np.int64([-1, 8, 8, 8]),
    ),
    case(
        "resize and padding",
        """[a] c = Conv<strides=[2,2],pads=[1,1,1,1]>(x, w) [r] d = Relu(c)
        [s] e = Resize<mode="nearest",coordinate_transformation_mode="asymmetric",
        nearest_mode="floor">(d, , s) [p] f = Pad(e, p) [b] y = Conv(f, v)""",
        w=W, v=V, s=np.float32([1, 1, 2, 2]), p=np.int64([0, 0, 1, 1, 0, 0, 1, 1]),
    ),
    case(
        "normalization behind a concat",
        f"""[a] c = Conv{PAD}(x, w) [r] d = Relu(c) [b] e = Conv{PAD}(d, v)
        [k] k = Concat<axis=1>(d, e) [n] n = BatchNormalization(k, g, h, m, s) [q] q = Relu(n)
        [z] y = Conv(q, o)""",
        w=W, v=V, o=(8, 16, 1, 1), g=np.full(16, 0.9, np.float32), h=(16,),
        m=(16,), s=np.linspace(0.5, 2, 16, dtype=np.float32),
    ),
    case(
        "dead channels",
        f"[a] c = Conv{PAD}(x, w, b) [r] d = Relu(c) [b] y = Conv{PAD}(d, v)",
        w=np.concatenate([np.full((2, 3, 3, 3), 1e-9), np.full((6, 3, 3, 3), 0.1)]).astype("f4"),
        b=np.float32([0.5, -0.5, 0, 1, 0, 0, 0, 0]), v=V,
    ),
)  # fmt: skip


@dataclass
class Emitted:
    model: Model
    int8: Model
    inputs: Arrays
    expected: Arrays

    @property
    def plan(self) -> QuantPlan:
        return QuantPlan.from_dict(self.int8.history[-1].details["plan"])


def quantize(model: Model, inputs: Arrays, gpu: Gpu | None = None, **options: Any) -> Model:
    target, data = Checked(gpu), load_data(inputs, model.inputs)
    step = Quantize(method="minmax", **options)
    step.check(model, target)
    return step.apply(model, Context(target=target, original=model, calibration=data))


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case.name)
def emitted(request: pytest.FixtureRequest, onnx_model: Callable[..., Model]) -> Emitted:
    one: Case = request.param
    model = onnx_model(f"g ({one.inputs}) => ({one.outputs}) {{{one.body}}}", **one.weights)
    inputs = model.example(seed=1)
    expected = run(reference_session(model.graph_model), inputs)
    return Emitted(model, quantize(model, inputs), inputs, expected)


def sqnr_db(expected: Arrays, got: Arrays) -> float:
    """The worst ratio of signal to noise of any output."""
    found = []
    for name, array in expected.items():
        noise = np.square(array - got[name].astype(np.float64)).sum()
        found.append(10 * np.log10(np.square(array, dtype=np.float64).sum() / max(noise, 1e-30)))
    return float(min(found))


def broken(graph_model: ir.Model, version: str = "10") -> list[str]:
    """Violations that cost more than a note."""
    return [v.sentence for v in check(graph_model, version=version) if v.severity != "note"]


def evaluate(graph_model: ir.Model, inputs: Arrays) -> Arrays:
    """Outputs of ONNX's own reference implementation."""
    evaluator = ReferenceEvaluator(ir.to_proto(graph_model))
    return dict(zip(evaluator.output_names, evaluator.run(None, inputs), strict=True))


@pytest.mark.parametrize("version", ["10", "11"])
def test_int8_breaks_no_rule(emitted: Emitted, version: str) -> None:
    assert broken(emitted.int8.graph_model, version) == []


def test_int8_agrees_with_float(emitted: Emitted) -> None:
    got = run(reference_session(emitted.int8.graph_model), emitted.inputs)
    assert sqnr_db(emitted.expected, got) > 25


def test_int8_is_symmetric_restricted_and_its_biases_are_float(emitted: Emitted) -> None:
    graph = emitted.int8.graph_model.graph
    pairs = [n for n in graph if n.op_type in ("QuantizeLinear", "DequantizeLinear")]
    assert pairs
    for node in pairs:
        zero = node.inputs[2].const_value.numpy()
        assert zero.dtype == np.int8
        assert not zero.any()
        stored = node.inputs[0].const_value
        if stored is not None:
            assert -127 <= stored.numpy().min() <= stored.numpy().max() <= 127
    biases = [n.inputs[2] for n in graph if n.op_type in WEIGHTED and len(n.inputs) > 2]
    assert all(bias.const_value.dtype == ir.DataType.FLOAT for bias in biases)


def test_simulation_computes_what_is_emitted(emitted: Emitted) -> None:
    simulated = Quantize().simulate_outputs(emitted.int8, emitted.inputs)
    written = run(reference_session(emitted.int8.graph_model), emitted.inputs)
    assert simulated is not None
    assert sqnr_db(written, simulated) > 35


@pytest.mark.parametrize("kind", ["float", "int8"])
def test_float16_breaks_no_rule_and_agrees(emitted: Emitted, kind: str) -> None:
    source = emitted.int8 if kind == "int8" else emitted.model
    half = to_half(source.graph_model)
    assert broken(half) == []
    wide = run(reference_session(source.graph_model), emitted.inputs)
    got = run(reference_session(half), emitted.inputs)
    # In int8 a value that half precision moves over the edge of a step moves by the whole step.
    assert sqnr_db(wide, got) > (30 if kind == "int8" else 55)
    assert {name: array.dtype for name, array in got.items()} == dict.fromkeys(wide, np.float32)


@pytest.mark.parametrize("kind", ["float", "int8"])
def test_bfloat16_breaks_no_rule_and_agrees(emitted: Emitted, kind: str) -> None:
    source = emitted.int8 if kind == "int8" else emitted.model
    half = to_half(source.graph_model, "bfloat16")
    assert broken(half) == []
    wide = run(reference_session(source.graph_model), emitted.inputs)
    assert sqnr_db(wide, evaluate(half, emitted.inputs)) > (20 if kind == "int8" else 35)


def test_int8_layers_of_a_half_model_read_half(emitted: Emitted) -> None:
    half = to_half(emitted.int8.graph_model)
    for node in half.graph:
        if node.op_type in WEIGHTED and node.name in emitted.plan.roles:
            producers = [value.producer() for value in node.inputs[:2]]
            assert [p.op_type for p in producers] == ["DequantizeLinear"] * 2
            assert {value.dtype for value in node.inputs} == {ir.DataType.FLOAT16}


def test_the_plan_says_that_biases_are_float(emitted: Emitted) -> None:
    assert emitted.plan.float_biases
    assert emitted.plan.to_dict() == emitted.int8.history[-1].details["plan"]


def test_a_residual_is_quantized_and_what_it_is_added_to_is_not(
    onnx_model: Callable[..., Model],
) -> None:
    one = CASES[0]
    model = onnx_model(f"g ({one.inputs}) => ({one.outputs}) {{{one.body}}}", **one.weights)
    done = quantize(model, model.example())
    add = next(node for node in done.graph_model.graph if node.op_type == "Add")
    assert [value.producer().op_type for value in add.inputs] == ["Conv", "DequantizeLinear"]


def test_operands_that_stay_apart_share_a_scale(onnx_model: Callable[..., Model]) -> None:
    one = CASES[2]
    model = onnx_model(f"g ({one.inputs}) => ({one.outputs}) {{{one.body}}}", **one.weights)
    plan = QuantPlan.from_dict(quantize(model, model.example()).history[-1].details["plan"])
    assert plan.activations["c"] == plan.activations["e"]


def test_groups_of_a_transposed_convolution_share_a_scale(
    onnx_model: Callable[..., Model],
) -> None:
    model = onnx_model(
        f"g ({IMAGE}) => (float[2,4,16,16] y) {{[a] c = Conv{PAD}(x, w) "
        "[g] y = ConvTranspose<group=2,strides=[2,2]>(c, u)}",
        w=W, u=(8, 2, 2, 2),
    )  # fmt: skip
    inputs = model.example()
    done = quantize(model, inputs)
    assert broken(done.graph_model) == []
    plan = QuantPlan.from_dict(done.history[-1].details["plan"])
    assert plan.constants["w"].axis == 0
    assert plan.constants["u"].axis is None
    got = run(reference_session(done.graph_model), inputs)
    assert sqnr_db(run(reference_session(model.graph_model), inputs), got) > 25


def test_moves_that_end_in_float_are_left_there(onnx_model: Callable[..., Model]) -> None:
    """As in front of a transformer: patches are put behind a token that is float."""
    model = onnx_model(
        "g (float[2,3,8,8] x, float[2,1,8] t) => (float[2,65,8] y) {[a] c = Conv(x, w) "
        "[r] r = Reshape(c, s) [p] p = Transpose<perm=[0,2,1]>(r) [k] y = Concat<axis=1>(t, p)}",
        w=(8, 3, 1, 1), s=np.int64([2, 8, 64]),
    )  # fmt: skip
    done = quantize(model, model.example())
    assert broken(done.graph_model) == []
    kinds = [node.op_type for node in done.graph_model.graph]
    assert kinds.count("QuantizeLinear") == 1
    plan = QuantPlan.from_dict(done.history[-1].details["plan"])
    assert plan.roles == {"a": "matmul"}


def test_int4_weights_are_blocked(onnx_model: Callable[..., Model]) -> None:
    model = onnx_model(
        "g (float[4,128] x) => (float[4,8] y) {[a] c = Gemm<transB=1>(x, w, b) [r] y = Relu(c)}",
        w=(8, 128), b=(8,),
    )  # fmt: skip
    inputs = model.example()
    expected = run(reference_session(model.graph_model), inputs)
    done = quantize(model, inputs, bits=4)
    assert broken(done.graph_model) == []
    (weight,) = [n for n in done.graph_model.graph if n.op_type == "DequantizeLinear"]
    assert weight.attributes.get_int("block_size") == 64
    assert weight.inputs[0].dtype == ir.DataType.INT4
    got = run(reference_session(done.graph_model), inputs)
    assert sqnr_db(expected, got) > 12
    half = to_half(done.graph_model)
    assert broken(half) == []
    assert sqnr_db(got, evaluate(half, inputs)) > 45


def test_float8_breaks_no_rule_and_agrees(emitted: Emitted) -> None:
    done = quantize(emitted.model, emitted.inputs, Gpu("some GPU", (8, 9)), bits="fp8")
    assert broken(done.graph_model) == []
    pairs = [n for n in done.graph_model.graph if n.op_type == "DequantizeLinear"]
    assert {node.inputs[0].dtype for node in pairs} == {ir.DataType.FLOAT8E4M3FN}
    for node in done.graph_model.graph:
        if node.op_type in WEIGHTED:
            producers = [value.producer() for value in node.inputs[:2]]
            assert [p.op_type for p in producers] == ["DequantizeLinear"] * 2
    got = run(reference_session(done.graph_model), emitted.inputs)
    assert sqnr_db(emitted.expected, got) > 20
    assert broken(to_half(done.graph_model)) == []


def test_float8_is_refused_by_older_gpus(onnx_model: Callable[..., Model]) -> None:
    model = onnx_model(f"g ({IMAGE}) => ({MAPS}) {{[a] y = Conv{PAD}(x, w)}}", w=W)
    with pytest.raises(UnsupportedError, match="fp8"):
        Quantize(bits="fp8").check(model, Checked(Gpu("some GPU", (8, 6))))
    with pytest.raises(UnsupportedError, match="fp8"):
        Quantize(bits="fp8").check(model, OnnxRuntime())


def test_int4_is_refused_where_no_layer_takes_it(onnx_model: Callable[..., Model]) -> None:
    model = onnx_model(f"g ({IMAGE}) => ({MAPS}) {{[a] y = Conv{PAD}(x, w)}}", w=W)
    with pytest.raises(UnsupportedError, match="linear layers only"):
        quantize(model, model.example(), bits=4)


def test_without_data_and_batchnorm_int8_is_refused(onnx_model: Callable[..., Model]) -> None:
    model = onnx_model(f"g ({IMAGE}) => ({MAPS}) {{[a] y = Conv{PAD}(x, w)}}", w=W)
    with pytest.raises(UnsupportedError, match="--calibration"):
        Quantize().apply(model, Context(target=Checked(), original=model))


@pytest.mark.parametrize(
    ("capability", "extra"),
    [
        ((7, 5), set()),
        ((8, 6), {"bfloat16"}),
        ((8, 9), {"bfloat16", "float8_e4m3fn"}),
        ((10, 0), {"bfloat16", "float8_e4m3fn"}),
    ],
)
def test_formats_follow_the_gpu(capability: tuple[int, int], extra: set[str]) -> None:
    facts = tensorrt_capabilities(Gpu("some GPU", capability))
    assert set(facts.precisions) == {"float32", "float16", "int8"} | extra


def test_an_old_gpu_and_an_unknown_one_are_named() -> None:
    assert tensorrt_capabilities(Gpu("some GPU", (8, 9))).sparsity == ("2:4",)
    assert tensorrt_capabilities(Gpu("some GPU", (7, 5))).sparsity == ()
    assert tensorrt_capabilities().channel_multiple == 16
    assert "Tesla V100" in tensorrt_capabilities(Gpu("Tesla V100", (7, 0))).notes[0]
    assert "No GPU is known" in tensorrt_capabilities(None).notes[0]


def test_every_fact_has_a_source() -> None:
    assert all(pattern.source for pattern in PATTERNS)
    assert len({pattern.op for pattern in PATTERNS}) == len(PATTERNS)
