"""Models and a recorded baseline for the gate."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from compress.regression import timing
from compress.regression.recording import record_baseline


def shorten(patch: pytest.MonkeyPatch) -> None:
    """Pairs a few times shorter than at the default: here differences are large or none."""
    patch.setattr(timing, "PAIR_SECONDS", 0.04)
    patch.setattr(timing, "BLOCK_SECONDS", 0.002)


@pytest.fixture
def short_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    shorten(monkeypatch)


@pytest.fixture(scope="session")
def slow_onnx(tiny_onnx: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny network with 64 times as many channels: many times slower, with the same input."""
    model = onnx.load(tiny_onnx)
    rng = np.random.default_rng(2)
    wide = {"w": (512, 3, 3, 3), "b": (512,), "g": (512, 4), "h": (4,)}
    for tensor in model.graph.initializer:
        values = rng.normal(0, 0.1, wide[tensor.name]).astype(np.float32)
        tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    path = tmp_path_factory.mktemp("models") / "slow.onnx"
    onnx.save(model, path)
    return path


@pytest.fixture(scope="session")
def recorded(tiny_onnx: Path, tiny_images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A baseline of the tiny network, for one thread."""
    folder = tmp_path_factory.mktemp("baselines")
    with pytest.MonkeyPatch.context() as patch:
        shorten(patch)
        out, _ = record_baseline(
            tiny_onnx,
            folder / "baseline",
            budget=folder / "budgets.yaml",
            evaluate_on=str(tiny_images),
            seconds=0.1,
            threads=1,
        )
    return out


@pytest.fixture
def baseline(recorded: Path, tmp_path: Path) -> Path:
    """A copy of it that a test may damage."""
    return Path(shutil.copytree(recorded, tmp_path / "baseline"))
