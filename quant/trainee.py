"""A simulated plan that learns: weights, BatchNorm and scales as parameters.

The float graph has its BatchNorm folded. For training it is put back: a folded convolution with
weight V and bias b, whose output had mean m and deviation s in the original's training, is
z = V * x followed by a BatchNorm with running mean m - b, running deviation s, gamma = s and
beta = m. The forward pass is Krishnamoorthi's (2018, arXiv 1806.08342, section 3.2.2): the
quantized weight is that of the folded layer, Q(gamma / sigma_run V), its output is corrected by
sigma_run / sigma_batch, and the bias has the batch's mean. Divided by gamma / sigma_run, which a
scale for each output channel absorbs, that is a BatchNorm behind a convolution with Q(V). The
batch's statistics are thus those of quantized weights: one convolution instead of two, and what
rounding adds to the mean is taken out again.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from compress.teaching import trainable
from compress.torch_graph.network import Network, Step
from compress.torch_graph.operators import OPERATORS
from quant.fake import expand, fake_quantize, lsq_gradient_scale
from quant.learned import (
    LearnedScale,
    Scales,
    fixed_scales,
    range_scale,
    scale_ceilings,
    shared_tensors,
)
from quant.plan import QuantPlan
from quant.simulation import Simulation
from quant.spec import QParams

Moments: TypeAlias = tuple[np.ndarray, np.ndarray]
"""Mean and standard deviation of each channel."""

EPSILON = 1e-5
"""Of BatchNorm: keeps a channel that does not vary from being divided by 0."""
MOMENTUM = 0.1
"""Of BatchNorm's running statistics: share of the newest batch."""
SMALLEST_FACTOR = 1e-3
"""To which a gamma may fall, relative to its start: it must not change its sign."""


@dataclass(frozen=True)
class Folded:
    """A trained network as it will be emitted.

    Attributes:
        arrays: constants of the float graph by name.
        plan: for that graph.
        moments: of the outputs of layers with a BatchNorm, by the node's name.
    """

    arrays: dict[str, np.ndarray]
    plan: QuantPlan
    moments: dict[str, Moments]

    def simulated(self, network: Network, float_biases: bool = False) -> Simulation:
        """Its simulation; `network` is that of the graph before training."""
        simulation = Simulation(network, self.plan, float_biases)
        for name, array in self.arrays.items():
            simulation.replace(name, torch.from_numpy(array))
        return simulation


class FoldedNorm:
    """The BatchNorm that a layer's weight and bias hold folded.

    Attributes:
        bias: name of the layer's bias.
        axis: of the output channels in the layer's weight.
        gamma: factor, shape (C,).
        beta: shift, shape (C,).
        mean: running mean of the layer's output without its bias, shape (C,).
        variance: running variance, shape (C,).
    """

    def __init__(self, bias: str, axis: int, shift: Tensor, moments: Moments) -> None:
        """Such that running statistics give the folded layer.

        Args:
            bias: name of the layer's bias.
            axis: of the output channels in the layer's weight.
            shift: values of the bias.
            moments: of the layer's output.
        """
        mean, deviation = (torch.tensor(moment, dtype=torch.float32) for moment in moments)
        self.bias, self.axis = bias, axis
        self.mean, self.variance = mean - shift.reshape(-1), deviation**2
        gamma = (self.variance + EPSILON).sqrt()
        self.gamma, self.beta = nn.Parameter(gamma), nn.Parameter(mean.clone())
        self._smallest = gamma * SMALLEST_FACTOR

    def __call__(self, z: Tensor) -> Tensor:
        """Normalize by the batch, and move the running statistics."""
        return F.batch_norm(
            z, self.mean, self.variance, self.gamma, self.beta, True, MOMENTUM, EPSILON
        )

    def factor(self) -> Tensor:
        """Gamma / sigma_run, shape (C,)."""
        return self.gamma / (self.variance + EPSILON).sqrt()

    def shift(self) -> Tensor:
        """The bias of the folded layer, shape (C,)."""
        return self.beta - self.factor() * self.mean

    @torch.no_grad()
    def moments(self) -> Moments:
        """Mean and standard deviation of the layer's output."""
        deviation = self.factor() * self.variance.sqrt()
        return self.beta.numpy().copy(), deviation.numpy()

    @torch.no_grad()
    def restrain(self) -> None:
        """Keep gamma above 0."""
        self.gamma.copy_(torch.maximum(self.gamma, self._smallest))


class Trainee(Simulation):
    """A simulated plan whose weights, BatchNorm and scales are parameters.

    Attributes:
        weights: parameters by the name of the constant.
        norms: BatchNorm by the name of the layer's weight.
        learned: scales that are trained, with the tensors that share each.
        frozen: running statistics are used, as in the deployed model.
    """

    def __init__(
        self,
        network: Network,
        plan: QuantPlan,
        statistics: Mapping[str, Moments],
        scales: Scales = "lsq",
        float_biases: bool = False,
    ) -> None:
        """Start from the network and the plan as they are.

        Args:
            network: of the float graph.
            plan: made for it.
            statistics: of the outputs of layers that had a BatchNorm, by the node's name.
            scales: whether those of weights are learned, or follow the largest weight.
            float_biases: biases are not rounded.
        """
        super().__init__(network, plan, float_biases)
        self.frozen = False
        self.norms = _norms(network, statistics)
        folded = {norm.bias for norm in self.norms.values()}
        self.weights = {
            name: nn.Parameter(network.constants[name].clone())
            for name in trainable(network)
            if name not in folded
        }
        rounded = [name for name in self.weights if name in plan.constants]
        groups = shared_tensors(plan)
        if scales == "lsq":
            groups += [(name,) for name in rounded]
        self._followed = set(rounded) if scales == "minmax" else set()
        fixed, ceilings = fixed_scales(network, plan), scale_ceilings(network, plan)
        self.learned: list[tuple[LearnedScale, tuple[str, ...]]] = []
        for names in groups:
            params = self._params(names[0])
            if params.spec.power_of_two or not fixed.isdisjoint(names):
                continue
            largest = min(ceilings.get(name, math.inf) for name in names)
            self.learned.append((LearnedScale(params, largest=largest), names))

    def parameters(self) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        """Those of the network, and the scales."""
        weights = list(self.weights.values())
        weights += [p for norm in self.norms.values() for p in (norm.gamma, norm.beta)]
        return weights, [p for scale, _ in self.learned for p in scale.parameters.values()]

    def restrain(self) -> None:
        """Restore what parameters must fulfil after an update."""
        for norm in self.norms.values():
            norm.restrain()
        for scale, _ in self.learned:
            scale.restrain()

    def refresh(self) -> None:
        """Compute what follows from the parameters; to be called before each run."""
        for scale, names in self.learned:
            value = scale.value(self._params(names[0]).spec.dtype)
            self.scales.update(dict.fromkeys(names, value))
        for name, weight in self.weights.items():
            if name in self.norms:
                self._refresh_normed(name, weight, self.norms[name])
                continue
            self.values[name] = weight
            if name in self.plan.constants:
                self.rounded[name] = self._rounded(name, weight)

    def _refresh_normed(self, name: str, weight: Tensor, norm: FoldedNorm) -> None:
        """The layer without its BatchNorm; once frozen, with it folded."""
        factor = expand(norm.factor(), weight.ndim, norm.axis)
        params = self.plan.constants.get(name)
        absorbed = params is not None and _absorbs(params, norm.axis)
        if params is None:
            kernel = weight
        elif absorbed:
            kernel = self._rounded(name, weight)
        else:
            kernel = self._rounded(name, weight * factor) / factor
        if not self.frozen:
            self.rounded[name] = kernel
            return
        self.values[norm.bias] = norm.shift()
        if params is None:
            self.values[name] = kernel * factor
            return
        self.rounded[name] = kernel * factor
        if absorbed:
            grouped = params.spec.granularity == "per_group"
            self.scales[name] = self.scales[name] * (factor if grouped else norm.factor())

    def _rounded(self, name: str, weight: Tensor) -> Tensor:
        params = self.plan.constants[name]
        if name in self._followed:
            self.scales[name] = range_scale(weight.detach(), params)
        return self.round(name, weight, params)

    def round(self, name: str, tensor: Tensor, params: QParams) -> Tensor:
        """What is left of a tensor after quantization with its present scale."""
        scale = self.scales[name]
        samples = tensor.shape[0] if tensor.ndim else 1
        sharers = scale.numel() if name in self.plan.constants else samples
        slope = lsq_gradient_scale(tensor.numel() // sharers, params.spec)
        zero_point = self._zero_points[name]
        return fake_quantize(tensor, scale, zero_point, params.spec, params.axis, slope)

    def _params(self, name: str) -> QParams:
        return self.plan.constants.get(name) or self.plan.activations[name]

    def _compute(self, index: int, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        step = self.network.steps[index]
        norm = self.norms.get(step.inputs[1]) if len(step.inputs) > 1 else None
        if norm is None or self.frozen:
            return super()._compute(index, values)
        x = self._read(values, step, 0, step.inputs[0])
        z = OPERATORS[step.op](step.attributes, x, self.rounded[step.inputs[1]])
        return {step.outputs[0]: norm(z if isinstance(z, Tensor) else z[0])}

    @torch.no_grad()
    def folded(self) -> Folded:
        """A copy of the present state."""
        before, self.frozen = self.frozen, True
        self.refresh()
        self.frozen = before
        arrays = {}
        for name, weight in self.weights.items():
            norm = self.norms.get(name)
            value = weight.detach()
            if norm is not None:
                value = value * expand(norm.factor(), value.ndim, norm.axis)
                shape = self.network.constants[norm.bias].shape
                arrays[norm.bias] = norm.shift().reshape(shape).numpy().copy()
            arrays[name] = value.numpy().copy()
        activations = dict(self.plan.activations)
        for names in shared_tensors(self.plan):
            activations.update(dict.fromkeys(names, self._with_scale(names[0])))
        constants = {name: self._with_scale(name) for name in self.plan.constants}
        plan = dataclasses.replace(self.plan, activations=activations, constants=constants)
        layers = {name: self.network.steps[self.network.readers[name][0]] for name in self.norms}
        moments = {layers[name].name: norm.moments() for name, norm in self.norms.items()}
        return Folded(arrays, plan, moments)

    def _with_scale(self, name: str) -> QParams:
        scale = self.scales[name].detach().numpy()
        return dataclasses.replace(self._params(name), scale=scale)


def _absorbs(params: QParams, axis: int) -> bool:
    """Whether each output channel has scales of its own, into which a factor can move."""
    if params.axis is None:
        return False
    return (params.axis == axis) == (params.spec.granularity == "per_channel")


def _norms(network: Network, statistics: Mapping[str, Moments]) -> dict[str, FoldedNorm]:
    """BatchNorm of the layers whose statistics are known and whose constants are their own."""
    found = {}
    for step in network.steps:
        axis, moments = _output_axis(step), statistics.get(step.name)
        if axis is None or moments is None:
            continue
        weight, bias = step.inputs[1:3]
        if any(n not in network.constants or len(network.readers[n]) > 1 for n in (weight, bias)):
            continue
        if network.constants[bias].numel() == len(moments[0]):
            found[weight] = FoldedNorm(bias, axis, network.constants[bias], moments)
    return found


def _output_axis(step: Step) -> int | None:
    """Axis of the output channels in the weight of a layer with a bias; None for all others."""
    if len(step.inputs) < 3 or not step.inputs[2]:
        return None
    match step.op:
        case "Conv":
            return 0
        case "ConvTranspose" if step.attributes.get("group", 1) == 1:
            return 1
        case "Gemm" if step.attributes.get("beta", 1.0) == 1.0:
            return 0 if step.attributes.get("transB", 0) else 1
        case _:
            return None
