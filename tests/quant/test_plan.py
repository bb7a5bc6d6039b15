from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable

import numpy as np
import pytest

from compress.model import Model
from compress.reference import reference_session, run
from compress.registry import create_target
from compress.target import Capabilities
from quant.emit import emit_qdq
from quant.observers import HistogramObserver
from quant.placement import place
from quant.plan import QuantPlan, dynamic_plan, output_axis, static_plan

TARGET = create_target("cpu", threads=1)
FACTS = TARGET.capabilities
IN, OUT = "float[batch,3,8,8] x", "float[batch,8,8,8] y"
PAD = "<pads=[1,1,1,1]>"

Build = Callable[..., Model]


def observed(model: Model, low: float = -2.0, high: float = 2.0) -> dict[str, HistogramObserver]:
    """What an observer of even values from `low` to `high` would hold, for every tensor."""
    graph = model.graph_model.graph
    found = {}
    for value in [*graph.inputs, *(out for node in graph for out in node.outputs)]:
        found[value.name or ""] = HistogramObserver(value.name or "", 256)
        found[value.name or ""].update(np.linspace(low, high, 1001))
    return found


def planned(model: Model, facts: Capabilities = FACTS, *, per_channel: bool = True) -> QuantPlan:
    graph = model.graph_model.graph
    return static_plan(graph, place(graph, facts), observed(model), facts, "minmax", per_channel)


def test_a_plan_survives_json_to_the_last_bit(onnx_model: Build) -> None:
    body = f"""[a] c = Conv{PAD}(x, w, b) [h] h = HardSwish(c) [p] p = GlobalAveragePool(h)
    [f] f = Flatten(p) [g] g = Gemm(f, v) [e] y = Exp(g)"""
    text = f"g ({IN}) => (float[batch,5] y) {{{body}}}"
    plan = planned(onnx_model(text, w=(8, 3, 3, 3), b=(8,), v=(8, 5)))
    assert plan.float_outputs == ("g",)
    assert plan.reasons
    assert QuantPlan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan


def test_ranges_become_scales(onnx_model: Build) -> None:
    plan = planned(onnx_model(f"g ({IN}) => ({OUT}) {{[a] y = Conv{PAD}(x, w)}}", w=(8, 3, 3, 3)))
    assert float(plan.activations["y"].scale) == pytest.approx(4 / 255)
    assert int(plan.activations["y"].zero_point) in (127, 128)
    weight = plan.constants["w"]
    assert weight.axis == 0
    assert weight.scale.shape == (8,)


def test_weight_scales_follow_the_largest_weight_of_each_channel(onnx_model: Build) -> None:
    rng = np.random.default_rng(0)
    w = rng.normal(size=(8, 3, 3, 3)).astype(np.float32) * np.arange(1, 9)[:, None, None, None]
    w = w.astype(np.float32)
    plan = planned(onnx_model(f"g ({IN}) => ({OUT}) {{[a] y = Conv{PAD}(x, w)}}", w=w))
    flat = w.reshape(8, -1)
    expected = np.maximum(-flat.min(1) / 128, flat.max(1) / 127)
    np.testing.assert_allclose(plan.constants["w"].scale, expected, rtol=1e-6)


def test_a_machine_without_vnni_gets_seven_bits(onnx_model: Build) -> None:
    facts = dataclasses.replace(FACTS, reduced_weights=True)
    model = onnx_model(f"g ({IN}) => ({OUT}) {{[a] y = Conv{PAD}(x, w)}}", w=(8, 3, 3, 3))
    emitted = emit_qdq(model.graph_model, planned(model, facts))
    stored = emitted.graph.initializers["w_int"].const_value
    assert stored is not None
    integers = stored.numpy()
    assert integers.dtype == np.int8
    assert (integers.min(), integers.max()) >= (-64, 0)
    assert 60 <= np.abs(integers.astype(int)).max() <= 64


def test_per_tensor_weights_have_one_scale(onnx_model: Build) -> None:
    model = onnx_model(f"g ({IN}) => ({OUT}) {{[a] y = Conv{PAD}(x, w)}}", w=(8, 3, 3, 3))
    assert planned(model, per_channel=False).constants["w"].axis is None
    facts = dataclasses.replace(FACTS, per_channel=False)
    assert planned(model, facts).constants["w"].axis is None


@pytest.mark.parametrize(
    ("body", "shape", "axis"),
    [
        ("[n] y = Conv(x, w)", (4, 8, 1, 1), 0),
        ("[n] y = ConvTranspose(x, w)", (8, 4, 1, 1), 1),
        ("[n] y = ConvTranspose<group=2>(x, w)", (8, 4, 1, 1), None),
        ("[n] y = Gemm(x, w)", (8, 5), 1),
        ("[n] y = Gemm<transB=1>(x, w)", (5, 8), 0),
        ("[n] y = MatMul(x, w)", (8, 5), 1),
        ("[n] y = MatMul(x, w)", (2, 8, 5), None),
        ("[n] y = MatMul(w, x)", (5, 8), None),
        ("[n] y = Add(x, w)", (8, 1, 1), None),
    ],
    ids=[
        "conv",
        "transposed conv",
        "grouped transposed conv",
        "gemm",
        "gemm transB",
        "matmul",
        "batched matmul",
        "matmul with the weight on the left",
        "no weight",
    ],
)
def test_output_axis(onnx_model: Build, body: str, shape: tuple[int, ...], axis: int) -> None:
    size = "1,8,6,6" if len(shape) == 4 or "Add" in body else "8,8"
    text = f"g (float[{size}] x) => (float y) {{{body}}}"
    model = onnx_model(text, infer=False, w=shape)
    assert output_axis(model.graph_model.graph[0]) == axis


def test_a_bias_on_a_dead_channel_fits_32_bits(onnx_model: Build) -> None:
    w = np.random.default_rng(0).normal(size=(8, 3, 3, 3)).astype(np.float32)
    w[0] = 1e-12
    b = np.zeros(8, np.float32)
    b[0] = 1.5
    model = onnx_model(f"g ({IN}) => ({OUT}) {{[a] y = Conv{PAD}(x, w, b)}}", w=w, b=b)
    plan = planned(model)
    s_x, s_w = float(plan.activations["x"].scale), plan.constants["w"].scale.astype(np.float64)
    assert (np.abs(b) / (s_x * s_w)).max() < 2**31
    # The other channels keep the scale of their own weights.
    flat = w.reshape(8, -1)[1:]
    np.testing.assert_allclose(s_w[1:], np.maximum(-flat.min(1) / 128, flat.max(1) / 127), 1e-6)
    emitted = run(reference_session(emit_qdq(model.graph_model, plan)), model.example())["y"]
    assert emitted[0, 0] == pytest.approx(1.5, abs=float(plan.activations["y"].scale) / 2)


def test_a_sigmoid_uses_the_whole_grid_for_zero_to_one(onnx_model: Build) -> None:
    body = f"[a] c = Conv{PAD}(x, w) [s] s = Sigmoid(c) [t] y = Transpose<perm=[0,1,3,2]>(s)"
    plan = planned(onnx_model(f"g ({IN}) => ({OUT}) {{{body}}}", w=(8, 3, 3, 3)))
    for name in ("s", "y"):
        assert float(plan.activations[name].scale) == pytest.approx(1 / 255)
        assert int(plan.activations[name].zero_point) == 0


def test_a_gate_reads_its_input_as_thirds_of_the_zero_point(onnx_model: Build) -> None:
    body = f"[a] c = Conv{PAD}(x, w) [h] y = HardSwish(c)"
    params = planned(onnx_model(f"g ({IN}) => ({OUT}) {{{body}}}", w=(8, 3, 3, 3))).activations["c"]
    assert float(params.scale) * int(params.zero_point) == pytest.approx(3)
    assert float(params.scale) * (255 - int(params.zero_point)) >= 2  # of a range up to 2


MLP = """g (float[batch,6,16] x) => (float[batch,6,4] y) {
[a] c = MatMul(x, w) [s] d = Add(c, b) [r] e = Relu(d) [k] y = MatMul(e, v) }"""


def test_without_data_matrix_products_are_dynamic(onnx_model: Build) -> None:
    model = onnx_model(MLP, w=(16, 32), b=(32,), v=(32, 4))
    graph = model.graph_model.graph
    plan = dynamic_plan(graph, place(graph, FACTS), FACTS)
    assert plan.dynamic == ("a", "k")
    assert plan.activations == {}
    assert QuantPlan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan
    emitted = dataclasses.replace(model, program=emit_qdq(model.graph_model, plan))
    engine = TARGET.build(emitted)
    assert {k.site for k in engine.kernels() if k.precision == "int8"} == {"a", "k"}
    inputs = model.example(16)
    expected = run(reference_session(model.graph_model), inputs)["y"]
    error = engine(inputs)["y"] - expected
    assert 10 * np.log10(np.square(expected).sum() / np.square(error).sum()) > 30


def test_without_data_convolutions_store_int8_and_compute_in_float(onnx_model: Build) -> None:
    body = f"[a] c = Conv{PAD}(x, w, b) [r] d = Relu(c) [k] y = Conv{PAD}(d, v)"
    model = onnx_model(f"g ({IN}) => ({OUT}) {{{body}}}", w=(64, 3, 3, 3), b=(64,), v=(8, 64, 3, 3))
    graph = model.graph_model.graph
    plan = dynamic_plan(graph, place(graph, FACTS), FACTS)
    assert plan.dynamic == ()
    assert set(plan.reasons) == {"a", "r", "k"}
    emitted = emit_qdq(model.graph_model, plan)
    stored = [v.const_value for v in emitted.graph.initializers.values() if v.const_value]
    assert {a.dtype.name for a in stored if a.size > 1000} == {"INT8"}
    inputs = model.example(2)
    expected = run(reference_session(model.graph_model), inputs)["y"]
    np.testing.assert_allclose(
        run(reference_session(emitted), inputs)["y"], expected, atol=0.05 * np.abs(expected).max()
    )
