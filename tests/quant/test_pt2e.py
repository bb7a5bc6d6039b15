from __future__ import annotations

import dataclasses
import io
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.fx import Node

from compress.data import load_data
from compress.errors import UnsupportedError
from compress.export import to_onnx
from compress.model import Model
from compress.passes import Context
from compress.recipe import default_passes
from compress.registry import create_target
from compress.target import Capabilities, FusablePattern
from compress.testing import NullTarget, tiny_model
from quant.plan import QuantPlan
from quant.pt2e import to_pt2e
from quant.ptq import Quantize
from quant.quantizer import qparams_from_range, weight_qparams
from quant.refine import Quantized, state_of
from quant.simulation import Simulation
from quant.spec import QParams, QuantSpec

NETWORKS = {
    "residual": """(float[batch,3,12,12] x) => (float[batch,5] y) {
        [a] c1 = Conv<pads=[1,1,1,1]>(x, w1, b1) [ra] r1 = Clip(c1, zero, six)
        [b] c2 = Conv<pads=[1,1,1,1], group=8>(r1, w2, b2) [rb] r2 = Relu(c2)
        [c] c3 = Conv(r2, w3, b3) [add] s = Add(r1, c3) [rs] t = Relu(s)
        [pool] p = GlobalAveragePool(t) [flat] f = Flatten(p) [fc] y = Gemm(f, g, h)}""",
    "concat": """(float[batch,3,12,12] x) => (float[batch,6] y) {
        [a] c1 = Conv<pads=[1,1,1,1]>(x, w1, b1) [ra] r1 = Relu(c1)
        [b] c2 = Conv(r1, w3, b3) [m] p1 = MaxPool<kernel_shape=[2,2], strides=[2,2]>(r1)
        [n] p2 = AveragePool<kernel_shape=[2,2], strides=[2,2]>(c2)
        [cat] k = Concat<axis=1>(p1, p2) [d] c4 = Conv<pads=[1,1,1,1]>(k, w4)
        [pool] p = GlobalAveragePool(c4) [flat] f = Flatten(p) [fc] y = Gemm<transB=1>(f, gt)}""",
    "cut": """(float[batch,3,12,12] x) => (float[batch,5] y) {
        [a] c1 = Conv<pads=[1,1,1,1]>(x, w1, b1) [ra] r1 = Relu(c1)
        [s] c2 = Slice(r1, start, end, axes, steps) [z] p2 = Pad(c2, pads)
        [b] c3 = Conv<pads=[1,1,1,1], strides=[2,2]>(r1, w5, b5) [add] t = Add(p2, c3)
        [u] c4 = ConvTranspose<strides=[2,2]>(t, w6) [sig] g1 = Sigmoid(c4)
        [pool] p = GlobalAveragePool(g1) [flat] f = Flatten(p) [fc] m = MatMul(f, g)
        [bias] y = Add(m, h)}""",
}
WEIGHTS: dict[str, Any] = {
    "w1": (8, 3, 3, 3), "b1": (8,), "w2": (8, 1, 3, 3), "b2": (8,), "w3": (8, 8, 1, 1),
    "b3": (8,), "w4": (6, 16, 3, 3), "w5": (12, 8, 3, 3), "b5": (12,), "w6": (12, 8, 2, 2),
    "g": (8, 5), "h": (5,), "gt": (6, 6), "zero": np.float32(0), "six": np.float32(6),
    "start": np.array([0, 0]), "end": np.array([99, 99]), "axes": np.array([2, 3]),
    "steps": np.array([2, 2]), "pads": np.array([0, 2, 0, 0, 0, 2, 0, 0]),
}  # fmt: skip


class Mobile(NullTarget):
    """What ONNX Runtime has in int8, on a backend whose linear layers write int8 alone."""

    @property
    def capabilities(self) -> Capabilities:
        facts = create_target("onnxruntime", threads=1).capabilities
        patterns = [dataclasses.replace(p, float_output=False) for p in facts.patterns]
        patterns.append(FusablePattern("ConvTranspose", "matmul", "made up for tests"))
        return dataclasses.replace(facts, patterns=tuple(patterns), reduced_weights=False)


def images(size: int, count: int = 48) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((count, 3, size, size)).astype(np.float32)


def quantized(model: Model, size: int = 12, **options: Any) -> Model:
    data = load_data(images(size), model.inputs)
    context = Context(target=Mobile(), original=model, calibration=data)
    return Quantize(samples=32, **options).apply(model, context)


@pytest.fixture(scope="module")
def tiny() -> Model:
    """A whole network as torch exports it, with shapes that are computed."""
    model = to_onnx(tiny_model(), 21)
    context = Context(target=Mobile(), original=tiny_model())
    for step in itertools.takewhile(lambda step: step.name != "quantize", default_passes()):
        model = step.apply(model, context)
    return quantized(model, 16)


@pytest.fixture(scope="module")
def build(onnx_model: Callable[..., Model]) -> Callable[..., Model]:
    def call(name: str, **options: Any) -> Model:
        text = NETWORKS[name]
        used = {n: w for n, w in WEIGHTS.items() if f" {n})" in text or f" {n}," in text}
        return quantized(onnx_model(f"g {text}", **used), **options)

    return call


def outputs(state: Quantized, model: Model, size: int) -> tuple[np.ndarray, np.ndarray, float]:
    """Of the exported program and of the simulation, for several images; and the output's scale."""
    program = to_pt2e(state.graph_model, state.plan, model.inputs).module()
    simulation = Simulation.of(state)
    (output,) = simulation.network.outputs
    rows = torch.from_numpy(images(size)).split(1)
    with torch.no_grad():
        got = torch.cat([program(row)[0] for row in rows])
        expected = torch.cat([simulation.run({"x": row})[output] for row in rows])
    return got.numpy(), expected.numpy(), float(state.plan.activations[output].scale)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("per_channel", [True, False], ids=["per_channel", "per_tensor"])
def test_the_program_computes_what_the_simulation_does(
    build: Callable[..., Model], name: str, per_channel: bool
) -> None:
    model = build(name, per_channel=per_channel)
    got, expected, scale = outputs(state_of(model, "test"), model, 12)
    assert np.abs(got - expected).max() <= 1.01 * scale
    assert (np.abs(got - expected) > scale / 2).mean() < 0.02
    assert expected.std() > 4 * scale


def test_shapes_that_the_graph_computes_become_numbers(tiny: Model) -> None:
    got, expected, scale = outputs(state_of(tiny, "test"), tiny, 16)
    assert np.abs(got - expected).max() <= 1.01 * scale
    state = state_of(tiny, "test")
    program = to_pt2e(state.graph_model, state.plan, tiny.inputs)
    reshapes = [n for n in program.graph.nodes if "reshape" in str(n.target)]
    assert [node.args[1] for node in reshapes] == [[1, 16]]
    assert all("lift" not in str(node.target) for node in program.graph.nodes)
    assert [node.name for node in program.graph.nodes if node.op == "placeholder"][-1] == "x"


def called(program: torch.export.ExportedProgram, *names: str) -> list[Node]:
    return [n for n in program.graph.nodes if any(str(n.target).endswith(name) for name in names)]


@pytest.mark.parametrize("name", NETWORKS)
def test_nothing_multiplies_in_float(build: Callable[..., Model], name: str) -> None:
    model = build(name)
    state = state_of(model, "test")
    program = to_pt2e(state.graph_model, state.plan, model.inputs)
    products = called(program, "conv2d.default", "linear.default", "conv_transpose2d.input")
    assert len(products) == sum(role == "matmul" for role in state.plan.roles.values())
    for node in products:
        for operand in node.args[:2]:
            assert isinstance(operand, Node)
            assert "dequantize" in str(operand.target)
            assert len(operand.users) == 1
        reader = next(iter(node.users))
        if any(word in str(reader.target) for word in ("relu", "hardtanh")):
            reader = next(iter(reader.users))
        assert "quantize_per_tensor" in str(reader.target)
    for node in called(program, "quantize_per_tensor.default"):
        assert node.args[3:] == (-128, 127, torch.int8)
    stored = [t for t in program.state_dict.values() if t.ndim > 1]
    assert stored
    assert all(tensor.dtype == torch.int8 for tensor in stored)


def signed(params: QParams) -> QParams:
    """The same numbers as int8 from the start."""
    spec = dataclasses.replace(params.spec, dtype="int8")
    return QParams(spec, params.scale, params.zero_point.astype(np.int64) - 128, params.axis)


def test_unsigned_activations_become_signed_exactly(build: Callable[..., Model]) -> None:
    model = build("residual")
    state = state_of(model, "test")
    assert {p.spec.dtype for p in state.plan.activations.values()} == {"uint8"}
    activations = {name: signed(params) for name, params in state.plan.activations.items()}
    plan = dataclasses.replace(state.plan, activations=activations)
    first, _, _ = outputs(state, model, 12)
    second, _, _ = outputs(dataclasses.replace(state, plan=plan), model, 12)
    np.testing.assert_array_equal(first, second)


def test_narrow_weights_are_stored_in_int8(build: Callable[..., Model]) -> None:
    model = build("residual")
    state = state_of(model, "test")
    network = Simulation.of(state).network
    constants = {
        name: weight_qparams(
            network.constants[name].numpy(), dataclasses.replace(p.spec, dtype="int4"), p.axis
        )
        for name, p in state.plan.constants.items()
    }
    state = dataclasses.replace(state, plan=dataclasses.replace(state.plan, constants=constants))
    got, expected, scale = outputs(state, model, 12)
    assert np.abs(got - expected).max() <= 1.01 * scale
    program = to_pt2e(state.graph_model, state.plan, model.inputs)
    weights = [t for t in program.state_dict.values() if t.dtype == torch.int8]
    assert len(weights) == 4
    assert all(-8 <= t.min() < 0 < t.max() <= 7 for t in weights)


def test_an_operator_in_float_reads_what_int8_wrote(build: Callable[..., Model]) -> None:
    model = build("residual", keep_float=("b", "fc"))
    state = state_of(model, "test")
    program = to_pt2e(state.graph_model, state.plan, model.inputs)
    simulation = Simulation.of(state)
    row = torch.from_numpy(images(12)[:1])
    with torch.no_grad():
        got, expected = program.module()(row)[0], simulation.run({"x": row})["y"]
    torch.testing.assert_close(got, expected, atol=0.02 * float(expected.abs().max()), rtol=0)
    floats = [n for n in called(program, "conv2d.default") if "dequantize" not in str(n.args[1])]
    assert len(floats) == 1
    assert len(called(program, "linear.default")) == 0


def test_a_program_can_be_saved_and_loaded(tiny: Model) -> None:
    state = state_of(tiny, "test")
    program = to_pt2e(state.graph_model, state.plan, tiny.inputs)
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    row = torch.from_numpy(images(16)[:1])
    again = torch.export.load(buffer).module()(row)[0]
    torch.testing.assert_close(again, program.module()(row)[0], atol=0, rtol=0)


@pytest.mark.parametrize(
    ("kind", "spec", "message"),
    [
        ("activations", QuantSpec("uint4", symmetric=False), "activation r1 is uint4"),
        ("activations", QuantSpec("int16"), "activation r1 is int16"),
        ("activations", QuantSpec("float8_e4m3fn"), "activation r1 is float8_e4m3fn"),
        ("constants", QuantSpec("float8_e4m3fn"), "constant w1 is float8_e4m3fn"),
    ],
    ids=["narrow", "wide", "float", "float_weight"],
)
def test_other_formats_are_refused(
    build: Callable[..., Model], kind: str, spec: QuantSpec, message: str
) -> None:
    model = build("residual")
    state = state_of(model, "test")
    name = message.split()[1]
    params = {**getattr(state.plan, kind), name: qparams_from_range(0.0, 1.0, spec)}
    plan = dataclasses.replace(state.plan, **{kind: params})
    with pytest.raises(UnsupportedError, match=f"PT2E stores int8, and the {message}"):
        to_pt2e(state.graph_model, plan, model.inputs)


def test_ranges_at_run_time_are_refused(tiny: Model) -> None:
    with pytest.raises(UnsupportedError, match="PT2E needs fixed activation ranges, and fc"):
        to_pt2e(tiny.graph_model, QuantPlan(dynamic=("fc",)), tiny.inputs)


@pytest.mark.filterwarnings("ignore")
def test_executorch_runs_it_in_xnnpack(tiny: Model) -> None:
    reason = "executorch is not installed"
    partition = pytest.importorskip(
        "executorch.backends.xnnpack.partition.xnnpack_partitioner", reason=reason
    )
    exir = pytest.importorskip("executorch.exir", reason=reason)
    runtime = pytest.importorskip("executorch.runtime", reason=reason)
    state = state_of(tiny, "test")
    program = to_pt2e(state.graph_model, state.plan, tiny.inputs)
    partitioner = [partition.XnnpackPartitioner()]
    lowered = exir.to_edge_transform_and_lower(program, partitioner=partitioner)
    left = [n for n in lowered.exported_program().graph.nodes if n.op == "call_function"]
    # One delegated call, and what takes the output out of its result.
    assert len(left) == 2
    method = runtime.Runtime.get().load_program(lowered.to_executorch().buffer)
    forward = method.load_method("forward")
    simulation = Simulation.of(state)
    (output,) = simulation.network.outputs
    scale = float(state.plan.activations[output].scale)
    for row in torch.from_numpy(images(16)).split(1):
        got = forward.execute([row])[0]
        with torch.no_grad():
            expected = simulation.run({"x": row})[output]
        assert (got - expected).abs().max() <= 1.01 * scale
