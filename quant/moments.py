"""Second moments of a layer's inputs, from which the error of any rounding of it follows.

Positions of a feature map are sampled: neighbours are nearly alike, and so many numbers as weights
need no more rows than a few times their count.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from compress.torch_graph.network import Step
from compress.torch_graph.operators import OPERATORS
from quant.rounding import Quadratic

DAMPING = 0.1
"""Share of the inputs' mean power that is added to each input as if it were noise: what the samples
cannot tell (correlations, where there are few) does not decide about a weight."""


def sampled_rows(
    step: Step, x: Tensor, y: Tensor, shape: torch.Size, count: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """What a layer reads and writes at some positions.

    Args:
        step: Conv, Gemm or MatMul with its weight as second input.
        x: its input.
        y: its output.
        shape: of its weight.
        count: about so many rows; of a convolution the same positions in each sample.
        generator: chooses the positions.

    Returns:
        (G, n, D) and (G, n, O).
    """
    if step.op != "Conv":
        rows, out = x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1])
        chosen = torch.randperm(len(rows), generator=generator)[:count]
        return rows[chosen][None], out[chosen][None]
    samples, groups = len(x), step.attributes.get("group", 1)
    area = math.prod(y.shape[2:])
    wanted = min(area, max(1, round(count / samples)))
    places = torch.randperm(area, generator=generator)[:wanted]
    read = _read_by(step, x.shape[2:], shape[2:]).flatten(1)[:, places].T
    # A zero in front of the flat input is what padding reads.
    rows = F.pad(x.flatten(2), (1, 0))[:, :, read.reshape(-1)]
    rows = rows.reshape(samples, groups, -1, wanted, read.shape[1]).permute(1, 0, 3, 2, 4)
    out = y.flatten(2)[:, :, places].reshape(samples, groups, -1, wanted).permute(1, 0, 3, 2)
    return (
        rows.reshape(groups, samples * wanted, -1),
        out.reshape(groups, samples * wanted, -1),
    )


def _read_by(step: Step, size: torch.Size, kernel: torch.Size) -> Tensor:
    """Flat positions, from 1, that a convolution reads for each output; 0 for padding.

    Found by convolving the positions with kernels that pick one offset each, (K, ...).
    """
    positions = torch.arange(1, math.prod(size) + 1, dtype=torch.float64).reshape(1, 1, *size)
    offsets = math.prod(kernel)
    picking = torch.eye(offsets, dtype=torch.float64).reshape(offsets, 1, *kernel)
    found = OPERATORS["Conv"]({**step.attributes, "group": 1}, positions, picking)
    assert isinstance(found, Tensor)
    return found[0].round().long()


class Moments:
    """First and second moments of rows x, (G, n, D), and of errors r, (G, n, O); in float64.

    Sums are taken about the means of the first rows, so that a large mean costs no digits.
    """

    def __init__(self, x: Tensor, r: Tensor) -> None:
        self._x, self._r = x.mean(1, keepdim=True), r.mean(1, keepdim=True)
        groups, (inputs, outputs) = len(x), (x.shape[2], r.shape[2])
        self._count, self._rr = 0, 0.0
        zeros = torch.zeros(groups, inputs + outputs, inputs, dtype=torch.float64)
        self._xx, self._rx = zeros[:, :inputs], zeros[:, inputs:]
        self._sum_x = torch.zeros(groups, inputs, dtype=torch.float64)
        self._sum_r = torch.zeros(groups, outputs, dtype=torch.float64)
        self.add(x, r)

    def add(self, x: Tensor, r: Tensor) -> None:
        """Count in some rows."""
        x, r = x - self._x, r - self._r
        self._count += x.shape[1]
        self._xx += x.mT @ x
        self._rx += r.mT @ x
        self._rr += float(r.square().sum(dtype=torch.float64))
        self._sum_x += x.sum(1, dtype=torch.float64)
        self._sum_r += r.sum(1, dtype=torch.float64)

    @property
    def means(self) -> tuple[Tensor, Tensor]:
        """E[x], (G, D), and E[r], (G, O)."""
        x, r = self._sum_x / self._count, self._sum_r / self._count
        return self._x[:, 0] + x, self._r[:, 0] + r

    def quadratic(self, centred: bool, damping: float = DAMPING) -> Quadratic:
        """The error of a layer as a function of its weights.

        Args:
            centred: a bias takes the error's mean away.
            damping: share of the mean power of the inputs that is added to each.
        """
        x, r = self._sum_x / self._count, self._sum_r / self._count
        hessian = self._xx / self._count - x[:, :, None] * x[:, None]
        linear = (self._rx / self._count - r[:, :, None] * x[:, None]).mT
        constant = self._rr / self._count - float(r.square().sum())
        if not centred:
            x, r = self.means
            hessian += x[:, :, None] * x[:, None]
            linear = linear + x[:, :, None] * r[:, None]
            constant += float(r.square().sum())
        diagonal = hessian.diagonal(dim1=1, dim2=2)
        power = diagonal.mean(1, keepdim=True)
        # A group whose inputs are always 0 may round as it likes.
        diagonal += torch.where(power > 0, damping * power, torch.ones_like(power))
        return Quadratic(hessian.float(), linear.float().contiguous(), constant)
