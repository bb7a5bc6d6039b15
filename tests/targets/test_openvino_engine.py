"""The OpenVINO engine: names, batch sizes, threads, files, and what it says of its kernels."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from compress.errors import EngineError, OutputError
from compress.model import Arrays, Model, TensorSpec
from compress.reference import reference_session, run
from compress.testing import tiny_exported

pytest.importorskip("openvino")

from targets.openvino_engine import CompileSettings, OpenVinoEngine

OPSET = 21
SITES = {"0", "4.depthwise", "4.pointwise", "8"}
ONE = CompileSettings(threads=1)

MIXED = """
mixed (float[batch, 4] x, int64[batch, 2] ids, bool flag, float scale)
    => (float[batch, 4] y, float[batch, 4] same, int64[batch, 2] twice, bool not_flag)
{
    [relu] r = Relu(x)
    [times] y = Mul(r, scale)
    [copy] same = Identity(x)
    [add] twice = Add(ids, ids)
    [not] not_flag = Not(flag)
}
"""

UPSAMPLING = """
upsampling (float[batch, 3, 8, 8] x) => (float[batch, 4, 16, 16] y)
{
    [first] a = ConvTranspose<kernel_shape = [2, 2], strides = [2, 2]>(x, v, b)
    [relu] c = Relu(a)
    [last] y = Conv<kernel_shape = [1, 1]>(c, w)
}
"""

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


def _engine(model: Model, settings: CompileSettings = ONE) -> OpenVinoEngine:
    return OpenVinoEngine.from_graph("OpenVINO", model.graph_model, model.inputs, settings)


def _assert_equal(got: Arrays, expected: Arrays) -> None:
    assert list(got) == list(expected)
    for name, array in expected.items():
        assert got[name].dtype == array.dtype
        np.testing.assert_array_equal(got[name], array)


@pytest.fixture(scope="module")
def tiny() -> Model:
    return tiny_exported(OPSET)


@pytest.fixture(scope="module")
def engine(tiny: Model) -> OpenVinoEngine:
    return _engine(tiny)


@pytest.fixture(scope="module")
def quantized(onnx_model: Callable[..., Model]) -> Model:
    rng = np.random.default_rng(0)
    return onnx_model(
        QUANTIZED,
        w=rng.integers(-100, 100, (8, 3, 3, 3), dtype=np.int8),
        v=rng.integers(-100, 100, (8, 4), dtype=np.int8),
    )


@pytest.fixture(scope="module")
def mixed(onnx_model: Callable[..., Model]) -> Model:
    return onnx_model(MIXED)


def test_every_batch_size_agrees_with_the_reference(tiny: Model) -> None:
    engine = _engine(tiny)
    reference = reference_session(tiny.graph_model)
    # The last two are beyond the static sizes; the first of all is then asked for again.
    for batch in (1, 3, 2, 5, 7, 1):
        inputs = tiny.example(batch, seed=batch)
        (expected,) = run(reference, inputs).values()
        (got,) = engine(inputs).values()
        np.testing.assert_allclose(got, expected, atol=1e-4)


def test_the_quantized_model_agrees_with_the_reference(quantized: Model) -> None:
    inputs = quantized.example(2)
    (expected,) = run(reference_session(quantized.graph_model), inputs).values()
    (got,) = _engine(quantized)(inputs).values()
    # One step of one activation may differ, times the largest weight.
    np.testing.assert_allclose(got, expected, atol=0.05)
    assert np.abs(expected).max() > 0.2


def test_names_types_and_ranks_are_those_of_the_graph(mixed: Model) -> None:
    inputs = mixed.example(2)
    expected = run(reference_session(mixed.graph_model), inputs)
    _assert_equal(_engine(mixed)(inputs), expected)


def test_outputs_share_memory_with_nothing(mixed: Model) -> None:
    engine = _engine(mixed)
    inputs = mixed.example()
    given = {name: array.copy() for name, array in inputs.items()}
    outputs = engine(inputs)
    kept = {name: array.copy() for name, array in outputs.items()}
    engine({name: array * 3 if name == "x" else array for name, array in inputs.items()})
    _assert_equal(outputs, kept)
    _assert_equal(inputs, given)
    assert not any(np.shares_memory(a, b) for a in outputs.values() for b in inputs.values())


def test_any_memory_layout_is_read(mixed: Model) -> None:
    engine = _engine(mixed)
    inputs = mixed.example(2)
    expected = engine(inputs)
    strided = np.asfortranarray(inputs["x"])
    strided.flags.writeable = False
    _assert_equal(engine(inputs | {"x": strided}), expected)


@pytest.mark.parametrize("streams", [1, 2])
def test_threads_get_their_own_answers(tiny: Model, streams: int) -> None:
    engine = _engine(tiny, CompileSettings(threads=2, streams=streams))
    examples = [tiny.example(1 + seed % 5, seed=seed) for seed in range(40)]
    expected = [engine(inputs) for inputs in examples]
    fresh = _engine(tiny, CompileSettings(threads=2, streams=streams))
    with ThreadPoolExecutor(4) as pool:
        for got, wanted in zip(pool.map(fresh, examples), expected, strict=True):
            # Which sizes become static depends on who comes first, and so do the last bits.
            np.testing.assert_allclose(got["linear"], wanted["linear"], atol=1e-5)


@pytest.mark.parametrize("source", ["tiny", "mixed", "quantized"])
def test_save_and_read_again(source: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    model = request.getfixturevalue(source)
    engine = _engine(model)
    files = engine.save(tmp_path)
    assert sorted(path.name for path in files) == ["model.bin", "model.xml"]
    again = OpenVinoEngine.from_file("again", files[0], None, ONE)
    assert again.outputs == engine.outputs
    assert _shapes(again.inputs) == _shapes(model.inputs)
    assert [(k.op_type, k.precision, k.site) for k in again.kernels()] == [
        (k.op_type, k.precision, k.site) for k in engine.kernels()
    ]
    again.save(tmp_path)
    for batch in (1, 2):
        inputs = model.example(batch)
        _assert_equal(again(inputs), engine(inputs))


def _shapes(specs: tuple[TensorSpec, ...]) -> list[tuple[str, bool, tuple[int, ...], str]]:
    return [(spec.name, spec.dynamic_batch, spec.concrete(), spec.dtype) for spec in specs]


def test_kernels_name_their_sites(tiny: Model, engine: OpenVinoEngine) -> None:
    kernels = engine.kernels()
    multiplies = {
        kernel.site: kernel.precision
        for kernel in kernels
        if kernel.op_type in ("Convolution", "FullyConnected")
    }
    assert multiplies == dict.fromkeys(SITES, "float32")
    names = {node.name for node in tiny.graph_model.graph}
    assert {kernel.site for kernel in kernels} <= names | {""}
    assert "int8" not in {kernel.precision for kernel in kernels}


def test_a_transposed_convolution_is_a_site(onnx_model: Callable[..., Model]) -> None:
    engine = _engine(onnx_model(UPSAMPLING, v=(3, 8, 2, 2), b=(8,), w=(4, 8, 1, 1)))
    sites = {kernel.op_type: kernel.site for kernel in engine.kernels()}
    assert (sites["Deconvolution"], sites["Convolution"]) == ("first", "last")


def test_int8_kernels_are_told_from_conversions(quantized: Model) -> None:
    kernels = _engine(quantized).kernels()
    precisions = {kernel.site: kernel.precision for kernel in kernels if kernel.site}
    assert precisions["conv"] == precisions["fc"] == "int8"
    assert "convert" in {kernel.precision for kernel in kernels if not kernel.site}


def test_kernels_say_what_they_move(onnx_model: Callable[..., Model]) -> None:
    text = "g (float[batch,32,16,16] x) => (float[batch,64,8,8] z) {"
    text += "[c] y = Conv<pads=[1,1,1,1], strides=[2,2]>(x, w) [r] z = Relu(y)}"
    engine = _engine(onnx_model(text, w=(64, 32, 3, 3)))
    (kernel,) = [one for one in engine.kernels() if one.op_type == "Convolution"]
    assert (kernel.site, kernel.fused) == ("c", "Relu")
    assert kernel.tensors is not None
    assert [one.shape for one in kernel.tensors.inputs] == [(1, 32, 16, 16)]
    assert [one.shape for one in kernel.tensors.weights] == [(64, 32, 3, 3)]
    assert [one.shape for one in kernel.tensors.outputs] == [(1, 64, 8, 8)]


def test_truth_values_are_not_int8(mixed: Model) -> None:
    assert "int8" not in {kernel.precision for kernel in _engine(mixed).kernels()}


@pytest.mark.parametrize("batch", [1, 4])
def test_profile_times_the_kernels_in_order(tiny: Model, batch: int) -> None:
    engine = _engine(tiny)
    times = engine.profile(tiny.example(batch), runs=5)
    found = [one.kernel.site for one in times if one.kernel.site in SITES]
    assert found == ["0", "4.depthwise", "4.pointwise", "8"]
    assert sum(one.p50_us for one in times) > 0
    if batch == 1:
        ran = {(one.kernel.op_type, one.kernel.site) for one in times}
        assert ran <= {(kernel.op_type, kernel.site) for kernel in engine.kernels()}


def test_bfloat16_is_another_precision(tiny: Model, engine: OpenVinoEngine) -> None:
    import openvino as ov

    narrow = _engine(tiny, CompileSettings(threads=1, precision="bfloat16"))
    precisions = {kernel.precision for kernel in narrow.kernels() if kernel.site in SITES}
    if precisions == {"float32"}:
        pytest.skip(
            f"OpenVINO computes no bfloat16 on {ov.Core().get_property('CPU', 'FULL_DEVICE_NAME')}"
        )
    inputs = tiny.example(4)
    exact, rounded = engine(inputs)["linear"], narrow(inputs)["linear"]
    assert precisions == {"bfloat16"}
    assert 0 < np.abs(exact - rounded).max() < 0.1 * np.abs(exact).max()


def test_pinning_changes_no_result(tiny: Model, engine: OpenVinoEngine) -> None:
    free = _engine(tiny, CompileSettings(threads=1, pinned=False))
    _assert_equal(free(tiny.example()), engine(tiny.example()))


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda inputs: {"ids": inputs["ids"]}, id="missing"),
        pytest.param(lambda inputs: inputs | {"more": inputs["x"]}, id="unknown"),
        pytest.param(lambda inputs: inputs | {"x": inputs["x"][:, :2]}, id="size"),
        pytest.param(lambda inputs: inputs | {"x": inputs["x"][0]}, id="rank"),
        pytest.param(lambda inputs: inputs | {"ids": inputs["ids"][:1]}, id="other-batch"),
    ],
)
def test_wrong_inputs_are_an_engine_error(mixed: Model, change: Callable[[Arrays], Arrays]) -> None:
    engine = _engine(mixed)
    inputs = mixed.example(2)
    expected = engine(inputs)
    with pytest.raises(EngineError, match="OpenVINO failed while running the model"):
        engine(change(inputs))
    _assert_equal(engine(inputs), expected)


def test_a_refused_graph_is_an_engine_error(tiny: Model) -> None:
    broken = tiny.graph_model.clone()
    broken.graph[0].op_type = "NoSuchOperator"
    with pytest.raises(EngineError, match=r"OpenVINO 20\d\d\.\d.* refuses the model.*NoSuch"):
        OpenVinoEngine.from_graph("broken", broken, tiny.inputs, ONE)


def test_a_missing_file_is_an_engine_error(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="refuses the model"):
        OpenVinoEngine.from_file("none", tmp_path / "model.xml", None, ONE)


def test_a_directory_that_cannot_be_written(engine: OpenVinoEngine, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="cannot write"):
        engine.save(tmp_path / "file")


def test_the_graph_stays_as_it_was(tiny: Model) -> None:
    graph_model = tiny.graph_model.clone()
    before = ir.to_proto(graph_model).SerializeToString(deterministic=True)
    OpenVinoEngine.from_graph("x", graph_model, tiny.inputs, ONE)
    assert ir.to_proto(graph_model).SerializeToString(deterministic=True) == before


@pytest.mark.parametrize(
    ("alpha", "beta", "kernel"),
    [(1 / 6, 0.5, "Subgraph"), (0.2, 0.5, "Math"), (1 / 6, 0.4, "Math")],
)
def test_the_usual_hard_sigmoid_is_an_operator_that_fuses(
    onnx_model: Callable[..., Model], alpha: float, beta: float, kernel: str
) -> None:
    body = f"[gate] y = HardSigmoid<alpha={alpha},beta={beta}>(x)"
    model = onnx_model(f"g (float[batch,4,5] x) => (float[batch,4,5] y) {{{body}}}")
    inputs = {"x": np.linspace(-5, 5, 40, dtype=np.float32).reshape(2, 4, 5)}
    engine = _engine(model)
    assert [one.op_type for one in engine.kernels() if one.site == "gate"] == [kernel]
    expected = run(reference_session(model.graph_model), inputs)["y"]
    np.testing.assert_allclose(engine(inputs)["y"], expected, atol=1e-6)
