"""Operators of a graph as affine maps of their one activation."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from compress.reparam.affine import AffineMap, Axis, NotMergeableError
from compress.rewrites import constant_array

WEIGHTED = ("Conv", "Gemm", "MatMul")
"""Have a weight that training found; a merge needs one of them, or a pool."""
FRAME = "Frame"
"""Stands for operators that put an image into a frame; only while branches are merged."""
JOINS = ("Add", "Sub", "Sum", "Concat")
Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Layout:
    """Where the channels are.

    Attributes:
        dims: spatial axes behind the channels; None for tokens, whose channels are last.
        groups: sizes of the axes before the tokens that have weights of their own.
    """

    dims: int | None
    groups: tuple[int, ...] = ()

    def channels(self, shape: tuple[int, ...]) -> int:
        """Number of channels of a tensor.

        Raises:
            NotMergeableError: it is not known, or the tensor has other axes.
        """
        ranks = range(2, 99) if self.dims is None else (self.dims + 2,)
        parts = shape[-2 - len(self.groups) : -2] if self.groups else ()
        sizes = (*parts, shape[1 if self.dims is not None else -1]) if len(shape) in ranks else (0,)
        if min(sizes) <= 0 or parts != self.groups:
            raise NotMergeableError("the shape of a tensor is not known, or not that of its layers")
        return math.prod(sizes)

    def vector(self, array: np.ndarray, channels: int, rank: int) -> np.ndarray:
        """A constant operand as one number for each channel.

        Raises:
            NotMergeableError: it differs within a channel.
        """
        if array.size == 1:
            return np.full(channels, float(array.reshape(())), np.float64)
        if array.ndim > rank:
            raise NotMergeableError("a constant adds axes")
        shape = (1,) * (rank - array.ndim) + array.shape
        own = {1} if self.dims is not None else {rank - 1}
        own |= {rank - 3 - i for i in range(len(self.groups))}
        if any(size != 1 for axis, size in enumerate(shape) if axis not in own):
            raise NotMergeableError("a constant differs from place to place")
        full = (*self.groups, channels // math.prod(self.groups))
        kept = array.reshape([shape[axis] for axis in sorted(own)])
        return np.broadcast_to(kept, full).reshape(-1).astype(np.float64)


def operands(node: ir.Node) -> list[ir.Value]:
    """The activations that it reads."""
    return [v for v in node.inputs if v is not None and v.const_value is None]


def is_join(node: ir.Node) -> bool:
    """Whether it brings branches together."""
    return node.op_type in JOINS and len(operands(node)) > 1


def is_affine(node: ir.Node) -> bool:
    """Whether the operator may be an affine map of each activation; constants are not looked at."""
    if node.domain not in ("", "ai.onnx") or len(operands(node)) == 0:
        return False
    constant = [v is None or v.const_value is not None for v in node.inputs]
    unused = not any(out.uses() or out.is_graph_output() for out in node.outputs[1:])
    match node.op_type:
        case "Conv" | "Gemm" | "Pad" | "Frame":
            return all(constant[1:])
        case "BatchNormalization":
            return all(constant[1:]) and unused and not node.attributes.get_int("training_mode", 0)
        case "MatMul":
            return constant[1]
        case "Mul":
            return sum(constant) == 1
        case "Div":
            return constant[1]
        case "AveragePool" | "Identity" | "Neg" | "Add" | "Sub" | "Sum" | "Concat":
            return True
        case _:
            return False


def layout_of(nodes: list[ir.Node]) -> Layout:
    """The layout that all of them have in common.

    Raises:
        NotMergeableError: there is none.
    """
    dims, tokens, groups = set(), False, set()
    for node in nodes:
        if node.op_type in ("Conv", "AveragePool"):
            kernel = node.attributes.get_ints("kernel_shape", ())
            weight = constant_array(node.inputs[1]) if node.op_type == "Conv" else None
            dims.add(weight.ndim - 2 if weight is not None else len(kernel))
        elif node.op_type in ("MatMul", "Gemm"):
            tokens = True
            weight = constant_array(node.inputs[1])
            groups.add(_leading(weight) if weight is not None else ())
    if len(dims) + tokens != 1 or len(groups) > 1:
        raise NotMergeableError("its layers have their channels on different axes")
    return Layout(None, groups.pop()) if tokens else Layout(dims.pop())


def read(node: ir.Node, layout: Layout, shapes: Shapes) -> AffineMap:
    """The map from the activation of an operator to its output; of a join, that of constants.

    Raises:
        NotMergeableError: it is none, or its constants are not float32 numbers.
    """
    source = operands(node)[0]
    shape = shapes.get(source.name or "", ())
    if any(v.dtype not in (ir.DataType.FLOAT, None) for v in (source, node.outputs[0])):
        raise NotMergeableError(f"{node.name} does not compute in float32")
    if node.op_type in WEIGHTED:
        return _layer(node, layout, shape)
    channels = layout.channels(shape)
    ones, zeros = np.ones(channels), np.zeros(channels)
    extents = _extents(shape, layout)
    plain = [Axis(extent=n) for n in extents]
    match node.op_type:
        case "Concat" | "Sum" if len(node.inputs) > 1:
            raise NotMergeableError(f"{node.name} joins a branch and a constant")
        case "Identity" | "Concat" | "Sum":
            return AffineMap.scale(ones, zeros, plain)
        case "Neg":
            return AffineMap.scale(-ones, zeros, plain)
        case "BatchNormalization":
            if layout.dims is None and len(shape) != 2:
                raise NotMergeableError(
                    "a BatchNorm and a linear layer have channels on other axes"
                )
            gamma, beta, mean, var = (_floats(v, node) for v in node.inputs[1:5])
            factor = gamma / np.sqrt(var + node.attributes.get_float("epsilon", 1e-5))
            return AffineMap.scale(factor, beta - factor * mean, plain)
        case "AveragePool":
            return _pool(node, channels, extents)
        case "Frame":
            pads = [int(pad) for pad in node.attributes.get_ints("pads", ())]
            return _framed(channels, pads, extents, _floats(node.inputs[1], node))
        case "Pad":
            return _padding(node, channels, layout, extents)
        case _:
            at = next(i for i, v in enumerate(node.inputs) if v is source)
            number = layout.vector(_floats(node.inputs[1 - at], node), channels, len(shape))
            sign = -1.0 if node.op_type == "Sub" and at == 1 else 1.0
            shift = {"Add": number, "Sub": number if at == 1 else -number}.get(node.op_type)
            if shift is not None:
                return AffineMap.scale(sign * ones, shift, plain)
            return AffineMap.scale(number if node.op_type == "Mul" else 1 / number, zeros, plain)


def same(shape: tuple[int, ...], layout: Layout) -> AffineMap:
    """The identity on a tensor.

    Raises:
        NotMergeableError: its shape is not known.
    """
    channels = layout.channels(shape)
    axes = [Axis(extent=n) for n in _extents(shape, layout)]
    return AffineMap.scale(np.ones(channels), np.zeros(channels), axes)


def _extents(shape: tuple[int, ...], layout: Layout) -> list[int]:
    """Sizes of the spatial axes; 0 where they are open."""
    return [max(size, 0) for size in shape[2:]] if layout.dims is not None else []


def _layer(node: ir.Node, layout: Layout, shape: tuple[int, ...]) -> AffineMap:
    weight = _floats(node.inputs[1], node)
    given = node.inputs[2] if len(node.inputs) > 2 else None
    bias = _floats(given, node) if given is not None else None
    if node.op_type == "Conv":
        axes = _window(node, weight.shape[2:], shape[2:])
        return AffineMap.of(weight, bias, node.attributes.get_int("group", 1), axes)
    if node.op_type == "MatMul":
        layout.channels(shape)  # the weights of a group must not be read by several
        stacked = weight.reshape(math.prod(layout.groups), *weight.shape[-2:]).swapaxes(1, 2)
        return AffineMap.of(stacked.reshape(-1, weight.shape[-2]), None, len(stacked))
    if node.attributes.get_int("transA", 0):
        raise NotMergeableError(f"{node.name} transposes its input")
    if not node.attributes.get_int("transB", 0):
        weight = weight.T
    weight = weight * node.attributes.get_float("alpha", 1.0)
    if bias is not None:
        bias = layout.vector(bias, len(weight), 2) * node.attributes.get_float("beta", 1.0)
    return AffineMap.of(weight, bias)


def _window(node: ir.Node, sizes: tuple[int, ...], extents: tuple[int, ...]) -> list[Axis]:
    """Axes of an operator with a window; `auto_pad` is resolved for a known input."""
    dims = len(sizes)
    attributes = node.attributes
    strides = attributes.get_ints("strides", [1] * dims)
    dilations = attributes.get_ints("dilations", [1] * dims)
    mode = attributes.get_string("auto_pad", "NOTSET")
    known = [max(n, 0) for n in extents] if len(extents) == dims else [0] * dims
    if mode.startswith("SAME"):
        if not all(known):
            raise NotMergeableError(
                f"{node.name} pads by {mode}, and the size of its input is open"
            )
        pads = [
            max((math.ceil(n / s) - 1) * s + d * (k - 1) + 1 - n, 0)
            for n, s, d, k in zip(known, strides, dilations, sizes, strict=True)
        ]
        less = [pad // 2 for pad in pads]
        more = [pad - half for pad, half in zip(pads, less, strict=True)]
        begins, ends = (less, more) if mode == "SAME_UPPER" else (more, less)
    else:
        both = attributes.get_ints("pads", [0] * 2 * dims) if mode == "NOTSET" else [0] * 2 * dims
        begins, ends = list(both[:dims]), list(both[dims:])
    if min((*begins, *ends), default=0) < 0:
        raise NotMergeableError(f"{node.name} crops its input")
    rows = zip(sizes, strides, dilations, begins, ends, known, strict=True)
    return [Axis.of(*(int(number) for number in row)) for row in rows]


def _pool(node: ir.Node, channels: int, extents: list[int]) -> AffineMap:
    sizes = tuple(int(k) for k in node.attributes.get_ints("kernel_shape", ()))
    axes = _window(node, sizes, tuple(extents))
    if node.attributes.get_int("ceil_mode", 0):
        raise NotMergeableError(f"{node.name} rounds the size of its output up")
    if not node.attributes.get_int("count_include_pad", 0) and any(
        pad > 0 for axis in axes for pad in axis.pads
    ):
        raise NotMergeableError(
            f"{node.name} leaves padding out of its means: no convolution at borders"
        )
    weight = np.full((channels, 1, *sizes), 1 / math.prod(sizes))
    return AffineMap.of(weight, None, channels, axes)


def _padding(node: ir.Node, channels: int, layout: Layout, extents: list[int]) -> AffineMap:
    """The identity that looks beyond the borders of its input."""
    pads = constant_array(node.inputs[1]) if len(node.inputs) > 1 else None
    value = node.inputs[2] if len(node.inputs) > 2 else None
    chosen = node.inputs[3] if len(node.inputs) > 3 else None
    constant = node.attributes.get_string("mode", "constant") == "constant"
    if pads is None or chosen is not None or not constant or layout.dims is None:
        raise NotMergeableError(f"{node.name} pads with something else than a constant")
    begins, ends = np.split(pads.astype(int), 2)
    if len(begins) != layout.dims + 2 or begins[:2].any() or ends[:2].any() or pads.min() < 0:
        raise NotMergeableError(f"{node.name} pads other axes than those of the image, or crops")
    filling = float(np.asarray(constant_array(value)).reshape(())) if value is not None else 0.0
    pads_of_image = [int(pad) for pad in (*begins[2:], *ends[2:])]
    return _framed(channels, pads_of_image, extents, np.full(channels, filling))


def _framed(channels: int, pads: list[int], extents: list[int], filling: np.ndarray) -> AffineMap:
    """The identity on an input that goes on with one constant for each channel."""
    rows = zip(pads[: len(extents)], pads[len(extents) :], extents, strict=True)
    axes = [Axis.of(1, 1, 1, begin, end, n) for begin, end, n in rows]
    identity = AffineMap.scale(np.ones(channels), np.zeros(channels), axes)
    return replace(identity, fill=filling.astype(np.float64))


def _leading(weight: np.ndarray) -> tuple[int, ...]:
    """Sizes of the axes before the matrices, without ones in front."""
    sizes = list(weight.shape[:-2])
    while sizes and sizes[0] == 1:
        sizes.pop(0)
    return tuple(sizes)


def _floats(value: ir.Value | None, node: ir.Node) -> np.ndarray:
    array = constant_array(value)
    if array is None or array.dtype != np.float32:
        raise NotMergeableError(f"{node.name} has weights that are not float32 constants")
    return array.astype(np.float64)
