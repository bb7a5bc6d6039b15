"""Re-parameterization: other weights and layers for what a network computes.

Every public name is imported when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from compress.recovery import recover
    from compress.reparam.lowrank import low_rank
    from compress.reparam.lowrank_torch import factorize, full_ranks

_HOME = {
    "factorize": "compress.reparam.lowrank_torch",
    "full_ranks": "compress.reparam.lowrank_torch",
    "low_rank": "compress.reparam.lowrank",
    "recover": "compress.recovery",
}

__all__ = ["factorize", "full_ranks", "low_rank", "recover"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'compress.reparam' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
