"""What TensorRT 10.x and 11.x want of a quantized network, each fact with its source.

Written from NVIDIA's documentation and the source of its ONNX parser. Nothing here has been run on
a GPU: facts marked "unverified" are conclusions from what is documented, not statements of it.
"""

from __future__ import annotations

from typing import Final

from compress.target import Capabilities, FusablePattern, Role
from targets.gpu import Gpu, channel_multiple, features

OPSET: Final = 21
"""Blocked and 4-bit quantization need it; both parsers take it, see `targets.tensorrt_rules`."""
INT4_GROUPS: Final = (64, 128)

DOCS: Final = "https://docs.nvidia.com/deeplearning/tensorrt/latest"
EXPLICIT: Final = f"{DOCS}/inference-library/quantized-types-explicit-quantization.html"
SCHEMES: Final = f"{DOCS}/inference-library/quantized-types-schemes.html"
WORKFLOWS: Final = f"{DOCS}/inference-library/quantized-types-workflows.html"
SUPPORT: Final = "https://docs.nvidia.com/deeplearning/tensorrt/support-matrix"
_PLACEMENT = f"Q/DQ Layer-Placement Recommendations, {EXPLICIT}"
_MATRICES = (
    f"{_PLACEMENT}; unverified with scales per channel and inputs of more than two axes: the "
    f"TensorRT 8 Developer Guide, 7.1.3, names matrices"
)
_PROCESSING = f"TensorRT Processing of Q/DQ Networks (layers that commute with Q/DQ), {EXPLICIT}"
_POINTWISE = f"unverified: pointwise fusion behind a weighted layer; {_PLACEMENT}"
_MOVES = f"unverified for this operator: it moves values, so it commutes with Q/DQ; {_PROCESSING}"
_AFTER: tuple[Role, ...] = ("matmul", "elementwise")

PATTERNS: Final = (
    FusablePattern("Conv", "matmul", _PLACEMENT, float_output=True, max_rank=5),
    FusablePattern("ConvTranspose", "matmul", _PLACEMENT, float_output=True, max_rank=5),
    FusablePattern("Gemm", "matmul", _PLACEMENT, float_output=True),
    FusablePattern("MatMul", "matmul", _MATRICES, float_output=True),
    # The addition of a residual is fused into the layer that writes the other operand.
    FusablePattern("Add", "elementwise", _PLACEMENT, fused_operand=True, shared_scale=True),
    FusablePattern("Mul", "elementwise", _POINTWISE),
    FusablePattern("Relu", "epilogue", _PLACEMENT, after=_AFTER),
    FusablePattern("Clip", "epilogue", _POINTWISE, after=_AFTER),
    FusablePattern("LeakyRelu", "epilogue", _POINTWISE, after=_AFTER),
    FusablePattern("Elu", "epilogue", _POINTWISE, after=_AFTER),
    FusablePattern("Sigmoid", "epilogue", _POINTWISE, after=_AFTER),
    FusablePattern("HardSigmoid", "epilogue", _POINTWISE, after=_AFTER),
    FusablePattern("HardSwish", "epilogue", _POINTWISE, after=_AFTER),
    FusablePattern("Tanh", "epilogue", _POINTWISE, after=_AFTER),
    FusablePattern("Gelu", "epilogue", _POINTWISE, after=_AFTER),
    FusablePattern("AveragePool", "pool", _PROCESSING),
    FusablePattern("GlobalAveragePool", "pool", _PROCESSING),
    FusablePattern("Concat", "concat", f"Q/DQ Limitations (equal scales), {EXPLICIT}"),
    FusablePattern("MaxPool", "same_scale", _PROCESSING),
    FusablePattern("Reshape", "same_scale", _MOVES),
    FusablePattern("Flatten", "same_scale", _MOVES),
    FusablePattern("Squeeze", "same_scale", _MOVES),
    FusablePattern("Unsqueeze", "same_scale", _MOVES),
    FusablePattern("Transpose", "same_scale", _MOVES),
    FusablePattern("Split", "same_scale", _MOVES),
    FusablePattern("Slice", "same_scale", _MOVES),
    FusablePattern("Gather", "same_scale", _MOVES),
    FusablePattern("Pad", "same_scale", _MOVES),
    FusablePattern("Resize", "same_scale", _MOVES),
)


def tensorrt_capabilities(gpu: Gpu | None = None) -> Capabilities:
    """What TensorRT runs on a GPU; without one, what every GPU since Ampere (8.0) does.

    Quantization is explicit and symmetric: int8 activations with one scale and zero point 0, int8
    weights with one scale per output channel, biases in float. FP8 needs compute capability 8.9,
    BF16 8.0 (support matrix). Weights in int4 are for linear layers only, in blocks of 64 or 128.
    """
    known = gpu if gpu is not None else Gpu("any since Ampere", (8, 0))
    capability = known.compute_capability
    bfloat16 = ("bfloat16",) if capability >= (8, 0) else ()
    float8 = ("float8_e4m3fn",) if capability >= (8, 9) else ()
    notes = []
    if gpu is None:
        notes.append("No GPU is known: the formats are those that every GPU since Ampere has.")
    elif capability < (7, 5):
        notes.append(
            f"{gpu.name} has compute capability {capability[0]}.{capability[1]}; TensorRT 10.1 "
            f"needs 7.0, and later releases may need more: see the support matrix, {SUPPORT}."
        )
    precisions = ("float32", "float16", *bfloat16, "int8", *float8)
    return Capabilities(
        source=f"NVIDIA TensorRT documentation, {EXPLICIT}, {SCHEMES}, {SUPPORT}",
        opset=OPSET,
        precisions=precisions,
        channel_multiple=channel_multiple(known, precisions),
        sparsity=("2:4",) if "2:4" in features(known) else (),
        activation="int8",
        restricted_weights=True,
        float_constants=True,
        needed_only=True,
        dynamic=False,
        patterns=PATTERNS,
        weight_only=("int4",),
        weight_groups=INT4_GROUPS,
        notes=tuple(notes),
    )
