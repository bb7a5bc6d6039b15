"""The pass that trains torch networks: in every mode, with branches, and in a recipe."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from compress.data import Data, load_data
from compress.errors import UnsupportedError, UsageError
from compress.export import run_torch
from compress.loading import load
from compress.model import Model
from compress.passes import Context
from compress.pipeline import run
from compress.recipe import Recipe
from compress.registry import create_pass, create_target
from compress.reparam import FineTune, fine_tune
from compress.testing import IMAGE, PassContract, tiny_convnet, tiny_model

SHAPE = "1x3x16x16"
QUICK: dict[str, Any] = {"steps": 30, "batch": 16, "learning_rate": 3e-3, "alpha": 0.1}


def samples(count: int = 256, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Images, and labels that `tiny_convnet` does not know: those of another network."""
    x = np.random.default_rng(seed).normal(size=(count, 3, 16, 16)).astype(np.float32)
    return x, run_torch(tiny_convnet(1), {"x": x})[0].argmax(1)


def loss(module: nn.Module, seed: int = 0) -> float:
    x, y = samples(256, seed)
    with torch.no_grad():
        out = module.eval()(torch.from_numpy(x))
    return float(nn.functional.cross_entropy(out, torch.from_numpy(y)))


def norms(module: nn.Module) -> list[nn.BatchNorm2d]:
    return [m for m in module.modules() if isinstance(m, nn.BatchNorm2d)]


def statistics(module: nn.Module) -> list[torch.Tensor]:
    return [m.running_mean.clone() for m in norms(module) if m.running_mean is not None]


@pytest.mark.parametrize("mode", ["tune", "eval", "train", "deploy"])
def test_it_learns_the_labels_in_every_mode(mode: str) -> None:
    net = tiny_convnet()
    before, weights = statistics(net), copy.deepcopy(net.state_dict())
    done = fine_tune(net, samples(), inputs=[SHAPE], mode=mode, **QUICK)
    found = done.history[-1].details
    trained = done.torch_module
    assert loss(trained) < 0.9 * loss(net)
    assert found["steps"] == QUICK["steps"]
    assert found["held_out"]["measure"] == "top-1"
    assert found["held_out"]["after"] >= found["held_out"]["before"]
    assert all(torch.equal(value, weights[name]) for name, value in net.state_dict().items())
    assert not any(module.training for module in trained.modules())
    if mode == "deploy":
        assert norms(trained) == []
        return
    assert trained.state_dict().keys() == weights.keys()
    same = [torch.equal(a, b) for a, b in zip(before, statistics(trained), strict=True)]
    assert not any(same) if mode == "train" else all(same)
    assert found["folded"] == (len(norms(net)) if mode == "tune" else 0)


def test_tune_is_the_default_and_trains_like_eval() -> None:
    trained = [
        fine_tune(tiny_convnet(), samples(), inputs=[SHAPE], **QUICK, **options).torch_module
        for options in ({}, {"mode": "eval"})
    ]
    for a, b in zip(trained[0].parameters(), trained[1].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", ["repvgg", "acb", "dbb", "mobileone"])
def test_branches_are_trained_and_merged(kind: str) -> None:
    net = tiny_convnet()
    done = fine_tune(net, samples(), inputs=[SHAPE], expand=kind, **QUICK)
    found, trained = done.history[-1].details, done.torch_module
    assert found["expanded"]
    assert found["mode"] == "train"
    assert f"with {kind} branches" in found["remark"]
    assert trained.state_dict().keys() == net.state_dict().keys()
    assert [type(m) for m in trained.modules()] == [type(m) for m in net.modules()]
    assert loss(trained) < 0.9 * loss(net)


@pytest.mark.parametrize("last", [nn.Softmax(1), nn.LogSoftmax(1)], ids=["softmax", "logsoftmax"])
def test_scores_behind_a_softmax_are_trained_as_scores(last: nn.Module) -> None:
    plain, ended = tiny_convnet(), nn.Sequential(*tiny_convnet(), last).eval()
    trained = [
        fine_tune(net, samples(), inputs=[SHAPE], mode="eval", **QUICK).torch_module
        for net in (plain, ended)
    ]
    for a, b in zip(trained[0].parameters(), trained[1].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_what_is_frozen_stays() -> None:
    net = tiny_convnet()
    for parameter in list(net.parameters())[:-2]:
        parameter.requires_grad_(False)
    trained = fine_tune(net, samples(), inputs=[SHAPE], **QUICK).torch_module
    same = [torch.equal(a, b) for a, b in zip(net.parameters(), trained.parameters(), strict=True)]
    assert all(same[:-2])
    assert not any(same[-2:])


def test_a_recipe_trains_before_it_compresses(tmp_path: Path) -> None:
    x, y = samples(512)
    passes = (
        create_pass("fine_tune", expand="repvgg", **{**QUICK, "steps": 60}),
        create_pass("fold_batchnorm"),
        create_pass("quantize"),
    )
    done = run(
        tiny_convnet(),
        inputs=[SHAPE],
        target="onnxruntime",
        threads=1,
        recipe=Recipe(passes),
        calibration=x[:64],
        train=(x, y),
        search_seconds=0,
        seconds=0.5,
        out=tmp_path / "artifact",
    )
    report = done.report
    (step,) = (one for one in report.steps if one["name"] == "fine_tune")
    assert step["details"]["steps"] == 60
    assert any("with repvgg branches" in sentence for sentence in report.headline)
    assert (tmp_path / "artifact" / "model.onnx").is_file()
    again = Recipe.from_yaml(tmp_path / "artifact" / "recipe.yaml")
    assert again.passes == passes


def test_refusals() -> None:
    with pytest.raises(UsageError, match="fine_tune: mode is 'tuned', not one of train, eval"):
        FineTune(mode="tuned")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="fine_tune: expand is 'vgg', not one of none, repvgg"):
        FineTune(expand="vgg")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="deployed branches cannot be merged"):
        FineTune(expand="acb", mode="deploy")
    model = tiny_model()
    with pytest.raises(UsageError, match="Pass fine_tune trains, and there are no data"):
        FineTune().apply(model, Context(target=create_target("cpu"), original=model))
    with pytest.raises(UsageError, match="has no labels"):
        fine_tune(tiny_convnet(), samples()[0], inputs=[SHAPE])
    program = torch.export.export(tiny_convnet(), (torch.zeros(1, 3, 16, 16),))
    captured = Model(program.module(), (IMAGE,), "captured")
    with pytest.raises(UnsupportedError, match=r"captured graph .*Give the network itself"):
        FineTune().check(captured, create_target("cpu"))
    with pytest.raises(UnsupportedError, match="no weights to train"):
        fine_tune(nn.Sequential(nn.Flatten(), nn.ReLU()), samples(), inputs=[SHAPE])
    with pytest.raises(UsageError, match="torch passes first"):
        Recipe((create_pass("fold_batchnorm"), create_pass("fine_tune")))


class TestFineTune(PassContract):
    step = FineTune(steps=2, batch=8, expand="dbb")
    target = create_target("onnxruntime", threads=1)

    def context(self, model: Model) -> Context:
        data: Data = load_data(samples(32), model.inputs)
        return Context(target=self.target, original=tiny_model(), training=data)


def test_a_model_at_the_torch_stage_is_taken_as_it_is() -> None:
    model = load(tiny_convnet(), inputs=[SHAPE])
    done = fine_tune(model, samples(), **{**QUICK, "steps": 2})
    assert done.name == model.name
    assert done.torch_module is not model.torch_module
