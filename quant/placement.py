"""Where quantization goes: which operators run in int8, and which tensors share a scale.

The table of patterns comes from the target's capabilities; this module only walks the graph.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from compress.graph import weight_input
from compress.target import Capabilities, FusablePattern, Role

MOVES: frozenset[Role] = frozenset({"same_scale", "integer", "transparent"})
CONCATS: frozenset[Role] = frozenset({"concat", "join"})
GATES = ("HardSwish", "HardSigmoid")
"""Written on the integer grid by the emitter, which fixes the scale of their input."""

_CHANNEL_SHUFFLE = (0, 2, 1, 3, 4)


@dataclass(frozen=True)
class Placement:
    """Decisions for one graph.

    Attributes:
        roles: operators in int8, by node name; an "activation" is absorbed by its producer.
        groups: tensors that carry Q/DQ; those of one group share scale and zero point.
        constants: names of initializers that become int8 (weights and constant operands).
        float_outputs: int8 operators that write float32.
        reasons: every other operator and why it stays float.
    """

    roles: dict[str, Role] = field(default_factory=dict)
    groups: tuple[tuple[str, ...], ...] = ()
    constants: tuple[str, ...] = ()
    float_outputs: tuple[str, ...] = ()
    reasons: dict[str, str] = field(default_factory=dict)


def place(
    graph: ir.Graph, capabilities: Capabilities, keep_float: frozenset[str] = frozenset()
) -> Placement:
    """Decide for every operator; `keep_float` names operators that must not be quantized.

    Multiply-accumulates with an int8 kernel are always quantized. Everything else only where
    its inputs are in int8 already, so that no conversion is added to save none.
    """
    placer = _Placer(capabilities, keep_float)
    for node in graph:
        if node.op_type != "Constant":
            placer.visit(node)
    placer.forget_unneeded(graph)
    return placer.finish()


def single_use(value: ir.Value) -> bool:
    """Whether exactly one operator reads the tensor and it is no output of the graph."""
    return len(value.uses()) == 1 and not value.is_graph_output()


def operand(node: ir.Node) -> ir.Value | None:
    """The first input; for an operator on an activation and constants, the activation."""
    variable = [v for v in node.inputs if v is not None and v.const_value is None]
    return variable[0] if len(variable) == 1 else next(iter(node.inputs), None)


def find_pattern(node: ir.Node, capabilities: Capabilities) -> FusablePattern | None:
    """The pattern of an operator; a channel shuffle may have one of its own."""
    if node.op_type == "Transpose" and node.attributes.get_ints("perm", ()) == _CHANNEL_SHUFFLE:
        special = capabilities.pattern("ChannelShuffle")
        if special is not None:
            return special
    return capabilities.pattern(node.op_type)


def swish(node: ir.Node) -> ir.Node | None:
    """The product of x * sigmoid(x), where this Sigmoid and that product alone read x."""
    source, out = node.inputs[0], node.outputs[0]
    if node.op_type != "Sigmoid" or source is None or not single_use(out):
        return None
    product = next(iter(out.uses())).node
    readers = [use.node for use in source.uses()]
    if product.op_type != "Mul" or source.is_graph_output() or len(readers) != 2:
        return None
    return product if node in readers and product in readers else None


class _Placer:
    def __init__(self, capabilities: Capabilities, keep_float: frozenset[str]) -> None:
        self.capabilities, self.keep_float = capabilities, keep_float
        self.roles: dict[str, Role] = {}
        self.reasons: dict[str, str] = {}
        self.constants: dict[str, None] = {}
        self.float_outputs: dict[str, None] = {}
        self.resident: set[str] = set()
        self.parent: dict[str, str] = {}
        self.swishes: dict[str, ir.Value | None] = {}
        self.unneeded: set[str] = set()

    def visit(self, node: ir.Node) -> None:
        name = node.name or ""
        pattern = self.pattern(node)
        if name in self.swishes:
            reason = ""
        elif name in self.keep_float:
            reason = "kept in float on request"
        elif any(use.node.graph is not node.graph for out in node.outputs for use in out.uses()):
            reason = "a subgraph (If, Loop) reads its output"
        elif pattern is None or node.domain not in ("", "ai.onnx"):
            reason = f"the target has no int8 kernel for {node.op_type}"
        else:
            reason = self.refuse(node, pattern)
        if reason or pattern is None:
            self.reasons[name] = reason
        else:
            self.accept(node, pattern)

    def pattern(self, node: ir.Node) -> FusablePattern | None:
        """The pattern; next to a constant that stays float the operator can only end a kernel."""
        found = find_pattern(node, self.capabilities)
        if found is None or found.role != "elementwise" or not self.capabilities.float_constants:
            return found
        if all(value is None or value.const_value is None for value in node.inputs):
            return found
        return dataclasses.replace(found, role="epilogue", after=("matmul", "elementwise"))

    def refuse(self, node: ir.Node, pattern: FusablePattern) -> str:
        """Why this operator cannot run in int8, or ""."""
        first = next(iter(node.inputs), None)
        if pattern.role == "epilogue":
            first = operand(node)
        if first is None or first.dtype not in (ir.DataType.FLOAT, None):
            return "its input is not float32"
        rank = _rank(node, first)
        if pattern.max_rank is not None and (rank is None or rank > pattern.max_rank):
            return f"the int8 kernel takes at most rank {pattern.max_rank}"
        match pattern.role:
            case "matmul":
                return _refuse_matmul(node, pattern)
            case "activation":
                return self.refuse_activation(node)
            case "epilogue":
                if self.is_epilogue(node, pattern) or node.name in self.swishes:
                    return ""
                return "no int8 kernel computes it on its way out"
            case "same_scale" | "integer" | "transparent":
                return self.refuse_move(node, first)
            case _:
                return self.refuse_others(node)

    def refuse_activation(self, node: ir.Node) -> str:
        source = node.inputs[0]
        producer = source.producer() if source is not None else None
        if source is None or producer is None or source.name not in self.resident:
            return "its input is float"
        role = self.roles.get(producer.name or "")
        if role in MOVES | CONCATS or role == "activation" or not single_use(source):
            return "its input has other users, so it cannot be absorbed by the producer"
        if node.op_type == "Clip":
            low, high = clip_bounds(node)
            if low is None or high is None or low > 0 or high < 0:
                return "its bounds do not contain zero or are not constant"
        return ""

    def refuse_move(self, node: ir.Node, first: ir.Value) -> str:
        if first.name in self.resident:
            return _refuse_form(node)
        if first.is_graph_input() and any(self.leads_to_int8(out) for out in node.outputs):
            return _refuse_form(node)
        return "its input is float"

    def refuse_others(self, node: ir.Node) -> str:
        """Elementwise, unary, pool, concat: only on what is in int8 already."""
        activations = [v for v in node.inputs if v is not None and v.const_value is None]
        pattern = find_pattern(node, self.capabilities)
        resident = [value.name in self.resident for value in activations]
        enough = any(resident) if pattern is not None and pattern.float_operand else all(resident)
        if not activations or not enough:
            return "an input is float, a conversion would cost more than it saves"
        for value in node.inputs:
            if value is not None and value.const_value is not None and not _is_float(value):
                return "a constant operand is not float32"
        if node.op_type in GATES:
            return self.refuse_gate(node)
        return ""

    def is_epilogue(self, node: ir.Node, pattern: FusablePattern) -> bool:
        """Whether the int8 kernel that writes the input computes this operator on its way out."""
        source = operand(node)
        producer = source.producer() if source is not None else None
        if source is None or producer is None or source.name not in self.resident:
            return False
        if self.roles.get(producer.name or "") not in (*pattern.after, "epilogue"):
            return False
        return single_use(source) or swish(node) is not None

    def refuse_gate(self, node: ir.Node) -> str:
        """HardSwish and HardSigmoid dictate the scale of their input."""
        source = node.inputs[0]
        producer = source.producer() if source is not None else None
        if self.capabilities.activation != "uint8":
            return "its integer form needs unsigned activations"
        if source is None or producer is None or self.roles.get(producer.name or "") != "matmul":
            return "its input is not written by an int8 multiply-accumulate"
        if not single_use(source):
            return "its input has other users, and it would dictate their scale"
        if node.op_type == "HardSigmoid":
            slope = node.attributes.get_float("alpha", 0.2)
            offset = node.attributes.get_float("beta", 0.5)
            if abs(slope - 1 / 6) > 1e-4 or abs(offset - 0.5) > 1e-6:
                return "only relu6(x + 3) / 6 has an integer form"
        return ""

    def accept(self, node: ir.Node, pattern: FusablePattern) -> None:
        name = node.name or ""
        if pattern.role == "epilogue" or name in self.swishes:
            self.accept_epilogue(node)
            return
        self.roles[name] = pattern.role
        activations = [v for v in node.inputs if v is not None and v.const_value is None]
        if pattern.role in MOVES:
            activations = activations[:1]
        if pattern.float_operand or pattern.fused_operand:
            activations = self.resident_operands(activations)
        for value in activations:
            self.join(value)
        if pattern.shared_scale:
            self.join(*activations)
        self.note_constants(node, pattern.role)
        outputs = list(node.outputs)
        wide = node.op_type == "Conv"
        if pattern.float_output and not any(self.leads_to_int8(out, wide) for out in outputs):
            self.float_outputs[name] = None
            return
        for out in outputs:
            self.resident.add(out.name or "")
            if pattern.role == "activation":
                # The producer writes this tensor; the one in between is never quantized.
                self.forget(activations[0])
                self.join(out)
            elif pattern.role in MOVES:
                self.join(out, *activations)
            elif pattern.role == "concat":
                self.join(out, *self.alike(activations))
            elif pattern.role == "join":
                self.join(out, *activations)
            else:
                self.join(out)

    def note_constants(self, node: ir.Node, role: Role) -> None:
        """Weights and constant operands; a bias is neither, its scale follows from the others."""
        for index, operand in enumerate(node.inputs):
            if operand is None or operand.const_value is None or role in MOVES:
                continue
            if role == "elementwise" or index == weight_input(node):
                self.constants[operand.name or ""] = None

    def accept_epilogue(self, node: ir.Node) -> None:
        """The end of the chain is quantized; what lies between it and the kernel is not."""
        self.roles[node.name or ""] = "epilogue"
        product = swish(node)
        if product is not None:
            self.swishes[product.name or ""] = node.inputs[0]
            return
        source = self.swishes.get(node.name or "", operand(node))
        if source is not None:
            self.forget(source)
        out = node.outputs[0]
        self.resident.add(out.name or "")
        self.join(out)

    def resident_operands(self, values: list[ir.Value]) -> list[ir.Value]:
        """Operands in int8; the last that a kernel writes for this operator alone stays float."""
        kept = [value for value in values if value.name in self.resident]
        for value in reversed(kept if len(kept) > 1 else []):
            producer = value.producer()
            role = self.roles.get(producer.name or "") if producer is not None else None
            if role in ("matmul", "epilogue") and single_use(value):
                self.forget(value)
                return [other for other in kept if other is not value]
        return kept

    def alike(self, inputs: list[ir.Value]) -> list[ir.Value]:
        """The inputs of a concat that share the output's scale.

        A tensor that a ReLU made non-negative keeps a scale of its own beside signed ones: a
        shared zero point would cost it half of its range, and the ReLU its free saturation. Where
        the zero point is 0 in any case, all share one.
        """
        if self.capabilities.activation == "int8":
            return inputs
        signed = [value for value in inputs if not self.non_negative(value)]
        return signed or inputs

    def non_negative(self, value: ir.Value) -> bool:
        """Whether an absorbed activation guarantees it; looks through moves and concats."""
        node = value.producer()
        role = self.roles.get(node.name or "") if node is not None else None
        if node is None or role is None:
            return False
        if role == "activation":
            return node.op_type == "Relu" or (clip_bounds(node)[0] or 0) >= 0
        if role in MOVES or node.op_type == "MaxPool":
            return node.inputs[0] is not None and self.non_negative(node.inputs[0])
        if role in CONCATS:
            return all(v is not None and self.non_negative(v) for v in node.inputs)
        return node.op_type in ("Sigmoid", "HardSigmoid")

    def leads_to_int8(self, value: ir.Value, wide: bool = False, depth: int = 0) -> bool:
        """Whether a multiply-accumulate reads this tensor, directly or through moves.

        With `wide` any operator counts that would run in int8 if this tensor were.
        """
        if depth > 6:
            return False
        for use in value.uses():
            pattern = self.pattern(use.node)
            if pattern is None or use.node.name in self.keep_float:
                continue
            if pattern.role == "matmul" and not _refuse_matmul(use.node, pattern):
                return True
            follows = pattern.role in MOVES or pattern.role in ("activation", "epilogue")
            if wide and not follows and pattern.role != "matmul":
                return True
            if follows and any(self.leads_to_int8(o, wide, depth + 1) for o in use.node.outputs):
                return True
        return False

    def join(self, *values: ir.Value) -> None:
        """Put tensors into one group (union-find)."""
        roots = [self.find(value.name or "") for value in values]
        for root in roots[1:]:
            self.parent[root] = roots[0]

    def find(self, name: str) -> str:
        self.parent.setdefault(name, name)
        while self.parent[name] != name:
            name = self.parent[name]
        return name

    def forget(self, value: ir.Value) -> None:
        self.resident.discard(value.name or "")
        self.parent.pop(value.name or "", None)

    def forget_unneeded(self, graph: ir.Graph) -> None:
        """Leave in float what kernels write and moves carry, and no operator in int8 reads."""
        for node in reversed(list(graph)) if self.capabilities.needed_only else ():
            name = node.name or ""
            role = self.roles.get(name)
            readers = [use.node.name or "" for out in node.outputs for use in out.uses()]
            if role is None or any(reader in self.roles for reader in readers):
                continue
            if role in MOVES:
                del self.roles[name]
                self.reasons[name] = "no operator in int8 reads it"
            elif role in ("matmul", "elementwise", "epilogue"):
                self.float_outputs[name] = None
            else:
                continue
            self.unneeded.update(out.name or "" for out in node.outputs)

    def finish(self) -> Placement:
        groups: dict[str, list[str]] = {}
        for name in self.parent:
            if name not in self.unneeded:
                groups.setdefault(self.find(name), []).append(name)
        return Placement(
            self.roles,
            tuple(tuple(members) for members in groups.values()),
            tuple(self.constants),
            tuple(self.float_outputs),
            self.reasons,
        )


def _refuse_matmul(node: ir.Node, pattern: FusablePattern) -> str:
    weight = weight_input(node)
    if weight != 1 and (node.op_type != "MatMul" or pattern.constant_weight):
        return "its weight is not a constant"
    if weight is not None:
        value = node.inputs[weight]
        if value is None or not _is_float(value):
            return "its weight is not float32"
    if node.op_type == "Gemm":
        attributes = node.attributes
        if attributes.get_int("transA", 0) or attributes.get_float("alpha", 1.0) != 1.0:
            return "Gemm with transA or alpha has no int8 kernel"
        if len(node.inputs) > 2 and attributes.get_float("beta", 1.0) != 1.0:
            return "Gemm with beta has no int8 kernel"
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if bias is not None and (bias.const_value is None or not _is_float(bias)):
        return "its bias is not constant"
    if bias is not None and bias.const_value is not None and _is_per_row(bias.const_value):
        return "its bias is not one number per output channel"
    return ""


def _is_per_row(bias: ir.TensorProtocol) -> bool:
    """Whether a Gemm's C has an axis besides that of the output channels."""
    return math.prod(bias.shape.numpy()[:-1]) != 1


def _rank(node: ir.Node, first: ir.Value) -> int | None:
    """Rank of the first input; a convolution's weight tells it where no shape is known."""
    if first.shape is not None:
        return len(first.shape)
    weight = weight_input(node)
    value = node.inputs[weight] if weight is not None and node.op_type == "Conv" else None
    if value is None or value.const_value is None:
        return None
    return len(value.const_value.shape)


def _refuse_form(node: ir.Node) -> str:
    """Why this form of an operator that moves values has no integer counterpart, or ""."""
    if node.op_type == "MaxPool" and len(node.outputs) > 1:
        return "the int8 kernel gives no indices"
    if node.op_type == "Pad":
        if node.attributes.get_string("mode", "constant") != "constant":
            return "only constant padding has an integer form"
        value = node.inputs[2] if len(node.inputs) > 2 else None
        if value is not None and (value.const_value is None or np.any(value.const_value.numpy())):
            return "only padding with zeros has an integer form"
    if node.op_type == "Resize":
        mode = node.attributes.get_string("mode", "nearest")
        if mode not in ("nearest", "linear"):
            return f"resize mode {mode} has no integer form"
    return ""


def clip_bounds(node: ir.Node) -> tuple[float | None, float | None]:
    """Constant bounds of a Clip; -inf or inf where there is none, None where not constant."""
    bounds: list[float | None] = []
    for index, missing in ((1, -np.inf), (2, np.inf)):
        value = node.inputs[index] if index < len(node.inputs) else None
        if value is None:
            bounds.append(missing)
        elif value.const_value is None:
            bounds.append(None)
        else:
            bounds.append(float(value.const_value.numpy().item()))
    return bounds[0], bounds[1]


def _is_float(value: ir.Value) -> bool:
    return value.const_value is not None and value.const_value.dtype == ir.DataType.FLOAT
