"""ONNX operators that TensorRT's parser takes, and the forms of them that it does not.

From the table of ONNX-TensorRT, docs/operators.md, of TensorRT 10.15; the ONNX Opset Guide refers
to the same table for 11.x.
"""

from __future__ import annotations

from typing import Final

import onnx_ir as ir

from compress.element_types import constant_tensor
from compress.rewrites import constant_array

OPERATORS: Final = "https://github.com/onnx/onnx-tensorrt/blob/main/docs/operators.md"

SUPPORTED: Final = frozenset((
    "Abs", "Acos", "Acosh", "Add", "And", "ArgMax", "ArgMin", "Asin", "Asinh", "Atan", "Atanh",
    "Attention", "AveragePool", "BatchNormalization", "BlackmanWindow", "Cast", "CastLike",
    "Ceil", "Celu", "Clip", "Concat", "Constant", "ConstantOfShape", "Conv", "ConvTranspose",
    "Cos", "Cosh", "CumSum", "DeformConv", "DepthToSpace", "DequantizeLinear", "Div", "Dropout",
    "Einsum", "Elu", "Equal", "Erf", "Exp", "Expand", "EyeLike", "Flatten", "Floor", "Gather",
    "GatherElements", "GatherND", "Gelu", "Gemm", "GlobalAveragePool", "GlobalLpPool",
    "GlobalMaxPool", "Greater", "GreaterOrEqual", "GridSample", "GroupNormalization", "GRU",
    "HammingWindow", "HannWindow", "HardSigmoid", "HardSwish", "Hardmax", "Identity", "If",
    "ImageScaler", "InstanceNormalization", "IsInf", "IsNaN", "LayerNormalization", "LeakyRelu",
    "Less", "LessOrEqual", "Log", "LogSoftmax", "Loop", "LRN", "LSTM", "LpNormalization",
    "LpPool", "MatMul", "Max", "MaxPool", "Mean", "MeanVarianceNormalization", "Min", "Mish",
    "Mod", "Mul", "Neg", "NonMaxSuppression", "NonZero", "Not", "OneHot", "Or", "Pad",
    "ParametricSoftplus", "Pow", "PRelu", "QuantizeLinear", "RandomNormal", "RandomNormalLike",
    "RandomUniform", "RandomUniformLike", "Range", "Reciprocal", "ReduceL1", "ReduceL2",
    "ReduceLogSum", "ReduceLogSumExp", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceProd",
    "ReduceSum", "ReduceSumSquare", "Relu", "Reshape", "Resize", "ReverseSequence",
    "RMSNormalization", "RNN", "RoiAlign", "RotaryEmbedding", "Round", "STFT", "ScaledTanh",
    "Scan", "Scatter", "ScatterElements", "ScatterND", "Selu", "Shape", "Shrink", "Sigmoid",
    "Sign", "Sin", "Sinh", "Size", "Slice", "Softmax", "Softplus", "Softsign", "SpaceToDepth",
    "Split", "Sqrt", "Squeeze", "Sub", "Sum", "Tan", "Tanh", "TensorScatter", "ThresholdedRelu",
    "Tile", "TopK", "Transpose", "Trilu", "Unsqueeze", "Upsample", "Where", "Xor",
))  # fmt: skip

_RESIZE_COORDINATES = ("half_pixel", "pytorch_half_pixel", "tf_half_pixel_for_nn", "asymmetric",
                       "align_corners")  # fmt: skip
_MOST_TOP = 3840


def restriction(node: ir.Node) -> str:
    """Why this form of a supported operator is refused, or ""."""
    op = node.op_type
    if op in ("MaxPool", "AveragePool", "LpPool"):
        return _pool(node)
    if op == "Resize":
        return _resize(node)
    if op.startswith("Reduce") and len(node.inputs) > 1:
        axes = node.inputs[1]
        if axes is not None and constant_tensor(axes) is None:
            return "its axes must be an initializer"
    if op == "LayerNormalization" and any(out.uses() for out in node.outputs[1:]):
        return "only its first output is supported"
    if op == "ScatterND" and node.attributes.get_string("reduction", "none") != "none":
        return "no reduction is supported"
    lstm = ("input_forget", "layout") if op == "LSTM" else ()
    if any(node.attributes.get_int(name, 0) for name in lstm):
        return "input_forget and layout must be 0"
    if op == "TopK":
        count = constant_array(node.inputs[1])
        if not node.attributes.get_int("sorted", 1):
            return "sorted must be 1"
        if count is not None and int(count.item()) >= _MOST_TOP:
            return f"K must be below {_MOST_TOP}"
    return ""


def _pool(node: ir.Node) -> str:
    source = node.inputs[0]
    if source is not None and source.shape is not None and len(source.shape) not in (4, 5):
        return "only 2D and 3D pooling is supported"
    if any(size != 1 for size in node.attributes.get_ints("dilations", ())):
        return "dilations must be 1"
    if len(node.outputs) > 1 and (node.outputs[1].uses() or node.outputs[1].is_graph_output()):
        return "its Indices output is not supported"
    return ""


def _resize(node: ir.Node) -> str:
    text = node.attributes.get_string
    mode = text("mode", "nearest")
    coordinates = text("coordinate_transformation_mode", "half_pixel")
    if mode not in ("nearest", "linear"):
        return f"mode {mode} is not supported"
    if coordinates not in _RESIZE_COORDINATES:
        return f"coordinate_transformation_mode {coordinates} is not supported"
    if node.attributes.get_int("antialias", 0):
        return "antialiasing is not supported"
    policy = text("keep_aspect_ratio_policy", "stretch")
    return "" if policy == "stretch" else f"keep_aspect_ratio_policy {policy} is not supported"
