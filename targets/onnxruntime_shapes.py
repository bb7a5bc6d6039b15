"""Shapes in a graph that ONNX Runtime optimized: its files leave out those of its own kernels."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import onnx
from onnx import TensorProto, TypeProto

from targets.onnxruntime_sizes import shape_of, value_of

Shape = tuple[int, ...]
_BLOCKED = "com.microsoft.nchwc"
_STANDS_FOR = {"FusedConv": "Conv", "FusedGemm": "Gemm"}
"""Operators of ONNX that have the shapes of ONNX Runtime's own."""
_SAME_SHAPE = frozenset([
    "BiasGelu", "FastGelu", "Gelu", "QLinearLeakyRelu", "QLinearSigmoid", "QLinearSoftmax",
    "QuickGelu", "SimplifiedLayerNormalization", "SkipLayerNormalization",
    "SkipSimplifiedLayerNormalization",
])  # fmt: skip
_BROADCAST = {"QLinearAdd": (0, 3), "QLinearMul": (0, 3)}
"""Operands of which the output has the common shape."""
_BLOCK = 16
"""Channels of a block with AVX-512, 8 without; weights of the first kernel say which."""


def tensor_types(
    optimized: onnx.ModelProto, batch: int | None = None
) -> dict[str, tuple[Shape, int]]:
    """Shape and ONNX element type of every tensor for which both are known.

    Args:
        optimized: as a session writes it.
        batch: what the sizes of the inputs with a name are. Without it, symbolic sizes stand for
            themselves: a large number for each name and one for each place without a name, so
            that two shapes are equal where ONNX Runtime can tell that they are.
    """
    graph = optimized.graph
    values = (*graph.input, *graph.value_info, *graph.output)
    numbers: dict[str, int] = {}
    if batch is not None:
        numbers = {d.dim_param: batch for v in graph.input for d in shape_of(v.type) if d.dim_param}
    types = {value.name: _numbered(value.type, numbers, batch is None) for value in values}
    data = {one.name: one for one in graph.initializer}
    types |= {n: onnx.helper.make_tensor_type_proto(t.data_type, t.dims) for n, t in data.items()}
    opsets = {one.domain: one.version for one in optimized.opset_import}
    block = _block(graph)
    for node in graph.node:
        if any(name and _known(types.get(name)) is None for name in node.output):
            for name, found in _inferred(node, types, data, opsets[""], block).items():
                if _known(types.get(name)) is None:
                    types[name] = found
        if batch is not None:
            data |= value_of(node, types, data, opsets[""])
    return {name: known for name, one in types.items() if (known := _known(one)) is not None}


_STAND_IN = 1_000_003
"""The first number of a symbolic size; the others follow it."""


def _numbered(value: TypeProto, numbers: dict[str, int], invent: bool) -> TypeProto:
    """The same type with numbers for its symbolic sizes, new ones too if they may be invented."""
    found = TypeProto()
    found.CopyFrom(value)
    for size in shape_of(found):
        if not size.HasField("dim_value"):
            name = size.dim_param or f"?{len(numbers)}"
            if invent:
                numbers.setdefault(name, _STAND_IN + len(numbers))
            if name in numbers:
                size.dim_value = numbers[name]
    return found


def _known(value: TypeProto | None) -> tuple[Shape, int] | None:
    if value is None or not value.tensor_type.HasField("shape"):
        return None
    sizes = value.tensor_type.shape.dim
    if not all(size.HasField("dim_value") for size in sizes):
        return None
    return tuple(size.dim_value for size in sizes), value.tensor_type.elem_type


def _block(graph: onnx.GraphProto) -> int:
    """Channels in a block of this machine: what every number of blocked channels divides by."""
    dims = {one.name: one.dims for one in graph.initializer}
    widths = [dims[n.input[1]][0] for n in graph.node if n.domain == _BLOCKED and _weighs(n, dims)]
    return math.gcd(_BLOCK, *widths) if widths else _BLOCK


def _weighs(node: onnx.NodeProto, dims: Mapping[str, Any]) -> bool:
    return node.op_type == "Conv" and node.input[1] in dims


def _inferred(
    node: onnx.NodeProto,
    types: Mapping[str, TypeProto],
    data: Mapping[str, TensorProto],
    opset: int,
    block: int,
) -> dict[str, TypeProto]:
    """Types of the outputs, as far as they follow from those of the inputs."""
    own = _own_shape(node, types, block)
    if own is not None:
        element = _element_type(node, types)
        return {node.output[0]: onnx.helper.make_tensor_type_proto(element, own)}
    kind = _STANDS_FOR.get(node.op_type, node.op_type)
    if not onnx.defs.has(kind):
        return {}
    schema = onnx.defs.get_schema(kind, opset)
    plain = onnx.NodeProto()
    plain.CopyFrom(node)
    plain.op_type, plain.domain = kind, ""
    if node.domain:
        allowed = [one for one in node.attribute if one.name in schema.attributes]
        del plain.attribute[:], plain.input[:]
        plain.attribute.extend(allowed)
        plain.input.extend(node.input[: schema.max_input])
    inputs = {name: types[name] for name in plain.input if name in types}
    constants = {name: data[name] for name in plain.input if name in data}
    if any(name and name not in inputs for name in plain.input):
        return {}
    try:
        found: dict[str, TypeProto] = onnx.shape_inference.infer_node_outputs(
            schema, plain, inputs, constants
        )
    except (onnx.shape_inference.InferenceError, RuntimeError):
        return {}
    return found


def _element_type(node: onnx.NodeProto, types: Mapping[str, TypeProto]) -> int:
    """Of a kernel's output: float where it dequantizes, else that of what it reads."""
    index = _QUANTIZED_LIKE.get(node.op_type, 0)
    if node.op_type in _TO_FLOAT or (node.op_type == "QGemm" and len(node.input) < 9):
        return TensorProto.FLOAT
    return int(types[node.input[index]].tensor_type.elem_type)


def _convolved(operands: Sequence[Shape], given: Mapping[str, Any]) -> Shape:
    x, weight = operands[0], operands[3]
    last = given.get("channels_last", 0)
    sizes = _slid(x[1:-1] if last else x[2:], given, weight[2:])
    return (x[0], *sizes, weight[0]) if last else (x[0], weight[0], *sizes)


def _pooled(operands: Sequence[Shape], given: Mapping[str, Any]) -> Shape:
    x = operands[0]
    if given.get("channels_last", 0):
        return (x[0], *_slid(x[1:-1], given, given["kernel_shape"]), x[-1])
    return (*x[:2], *_slid(x[2:], given, given["kernel_shape"]))


def _pooled_last(operands: Sequence[Shape], given: Mapping[str, Any]) -> Shape:
    return _pooled(operands, {**given, "channels_last": 1})


def _pooled_whole(operands: Sequence[Shape], given: Mapping[str, Any]) -> Shape:
    x = operands[0]
    ones = (1,) * (len(x) - 2)
    return (x[0], *ones, x[-1]) if given.get("channels_last", 0) else (*x[:2], *ones)


def _joined(operands: Sequence[Shape], given: Mapping[str, Any]) -> Shape:
    parts = operands[2::3]
    axis = given["axis"] % len(parts[0])
    return (*parts[0][:axis], sum(part[axis] for part in parts), *parts[0][axis + 1 :])


def _times(second: int) -> Callable[[Sequence[Shape], Mapping[str, Any]], Shape]:
    def shape(operands: Sequence[Shape], given: Mapping[str, Any]) -> Shape:
        a, b = operands[0], operands[second]
        rows = a[:-2] + ((a[-1],) if given.get("transA", 0) else (a[-2],) if len(a) > 1 else ())
        return (*rows, b[-2] if given.get("transB", 0) else b[-1])

    return shape


def _slid(sizes: Shape, given: Mapping[str, Any], window: Sequence[int]) -> tuple[int, ...]:
    """Sizes behind a window that slides over an image."""
    rank = len(window)
    strides, dilations = given.get("strides", [1] * rank), given.get("dilations", [1] * rank)
    pads = given.get("pads", [0] * (2 * rank))
    found = []
    for axis, size in enumerate(sizes):
        if given.get("auto_pad", b"NOTSET").startswith(b"SAME"):
            found.append(-(-size // strides[axis]))
            continue
        room = size + pads[axis] + pads[axis + rank] - dilations[axis] * (window[axis] - 1) - 1
        up = strides[axis] - 1 if given.get("ceil_mode", 0) else 0
        found.append((room + up) // strides[axis] + 1)
    return tuple(found)


_INTEGER_SHAPES: dict[str, Callable[[Sequence[Shape], Mapping[str, Any]], Shape]] = {
    "DynamicQuantizeMatMul": _times(1),
    "MatMulIntegerToFloat": _times(1),
    "NhwcMaxPool": _pooled_last,
    "QGemm": _times(3),
    "QLinearAveragePool": _pooled,
    "QLinearConcat": _joined,
    "QLinearConv": _convolved,
    "QLinearGlobalAveragePool": _pooled_whole,
    "QLinearMatMul": _times(3),
}
"""Kernels on integers: the shape of the output from those of all operands and the attributes."""
_TO_FLOAT = ("DynamicQuantizeMatMul", "MatMulIntegerToFloat")
_QUANTIZED_LIKE = {"QLinearConcat": 2}
"""Operand of the output's type, where it is not the first."""


def _own_shape(node: onnx.NodeProto, types: Mapping[str, TypeProto], block: int) -> Shape | None:
    """The first output of a kernel that ONNX has no counterpart of."""
    known = _known(types.get(node.input[0])) if node.input else None
    if known is None:
        return None
    shape = known[0]
    given = {one.name: onnx.helper.get_attribute_value(one) for one in node.attribute}
    if node.op_type in _SAME_SHAPE:
        return shape
    if node.op_type in _INTEGER_SHAPES:
        operands = [known[0] if (known := _known(types.get(n))) else () for n in node.input]
        return _INTEGER_SHAPES[node.op_type](operands, given)
    if node.op_type in _BROADCAST:
        others = [_known(types.get(node.input[index])) for index in _BROADCAST[node.op_type]]
        return max((one[0] for one in others if one is not None), key=math.prod)
    if node.op_type == "ReorderInput":
        last = given.get("channels_last", 0)
        channels, size = (shape[-1], shape[1:-1]) if last else (shape[1], shape[2:])
        return (shape[0], -(-channels // block) * block, *size)
    if node.op_type == "ReorderOutput":
        last = given.get("channels_last", 0)
        size, channels = shape[2:], given["channels"]
        return (shape[0], *size, channels) if last else (shape[0], channels, *size)
    if node.op_type == "Upsample" and node.domain == _BLOCKED:
        scales = given["scales"]
        return tuple(n * int(k) for n, k in zip(shape, scales, strict=True))
    if node.op_type == "FusedMatMul":
        other = _known(types.get(node.input[1]))
        if other is None or given.get("transBatchA", 0) or given.get("transBatchB", 0):
            return None
        rows = shape[-1 if given.get("transA", 0) else -2]
        columns = other[0][-2 if given.get("transB", 0) else -1]
        longer = max(shape[:-2], other[0][:-2], key=math.prod)
        return (*longer, rows, columns)
    return None
