"""Linear layers on tokens as Gemm, so that the bias is added inside the int8 kernel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import onnx_ir as ir

from compress.model import Model
from compress.passes import Context
from compress.rewrites import constant_array, new_constant, replace_node, rewrite_all
from compress.target import Target


@dataclass(frozen=True)
class LinearAsGemm:
    """Write MatMul and Add of a linear layer on a rank-3 or rank-4 tensor as one Gemm.

    y = x W + b with x (..., K) becomes Reshape to (M, K), Gemm, Reshape back. In int8 the bias
    then joins the int32 sums, instead of an operator of its own on float32 activations.
    """

    name: ClassVar[str] = "linear_as_gemm"
    stage: ClassVar[Literal["onnx"]] = "onnx"

    def check(self, model: Model, target: Target) -> None:
        """Applies to every model."""

    def apply(self, model: Model, context: Context) -> Model:
        """Rewrite every such pair whose shapes are known but for one axis.

        A target whose kernels are faster on MatMul is left alone.
        """
        wanted = context.target.capabilities.linear == "Gemm"
        nodes = model.graph_model.graph if wanted else ()
        pairs = [pair for node in nodes if (pair := _linear(node)) is not None]
        return rewrite_all(model, self.name, pairs, lambda graph, pair: _rewrite(graph, *pair))


def _linear(product: ir.Node) -> tuple[ir.Node, ir.Node, np.ndarray] | None:
    """MatMul, the Add that is its only reader, and the bias (N,); None for anything else."""
    if product.op_type != "MatMul":
        return None
    source, weight = product.inputs[0], constant_array(product.inputs[1])
    out = product.outputs[0]
    uses = list(out.uses())
    if weight is None or weight.ndim != 2 or len(uses) != 1 or out.is_graph_output():
        return None
    if source is None or source.shape is None or len(source.shape) < 3:
        return None
    if sum(not isinstance(size, int) for size in source.shape) > 1:
        return None  # Reshape can leave one size open, not two
    addition = uses[0].node
    bias = constant_array(addition.inputs[1 - uses[0].idx]) if addition.op_type == "Add" else None
    if bias is None or bias.size != weight.shape[1] or bias.shape[-1:] != weight.shape[1:]:
        return None
    return product, addition, bias.reshape(-1)


def _rewrite(graph: ir.Graph, product: ir.Node, addition: ir.Node, bias: np.ndarray) -> None:
    source, weight = product.inputs[0], product.inputs[1]
    if source is None or source.shape is None or weight is None:
        return
    name, width = product.name or "", len(bias)
    leading = [size if isinstance(size, int) else -1 for size in source.shape[:-1]]
    depth = np.asarray(constant_array(weight)).shape[0]

    def constant(suffix: str, array: np.ndarray) -> ir.Value:
        return new_constant(graph, array, f"{name}.{suffix}")

    rows = constant("rows", np.array([-1, depth], np.int64))
    flat = ir.node("Reshape", [source, rows], name=f"{name}/flatten")
    gemm = ir.node("Gemm", [flat.outputs[0], weight, constant("bias", bias)], name=name)
    shape = constant("shape", np.array([*leading, width], np.int64))
    back = ir.node("Reshape", [gemm.outputs[0], shape], name=f"{name}/restore")
    for made, size in ((flat, depth), (gemm, width)):
        made.outputs[0].name = f"{made.name}/out"
        made.outputs[0].type, made.outputs[0].shape = source.type, ir.Shape([None, size])
    replace_node(graph, addition, [flat, gemm, back])
    graph.remove(product, safe=True)
