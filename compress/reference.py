"""ONNX Runtime as the reference for checks and calibration: one place that makes a session.

Not a target: it never measures latency. Targets build their own sessions with their options.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort

from compress.errors import EngineError
from compress.model import Arrays

_PROTOBUF_LIMIT_BYTES = 2_000_000_000
"""Protobuf messages end at 2 GiB; larger models go through a file with external data."""


def initializer_bytes(graph_model: ir.Model) -> int:
    """Bytes of all weights."""
    values = graph_model.graph.initializers.values()
    return sum(value.const_value.nbytes for value in values if value.const_value is not None)


def session(
    graph_model: ir.Model,
    options: ort.SessionOptions,
    providers: Iterable[str],
    left_out: Iterable[str] = (),
) -> ort.InferenceSession:
    """An ONNX Runtime session of an IR model of any size, without the optimizers in `left_out`.

    Raises:
        EngineError: ONNX Runtime refuses the model.
    """
    ort.disable_telemetry_events()
    # Errors come back as exceptions; ONNX Runtime would print them to the terminal as well.
    options.log_severity_level = 4
    how = {"providers": list(providers), "disabled_optimizers": list(left_out)}
    try:
        if initializer_bytes(graph_model) < _PROTOBUF_LIMIT_BYTES:
            serialized = ir.to_proto(graph_model).SerializeToString()
            return ort.InferenceSession(serialized, options, **how)
        with tempfile.TemporaryDirectory(prefix="hwcompress-") as folder:
            path = Path(folder) / "model.onnx"
            ir.save(graph_model, path, external_data="model.data")
            return ort.InferenceSession(str(path), options, **how)
    except Exception as error:
        raise EngineError(f"ONNX Runtime {ort.__version__} refuses the model: {error}") from error


def reference_session(
    graph_model: ir.Model, threads: int = 0, optimize: bool = False
) -> ort.InferenceSession:
    """A CPU session; without `optimize` operators run as they are written."""
    options = ort.SessionOptions()
    level = ort.GraphOptimizationLevel
    options.graph_optimization_level = level.ORT_ENABLE_ALL if optimize else level.ORT_DISABLE_ALL
    options.intra_op_num_threads = threads
    options.enable_mem_pattern = False
    return session(graph_model, options, ["CPUExecutionProvider"])


def run(runtime: ort.InferenceSession, inputs: Mapping[str, np.ndarray]) -> Arrays:
    """Outputs by name.

    Raises:
        EngineError: ONNX Runtime fails.
    """
    names = [output.name for output in runtime.get_outputs()]
    try:
        return dict(zip(names, runtime.run(names, dict(inputs)), strict=True))
    except Exception as error:
        raise EngineError(f"ONNX Runtime failed while running the model: {error}") from error


def largest_difference(got: np.ndarray, expected: np.ndarray) -> float:
    """Largest single difference; infinite where NaN or infinity are not in the same places."""
    a, b = np.asarray(got, np.float64), np.asarray(expected, np.float64)
    finite = np.isfinite(a) & np.isfinite(b)
    if not np.array_equal(a[~finite], b[~finite], equal_nan=True):
        return math.inf
    return float(np.abs(a[finite] - b[finite]).max(initial=0))


def largest_magnitude(array: np.ndarray) -> float:
    """Largest absolute value that is finite; 0 where there is none."""
    values = np.abs(np.asarray(array, np.float64))
    return float(values[np.isfinite(values)].max(initial=0))


def save_onnx(graph_model: ir.Model, path: Path) -> list[Path]:
    """Write an ONNX file, with its weights beside it where protobuf's limit demands."""
    if initializer_bytes(graph_model) < _PROTOBUF_LIMIT_BYTES:
        ir.save(graph_model, path)
        return [path]
    data = path.with_suffix(".data")
    ir.save(graph_model, path, external_data=data.name)
    return [path, data]
