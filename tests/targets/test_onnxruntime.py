"""The ONNX Runtime target keeps the contract, and its settings change speed and nothing else."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from compress.errors import EngineError
from compress.machine import Machine
from compress.model import Model
from compress.target import Adjustable, TensorType
from compress.testing import TargetContract
from targets.onnxruntime import OnnxRuntime, onnxruntime_capabilities

ONE = OnnxRuntime(threads=1)
CHANGES: list[dict[str, Any]] = [{"layout": "plain"}, {"arena": False}, {"spinning": False}]

QUANTIZED = """
quantized (float[batch, 3, 8, 8] x) => (float[batch, 4] y)
<float scale = {0.05}, uint8 zero = {128}, float weight_scale = {0.01}, int8 weight_zero = {0}>
{
    [x_q] a = QuantizeLinear(x, scale, zero)
    [x_dq] b = DequantizeLinear(a, scale, zero)
    [w_dq] c = DequantizeLinear(w, weight_scale, weight_zero)
    [conv] d = Conv<pads = [1, 1, 1, 1]>(b, c)
    [d_q] e = QuantizeLinear(d, scale, zero)
    [d_dq] f = DequantizeLinear(e, scale, zero)
    [pool] g = GlobalAveragePool(f)
    [flat] h = Flatten(g)
    [h_q] i = QuantizeLinear(h, scale, zero)
    [h_dq] j = DequantizeLinear(i, scale, zero)
    [v_dq] k = DequantizeLinear(v, weight_scale, weight_zero)
    [fc] y = Gemm(j, k)
}
"""


class TestOnnxRuntime(TargetContract):
    """One thread."""

    target = ONE


@pytest.fixture(scope="module")
def quantized(onnx_model: Callable[..., Model]) -> Model:
    rng = np.random.default_rng(0)
    return onnx_model(
        QUANTIZED,
        w=rng.integers(-100, 100, (8, 3, 3, 3), dtype=np.int8),
        v=rng.integers(-100, 100, (8, 4), dtype=np.int8),
    )


def _machine(architecture: str, features: tuple[str, ...]) -> Machine:
    return Machine(
        cpu="made up",
        architecture=architecture,
        cores=2,
        features=features,
        memory_bytes=0,
        governor="",
        os="Linux",
        python="3.11",
    )


@pytest.mark.parametrize(
    ("architecture", "features", "reduced", "fast"),
    [
        pytest.param("x86_64", ("avx2", "avx512_vnni"), False, True, id="x86-vnni"),
        pytest.param("x86_64", ("avx2",), True, False, id="x86-without-vnni"),
        pytest.param("aarch64", ("dotprod",), False, True, id="arm-dotprod"),
        pytest.param("aarch64", (), False, False, id="arm-without-dotprod"),
    ],
)
def test_the_scheme_follows_the_instruction_set(
    architecture: str, features: tuple[str, ...], reduced: bool, fast: bool
) -> None:
    facts = onnxruntime_capabilities(_machine(architecture, features))
    assert facts.reduced_weights is reduced
    assert facts.int8_dot_product is fast
    assert facts.activation == "uint8"
    assert bool(facts.notes) is not fast
    if not fast:
        assert "no int8 dot product" in facts.notes[0]


def test_it_has_no_bfloat16_whatever_the_machine_has() -> None:
    machine = _machine("x86_64", ("avx512_bf16", "avx512_vnni"))
    assert onnxruntime_capabilities(machine).precisions == ("float32", "int8")


def test_every_pattern_says_where_it_is_from() -> None:
    patterns = ONE.capabilities.patterns
    assert all(pattern.source for pattern in patterns)
    assert len({pattern.op for pattern in patterns}) == len(patterns)


def test_an_engine_is_called_after_its_precision(quantized: Model) -> None:
    assert ONE.build(quantized).name == "ONNX Runtime int8"
    assert ONE.build(TestOnnxRuntime().exported()).name == "ONNX Runtime float32"


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: next(iter(change)))
def test_settings_change_no_integer(quantized: Model, change: dict[str, Any]) -> None:
    inputs = quantized.example(3)
    expected = ONE.build(quantized)(inputs)["y"]
    assert np.abs(expected).max() > 0.2
    other = dataclasses.replace(ONE, **change).build(quantized)
    np.testing.assert_array_equal(other(inputs)["y"], expected)


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: next(iter(change)))
def test_settings_change_no_more_than_the_last_bits_of_floats(change: dict[str, Any]) -> None:
    model = TestOnnxRuntime().exported()
    inputs = model.example(3)
    other = dataclasses.replace(ONE, **change).build(model)
    expected = ONE.build(model)(inputs)["linear"]
    np.testing.assert_allclose(other(inputs)["linear"], expected, atol=1e-5)


def test_only_the_blocked_layout_reorders(onnx_model: Callable[..., Model]) -> None:
    text = "g (float[batch,32,16,16] x) => (float[batch,32,16,16] y) {"
    model = onnx_model(text + "[c] y = Conv<pads=[1,1,1,1]>(x, w)}", w=(32, 32, 3, 3))
    kinds = {
        layout: [k.op_type for k in OnnxRuntime(threads=1, layout=layout).build(model).kernels()]
        for layout in ("blocked", "plain")
    }
    assert kinds["plain"] == ["Conv"]
    assert kinds["blocked"] != kinds["plain"]


def test_other_settings_of_itself() -> None:
    target = OnnxRuntime(threads=2)
    assert isinstance(target, Adjustable)
    assert target.settings() == (
        OnnxRuntime(threads=2, layout="plain"),
        OnnxRuntime(threads=2, arena=False),
        OnnxRuntime(threads=2, spinning=False),
    )
    # With one thread for each request nobody waits for work of others.
    several = OnnxRuntime(threads=2, streams=2)
    assert several.settings() == (
        OnnxRuntime(threads=2, streams=2, layout="plain"),
        OnnxRuntime(threads=2, streams=2, arena=False),
        OnnxRuntime(threads=2, streams=1),
    )


def test_profile_covers_the_kernels() -> None:
    model = TestOnnxRuntime().exported()
    times = ONE.build(model).profile(model.example(), runs=5)
    assert {"0", "4.depthwise", "4.pointwise", "8"} <= {one.kernel.site for one in times}
    assert all(one.p50_us >= 0 for one in times)
    assert sum(one.p50_us for one in times) > 0


def test_kernels_say_what_they_move(onnx_model: Callable[..., Model]) -> None:
    text = "g (float[batch,32,16,16] x) => (float[batch,64,8,8] z) {"
    text += "[c] y = Conv<pads=[1,1,1,1], strides=[2,2]>(x, w) [r] z = Relu(y)}"
    model = onnx_model(text, w=(64, 32, 3, 3))
    engine = ONE.build(model)
    (kernel,) = [one for one in engine.kernels() if one.site == "c"]
    assert kernel.fused == "Relu"
    assert kernel.tensors is not None
    assert kernel.tensors.inputs == (TensorType((1, 32, 16, 16), "float32"),)
    assert kernel.tensors.weights[0] == TensorType((64, 32, 3, 3), "float32")
    assert kernel.tensors.outputs == (TensorType((1, 64, 8, 8), "float32"),)
    times = engine.profile(model.example(3), runs=2)
    (timed,) = [one.kernel for one in times if one.kernel.site == "c"]
    assert timed.tensors is not None
    assert timed.tensors.outputs == (TensorType((3, 64, 8, 8), "float32"),)


def test_every_kernel_of_an_int8_graph_says_what_it_moves(quantized: Model) -> None:
    kernels = ONE.build(quantized).kernels()
    assert all(kernel.tensors is not None for kernel in kernels)
    (conv,) = [kernel for kernel in kernels if kernel.op_type == "QLinearConv"]
    assert conv.tensors is not None
    assert {one.dtype for one in conv.tensors.outputs} <= {"uint8", "int8"}


def test_a_refused_model_is_an_engine_error() -> None:
    model = TestOnnxRuntime().exported()
    model.graph_model.graph[0].op_type = "NoSuchOperator"
    with pytest.raises(EngineError, match=r"ONNX Runtime .* refuses the model"):
        ONE.build(Model(model.program, model.inputs, "broken"))


def test_wrong_input_is_an_engine_error() -> None:
    model = TestOnnxRuntime().exported()
    engine = ONE.build(model)
    with pytest.raises(EngineError, match="failed while running"):
        engine({"x": model.example()["x"][:, :1]})
