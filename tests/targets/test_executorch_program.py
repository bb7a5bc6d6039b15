"""QDQ graphs as torch programs compute what ONNX Runtime computes, in the form XNNPACK reads."""

from __future__ import annotations

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
from compress.reference import reference_session, run
from compress.registry import create_pass
from compress.testing import tiny_model
from targets.executorch import ExecuTorch
from targets.executorch_files import SITE
from targets.executorch_program import to_program

ONE = ExecuTorch(threads=1)
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
        [b2] c5 = Conv(p2, w3, b3)
        [cat] k = Concat<axis=1>(p1, c5) [d] c4 = Conv<pads=[1,1,1,1]>(k, w4)
        [pool] p = GlobalAveragePool(c4) [flat] f = Flatten(p) [fc] y = Gemm<transB=1>(f, gt)}""",
    "cut": """(float[batch,3,12,12] x) => (float[batch,5] y) {
        [a] c1 = Conv<pads=[1,1,1,1]>(x, w1, b1) [ra] r1 = Relu(c1)
        [s] c2 = Slice(r1, start, end, axes, steps) [z] p2 = Pad(c2, pads)
        [b] c3 = Conv<pads=[1,1,1,1], strides=[2,2]>(r1, w5, b5) [add] t = Add(p2, c3)
        [u] c4 = ConvTranspose<strides=[2,2]>(t, w6) [sig] g1 = Sigmoid(c4)
        [pool] p = GlobalAveragePool(g1) [flat] f = Flatten(p) [fc] m = MatMul(f, g)
        [bias] y = Add(m, h)}""",
    "parts": """(float[batch,3,12,12] x) => (float[batch,4,5,6] y) {
        [a] c1 = Conv<pads=[1,1,1,1]>(x, w1, b1) [ra] r1 = Relu(c1)
        [split] l, r = Split<axis=1, num_outputs=2>(r1) [sub] d = Sub(l, r)
        [s] e = Slice(d, begin, last, axes, two) [mul] q = Mul(e, e)
        [t] y = Transpose<perm=[0,1,2,3]>(q)}""",
    "uneven": """(float[batch,3,12,12] x) => (float[batch,8,6,6] y) {
        [a] c1 = Conv<pads=[1,1,1,1]>(x, w1, b1) [ra] r1 = Relu(c1)
        [b] y = Conv<pads=[0,0,1,1], strides=[2,2], group=8>(r1, w2, b2)}""",
}
WEIGHTS: dict[str, Any] = {
    "w1": (8, 3, 3, 3), "b1": (8,), "w2": (8, 1, 3, 3), "b2": (8,), "w3": (8, 8, 1, 1),
    "b3": (8,), "w4": (6, 16, 3, 3), "w5": (12, 8, 3, 3), "b5": (12,), "w6": (12, 8, 2, 2),
    "g": (8, 5), "h": (5,), "gt": (6, 6), "zero": np.float32(0), "six": np.float32(6),
    "start": np.array([0, 0]), "end": np.array([99, 99]), "axes": np.array([2, 3]),
    "steps": np.array([2, 2]), "pads": np.array([0, 2, 0, 0, 0, 2, 0, 0]),
    "begin": np.array([1, 0]), "last": np.array([10, 99]), "two": np.array([2, 2]),
}  # fmt: skip
Build = Callable[..., Model]


def images(size: int = 12, count: int = 32) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((count, 3, size, size)).astype(np.float32)


def quantized(model: Model, size: int = 12, **options: Any) -> Model:
    data = load_data(images(size), model.inputs)
    context = Context(target=ONE, original=model, calibration=data)
    return create_pass("quantize", samples=32, **options).apply(model, context)


@pytest.fixture(scope="module")
def floating(onnx_model: Build) -> Build:
    def call(name: str) -> Model:
        text = NETWORKS[name]
        used = {n: w for n, w in WEIGHTS.items() if f" {n})" in text or f" {n}," in text}
        return onnx_model(f"g {text}", **used)

    return call


@pytest.fixture(scope="module")
def tiny() -> Model:
    """A whole network as torch exports it, with shapes that are computed."""
    model = to_onnx(tiny_model(), 21)
    context = Context(target=ONE, original=tiny_model())
    for step in itertools.takewhile(lambda step: step.name != "quantize", default_passes()):
        model = step.apply(model, context)
    return quantized(model, 16)


def outputs(model: Model, size: int = 12) -> tuple[np.ndarray, np.ndarray]:
    """Of the program in torch and of the graph in ONNX Runtime, for several images."""
    program = to_program(model.graph_model, model.inputs).module()
    reference = reference_session(model.graph_model)
    rows = images(size)
    with torch.no_grad():
        got = torch.cat([program(row)[0] for row in torch.from_numpy(rows).split(1)])
    (expected,) = run(reference, {"x": rows}).values()
    return got.numpy(), expected


def last_scale(model: Model) -> float:
    """The largest step of any activation near the end."""
    graph = model.graph_model.graph
    scales = [n.inputs[1].const_value.numpy() for n in graph if n.op_type == "QuantizeLinear"]
    return float(max(scales[-2:]))


@pytest.mark.parametrize("name", NETWORKS)
def test_a_float_program_computes_the_graph(floating: Build, name: str) -> None:
    got, expected = outputs(floating(name))
    np.testing.assert_allclose(got, expected, atol=1e-4)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("per_channel", [True, False], ids=["per_channel", "per_tensor"])
def test_a_quantized_program_computes_what_onnx_runtime_does(
    floating: Build, name: str, per_channel: bool
) -> None:
    model = quantized(floating(name), per_channel=per_channel)
    got, expected = outputs(model)
    step = last_scale(model)
    assert np.abs(got - expected).max() <= 2.01 * step
    assert (np.abs(got - expected) > step / 2).mean() < 0.02
    assert expected.std() > 4 * step


def test_shapes_that_the_graph_computes_become_numbers(tiny: Model) -> None:
    got, expected = outputs(tiny, 16)
    assert np.abs(got - expected).max() <= 2.01 * last_scale(tiny)
    program = to_program(tiny.graph_model, tiny.inputs)
    reshapes = [n for n in program.graph.nodes if "reshape" in str(n.target)]
    assert [node.args[1] for node in reshapes] == [[1, 16]]
    assert all("lift" not in str(node.target) for node in program.graph.nodes)
    assert [node.name for node in program.graph.nodes if node.op == "placeholder"][-1] == "x"


def called(program: torch.export.ExportedProgram, *names: str) -> list[Node]:
    return [n for n in program.graph.nodes if any(str(n.target).endswith(name) for name in names)]


@pytest.mark.parametrize("name", NETWORKS)
def test_nothing_multiplies_in_float(floating: Build, name: str) -> None:
    model = quantized(floating(name))
    program = to_program(model.graph_model, model.inputs)
    products = called(program, "conv2d.default", "linear.default", "conv_transpose2d.input")
    sites = {node.meta["custom"][SITE] for node in products}
    wanted = {
        node.name
        for node in model.graph_model.graph
        if node.op_type in ("Conv", "Gemm", "MatMul", "ConvTranspose")
    }
    assert wanted <= sites
    for node in products:
        padded = node.args[0].args[0] if "pad" in str(node.args[0].target) else node.args[0]
        for operand in (padded, node.args[1]):
            assert isinstance(operand, Node)
            assert "dequantize" in str(operand.target)
            assert len(operand.users) == 1
        assert "quantize_per_tensor" in str(next(iter(node.users)).target)
    for node in called(program, "quantize_per_tensor.default"):
        assert node.args[3:] == (-128, 127, torch.int8)
    stored = [t for t in program.state_dict.values() if t.ndim > 1]
    assert stored
    assert all(tensor.dtype == torch.int8 for tensor in stored)


def test_a_strided_cut_is_a_convolution_that_changes_no_integer(floating: Build) -> None:
    model = quantized(floating("cut"))
    program = to_program(model.graph_model, model.inputs)
    (cut,) = [n for n in called(program, "conv2d.default") if n.meta["custom"][SITE] == "s"]
    buffers = program.graph_signature.inputs_to_buffers
    numbers = [program.state_dict[buffers[n.name]] for n in cut.args[1].args[:3]]
    assert all(torch.equal(t.flatten(), torch.ones(8)) for t in numbers[:2])
    assert torch.equal(numbers[2], torch.zeros(8, dtype=torch.int64))
    assert not called(program, "slice.Tensor")


CLIPPED = """g (float[batch,3,12,12] x) => (float[batch,8,12,12] y)
    <float s={0.05}, uint8 z={100}, uint8 low={LOW}, uint8 high={HIGH},
    float sw={0.01}, int8 zw={0}>
{
    [xq] a = QuantizeLinear(x, s, z) [xd] b = DequantizeLinear(a, s, z)
    [wd] w = DequantizeLinear(w8, sw, zw) [conv] c = Conv<pads=[1,1,1,1]>(b, w)
    MIDDLE [cq] d = QuantizeLinear(m, s, z) [clip] e = Clip(d, low, high)
    [cd] y = DequantizeLinear(e, s, z)
}"""


@pytest.mark.parametrize(
    ("middle", "limits", "wanted"),
    [
        ("[same] m = Identity(c)", (80, 140), ["hardtanh"]),
        ("[twice] m = Add(c, c)", (100, 255), ["relu"]),
    ],
    ids=["both", "below"],
)
def test_integers_are_clipped_as_floats(
    onnx_model: Build, middle: str, limits: tuple[int, int], wanted: list[str]
) -> None:
    text = CLIPPED.replace("LOW", str(limits[0])).replace("HIGH", str(limits[1]))
    weights = np.random.default_rng(0).integers(-100, 100, (8, 3, 3, 3), dtype=np.int8)
    model = onnx_model(text.replace("MIDDLE", middle), w8=weights)
    got, expected = outputs(model)
    np.testing.assert_allclose(got, expected, atol=0.0501)
    assert (got != expected).mean() < 0.01
    assert expected.min() == pytest.approx(0.05 * (limits[0] - 100))
    program = to_program(model.graph_model, model.inputs)
    assert len(called(program, *(f"{name}.default" for name in wanted))) == 1


def test_limits_are_kept_by_the_kernel_of_a_product(onnx_model: Build) -> None:
    text = CLIPPED.replace("LOW", "100").replace("HIGH", "200").replace("MIDDLE", "")
    weights = np.ones((8, 3, 3, 3), np.int8)
    model = onnx_model(text.replace("(m, s, z)", "(c, s, z)"), w8=weights)
    got, expected = outputs(model)
    np.testing.assert_allclose(got, expected, atol=0.0501)
    program = to_program(model.graph_model, model.inputs)
    (conv,), (limit,) = called(program, "conv2d.default"), called(program, "hardtanh.default")
    assert list(conv.users) == [limit]
    assert limit.args[1:] == (0.0, pytest.approx(5.0))


def test_an_operator_in_float_reads_what_int8_wrote(floating: Build) -> None:
    model = quantized(floating("residual"), keep_float=("b", "fc"))
    got, expected = outputs(model)
    np.testing.assert_allclose(got, expected, atol=0.02 * float(np.abs(expected).max()))
    program = to_program(model.graph_model, model.inputs)
    floats = [n for n in called(program, "conv2d.default") if "dequantize" not in str(n.args[1])]
    assert len(floats) == 1
    (linear,) = called(program, "linear.default")
    assert "dequantize" not in str(linear.args[1])


@pytest.mark.parametrize("kept", [(), ("b",)], ids=["int8", "float"])
def test_padding_never_mixes_formats(floating: Build, kept: tuple[str, ...]) -> None:
    """A Pad of dequantized numbers is read by an int8 convolution, or quantized."""
    model = quantized(floating("uneven"), keep_float=kept)
    got, expected = outputs(model)
    np.testing.assert_allclose(got, expected, atol=2 * last_scale(model))
    program = to_program(model.graph_model, model.inputs)
    (pad,) = [n for n in program.graph.nodes if "pad" in str(n.target)]
    (reader,) = pad.users
    assert ("quantize_per_tensor" in str(reader.target)) is bool(kept)


FORMATS = """g (float[batch,4] x) => (float[batch,4] y) <float s={0.05}, SHORT z={0}> {
    [q] a = QuantizeLinear(x, s, z) [d] y = DequantizeLinear(a, s, z)}"""


@pytest.mark.parametrize("dtype", ["int16", "uint16"])
def test_other_formats_are_refused(onnx_model: Build, dtype: str) -> None:
    model = onnx_model(FORMATS.replace("SHORT", dtype))
    with pytest.raises(UnsupportedError, match="q quantizes to another format than int8"):
        to_program(model.graph_model, model.inputs)


def test_ranges_at_run_time_are_refused(onnx_model: Build) -> None:
    text = """g (float[batch,4] x) => (uint8[batch,4] y, float s, uint8 z) {
        [dynamic] y, s, z = DynamicQuantizeLinear(x)}"""
    model = onnx_model(text)
    with pytest.raises(UnsupportedError, match="it has DynamicQuantizeLinear"):
        to_program(model.graph_model, model.inputs)


def test_operators_on_integers_are_refused(onnx_model: Build) -> None:
    text = """g (float[batch,4] x) => (float[batch,8] y) <float s={0.05}, uint8 z={0}> {
        [q] a = QuantizeLinear(x, s, z) [cat] b = Concat<axis=1>(a, a)
        [d] y = DequantizeLinear(b, s, z)}"""
    model = onnx_model(text)
    with pytest.raises(UnsupportedError, match=r"cat \(Concat\) has no counterpart"):
        to_program(model.graph_model, model.inputs)
