"""Layers of an ONNX graph that low-rank factors can stand for, and the chain in their place."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from compress.graph import infer_shapes
from compress.model import Model, TensorSpec
from compress.reparam.lowrank_factors import Form, Link
from compress.rewrites import constant_array, new_constant, replace_node

FUSED = ("Relu", "Clip")
"""Activations that runtimes compute inside the layer before them."""


@dataclass(frozen=True)
class Layer:
    """A convolution, or a linear layer, with a constant weight.

    Attributes:
        name: of the node.
        op_type: Conv, Gemm or MatMul.
        weight: (T, S / groups, *kernel); of a linear layer (T, S).
        bias: (T,), or None.
        groups: of channels.
        attributes: of a convolution, those that say how its window moves.
        source: shape of what it reads, batch 1 where it is dynamic.
        out: shape of what it writes.
        activation: the ONNX type of the one operator that reads it, if it is one of `FUSED`.
        macs: multiply-accumulates.
    """

    name: str
    op_type: str
    weight: np.ndarray
    bias: np.ndarray | None
    groups: int
    attributes: dict[str, Any]
    source: tuple[int, ...]
    out: tuple[int, ...]
    activation: str
    macs: int

    @property
    def signature(self) -> tuple[Any, ...]:
        """What its time depends on: equal layers take equally long."""
        attributes = sorted((name, str(value)) for name, value in self.attributes.items())
        shapes = (self.weight.shape, self.groups, self.source, self.out)
        return (self.op_type, *shapes, self.bias is not None, self.activation, attributes)

    def chain_macs(self, links: Sequence[Link | Form]) -> int:
        """Multiply-accumulates of a chain in its place."""
        if self.op_type != "Conv":
            return self.macs // self.weight.size * sum(math.prod(link.shape) for link in links)
        sizes, total = self.source[2:], 0
        for link in links:
            both = zip(sizes, self.out[2:], link.spans, strict=True)
            sizes = tuple(after if span else before for before, after, span in both)
            total += self.source[0] * math.prod(link.shape) * math.prod(sizes)
        return total


def find_layers(model: Model) -> list[Layer]:
    """The layers of a float model, in order of execution."""
    shapes = infer_shapes(model.graph_model)
    found = (_layer(node, shapes) for node in model.graph_model.graph)
    return [layer for layer in found if layer is not None]


def _layer(node: ir.Node, shapes: dict[str, tuple[int, ...]]) -> Layer | None:
    if node.op_type not in ("Conv", "Gemm", "MatMul") or node.domain not in ("", "ai.onnx"):
        return None
    source, out = node.inputs[0], node.outputs[0]
    weight = constant_array(node.inputs[1])
    given = node.inputs[2] if len(node.inputs) > 2 else None
    bias = constant_array(given)
    if source is None or weight is None or weight.dtype != np.float32 or not node.name:
        return None
    if given is not None and bias is None:
        return None
    before, after = shapes.get(source.name or "", ()), shapes.get(out.name or "", ())
    if not before or any(size < 1 for size in (*before, *after)):
        return None
    attributes: dict[str, Any] = {}
    groups = 1
    if node.op_type == "Conv":
        groups = node.attributes.get_int("group", 1)
        attributes = _window(node, weight.ndim - 2)
        macs = math.prod(after) * math.prod(weight.shape[1:])
    else:
        turned = _linear_weight(node, weight)
        if turned is None:
            return None
        weight = turned
        macs = math.prod(before[:-1]) * weight.size
    if bias is not None and bias.size != len(weight):
        return None
    reader = [use.node.op_type for use in out.uses()]
    fused = len(reader) == 1 and reader[0] in FUSED and not out.is_graph_output()
    return Layer(
        name=node.name,
        op_type=node.op_type,
        weight=weight,
        bias=None if bias is None else bias.reshape(-1),
        groups=groups,
        attributes=attributes,
        source=before,
        out=after,
        activation=reader[0] if fused else "",
        macs=macs,
    )


def _window(node: ir.Node, axes: int) -> dict[str, Any]:
    return {
        "strides": list(node.attributes.get_ints("strides", [1] * axes)),
        "pads": list(node.attributes.get_ints("pads", [0] * 2 * axes)),
        "dilations": list(node.attributes.get_ints("dilations", [1] * axes)),
        "auto_pad": node.attributes.get_string("auto_pad", "NOTSET"),
    }


def _linear_weight(node: ir.Node, weight: np.ndarray) -> np.ndarray | None:
    """As (T, S); None where the node is more than a linear layer."""
    if weight.ndim != 2:
        return None
    if node.op_type == "MatMul":
        return np.ascontiguousarray(weight.T)
    plain = (
        not node.attributes.get_int("transA", 0)
        and node.attributes.get_float("alpha", 1.0) == 1.0
        and node.attributes.get_float("beta", 1.0) == 1.0
    )
    if not plain:
        return None
    turned = weight if node.attributes.get_int("transB", 0) else weight.T
    return np.ascontiguousarray(turned)


def stored_weight(layer: Layer, node: ir.Node, weight: np.ndarray) -> np.ndarray:
    """A weight (T, S / groups, *kernel) as the node of the layer holds it."""
    turned = node.op_type == "MatMul" or (
        node.op_type == "Gemm" and not node.attributes.get_int("transB", 0)
    )
    array = weight.T if turned else weight
    return np.ascontiguousarray(array, layer.weight.dtype)


def replace_layer(graph: ir.Graph, layer: Layer, links: Sequence[Link]) -> None:
    """Put a chain where a layer is; its last operator takes the layer's name."""
    node = next(n for n in graph if n.name == layer.name)
    source, out = node.inputs[0], node.outputs[0]
    made: list[ir.Node] = []
    for index, link in enumerate(links):
        last = index == len(links) - 1
        name = layer.name if last else f"{layer.name}/low_rank.{index}"
        weight = link.weight if layer.op_type == "Conv" else link.weight.T
        array = np.ascontiguousarray(weight, layer.weight.dtype)
        inputs = [source, new_constant(graph, array, f"{layer.name}.low_rank.{index}")]
        if last and len(node.inputs) > 2 and node.inputs[2] is not None:
            inputs.append(node.inputs[2])
        attributes = _attributes(layer, link) if layer.op_type == "Conv" else {}
        one = ir.node(layer.op_type, inputs, attributes, name=name)
        value = one.outputs[0]
        value.name, value.type = f"{name}/out", out.type
        if source is not None and source.shape is not None and out.shape is not None:
            value.shape = _shape(layer, link, source.shape, out.shape)
        made.append(one)
        source = value
    replace_node(graph, node, made)


def _attributes(layer: Layer, link: Link) -> dict[str, Any]:
    axes, spans = len(link.spans), link.spans
    given = layer.attributes

    def along(values: Sequence[int], otherwise: int) -> list[int]:
        both = zip(values, spans * (len(values) // axes), strict=True)
        return [value if span else otherwise for value, span in both]

    attributes: dict[str, Any] = {
        "kernel_shape": list(link.weight.shape[2:]),
        "strides": along(given["strides"], 1),
        "dilations": along(given["dilations"], 1),
        "group": link.groups,
    }
    if given["auto_pad"] == "NOTSET":
        return {**attributes, "pads": along(given["pads"], 0)}
    return {**attributes, "auto_pad": given["auto_pad"]}


def _shape(layer: Layer, link: Link, source: ir.Shape, out: ir.Shape) -> ir.Shape:
    if layer.op_type != "Conv":
        return ir.Shape([*source[:-1], link.out])
    sizes = (o if span else s for s, o, span in zip(source[2:], out[2:], link.spans, strict=True))
    return ir.Shape([source[0], link.out, *sizes])


def alone(layer: Layer, links: Sequence[Link] = ()) -> Model:
    """A model of the layer with the activation behind it, or of a chain in its place.

    Weights are random: they are timed.
    """
    rng = np.random.default_rng(0)
    weight = rng.standard_normal(layer.weight.shape) / np.sqrt(layer.weight[0].size)
    float32 = ir.TensorType(ir.DataType.FLOAT)
    x = ir.Value(name="x", shape=ir.Shape(layer.source), type=float32)
    graph = ir.Graph([x], [], nodes=[], opset_imports={"": 21}, name="layer")
    attributes: dict[str, Any] = {}
    if layer.op_type == "Conv":
        whole = Link(layer.weight, layer.groups, (True,) * (layer.weight.ndim - 2))
        attributes = _attributes(layer, whole)
    stored = weight if layer.op_type == "Conv" else weight.T
    inputs = [x, new_constant(graph, np.ascontiguousarray(stored, np.float32), "weight")]
    if layer.bias is not None:
        inputs.append(new_constant(graph, np.zeros(len(weight), np.float32), "bias"))
    node = ir.node(layer.op_type, inputs, attributes, name=layer.name)
    nodes = [node]
    if layer.activation:
        nodes.append(ir.node("Relu", [node.outputs[0]], name="activation"))
    for one in nodes:
        one.outputs[0].name, one.outputs[0].type = f"{one.name}/out", float32
    graph.extend(nodes)
    graph.outputs.append(nodes[-1].outputs[0])
    if links:
        replace_layer(graph, layer, links)
    spec = TensorSpec("x", layer.source)
    return Model(ir.Model(graph, ir_version=10), (spec,), layer.name)
