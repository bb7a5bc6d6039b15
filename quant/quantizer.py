"""Quantizer arithmetic on arrays: the values that ONNX QuantizeLinear gives.

Affine and symmetric quantization as in Krishnamoorthi, arXiv 1806.08342, section 2; the float
operations and their order (divide, round half to even, add the zero point, saturate) follow the
ONNX operator specification, so that a weight quantized here equals one quantized by the runtime.
A float format is rounded the same way, to its own grid and with a scale in front (Dotzel et al.,
FLIQS, arXiv 2308.03290). `quant.fake` is the same arithmetic in torch.

Work goes block by block through one small float buffer: no second copy of a tensor is made.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import ArrayLike

from compress.errors import UnsupportedError, UsageError
from quant.spec import FloatFormat, QParams, QuantSpec

BLOCK_ELEMENTS = 1 << 16
"""Elements handled at once: 256 KiB of float32 stay in a core's L2 cache."""

SMALLEST_SCALE = float(np.finfo(np.float32).tiny)
"""Below it float32 is denormal, which runtimes may flush to zero."""

LARGEST_VALUE = 3.4e38
"""Just below float32's maximum, so that no dequantized value overflows."""

EXPONENT_MASK = 0x7F800000
"""Of a float32's bits; what it leaves of a number x is 2**floor(log2 |x|), or 0 if denormal."""

_SHARED = {"per_tensor": (3,), "per_channel": (0, 3), "per_group": (2,)}
"""Axes of a folded tensor along which a scale is shared, apart from those of size 1."""


def scale_and_zero_point(
    low: ArrayLike, high: ArrayLike, spec: QuantSpec
) -> tuple[np.ndarray, np.ndarray]:
    """The finest grid that holds [low, high] and 0.

    Symmetric: the smallest scale with low >= (qmin - zero_point) * scale and
    high <= (qmax - zero_point) * scale. Asymmetric: scale = (high - low) / (qmax - qmin),
    zero_point = round(qmin - low / scale). A range of only 0 gets the scale 1, and so does any
    range that float16 or bfloat16 hold: quantizing to them is a cast.

    Args:
        low: smallest values, any shape.
        high: largest values, same shape.
        spec: the format.

    Returns:
        scale (float32) and zero_point (float64 with whole values), in the shape of the range.
    """
    low = np.minimum(np.asarray(low, np.float64), 0.0)
    high = np.maximum(np.asarray(high, np.float64), 0.0)
    if spec.symmetric:
        middle = 0 if spec.format.signed else (spec.qmax + 1) // 2
        zero_point = np.where(low < 0, middle, 0).astype(np.float64)
        below = np.maximum(zero_point - spec.qmin, 1)
        scale = np.maximum(-low / below, high / (spec.qmax - zero_point))
    else:
        scale = (high - low) / (spec.qmax - spec.qmin)
    smallest = SMALLEST_SCALE if spec.integer or spec.bits < 16 else 1.0
    scale = np.where(high - low > 0, np.maximum(scale, smallest), 1.0)
    if spec.power_of_two:
        scale = _power_of_two(scale, up=True)
    scale = np.minimum(scale, LARGEST_VALUE).astype(np.float32)
    if not spec.symmetric:
        zero_point = np.clip(np.rint(spec.qmin - low / scale), spec.qmin, spec.qmax)
    largest = LARGEST_VALUE / np.maximum(zero_point - spec.qmin, spec.qmax - zero_point)
    if spec.power_of_two:
        largest = _power_of_two(largest, up=False)
    return np.minimum(scale, largest.astype(np.float32)), zero_point


def qparams_from_range(
    low: ArrayLike, high: ArrayLike, spec: QuantSpec, axis: int | None = None
) -> QParams:
    """Scale and zero point for values in [low, high], widened to hold 0.

    Args:
        low: shape () per tensor, (C,) per channel; per group the shape of the scales.
        high: same shape.
        spec: the format.
        axis: the axis that C belongs to or that is cut into groups; None per tensor.

    Raises:
        UsageError: the range is empty or not finite, or its shape does not fit the spec.
    """
    low, high = np.asarray(low, np.float64), np.asarray(high, np.float64)
    if not (np.isfinite(low).all() and np.isfinite(high).all() and (low <= high).all()):
        raise UsageError(
            f"[{low.min()}, {high.max()}] is not a range: both ends must be finite and the lower "
            "not above the upper. Look for NaN or infinity in the data that it was made from."
        )
    scale, zero_point = scale_and_zero_point(low, high, spec)
    return QParams(spec, scale, zero_point, axis)


def weight_qparams(w: np.ndarray, spec: QuantSpec, axis: int | None = None) -> QParams:
    """Min-max scale and zero point of a weight tensor.

    An all-zero channel (or group) takes the largest scale of the others: its integers are all
    zero at any scale, but a bias is stored at the scale of its weights times that of the input,
    and a scale of 1 would round the bias of a dead channel away.

    Args:
        w: any shape, float.
        spec: the format.
        axis: the output channel's axis for a per-channel spec, the one that is cut into groups
            for a per-group spec, else None.

    Raises:
        UnsupportedError: a weight is NaN or infinite.
        UsageError: the tensor has no such axis, or it cannot be cut into groups.
    """
    folded = w.reshape(_folded_shape(w.shape, spec, axis))
    low, high = _extreme(folded, np.min, spec), _extreme(folded, np.max, spec)
    if not (np.isfinite(low).all() and np.isfinite(high).all()):
        raise UnsupportedError(
            f"A weight of shape {w.shape} holds NaN or infinity, which has no integer. Load a "
            "checkpoint whose training did not diverge."
        )
    alive = high > low
    scale, zero_point = scale_and_zero_point(low, high, spec)
    if alive.any():
        scale[~alive] = scale[alive].max()
    axis = None if axis is None else axis % w.ndim
    shape = scale_shape(w.shape, spec, axis)
    return QParams(spec, scale.reshape(shape), zero_point.reshape(shape), axis)


def quantize(x: np.ndarray, qparams: QParams) -> np.ndarray:
    """Values of the format for `x`: saturate(round_half_even(x / scale) + zero_point).

    A reduced spec saturates to its own, smaller range; QuantizeLinear knows only the whole
    storage type, so the two differ there for values outside of the calibrated range.

    Args:
        x: float, any shape.
        qparams: scale and zero point.

    Returns:
        The format's storage type, same shape.
    """
    x = np.asarray(x)
    spec = qparams.spec
    source, scale, zero_point = _fold(x, qparams)
    result = np.empty(source.shape, spec.format.storage)
    buffer = np.empty(min(x.size, BLOCK_ELEMENTS), np.float32)
    shifted = bool(zero_point.any())
    with np.errstate(over="ignore", under="ignore"):
        for part in _blocks(source.shape):
            block = source[part]
            work = buffer[: block.size].reshape(block.shape)
            np.divide(block, _part(scale, part), out=work, dtype=np.float32, casting="same_kind")
            if isinstance(spec.format, FloatFormat):
                round_to_format(work, spec.format)
            else:
                np.rint(work, out=work)
                if shifted:
                    work += _part(zero_point, part)
                np.clip(work, spec.qmin, spec.qmax, out=work)
            np.copyto(result[part], work, casting="unsafe")
    return result.reshape(x.shape)


def round_to_format(x: np.ndarray, form: FloatFormat) -> None:
    """Round float32 values in place to the nearest of a float format; saturate beyond its largest.

    Halves go to even. The spacing around x is 2**(floor(log2 |x|) - mantissa_bits), and below
    2**(1 - bias) that of the smallest normal values.
    """
    np.clip(x, -form.max, form.max, out=x)
    spacing = (x.view(np.uint32) & np.uint32(EXPONENT_MASK)).view(np.float32)
    np.maximum(spacing, np.float32(2.0 ** (1 - form.bias)), out=spacing)
    spacing *= np.float32(2.0**-form.mantissa_bits)
    x /= spacing
    np.rint(x, out=x)
    x *= spacing


def dequantize(q: np.ndarray, qparams: QParams) -> np.ndarray:
    """Floats of the format's values: (q - zero_point) * scale, float32, as DequantizeLinear."""
    q = np.asarray(q)
    folded, scale, zero_point = _fold(q, qparams)
    result = folded.astype(np.float32)
    result -= zero_point
    result *= scale
    return result.reshape(q.shape)


def fake_quantize(x: np.ndarray, qparams: QParams) -> np.ndarray:
    """The float32 values that are left of `x` after quantization, same shape."""
    return dequantize(quantize(x, qparams), qparams)


def scale_shape(shape: tuple[int, ...], spec: QuantSpec, axis: int | None) -> tuple[int, ...]:
    """Shape of the scales of a tensor.

    Raises:
        UsageError: the tensor has no such axis, or it cannot be cut into groups.
    """
    _, channels, _, _ = _folded_shape(shape, spec, axis)
    if axis is None:
        return ()
    if spec.granularity == "per_channel":
        return (channels,)
    axis %= len(shape)
    return (*shape[:axis], channels, *shape[axis + 1 :])


def check_scales(
    shape: tuple[int, ...], scales: tuple[int, ...], spec: QuantSpec, axis: int | None
) -> None:
    """Make sure that scales of shape `scales` belong to a tensor of shape `shape`.

    Raises:
        UsageError: they do not.
    """
    expected = scale_shape(shape, spec, axis)
    if expected != scales:
        raise UsageError(
            f"A tensor of shape {shape} needs scales of shape {expected} ({spec.granularity}, "
            f"axis {axis}), and there are {math.prod(scales)} scales of shape {scales}. Make the "
            "scales from this tensor's axis."
        )


def _power_of_two(x: np.ndarray, *, up: bool) -> np.ndarray:
    """The nearest power of two that is not below `x`, or not above it; x > 0."""
    fraction, exponent = np.frexp(x)  # x = fraction 2**exponent with 0.5 <= fraction < 1
    return np.asarray(np.ldexp(1.0, exponent - (fraction == 0.5 if up else 1)))


def _fold(x: np.ndarray, qparams: QParams) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`x`, scale and zero point (float32) with four axes each, so that they broadcast."""
    spec = qparams.spec
    check_scales(x.shape, qparams.scale.shape, spec, qparams.axis)
    folded = x.reshape(_folded_shape(x.shape, spec, qparams.axis))
    shape = tuple(
        1 if index in _SHARED[spec.granularity] else size for index, size in enumerate(folded.shape)
    )
    zero_point = qparams.zero_point.astype(np.float32)
    return folded, qparams.scale.reshape(shape), zero_point.reshape(shape)


def _extreme(folded: np.ndarray, reduce: Callable[..., np.ndarray], spec: QuantSpec) -> np.ndarray:
    """Smallest or largest of the values that share a scale, or 0; shape of the folded scales."""
    # One axis at a time: numpy is ten times slower over axes 0 and 3 at once where both are short.
    for axis in _SHARED[spec.granularity]:
        folded = reduce(folded, axis=axis, keepdims=True, initial=0)
    return folded


def _folded_shape(
    shape: tuple[int, ...], spec: QuantSpec, axis: int | None
) -> tuple[int, int, int, int]:
    """Sizes before the axis, of its channels or groups, within a group, and behind the axis."""
    if spec.granularity == "per_tensor" and axis is None:
        return 1, 1, 1, math.prod(shape)
    if axis is None or spec.granularity == "per_tensor":
        raise UsageError(
            f"A {spec.granularity} spec was given the axis {axis}. Leave it out per_tensor, and "
            "name one for the other granularities."
        )
    if not -len(shape) <= axis < len(shape):
        raise UsageError(
            f"A tensor of shape {shape} has no axis {axis}. Use the axis of its output channels."
        )
    axis %= len(shape)
    group = spec.group or 1
    if shape[axis] % group:
        raise UsageError(
            f"Axis {axis} of a tensor of shape {shape} has {shape[axis]} elements, which groups "
            f"of {group} do not divide. Use a group that does, or per_channel."
        )
    return math.prod(shape[:axis]), shape[axis] // group, group, math.prod(shape[axis + 1 :])


def _part(parameter: np.ndarray, part: tuple[slice, ...]) -> np.ndarray:
    """What of a folded scale or zero point belongs to a block; a shared axis is broadcast."""
    sizes = zip(parameter.shape, part, strict=True)
    return parameter[tuple(slice(None) if size == 1 else cut for size, cut in sizes)]


def _blocks(shape: tuple[int, ...]) -> Iterator[tuple[slice, ...]]:
    """Cut a folded tensor into blocks of at most BLOCK_ELEMENTS elements."""
    sizes: list[int] = []
    room = BLOCK_ELEMENTS
    for whole in reversed(shape):
        sizes.insert(0, max(1, min(whole, room)))
        room //= sizes[0]
    return itertools.product(
        *(
            [slice(at, at + size) for at in range(0, whole, size)]
            for whole, size in zip(shape, sizes, strict=True)
        )
    )
