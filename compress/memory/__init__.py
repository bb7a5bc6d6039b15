"""Memory of activations: how much a model needs at once, where, and what could lower it.

    from compress import memory

    memory.peak_bytes("model-cpu")

Importing this package loads nothing else.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from compress.memory.engines import engine_peak, peak_bytes
    from compress.memory.execution import patched
    from compress.memory.order import best_order
    from compress.memory.packing import arena
    from compress.memory.proof import prove
    from compress.memory.splitting import patches

_HOME = {
    "arena": "compress.memory.packing",
    "best_order": "compress.memory.order",
    "engine_peak": "compress.memory.engines",
    "patched": "compress.memory.execution",
    "patches": "compress.memory.splitting",
    "peak_bytes": "compress.memory.engines",
    "prove": "compress.memory.proof",
}

__all__ = ["arena", "best_order", "engine_peak", "patched", "patches", "peak_bytes", "prove"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)
