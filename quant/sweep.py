"""One walk through a network in float and quantized side by side, layer by layer.

What is corrected in one layer is seen by the next, as in the deployed model, and no tensor is
kept longer than until its last reader has run.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from compress.columns import whole_inputs
from compress.data import Data
from compress.errors import DataError
from compress.graph import infer_shapes
from compress.model import Model
from compress.torch_graph.network import Network, Step, to_torch
from quant.simulation import Simulation

MEMORY_BYTES = 512_000_000
"""Of the activations that are alive at once, in float and quantized together."""


@dataclass(frozen=True)
class Layer:
    """A multiply-accumulate in int8 with a constant weight.

    Attributes:
        index: of the step.
        step: the node.
        weight: name of the weight.
        bias: name of the bias; "" where there is none.
        axis: of the output channels in the layer's output.
        output: name of the tensor that it writes.
    """

    index: int
    step: Step
    weight: str
    bias: str
    axis: int
    output: str


def layers(simulation: Simulation) -> list[Layer]:
    """The layers of a plan whose weight is rounded, in order of execution."""
    found = []
    for index, step in enumerate(simulation.network.steps):
        constant = [n for n in step.inputs[:2] if n in simulation.plan.constants]
        if simulation.plan.roles.get(step.name) != "matmul" or not constant:
            continue
        if step.op not in ("Conv", "ConvTranspose", "Gemm", "MatMul"):
            continue
        bias = step.inputs[2] if len(step.inputs) > 2 else ""
        axis = 1 if step.op in ("Conv", "ConvTranspose") else -1
        found.append(Layer(index, step, constant[0], bias, axis, step.outputs[0]))
    return found


def sweep(
    reference: Network, simulation: Simulation, inputs: Mapping[str, Tensor]
) -> Iterator[tuple[Layer, Tensor, Tensor]]:
    """Every layer with its output in the reference and as the quantized network computes it.

    Outputs are those before rounding, shape (N, C, ...) or (N, ..., C). What a caller changes
    in the simulation's constants before it asks for the next layer takes effect: the layer is
    computed again.
    """
    mine = {layer.index: layer for layer in layers(simulation)}
    floats: dict[str, Tensor] = dict(inputs)
    rounded = simulation.start(inputs)
    for index in range(len(reference.steps)):
        reference.advance(index, floats)
        if index in mine:
            layer = mine[index]
            yield layer, floats[layer.output], simulation.output(index, rounded)
        simulation.execute(index, rounded)
        reference.release(floats, index)
        simulation.release(rounded, index)


def sample_tensors(model: Model, data: Data, samples: int) -> dict[str, Tensor]:
    """Calibration inputs as one batch, as many of them as fit `MEMORY_BYTES`.

    Raises:
        DataError: there is no whole batch for a model with a fixed batch size.
    """
    size = fitting_samples(model, samples)
    for batch in data.take(size).batches(size):
        if model.dynamic_batch or len(batch) == size:
            return to_torch(batch.inputs)
    raise DataError(
        f"Calibration data {data.name} hold {len(data)} samples and the model takes batches of "
        f"{size}. Give at least {size} samples, or export the model with a dynamic batch."
    )


def fitting_samples(model: Model, samples: int) -> int:
    """Samples whose activations fit into memory; the model's own batch size where it is fixed."""
    if not model.dynamic_batch:
        if whole_inputs(model.inputs):
            return 1
        return next((int(spec.shape[0]) for spec in model.inputs if spec.shape), 1)
    shapes = infer_shapes(model.graph_model)
    largest = sorted((abs(math.prod(shape)) for shape in shapes.values()), reverse=True)[:4]
    per_sample = 2 * 4 * sum(largest) or 1
    return int(np.clip(MEMORY_BYTES // per_sample, 1, samples))


def channel_moments(tensor: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel, float64, shape (C,)."""
    axes = [i for i in range(tensor.ndim) if i != axis % tensor.ndim]
    variance, mean = torch.var_mean(tensor.double(), axes, correction=0)
    return mean, variance.sqrt()
