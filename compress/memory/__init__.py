"""Memory of activations: how much a model needs at once, where, and what could lower it.

    from compress import memory

    memory.peak_bytes("model-cpu")

Importing this package loads nothing else.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from compress.memory.engines import peak_bytes

_HOME = {"peak_bytes": "compress.memory.engines"}

__all__ = ["peak_bytes"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)
