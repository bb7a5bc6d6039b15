"""Recipe: ordered passes and the settings of a run, as a YAML file that reproduces it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from compress.errors import CompressError, UsageError
from compress.passes import Pass, Placing, options
from compress.registry import create_pass

VERSION = 1
REPARAM = ("auto", "off", "all")
"""What may be merged; see `compress.reparam.merging`."""
MERGE = "merge_branches"
_Kind = tuple[str, tuple[type, ...], tuple[type, ...]]
_TEXT: _Kind = ("text", (str,), ())
_COUNT: _Kind = ("a whole number", (int,), ())
_NUMBER: _Kind = ("a number", (int, float), ())
_NUMBERS: _Kind = ("a number or a list of numbers", (int, float, list), (int, float))
SETTINGS: Mapping[str, _Kind] = {
    "target_options": ("a mapping of options", (dict,), ()),
    **dict.fromkeys(
        ("model", "factory", "target", "device", "layout", "objective", "reparam"), _TEXT
    ),
    **dict.fromkeys(("calibration", "evaluate", "train"), _TEXT),
    "inputs": ("a list of texts", (list,), (str,)),
    **dict.fromkeys(("threads", "batch", "seed"), _COUNT),
    **dict.fromkeys(("mean", "std"), _NUMBERS),
    "sensitivity": ("true or false", (bool,), ()),
    "max_drop": ("text or a number", (str, int, float), ()),
    "max_memory": ("text such as 320kB, or a number of bytes", (str, int), ()),
    **dict.fromkeys(("min_speedup", "seconds", "search_seconds", "repair_seconds"), _NUMBER),
}
"""What a recipe may set besides its passes, by the names of `compress.run`'s arguments, and what
a file may hold for it: in words, its types, and the types of its items."""


@dataclass(frozen=True)
class Recipe:
    """Passes in order, torch stage before ONNX stage, and settings.

    Attributes:
        passes: what is done to the model.
        settings: see `SETTINGS`.
        alternatives: passes of the ONNX stage; each is tried in place of the first that places
            precisions, and what follows that one, as a further candidate.

    Raises:
        UsageError: a torch pass follows an ONNX pass, a setting does not exist, or alternatives
            have nothing to stand in for.
    """

    passes: tuple[Pass, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)
    alternatives: tuple[Pass, ...] = ()

    def __post_init__(self) -> None:
        exported = ""
        for step in self.passes:
            if step.stage == "torch" and exported:
                raise UsageError(
                    f"Recipe: pass {step.name} works on torch models and stands after {exported}, "
                    f"which works on the exported ONNX graph. Put torch passes first."
                )
            exported = exported or (step.name if step.stage == "onnx" else "")
        unknown = sorted(map(str, set(self.settings) - set(SETTINGS)))
        if unknown:
            raise UsageError(
                f"Recipe: unknown setting {', '.join(unknown)}; allowed are "
                f"{', '.join(SETTINGS)}, passes and alternatives."
            )
        self._check_alternatives()

    def _check_alternatives(self) -> None:
        names = ", ".join(step.name for step in self.alternatives)
        if names and not any(isinstance(step, Placing) for step in self.passes):
            raise UsageError(
                f"Recipe: {names} among the alternatives would be tried in place of the pass that "
                f"places precisions, and passes has none. Add `quantize` to passes, or put "
                f"{names} there."
            )
        early = next((step.name for step in self.alternatives if step.stage == "torch"), "")
        if early:
            raise UsageError(
                f"Recipe: {early} works on torch models, and an alternative gets the exported ONNX "
                f"graph. Put it into passes."
            )

    def to_yaml(self) -> str:
        """The file's text."""
        settings = {k: _plain(v) for k, v in self.settings.items() if v not in (None, (), [], {})}
        document = {"recipe": VERSION, **settings, "passes": _entries(self.passes)}
        if self.alternatives:
            document["alternatives"] = _entries(self.alternatives)
        text = yaml.safe_dump(document, sort_keys=False, allow_unicode=True)
        return f"# Repeat this run: compress run --recipe recipe.yaml\n{text}"

    @classmethod
    def from_yaml(cls, path: Path | str) -> Recipe:
        """Read a recipe; nothing in it is executed.

        Raises:
            UsageError: the file is not a recipe, or names what does not exist.
        """
        try:
            document = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UsageError(
                f"Recipe {path} cannot be read: {reason}. `compress run` writes a recipe.yaml into "
                f"every artifact."
            ) from error
        except yaml.YAMLError as error:
            what = re.sub(r"\s+", " ", str(error))
            raise UsageError(f"Recipe {path} is not plain YAML: {what}") from error
        if not isinstance(document, dict) or not isinstance(document.get("passes"), list):
            raise UsageError(
                f"Recipe {path} is not a recipe: it needs a list `passes`. "
                f"`compress run` writes one into every artifact."
            )
        version = document.pop("recipe", VERSION)
        if version != VERSION:
            raise UsageError(f"Recipe {path} has version {version}; this release reads {VERSION}.")
        passes, others = document.pop("passes"), document.pop("alternatives", None) or []
        if not isinstance(others, list):
            raise UsageError(
                f"Recipe {path}: alternatives is {others!r}, and it must be a list of passes."
            )
        steps, alternatives = (
            tuple(_read_pass(path, entry) for entry in entries) for entries in (passes, others)
        )
        recipe = cls(steps, document, alternatives)
        for name, value in document.items():
            _check_setting(path, name, value)
        return recipe


def default_passes(reparam: str = "auto", **quantize: Any) -> tuple[Pass, ...]:
    """Free rewrites, then quantization with these options and the correction of biases.

    `reparam` is one of `REPARAM`.

    With 16 bits there is nothing to quantize: the runtimes' own 16-bit floats are candidates.
    """
    free = (
        "remove_identity",
        "fold_pad",
        "fold_batchnorm",
        "pool_spatial_mean",
        "depthwise_form",
        "channels_first",
        "shuffle_in_convolution",
        "linear_as_gemm",
    )
    rewrites = with_reparam(tuple(create_pass(name) for name in free), reparam)
    if str(quantize.get("bits")) == "16" and not quantize.get("simulate"):
        return rewrites
    return (*rewrites, create_pass("quantize", **quantize), create_pass("correct_bias"))


def with_reparam(passes: tuple[Pass, ...], reparam: str) -> tuple[Pass, ...]:
    """The passes with `merge_branches` behind the folding of BatchNorm, or without it if "off"."""
    others = tuple(step for step in passes if step.name != MERGE)
    if reparam == "off":
        return others
    folds = [i for i, step in enumerate(others) if step.name == "fold_batchnorm"]
    torch = [i for i, step in enumerate(others) if step.stage == "torch"]
    at = max((*folds, *torch), default=-1) + 1
    return (*others[:at], create_pass(MERGE, profit=reparam), *others[at:])


def _entries(steps: Sequence[Pass]) -> list[dict[str, Any]]:
    return [{step.name: _plain(options(step))} for step in steps]


def _read_pass(path: Path | str, entry: object) -> Pass:
    if isinstance(entry, str):
        return create_pass(entry)
    if isinstance(entry, dict) and len(entry) == 1:
        (name, given), *_ = entry.items()
        if isinstance(name, str) and isinstance(given, dict | None):
            return _configured(path, name, given or {})
    raise UsageError(
        f"Recipe {path}: {entry!r} is no pass. Write a name, or `name: {{option: value}}`; "
        f"`compress passes` lists them."
    )


def _configured(path: Path | str, name: str, given: Mapping[str, Any]) -> Pass:
    try:
        return create_pass(name, **given)
    except CompressError:
        raise
    except (TypeError, ValueError) as error:
        listed = ", ".join(f"{key}: {value!r}" for key, value in given.items())
        raise UsageError(
            f"Recipe {path}: pass {name} does not take {listed} ({error}). `compress passes` lists "
            f"its options with their defaults."
        ) from error


def _check_setting(path: Path | str, name: str, value: object) -> None:
    words, types, item_types = SETTINGS[name]
    items = value if isinstance(value, list) else []
    fits = isinstance(value, types) and all(isinstance(item, item_types) for item in items)
    if value is not None and (not fits or (isinstance(value, bool) and bool not in types)):
        raise UsageError(f"Recipe {path}: {name} is {value!r}, and it must be {words}.")


def _plain(value: Any) -> Any:
    """Tuples as lists and paths as text: what YAML's safe dumper knows."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(item) for item in value]
    return value if isinstance(value, (bool, int, float, str, type(None))) else str(value)
