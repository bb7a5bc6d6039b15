"""The documented rules of TensorRT for an ONNX file, checked without TensorRT.

What is refused by the parser or the builder, or computed differently from what ONNX says, is an
error. What is only slower than it could be is a matter of performance. The rest are notes for the
build. Each rule cites the page that states it; none has been tried on a GPU.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import onnx_ir as ir

from compress.element_types import SAME_TYPE
from compress.errors import UsageError
from targets import tensorrt_formats, tensorrt_placement
from targets.tensorrt_capabilities import DOCS
from targets.tensorrt_graph import Found, Network, Rule, Severity, operand, sizes
from targets.tensorrt_operators import OPERATORS, SUPPORTED, restriction

OPSET_GUIDE: Final = f"{DOCS}/reference/onnx-opset-guide.html"
STRONG: Final = (
    "https://docs.nvidia.com/deeplearning/tensorrt/11.0.0/api/migration/tensorrt-10x-to-11x.html"
)
PROFILES: Final = f"{DOCS}/inference-library/work-dynamic-shapes.html"
DIMS: Final = "NvInferRuntimeBase.h, Dims64::MAX_DIMS"

FIRST_OPSET = 9
LAST_OPSET: Final = {10: 24, 11: 25}
"""Of the newest release: 10.15's operators.md and the guide for 11.x. Earlier ones take less."""
_MOST_AXES = 8
_TYPES = (
    "FLOAT", "FLOAT16", "BFLOAT16", "INT32", "INT64", "BOOL", "DOUBLE", "UINT8",
    "INT8", "INT4", "FLOAT8E4M3FN", "FLOAT4E2M1",
)  # fmt: skip
_COMPUTED: Final = {"FLOAT", "FLOAT16", "BFLOAT16", "INT32", "INT64", "BOOL", "DOUBLE"}
_QUANTIZED_BY_RULES = ("FLOAT8E4M3FNUZ", "FLOAT8E5M2", "FLOAT8E5M2FNUZ")


@dataclass(frozen=True)
class Violation:
    """One rule that a model breaks.

    Attributes:
        rule: its id.
        node: name of the operator, or "" where it is about the model.
        sentence: what is wrong, for the user.
        source: page that says so.
        severity: "error" (the model is refused, or computes something else), "performance" (it
            runs, slower than it could), or "note" (what the build has to know).
    """

    rule: str
    node: str
    sentence: str
    source: str
    severity: Severity = "error"


def check(model: ir.Model, *, version: str = "10") -> tuple[Violation, ...]:
    """Every violation in the model, errors first.

    Args:
        model: as it would be given to TensorRT's ONNX parser.
        version: of TensorRT: "10", "11" or a release such as "10.15".

    Raises:
        UsageError: there are no rules for this version.
    """
    major = _major(version)
    networks = [Network(model, graph, major) for graph in (model.graph, *model.graph.subgraphs())]
    found = [
        Violation(rule.id, _name(node), _sentence(node, sentence), rule.source, rule.severity)
        for rule in RULES
        for network in networks
        for node, sentence in rule.find(network)
    ]
    order = ("error", "performance", "note")
    return tuple(sorted(found, key=lambda violation: order.index(violation.severity)))


def summary(violations: Sequence[Violation]) -> dict[str, int]:
    """How many violations there are of each severity."""
    counts = Counter(violation.severity for violation in violations)
    return {severity: counts[severity] for severity in ("error", "performance", "note")}


def _major(version: str) -> int:
    match = re.fullmatch(r"(\d+)(\.\d+)*", version)
    if match is None or int(match[1]) not in LAST_OPSET:
        known = " and ".join(map(str, LAST_OPSET))
        raise UsageError(f"There are no rules for TensorRT {version!r}; there are for {known}.")
    return int(match[1])


def _name(node: ir.Node | None) -> str:
    return (node.name or node.outputs[0].name or "") if node is not None else ""


def _sentence(node: ir.Node | None, sentence: str) -> str:
    return sentence if node is None else f"{node.op_type} {_name(node)}: {sentence}"


def _opset(network: Network) -> Found:
    last = LAST_OPSET[network.major]
    if network.outermost and not FIRST_OPSET <= network.opset <= last:
        yield (
            None,
            f"The model has ONNX opset {network.opset}; TensorRT {network.major} reads "
            f"{FIRST_OPSET} to {last}.",
        )


def _domain(network: Network) -> Found:
    functions = {(domain, name) for domain, name, _ in network.model.functions}
    for node in network.graph:
        known = (node.domain, node.op_type) in functions
        if node.domain not in ("", "ai.onnx") and not known:
            yield node, f"it belongs to {node.domain}, not to ONNX; TensorRT needs a plugin for it."


def _operator(network: Network) -> Found:
    for node in network.graph:
        if node.domain in ("", "ai.onnx") and node.op_type not in SUPPORTED:
            yield node, "TensorRT's parser does not have this operator."


def _form(network: Network) -> Found:
    for node in network.graph:
        if node.domain in ("", "ai.onnx") and (reason := restriction(node)):
            yield node, f"{reason}."


def _tensor_type(network: Network) -> Found:
    known = (*_TYPES, *_QUANTIZED_BY_RULES)
    for node in network.graph:
        for out in node.outputs:
            dtype = network.types.get(out)
            quantized = node.op_type == "QuantizeLinear"  # the rules of formats speak of it
            if dtype is not None and dtype.name not in known and not quantized:
                yield node, f"{out.name} is of type {dtype.name}, which TensorRT does not have."


def _float64(network: Network) -> Found:
    for node in network.graph:
        for out in node.outputs:
            if network.types.get(out) == ir.DataType.DOUBLE:
                yield node, f"{out.name} is in float64; TensorRT computes it in float32."


def _mixed_types(network: Network) -> Found:
    for node in network.graph:
        if node.op_type not in SAME_TYPE:
            continue
        indices = SAME_TYPE[node.op_type] or range(len(node.inputs))
        values = [operand(node, index) for index in indices]
        types = {network.types[v].name for v in values if v is not None and v in network.types}
        if len(types) > 1 and types <= _COMPUTED:
            yield (
                node,
                f"its inputs are in {' and '.join(sorted(types))}; networks are strongly typed, "
                f"so nothing is cast. Put a Cast in front of it.",
            )


def _rank(network: Network) -> Found:
    for node in network.graph:
        for out in node.outputs:
            shape = sizes(out)
            if shape is not None and len(shape) > _MOST_AXES:
                yield node, f"{out.name} has {len(shape)} axes; at most {_MOST_AXES} are supported."


def _dynamic_shape(network: Network) -> Found:
    for value in network.graph.inputs if network.outermost else ():
        if -1 in (sizes(value) or ()):
            yield (
                None,
                f"Input {value.name} has axes of any size; the build needs an optimization profile "
                f"with their smallest, usual and largest size.",
            )


RULES: Final = (
    Rule("opset", "error", OPSET_GUIDE, _opset),
    Rule("domain", "error", OPERATORS, _domain),
    Rule("operator", "error", OPERATORS, _operator),
    Rule("operator_form", "error", OPERATORS, _form),
    Rule("tensor_type", "error", OPERATORS, _tensor_type),
    Rule("mixed_types", "error", STRONG, _mixed_types),
    Rule("rank", "error", DIMS, _rank),
    *tensorrt_formats.RULES,
    *tensorrt_placement.RULES,
    Rule("float64", "note", OPERATORS, _float64),
    Rule("dynamic_shape", "note", PROFILES, _dynamic_shape),
)
"""Every rule there is, in the order in which violations are listed."""
