"""The documented rules of TensorRT for an ONNX file, checked without TensorRT."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import onnx_ir as ir

Severity = Literal["error", "performance", "note"]


@dataclass(frozen=True)
class Violation:
    """One rule that a model breaks.

    Attributes:
        rule: its id.
        node: name of the operator, or "" where it is about the model.
        sentence: what is wrong, for the user.
        source: page that says so.
        severity: "error" (the model is refused, or computes something else), "performance" (it
            runs, slower than it could), or "note" (what the build has to know).
    """

    rule: str
    node: str
    sentence: str
    source: str
    severity: Severity = "error"


def check(model: ir.Model, *, version: str = "10") -> tuple[Violation, ...]:
    """Every violation in the model, errors first."""
    return ()
