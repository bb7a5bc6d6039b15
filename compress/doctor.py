"""What works on this machine: targets, passes, versions, and what stands in the way."""

from __future__ import annotations

import dataclasses
import os
import platform
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

from compress import registry
from compress.machine import this_machine, versions

PACKAGES = (
    "hwcompress", "torch", "numpy", "onnx", "onnx-ir", "onnxscript", "onnxruntime", "scipy",
    "openvino", "nncf", "onnx2torch", "onnxruntime-gpu", "executorch", "tensorrt",
)  # fmt: skip


def targets() -> list[dict[str, Any]]:
    """Every registered target: name, available, reason, install, provider."""
    return [_target(point) for point in registry.available("compress.targets").values()]


def passes() -> list[dict[str, Any]]:
    """Every registered pass: name, stage, options with defaults, description, provider."""
    return [_pass(point) for point in registry.available("compress.passes").values()]


def examine() -> dict[str, Any]:
    """Facts about this machine and installation, as plain values.

    `problems` holds one sentence for everything that needs attention.
    """
    machine = this_machine()
    here = Path.cwd()
    writable = os.access(here, os.W_OK)
    found = targets()
    problems = []
    if not writable:
        problems.append(f"{here} is not writable: give compress run an --out elsewhere.")
    if not machine.int8_dot_product:
        problems.append(
            "This processor is not known to have an int8 dot product: int8 may not be faster."
        )
    problems += [f"{t['name']}: {t['reason']}" for t in found if not t["available"]]
    return {
        "python": platform.python_version(),
        "versions": versions(*PACKAGES),
        "machine": machine.to_dict(),
        "int8_dot_product": machine.int8_dot_product,
        "bfloat16": machine.bfloat16,
        "directory": {"path": str(here), "writable": writable},
        "targets": found,
        "problems": problems,
    }


def _target(point: EntryPoint) -> dict[str, Any]:
    try:
        check = dataclasses.asdict(registry.create_target(point.name).check())
    except Exception as error:  # a plug-in may fail in any way, and the list must go on
        check = {"available": False, "reason": _broken(point, error), "install": ""}
    return {"name": point.name, **check, "provider": _provider(point)}


def _pass(point: EntryPoint) -> dict[str, Any]:
    row: dict[str, Any] = {"name": point.name, "stage": "", "options": {}, "description": ""}
    try:
        kind = point.load()
        row["stage"] = kind.stage
        row["options"] = {f.name: _default(f) for f in dataclasses.fields(kind)}
        row["description"] = (kind.__doc__ or "").strip().split("\n")[0]
    except Exception as error:  # as above
        row["description"] = _broken(point, error)
    return {**row, "provider": _provider(point)}


def _default(option: dataclasses.Field[Any]) -> str:
    if option.default is not dataclasses.MISSING:
        return repr(option.default)
    if option.default_factory is not dataclasses.MISSING:
        return repr(option.default_factory())
    return "required"


def _broken(point: EntryPoint, error: Exception) -> str:
    return f"{point.value} of {_provider(point)} is broken: {type(error).__name__}: {error}"


def _provider(point: EntryPoint) -> str:
    return f"{point.dist.name} {point.dist.version}" if point.dist is not None else "unknown"
