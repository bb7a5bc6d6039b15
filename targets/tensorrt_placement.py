"""TensorRT's rules for where Q and DQ stand; most cost speed, and none of them accuracy."""

from __future__ import annotations

from typing import Final

import onnx_ir as ir

from targets.tensorrt_capabilities import EXPLICIT
from targets.tensorrt_graph import (
    DEQUANTIZE,
    QUANTIZE,
    WEIGHTED,
    Found,
    Network,
    Rule,
    array,
    operand,
    readers,
)
from targets.tensorrt_operators import OPERATORS

RECOMMENDED: Final = f"Q/DQ Layer-Placement Recommendations, {EXPLICIT}"
LIMITATIONS: Final = f"Q/DQ Limitations, {EXPLICIT}"
PAIRS: Final = f"ONNX Support, {EXPLICIT}"

_POINTWISE = ("Clip", "Elu", "Gelu", "HardSigmoid", "HardSwish", "LeakyRelu", "Relu", "Sigmoid",
              "Tanh")  # fmt: skip
_QUANTIZED = (
    ir.DataType.INT8, ir.DataType.UINT8, ir.DataType.INT4, ir.DataType.FLOAT8E4M3FN,
    ir.DataType.FLOAT4E2M1,
)  # fmt: skip
_TAKES_QUANTIZED = (QUANTIZE, DEQUANTIZE, "Attention", "Constant")
_POOLS = ("AveragePool", "GlobalAveragePool")


def _integers_read(network: Network) -> Found:
    for node in network.graph:
        if node.op_type in _TAKES_QUANTIZED:
            continue
        for value in node.inputs:
            dtype = network.types.get(value) if value is not None else None
            if dtype in _QUANTIZED and node.op_type not in ("Cast", "CastLike"):
                yield (
                    node,
                    f"it reads {dtype.name}; only DequantizeLinear reads quantized tensors. Put "
                    f"it behind DequantizeLinear.",
                )
                break


def _without_dequantize(network: Network) -> Found:
    for node in network.of(QUANTIZE):
        if not readers(node):
            where = "leaves the network" if node.outputs[0].is_graph_output() else "is not read"
            yield node, f"its integers are never dequantized: the tensor {where}."


def _without_quantize(network: Network) -> Found:
    for node in network.of(DEQUANTIZE):
        if network.quantizes_constant(node) or node.inputs[0] is None:
            continue
        producer = node.inputs[0].producer()
        if producer is None or producer.op_type in ("Cast", "CastLike"):
            yield node, "it reads integers that no QuantizeLinear made."


def _weighted_inputs(network: Network) -> Found:
    for node in network.of(*WEIGHTED):
        first, second = (network.reading(operand(node, index)) for index in (0, 1))
        if second is not None and second.dtype == ir.DataType.INT4:
            continue
        if (first is None) != (second is None):
            which = "second" if second is None else "first"
            yield (
                node,
                f"its {which} operand is not quantized, so it is computed in floating point.",
            )
        elif first is not None and second is not None and first.dtype != second.dtype:
            names = [r.dtype.name if r.dtype is not None else "?" for r in (first, second)]
            yield node, f"its operands are quantized to {names[0]} and {names[1]}; use one type."


def _activation_behind_pair(network: Network) -> Found:
    for node in network.of(*_POINTWISE):
        found = network.reading(operand(node, 0))
        producer = found.source.producer() if found is not None and found.source else None
        if producer is None or found is None or producer.op_type not in WEIGHTED:
            continue
        if len(readers(found.node)) == 1 and len(producer.outputs[0].uses()) == 1:
            yield (
                node,
                f"the output of {producer.op_type} {producer.name} is quantized before it, which "
                f"keeps the two from being fused.",
            )


def _pool_output(network: Network) -> Found:
    for node in network.of(*_POOLS):
        if network.reading(operand(node, 0)) is None:
            continue
        if all(reader.op_type != QUANTIZE for reader in readers(node)):
            yield node, "its input is quantized and its output is not; it needs both."


def _concat_scales(network: Network) -> Found:
    for node in network.of("Concat"):
        found = [network.reading(value) for value in node.inputs]
        known = [reading for reading in found if reading is not None]
        if len(known) > 1 and not all(known[0].same_scale(one) for one in known[1:]):
            yield (
                node,
                "its inputs have different scales, so they are quantized anew; let them share.",
            )
        elif known and len(known) < len(found):
            yield node, "only some of its inputs are quantized."


def _residual_in_float(network: Network) -> Found:
    for node in network.of("Add"):
        if not _is_quantized_later(node):
            continue
        for index in (0, 1):
            kernel = _kernel(network, operand(node, index))
            other = operand(node, 1 - index)
            if kernel is None or other is None or network.reading(other) is not None:
                continue
            if _kernel(network, other) is None and array(other) is None:
                yield (
                    node,
                    f"the branch that is added to {kernel.name} is not quantized, so the fused "
                    f"kernel cannot write int8. Quantize it.",
                )
                break


def _residual_scales(network: Network) -> Found:
    for node in network.of("Add"):
        first, second = (network.reading(operand(node, index)) for index in (0, 1))
        if first is None or second is None or first.constant or second.constant:
            continue
        if ir.DataType.INT8 not in (first.dtype, second.dtype):
            continue
        if not first.same_scale(second):
            yield node, "its two branches are quantized with different scales; let them share one."


def _kernel(network: Network, value: ir.Value | None) -> ir.Node | None:
    """The int8 layer that writes a tensor in floating point for one reader alone."""
    node = value.producer() if value is not None else None
    if node is None or value is None or node.op_type not in WEIGHTED or len(value.uses()) > 1:
        return None
    found = network.reading(operand(node, 0))
    return node if found is not None and found.dtype == ir.DataType.INT8 else None


def _is_quantized_later(node: ir.Node) -> bool:
    """Whether QuantizeLinear reads the output, directly or through one activation."""
    following = readers(node)
    if any(reader.op_type == QUANTIZE for reader in following):
        return True
    inner = [reader for reader in following if reader.op_type in _POINTWISE]
    return any(reader.op_type == QUANTIZE for one in inner for reader in readers(one))


RULES: Final = (
    Rule("quantized_operand", "error", OPERATORS, _integers_read),
    Rule("dequantize_missing", "note", PAIRS, _without_dequantize),
    Rule("quantize_missing", "note", PAIRS, _without_quantize),
    Rule("weighted_inputs", "performance", RECOMMENDED, _weighted_inputs),
    Rule("output_before_activation", "performance", RECOMMENDED, _activation_behind_pair),
    Rule("pool_output", "performance", RECOMMENDED, _pool_output),
    Rule("concat_scales", "performance", LIMITATIONS, _concat_scales),
    Rule("residual_in_float", "performance", RECOMMENDED, _residual_in_float),
    Rule("residual_scales", "performance", LIMITATIONS, _residual_scales),
)
