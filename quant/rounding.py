"""Which of its two neighbours on the grid each weight takes, so that a layer's output stays.

Rounding to nearest is best for every weight alone and not for their sum (AdaRound: Nagel et al.
2020, arXiv 2004.10568, section 3). For a layer that is linear in its weights the error of the
output is a quadratic form of the weights, so that the data are needed once and not in every step.

Weights have the shape (G, D, O): groups of a convolution, inputs of one output, outputs of a group.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

ZETA, GAMMA = 1.1, -0.1
"""Ends of the stretched sigmoid; cut off at 0 and 1 it reaches both (AdaRound, equation 23)."""
WARM_UP = 0.2
"""Share of the iterations before anything draws roundings to 0 and 1."""
SHARPEST, SOFTEST = 20.0, 2.0
"""Exponents of the regulariser, from first to last."""
RATE = 0.1
"""Of Adam, for the logits of soft roundings."""
PULL = 2.0
"""Weight of the regulariser (lambda) times the root of the number of weights, against an error in
units of that at the start."""
BLOCK = 64
"""Inputs that are rounded before their errors are passed on to all others at once."""
SWEEPS = 10
FEW_CHANGES = 1e-3
"""Share of the weights; a sweep that changes fewer is the last one."""


@dataclass(frozen=True)
class Rounding:
    """A weight and the grid that it is rounded to; all tensors are (G, D, O).

    Attributes:
        weight: float.
        step: scale of each weight.
        zero: zero point of each weight, whole numbers.
        low: smallest integer of the format.
        high: largest integer.
    """

    weight: Tensor
    step: Tensor
    zero: Tensor
    low: float
    high: float

    @property
    def outputs(self) -> int:
        """Of all groups together."""
        return self.weight.shape[0] * self.weight.shape[2]

    @cached_property
    def floor(self) -> Tensor:
        """Integers below the weights, not yet limited to the format."""
        return torch.floor(self.weight / self.step) + self.zero

    @cached_property
    def fraction(self) -> Tensor:
        """Where between its neighbours each weight lies, in [0, 1)."""
        return self.weight / self.step + self.zero - self.floor

    @cached_property
    def lower(self) -> Tensor:
        """The integers below, within the format."""
        return self.floor.clamp(self.low, self.high)

    @cached_property
    def upper(self) -> Tensor:
        """The integers above, within the format."""
        return (self.floor + 1).clamp(self.low, self.high)

    @cached_property
    def nearest(self) -> Tensor:
        """What the quantizer would choose."""
        return (torch.round(self.weight / self.step) + self.zero).clamp(self.low, self.high)

    def values(self, integers: Tensor) -> Tensor:
        """The floats that integers stand for."""
        return self.step * (integers - self.zero)


@dataclass(frozen=True)
class Quadratic:
    """Mean squared error of a layer's output, summed over outputs, as a function of its weights.

    With d the change of the weights: tr(d' H d) + 2 tr(d' L) + c. For the quantized input x~ and
    the error r that the layer has with float weights: H = E[x~ x~'], L = E[x~ r'], c = E|r|^2.

    Attributes:
        hessian: H, (G, D, D), positive definite.
        linear: L, (G, D, O).
        constant: c.
    """

    hessian: Tensor
    linear: Tensor
    constant: float = 0.0

    def errors(self, change: Tensor) -> Tensor:
        """Each output's part of the error at a change of the weights, (G, O), without c."""
        return (change * (self.hessian @ change + 2 * self.linear)).sum(1)

    def error(self, change: Tensor) -> float:
        """The error at a change of the weights, (G, D, O)."""
        return float(self.errors(change).sum(dtype=torch.float64)) + self.constant


def choose(rounding: Rounding, quadratic: Quadratic) -> Tensor:
    """Integers with a small error, each a neighbour of its weight; never worse than nearest."""
    chosen = descend(rounding, quadratic, in_order(rounding, quadratic))
    return better(rounding, quadratic, (chosen, rounding.nearest))


def better(rounding: Rounding, quadratic: Quadratic, candidates: Iterable[Tensor]) -> Tensor:
    """For each output the integers with the smallest error; of equals the last."""
    *others, best = candidates
    least = quadratic.errors(rounding.values(best) - rounding.weight)
    for integers in others:
        errors = quadratic.errors(rounding.values(integers) - rounding.weight)
        best = torch.where((errors < least)[:, None], integers, best)
        least = torch.minimum(errors, least)
    return best


def in_order(rounding: Rounding, quadratic: Quadratic) -> Tensor:
    """Round one input after the other, each so that it makes up for the errors before it.

    Babai's nearest plane, which is what GPTQ computes (Frantar et al. 2023, arXiv 2210.17323):
    with H = F F', F upper triangular, and b the best change of the weights if they stayed float,
    the error is |F' (d - b)|^2, and its entry j holds only the changes up to d_j.
    """
    flipped = torch.linalg.cholesky(quadratic.hessian.flip(1, 2))
    best = -torch.cholesky_solve(quadratic.linear.flip(1), flipped).flip(1)
    factor = flipped.flip(1, 2)
    wanted = rounding.weight + best
    error = torch.zeros_like(wanted)
    integers = torch.empty_like(wanted)
    for start in range(0, wanted.shape[1], BLOCK):
        block = slice(start, start + BLOCK)
        corner = factor[:, block, block]
        carried = factor[:, :start, block].mT @ error[:, :start]
        for row in range(corner.shape[1]):
            at = start + row
            target = wanted[:, at] - carried[:, row] / corner[:, row, row, None]
            integers[:, at] = _closest(rounding, target, at)
            error[:, at] = _value(rounding, integers[:, at], at) - wanted[:, at]
            carried += corner[:, row, :, None] * error[:, None, at]
    return integers


def descend(
    rounding: Rounding, quadratic: Quadratic, integers: Tensor, sweeps: int = SWEEPS
) -> Tensor:
    """Coordinate descent: give each weight the neighbour that is best while the others stay.

    The error falls or stays with every change. One input at a time, for all outputs at once,
    since these do not depend on each other.
    """
    integers = integers.clone()
    values = rounding.values(integers)
    hessian = quadratic.hessian
    diagonal = hessian.diagonal(dim1=1, dim2=2)
    slope = hessian @ (values - rounding.weight) + quadratic.linear
    for _ in range(sweeps):
        changes = 0
        for start in range(0, values.shape[1], BLOCK):
            block = slice(start, start + BLOCK)
            corner, local = hessian[:, block, block], slope[:, block].clone()
            before = values[:, block].clone()
            for row in range(local.shape[1]):
                at = start + row
                target = values[:, at] - local[:, row] / diagonal[:, at, None]
                integers[:, at] = _closest(rounding, target, at)
                value = _value(rounding, integers[:, at], at)
                local += corner[:, :, row, None] * (value - values[:, at])[:, None]
                values[:, at] = value
            moved = values[:, block] - before
            changes += int(torch.count_nonzero(moved))
            slope += hessian[:, :, block] @ moved
        if changes <= FEW_CHANGES * values.numel():
            break
    return integers


def _closest(rounding: Rounding, target: Tensor, at: int) -> Tensor:
    """Of the two neighbours of input `at`'s weights the one closer to a target, (G, O)."""
    integers = torch.round(target / rounding.step[:, at]) + rounding.zero[:, at]
    return integers.clamp(rounding.lower[:, at], rounding.upper[:, at])


def _value(rounding: Rounding, integers: Tensor, at: int) -> Tensor:
    return rounding.step[:, at] * (integers - rounding.zero[:, at])


class SoftRounding:
    """The choice between two neighbours made continuous, to be learned (AdaRound, section 3.3).

    W~ = S (clip(floor(W / S) + h(V) + Z, qmin, qmax) - Z) with the rectified sigmoid
    h(V) = clip(sigmoid(V) (zeta - gamma) + gamma, 0, 1), and V such that W~ = W at the start.

    Attributes:
        rounding: the weight and its grid.
        logits: V, (G, D, O), the parameter.
    """

    def __init__(self, rounding: Rounding, start: Tensor | None = None) -> None:
        """Begin with h at `start`, strictly between gamma and zeta; by default at the weights."""
        h = rounding.fraction if start is None else start
        self.rounding = rounding
        self.logits = (-torch.log((ZETA - GAMMA) / (h - GAMMA) - 1)).requires_grad_()

    def up(self) -> Tensor:
        """h(V): 0 is rounding down, 1 rounding up."""
        return (torch.sigmoid(self.logits) * (ZETA - GAMMA) + GAMMA).clamp(0, 1)

    def values(self) -> Tensor:
        """The soft weights, with gradients."""
        rounding = self.rounding
        integers = (rounding.floor + self.up()).clamp(rounding.low, rounding.high)
        return rounding.values(integers)

    def undecided(self, exponent: float) -> Tensor:
        """Sum of 1 - |2 h - 1|^exponent: 0 where every weight is rounded up or down."""
        return (1 - (2 * self.up() - 1).abs().pow(exponent)).sum()

    @torch.no_grad()
    def integers(self) -> Tensor:
        """Each weight's neighbour on the side that it leans to."""
        rounding = self.rounding
        return (rounding.floor + (self.up() >= 0.5)).clamp(rounding.low, rounding.high)


def pull(soft: Sequence[SoftRounding], exponent: float) -> Tensor:
    """The regulariser of weights that are learned together."""
    count = sum(one.logits.numel() for one in soft)
    return PULL / math.sqrt(count) * torch.stack([one.undecided(exponent) for one in soft]).sum()


def exponent_at(progress: float) -> float | None:
    """Exponent of the regulariser after a share of the iterations; None before it begins."""
    if progress < WARM_UP:
        return None
    return SHARPEST + (SOFTEST - SHARPEST) * (progress - WARM_UP) / (1 - WARM_UP)


def relax(rounding: Rounding, quadratic: Quadratic, iterations: int) -> Tensor:
    """Integers by gradient descent on soft roundings (AdaRound), then by coordinate descent."""
    soft = SoftRounding(rounding)
    unit = quadratic.error(rounding.values(rounding.nearest) - rounding.weight)
    optimizer = torch.optim.Adam([soft.logits], lr=RATE)
    for iteration in range(iterations):
        optimizer.zero_grad()
        values = soft.values()
        with torch.no_grad():
            slope = 2 * (quadratic.hessian @ (values - rounding.weight) + quadratic.linear)
        values.backward(slope / max(unit, 1e-30))  # type: ignore[no-untyped-call]
        exponent = exponent_at(iteration / iterations)
        if exponent is not None:
            pull([soft], exponent).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    decided = descend(rounding, quadratic, soft.integers())
    return better(rounding, quadratic, (decided, rounding.nearest))
