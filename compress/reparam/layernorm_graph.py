"""LayerNorms of a graph, and factors and shifts for each channel in their place."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from compress.model import Model
from compress.rewrites import (
    bypass,
    constant_array,
    new_constant,
    remove_unused,
    replace_constant,
    replace_node,
)

Affine = tuple[np.ndarray, np.ndarray]
"""Factor a and shift c of every channel, both (C,) in float64: y = a x + c."""


@dataclass(frozen=True)
class Norm:
    """A LayerNorm over the last axis.

    Attributes:
        name: of the node.
        source: name of the tensor that it reads, (..., C).
        out: name of the one that it writes.
        channels: C.
    """

    name: str
    source: str
    out: str
    channels: int


def find_norms(graph: ir.Graph) -> tuple[list[Norm], dict[str, str]]:
    """Those that can be replaced, and why each other one stays, by its name."""
    found, left = [], {}
    for node in graph:
        if node.op_type != "LayerNormalization" or node.domain not in ("", "ai.onnx"):
            continue
        source, out = node.inputs[0], node.outputs[0]
        reason = _reason(node)
        scale = constant_array(node.inputs[1])
        if reason or source is None or scale is None:
            left[node.name or ""] = reason
            continue
        names = node.name or "", source.name or "", out.name or ""
        found.append(Norm(*names, scale.size))
    return found, left


def _reason(node: ir.Node) -> str:
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    scale = constant_array(node.inputs[1])
    if scale is None or (bias is not None and constant_array(bias) is None):
        return "its scale or shift is computed"
    rank = len(node.inputs[0].shape) if node.inputs[0] and node.inputs[0].shape else 0
    axis = node.attributes.get_int("axis", -1)
    if scale.ndim != 1 or axis not in (-1, rank - 1):
        return "it is over more than the last axis"
    if scale.dtype != np.float32:
        return "it is not float32"
    if any(out.uses() or out.is_graph_output() for out in node.outputs[1:]):
        return "its mean is read"
    return "" if node.name else "it has no name"


def without_norms(model: Model, maps: Mapping[str, Affine]) -> tuple[Model, dict[str, str]]:
    """A copy with factors and shifts in the place of LayerNorms, inside a linear layer if possible.

    SLAB (Guo et al. 2024, arXiv 2405.11582, section 3.1). With y = a x + c, the layers behind get
    W' = W diag(a) and b' = b + W c; where something else reads y too, the layer before gets
    W' = diag(a) W and b' = a b + c; computed in float64.

    Args:
        model: at the ONNX stage; it is not changed.
        maps: by the name of the LayerNorm.

    Returns:
        The model, and where each map went: "next", "previous", or "kept" as a Mul and an Add.
    """
    graph_model = model.graph_model.clone()
    graph = graph_model.graph
    places = {}
    for node in [node for node in graph if node.name in maps]:
        a, c = maps[node.name or ""]
        places[node.name or ""] = _replace(graph, node, a, c)
    remove_unused(graph_model)
    return dataclasses.replace(model, program=graph_model), places


def _replace(graph: ir.Graph, node: ir.Node, a: np.ndarray, c: np.ndarray) -> str:
    source, out = node.inputs[0], node.outputs[0]
    assert source is not None  # a LayerNorm reads something
    readers = [use.node for use in out.uses()]
    behind = all(_is_linear(one) and one.inputs[0] is out for one in readers)
    if readers and behind and not out.is_graph_output():
        for reader in dict.fromkeys(readers):
            weight = _weight(reader)
            _store(graph, reader, a[:, None] * weight)
            _shift(graph, reader, np.ones(weight.shape[1]), c @ weight)
        bypass(graph, node, source)
        return "next"
    before = _layer_before(source)
    if before is not None:
        _store(graph, before, _weight(before) * a)
        _shift(graph, before, a, c)
        made = node.inputs[0]  # a bias may have been added in between
        assert made is not None
        bypass(graph, node, made)
        return "previous"
    factor = ir.node("Mul", [source, _vector(graph, a, f"{node.name}.factor")])
    factor.name, factor.outputs[0].name = f"{node.name}/factor", f"{node.name}/factor/out"
    factor.outputs[0].shape, factor.outputs[0].type = out.shape, out.type
    shift = ir.node("Add", [factor.outputs[0], _vector(graph, c, f"{node.name}.shift")])
    shift.name = node.name
    replace_node(graph, node, [factor, shift])
    return "kept"


def _vector(graph: ir.Graph, array: np.ndarray, name: str) -> ir.Value:
    return new_constant(graph, array.astype(np.float32), name)


def _is_linear(node: ir.Node) -> bool:
    """Whether it is x W + b with a constant W."""
    weight = constant_array(node.inputs[1]) if len(node.inputs) > 1 else None
    if weight is None or weight.ndim != 2 or node.domain not in ("", "ai.onnx"):
        return False
    if node.op_type == "MatMul":
        return True
    given = node.inputs[2] if len(node.inputs) > 2 else None
    bias = constant_array(given)
    plain = (
        not node.attributes.get_int("transA", 0)
        and node.attributes.get_float("alpha", 1.0) == 1.0
        and node.attributes.get_float("beta", 1.0) == 1.0
    )
    wide = weight.shape[0 if node.attributes.get_int("transB", 0) else 1]
    fits = given is None or (bias is not None and bias.size == wide)
    return node.op_type == "Gemm" and plain and fits


def _layer_before(source: ir.Value) -> ir.Node | None:
    """The linear layer that alone makes a tensor for one reader; None where there is none."""
    node = _own_producer(source)
    if node is not None and node.op_type == "Add":
        inner = next((v for v in node.inputs if v is not None and v.const_value is None), None)
        layer = _own_producer(inner) if inner is not None else None
        return layer if layer is not None and _bias_behind(layer) is node else None
    return node if node is not None and _is_linear(node) else None


def _own_producer(value: ir.Value) -> ir.Node | None:
    alone = len(value.uses()) == 1 and not value.is_graph_output()
    return value.producer() if alone else None


def _bias_behind(layer: ir.Node) -> ir.Node | None:
    """The Add of a constant vector that a MatMul is followed by."""
    if layer.op_type != "MatMul" or not _is_linear(layer):
        return None
    out = layer.outputs[0]
    readers = [use.node for use in out.uses()]
    if len(readers) != 1 or readers[0].op_type != "Add" or out.is_graph_output():
        return None
    constants = [constant_array(value) for value in readers[0].inputs]
    vector = next((array for array in constants if array is not None), None)
    wide = _weight(layer).shape[1]
    fits = vector is not None and vector.shape[-1:] == (wide,) and vector.size == wide
    return readers[0] if fits else None


def _weight(layer: ir.Node) -> np.ndarray:
    """Of x W, (C, outputs), in float64."""
    weight = np.asarray(constant_array(layer.inputs[1]), np.float64)
    turned = layer.op_type == "Gemm" and layer.attributes.get_int("transB", 0) == 1
    return weight.T if turned else weight


def _store(graph: ir.Graph, layer: ir.Node, weight: np.ndarray) -> None:
    turned = layer.op_type == "Gemm" and layer.attributes.get_int("transB", 0) == 1
    array = np.ascontiguousarray(weight.T if turned else weight, np.float32)
    replace_constant(graph, layer, 1, array, f"{layer.name}.weight")


def _shift(graph: ir.Graph, layer: ir.Node, factor: np.ndarray, shift: np.ndarray) -> None:
    """Make the bias b of a linear layer factor * b + shift."""
    holder, index = layer, 2
    if layer.op_type == "MatMul":
        found = _bias_behind(layer)
        if found is None:
            _append_bias(graph, layer, shift)
            return
        holder = found
        index = next(i for i, v in enumerate(found.inputs) if constant_array(v) is not None)
    given = constant_array(holder.inputs[index]) if len(holder.inputs) > index else None
    bias = np.zeros(len(shift)) if given is None else given.astype(np.float64).reshape(-1)
    shape = shift.shape if given is None else given.shape
    array = (factor * bias + shift).astype(np.float32).reshape(shape)
    replace_constant(graph, holder, index, array, f"{layer.name}.bias")


def _append_bias(graph: ir.Graph, layer: ir.Node, shift: np.ndarray) -> None:
    attributes = list(layer.attributes.values())
    product = ir.Node("", layer.op_type, list(layer.inputs), attributes, name=layer.name)
    inner, out = product.outputs[0], layer.outputs[0]
    inner.name, inner.shape, inner.type = f"{layer.name}/out", out.shape, out.type
    added = ir.node("Add", [inner, _vector(graph, shift, f"{layer.name}.bias")])
    added.name = f"{layer.name}/bias"
    replace_node(graph, layer, [product, added])
