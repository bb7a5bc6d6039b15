"""The latency gate: is this artifact slower, larger or less accurate than the one before?

    from compress import check

    result = check("model-cpu", "baseline", budget="budgets.yaml")
    assert result.ok, result.headline

Importing this package loads nothing else.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from compress.regression.checking import check
    from compress.regression.recording import record_baseline
    from compress.regression.result import CheckResult, Row

_HOME = {
    "CheckResult": "compress.regression.result",
    "Row": "compress.regression.result",
    "check": "compress.regression.checking",
    "record_baseline": "compress.regression.recording",
}

__all__ = ["CheckResult", "Row", "check", "record_baseline"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)
