"""Layers as reconstruction sees them: a matrix for each group of a convolution, on a grid."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from compress.torch_graph.network import Network, Step
from quant.plan import QuantPlan
from quant.quantizer import dequantize
from quant.rounding import Rounding
from quant.simulation import Simulation
from quant.sweep import Layer

MOST_INPUTS = 8192
"""Of one output: moments are the square of it."""


@dataclass(frozen=True)
class Site:
    """A layer with learned roundings.

    Attributes:
        step: the node.
        weight: name of its weight.
        bias: name of the bias that may change; "" where none may.
        rounding: the weight and its grid.
        integers: chosen so far, (G, D, O).
        shape: of the weight in the graph.
    """

    step: Step
    weight: str
    bias: str
    rounding: Rounding
    integers: Tensor
    shape: torch.Size

    def tensor(self, values: Tensor) -> Tensor:
        """A weight (G, D, O) in the shape that the graph has it in."""
        return unfolded(self.step, values, self.shape)

    def rounded(self) -> Tensor:
        """The weight that the integers stand for, in the graph's shape."""
        return self.tensor(self.rounding.values(self.integers))


def refusal(network: Network, plan: QuantPlan, layer: Layer) -> str:
    """Why a layer's roundings cannot be chosen, or ""."""
    step, spec = layer.step, plan.constants[layer.weight].spec
    if not spec.integer:
        return f"{spec.dtype} is no grid of integers"
    if step.op == "ConvTranspose":
        return "a transposed convolution is left as it is"
    weight = network.constants[layer.weight]
    if step.inputs[1] != layer.weight or (step.op != "Conv" and weight.ndim != 2):
        return "its weight is not a matrix on the right"
    scaled = any(step.attributes.get(name, 1.0) != 1.0 for name in ("alpha", "beta"))
    if step.op == "Gemm" and (scaled or step.attributes.get("transA", 0)):
        return "it scales or transposes what it multiplies"
    if (
        layer.bias in network.constants
        and max(network.constants[layer.bias].shape[:-1] or (1,)) > 1
    ):
        return "its bias differs from row to row"
    if len(network.readers[layer.weight]) > 1:
        return "other operators share its weight"
    inputs = folded(step, weight).shape[1]
    return f"it has {inputs} inputs, more than {MOST_INPUTS}" if inputs > MOST_INPUTS else ""


def rounding_of(simulation: Simulation, layer: Layer) -> Rounding:
    """A layer's weight and the grid that the plan gives it."""
    params = simulation.plan.constants[layer.weight]
    weight = simulation.constant(layer.weight).float()
    shape = tuple(weight.shape)
    unshifted = dataclasses.replace(params, zero_point=np.zeros_like(params.zero_point))
    step = torch.from_numpy(dequantize(np.ones(shape, np.float32), unshifted))
    zero = torch.round(torch.from_numpy(dequantize(np.zeros(shape, np.float32), params)) / -step)
    weight, step, zero = (folded(layer.step, tensor) for tensor in (weight, step, zero))
    return Rounding(weight, step, zero, params.spec.qmin, params.spec.qmax)


def folded(step: Step, weight: Tensor) -> Tensor:
    """A layer's weight as (G, D, O): groups, inputs of one output, outputs of a group."""
    if step.op == "Conv":
        groups = step.attributes.get("group", 1)
        return weight.reshape(groups, len(weight) // groups, -1).mT.contiguous()
    transposed = step.op == "Gemm" and step.attributes.get("transB", 0)
    return (weight.T if transposed else weight)[None].contiguous()


def unfolded(step: Step, weight: Tensor, shape: torch.Size) -> Tensor:
    """The inverse of `folded`."""
    if step.op == "Conv":
        return weight.mT.reshape(shape)
    transposed = step.op == "Gemm" and step.attributes.get("transB", 0)
    return (weight[0].T if transposed else weight[0]).contiguous()
