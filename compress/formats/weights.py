"""Files of weights: torch.save and safetensors, alone or into the module of a factory."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from compress.errors import LoadError, MissingExtraError, UsageError
from compress.formats.factory import call_factory
from compress.formats.file_kind import FileKind
from compress.formats.file_safety import load_trusted, load_weights_only, open_archive

_STATE_KEYS = ("state_dict", "model_state_dict", "model", "net")
_STATE_PREFIXES = ("module.", "_orig_mod.")
_SHOWN_KEYS = 3


def load_weights(
    path: Path, kind: FileKind, factory: str | None, trust_pickle: bool
) -> torch.nn.Module:
    """The module that a torch.save or safetensors file holds, or holds the weights of.

    Raises:
        UsageError: it holds weights only, and there is no `factory`.
        LoadError: it is damaged, or its weights do not fit what `factory` makes.
        UnsafeFileError: it is a pickle that needs other classes than torch.nn's own.
    """
    if kind == "safetensors":
        held: Any = _load_safetensors(path)
    elif trust_pickle:
        held = load_trusted(path)
    else:
        if kind == "torch":
            with open_archive(path):
                pass  # its table of contents is checked on opening
        held = load_weights_only(path)
    if isinstance(held, torch.nn.Module) and factory is None:
        return held
    state = _state_dict(held, path.name)
    if factory is None:
        raise UsageError(
            f"{path.name} holds weights only ({len(state)} tensors: "
            f"{', '.join(list(state)[:_SHOWN_KEYS])} ...) and not what to compute with them. Give "
            "the architecture with --model module:factory."
        )
    module = call_factory(factory)
    _load_state(module, state, path.name, factory)
    return module


def _load_safetensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        from safetensors.torch import load_file
    except ImportError as error:
        raise MissingExtraError(
            f"{path.name} is a safetensors file, and the package that reads it is not installed: "
            "pip install safetensors."
        ) from error
    try:
        return load_file(path)
    except Exception as error:
        raise LoadError(
            f"{path.name} is a safetensors file that cannot be read ({error}): it is truncated "
            "or damaged; copy it again."
        ) from error


def _state_dict(held: Any, name: str) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint, without the prefixes that wrappers add."""
    for key in _STATE_KEYS:
        if isinstance(held, Mapping) and isinstance(held.get(key), Mapping | torch.nn.Module):
            held = held[key]
            break
    if isinstance(held, torch.nn.Module):
        held = held.state_dict()
    tensors = isinstance(held, Mapping) and all(
        isinstance(key, str) and torch.is_tensor(value) for key, value in held.items()
    )
    if not tensors or not held:
        raise LoadError(
            f"{name} is a torch.save file that holds a {type(held).__name__}, but no model and no "
            f"state_dict (nor one under {', '.join(map(repr, _STATE_KEYS))}). Save "
            "model.state_dict()."
        )
    state = dict(held)
    for prefix in _STATE_PREFIXES:
        if all(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): value for key, value in state.items()}
    return state


def _load_state(
    module: torch.nn.Module, state: dict[str, torch.Tensor], name: str, factory: str
) -> None:
    own = module.state_dict()
    # Files from before torch 0.4.1 have no such counter, and inference does not read it.
    missing = [k for k in own if k not in state and not k.endswith("num_batches_tracked")]
    unexpected = [key for key in state if key not in own]
    shapes = [
        f"{key} is {tuple(state[key].shape)} in the file and {tuple(own[key].shape)} in the module"
        for key in own
        if key in state and state[key].shape != own[key].shape
    ]
    problems = [
        f"{what}: {', '.join(keys[:_SHOWN_KEYS])}{' ...' if len(keys) > _SHOWN_KEYS else ''}"
        for what, keys in (
            (f"{len(missing)} keys are missing", missing),
            (f"{len(unexpected)} keys are unexpected", unexpected),
            (f"{len(shapes)} shapes differ", shapes),
        )
        if keys
    ]
    if problems:
        raise LoadError(
            f"The weights of {name} do not fit {factory}: {'; '.join(problems)}. Give the factory "
            "that made the saved model, with the same options."
        )
    module.load_state_dict(state, strict=False)
