"""Hardware-aware model compression: from a trained model to a measured artifact.

    import compress

    result = compress.run("model.onnx", target="cpu", bits=8, calibration="images.npz")
    print(result.report.markdown())
    engine = compress.load(result.directory)

Importing this package loads neither torch nor a runtime: every public name is imported when it
is first used.
"""

from __future__ import annotations

import importlib
import os
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from compress.artifact import load
    from compress.building import build
    from compress.data import Data
    from compress.errors import (
        CompressError,
        DataError,
        DeviceError,
        EngineError,
        ExportError,
        LoadError,
        MissingExtraError,
        OutputError,
        UnsafeFileError,
        UnsupportedError,
        UsageError,
    )
    from compress.explaining import Explanation
    from compress.explaining.explain import explain
    from compress.latency import measure
    from compress.model import Model, TensorSpec
    from compress.passes import Context, Pass
    from compress.pipeline import RunResult, run
    from compress.recipe import Recipe
    from compress.regression import CheckResult, check
    from compress.report import Report
    from compress.side_by_side import compare
    from compress.target import Capabilities, Check, Engine, Target

    __version__: str

_HOME = {
    "Capabilities": "compress.target",
    "Check": "compress.target",
    "CheckResult": "compress.regression",
    "CompressError": "compress.errors",
    "Context": "compress.passes",
    "Data": "compress.data",
    "DataError": "compress.errors",
    "DeviceError": "compress.errors",
    "Engine": "compress.target",
    "EngineError": "compress.errors",
    "Explanation": "compress.explaining",
    "ExportError": "compress.errors",
    "LoadError": "compress.errors",
    "MissingExtraError": "compress.errors",
    "Model": "compress.model",
    "OutputError": "compress.errors",
    "Pass": "compress.passes",
    "Recipe": "compress.recipe",
    "Report": "compress.report",
    "RunResult": "compress.pipeline",
    "Target": "compress.target",
    "TensorSpec": "compress.model",
    "UnsafeFileError": "compress.errors",
    "UnsupportedError": "compress.errors",
    "UsageError": "compress.errors",
    "build": "compress.building",
    "check": "compress.regression",
    "compare": "compress.side_by_side",
    "explain": "compress.explaining.explain",
    "load": "compress.artifact",
    "measure": "compress.latency",
    "run": "compress.pipeline",
}

__all__ = [
    "Capabilities",
    "Check",
    "CheckResult",
    "CompressError",
    "Context",
    "Data",
    "DataError",
    "DeviceError",
    "Engine",
    "EngineError",
    "Explanation",
    "ExportError",
    "LoadError",
    "MissingExtraError",
    "Model",
    "OutputError",
    "Pass",
    "Recipe",
    "Report",
    "RunResult",
    "Target",
    "TensorSpec",
    "UnsafeFileError",
    "UnsupportedError",
    "UsageError",
    "__version__",
    "build",
    "check",
    "compare",
    "explain",
    "load",
    "measure",
    "run",
]


def _switch_telemetry_off() -> None:
    # NNCF and OpenVINO's model converter send usage data unless the user has opted out on this
    # machine. Both fall back to a stub of their own where openvino_telemetry cannot be imported;
    # the variable does the same for NNCF in child processes.
    os.environ.setdefault("NNCF_CI", "1")
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]


_switch_telemetry_off()


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("hwcompress")
    if name not in _HOME:
        raise AttributeError(f"module 'compress' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
