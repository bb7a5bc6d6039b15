"""Structural re-parameterization: other forms of the same function, for training or for running.

    from compress.reparam import merge

    model = merge("trained_with_branches.onnx")

Every public name is imported when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from compress.reparam.merge import MergeBranches, merge

_HOME = {
    "MergeBranches": "compress.reparam.merge",
    "merge": "compress.reparam.merge",
}

__all__ = ["MergeBranches", "merge"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'compress.reparam' has no attribute {name!r}")
    # Set in the module only by name, since a function may be called like the module it is in.
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value
