"""What TensorRT's engine inspector says of a layer, as a kernel; needs no TensorRT.

The fields are those of the JSON in NVIDIA's documentation of the inspector
(https://docs.nvidia.com/deeplearning/tensorrt/10.16.1/inference-library/engine-tools.html):
`Name`, `LayerType`, `Inputs` and `Outputs` with `Format/Datatype`, and `Metadata` with the names
of the ONNX operators that it executes. With less verbosity a layer is its name alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, Final

from compress.target import Kernel

_MOVES: Final = ("Reformat", "Shuffle", "NoOp", "Slice", "Concatenation", "Gather", "Constant")
_TYPES: Final = (
    ("int8", r"\bint8\b"),
    ("float8", r"\bfp8\b|\bfloat8\b"),
    ("bfloat16", r"\bbf16\b|\bbfloat16\b"),
    ("float16", r"\bfp16\b|\bhalf\b"),
    ("float32", r"\bfp32\b|\bfloat\b"),
)
"""In the order in which they decide: an int8 layer may also read a float operand."""
_QUANTIZING: Final = ("/q", "/dq")
"""Endings of the names of the operators that quantization inserted."""


def kernel_of(layer: Mapping[str, Any] | str) -> Kernel:
    """The kernel of one entry of the inspector's `Layers`."""
    if isinstance(layer, str):
        return Kernel(layer, "", "float32", _site([layer]))
    name, kind = str(layer.get("Name", "")), str(layer.get("LayerType", ""))
    operators = re.findall(r"\[ONNX Layer: ([^\]]+)\]", str(layer.get("Metadata", "")))
    return Kernel(name, kind, _precision(kind, layer), _site(operators or [name]))


def _precision(kind: str, layer: Mapping[str, Any]) -> str:
    if kind in _MOVES:
        return "move"
    read = " ".join(str(one.get("Format/Datatype", "")) for one in layer.get("Inputs", ()))
    for precision, pattern in _TYPES:
        if re.search(pattern, read, re.IGNORECASE):
            return precision
    return "float32"


def _site(operators: Iterable[str]) -> str:
    """The first operator that is not a Q or DQ; fused ones are joined with a plus sign."""
    parts = [part.strip() for one in operators for part in one.split(" + ")]
    return next((part for part in parts if part and not part.endswith(_QUANTIZING)), "")
