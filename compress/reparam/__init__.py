"""Structural re-parameterization: one function in several structures.

    from compress import reparam

    with reparam.tune(model, example_inputs=images):   # fine-tune with half of the memory
        train(model)
    reparam.expand(model, "repvgg", example_inputs=images)  # branches for training ...
    reparam.merge_expanded(model)                           # ... and the plain network again

Importing this package does not load torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from compress.reparam.compiled import compile_tuned
    from compress.reparam.expansion import Expansion, expand, merge_expanded
    from compress.reparam.modes import ModeReport, set_mode, tune
    from compress.reparam.pairs import Pair

_HOME = {
    "Expansion": "compress.reparam.expansion",
    "ModeReport": "compress.reparam.modes",
    "Pair": "compress.reparam.pairs",
    "compile_tuned": "compress.reparam.compiled",
    "expand": "compress.reparam.expansion",
    "merge_expanded": "compress.reparam.expansion",
    "set_mode": "compress.reparam.modes",
    "tune": "compress.reparam.modes",
}

__all__ = [
    "Expansion",
    "ModeReport",
    "Pair",
    "compile_tuned",
    "expand",
    "merge_expanded",
    "set_mode",
    "tune",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'compress.reparam' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
