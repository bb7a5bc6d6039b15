"""Binding inputs and outputs, on this CPU: the engine's code is the same on a GPU."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from onnxruntime.capi import onnxruntime_inference_collection as collection

from compress.errors import EngineError
from compress.half import to_half
from compress.reference import reference_session, run
from compress.target import Engine, OnDevice
from compress.testing import tiny_exported
from targets.onnxruntime_cuda_engine import GRAPH_ID, OnnxRuntimeCudaEngine


@pytest.fixture(scope="module")
def engine() -> OnnxRuntimeCudaEngine:
    model = tiny_exported(21)
    return OnnxRuntimeCudaEngine("bound", model.graph_model, model.inputs, {}, "float16", "cpu")


def test_outputs_equal_the_reference_for_more_shapes_than_are_kept(
    engine: OnnxRuntimeCudaEngine,
) -> None:
    model = tiny_exported(21)
    session = reference_session(model.graph_model)
    for batch in (1, 2, 3, 4, 5, 6, 1, 6):
        inputs = model.example(batch, seed=batch)
        for name, array in run(session, inputs).items():
            np.testing.assert_allclose(engine(inputs)[name], array, atol=1e-5)


def test_results_are_copies(engine: OnnxRuntimeCudaEngine) -> None:
    model = tiny_exported(21)
    (name,) = engine.outputs
    first = engine(model.example(1, seed=1))[name]
    kept = first.copy()
    second = engine(model.example(1, seed=2))[name]
    np.testing.assert_array_equal(first, kept)
    assert np.abs(first - second).max() > 0


def test_what_stays_on_the_device_is_computed(engine: OnnxRuntimeCudaEngine) -> None:
    assert isinstance(engine, Engine)
    assert isinstance(engine, OnDevice)
    engine.on_device(tiny_exported(21).example(2))()


def test_other_inputs_are_refused(engine: OnnxRuntimeCudaEngine) -> None:
    with pytest.raises(EngineError, match="takes inputs of rank"):
        engine({"x": np.zeros(3, np.float32)})
    with pytest.raises(EngineError, match="ONNX Runtime failed while running"):
        engine({"x": np.zeros((1, 3, 15, 16), np.float32)})


def test_kernels_name_sites_in_the_precision_of_the_model(engine: OnnxRuntimeCudaEngine) -> None:
    kernels = engine.kernels()
    assert {"0", "4.depthwise", "4.pointwise", "8"} <= {kernel.site for kernel in kernels}
    assert {k.precision for k in kernels if k.op_type == "Conv"} <= {"float16"}
    assert "float32" not in {kernel.precision for kernel in kernels}


def test_float16_is_computed_in_float16() -> None:
    """ONNX Runtime's CPU provider runs what the GPU's gets, in its own way."""
    model = tiny_exported(21)
    typed = to_half(model.graph_model, "float16")
    weights = {v.dtype for v in typed.graph.initializers.values() if v.dtype.is_floating_point()}
    assert weights == {ir.DataType.FLOAT16}
    engine = OnnxRuntimeCudaEngine("half", typed, model.inputs, {}, "float16", "cpu")
    inputs = model.example(3)
    (expected,) = run(reference_session(model.graph_model), inputs).values()
    (got,) = engine(inputs).values()
    assert got.dtype == np.float32
    error = np.abs(got - expected).max() / np.abs(expected).max()
    assert 1e-5 < error < 0.01


def test_saves_the_model(engine: OnnxRuntimeCudaEngine, tmp_path: Path) -> None:
    assert [path.name for path in engine.save(tmp_path)] == ["model.onnx"]


def test_the_run_option_is_called_as_in_the_binding() -> None:
    assert getattr(collection, "_GPU_GRAPH_ID_RUN_CONFIG_KEY", GRAPH_ID) == GRAPH_ID
