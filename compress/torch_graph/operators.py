"""ONNX operators as torch functions: to simulate, train and lower networks that came as ONNX.

Each function takes the node's attributes and its inputs (None where one is left out) and returns
the output, or a tuple of outputs. The semantics are those of the ONNX operator specification up
to opset 21, restricted to inference.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from compress.errors import UnsupportedError

Attributes: TypeAlias = Mapping[str, Any]
Operator: TypeAlias = Callable[..., Tensor | tuple[Tensor, ...]]

OPERATORS: dict[str, Operator] = {}
"""Every operator that can be run in torch, by its ONNX type."""

_TYPES = {
    1: torch.float32,
    2: torch.uint8,
    3: torch.int8,
    6: torch.int32,
    7: torch.int64,
    9: torch.bool,
    10: torch.float16,
    11: torch.float64,
    16: torch.bfloat16,
}


def _operator(function: Operator) -> Operator:
    OPERATORS[function.__name__.strip("_")] = function
    return function


def _simple(**functions: Callable[..., Tensor]) -> None:
    """Register torch functions that need no attributes."""
    for name, function in functions.items():
        OPERATORS[name] = lambda attributes, *inputs, call=function: call(*inputs)


_simple(
    Abs=torch.abs, Add=torch.add, And=torch.logical_and, Ceil=torch.ceil, Cos=torch.cos,
    Equal=torch.eq, Erf=torch.erf, Exp=torch.exp, Floor=torch.floor, Greater=torch.gt,
    GreaterOrEqual=torch.ge, HardSwish=F.hardswish, Identity=lambda x: x, Less=torch.lt,
    LessOrEqual=torch.le, Log=torch.log, MatMul=torch.matmul, Mish=F.mish, Mul=torch.mul,
    Neg=torch.neg, Not=torch.logical_not, Or=torch.logical_or, Pow=torch.pow,
    Reciprocal=torch.reciprocal, Relu=F.relu, Round=torch.round, Sigmoid=torch.sigmoid,
    Sign=torch.sign, Sin=torch.sin, Softplus=F.softplus, Softsign=F.softsign, Sqrt=torch.sqrt,
    Sub=torch.sub, Tanh=torch.tanh, Where=torch.where,
)  # fmt: skip


def _ints(tensor: Tensor | None) -> list[int]:
    return [] if tensor is None else [int(value) for value in tensor.reshape(-1).tolist()]


def _pads(attributes: Attributes, x: Tensor, kernel: Sequence[int]) -> list[int]:
    """Padding as ONNX has it: all begins, then all ends."""
    rank = len(kernel)
    mode = attributes.get("auto_pad", "NOTSET")
    if mode in ("NOTSET", "VALID"):
        return list(attributes.get("pads", [0] * 2 * rank)) if mode == "NOTSET" else [0] * 2 * rank
    strides = attributes.get("strides", [1] * rank)
    dilations = attributes.get("dilations", [1] * rank)
    begins, ends = [], []
    for size, k, stride, dilation in zip(x.shape[2:], kernel, strides, dilations, strict=True):
        total = max((math.ceil(size / stride) - 1) * stride + (k - 1) * dilation + 1 - size, 0)
        small, large = total // 2, total - total // 2
        begins.append(small if mode == "SAME_UPPER" else large)
        ends.append(large if mode == "SAME_UPPER" else small)
    return begins + ends


def _padded(x: Tensor, pads: Sequence[int], value: float = 0.0) -> tuple[Tensor, list[int]]:
    """Pad what is not symmetric; the rest is left to the operator."""
    rank = len(pads) // 2
    begins, ends = list(pads[:rank]), list(pads[rank:])
    if begins == ends:
        return x, begins
    flat = [p for pair in zip(reversed(begins), reversed(ends), strict=True) for p in pair]
    return F.pad(x, flat, value=value), [0] * rank


@_operator
def _Conv(attributes: Attributes, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:  # noqa: N802
    rank = weight.ndim - 2
    x, padding = _padded(x, _pads(attributes, x, weight.shape[2:]))
    convolution: Callable[..., Tensor] = (F.conv1d, F.conv2d, F.conv3d)[rank - 1]
    strides, dilations = attributes.get("strides", [1] * rank), attributes.get("dilations")
    group = attributes.get("group", 1)
    return convolution(x, weight, bias, strides, padding, dilations or [1] * rank, group)


@_operator
def _ConvTranspose(  # noqa: N802
    attributes: Attributes, x: Tensor, weight: Tensor, bias: Tensor | None = None
) -> Tensor:
    rank = weight.ndim - 2
    pads = attributes.get("pads", [0] * 2 * rank)
    if pads[:rank] != pads[rank:] or attributes.get("auto_pad", "NOTSET") != "NOTSET":
        raise UnsupportedError("A ConvTranspose with uneven padding cannot be run in torch.")
    convolution = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[rank - 1]
    return convolution(
        x,
        weight,
        bias,
        attributes.get("strides", [1] * rank),
        pads[:rank],
        attributes.get("output_padding", [0] * rank),
        attributes.get("group", 1),
        attributes.get("dilations", [1] * rank),
    )


@_operator
def _Gemm(attributes: Attributes, a: Tensor, b: Tensor, c: Tensor | None = None) -> Tensor:  # noqa: N802
    a = a.T if attributes.get("transA") else a
    b = b.T if attributes.get("transB") else b
    alpha, beta = attributes.get("alpha", 1.0), attributes.get("beta", 1.0)
    if c is not None and alpha == beta == 1.0 and c.ndim == 1:
        return torch.addmm(c, a, b)
    product = a @ b if alpha == 1.0 else alpha * (a @ b)
    return product if c is None else product + beta * c


@_operator
def _BatchNormalization(  # noqa: N802
    attributes: Attributes, x: Tensor, scale: Tensor, shift: Tensor, mean: Tensor, var: Tensor
) -> Tensor:
    epsilon = attributes.get("epsilon", 1e-5)
    return F.batch_norm(x, mean, var, scale, shift, training=False, eps=epsilon)


@_operator
def _LayerNormalization(  # noqa: N802
    attributes: Attributes, x: Tensor, scale: Tensor, bias: Tensor | None = None
) -> Tensor:
    axis = attributes.get("axis", -1) % x.ndim
    return F.layer_norm(x, x.shape[axis:], scale, bias, attributes.get("epsilon", 1e-5))


@_operator
def _InstanceNormalization(  # noqa: N802
    attributes: Attributes, x: Tensor, scale: Tensor, bias: Tensor
) -> Tensor:
    return F.instance_norm(x, weight=scale, bias=bias, eps=attributes.get("epsilon", 1e-5))


@_operator
def _GroupNormalization(  # noqa: N802
    attributes: Attributes, x: Tensor, scale: Tensor, bias: Tensor
) -> Tensor:
    epsilon = attributes.get("epsilon", 1e-5)
    return F.group_norm(x, attributes["num_groups"], scale, bias, epsilon)


@_operator
def _LRN(attributes: Attributes, x: Tensor) -> Tensor:  # noqa: N802
    alpha, beta = attributes.get("alpha", 1e-4), attributes.get("beta", 0.75)
    return F.local_response_norm(x, attributes["size"], alpha, beta, attributes.get("bias", 1.0))


@_operator
def _Clip(  # noqa: N802
    attributes: Attributes, x: Tensor, low: Tensor | None = None, high: Tensor | None = None
) -> Tensor:
    return x if low is None and high is None else torch.clamp(x, low, high)


@_operator
def _LeakyRelu(attributes: Attributes, x: Tensor) -> Tensor:  # noqa: N802
    return F.leaky_relu(x, attributes.get("alpha", 0.01))


@_operator
def _PRelu(attributes: Attributes, x: Tensor, slope: Tensor) -> Tensor:  # noqa: N802
    return torch.where(x < 0, x * slope, x)


@_operator
def _Elu(attributes: Attributes, x: Tensor) -> Tensor:  # noqa: N802
    return F.elu(x, attributes.get("alpha", 1.0))


@_operator
def _HardSigmoid(attributes: Attributes, x: Tensor) -> Tensor:  # noqa: N802
    slope, offset = float(attributes.get("alpha", 0.2)), float(attributes.get("beta", 0.5))
    return torch.clamp(slope * x + offset, 0, 1)


@_operator
def _Gelu(attributes: Attributes, x: Tensor) -> Tensor:  # noqa: N802
    return F.gelu(x, approximate=attributes.get("approximate", "none"))


@_operator
def _Softmax(attributes: Attributes, x: Tensor) -> Tensor:  # noqa: N802
    return torch.softmax(x, attributes.get("axis", -1))


@_operator
def _LogSoftmax(attributes: Attributes, x: Tensor) -> Tensor:  # noqa: N802
    return torch.log_softmax(x, attributes.get("axis", -1))


@_operator
def _Div(attributes: Attributes, a: Tensor, b: Tensor) -> Tensor:  # noqa: N802
    return a / b if a.is_floating_point() else torch.div(a, b, rounding_mode="trunc")


@_operator
def _Mod(attributes: Attributes, a: Tensor, b: Tensor) -> Tensor:  # noqa: N802
    return torch.fmod(a, b) if attributes.get("fmod") else torch.remainder(a, b)


def _folded(name: str, function: Callable[[Tensor, Tensor], Tensor]) -> None:
    def call(attributes: Attributes, first: Tensor, *others: Tensor) -> Tensor:
        for other in others:
            first = function(first, other)
        return first

    OPERATORS[name] = call


_folded("Min", torch.minimum)
_folded("Max", torch.maximum)
_folded("Sum", torch.add)


def _reduction(name: str, function: Callable[..., Tensor]) -> None:
    def call(attributes: Attributes, x: Tensor, axes: Tensor | None = None) -> Tensor:
        chosen = _ints(axes) if axes is not None else list(attributes.get("axes", ()))
        if not chosen and attributes.get("noop_with_empty_axes", 0):
            return x
        keep = bool(attributes.get("keepdims", 1))
        return function(x, dim=chosen or list(range(x.ndim)), keepdim=keep)

    OPERATORS[name] = call


_reduction("ReduceMean", torch.mean)
_reduction("ReduceSum", torch.sum)
_reduction("ReduceMax", torch.amax)
_reduction("ReduceMin", torch.amin)
_reduction("ReduceL2", torch.linalg.vector_norm)


@_operator
def _GlobalAveragePool(attributes: Attributes, x: Tensor) -> Tensor:  # noqa: N802
    return x.mean(list(range(2, x.ndim)), keepdim=True)


@_operator
def _GlobalMaxPool(attributes: Attributes, x: Tensor) -> Tensor:  # noqa: N802
    return x.amax(list(range(2, x.ndim)), keepdim=True)


@_operator
def _MaxPool(attributes: Attributes, x: Tensor) -> Tensor:  # noqa: N802
    kernel = attributes["kernel_shape"]
    x, padding = _padded(x, _pads(attributes, x, kernel), -math.inf)
    pool = (F.max_pool1d, F.max_pool2d, F.max_pool3d)[len(kernel) - 1]
    strides = attributes.get("strides", [1] * len(kernel))
    dilations = attributes.get("dilations", [1] * len(kernel))
    return pool(x, kernel, strides, padding, dilations, bool(attributes.get("ceil_mode", 0)))


@_operator
def _AveragePool(attributes: Attributes, x: Tensor) -> Tensor:  # noqa: N802
    kernel = attributes["kernel_shape"]
    pads, whole = _pads(attributes, x, kernel), bool(attributes.get("count_include_pad", 0))
    if any(d != 1 for d in attributes.get("dilations", ())):
        raise UnsupportedError("An AveragePool with dilation cannot be run in torch.")
    if not whole and pads[: len(kernel)] != pads[len(kernel) :]:
        raise UnsupportedError("An AveragePool with uneven padding cannot be run in torch.")
    x, padding = _padded(x, pads)
    pool = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)[len(kernel) - 1]
    strides = attributes.get("strides", [1] * len(kernel))
    return pool(x, kernel, strides, padding, bool(attributes.get("ceil_mode", 0)), whole)


@_operator
def _Concat(attributes: Attributes, *inputs: Tensor) -> Tensor:  # noqa: N802
    return torch.cat(inputs, attributes["axis"])


@_operator
def _Split(  # noqa: N802
    attributes: Attributes, x: Tensor, sizes: Tensor | None = None
) -> tuple[Tensor, ...]:
    axis = attributes.get("axis", 0)
    if sizes is not None:
        return tuple(torch.split(x, _ints(sizes), axis))
    count = attributes.get("num_outputs", attributes["outputs"])
    return tuple(torch.split(x, math.ceil(x.shape[axis] / count), axis))


@_operator
def _Slice(  # noqa: N802
    attributes: Attributes,
    x: Tensor,
    starts: Tensor,
    ends: Tensor,
    axes: Tensor | None = None,
    steps: Tensor | None = None,
) -> Tensor:
    first, last = _ints(starts), _ints(ends)
    where = _ints(axes) or list(range(len(first)))
    strides = _ints(steps) or [1] * len(first)
    for begin, end, axis, stride in zip(first, last, where, strides, strict=True):
        size = x.shape[axis]
        chosen = range(size)[slice(begin, None if stride < 0 and end < -size else end, stride)]
        if stride > 0:
            x = x[(slice(None),) * (axis % x.ndim) + (slice(chosen.start, chosen.stop, stride),)]
        else:
            x = x.index_select(axis, torch.tensor(list(chosen), dtype=torch.int64))
    return x


@_operator
def _Gather(attributes: Attributes, x: Tensor, indices: Tensor) -> Tensor:  # noqa: N802
    axis = attributes.get("axis", 0) % x.ndim
    flat = indices.reshape(-1).long()
    flat = torch.where(flat < 0, flat + x.shape[axis], flat)
    shape = (*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :])
    return x.index_select(axis, flat).reshape(shape)


@_operator
def _Reshape(attributes: Attributes, x: Tensor, shape: Tensor) -> Tensor:  # noqa: N802
    wanted = _ints(shape)
    if not attributes.get("allowzero", 0):
        wanted = [x.shape[i] if size == 0 else size for i, size in enumerate(wanted)]
    return x.reshape(wanted)


@_operator
def _Flatten(attributes: Attributes, x: Tensor) -> Tensor:  # noqa: N802
    axis = attributes.get("axis", 1)
    axis = axis + x.ndim if axis < 0 else axis
    return x.reshape(math.prod(x.shape[:axis]), -1)


@_operator
def _Transpose(attributes: Attributes, x: Tensor) -> Tensor:  # noqa: N802
    return x.permute(attributes.get("perm", list(reversed(range(x.ndim)))))


@_operator
def _Squeeze(attributes: Attributes, x: Tensor, axes: Tensor | None = None) -> Tensor:  # noqa: N802
    return x.squeeze(tuple(_ints(axes))) if axes is not None else x.squeeze()


@_operator
def _Unsqueeze(attributes: Attributes, x: Tensor, axes: Tensor) -> Tensor:  # noqa: N802
    wanted = _ints(axes)
    for axis in sorted(a % (x.ndim + len(wanted)) for a in wanted):
        x = x.unsqueeze(axis)
    return x


@_operator
def _Expand(attributes: Attributes, x: Tensor, shape: Tensor) -> Tensor:  # noqa: N802
    return x.expand(torch.broadcast_shapes(x.shape, tuple(_ints(shape))))  # type: ignore[no-untyped-call]


@_operator
def _Tile(attributes: Attributes, x: Tensor, repeats: Tensor) -> Tensor:  # noqa: N802
    return x.repeat(_ints(repeats))


@_operator
def _Shape(attributes: Attributes, x: Tensor) -> Tensor:  # noqa: N802
    end = attributes.get("end")
    return torch.tensor(x.shape[attributes.get("start", 0) : end], dtype=torch.int64)


@_operator
def _Cast(attributes: Attributes, x: Tensor) -> Tensor:  # noqa: N802
    wanted = int(attributes["to"])
    if wanted not in _TYPES:
        raise UnsupportedError(f"A Cast to ONNX type {wanted} cannot be run in torch.")
    return x.to(_TYPES[wanted])


@_operator
def _ConstantOfShape(attributes: Attributes, shape: Tensor) -> Tensor:  # noqa: N802
    value = attributes.get("value", np.zeros(1, np.float32))
    filled = torch.from_numpy(np.array(value))
    return filled.reshape(()).expand(_ints(shape)).clone()


@_operator
def _Range(attributes: Attributes, start: Tensor, limit: Tensor, delta: Tensor) -> Tensor:  # noqa: N802
    return torch.arange(start.item(), limit.item(), delta.item(), dtype=start.dtype)


@_operator
def _Pad(  # noqa: N802
    attributes: Attributes,
    x: Tensor,
    pads: Tensor,
    value: Tensor | None = None,
    axes: Tensor | None = None,
) -> Tensor:
    sizes = _ints(pads)
    where = [a % x.ndim for a in _ints(axes)] or list(range(x.ndim))
    before, after = [0] * x.ndim, [0] * x.ndim
    for axis, begin, end in zip(where, sizes[: len(where)], sizes[len(where) :], strict=True):
        before[axis], after[axis] = begin, end
    flat = [p for pair in zip(reversed(before), reversed(after), strict=True) for p in pair]
    mode = {"constant": "constant", "reflect": "reflect", "edge": "replicate"}.get(
        attributes.get("mode", "constant")
    )
    if mode is None:
        raise UnsupportedError(f"A Pad with mode {attributes['mode']} cannot be run in torch.")
    if mode != "constant":
        inner = 2 * max(1, x.ndim - 2)  # torch pads these axes only
        if any(flat[inner:]):
            raise UnsupportedError(
                f"A Pad with mode {mode} of batch or channels cannot be run in torch."
            )
        return F.pad(x, flat[:inner], mode)
    return F.pad(x, flat, value=float(value.item()) if value is not None else 0.0)


@_operator
def _Resize(  # noqa: N802
    attributes: Attributes,
    x: Tensor,
    roi: Tensor | None = None,
    scales: Tensor | None = None,
    sizes: Tensor | None = None,
) -> Tensor:
    mode = attributes.get("mode", "nearest")
    how = attributes.get("coordinate_transformation_mode", "half_pixel")
    if scales is not None and scales.numel():
        shape = [math.floor(n * float(s)) for n, s in zip(x.shape, scales.tolist(), strict=True)]
    else:
        shape = _ints(sizes)
    exact = mode == "nearest" and how == "asymmetric"
    exact &= attributes.get("nearest_mode", "round_prefer_floor") == "floor"
    smooth = mode in ("linear", "cubic") and how in ("half_pixel", "align_corners")
    pytorch = mode == "linear" and how == "pytorch_half_pixel"
    if shape[:2] != list(x.shape[:2]) or x.ndim != 4 or not (exact or smooth or pytorch):
        raise UnsupportedError(f"A Resize with mode {mode} and {how} cannot be run in torch.")
    if exact:
        return F.interpolate(x, shape[2:], mode="nearest")
    name = {"linear": "bilinear", "cubic": "bicubic"}[mode]
    return F.interpolate(x, shape[2:], mode=name, align_corners=how == "align_corners")


@_operator
def _DepthToSpace(attributes: Attributes, x: Tensor) -> Tensor:  # noqa: N802
    block = attributes["blocksize"]
    if attributes.get("mode", "DCR") == "CRD":
        return F.pixel_shuffle(x, block)
    n, c, h, w = x.shape
    x = x.reshape(n, block, block, c // block**2, h, w).permute(0, 3, 4, 1, 5, 2)
    return x.reshape(n, c // block**2, h * block, w * block)


@_operator
def _ScatterND(  # noqa: N802
    attributes: Attributes, x: Tensor, indices: Tensor, updates: Tensor
) -> Tensor:
    if attributes.get("reduction", "none") != "none":
        raise UnsupportedError("A ScatterND with a reduction cannot be run in torch.")
    return x.index_put(tuple(indices.unbind(-1)), updates)


@_operator
def _Einsum(attributes: Attributes, *inputs: Tensor) -> Tensor:  # noqa: N802
    return torch.einsum(attributes["equation"], *inputs)


@_operator
def _Dropout(attributes: Attributes, x: Tensor, *_: Tensor) -> Tensor:  # noqa: N802
    return x
