"""Hand-made ONNX graphs, and what takes long to make: shared by a whole session."""

from __future__ import annotations

import zlib
from collections.abc import Callable

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from compress.export import to_onnx
from compress.loading import load
from compress.model import Model
from compress.testing import tiny_model


@pytest.fixture(scope="session")
def onnx_model() -> Callable[..., Model]:
    """Build a model from ONNX text; a weight is an array, or a shape to be filled at random."""

    def build(
        text: str, *, opset: int = 21, infer: bool = True, **weights: np.ndarray | tuple[int, ...]
    ) -> Model:
        proto = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : {opset}]> {text}')
        for name, value in weights.items():
            if isinstance(value, tuple):
                rng = np.random.default_rng(zlib.crc32(name.encode()))
                value = rng.normal(0, 0.3, value).astype(np.float32)
            proto.graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))
        onnx.checker.check_model(proto)
        return load(onnx.shape_inference.infer_shapes(proto) if infer else proto)

    return build


@pytest.fixture(scope="session")
def exported_once() -> Model:
    """The tiny network of the test kit as an ONNX graph; never change it."""
    return to_onnx(tiny_model(), 21)


@pytest.fixture
def exported(exported_once: Model) -> Model:
    """A copy of the exported tiny network that a test may change."""
    copy = exported_once.graph_model.clone()
    return exported_once.evolve(copy, exported_once.history[-1])
