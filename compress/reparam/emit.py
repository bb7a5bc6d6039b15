"""One layer in the place of a part of a graph, and the proof that it computes the same."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from compress.errors import EngineError
from compress.reference import largest_difference, largest_magnitude, reference_session, run
from compress.reparam.affine import AffineMap, NotMergeableError
from compress.reparam.branches import Part, small_model, stand_in
from compress.reparam.reading import WEIGHTED, Layout, Shapes
from compress.rewrites import RELATIVE_TOLERANCE, new_constant, replace_node

ROOT = "in0"


def layer(whole: AffineMap, layout: Layout, gemm: bool) -> list[tuple[str, dict[str, Any]]]:
    """Operators that compute a map, with their attributes; each takes one constant, Conv two."""
    if layout.dims is None:
        if gemm:
            return [("Gemm", {"transB": 1})]
        return [("MatMul", {}), *([("Add", {})] if whole.bias.any() else [])]
    axes = whole.geometry.axes
    begins, ends = [axis.pads[0] for axis in axes], [axis.pads[1] for axis in axes]
    attributes: dict[str, Any] = {
        "kernel_shape": list(whole.geometry.sizes),
        "strides": [axis.stride for axis in axes],
        "dilations": [axis.step for axis in axes],
        "pads": [*begins, *ends],
        "group": whole.geometry.groups,
    }
    return [("Conv", attributes)]


def constants(whole: AffineMap, layout: Layout, gemm: bool) -> list[np.ndarray]:
    """Weight and, unless it is zero, bias, as that layer stores them."""
    weight, bias = whole.weight, whole.bias
    if layout.dims is None and not gemm:
        groups = max(int(np.prod(layout.groups)), 1)
        weight = weight.reshape(groups, -1, weight.shape[1]).swapaxes(1, 2)
        weight = weight.reshape(*layout.groups, *weight.shape[1:])
        if layout.groups:
            bias = bias.reshape(*layout.groups, 1, -1)
    arrays = [weight] if not bias.any() else [weight, bias]
    return [np.ascontiguousarray(array, np.float32) for array in arrays]


def is_gemm(part: Part) -> bool:
    """Whether its layers are on a matrix, as Gemm needs."""
    return any(node.op_type == "Gemm" for node in part.nodes)


def prove(part: Part, whole: AffineMap, layout: Layout, shapes: Shapes) -> float:
    """Run the part and its layer on random numbers; the largest difference, relative.

    Raises:
        NotMergeableError: it is more than rounding explains.
    """
    shape = tuple(map(abs, shapes[part.root.name or ""]))
    inputs = {ROOT: np.random.default_rng(0).standard_normal(shape).astype(np.float32)}
    try:
        before = small_model(part.nodes, {part.root: shape}, part.output)
        after = _merged(whole, layout, is_gemm(part), part.root, shape)
        (expected,) = run(reference_session(before), inputs).values()
        (got,) = run(reference_session(after), inputs).values()
    except EngineError as error:
        raise NotMergeableError(
            f"it could not be compared with what it replaces: {error}"
        ) from error
    scale = largest_magnitude(expected)
    difference = np.inf
    if got.shape == expected.shape:
        difference = largest_difference(got, expected) / max(scale, 1e-6)
    if not difference <= RELATIVE_TOLERANCE:
        raise NotMergeableError(
            f"the merged layer differs by {difference:.2g} of the largest output"
        )
    return float(difference)


def write(graph: ir.Graph, part: Part, whole: AffineMap, layout: Layout, name: str) -> ir.Node:
    """Replace a part by its layer, which gets this name; the layer."""
    gemm = is_gemm(part)
    made: list[ir.Node] = []
    source = part.root
    for op_type, attributes in layer(whole, layout, gemm):
        node = ir.node(op_type, [source], attributes, name=name if not made else f"{name}/bias")
        made.append(node)
        source = node.outputs[0]
        source.name, source.type = f"{node.name}/out", part.output.type
        source.shape = part.output.shape
    replace_node(graph, part.nodes[-1], made)
    for node in reversed(part.nodes[:-1]):
        if any(out.uses() for out in node.outputs):
            continue  # by what moves data and is of no use any more
        constant = [v for v in node.inputs if v is not None and v.const_value is not None]
        graph.remove(node, safe=True)
        for value in constant:
            if value.name and not value.uses() and value.name in graph.initializers:
                graph.initializers.pop(value.name)
    suffixes = ("weight", "bias")
    for index, array in enumerate(constants(whole, layout, gemm)):
        node = made[min(index, len(made) - 1)]
        value = new_constant(graph, array, f"{name}.{suffixes[index]}")
        node.resize_inputs(len(node.inputs) + 1)
        node.replace_input_with(len(node.inputs) - 1, value)
    return made[0]


def name_of(part: Part, macs: dict[ir.Node, int]) -> str:
    """Of the layer in it that does most."""
    layers = [n for n in part.nodes if n.op_type in WEIGHTED] or [part.nodes[-1]]
    return max(layers, key=lambda node: macs.get(node, 0)).name or ""


def _merged(
    whole: AffineMap, layout: Layout, gemm: bool, root: ir.Value, shape: tuple[int, ...]
) -> ir.Model:
    """A model of the layer alone."""
    rest = [stand_in(f"c{i}", array) for i, array in enumerate(constants(whole, layout, gemm))]
    plan = layer(whole, layout, gemm)
    nodes: list[ir.Node] = []
    start = ir.Value(name=root.name, type=root.type)
    source = start
    for op_type, attributes in plan:
        taken = rest if len(plan) == 1 else [rest.pop(0)]
        nodes.append(ir.node(op_type, [source, *taken], attributes))
        source = nodes[-1].outputs[0]
    return small_model(nodes, {start: shape}, source)
