from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from compress.data import load_data
from compress.errors import UnsupportedError, UsageError
from compress.export import to_onnx
from compress.model import Model, TensorSpec
from compress.passes import Context
from compress.recipe import Recipe, default_passes
from compress.registry import create_target
from compress.testing import NullTarget, PassContract, tiny_model
from quant.plan import QuantPlan
from quant.ptq import Quantize

TARGET = create_target("cpu", threads=1)


@pytest.fixture(scope="module")
def exported() -> tuple[Model, Model]:
    """The tiny network, and its graph after the free rewrites."""
    original = tiny_model()
    model = to_onnx(original, TARGET.capabilities.opset)
    context = Context(target=TARGET, original=original)
    for step in default_passes()[:-2]:
        model = step.apply(model, context)
    return original, model


def images(count: int = 16) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(count, 3, 16, 16)).astype(np.float32)


def apply(exported: tuple[Model, Model], calibration: Any = None, **options: Any) -> Model:
    original, model = exported
    data = load_data(calibration, model.inputs) if calibration is not None else None
    context = Context(target=TARGET, original=original, calibration=data)
    return Quantize(**options).apply(model, context)


class TestContract(PassContract):
    step = Quantize(samples=8)
    target = TARGET

    def model(self) -> Model:
        return self._exported

    def context(self, model: Model) -> Context:
        return Context(
            target=TARGET, original=tiny_model(), calibration=load_data(images(), model.inputs)
        )

    @pytest.fixture(autouse=True)
    def _share(self, exported: tuple[Model, Model]) -> None:
        # The pass leaves the graph that it is given alone, so one export serves all tests.
        self._exported = exported[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 9}, "--bits 9: 9 is no width"),
        ({"bits": (4, 4)}, "names a width twice"),
        ({"bits": (4, 8), "average_bits": 3}, "below the smallest width, 4"),
        ({"group": 24}, "must be a power of two"),
        ({"method": "median"}, "choose from minmax, percentile, mse, entropy"),
        ({"samples": 0}, "must be at least 1"),
    ],
    ids=["bits", "twice", "average", "group", "method", "samples"],
)
def test_options_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Quantize(**options)


def test_a_target_without_int8_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="null cannot run int8; it runs float32"):
        Quantize().check(tiny_model(), NullTarget())


def test_an_unknown_name_to_keep_in_float(exported: tuple[Model, Model]) -> None:
    with pytest.raises(UsageError, match="keep_float names nope"):
        apply(exported, images(), keep_float=("0", "nope"))


@pytest.mark.parametrize("method", ["minmax", "percentile", "mse", "entropy"])
def test_every_method_gives_a_close_network(exported: tuple[Model, Model], method: str) -> None:
    inputs = {"x": images(64)}
    expected = TARGET.build(exported[1])(inputs)
    got = TARGET.build(apply(exported, images(64), method=method))(inputs)
    for name, array in expected.items():
        cosine = (array * got[name]).sum() / np.linalg.norm(array) / np.linalg.norm(got[name])
        assert cosine > 0.995


def test_the_step_says_what_was_done(exported: tuple[Model, Model]) -> None:
    step = apply(exported, images(), samples=9, keep_float=["8"]).history[-1]
    assert step.name == "quantize"
    assert step.options == {
        "bits": 8,
        "activation_bits": None,
        "edge_bits": 8,
        "average_bits": None,
        "group": 32,
        "simulate": False,
        "method": "mse",
        "samples": 9,
        "per_channel": True,
        "keep_float": ["8"],
    }
    assert step.details["ranges_from"] == "calibration data"
    assert step.details["samples"] == 9
    assert step.details["reasons"]["8"] == "kept in float on request"
    assert QuantPlan.from_dict(step.details["plan"]).roles["4.depthwise"] == "matmul"


def test_few_samples_stand_for_all_of_sorted_data(exported: tuple[Model, Model]) -> None:
    # Sorted by class: the first half is dark, the second bright.
    x = np.concatenate([images(50) * 0.01, images(50) * 10])
    plan = QuantPlan.from_dict(
        apply(exported, x, samples=10, method="minmax").history[-1].details["plan"]
    )
    assert float(plan.activations["x"].scale) * 255 > 30


def test_without_data_and_batchnorm_it_is_dynamic() -> None:
    net = torch.nn.Sequential(
        torch.nn.Linear(16, 32, bias=False), torch.nn.ReLU(), torch.nn.Linear(32, 4, bias=False)
    )
    original = Model(net.eval(), (TensorSpec("x", (1, 5, 16)),), "mlp")
    model = to_onnx(original, TARGET.capabilities.opset)
    done = Quantize().apply(model, Context(target=TARGET, original=original))
    details = done.history[-1].details
    assert details["ranges_from"] == "none: dynamic and weight-only"
    assert details["samples"] == 0
    assert len(details["plan"]["dynamic"]) == 2


def test_an_onnx_file_has_no_statistics_to_learn_from(onnx_model: Callable[..., Model]) -> None:
    text = "g (float[batch,16] x) => (float[batch,4] y) {[a] y = MatMul(x, w)}"
    model = onnx_model(text, w=(16, 4))
    done = Quantize().apply(model, Context(target=TARGET, original=model))
    assert done.history[-1].details["ranges_from"] == "none: dynamic and weight-only"


def test_a_recipe_keeps_every_option(tmp_path: Any) -> None:
    step = Quantize(method="entropy", samples=7, per_channel=False, keep_float=("a", "b.c"))
    path = tmp_path / "recipe.yaml"
    path.write_text(Recipe((step,)).to_yaml())
    assert Recipe.from_yaml(path).passes == (step,)
