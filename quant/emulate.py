"""Write a plan into a float graph as float arithmetic: formats that the target does not have.

The model gives the numbers that the formats would give, and is no smaller or faster: for research
(`--simulate`). Rounding is divide, round half to even, saturate, multiply, as everywhere here.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from compress.rewrites import constant_array, new_constant, remove_unused, replace_constant
from quant.plan import QuantPlan
from quant.quantizer import fake_quantize
from quant.spec import QParams

_CASTS = {
    "float8_e4m3fn": ir.DataType.FLOAT8E4M3FN,
    "float8_e5m2": ir.DataType.FLOAT8E5M2,
    "float16": ir.DataType.FLOAT16,
    "bfloat16": ir.DataType.BFLOAT16,
}


def emit_emulated(graph_model: ir.Model, plan: QuantPlan) -> ir.Model:
    """A copy of the float model that rounds its tensors as the plan says, in float32.

    Tensors are rounded where `emit_qdq` would put Q/DQ. Weights are stored as the float values
    that are left of them. Biases stay in float, and absorbed activations stay in the graph.
    """
    model = graph_model.clone()
    graph = model.graph
    for node in list(graph):
        if node.name in plan.roles:
            _round_constants(graph, node, plan)
    for value in [*graph.inputs, *(out for node in list(graph) for out in node.outputs)]:
        params = plan.activations.get(value.name or "")
        if params is not None:
            _round_tensor(graph, value, params, plan)
    remove_unused(model)
    return model


def _round_constants(graph: ir.Graph, node: ir.Node, plan: QuantPlan) -> None:
    for index, value in enumerate(node.inputs):
        params = plan.constants.get(value.name or "") if value is not None else None
        array = constant_array(value)
        if value is None or params is None or array is None:
            continue
        name = value.name or ""
        # The original may have readers in float, or have been replaced for another reader.
        replace_constant(graph, node, index, fake_quantize(array, params), name)


def _round_tensor(graph: ir.Graph, value: ir.Value, params: QParams, plan: QuantPlan) -> None:
    producer = value.producer()
    produced = producer is not None and (producer.name or "") in plan.roles
    uses = [
        use
        for use in value.uses()
        if use.node.graph is graph and (produced or (use.node.name or "") in plan.roles)
    ]
    as_output = produced and value.is_graph_output()
    if not uses and not as_output:
        return
    nodes = _rounding(graph, value, params)
    if producer is None:
        graph.insert_before(graph[0], nodes)
    else:
        graph.insert_after(producer, nodes)
    rounded = nodes[-1].outputs[0]
    for use in uses:
        use.node.replace_input_with(use.idx, rounded)
    if as_output:
        for index, output in enumerate(graph.outputs):
            if output is value:
                graph.outputs[index] = rounded
        name = value.name
        value.name, rounded.name = f"{name}/float", name


class _Builder:
    """Makes the nodes that round one tensor."""

    def __init__(self, graph: ir.Graph, like: ir.Value) -> None:
        self.graph, self.like, self.nodes = graph, like, list[ir.Node]()

    def add(self, op: str, *inputs: ir.Value | float, to: ir.DataType | None = None) -> ir.Value:
        operands = [x if isinstance(x, ir.Value) else self.constant(x) for x in inputs]
        base = f"{self.like.name}/{op}.{len(self.nodes)}"
        node = ir.node(op, operands, {} if to is None else {"to": to}, name=base)
        out = node.outputs[0]
        out.name, out.shape, out.dtype = f"{base}/out", self.like.shape, to or ir.DataType.FLOAT
        if op == "Less":
            out.dtype = ir.DataType.BOOL
        self.nodes.append(node)
        return out

    def constant(self, number: np.ndarray | float) -> ir.Value:
        return new_constant(self.graph, np.asarray(number, np.float32), f"{self.like.name}/number")


def _rounding(graph: ir.Graph, value: ir.Value, params: QParams) -> list[ir.Node]:
    """Nodes that compute the fake-quantized tensor; the last one's output is the result."""
    make, spec = _Builder(graph, value), params.spec
    scale = make.constant(params.scale)
    x = make.add("Div", value, scale)
    if spec.integer:
        zero = float(params.zero_point)
        x = make.add("Clip", make.add("Round", x), spec.qmin - zero, spec.qmax - zero)
    else:
        x = make.add("Clip", x, spec.qmin, spec.qmax)
        if spec.dtype in _CASTS:
            x = make.add("Cast", x, to=_CASTS[spec.dtype])
            x = make.add("Cast", x, to=ir.DataType.FLOAT)
        else:
            x = _round_e2m1(make, x)
    make.add("Mul", x, scale)
    return make.nodes


def _round_e2m1(make: _Builder, x: ir.Value) -> ir.Value:
    """Steps of 1/2 below 2, of 1 below 4, of 2 above; ties go to the even multiple of a step."""
    size = make.add("Abs", x)
    fine = make.add("Mul", make.add("Round", make.add("Mul", size, 2.0)), 0.5)
    middle = make.add("Round", size)
    coarse = make.add("Mul", make.add("Round", make.add("Mul", size, 0.5)), 2.0)
    large = make.add("Where", make.add("Less", size, 4.0), middle, coarse)
    rounded = make.add("Where", make.add("Less", size, 2.0), fine, large)
    return make.add("Mul", make.add("Sign", x), rounded)
