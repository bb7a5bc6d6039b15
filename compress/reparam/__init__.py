"""Structural re-parameterization: other forms of the same function, for training or for running.

    from compress.reparam import merge

    model = merge("trained_with_branches.onnx")

Every public name is imported when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from compress.reparam.merging import MergeBranches, merge

_HOME = {
    "MergeBranches": "compress.reparam.merging",
    "merge": "compress.reparam.merging",
}

__all__ = ["MergeBranches", "merge"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'compress.reparam' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value
