"""The memory of engines: estimated from the runtime's graph, and by the runtime's own account."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir

from compress import memory
from compress.testing import tiny_exported
from targets.onnxruntime import OnnxRuntime


def test_estimate_of_a_model_file_is_what_onnxruntime_requests(tmp_path: Path) -> None:
    model = tiny_exported(21)
    ir.save(model.graph_model, tmp_path / "model.onnx")
    engine = OnnxRuntime(threads=1).build(model)
    found = memory.peak_bytes(tmp_path / "model.onnx", threads=1)
    in_use = engine.memory_in_use(model.example())
    assert found is not None
    # Its arithmetic on shapes takes some bytes that the folded graph does not have.
    assert abs(in_use - found) <= 32
