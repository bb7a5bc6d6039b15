"""Hand-made ONNX graphs, as a user's file would hold them."""

from __future__ import annotations

import zlib
from collections.abc import Callable

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from compress.loading import load
from compress.model import Model


@pytest.fixture(scope="session")
def onnx_model() -> Callable[..., Model]:
    """Build a model from ONNX text; a weight is an array, or a shape to be filled at random."""

    def build(text: str, *, infer: bool = True, **weights: np.ndarray | tuple[int, ...]) -> Model:
        proto = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 21]> {text}')
        for name, value in weights.items():
            if isinstance(value, tuple):
                rng = np.random.default_rng(zlib.crc32(name.encode()))
                # He's scale keeps activations near one: axis 0 of a filter counts its outputs.
                fan = np.prod(value[1:]) if len(value) > 2 else value[0]
                value = rng.normal(0, fan**-0.5, value).astype(np.float32)
            proto.graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))
        onnx.checker.check_model(proto)
        return load(onnx.shape_inference.infer_shapes(proto) if infer else proto)

    return build
