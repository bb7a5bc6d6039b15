"""Modules from `--model module:function`."""

from __future__ import annotations

import difflib
import functools
import importlib
import re
import sys
import warnings
from pathlib import Path
from typing import Any

import torch

from compress.errors import UsageError


def call_factory(text: str) -> torch.nn.Module:
    """The module that `module:factory` makes.

    Raises:
        UsageError: it cannot be imported, called, or makes something else.
    """
    match = re.fullmatch(r"([\w.]+):([\w.]+)", text)
    if match is None:
        raise UsageError(
            f"--model {text!r} is no factory. Write module:factory, for example "
            "torchvision.models:resnet18."
        )
    found = _import(text, match.group(1), match.group(2))
    if isinstance(found, torch.nn.Module):
        return found
    if not callable(found):
        raise UsageError(
            f"--model {text}: its type is {type(found).__name__}, which cannot be called."
        )
    try:
        module = found()
    except Exception as error:
        raise UsageError(
            f"--model {text}: calling it without arguments failed ({type(error).__name__}: "
            f"{error}). Give a function that needs none."
        ) from error
    if not isinstance(module, torch.nn.Module):
        raise UsageError(
            f"--model {text} made a {type(module).__name__} and not a torch.nn.Module."
        )
    return module


def _import(text: str, module_name: str, attribute: str) -> Any:
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            module = importlib.import_module(module_name)
        return functools.reduce(getattr, attribute.split("."), module)
    except AttributeError as error:
        close = difflib.get_close_matches(attribute, dir(sys.modules.get(module_name)), n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise UsageError(f"--model {text}: {error}.{hint}") from error
    except Exception as error:
        raise UsageError(
            f"--model {text}: {module_name} cannot be imported ({type(error).__name__}: {error}). "
            "Is it installed, or in the current folder?"
        ) from error
    finally:
        sys.path.remove(here)
