"""Write a plan into a float graph as ONNX QDQ (or, without data, as dynamic quantization)."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx_ir as ir
import onnx_ir.convenience as convenience

from compress.rewrites import remove_unused, replace_node
from quant.placement import GATES, clip_bounds
from quant.plan import QuantPlan
from quant.quantizer import quantize
from quant.spec import QParams
from quant.weight_only import write_product

_STORAGE = {
    "int4": ml_dtypes.int4,
    "uint4": ml_dtypes.uint4,
    "float8_e4m3fn": ml_dtypes.float8_e4m3fn,
}
"""Element types that numpy does not have; the other formats are stored in their own."""


def emit_qdq(graph_model: ir.Model, plan: QuantPlan) -> ir.Model:
    """A copy of the float model with QuantizeLinear/DequantizeLinear as the plan says.

    Weights are stored as integers, biases as int32 with scale s_x s_w unless the plan keeps them
    in float. An absorbed activation (Relu, Clip) disappears: the saturation of its producer's
    output does the same. The float model is not changed; its other tensors are shared with the
    copy.
    """
    model = graph_model.clone()
    emitter = _Emitter(model.graph, plan)
    for node in list(model.graph):
        emitter.emit(node)
    remove_unused(model)
    return model


class _Emitter:
    def __init__(self, graph: ir.Graph, plan: QuantPlan) -> None:
        self.graph, self.plan = graph, plan
        self.integers: dict[str, ir.Value] = {}
        self.scales: dict[str, np.ndarray] = {}
        self.origin: dict[str, str] = {}
        self.floats: dict[str, ir.Value] = {}
        for value in list(graph.inputs):
            self.quantize_tensor(value, produced=False)

    def emit(self, node: ir.Node) -> None:
        name = node.name or ""
        role = self.plan.roles.get(name)
        if name in self.plan.dynamic:
            self.dynamic_matmul(node)
            return
        if role is None:
            for out in node.outputs:
                self.quantize_tensor(out, produced=False)
            return
        weight = node.inputs[1] if role == "matmul" else None
        params = self.plan.constants.get(weight.name or "") if weight is not None else None
        if params is not None and params.spec.group is not None and not self.plan.blocked:
            write_product(self.graph, node, params)
            return
        if role == "activation":
            self.absorb(node)
            return
        if role == "integer":
            self.on_integers(node)
            return
        if role in ("transparent", "join"):
            self.carry(node)
            return
        if node.op_type in GATES and role == "unary":
            self.gate(node)
            return
        self.constant_operands(node)
        for out in node.outputs:
            self.quantize_tensor(out, produced=True)

    def quantize_tensor(
        self, value: ir.Value, produced: bool, bounds: tuple[float, float] | None = None
    ) -> None:
        """Insert Q/DQ behind a tensor, for all its readers or only for those in int8.

        `bounds` are those of an absorbed activation. Where the grid ends at them, saturation
        does its work; where it reaches further (a scale shared with a signed tensor), the
        integers are clipped.
        """
        params = self.plan.activations.get(value.name or "")
        if params is None:
            return
        uses = [
            use
            for use in value.uses()
            if use.node.graph is self.graph
            and (produced or self.plan.roles.get(use.node.name or "") is not None)
        ]
        keep_output = value.is_graph_output() and produced
        if not uses and not keep_output:
            return
        name = value.name or ""
        scale, zero = self.scale_and_zero(name, params)
        q = self.node("QuantizeLinear", [value, scale, zero], f"{name}/q", params, value)
        made = [q]
        if bounds is not None and (limits := integer_limits(bounds, params)) is not None:
            low, high = (self.constant(f"{name}/{end}", limit) for end, limit in limits.items())
            q = self.node("Clip", [q, low, high], f"{name}/clip", params, value)
            made.append(q)
        dq = self.node("DequantizeLinear", [q, scale, zero], f"{name}/dq", None, value)
        self.insert_after(value, *made, dq)
        for use in uses:
            use.node.replace_input_with(use.idx, dq)
        if keep_output:
            self.replace_output(value, dq)
        self.integers[dq.name or ""] = q
        self.scales[dq.name or ""] = params.scale
        self.origin[q.name or ""] = name

    def carry(self, node: ir.Node) -> None:
        """Note that the outputs are readings of integers too, with the scale of the input."""
        source = node.inputs[0]
        q = self.integers.get(source.name or "") if source is not None else None
        if source is None or q is None:
            return
        for out in node.outputs:
            self.integers[out.name or ""] = q
            self.scales[out.name or ""] = self.scales[source.name or ""]

    def absorb(self, node: ir.Node) -> None:
        """Let the producer write the activation's output; quantization saturates for it."""
        source, out = node.inputs[0], node.outputs[0]
        if source is None:
            return
        bounds = (0.0, np.inf) if node.op_type == "Relu" else clip_bounds(node)
        low, high = (-np.inf if bounds[0] is None else bounds[0]), bounds[1]
        name = out.name
        convenience.replace_all_uses_with(out, source, replace_graph_outputs=True)
        self.graph.remove(node, safe=True)
        source.name = name
        self.quantize_tensor(source, True, (low, np.inf if high is None else high))

    def on_integers(self, node: ir.Node) -> None:
        """Run an operator that only moves values on the integer tensor itself."""
        source = node.inputs[0]
        params = self.plan.activations[node.outputs[0].name or ""]
        q = self.integers.get(source.name or "") if source is not None else None
        if source is None or q is None:
            return
        node.replace_input_with(0, q)
        if node.op_type == "Pad":
            if len(node.inputs) < 3:
                node.resize_inputs(3)
            node.replace_input_with(2, self.constant(f"{node.name}/zero", params.zero_point))
        for out in node.outputs:
            self.reread(out, params)

    def reread(self, out: ir.Value, params: QParams) -> None:
        """Make `out` an integer tensor, and give its readers the dequantized one."""
        name = out.name or ""
        scale, zero = self.scale_and_zero(name, params)
        dq = self.node("DequantizeLinear", [out, scale, zero], f"{name}/dq", None, out)
        uses = list(out.uses())
        self.insert_after(out, dq)
        for use in uses:
            if use.node is not dq.producer():
                use.node.replace_input_with(use.idx, dq)
        if out.is_graph_output():
            self.replace_output(out, dq)
        self.scales[dq.name or ""] = params.scale
        # A new type: clones share the type objects of the float model.
        out.type = ir.TensorType(ir.DataType.from_numpy(params.zero_point.dtype))
        self.integers[dq.name or ""] = out

    def gate(self, node: ir.Node) -> None:
        """HardSigmoid and HardSwish as a second reading of the input's integers.

        The plan gives x = s (q - 3/s), so relu6(x + 3) / 6 = min(s q / 6, 1): the same bytes
        read with scale s / 6 and zero point 0. HardSwish multiplies both readings.
        """
        source, out = node.inputs[0], node.outputs[0]
        q = self.integers.get(source.name or "") if source is not None else None
        if source is None or q is None:
            return
        name = node.name or ""
        params = self.plan.activations[self.origin[q.name or ""]]
        top = 6 / float(params.scale)
        if node.op_type == "HardSwish" and top < 255:
            low = self.constant(f"{name}/low", np.uint8(0))
            high = self.constant(f"{name}/high", np.uint8(round(top)))
            clipped = self.node("Clip", [q, low, high], f"{name}/clip", params, source)
            self.insert_before(node, clipped)
            q = clipped
        factor = QParams(params.spec, np.asarray(float(params.scale) / 6), np.asarray(0))
        scale, zero = self.scale_and_zero(f"{name}/gate", factor)
        gate = self.node("DequantizeLinear", [q, scale, zero], f"{name}/gate", None, out)
        self.insert_before(node, gate)
        if node.op_type == "HardSigmoid":
            convenience.replace_all_uses_with(out, gate, replace_graph_outputs=True)
            self.graph.remove(node, safe=True)
            gate.name = out.name
            self.integers[gate.name or ""] = q
            self.scales[gate.name or ""] = factor.scale
            if not np.isclose(self.plan.activations[gate.name or ""].scale, factor.scale):
                self.quantize_tensor(gate, produced=True)  # it shares another tensor's scale
            return
        product = ir.node("Mul", [source, gate], name=name)
        replace_node(self.graph, node, [product])
        self.quantize_tensor(product.outputs[0], produced=True)

    def constant_operands(self, node: ir.Node) -> None:
        """Weights and constant operands as integers, the bias as int32 unless it stays float."""
        weight_scale = None
        for index, value in enumerate(list(node.inputs)):
            params = self.plan.constants.get(value.name or "") if value is not None else None
            if value is None or params is None:
                continue
            if index == 1:
                weight_scale = params
            node.replace_input_with(index, self.stored(value, params))
        bias = node.inputs[2] if len(node.inputs) > 2 else None
        if node.op_type not in ("Conv", "Gemm") or bias is None or weight_scale is None:
            return
        if self.plan.float_biases:
            return
        source = node.inputs[0]
        q = self.integers.get(source.name or "") if source is not None else None
        if q is None or source is None or bias.const_value is None:
            return  # weight-only: the bias stays float
        scale = (self.scales[source.name or ""] * weight_scale.scale).astype(np.float32)
        numbers = bias.const_value.numpy().astype(np.float64).reshape(-1)
        integers = np.rint(numbers / scale)
        integers = np.clip(integers, -(2**31) + 1, 2**31 - 1).astype(np.int32)
        name = f"{node.name}/bias"
        stored = self.constant(f"{name}_int32", integers)
        axis = None if scale.ndim == 0 else 0
        node.replace_input_with(
            2, self.dequantized(stored, scale, np.zeros_like(scale, np.int32), axis, name)
        )
        self.drop_if_unused(bias)

    def stored(self, value: ir.Value, params: QParams) -> ir.Value:
        """The dequantized reading of an initializer that is stored as integers."""
        name = value.name or ""
        if name not in self.floats and value.const_value is not None:
            zero = stored_zero_point(params)
            numbers = quantize(value.const_value.numpy(), params).astype(zero.dtype)
            self.floats[name] = self.dequantized(
                self.constant(f"{name}_int", numbers),
                params.scale,
                zero,
                params.axis,
                name,
                params.spec.group,
            )
        return self.floats[name]

    def dequantized(
        self,
        integers: ir.Value,
        scale: np.ndarray,
        zero: np.ndarray,
        axis: int | None,
        name: str,
        group: int | None = None,
    ) -> ir.Value:
        inputs = [
            integers,
            self.constant(f"{name}/scale", scale),
            self.constant(f"{name}/zero", zero),
        ]
        attributes = {} if axis is None else {"axis": axis}
        if group is not None:
            attributes["block_size"] = group
        node = ir.node("DequantizeLinear", inputs, attributes, name=f"{name}/dq")
        out = node.outputs[0]
        out.name, out.dtype, out.shape = f"{name}/dq", ir.DataType.FLOAT, integers.shape
        self.graph.insert_before(self.graph[0], node)
        return out

    def dynamic_matmul(self, node: ir.Node) -> None:
        """MatMul with the activation's range computed at run time.

        x is quantized by DynamicQuantizeLinear, multiplied as integers, and scaled back by
        s_x s_w (ONNX Runtime fuses the four operators into DynamicQuantizeMatMul).
        """
        source, weight = node.inputs[0], node.inputs[1]
        if source is None or weight is None or weight.const_value is None:
            return
        params = self.plan.constants[weight.name or ""]
        name = node.name or ""
        quantized = ir.node("DynamicQuantizeLinear", [source], num_outputs=3, name=f"{name}/range")
        for value, suffix in zip(quantized.outputs, ("q", "scale", "zero"), strict=True):
            value.name = f"{name}/{suffix}"
        integers = self.constant(f"{weight.name}_int", quantize(weight.const_value.numpy(), params))
        zero = self.constant(f"{weight.name}/zero", params.zero_point)
        scale = self.constant(f"{weight.name}/scale", params.scale)
        q, s_x, z_x = quantized.outputs
        product = ir.node("MatMulInteger", [q, integers, z_x, zero], name=name)
        cast = ir.node("Cast", [product.outputs[0]], {"to": ir.DataType.FLOAT}, name=f"{name}/cast")
        scales = ir.node("Mul", [s_x, scale], name=f"{name}/scales")
        scaled = ir.node("Mul", [cast.outputs[0], scales.outputs[0]], name=f"{name}/rescale")
        nodes = [quantized, product, cast, scales, scaled]
        for new in nodes[1:]:
            new.outputs[0].name = f"{new.name}/out"
        replace_node(self.graph, node, nodes)
        self.drop_if_unused(weight)

    def scale_and_zero(self, name: str, params: QParams) -> tuple[ir.Value, ir.Value]:
        return (
            self.constant(f"{name}/scale", params.scale),
            self.constant(f"{name}/zero", stored_zero_point(params)),
        )

    def constant(self, name: str, array: np.ndarray | np.generic) -> ir.Value:
        existing = self.graph.initializers.get(name)
        if existing is not None:
            return existing
        array = np.asarray(array)
        value = ir.Value(name=name, const_value=ir.tensor(array, name=name))
        value.shape, value.dtype = ir.Shape(array.shape), ir.DataType.from_numpy(array.dtype)
        self.graph.register_initializer(value)
        return value

    def node(
        self, op: str, inputs: list[ir.Value], name: str, params: QParams | None, like: ir.Value
    ) -> ir.Value:
        """A new one-output node that is not in the graph yet; its output."""
        out = ir.node(op, inputs, name=name).outputs[0]
        out.name, out.shape, out.dtype = name, like.shape, ir.DataType.FLOAT
        if params is not None:
            out.dtype = ir.DataType.from_numpy(stored_zero_point(params).dtype)
        return out

    def insert_after(self, value: ir.Value, *made: ir.Value) -> None:
        nodes = [node for out in made if (node := out.producer()) is not None]
        producer = value.producer()
        if producer is None:
            self.graph.insert_before(self.graph[0], nodes)
        else:
            self.graph.insert_after(producer, nodes)

    def insert_before(self, node: ir.Node, made: ir.Value) -> None:
        producer = made.producer()
        if producer is not None:
            self.graph.insert_before(node, producer)

    def replace_output(self, old: ir.Value, new: ir.Value) -> None:
        """Let `new` be the graph output under the old one's name."""
        for index, value in enumerate(self.graph.outputs):
            if value is old:
                self.graph.outputs[index] = new
        name = old.name
        old.name = f"{name}/float"
        new.name = name

    def drop_if_unused(self, value: ir.Value) -> None:
        if not value.uses():
            self.graph.initializers.pop(value.name or "", None)


def stored_zero_point(params: QParams) -> np.ndarray:
    """The zero point in the element type that the quantized tensor has in ONNX."""
    return params.zero_point.astype(_STORAGE.get(params.spec.dtype, params.zero_point.dtype))


def integer_limits(bounds: tuple[float, float], params: QParams) -> dict[str, np.ndarray] | None:
    """Integers that stand for the bounds; None where the format saturates there by itself."""
    spec, zero = params.spec, int(params.zero_point)
    limits = np.clip(np.rint(np.array(bounds) / float(params.scale)) + zero, spec.qmin, spec.qmax)
    if limits[0] <= spec.qmin and limits[1] >= spec.qmax:
        return None
    low, high = limits.astype(params.zero_point.dtype)
    return {"low": np.asarray(low), "high": np.asarray(high)}
