"""Scales of weights in few bits: the range that costs the smallest squared error.

With 8 bits the largest weight sets the scale and nothing is clipped. With 4 there are 16 levels
for all, and clipping the few largest weights gains more than it costs.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from quant.quantizer import fake_quantize, weight_qparams
from quant.spec import QParams, QuantSpec

STEPS = 40
SMALLEST = 0.4
"""Share of the largest weight at which the search ends; the best is hardly ever below half."""


def narrow_weight(w: np.ndarray, spec: QuantSpec, axis: int | None = None) -> QParams:
    """Scale of a weight by the smallest squared error of each scale's own elements.

    A search over shares of the min-max range, as BRECQ's (Li et al. 2021, arXiv 2102.05426),
    with the square in place of the power 2.4. Formats of 8 bits and more keep min-max.

    Args:
        w: any shape, float.
        spec: the format.
        axis: of the output channels or of the groups; None per tensor.

    Raises:
        UnsupportedError: a weight is NaN or infinite.
    """
    whole = weight_qparams(w, spec, axis)
    if spec.bits >= 8 or spec.power_of_two or not spec.symmetric:
        return whole
    best = np.full(whole.scale.shape, np.inf)
    scale = whole.scale.copy()
    for share in np.linspace(1.0, SMALLEST, STEPS):
        tried = dataclasses.replace(whole, scale=(whole.scale * share).astype(np.float32))
        error = _errors(w, tried)
        better = error < best
        best, scale = np.where(better, error, best), np.where(better, tried.scale, scale)
    return dataclasses.replace(whole, scale=scale)


def _errors(w: np.ndarray, params: QParams) -> np.ndarray:
    """Sum of squared errors for each scale, in the shape of the scales."""
    squares = np.square(w - fake_quantize(w, params), dtype=np.float64)
    if params.axis is None:
        return np.asarray(squares.sum())
    group = params.spec.group
    if group is None:
        axes = tuple(i for i in range(w.ndim) if i != params.axis)
        return np.asarray(squares.sum(axes))
    shape = w.shape
    split = (*shape[: params.axis], shape[params.axis] // group, group, *shape[params.axis + 1 :])
    return np.asarray(squares.reshape(split).sum(params.axis + 1))
