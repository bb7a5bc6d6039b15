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


def test_alternatives_are_read_as_they_were_written(tmp_path: Path) -> None:
    others = (create_pass("quantize", method="entropy"), create_pass("fold_pad"))
    recipe = Recipe(default_passes(), {"seed": 1}, others)
    again = Recipe.from_yaml(written(tmp_path, recipe.to_yaml()))
    assert (again.passes, again.alternatives) == (recipe.passes, others)
    assert again.settings == {"seed": 1}
    assert "alternatives" not in Recipe(default_passes()).to_yaml()
    text = "passes: [quantize]\nalternatives: [fold_pad, quantize: {samples: 3}]"
    read = Recipe.from_yaml(written(tmp_path, text))
    assert read.alternatives == (create_pass("fold_pad"), create_pass("quantize", samples=3))
    assert Recipe.from_yaml(written(tmp_path, "passes: [fold_pad]\nalternatives:")).passes


def test_alternatives_need_a_pass_to_stand_in_for() -> None:
    others = (create_pass("quantize"),)
    with pytest.raises(UsageError, match="place of the pass that places precisions, and passes ha"):
        Recipe((create_pass("fold_batchnorm"),), {}, others)
    with pytest.raises(UsageError, match="torch_pass works on torch models"):
        Recipe((create_pass("quantize"),), {}, (*others, TorchPass()))


def test_a_name_alone_is_a_pass_with_its_defaults(tmp_path: Path) -> None:
    text = "passes:\n- fold_batchnorm\n- quantize:\n    samples: 5\n- remove_identity:\n"
    read = Recipe.from_yaml(written(tmp_path, text))
    assert [step.name for step in read.passes] == ["fold_batchnorm", "quantize", "remove_identity"]
    assert read.passes[1] == create_pass("quantize", samples=5)


def test_the_default_ends_with_quantization() -> None:
    passes = default_passes()
    assert passes[-2:] == (create_pass("quantize"), create_pass("correct_bias"))
    assert {"fold_batchnorm", "remove_identity"} <= {step.name for step in passes[:-2]}


def test_sixteen_bits_are_the_runtimes_own_floats() -> None:
    assert default_passes(bits=16) == default_passes()[:-2]
    simulated = default_passes(bits=16, simulate=True)
    assert simulated[-2] == create_pass("quantize", bits=16, simulate=True)


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
        ("passes:\n- quantize: {bits: 9}", "--bits 9: 9 is no width"),
        ("passes: []\nx: !!python/object/apply:os.getcwd []", "not plain YAML"),
        ("passes: []\n1: 2", "unknown setting 1"),
        ("passes: [quantize]\nalternatives: quantize", "must be a list of passes"),
        ("passes: [quantize]\nalternatives: [quantise]", "Did you mean 'quantize'"),
        ("passes: [quantize]\nalternatives: [quantize: 3]", "is no pass"),
        ("passes: []\nalternatives: [quantize]", "passes has none"),
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
        "alternatives that are no list",
        "unknown alternative",
        "alternative that is no pass",
        "alternatives to nothing",
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
