"""QuantPlan: for every quantized tensor its format, scale and zero point.

One plan, several emitters. PTQ and QAT both end in a plan.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import onnx_ir as ir

from compress.graph import weight_input
from compress.target import Capabilities, Role
from quant.observers import HistogramObserver, RangeMethod, find_range
from quant.placement import GATES, MOVES, Placement, find_pattern
from quant.quantizer import qparams_from_range, weight_qparams
from quant.spec import Granularity, QParams, QuantSpec
from quant.weight_scale import narrow_weight
from quant.widths import SiteFormat

Formats: TypeAlias = Mapping[str, SiteFormat]
"""Of operators with weights, by site."""
_SYMMETRIC = QuantSpec(dtype="int8", symmetric=True)
_UNIT_RANGE = ("Sigmoid", "Softmax", "HardSigmoid")
_INT32_MAX = 2**31 - 1


@dataclass(frozen=True)
class QuantPlan:
    """Everything an emitter needs besides the float graph.

    Attributes:
        roles: operators in int8, by site; see `compress.target.Role`.
        activations: parameters by tensor name.
        constants: parameters by initializer name.
        float_outputs: int8 operators that write float32.
        dynamic: operators whose activation range is computed at run time.
        reasons: every other operator and why it stays float.
        float_biases: biases are not rounded to int32.
        blocked: groups of weights are written with ONNX's blocked DequantizeLinear.
    """

    roles: Mapping[str, Role] = field(default_factory=dict)
    activations: Mapping[str, QParams] = field(default_factory=dict)
    constants: Mapping[str, QParams] = field(default_factory=dict)
    float_outputs: tuple[str, ...] = ()
    dynamic: tuple[str, ...] = ()
    reasons: Mapping[str, str] = field(default_factory=dict)
    float_biases: bool = False
    blocked: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; exact."""
        return {
            "roles": dict(self.roles),
            "activations": {name: p.to_dict() for name, p in self.activations.items()},
            "constants": {name: p.to_dict() for name, p in self.constants.items()},
            "float_outputs": list(self.float_outputs),
            "dynamic": list(self.dynamic),
            "reasons": dict(self.reasons),
            **{name: True for name in ("float_biases", "blocked") if getattr(self, name)},
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> QuantPlan:
        """The inverse of `to_dict`."""
        return cls(
            roles=dict(values["roles"]),
            activations={n: QParams.from_dict(p) for n, p in values["activations"].items()},
            constants={n: QParams.from_dict(p) for n, p in values["constants"].items()},
            float_outputs=tuple(values["float_outputs"]),
            dynamic=tuple(values["dynamic"]),
            reasons=dict(values["reasons"]),
            float_biases=values.get("float_biases", False),
            blocked=values.get("blocked", False),
        )


def static_plan(
    graph: ir.Graph,
    placement: Placement,
    observers: Mapping[str, HistogramObserver],
    capabilities: Capabilities,
    method: RangeMethod,
    per_channel: bool = True,
    formats: Formats | None = None,
) -> QuantPlan:
    """Ranges from observers, weights from the graph.

    Args:
        graph: the float graph that was observed.
        placement: from `place` on the same graph.
        observers: by tensor name, one at least for each group.
        capabilities: integer types of the target.
        method: how a range is chosen from a histogram.
        per_channel: one weight scale for each output channel.
        formats: of operators with weights, where they are not the target's own int8. A tensor
            that several of them read has the widest of their activation formats.
    """
    formats = formats or {}
    usual = QuantSpec(dtype=capabilities.activation, symmetric=capabilities.activation == "int8")
    signed = symmetric_tensors(graph, placement, capabilities)
    producers = {out.name: node for node in graph for out in node.outputs}
    read = _activation_formats(graph, formats)
    activations: dict[str, QParams] = {}
    for group in placement.groups:
        makers = [producers.get(name) for name in group]
        seen = [observers[name] for name in group if name in observers]
        two_signs = any(observer.low < 0 for observer in seen)
        spec = _SYMMETRIC if two_signs and not signed.isdisjoint(group) else usual
        asked = [read[name] for name in group if name in read]
        spec = max(asked, key=lambda one: one.bits) if asked else spec
        params = _group_params(group, makers, placement.roles, observers, spec, method)
        activations |= dict.fromkeys(group, params)
    for node in graph:
        gate = node.op_type in GATES and placement.roles.get(node.name or "") == "unary"
        if gate:
            _fit_gate(node, activations)
    constants = _constant_params(graph, placement, capabilities, per_channel, formats)
    if not capabilities.float_constants:
        _leave_room_for_bias(graph, placement, activations, constants)
    return QuantPlan(
        placement.roles,
        activations,
        constants,
        placement.float_outputs,
        reasons=placement.reasons,
        float_biases=capabilities.float_constants,
    )


def dynamic_plan(graph: ir.Graph, placement: Placement, capabilities: Capabilities) -> QuantPlan:
    """Weights in int8 without any data.

    Matrix products get their activation ranges at run time; convolutions are weight-only (int8
    storage, float32 arithmetic).
    """
    roles: dict[str, Role] = {}
    reasons = dict(placement.reasons)
    dynamic = []
    for node in graph:
        name = node.name or ""
        role = placement.roles.get(name)
        if role == "matmul" and weight_input(node) is not None:
            roles[name] = role
            if node.op_type == "MatMul" and weight_input(node) == 1:
                dynamic.append(name)
            else:
                reasons[name] = "weight-only: without calibration data it runs in float32"
        elif role is not None:
            reasons[name] = "without calibration data it runs in float32"
    weights = Placement(roles, (), placement.constants, (), {})
    constants = _constant_params(graph, weights, capabilities, per_channel=True)
    return QuantPlan(roles, {}, constants, (), tuple(dynamic), reasons)


def weight_only_plan(
    graph: ir.Graph, placement: Placement, capabilities: Capabilities, formats: Formats
) -> QuantPlan:
    """Weights in a narrow format, arithmetic in float: needs no data.

    Args:
        graph: the float graph.
        placement: from `place` on the same graph; its other int8 operators become float.
        capabilities: of the target.
        formats: of the operators to store narrowly, by site.
    """
    roles: dict[str, Role] = {name: "matmul" for name in formats}
    reasons = dict(placement.reasons)
    for name in placement.roles:
        reasons[name] = "weights only" if name in formats else "weight-only quantization"
    chosen = Placement(roles, (), placement.constants, (), {})
    constants = _constant_params(graph, chosen, capabilities, True, formats)
    blocked = bool(capabilities.weight_groups)
    return QuantPlan(roles, {}, constants, (), (), reasons, blocked=blocked)


def joined(first: QuantPlan, second: QuantPlan) -> QuantPlan:
    """Two plans of one graph that quantize different operators."""
    roles = {**first.roles, **second.roles}
    reasons = {**first.reasons, **second.reasons}
    return QuantPlan(
        roles,
        {**first.activations, **second.activations},
        {**first.constants, **second.constants},
        first.float_outputs + second.float_outputs,
        first.dynamic + second.dynamic,
        {n: r for n, r in reasons.items() if n not in roles or n in second.roles},
        first.float_biases or second.float_biases,
        first.blocked or second.blocked,
    )


def _activation_formats(graph: ir.Graph, formats: Formats) -> dict[str, QuantSpec]:
    """The widest format that the operators with weights want of each tensor that they read."""
    wanted: dict[str, QuantSpec] = {}
    for node in graph:
        form = formats.get(node.name or "")
        for value in node.inputs if form is not None else ():
            if value is None or value.const_value is not None or form is None:
                continue
            before = wanted.get(value.name or "")
            if before is None or before.bits < form.activation.bits:
                wanted[value.name or ""] = form.activation
    return wanted


def symmetric_tensors(
    graph: ir.Graph, placement: Placement, capabilities: Capabilities
) -> set[str]:
    """Tensors whose every int8 reader wants zero point 0."""
    wanted: dict[str, bool] = {}
    for node in graph:
        role = placement.roles.get(node.name or "")
        if role is None or role in MOVES:
            continue
        pattern = find_pattern(node, capabilities)
        for value in node.inputs:
            if value is not None and value.name:
                symmetric = pattern is not None and pattern.symmetric
                wanted[value.name] = wanted.get(value.name, True) and symmetric
    return {name for name, symmetric in wanted.items() if symmetric}


def _group_params(
    group: tuple[str, ...],
    makers: Sequence[ir.Node | None],
    roles: Mapping[str, Role],
    observers: Mapping[str, HistogramObserver],
    spec: QuantSpec,
    method: RangeMethod,
) -> QParams:
    sources = [n for n in makers if n is None or roles.get(n.name or "") not in MOVES]
    if all(node is not None and node.op_type in _UNIT_RANGE for node in sources):
        return qparams_from_range(0.0, 1.0, spec)
    seen = [observers[name] for name in group if name in observers]
    merged = HistogramObserver(group[0], max(observer.bins for observer in seen))
    for observer in seen:
        merged.merge(observer)
    low, high = find_range(merged, method, spec)
    return qparams_from_range(low, high, spec)


def _fit_gate(node: ir.Node, activations: dict[str, QParams]) -> None:
    """Give a gate's input the scale at which relu6(x + 3) / 6 is a re-reading of its integers.

    With x = s (q - z) and z = 3 / s the gate is s q / 6, saturated at the lower end by the
    quantization of x itself; see `quant.emit.gate`. For HardSigmoid the range is [-3, 3].
    """
    source = node.inputs[0]
    if source is None:
        return
    before = activations[source.name or ""]
    if before.spec.dtype != "uint8":
        return
    if node.op_type == "HardSigmoid":
        scale, zero_point = 6 / 255, 127
    else:
        high = float(before.scale) * (255 - int(before.zero_point))
        zero_point = int(np.clip(765 // (max(high, 1e-3) + 3), 1, 254))
        scale = 3 / zero_point
    params = QParams(before.spec, np.asarray(scale), np.asarray(zero_point))
    activations[source.name or ""] = params


def _constant_params(
    graph: ir.Graph,
    placement: Placement,
    capabilities: Capabilities,
    per_channel: bool,
    formats: Formats | None = None,
) -> dict[str, QParams]:
    params: dict[str, QParams] = {}
    for node in graph:
        role = placement.roles.get(node.name or "")
        for index, value in enumerate(node.inputs if role in ("matmul", "elementwise") else ()):
            if value is None or value.name not in placement.constants or value.name in params:
                continue
            if value.const_value is None:
                continue
            array = value.const_value.numpy()
            axis = None
            if role == "matmul" and index == weight_input(node):
                spec = QuantSpec(
                    capabilities.weight,
                    reduced=capabilities.reduced_weights,
                    restricted=capabilities.restricted_weights,
                )
                form = (formats or {}).get(node.name or "")
                axis = None
                if form is not None and form.weight.granularity == "per_group":
                    params[value.name] = narrow_weight(array, form.weight, input_axis(node))
                    continue
                if per_channel and capabilities.per_channel and _one_axis(value, placement):
                    axis = output_axis(node)
                if form is not None:
                    spec = form.weight
                granularity: Granularity = "per_tensor" if axis is None else "per_channel"
                spec = dataclasses.replace(spec, granularity=granularity)
                make = weight_qparams if form is None else narrow_weight
                params[value.name] = make(array, spec, axis)
            else:
                spec = QuantSpec(capabilities.activation, symmetric=False)
                params[value.name] = qparams_from_range(array.min(), array.max(), spec)
    return params


def _one_axis(weight: ir.Value, placement: Placement) -> bool:
    """Whether all users of a weight have their output channels on the same axis."""
    users = [use.node for use in weight.uses()]
    axes = {output_axis(user) for user in users if placement.roles.get(user.name or "") == "matmul"}
    return len(axes) == 1


def input_axis(node: ir.Node) -> int:
    """Axis of the input features in the weight of a linear layer."""
    return 1 if node.op_type == "Gemm" and bool(node.attributes.get_int("transB", 0)) else 0


def output_axis(node: ir.Node) -> int | None:
    """Axis of the output channels in a node's weight; None where it has no such axis."""
    index = weight_input(node)
    weight = node.inputs[index] if index is not None else None
    if weight is None or weight.const_value is None:
        return None
    match node.op_type:
        case "Conv":
            return 0
        case "ConvTranspose":
            return 1 if node.attributes.get_int("group", 1) == 1 else None
        case "Gemm":
            return 0 if node.attributes.get_int("transB", 0) else 1
        case "MatMul":
            rank = len(weight.const_value.shape)
            return rank - 1 if index == 1 and rank == 2 else None
        case _:
            return None


def _leave_room_for_bias(
    graph: ir.Graph,
    placement: Placement,
    activations: Mapping[str, QParams],
    constants: dict[str, QParams],
) -> None:
    """Widen weight scales so that bias / (s_x s_w) fits int32 (dead channels have tiny s_w)."""
    for node in graph:
        bias = node.inputs[2] if len(node.inputs) > 2 else None
        weight, source = (node.inputs[1], node.inputs[0]) if len(node.inputs) > 1 else (None, None)
        if placement.roles.get(node.name or "") != "matmul" or bias is None or weight is None:
            continue
        if bias.const_value is None or source is None or weight.name not in constants:
            continue
        old = constants[weight.name]
        s_x = float(activations[source.name or ""].scale)
        floor = np.abs(bias.const_value.numpy().astype(np.float64)) / (s_x * (_INT32_MAX // 2))
        if old.axis is None:
            floor = floor.max(initial=0)
        if np.any(floor > old.scale):
            scale = np.maximum(old.scale, floor).astype(np.float32)
            constants[weight.name] = QParams(old.spec, scale, old.zero_point, old.axis)
