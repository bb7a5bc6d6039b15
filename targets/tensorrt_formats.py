"""TensorRT's rules for the format of quantized tensors: types, zero points, scales, blocks."""

from __future__ import annotations

import math
from typing import Final

import numpy as np
import onnx_ir as ir

from targets.tensorrt_capabilities import EXPLICIT, INT4_GROUPS, SCHEMES, WORKFLOWS
from targets.tensorrt_graph import (
    DEQUANTIZE,
    QUANTIZE,
    WEIGHTED,
    Found,
    Network,
    Rule,
    array,
    axis_of,
    is_blocked,
    operand,
    readers,
    sizes,
)
from targets.tensorrt_operators import OPERATORS

LAYER: Final = (
    "https://docs.nvidia.com/deeplearning/tensorrt/latest/_static/operators/Quantize.html"
)
PARSER: Final = "github.com/onnx/onnx-tensorrt, onnxOpImporters.cpp, QuantDequantLinearHelper"
ONNX_SUPPORT: Final = f"ONNX Support, {EXPLICIT}"
GUIDE: Final = "TensorRT 8 Developer Guide, 7.1.3 Per-Tensor and Per-Channel Quantization"
OLD_GUIDE: Final = "TensorRT 7.2 Developer Guide, Working With Quantized Networks"

_INT8, _INT4 = ir.DataType.INT8, ir.DataType.INT4
_FP8, _FP4 = ir.DataType.FLOAT8E4M3FN, ir.DataType.FLOAT4E2M1
_OTHER_FP8 = (ir.DataType.FLOAT8E4M3FNUZ, ir.DataType.FLOAT8E5M2, ir.DataType.FLOAT8E5M2FNUZ)
_NEEDS_OPSET = {_FP8: 19, _INT4: 21, _FP4: 23}


def _nonzero_zero_point(network: Network) -> Found:
    for node in network.pairs:
        zero = operand(node, 2)
        numbers = array(zero)
        if zero is not None and (numbers is None or np.any(numbers.astype(np.float32))):
            what = "is not constant" if numbers is None else f"is {numbers.reshape(-1)[0]}"
            yield node, f"its zero point {what}; only 0 is supported."


def _uint8(network: Network) -> Found:
    for node in network.pairs:
        if network.dtype(node) == ir.DataType.UINT8:
            if operand(node, 2) is None and not node.attributes.get_int("output_dtype", 0):
                said = "it has no zero point, which ONNX reads as uint8 and TensorRT as int8"
            else:
                said = "it quantizes to uint8"
            yield node, f"{said}; quantized activations and weights are signed. Use int8."


def _float8_format(network: Network) -> Found:
    for node in network.pairs:
        dtype = network.dtype(node)
        if dtype in _OTHER_FP8:
            yield (
                node,
                f"it quantizes to {dtype.name}; of the 8-bit floats only E4M3FN is supported.",
            )


def _quantized_type(network: Network) -> Found:
    known = (_INT8, _INT4, _FP8, _FP4, ir.DataType.UINT8, *_OTHER_FP8, None)
    for node in network.pairs:
        dtype = network.dtype(node)
        if dtype not in known and not _is_bias(node):
            name = dtype.name if dtype is not None else ""
            yield node, f"it quantizes to {name}; only INT8, INT4, FP8 and FP4 are supported."


def _is_bias(node: ir.Node) -> bool:
    uses = [use for out in node.outputs for use in out.uses()]
    return bool(uses) and all(use.idx == 2 and use.node.op_type in WEIGHTED for use in uses)


def _quantized_bias(network: Network) -> Found:
    for node in network.of("Conv", "ConvTranspose", "Gemm"):
        if network.reading(operand(node, 2)) is not None:
            yield node, "its bias is quantized; a bias stays in floating point."


def _scale_not_constant(network: Network) -> Found:
    for node in network.pairs:
        if array(operand(node, 1)) is None:
            yield node, "its scale is computed; it must be known when the engine is built."


def _scale_not_positive(network: Network) -> Found:
    for node in network.pairs:
        scale = array(operand(node, 1))
        if scale is None:
            continue
        numbers = scale.astype(np.float64)
        if not (np.isfinite(numbers).all() and (numbers > 0).all()):
            yield (
                node,
                f"its smallest scale is {numbers.min():g}; scales must be finite and above 0.",
            )


def _scale_shape(network: Network) -> Found:
    for node in network.pairs:
        scale, zero = sizes(operand(node, 1)), sizes(operand(node, 2))
        shape, axis = sizes(operand(node, 0)), axis_of(node)
        if scale is None:
            continue
        if zero is not None and math.prod(zero) != math.prod(scale):
            yield node, f"it has {math.prod(scale)} scales and {math.prod(zero)} zero points."
        elif shape is None or axis is None:
            continue
        elif is_blocked(node):
            if sentence := _block_shape(shape, scale):
                yield node, sentence
        elif axis >= len(shape) or shape[axis] not in (-1, math.prod(scale)):
            yield node, f"it has {math.prod(scale)} scales for axis {axis} of shape {shape}."


def _block_shape(shape: tuple[int, ...], scale: tuple[int, ...]) -> str:
    if len(shape) != len(scale):
        return f"its scale has rank {len(scale)} and the tensor rank {len(shape)}."
    blocked = [i for i, (n, s) in enumerate(zip(shape, scale, strict=True)) if n not in (s, -1)]
    if len(blocked) > 1:
        return f"its scale of shape {scale} blocks axes {blocked} of {shape}; one is allowed."
    if any(shape[i] % scale[i] for i in blocked):
        return f"its scale of shape {scale} does not divide {shape} into whole blocks."
    return ""


def _weight_axis(network: Network) -> Found:
    for node in network.of(*WEIGHTED):
        found = network.reading(operand(node, 1))
        axis = axis_of(found.node) if found is not None else None
        if found is None or not found.constant or axis is None or is_blocked(found.node):
            continue
        moved = found.node.outputs[0] is not node.inputs[1]
        wanted = None if moved else _output_axis(node, found.node)
        if not moved and axis != wanted:
            right = "per tensor" if wanted is None else f"along axis {wanted}"
            yield (
                found.node,
                f"the weight of {node.op_type} {node.name} has scales along axis {axis}; its "
                f"output channels are quantized {right}.",
            )


def _output_axis(node: ir.Node, weight: ir.Node) -> int | None:
    shape = sizes(operand(weight, 0)) or ()
    match node.op_type:
        case "Conv":
            return 0
        case "ConvTranspose":
            return 1 if node.attributes.get_int("group", 1) == 1 else None
        case "Gemm":
            return 0 if node.attributes.get_int("transB", 0) else 1
        case _:
            return len(shape) - 1


def _activation_scales(network: Network) -> Found:
    for node in network.pairs:
        scale = sizes(operand(node, 1))
        if scale is not None and math.prod(scale) > 1 and not network.quantizes_constant(node):
            dtype = network.dtype(node)
            if dtype not in (_INT4, _FP4):
                yield node, f"it has {math.prod(scale)} scales; an activation has one."


def _int4_elsewhere(network: Network) -> Found:
    for node in network.pairs:
        if network.dtype(node) != _INT4:
            continue
        if not network.quantizes_constant(node):
            yield node, "it quantizes an activation to INT4, which is for weights only."
        elif node.op_type == DEQUANTIZE:
            others = [
                r.op_type
                for r in readers(node)
                if r.op_type not in ("Gemm", "MatMul") or operand(r, 1) is not node.outputs[0]
            ]
            if others:
                yield node, f"{others[0]} reads INT4; it is for the weights of linear layers only."


def _int4_blocks(network: Network) -> Found:
    for node in network.pairs:
        if network.dtype(node) != _INT4 or not network.quantizes_constant(node):
            continue
        size = node.attributes.get_int("block_size", 0) if is_blocked(node) else 0
        if size not in INT4_GROUPS:
            have = f"blocks of {size}" if size else "no blocks"
            yield node, f"it has {have}; INT4 has a scale for every 64 or 128 weights."


def _int4_odd(network: Network) -> Found:
    for node in network.pairs:
        shape = sizes(operand(node, 0))
        packed = network.dtype(node) in (_INT4, _FP4)
        if packed and shape is not None and -1 not in shape and math.prod(shape) % 2:
            yield node, f"it has {math.prod(shape)} elements; two are packed in a byte."


def _opset_of_format(network: Network) -> Found:
    for node in network.pairs:
        dtype, opset = network.dtype(node), network.opset
        least = _NEEDS_OPSET.get(dtype, 10) if dtype is not None else 10
        if is_blocked(node):
            least = max(least, 21)
        elif axis_of(node) is not None:
            least = max(least, 13)
        if opset < least:
            yield node, f"its format needs ONNX opset {least}; the model has {opset}."


def _scale_type(network: Network) -> Found:
    for node in network.of(QUANTIZE) if network.opset >= 19 else ():
        source, scale = node.inputs[0], operand(node, 1)
        if source is None or scale is None:
            continue
        types = network.types.get(source), network.types.get(scale)
        if None not in types and types[0] != types[1]:
            names = [t.name for t in types if t is not None]
            yield node, f"it quantizes {names[0]} with a scale in {names[1]}; both have one type."


def _weight_range(network: Network) -> Found:
    for node in network.of(DEQUANTIZE):
        numbers = array(node.inputs[0])
        if numbers is not None and numbers.dtype == np.int8 and np.any(numbers == -128):
            yield node, "its weights reach -128; TensorRT's own range of weights is [-127, 127]."


RULES: Final = (
    Rule("zero_point", "error", OPERATORS, _nonzero_zero_point),
    Rule("uint8", "error", OPERATORS, _uint8),
    Rule("float8_format", "error", ONNX_SUPPORT, _float8_format),
    Rule("quantized_type", "error", OPERATORS, _quantized_type),
    Rule("quantized_bias", "error", OPERATORS, _quantized_bias),
    Rule("scale_constant", "error", LAYER, _scale_not_constant),
    Rule("scale_positive", "error", PARSER, _scale_not_positive),
    Rule("scale_shape", "error", PARSER, _scale_shape),
    Rule("scale_type", "error", LAYER, _scale_type),
    Rule("weight_axis", "error", f"{GUIDE}; {ONNX_SUPPORT}", _weight_axis),
    Rule("activation_scales", "error", f"{GUIDE}; {WORKFLOWS}", _activation_scales),
    Rule("int4_weights", "error", SCHEMES, _int4_elsewhere),
    Rule("int4_blocks", "error", WORKFLOWS, _int4_blocks),
    Rule("int4_packing", "error", PARSER, _int4_odd),
    Rule("quantization_opset", "error", ONNX_SUPPORT, _opset_of_format),
    Rule("weight_range", "note", OLD_GUIDE, _weight_range),
)
