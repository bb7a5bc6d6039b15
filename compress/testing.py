"""Test kit: tiny networks, and the contracts that every pass and every target keeps.

    from compress.testing import TargetContract

    class TestNPU(TargetContract):
        target = NPU()

pytest collects the subclass; the contract's tests run against your class as against ours.
"""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import yaml

from compress.errors import UnsupportedError
from compress.export import to_onnx
from compress.model import Model, TensorSpec
from compress.passes import Context, Pass, options
from compress.reference import reference_session, run
from compress.registry import create_pass
from compress.target import Capabilities, Check, Engine, Target

if TYPE_CHECKING:
    import torch

IMAGE = TensorSpec("x", (1, 3, 16, 16))


def tiny_convnet(seed: int = 0) -> torch.nn.Module:
    """A residual ConvBN network with a depthwise layer, for inputs (N, 3, 16, 16); 10 classes."""
    import torch
    from torch import nn

    class Block(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.depthwise = nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False)
            self.bn1 = nn.BatchNorm2d(width)
            self.pointwise = nn.Conv2d(width, width, 1)
            self.bn2 = nn.BatchNorm2d(width)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            inner = torch.relu(self.bn1(self.depthwise(x)))
            return torch.relu(x + self.bn2(self.pointwise(inner)))

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = nn.Sequential(
            nn.Conv2d(3, 16, 3, stride=2, padding=1),
            nn.BatchNorm2d(16),
            nn.ReLU6(),
            nn.Dropout(0.1),
            Block(16),
            nn.MaxPool2d(2),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(16, 10),
        )
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, 0, 0.2)
        with torch.no_grad():
            net.train()(torch.randn(64, 3, 16, 16))
    return net.eval()


def tiny_model(seed: int = 0) -> Model:
    """`tiny_convnet` as a model at the torch stage."""
    return Model(tiny_convnet(seed), (IMAGE,), "tiny")


def tiny_exported(opset: int) -> Model:
    """`tiny_model` at the ONNX stage; a fresh copy of one export for each opset."""
    model = _export_once(opset)
    return dataclasses.replace(model, program=model.graph_model.clone())


@functools.cache
def _export_once(opset: int) -> Model:
    return to_onnx(tiny_model(), opset)


class PassContract:
    """What a pass promises. Set `step`; override `model` for a network that the pass acts on."""

    step: ClassVar[Pass]
    target: ClassVar[Target]

    def model(self) -> Model:
        """A fresh model at the pass's stage."""
        if self.step.stage == "torch":
            return tiny_model()
        return tiny_exported(self.target.capabilities.opset)

    def context(self, model: Model) -> Context:
        """What the pass gets; override to hand it calibration data."""
        return Context(target=self.target, original=tiny_model())

    def _outputs(self) -> dict[str, np.ndarray]:
        model = self.model()
        done = self.step.apply(model, self.context(model))
        exported = to_onnx(done, self.target.capabilities.opset)
        return run(reference_session(exported.graph_model), exported.example(2))

    def test_check_accepts_the_model(self) -> None:
        """`check` is cheap and passes before `apply` does."""
        self.step.check(self.model(), self.target)

    def test_shapes_stay(self) -> None:
        """The transformed model has the original's outputs by name and shape."""
        original = self.model()
        exported = to_onnx(original, self.target.capabilities.opset)
        before = run(reference_session(exported.graph_model), exported.example(2))
        after = self._outputs()
        assert {n: a.shape for n, a in before.items()} == {n: a.shape for n, a in after.items()}

    def test_same_seed_same_result(self) -> None:
        """Two applications give bit-identical outputs."""
        first, second = self._outputs(), self._outputs()
        for name, array in first.items():
            np.testing.assert_array_equal(array, second[name])

    def test_history_grows_by_one(self) -> None:
        """The step is recorded under the pass's name."""
        model = self.model()
        done = self.step.apply(model, self.context(model))
        assert len(done.history) == len(model.history) + 1
        assert done.history[-1].name == self.step.name

    def test_options_round_trip_through_yaml(self) -> None:
        """A recipe can write the pass and read it back."""
        text = yaml.safe_dump({k: _plain(v) for k, v in options(self.step).items()})
        again = create_pass(self.step.name, **(yaml.safe_load(text) or {}))
        assert again == self.step

    def test_is_frozen(self) -> None:
        """Options cannot change after construction."""
        assert dataclasses.is_dataclass(self.step)
        assert type(self.step).__dataclass_params__.frozen


class TargetContract:
    """What a target promises. Set `target`."""

    target: ClassVar[Target]
    tolerance: ClassVar[float] = 1e-4

    def exported(self) -> Model:
        """A tiny network at the target's opset."""
        return tiny_exported(self.target.capabilities.opset)

    def test_is_a_target(self) -> None:
        """The class has every member of the protocol."""
        assert isinstance(self.target, Target)

    def test_capabilities_name_their_source(self) -> None:
        """No fact without a source."""
        facts = self.target.capabilities
        assert facts.source
        assert all(pattern.source for pattern in facts.patterns)

    def test_check_gives_a_reason(self) -> None:
        """Unavailable means: why, and what to install."""
        check = self.target.check()
        assert check.available or (check.reason and check.install)

    def test_outputs_equal_the_reference(self) -> None:
        """Float outputs agree with unoptimized ONNX Runtime, for several batch sizes."""
        model = self.exported()
        engine = self.target.build(model)
        reference = reference_session(model.graph_model)
        for batch in (1, 3):
            inputs = model.example(batch)
            for name, array in run(reference, inputs).items():
                np.testing.assert_allclose(engine(inputs)[name], array, atol=self.tolerance)

    def test_engine_is_synchronous_and_repeatable(self) -> None:
        """Two calls give equal outputs that do not share memory."""
        model = self.exported()
        engine = self.target.build(model)
        inputs = model.example()
        first = {name: array.copy() for name, array in engine(inputs).items()}
        second = engine(inputs)
        assert isinstance(engine, Engine)
        for name, array in first.items():
            np.testing.assert_array_equal(array, second[name])

    def test_save_and_load(self, tmp_path: Path) -> None:
        """What `save` writes, `load` runs with equal outputs."""
        model = self.exported()
        engine = self.target.build(model)
        files = engine.save(tmp_path)
        assert files
        assert all(path.is_file() and path.parent == tmp_path for path in files)
        inputs = model.example()
        again = self.target.load(tmp_path)(inputs)
        for name, array in engine(inputs).items():
            np.testing.assert_array_equal(array, again[name])

    def test_kernels_name_sites(self) -> None:
        """Every convolution of the network can be found among the kernels."""
        kernels = self.target.build(self.exported()).kernels()
        assert {"0", "4.depthwise", "4.pointwise", "8"} <= {kernel.site for kernel in kernels}


@dataclasses.dataclass(frozen=True)
class NullTarget:
    """A target that is always unavailable and runs nothing: for tests of error paths."""

    name: ClassVar[str] = "null"

    @property
    def capabilities(self) -> Capabilities:
        """Float only."""
        return Capabilities(source="made up for tests", opset=21, precisions=("float32",))

    def check(self) -> Check:
        """Never there."""
        return Check(False, "It exists only for tests.", "pip install nothing")

    def build(self, model: Model) -> Engine:
        """Refuse."""
        raise UnsupportedError("The null target builds nothing.")

    def load(self, directory: Path) -> Engine:
        """Refuse."""
        raise UnsupportedError("The null target loads nothing.")


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
