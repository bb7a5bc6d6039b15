"""Scales that are learned, and what limits them."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

import torch
from torch import Tensor, nn

from compress.torch_graph.network import Network
from quant.emit import integer_limits
from quant.placement import GATES
from quant.plan import QuantPlan
from quant.quantizer import SMALLEST_SCALE
from quant.spec import DType, QParams

Scales = Literal["lsq", "minmax"]
"""How those of weights change: they are learned, or follow the largest weight."""


class LearnedScale:
    """The scale of a tensor, or of several that share it, as one parameter for each format.

    A search that changes formats from step to step keeps what it learned for each of them. The
    parameter is log(scale / start): updates are relative to the scale, which stays above 0.

    Attributes:
        parameters: by format, in the shape of the scale.
    """

    def __init__(self, *options: QParams, largest: float = math.inf) -> None:
        """Start from one set of numbers for each format; no scale will exceed `largest`."""
        self._start = {params.spec.dtype: params for params in options}
        self._largest = largest
        self.parameters = {
            dtype: nn.Parameter(torch.zeros(params.scale.shape))
            for dtype, params in self._start.items()
        }

    def value(self, dtype: DType) -> Tensor:
        """The scale in a format, with gradients."""
        return torch.tensor(self._start[dtype].scale) * self.parameters[dtype].exp()

    def qparams(self, dtype: DType) -> QParams:
        """The numbers of a format with the scale as it is now."""
        scale = self.value(dtype).detach().numpy()
        return dataclasses.replace(self._start[dtype], scale=scale)

    @torch.no_grad()
    def restrain(self) -> None:
        """Bring a scale that became too large back to the largest."""
        for dtype, parameter in self.parameters.items():
            parameter.clamp_(max=torch.tensor(self._largest / self._start[dtype].scale).log())


def shared_tensors(plan: QuantPlan) -> list[tuple[str, ...]]:
    """Activations in groups that share one set of numbers."""
    groups: dict[int, list[str]] = {}
    for name, params in plan.activations.items():
        groups.setdefault(id(params), []).append(name)
    return [tuple(names) for names in groups.values()]


def range_scale(weight: Tensor, params: QParams) -> Tensor:
    """The smallest scales at which nothing of a weight saturates; zeros keep the ones they have."""
    spec, axis = params.spec, params.axis
    if axis is None:
        low, high = weight.amin(), weight.amax()
    elif spec.group is not None:
        inner = axis % weight.ndim + 1
        shape = (*weight.shape[: inner - 1], -1, spec.group, *weight.shape[inner:])
        parts = weight.reshape(shape)
        low, high = parts.amin(inner), parts.amax(inner)
    else:
        others = [other for other in range(weight.ndim) if other != axis % weight.ndim]
        low, high = weight.amin(others), weight.amax(others)
    zero_point = torch.tensor(params.zero_point).float()
    below, above = (zero_point - spec.qmin).clamp_min(1), (spec.qmax - zero_point).clamp_min(1)
    scale = torch.maximum(-low / below, high / above)
    if spec.power_of_two:
        scale = scale.log2().ceil().exp2()
    return torch.where(scale > SMALLEST_SCALE, scale, torch.tensor(params.scale))


def fixed_scales(network: Network, plan: QuantPlan) -> set[str]:
    """Tensors whose scale an operator dictates: the input of a gate, the output of HardSigmoid."""
    gates = [
        step for step in network.steps if step.op in GATES and plan.roles.get(step.name) == "unary"
    ]
    inputs = {step.inputs[0] for step in gates}
    return inputs | {step.outputs[0] for step in gates if step.op == "HardSigmoid"}


def scale_ceilings(network: Network, plan: QuantPlan) -> dict[str, float]:
    """Scales up to which an absorbed Clip costs no operator, by tensor.

    Saturation does the work of a bound as long as the grid ends within half a step of it.
    """
    found = {}
    for step in network.steps:
        params = plan.activations.get(step.outputs[0])
        if step.op != "Clip" or plan.roles.get(step.name) != "activation" or params is None:
            continue
        bounds = [network.constants[n].item() for n in step.inputs[1:3] if n in network.constants]
        if len(bounds) < 2 or not params.spec.integer:
            continue
        if integer_limits((bounds[0], bounds[1]), params) is not None:
            continue
        spec, zero = params.spec, int(params.zero_point)
        ends = (-bounds[0], zero - spec.qmin), (bounds[1], spec.qmax - zero)
        # 0.49: half a step less the rounding of float32.
        found[step.outputs[0]] = min(end / (steps - 0.49) for end, steps in ends if steps > 0)
    return found
