"""Quantizer arithmetic on arrays: the integers that ONNX QuantizeLinear gives.

Affine and symmetric quantization as in Krishnamoorthi, arXiv 1806.08342, section 2; the float
operations and their order (divide, round half to even, add the zero point, saturate) follow the
ONNX operator specification, so that a weight quantized here equals one quantized by the runtime.
Work goes block by block through one small float buffer: no second copy of a tensor is made.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import numpy as np
from numpy.typing import ArrayLike

from compress.errors import UnsupportedError, UsageError
from quant.spec import QParams, QuantSpec

BLOCK_ELEMENTS = 1 << 16
"""Elements handled at once: 256 KiB of float32 stay in a core's L2 cache."""

SMALLEST_SCALE = float(np.finfo(np.float32).tiny)
"""Below it float32 is denormal, which runtimes may flush to zero."""

LARGEST_VALUE = 3.4e38
"""Just below float32's maximum, so that no dequantized value overflows."""


def scale_and_zero_point(
    low: ArrayLike, high: ArrayLike, spec: QuantSpec
) -> tuple[np.ndarray, np.ndarray]:
    """The finest grid that holds [low, high] and 0.

    Symmetric: the smallest scale with low >= (qmin - zero_point) * scale and
    high <= (qmax - zero_point) * scale. Asymmetric: scale = (high - low) / (qmax - qmin),
    zero_point = round(qmin - low / scale). A range of only 0 gets the scale 1.

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
    scale = np.where(high - low > 0, np.maximum(scale, SMALLEST_SCALE), 1.0).astype(np.float32)
    if not spec.symmetric:
        zero_point = np.clip(np.rint(spec.qmin - low / scale), spec.qmin, spec.qmax)
    reach = np.maximum(zero_point - spec.qmin, spec.qmax - zero_point)
    return np.minimum(scale, (LARGEST_VALUE / reach).astype(np.float32)), zero_point


def qparams_from_range(
    low: ArrayLike, high: ArrayLike, spec: QuantSpec, axis: int | None = None
) -> QParams:
    """Scale and zero point for values in [low, high], widened to hold 0.

    Args:
        low: shape () per tensor or (C,) per channel.
        high: same shape.
        spec: the format.
        axis: the axis that C belongs to; None per tensor.

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

    An all-zero channel takes the largest scale of the others: its integers are all zero at any
    scale, but a bias is stored at the scale of its weights times that of the input, and a scale
    of 1 would round the bias of a dead channel away.

    Args:
        w: any shape, float.
        spec: the format.
        axis: the output channel's axis for a per-channel spec, else None.

    Raises:
        UnsupportedError: a weight is NaN or infinite.
        UsageError: the tensor has no such axis.
    """
    blocks = w.reshape(_folded_shape(w.shape, axis))
    # One axis at a time: numpy is ten times slower over axes 0 and 2 at once where both are short.
    low = blocks.min(axis=0, initial=0).min(axis=1, initial=0)
    high = blocks.max(axis=0, initial=0).max(axis=1, initial=0)
    if not (np.isfinite(low).all() and np.isfinite(high).all()):
        raise UnsupportedError(
            f"A weight of shape {w.shape} holds NaN or infinity, which has no integer. Load a "
            "checkpoint whose training did not diverge."
        )
    alive = high > low
    scale, zero_point = scale_and_zero_point(low, high, spec)
    if alive.any():
        scale[~alive] = scale[alive].max()
    if axis is None:
        return QParams(spec, scale[0], zero_point[0])
    return QParams(spec, scale, zero_point, axis % w.ndim)


def quantize(x: np.ndarray, qparams: QParams) -> np.ndarray:
    """Integers of `x`: saturate(round_half_even(x / scale) + zero_point).

    A reduced spec saturates to its own, smaller range; QuantizeLinear knows only the whole
    storage type, so the two differ there for values outside of the calibrated range.

    Args:
        x: float, any shape.
        qparams: scale and zero point.

    Returns:
        The format's storage type, same shape.
    """
    x = np.asarray(x)
    source = _fold(x, qparams)
    scale = qparams.scale.reshape(1, -1, 1)
    zero_point = qparams.zero_point.reshape(1, -1, 1).astype(np.float32)
    result = np.empty(source.shape, qparams.spec.format.storage)
    buffer = np.empty(min(x.size, BLOCK_ELEMENTS), np.float32)
    shifted = bool(zero_point.any())
    with np.errstate(over="ignore", under="ignore"):
        for outer, channels, inner in _blocks(source.shape):
            block = source[outer, channels, inner]
            work = buffer[: block.size].reshape(block.shape)
            np.divide(block, scale[:, channels], out=work, dtype=np.float32, casting="same_kind")
            np.rint(work, out=work)
            if shifted:
                work += zero_point[:, channels]
            np.clip(work, qparams.spec.qmin, qparams.spec.qmax, out=work)
            np.copyto(result[outer, channels, inner], work, casting="unsafe")
    return result.reshape(x.shape)


def dequantize(q: np.ndarray, qparams: QParams) -> np.ndarray:
    """Floats of integers: (q - zero_point) * scale, float32, as ONNX DequantizeLinear."""
    q = np.asarray(q)
    result = _fold(q, qparams).astype(np.float32)
    result -= qparams.zero_point.reshape(1, -1, 1).astype(np.float32)
    result *= qparams.scale.reshape(1, -1, 1)
    return result.reshape(q.shape)


def fake_quantize(x: np.ndarray, qparams: QParams) -> np.ndarray:
    """The float32 values that are left of `x` after quantization, same shape."""
    return dequantize(quantize(x, qparams), qparams)


def _fold(x: np.ndarray, qparams: QParams) -> np.ndarray:
    folded = x.reshape(_folded_shape(x.shape, qparams.axis))
    if folded.shape[1] != qparams.scale.size:
        raise UsageError(
            f"A tensor of shape {x.shape} has {folded.shape[1]} channels on axis {qparams.axis}, "
            f"and there are {qparams.scale.size} scales. Make the scales from this tensor's axis."
        )
    return folded


def _folded_shape(shape: tuple[int, ...], axis: int | None) -> tuple[int, int, int]:
    """Sizes before, at and after the channel axis; a per-tensor scale is a single channel."""
    if axis is None:
        return 1, 1, math.prod(shape)
    if not -len(shape) <= axis < len(shape):
        raise UsageError(
            f"A tensor of shape {shape} has no axis {axis}. Use the axis of its output channels."
        )
    axis %= len(shape)
    return math.prod(shape[:axis]), shape[axis], math.prod(shape[axis + 1 :])


def _blocks(shape: tuple[int, int, int]) -> Iterator[tuple[slice, slice, slice]]:
    """Cut a folded tensor into blocks of at most BLOCK_ELEMENTS elements."""
    outer, channels, inner = shape
    sizes = (
        max(1, min(outer, BLOCK_ELEMENTS // max(1, channels * inner))),
        max(1, min(channels, BLOCK_ELEMENTS // max(1, inner))),
        max(1, min(inner, BLOCK_ELEMENTS)),
    )
    return itertools.product(
        *(
            [slice(at, at + size) for at in range(0, whole, size)]
            for whole, size in zip(shape, sizes, strict=True)
        )
    )
