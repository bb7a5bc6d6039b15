from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

import compress
from compress.export import to_onnx
from compress.loading import load
from compress.recipe import default_passes
from compress.reference import save_onnx
from compress.registry import create_pass
from compress.rungs import RUNGS

FAST: dict[str, Any] = {"target": "onnxruntime", "threads": 1, "search_seconds": 0, "seconds": 0.5}
SHAPE = (3, 16, 16)


class Unbalanced(torch.nn.Module):
    """Channels whose scales differ by four orders of magnitude, evened out by the next layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Conv2d(3, 32, 3, padding=1)
        self.second = torch.nn.Conv2d(32, 32, 3, padding=1)
        self.head = torch.nn.Linear(32, 10)
        factors = torch.logspace(-2, 2, 32)
        with torch.no_grad():
            self.first.weight *= factors[:, None, None, None]
            self.first.bias *= factors
            self.second.weight /= factors[None, :, None, None]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.second(torch.relu(self.first(x))))
        return self.head(x.mean((2, 3)))


@pytest.fixture(scope="module")
def unbalanced(images: np.ndarray) -> torch.nn.Module:
    torch.manual_seed(0)
    network = Unbalanced().eval()
    with torch.no_grad():
        network.head.bias -= network(torch.from_numpy(images)).mean(0)  # every class wins sometimes
    return network


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((256, *SHAPE)).astype(np.float32)


@pytest.fixture(scope="module")
def labels(unbalanced: torch.nn.Module, images: np.ndarray) -> np.ndarray:
    """What the float network says, so that its accuracy is 1."""
    with torch.no_grad():
        return unbalanced(torch.from_numpy(images)).argmax(1).numpy()


@pytest.fixture
def per_tensor(tmp_path: Path) -> Path:
    """The default recipe with one scale for each weight tensor, which such a network breaks."""
    passes = [{step.name: {}} for step in default_passes() if step.name != "quantize"]
    at = next(i for i, step in enumerate(default_passes()) if step.name == "quantize")
    passes.insert(at, {"quantize": {"per_channel": False}})
    path = tmp_path / "per_tensor.yaml"
    path.write_text(yaml.safe_dump({"passes": passes}))
    return path


def run(model: Any, images: np.ndarray, out: Path, **settings: Any) -> compress.RunResult:
    given = {"inputs": ["1x3x16x16"], "calibration": images[:64], "out": out, **FAST, **settings}
    return compress.run(model, **given)


def test_the_ladder_repairs_a_network_and_names_the_rung(
    unbalanced: torch.nn.Module,
    images: np.ndarray,
    labels: np.ndarray,
    per_tensor: Path,
    tmp_path: Path,
) -> None:
    result = run(
        unbalanced,
        images,
        tmp_path / "out",
        evaluate=(images, labels),
        max_drop="6%",
        recipe=per_tensor,
        min_speedup=None,
    )
    ladder = result.report.ladder
    assert ladder[0]["rung"] == "unrepaired"
    assert ladder[0]["points"]["points"] > 6
    assert ladder[-1]["holds"]
    assert not any(row["holds"] for row in ladder[:-1])
    assert ladder[-1]["rung"] in {"better ranges", "cross-layer equalisation"}
    assert ladder[-1]["rung"] in result.report.headline[0]
    assert all(row["seconds"] >= 0 for row in ladder)
    document = json.loads((result.directory / "report.json").read_text())
    assert document["ladder"] == json.loads(json.dumps(ladder))
    assert "Repair of the accuracy" in (result.directory / "report.md").read_text()


def test_the_recipe_of_a_repaired_artifact_holds_at_once(
    unbalanced: torch.nn.Module,
    images: np.ndarray,
    labels: np.ndarray,
    per_tensor: Path,
    tmp_path: Path,
) -> None:
    settings: dict[str, Any] = {"evaluate": (images, labels), "max_drop": "6%"}
    first = run(unbalanced, images, tmp_path / "first", recipe=per_tensor, **settings)
    if first.report.chosen == "float32":
        pytest.skip("int8 was not faster than float32 on this machine")
    assert first.report.chosen.endswith("repaired")
    again = run(
        unbalanced,
        images,
        tmp_path / "again",
        recipe=tmp_path / "first" / "recipe.yaml",
        **settings,
    )
    assert again.report.ladder == ()
    assert again.met


def test_a_network_that_cannot_be_saved_keeps_the_float_model(
    images: np.ndarray, unbalanced: torch.nn.Module, tmp_path: Path
) -> None:
    seen: list[str] = []

    def hates_int8(engine: compress.Engine) -> float:
        seen.append(engine.name)
        return 0.25 if "int8" in engine.name else 1.0

    result = run(
        unbalanced,
        images,
        tmp_path / "out",
        evaluate=hates_int8,
        max_drop="1%",
        repair_seconds=120,
    )
    report = result.report
    assert not result.met
    assert report.chosen == "float32"
    assert "could not be repaired" in report.headline[0]
    assert "still loses 0.75 of the score" in report.headline[0]
    rungs = {row["rung"] for row in report.ladder}
    assert rungs == {"unrepaired", *(name for name, _ in RUNGS)}
    assert not any(row["holds"] for row in report.ladder)
    training = next(r for r in report.ladder if r["rung"] == "quantization-aware training")
    assert training["reason"] == "There are no training data; give --train DATA."
    assert not (result.directory / "plan.json").exists()


def test_the_command_ends_with_1_where_the_ladder_fails(
    cli: Callable[..., Any],
    images: np.ndarray,
    unbalanced: torch.nn.Module,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    np.savez(tmp_path / "data.npz", x=images[:64])
    (tmp_path / "scores.py").write_text(
        "def hates_int8(engine):\n    return 0.25 if 'int8' in engine.name else 1.0\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    exported = to_onnx(load(unbalanced, inputs=["1x3x16x16"]), 21)
    save_onnx(exported.graph_model, tmp_path / "model.onnx")
    outcome = cli(
        "run", "model.onnx", "--target", "onnxruntime", "--threads", 1,
        "--calibration", "data.npz", "--eval", "scores:hates_int8", "--max-drop", "1%",
        "--time", 0, "--seconds", 0.5, "--repair-time", 5,
    )  # fmt: skip
    assert outcome.code == 1
    assert "could not be repaired" in outcome.out
    assert "Repair of the accuracy" in outcome.out


def test_without_time_nothing_is_repaired(
    images: np.ndarray, unbalanced: torch.nn.Module, tmp_path: Path
) -> None:
    def hates_int8(engine: compress.Engine) -> float:
        return 0.25 if "int8" in engine.name else 1.0

    out = tmp_path / "out"
    result = run(unbalanced, images, out, evaluate=hates_int8, max_drop=0.01, repair_seconds=0)
    assert result.report.ladder == ()
    assert not result.met


def test_every_rung_names_a_pass_that_exists() -> None:
    for name in (
        "equalize",
        "correct_bias",
        "smooth",
        "reestimate_batchnorm",
        "reconstruct",
        "qat",
    ):
        assert create_pass(name).name == name
