from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest

from compress.errors import UsageError
from compress.model import Model
from compress.passes import Context
from compress.recipe import Recipe, default_passes
from compress.registry import create_pass
from compress.target import Target


@dataclass(frozen=True)
class TorchPass:
    """A pass of the torch stage that does nothing."""

    name: ClassVar[str] = "torch_pass"
    stage: ClassVar[Literal["torch"]] = "torch"

    def check(self, model: Model, target: Target) -> None:
        return None

    def apply(self, model: Model, context: Context) -> Model:
        return model


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return path


def test_a_recipe_reads_back_what_it_wrote(tmp_path: Path) -> None:
    settings = {
        "model": "model.pt",
        "inputs": ["1x3x8x8:float32"],
        "target": "cpu",
        "threads": 1,
        "calibration": Path("data/größe.npz"),
        "mean": (0.5, 0.5, 0.5),
        "max_drop": "0.5%",
        "min_speedup": 1.5,
        "seed": 0,
    }
    recipe = Recipe(default_passes(method="entropy", samples=9), settings)
    again = Recipe.from_yaml(written(tmp_path, recipe.to_yaml()))
    assert again.passes == recipe.passes
    assert again.settings == settings | {"calibration": "data/größe.npz", "mean": [0.5, 0.5, 0.5]}
    assert again.to_yaml() == recipe.to_yaml()


def test_what_was_not_set_is_not_written() -> None:
    text = Recipe((), {"model": "m.onnx", "evaluate": None, "inputs": ()}).to_yaml()
    assert "evaluate" not in text
    assert "inputs" not in text


def test_a_name_alone_is_a_pass_with_its_defaults(tmp_path: Path) -> None:
    text = "passes:\n- fold_batchnorm\n- quantize:\n    samples: 5\n- remove_identity:\n"
    read = Recipe.from_yaml(written(tmp_path, text))
    assert [step.name for step in read.passes] == ["fold_batchnorm", "quantize", "remove_identity"]
    assert read.passes[1] == create_pass("quantize", samples=5)


def test_the_default_ends_with_quantization() -> None:
    passes = default_passes()
    assert passes[-1] == create_pass("quantize")
    assert {"fold_batchnorm", "remove_identity"} <= {step.name for step in passes[:-1]}


def test_a_torch_pass_behind_an_onnx_pass_is_refused() -> None:
    fold = create_pass("fold_batchnorm")
    assert Recipe((TorchPass(), fold)).passes
    with pytest.raises(UsageError, match="torch_pass works on torch models and stands after fold"):
        Recipe((fold, TorchPass()))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "needs a list `passes`"),
        ("- fold_batchnorm", "needs a list `passes`"),
        ("passes: quantize", "needs a list `passes`"),
        ("passes: [", "not plain YAML"),
        ("passes: []\nrecipe: 2", "has version 2; this release reads 1"),
        ("passes: []\nspeed: fast", "unknown setting speed"),
        ("passes: [quantise]", "Did you mean 'quantize'"),
        ("passes: [1]", "1 is no pass"),
        ("passes:\n- quantize: 8", "is no pass"),
        ("passes:\n- quantize: {}\n  fold_batchnorm: {}", "is no pass"),
        ("passes:\n- quantize: {bytes: 1}", "has no option bytes"),
        ("passes:\n- quantize: {bits: 3}", "--bits 3 is not supported"),
        ("passes: []\nx: !!python/object/apply:os.getcwd []", "not plain YAML"),
        ("passes: []\n1: 2", "unknown setting 1"),
    ],
    ids=[
        "empty",
        "list",
        "no list",
        "not YAML",
        "other version",
        "unknown setting",
        "unknown pass",
        "number",
        "option without name",
        "two in one",
        "unknown option",
        "option out of range",
        "python object",
        "setting that is no text",
    ],
)
def test_what_is_no_recipe_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Recipe.from_yaml(written(tmp_path, text))


@pytest.mark.parametrize(
    "given",
    [{"samples": "many"}, {"keep_float": 3}, {"samples": None}],
    ids=["text", "number", "null"],
)
def test_an_option_of_another_type_is_a_usage_error(tmp_path: Path, given: dict[str, Any]) -> None:
    import yaml

    text = yaml.safe_dump({"passes": [{"quantize": given}]})
    with pytest.raises(UsageError):
        Recipe.from_yaml(written(tmp_path, text))


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be read"):
        Recipe.from_yaml(tmp_path / "recipe.yaml")


def test_a_file_that_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(b"\x80\x02\xff")
    with pytest.raises(UsageError, match="cannot be read"):
        Recipe.from_yaml(path)
