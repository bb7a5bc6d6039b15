"""Tiny real models and a way to call the command line."""

from __future__ import annotations

import os
import signal
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import settings
from onnx import TensorProto, helper, numpy_helper

from compress.cli import main
from compress.loading import load
from compress.model import Model

settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.register_profile("explore", deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))
"""The same examples each time, so that a failure is the change's; `explore` looks for new ones."""


@pytest.fixture(scope="session", autouse=True)
def _short_peaks() -> Iterator[None]:
    """Peaks are measured for real and shortly: most tests begin with an empty cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("compress.kernel_peaks.SECONDS", 0.1)
        yield


@pytest.fixture(scope="session", autouse=True)
def _interruptible() -> None:
    """A shell without job control starts what is behind & with Ctrl-C ignored, for children too."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """Call `compress` in this process: exit code, stdout and stderr."""

    def call(*arguments: object) -> Outcome:
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            main([str(argument) for argument in arguments])
        code = caught.value.code
        out, err = capsys.readouterr()
        return Outcome(code if isinstance(code, int) else int(code is not None), out, err)

    return call


@pytest.fixture(scope="session")
def tiny_onnx(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Conv 3x3 (3 to 8 channels), Relu, global average pool, Gemm to 4 classes; 3x8x8 images."""
    rng = np.random.default_rng(0)

    def constant(name: str, *shape: int) -> onnx.TensorProto:
        values = rng.normal(0, 0.3, shape).astype(np.float32)
        return numpy_helper.from_array(values, name)

    nodes = [
        helper.make_node("Conv", ["x", "w", "b"], ["c"], name="conv", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c"], ["r"], name="relu"),
        helper.make_node("GlobalAveragePool", ["r"], ["p"], name="pool"),
        helper.make_node("Flatten", ["p"], ["f"], name="flatten"),
        helper.make_node("Gemm", ["f", "g", "h"], ["y"], name="fc"),
    ]
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 3, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 4])],
        [constant("w", 8, 3, 3, 3), constant("b", 8), constant("g", 8, 4), constant("h", 4)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.checker.check_model(model)
    path = tmp_path_factory.mktemp("models") / "tiny.onnx"
    onnx.save(model, path)
    return path


@pytest.fixture(scope="session")
def tiny_images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixteen labelled 3x8x8 images as x (16, 3, 8, 8) float32 and y (16,) int64."""
    rng = np.random.default_rng(1)
    path = tmp_path_factory.mktemp("images") / "images.npz"
    x = rng.standard_normal((16, 3, 8, 8)).astype(np.float32)
    np.savez(path, x=x, y=rng.integers(0, 4, 16))
    return path


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
                # He's scale keeps activations near one: axis 0 of a filter counts its outputs.
                fan = np.prod(value[1:]) if len(value) > 2 else value[0]
                value = rng.normal(0, fan**-0.5, value).astype(np.float32)
            proto.graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))
        onnx.checker.check_model(proto)
        return load(onnx.shape_inference.infer_shapes(proto) if infer else proto)

    return build
