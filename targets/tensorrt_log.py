"""What TensorRT says, for messages."""

from __future__ import annotations

import functools
from typing import Any

import tensorrt as trt

from compress.errors import EngineError


class Log(trt.ILogger):  # type: ignore[misc]
    """Keeps what TensorRT says is wrong, for messages."""

    def __init__(self) -> None:
        trt.ILogger.__init__(self)
        self.errors: list[str] = []

    def log(self, severity: Any, msg: str) -> None:
        """Called by TensorRT."""
        if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
            self.errors.append(msg)


@functools.cache
def log_of_process() -> Log:
    """One for the process, since builder and runtime keep a reference to it."""
    return Log()


def refused(what: str, errors: list[str]) -> EngineError:
    """The error that TensorRT refused or failed, with the last that it said."""
    said = " ".join(one.strip() for one in errors[-3:])
    return EngineError(f"TensorRT {trt.__version__} {what}. {said}".strip())
