"""What Inductor's target, compiler and engine agree on, without torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

Precision = Literal["float32", "tf32", "float16", "bfloat16", "int8", "float8"]
DESCRIPTION: Final = "engine.json"
PACKAGE: Final = "model.pt2"
"""Files of an artifact."""


@dataclass(frozen=True, kw_only=True)
class CompileSettings:
    """How a program is compiled and run.

    Attributes:
        precision: of all operators; "int8" and "float8" are of linear layers, the rest is bfloat16
            then. "tf32" is float32 whose products are rounded to TF32.
        device: "cuda" or "cpu".
        autotune: kernels are chosen by measurement (Inductor's max_autotune), which takes minutes.
        graphs: calls are replayed from a CUDA graph.
    """

    precision: Precision = "float32"
    device: str = "cuda"
    autotune: bool = False
    graphs: bool = True
