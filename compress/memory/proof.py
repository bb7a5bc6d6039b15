"""That patches compute what the whole does: bit for bit where sums are exact, else how far off.

Every number that a patch computes is the sum of the same products as in the execution as a whole.
A kernel chooses by shape in which order it adds them up, so rounding may differ, and equal bits
with a network's own weights would say more about the kernel than about the patches. Here the same
structure runs on whole numbers, where every order of addition gives the same bits.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from compress.errors import UnsupportedError
from compress.graph_liveness import POINTWISE
from compress.memory.execution import Patched
from compress.torch_graph.operators import Operator

EXACT = 2**53
"""Up to here float64 holds every whole number."""
_WHOLE = frozenset([
    "Add", "AveragePool", "BatchNormalization", "Cast", "Clip", "Concat", "Conv", "Dropout",
    "Identity", "Max", "MaxPool", "Min", "Mul", "Pad", "Relu", "Split", "Sub", "Sum",
])  # fmt: skip
"""Make whole numbers of whole numbers, an average as a sum."""
_LIMIT = 8.0


@dataclass(frozen=True)
class Proof:
    """How the stage's output in patches compares with the whole.

    Attributes:
        identical: equal bit for bit on whole numbers in float64.
        largest_sum: bound of every sum on the way, in any order; below 2**53 all are exact.
        float32: largest difference with the network's own weights in float32, relative to the
            largest number of the output.
        float64: the same in float64.
    """

    identical: bool
    largest_sum: float
    float32: float
    float64: float


def prove(network: Patched, image: Tensor, seed: int = 0) -> Proof:
    """Run the stage in patches and whole, on whole numbers and on the image.

    On whole numbers weights are -1, 0 and 1, the image's are -4 to 4, averages are sums, and other
    functions of one number are a limit to -8..8: nothing of that changes which positions are read
    and added. The convolution of magnitudes bounds every partial sum.

    Args:
        network: in patches.
        image: (N, C, ...) of its size.
        seed: of weights and image in whole numbers.

    Raises:
        UnsupportedError: an operator does not make whole numbers of whole numbers.
    """
    exact = _whole_numbers(network, seed)
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randint(-4, 5, image.shape, generator=generator).double()
    bound = _largest_sum(exact, numbers)
    same = torch.equal(exact.stage_output(numbers), exact.stage_whole(numbers))
    return Proof(
        identical=same and bound < EXACT,
        largest_sum=bound,
        float32=_difference(network, image.float()),
        float64=_difference(_double(network), image.double()),
    )


def _difference(network: Patched, image: Tensor) -> float:
    one, other = network.stage_output(image), network.stage_whole(image)
    return float((one - other).abs().max() / other.abs().max().clamp_min(1e-30))


def _double(network: Patched) -> Patched:
    """The same in float64; what it shares with the original is never written to."""
    found = copy.copy(network)
    found.network = copy.copy(network.network)
    found.network.constants = {
        name: tensor.double() if tensor.is_floating_point() else tensor
        for name, tensor in network.network.constants.items()
    }
    return found


def _whole_numbers(network: Patched, seed: int) -> Patched:
    found = _double(network)
    constants, steps = found.network.constants, list(found.network.steps)
    random = np.random.default_rng(seed)
    for position in found.positions:
        step = steps[position]
        if step.op not in _WHOLE | POINTWISE:
            raise UnsupportedError(
                f"{step.name} ({step.op}) does not make whole numbers of whole numbers, so that "
                f"patches cannot be compared bit for bit."
            )
        for name in step.inputs[1:] if step.op not in ("Clip", "Pad") else ():
            if name in constants and constants[name].is_floating_point():
                drawn = random.integers(-1, 2, tuple(constants[name].shape))
                constants[name] = torch.from_numpy(np.asarray(drawn, np.float64))
        if step.op == "Clip":
            for name in filter(None, step.inputs[1:]):
                constants[name] = constants[name].round()
        if step.op == "BatchNormalization":
            constants[step.inputs[4]] = torch.ones_like(constants[step.inputs[4]])
            attributes = {**step.attributes, "epsilon": 0.0}
            steps[position] = dataclasses.replace(step, attributes=attributes)
    changed = dict.fromkeys(POINTWISE - _WHOLE, _limited)
    operators = network.network.operators
    sums = {"AveragePool": _sum_pool(operators["AveragePool"])}
    found.network.operators = {**operators, **changed, **sums}
    found.network.steps = tuple(steps)
    return found


def _limited(attributes: Mapping[str, Any], x: Tensor) -> Tensor:
    return torch.clamp(x, -_LIMIT, _LIMIT)


def _sum_pool(average: Operator) -> Operator:
    def call(attributes: Mapping[str, Any], x: Tensor) -> Tensor:
        found = average(attributes, x)
        if isinstance(found, tuple):
            raise TypeError("AveragePool has one output")
        return torch.round(found * math.prod(attributes["kernel_shape"]))

    return call


def _largest_sum(network: Patched, image: Tensor) -> float:
    """A bound of every sum of the whole execution, whatever the order."""
    values, bound = {network.image: image}, 0.0
    graph = network.network
    with torch.no_grad():
        for index in network.positions:
            step = graph.steps[index]
            if step.op in ("AveragePool", "BatchNormalization", "Conv"):
                magnitudes = graph.execute(index, lambda _, name: graph.value(values, name).abs())
                bound = max(bound, *(float(one.abs().max()) for one in magnitudes.values()))
            graph.advance(index, values)
            bound = max(bound, *(float(values[n].abs().max()) for n in step.outputs if n in values))
            graph.release(values, index, (network.stage.end,))
    return bound
