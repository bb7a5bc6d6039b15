"""Structural re-parameterization: one function in several structures, or nearly one in a smaller.

    from compress import reparam

    with reparam.tune(model, example_inputs=images):   # fine-tune and keep less for backward
        train(model)
    reparam.expand(model, "repvgg", example_inputs=images)  # branches for training ...
    reparam.merge_expanded(model)                           # ... and the plain network again
    reparam.merge("trained_with_branches.onnx")             # branches that a graph came with
    reparam.factorize(layer, 16, "spatial_svd")             # a chain of smaller layers

Every public name is imported when it is first used; importing this package loads no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from compress.recovery import recover
    from compress.reparam.compiled import compile_tuned
    from compress.reparam.expansion import Expansion, expand, merge_expanded
    from compress.reparam.lowrank import low_rank
    from compress.reparam.lowrank_torch import factorize, full_ranks
    from compress.reparam.merging import MergeBranches, merge
    from compress.reparam.modes import ModeReport, set_mode, tune
    from compress.reparam.pairs import Pair
    from compress.reparam.tuning import FineTune, fine_tune

_HOME = {
    "Expansion": "compress.reparam.expansion",
    "FineTune": "compress.reparam.tuning",
    "MergeBranches": "compress.reparam.merging",
    "ModeReport": "compress.reparam.modes",
    "Pair": "compress.reparam.pairs",
    "compile_tuned": "compress.reparam.compiled",
    "expand": "compress.reparam.expansion",
    "factorize": "compress.reparam.lowrank_torch",
    "fine_tune": "compress.reparam.tuning",
    "full_ranks": "compress.reparam.lowrank_torch",
    "low_rank": "compress.reparam.lowrank",
    "merge": "compress.reparam.merging",
    "merge_expanded": "compress.reparam.expansion",
    "recover": "compress.recovery",
    "set_mode": "compress.reparam.modes",
    "tune": "compress.reparam.modes",
}

__all__ = [
    "Expansion",
    "FineTune",
    "MergeBranches",
    "ModeReport",
    "Pair",
    "compile_tuned",
    "expand",
    "factorize",
    "fine_tune",
    "full_ranks",
    "low_rank",
    "merge",
    "merge_expanded",
    "recover",
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
