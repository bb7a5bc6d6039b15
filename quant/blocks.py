"""A network in pieces, run in float and quantized side by side.

Only what crosses from one piece to the next is kept, for all samples; inside a piece everything is
computed again. Residual blocks come out whole, as BRECQ wants them (Li et al. 2021, arXiv
2102.05426, section 3.3): nothing but the tensor between two of them passes a cut.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from compress.data import Data
from compress.errors import DataError
from compress.model import Model
from compress.torch_graph.network import Network, to_torch
from quant.simulation import Simulation

LARGEST_PIECE = 8
"""Layers; where more come without a natural cut the narrowest place is taken."""
SMALL = 16
"""A tensor with so many times fewer elements than another says little about it: the mean of a
feature map is no place to compare two networks."""


@dataclass(frozen=True)
class Piece:
    """Consecutive steps of a network.

    Attributes:
        steps: their indices.
        layers: indices of those with a weight that is rounded.
        outputs: tensors made in it that later steps read, or outputs of the graph.
        border: tensors alive behind it.
    """

    steps: range
    layers: tuple[int, ...]
    outputs: tuple[str, ...]
    border: tuple[str, ...]


def cut(network: Network, layers: Sequence[int], sizes: Mapping[str, int]) -> list[Piece]:
    """Cut behind blocks: where a single tensor crosses, and never behind a depthwise layer alone.

    Args:
        network: the float network.
        layers: indices of the steps to be reconstructed, ascending.
        sizes: elements of the tensors that hold data, by name; see `data_sizes`.
    """
    alive = _alive(network, sizes)
    places: list[int] = []
    open_layers: list[int] = []
    for first, second in itertools.pairwise(layers):
        open_layers.append(first)
        between = range(first, second)
        narrow = [place for place in between if len(alive[place]) == 1]
        if not narrow or _depthwise(network, open_layers):
            continue
        if len(open_layers) > LARGEST_PIECE:
            places += _divide(open_layers, alive)
        widths = {place: sizes[alive[place][0]] for place in narrow}
        places.append([p for p in narrow if widths[p] * SMALL > max(widths.values())][-1])
        open_layers = []
    if layers:
        places += _divide([*open_layers, layers[-1]], alive)
    edges = [0, *(place + 1 for place in places), len(network.steps)]
    return [
        _piece(network, range(start, stop), layers, alive)
        for start, stop in itertools.pairwise(edges)
    ]


def _divide(layers: Sequence[int], alive: Sequence[Sequence[str]]) -> list[int]:
    """Places that cut a piece without natural cuts into parts that are not large."""
    places = []
    while len(layers) > LARGEST_PIECE:
        possible = range(layers[LARGEST_PIECE // 2 - 1], layers[LARGEST_PIECE])
        place = min(possible, key=lambda index: (len(alive[index]), -index))
        places.append(place)
        layers = [layer for layer in layers if layer > place]
    return places


def _piece(
    network: Network, steps: range, layers: Sequence[int], alive: Sequence[Sequence[str]]
) -> Piece:
    made = {name for index in steps for name in network.steps[index].outputs}
    border = tuple(alive[steps.stop - 1]) if steps.stop < len(network.steps) else ()
    outputs = [name for name in (*border, *network.outputs) if name in made]
    inside = tuple(layer for layer in layers if layer in steps)
    return Piece(steps, inside, tuple(dict.fromkeys(outputs)), border)


def _depthwise(network: Network, layers: Sequence[int]) -> bool:
    return all(network.steps[layer].attributes.get("group", 1) > 1 for layer in layers)


def _alive(network: Network, sizes: Mapping[str, int]) -> list[list[str]]:
    """Tensors with data that are needed behind each step."""
    alive: list[list[str]] = [[] for _ in network.steps]
    for name in sizes:
        first, last = network.producer.get(name, -1), network.readers.get(name, [-1])[-1]
        for index in range(max(first, 0), last):
            alive[index].append(name)
    return alive


def data_sizes(network: Network, inputs: Mapping[str, Tensor]) -> dict[str, int]:
    """Elements of every tensor that depends on data and not only on shapes; runs the network."""
    values = dict(inputs)
    sizes = {name: tensor.numel() for name, tensor in inputs.items()}
    for index, step in enumerate(network.steps):
        network.advance(index, values)
        if step.op not in ("Shape", "Size") and any(name in sizes for name in step.inputs):
            sizes |= {name: values[name].numel() for name in step.outputs if name in values}
        network.release(values, index)
    return sizes


class Walk:
    """Batches of samples on their way through a float and a quantized network.

    Attributes:
        reference: what the quantized network should compute.
        simulation: the quantized network, of the same steps.
        at: index of the step that comes next.
    """

    def __init__(
        self, reference: Network, simulation: Simulation, batches: Sequence[Mapping[str, Tensor]]
    ) -> None:
        self.reference, self.simulation = reference, simulation
        self.at = 0
        self.floats: list[dict[str, Tensor]] = [dict(batch) for batch in batches]
        self.rounded = [simulation.start(batch) for batch in batches]

    @torch.no_grad()
    def up_to(self, stop: int) -> Iterator[tuple[dict[str, Tensor], dict[str, Tensor]]]:
        """The values of each batch in front of step `stop`, float and quantized."""
        for floats, rounded in zip(self.floats, self.rounded, strict=True):
            yield self.run_float(floats, stop), self.run_rounded(rounded, stop)

    def run_float(
        self, values: Mapping[str, Tensor], stop: int, keep: Collection[str] = ()
    ) -> dict[str, Tensor]:
        """One batch from where the walk is to step `stop` in float."""
        values = dict(values)
        for index in range(self.at, stop):
            self.reference.advance(index, values)
            self.reference.release(values, index, keep)
        return values

    def run_rounded(
        self, values: Mapping[str, Tensor], stop: int, keep: Collection[str] = ()
    ) -> dict[str, Tensor]:
        """The same in the simulation, with gradients if any are asked for."""
        values = dict(values)
        for index in range(self.at, stop):
            self.simulation.execute(index, values)
            self.simulation.release(values, index, keep)
        return values

    def advance(self, stop: int) -> None:
        """Take all batches to step `stop`; what they leave behind is forgotten."""
        for index, (floats, rounded) in enumerate(self.up_to(stop)):
            self.floats[index], self.rounded[index] = floats, rounded
        self.at = stop


def batches_of(model: Model, data: Data, size: int, samples: int) -> list[dict[str, Tensor]]:
    """So many samples in batches of a size; where it is the model's own only whole ones.

    Raises:
        DataError: there is not a single batch.
    """
    batches: list[dict[str, Tensor]] = []
    for batch in data.batches(size):
        if len(batches) * size >= samples or (len(batch) < size and not model.dynamic_batch):
            break
        batches.append(to_torch(batch.inputs))
    if not batches:
        raise DataError(
            f"Calibration data {data.name} hold {len(data)} samples and the model takes batches of "
            f"{size}. Give at least {size} samples, or export the model with a dynamic batch."
        )
    return batches
