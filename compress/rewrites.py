"""Free rewrites: the same function in fewer operators, with the equality checked."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, TypeVar

import numpy as np
import onnx_ir as ir
import onnx_ir.convenience as convenience

from compress.errors import ExportError
from compress.model import Arrays, Model, Step
from compress.passes import Context
from compress.reference import largest_difference, largest_magnitude, reference_session, run
from compress.target import Target

Found = TypeVar("Found")
Statistics = dict[str, tuple[np.ndarray, np.ndarray]]
"""Mean and standard deviation of every output channel, by the operator's name; float64, (C,)."""
STATISTICS = "statistics"
"""Where a step keeps them; not part of any report."""
RELATIVE_TOLERANCE = 1e-4
"""Largest difference that float32 rounding explains, relative to the largest output."""


@dataclass(frozen=True)
class FoldBatchNorm:
    """Fold BatchNorm into the convolution or linear layer before it.

    With s = gamma / sqrt(var + eps): W' = s W and b' = s (b - mean) + beta, computed in
    float64 (Jacob et al. 2018, arXiv 1712.05877, section 3.2). A BatchNorm that follows
    something else, or whose convolution has a second user, is left alone and named. What it
    normalized to is kept, see `output_statistics`.
    """

    name: ClassVar[str] = "fold_batchnorm"
    stage: ClassVar[Literal["onnx"]] = "onnx"

    def check(self, model: Model, target: Target) -> None:
        """Applies to every model."""

    def apply(self, model: Model, context: Context) -> Model:
        """Fold what can be folded; outputs equal the input model's within rounding."""
        graph = model.graph_model.graph
        norms = [node for node in graph if node.op_type == "BatchNormalization"]
        expected = run(reference_session(model.graph_model), model.example()) if norms else {}
        folded, left = 0, {}
        statistics = output_statistics(model)
        for norm in norms:
            if reason := _fold(graph, norm, statistics):
                left[norm.name or ""] = reason
            else:
                folded += 1
        remove_unused(model.graph_model)
        details = {
            "folded": folded,
            "left": left,
            **check_equal(model, expected),
            STATISTICS: listed(statistics),
        }
        return model.evolve(model.graph_model, Step(self.name, {}, details))


def output_statistics(model: Model) -> Statistics:
    """Mean and standard deviation that BatchNorm gave the outputs of layers it was folded into.

    They are those of the layer's own output, before any activation. A pass that gives channels
    another scale or shift records all of them anew; the last record holds.
    """
    for step in reversed(model.history):
        if STATISTICS in step.details:
            return {
                name: (np.array(one["mean"], np.float64), np.array(one["std"], np.float64))
                for name, one in step.details[STATISTICS].items()
            }
    return {}


def listed(statistics: Statistics) -> dict[str, dict[str, list[float]]]:
    """As plain lists, for the details of a step."""
    return {
        name: {"mean": mean.tolist(), "std": std.tolist()}
        for name, (mean, std) in statistics.items()
    }


def _fold(graph: ir.Graph, norm: ir.Node, statistics: Statistics) -> str:
    """Fold one BatchNorm into its producer and note it; the reason why not, or ""."""
    source = norm.inputs[0]
    conv = source.producer() if source is not None else None
    if conv is None or conv.op_type not in ("Conv", "ConvTranspose", "Gemm"):
        return f"follows {conv.op_type if conv is not None else 'an input'}"
    out = conv.outputs[0]
    if len(out.uses()) > 1 or out.is_graph_output():
        return f"{conv.name} has a second user"
    if norm.attributes.get_int("training_mode", 0):
        return "is in training mode"
    bias_value = conv.inputs[2] if len(conv.inputs) > 2 else None
    constants = [constant_array(value) for value in (conv.inputs[1], *norm.inputs[1:5])]
    bias = constant_array(bias_value)
    if any(c is None for c in constants) or (bias is None and bias_value is not None):
        return "has weights that are not constant"
    if bias is not None and np.prod(bias.shape[:-1]) != 1:
        return f"{conv.name} has a bias for each row"
    weight, gamma, beta, mean, var = (np.asarray(c, np.float64) for c in constants)
    epsilon = norm.attributes.get_float("epsilon", 1e-5)
    scale = gamma / np.sqrt(var + epsilon)
    if bias is None:
        bias = np.zeros_like(scale)
    if conv.op_type == "Gemm":
        # y = alpha A B + beta_c C: the factor on C moves into the new bias.
        bias = bias * conv.attributes.get_float("beta", 1.0)
        conv.attributes["beta"] = ir.AttrFloat32("beta", 1.0)
    new_bias = scale * (np.broadcast_to(bias.reshape(-1), scale.shape) - mean) + beta
    dtype = constants[0].dtype  # type: ignore[union-attr]
    base = conv.name or out.name or ""
    replace_constant(graph, conv, 1, _scaled(conv, weight, scale).astype(dtype), f"{base}.weight")
    replace_constant(graph, conv, 2, new_bias.astype(dtype), f"{base}.bias")
    bypass(graph, norm, out)
    # What reaches the BatchNorm has the variance var; epsilon makes its output a bit narrower.
    statistics[base] = beta, np.abs(gamma) * np.sqrt(var / (var + epsilon))
    return ""


def _scaled(conv: ir.Node, weight: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """The weight with every output channel multiplied by its scale."""
    factors = scale
    if conv.op_type == "Conv":  # (Co, Ci/g, *k)
        factors = scale.reshape(-1, *[1] * (weight.ndim - 1))
    elif conv.op_type == "ConvTranspose":  # (Ci, Co/g, *k): channel o is in group o // (Co/g)
        groups = conv.attributes.get_int("group", 1)
        per_group = scale.reshape(groups, 1, -1, *[1] * (weight.ndim - 2))
        factors = np.repeat(per_group, weight.shape[0] // groups, 1)
        factors = factors.reshape(weight.shape[0], -1, *[1] * (weight.ndim - 2))
    elif conv.attributes.get_int("transB", 0):  # Gemm, (out, in); else (in, out)
        factors = scale[:, None]
    return np.asarray(weight * factors)


@dataclass(frozen=True)
class RemoveIdentity:
    """Remove Identity and Dropout, which do nothing at inference."""

    name: ClassVar[str] = "remove_identity"
    stage: ClassVar[Literal["onnx"]] = "onnx"

    def check(self, model: Model, target: Target) -> None:
        """Applies to every model."""

    def apply(self, model: Model, context: Context) -> Model:
        """Connect the users of every such operator to its input."""
        graph = model.graph_model.graph
        removed = 0
        for node in list(graph):
            if node.op_type not in ("Identity", "Dropout") or node.domain not in ("", "ai.onnx"):
                continue
            source = node.inputs[0]
            unused = all(not out.uses() and not out.is_graph_output() for out in node.outputs[1:])
            is_output = node.outputs[0].is_graph_output()
            # An output keeps its name: the producer takes it over, if it has no other role.
            blocked = is_output and (
                source is None or source.producer() is None or source.is_graph_output()
            )
            if source is not None and unused and not blocked and not _training(node):
                bypass(graph, node, source)
                removed += 1
        return model.evolve(model.graph_model, Step(self.name, {}, {"removed": removed}))


def _training(node: ir.Node) -> bool:
    if node.op_type != "Dropout" or len(node.inputs) < 3 or node.inputs[2] is None:
        return False
    flag = constant_array(node.inputs[2])
    return flag is None or bool(np.asarray(flag).item())


@dataclass(frozen=True)
class PoolSpatialMean:
    """Write a mean over height and width as GlobalAveragePool, which runtimes have in int8."""

    name: ClassVar[str] = "pool_spatial_mean"
    stage: ClassVar[Literal["onnx"]] = "onnx"

    def check(self, model: Model, target: Target) -> None:
        """Applies to every model."""

    def apply(self, model: Model, context: Context) -> Model:
        """Replace every ReduceMean over axes 2 and 3 of a rank-4 tensor."""
        graph = model.graph_model.graph
        replaced = 0
        for node in list(graph):
            if node.op_type == "ReduceMean" and _is_spatial(node):
                _pool(graph, node)
                replaced += 1
        remove_unused(model.graph_model)
        return model.evolve(model.graph_model, Step(self.name, {}, {"replaced": replaced}))


def _is_spatial(node: ir.Node) -> bool:
    source = node.inputs[0]
    if source is None or source.shape is None or len(source.shape) != 4:
        return False
    if source.dtype not in (ir.DataType.FLOAT, ir.DataType.FLOAT16):
        return False  # runtimes pool nothing else
    if len(node.inputs) > 1:  # opset 18 and later: axes are an input
        axes = constant_array(node.inputs[1])
    else:
        axes = np.array(node.attributes.get_ints("axes", ()))
    return axes is not None and sorted(int(axis) % 4 for axis in axes) == [2, 3]


def _pool(graph: ir.Graph, node: ir.Node) -> None:
    out = node.outputs[0]
    pool = ir.node("GlobalAveragePool", [node.inputs[0]], name=node.name)
    nodes = [pool]
    if not node.attributes.get_int("keepdims", 1):
        pooled = pool.outputs[0]
        nodes.append(ir.node("Flatten", [pooled], {"axis": 1}, name=f"{node.name}/Flatten"))
        pooled.name, pooled.type = f"{out.name}/pooled", out.type
        if out.shape is not None:
            pooled.shape = ir.Shape([*out.shape, 1, 1])
    replace_node(graph, node, nodes)


def rewrite_all(
    model: Model, name: str, found: Sequence[Found], rewrite: Callable[[ir.Graph, Found], None]
) -> Model:
    """Apply a rewrite to each place that was found, and check that the outputs stay equal.

    Raises:
        ExportError: they differ by more than rounding.
    """
    expected = run(reference_session(model.graph_model), model.example()) if found else {}
    for one in found:
        rewrite(model.graph_model.graph, one)
    remove_unused(model.graph_model)
    details = {"rewritten": len(found), **check_equal(model, expected)}
    return model.evolve(model.graph_model, Step(name, {}, details))


def axis_size(value: ir.Value, axis: int) -> int:
    """Elements along an axis; 0 where that is not known."""
    size = value.shape[axis] if value.shape is not None else None
    return size if isinstance(size, int) else 0


def check_equal(model: Model, expected: Arrays) -> dict[str, float]:
    """Compare the model's outputs on its example with those from before a rewrite.

    Raises:
        ExportError: they differ by more than rounding.
    """
    if not expected:
        return {"max_abs_difference": 0.0}
    got = run(reference_session(model.graph_model), model.example())
    worst = max(largest_difference(got[name], array) for name, array in expected.items())
    scale = max(largest_magnitude(array) for array in expected.values())
    if not worst <= RELATIVE_TOLERANCE * max(scale, 1e-6):
        raise ExportError(
            f"A rewrite of {model.name} changed its outputs by {worst:.3g} where they reach "
            f"{scale:.3g}. Please report the model."
        )
    return {"max_abs_difference": worst}


def remove_unused(graph_model: ir.Model) -> None:
    """Drop operators and initializers that nothing reads."""
    import onnxscript.optimizer as optimizer

    optimizer.remove_unused_nodes(graph_model)


def constant_array(value: ir.Value | None) -> np.ndarray | None:
    """The numbers of an initializer; None for anything else."""
    if value is None or value.const_value is None:
        return None
    return np.asarray(value.const_value.numpy())


def replace_constant(
    graph: ir.Graph, node: ir.Node, index: int, array: np.ndarray, name: str
) -> None:
    """Give a node its own constant; a shared initializer stays for its other users."""
    old = node.inputs[index] if index < len(node.inputs) else None
    if old is not None and len(old.uses()) == 1 and old.name:
        name = old.name
        node.replace_input_with(index, None)
        graph.initializers.pop(name, None)
    if index == len(node.inputs):
        node.resize_inputs(index + 1)
    node.replace_input_with(index, new_constant(graph, array, name))


def new_constant(graph: ir.Graph, array: np.ndarray, name: str) -> ir.Value:
    """A new initializer; underscores are added to a name that is taken."""
    while name in graph.initializers:
        name += "_"
    value = ir.Value(name=name, const_value=ir.tensor(array, name=name))
    value.shape, value.dtype = ir.Shape(array.shape), ir.DataType.from_numpy(array.dtype)
    graph.register_initializer(value)
    return value


def with_constants(graph_model: ir.Model, arrays: Mapping[str, np.ndarray]) -> ir.Model:
    """A copy of a graph in which these initializers hold other numbers of the same shape."""
    copy = graph_model.clone()
    for name, array in arrays.items():
        value = copy.graph.initializers[name]
        before = value.const_value
        dtype = before.numpy().dtype if before is not None else array.dtype
        value.const_value = ir.tensor(np.ascontiguousarray(array, dtype), name=name)
    return copy


def replace_node(graph: ir.Graph, node: ir.Node, new: list[ir.Node]) -> None:
    """Put `new` where `node` is; the output of the last stands for the node's first output."""
    out, last = node.outputs[0], new[-1].outputs[0]
    last.shape, last.type = out.shape, out.type
    graph.insert_before(node, new)
    name = out.name
    convenience.replace_all_uses_with(out, last, replace_graph_outputs=True)
    graph.remove(node, safe=True)
    last.name = name


def bypass(graph: ir.Graph, node: ir.Node, source: ir.Value) -> None:
    """Remove a node and let `source` stand for its first output; a graph output keeps its name."""
    out = node.outputs[0]
    name, is_output = out.name, out.is_graph_output()
    convenience.replace_all_uses_with(out, source, replace_graph_outputs=True)
    if source.shape is None:
        source.shape = out.shape
    if source.type is None:
        source.type = out.type
    graph.remove(node, safe=True)
    if is_output:
        source.name = name
