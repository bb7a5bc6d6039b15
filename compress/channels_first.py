"""Channels-last islands (ConvNeXt) computed with channels first, without the transposes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import onnx_ir as ir

from compress.model import Model
from compress.passes import Context
from compress.rewrites import (
    axis_size,
    bypass,
    constant_array,
    new_constant,
    replace_constant,
    replace_node,
    rewrite_all,
)
from compress.target import Target

_TO_LAST, _TO_FIRST = (0, 2, 3, 1), (0, 3, 1, 2)
_UNARY = frozenset(["Elu", "Gelu", "HardSwish", "LeakyRelu", "Relu", "Sigmoid", "Tanh"])
Chain = tuple[ir.Node, list[ir.Node], ir.Node]


@dataclass(frozen=True)
class ChannelsFirst:
    """Compute in NCHW what lies between a transpose to channels-last and the one back.

    A linear layer there is a 1x1 convolution, a LayerNorm over channels is written out with its
    means along axis 1, and constants get shape (C, 1, 1). A scale per channel behind the last
    convolution (ConvNeXt's layer scale, arXiv 2201.03545) moves into its weights. Only chains
    are rewritten, and only for targets where moving activations costs more than this saves.
    """

    name: ClassVar[str] = "channels_first"
    stage: ClassVar[Literal["onnx"]] = "onnx"

    def check(self, model: Model, target: Target) -> None:
        """Applies to every model."""

    def apply(self, model: Model, context: Context) -> Model:
        """Rewrite every such chain."""
        wanted = context.target.capabilities.costly_moves
        nodes = model.graph_model.graph if wanted else ()
        chains = [chain for node in nodes if (chain := _chain(node)) is not None]
        return rewrite_all(model, self.name, chains, _rewrite)


def _chain(start: ir.Node) -> Chain | None:
    """The transpose there, what can be computed in NCHW behind it, and the transpose back."""
    if not _turns(start, _TO_LAST):
        return None
    source = start.inputs[0]
    if source is None or source.dtype != ir.DataType.FLOAT or axis_size(source, 1) == 0:
        return None
    nodes: list[ir.Node] = []
    value = start.outputs[0]
    while (reader := _only_reader(value)) is not None:
        if _turns(reader, _TO_FIRST):
            return (start, nodes, reader) if nodes else None
        if not _has_form(reader, value):
            return None
        nodes.append(reader)
        value = reader.outputs[0]
    return None


def _turns(node: ir.Node, perm: tuple[int, ...]) -> bool:
    return node.op_type == "Transpose" and tuple(node.attributes.get_ints("perm", ())) == perm


def _only_reader(value: ir.Value) -> ir.Node | None:
    uses = list(value.uses())
    return uses[0].node if len(uses) == 1 and not value.is_graph_output() else None


def _has_form(node: ir.Node, value: ir.Value) -> bool:
    """Whether an operator on channels-last `value` can be written with channels first."""
    if value.shape is None or not isinstance(value.shape[-1], int):
        return False
    if node.op_type in ("Add", "Mul"):
        return _factor(node, value, (value.shape[-1],)) is not None
    if node.inputs[0] is not value:
        return False
    constants = [constant_array(operand) for operand in node.inputs[1:] if operand is not None]
    if node.op_type == "MatMul":
        return constants[0] is not None and constants[0].ndim == 2
    if node.op_type == "LayerNormalization":
        over_channels = node.attributes.get_int("axis", -1) in (-1, 3)
        return over_channels and all(c is not None and c.ndim == 1 for c in constants)
    return node.op_type in _UNARY


def _factor(node: ir.Node, value: ir.Value, shape: tuple[int, ...]) -> np.ndarray | None:
    """The constant operand beside `value`, if it has this shape."""
    other = node.inputs[0] if node.inputs[1] is value else node.inputs[1]
    array = constant_array(other)
    return array if array is not None and array.shape == shape else None


def _rewrite(graph: ir.Graph, chain: Chain) -> None:
    start, nodes, end = chain
    source = start.inputs[0]
    if source is None:
        return
    bypass(graph, start, source)
    value, conv = source, None
    for node in nodes:
        factor = None
        if node.op_type in ("Add", "Mul"):
            factor = _factor(node, value, (axis_size(value, 1),))
        if factor is not None and conv is not None and conv.outputs[0] is value:
            _absorb(graph, conv, node, factor)
            continue
        if factor is not None:
            index = 0 if node.inputs[1] is value else 1
            replace_constant(graph, node, index, factor.reshape(-1, 1, 1), f"{node.name}.factor")
        elif node.op_type == "MatMul":
            node = conv = _convolution(graph, node)
        elif node.op_type == "LayerNormalization":
            node = _normalization(graph, node, value)
        value = node.outputs[0]
        value.shape = ir.Shape([value.shape[i] for i in _TO_FIRST]) if value.shape else None
    bypass(graph, end, value)
    reader = _only_reader(value)
    if conv is None or conv.outputs[0] is not value or reader is None or reader.op_type != "Mul":
        return
    scale = _factor(reader, value, (axis_size(value, 1), 1, 1))
    if scale is not None:
        _absorb(graph, conv, reader, scale.reshape(-1))


def _absorb(graph: ir.Graph, conv: ir.Node, node: ir.Node, factor: np.ndarray) -> None:
    """Let the convolution add or multiply by one number per output channel itself."""
    weight, bias = constant_array(conv.inputs[1]), constant_array(conv.inputs[2])
    if weight is None or bias is None:
        return
    if node.op_type == "Mul":
        weight, bias = weight * factor.reshape(-1, 1, 1, 1), bias * factor
        replace_constant(graph, conv, 1, weight, f"{conv.name}.weight")
    else:
        bias = bias + factor
    replace_constant(graph, conv, 2, bias, f"{conv.name}.bias")
    bypass(graph, node, conv.outputs[0])


def _convolution(graph: ir.Graph, product: ir.Node) -> ir.Node:
    """A linear layer without its bias as a 1x1 convolution with a bias of zeros."""
    weight = np.asarray(constant_array(product.inputs[1]))
    conv = ir.node("Conv", [product.inputs[0]], {"kernel_shape": [1, 1]}, name=product.name)
    replace_node(graph, product, [conv])
    transposed = np.ascontiguousarray(weight.T)[:, :, None, None]
    replace_constant(graph, conv, 1, transposed, f"{conv.name}.weight")
    replace_constant(graph, conv, 2, np.zeros(weight.shape[1], weight.dtype), f"{conv.name}.bias")
    return conv


def _normalization(graph: ir.Graph, norm: ir.Node, value: ir.Value) -> ir.Node:
    """LayerNorm along axis 1: (x - mean(x)) / sqrt(var(x) + epsilon) gamma + beta."""
    name = norm.name or ""
    made: list[ir.Node] = []

    def step(op: str, suffix: str, *inputs: ir.Value) -> ir.Value:
        made.append(ir.node(op, inputs, name=f"{name}/{suffix}"))
        out = made[-1].outputs[0]
        out.name, out.type, out.shape = f"{made[-1].name}/out", value.type, inputs[0].shape
        return out

    def mean(suffix: str, of: ir.Value) -> ir.Value:
        out = step("ReduceMean", suffix, of, constant("axes", np.array([1], np.int64)))
        out.shape = ir.Shape([1 if i == 1 else n for i, n in enumerate(of.shape or ())])
        return out

    def constant(suffix: str, array: np.ndarray) -> ir.Value:
        return new_constant(graph, array, f"{name}.{suffix}")

    centred = step("Sub", "centred", value, mean("mean", value))
    variance = mean("variance", step("Mul", "squares", centred, centred))
    epsilon = np.array(norm.attributes.get_float("epsilon", 1e-5), np.float32)
    deviation = step("Sqrt", "deviation", step("Add", "safe", variance, constant("eps", epsilon)))
    gamma, beta = ([constant_array(v) for v in norm.inputs[1:]] + [None])[:2]
    out = step("Div", "unit", centred, deviation)
    if gamma is not None:
        out = step("Mul", "scaled", out, constant("gamma", gamma.reshape(-1, 1, 1)))
    if beta is not None:
        step("Add", "shifted", out, constant("beta", beta.reshape(-1, 1, 1)))
    made[-1].name = name
    replace_node(graph, norm, made)
    return made[-1]
