"""One site quantized and everything else in float: what happens to the network's outputs.

A site changes only what comes after it. The float network runs once and keeps what its later parts
read; for each site and option the steps that depend on it run again, and no others.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from compress.data import Data
from compress.errors import DataError
from compress.model import Model
from compress.progress import Progress, silent
from compress.torch_graph.network import Network, to_torch
from quant.decisions import Decision, rounded
from quant.spec import QParams
from quant.sweep import fitting_samples

Values: TypeAlias = dict[str, dict[str, dict[str, float]]]
"""Figures by site, option and metric."""

MEMORY_BYTES = 256_000_000
"""Of the float tensors that are kept at once; second derivatives keep about four times as much."""
MAX_BATCH = 32
"""More is slower: the activations of a layer should stay in the cache."""
LARGEST = 1e20
"""Stands for what is infinite or not a number, so that losses can be added up and written down."""


@dataclass(frozen=True)
class Chunk:
    """Some samples.

    Attributes:
        inputs: by name.
        labels: (n,), or None.
        count: n.
    """

    inputs: Mapping[str, Tensor]
    labels: Tensor | None
    count: int


@dataclass(frozen=True)
class Subject:
    """What is measured.

    Attributes:
        model: the float model.
        network: of its graph.
        sites: with their parameters.
        options: names.
        data: all of it is used.
        shapes: of the graph's tensors at batch 1.
        progress: opens a tracker for each long step.
    """

    model: Model
    network: Network
    sites: Sequence[Decision]
    options: tuple[str, ...]
    data: Data
    shapes: Mapping[str, Sequence[int]]
    progress: Progress = silent

    @property
    def scores(self) -> str:
        """Name of the tensor (N, classes) whose softmax is the classes' probabilities.

        It is the first output of that form, or what a final Softmax reads; "" without one.
        """
        for name in self.network.outputs:
            shape = self.shapes.get(name, ())
            if len(shape) != 2 or shape[1] < 2:
                continue
            producer = self.network.producer
            maker = self.network.steps[producer[name]] if name in producer else None
            return maker.inputs[0] if maker is not None and maker.op == "Softmax" else name
        return ""

    def fitting(self, names: Iterable[str], most: int) -> int:
        """Samples, `most` at most, of which these tensors fit into `MEMORY_BYTES`."""
        per_sample = 4 * sum(abs(math.prod(self.shapes.get(name, (1,)))) for name in names)
        return int(np.clip(MEMORY_BYTES // max(per_sample, 1), 1, most))


def chunks(model: Model, data: Data, size: int) -> Iterator[Chunk]:
    """The data in pieces of `size`, or of the batch that the model is fixed to.

    Raises:
        DataError: there is no whole batch for a model with a fixed batch size.
    """
    if not model.dynamic_batch:
        size = fitting_samples(model, 1)
    found = False
    for batch in data.batches(size):
        if not model.dynamic_batch and len(batch) < size:
            break
        found = True
        labels = None if batch.labels is None else torch.from_numpy(np.array(batch.labels))
        inputs = {name: _fast(tensor) for name, tensor in to_torch(batch.inputs).items()}
        yield Chunk(inputs, labels, len(batch))
    if not found:
        raise DataError(
            f"The data {data.name} hold {len(data)} samples and the model takes batches of {size}. "
            f"Give at least {size} samples, or export the model with a dynamic batch."
        )


def boundary(network: Network, sites: Sequence[Decision]) -> set[str]:
    """Tensors that the suffixes of these sites read and do not compute."""
    wanted: set[str] = set()
    for site in sites:
        made = {name for index in site.suffix for name in network.steps[index].outputs}
        read = {name for index in site.suffix for name in network.steps[index].inputs}
        wanted |= read - made
    return wanted - {""} - set(network.constants)


def perturbed(
    network: Network,
    site: Decision,
    weight: Tensor | None,
    activations: Mapping[str, QParams],
    kept: Mapping[str, Tensor],
    wanted: Collection[str],
) -> dict[str, Tensor]:
    """The tensors named in `wanted` with one site quantized.

    Args:
        network: the float graph.
        site: the one that is quantized.
        weight: its rounded weight; None leaves it in float.
        activations: parameters of its tensors; those without any stay in float.
        kept: from a run in float, `boundary` at least and what is wanted.
        wanted: names.
    """
    changed: dict[str, Tensor] = {}

    def value(name: str) -> Tensor:
        return changed[name] if name in changed else network.value(kept, name)

    def own(_: int, name: str) -> Tensor:
        if weight is not None and name == site.weight:
            return weight
        rounds = site.side == "input" and name in activations
        return rounded(value(name), activations[name]) if rounds else value(name)

    for index in site.suffix:
        mine = index == site.index
        made = network.execute(index, own if mine else lambda _, name: value(name))
        for name in made.keys() & activations.keys() if site.side == "output" else ():
            made[name] = rounded(made[name], activations[name])
        changed.update(made)
        network.release(changed, index, wanted)
    return {name: changed[name] if name in changed else kept[name] for name in wanted}


def output_metrics(subject: Subject) -> Values:
    """mse, sqnr and, where there are class scores, kl and accuracy."""
    network, sites, scores = subject.network, subject.sites, subject.scores
    wanted = [*network.outputs, *({scores} - {"", *network.outputs})]
    keep = boundary(network, sites) | set(wanted)
    size = subject.fitting(keep, MAX_BATCH)
    sums = {(site.site, option): _Sums() for site in sites for option in subject.options}
    signal = dict.fromkeys(network.outputs, 0.0)
    done, total = 0, len(subject.data) * len(sites)
    title = "Quantize one site at a time"
    with subject.progress(title, total=total) as advance, torch.inference_mode():
        weights = {
            (site.site, option): rounded(network.constants[site.weight], params)
            for site in sites
            for option, params in site.weights.items()
        }
        for chunk in chunks(subject.model, subject.data, size):
            kept = network.run(chunk.inputs, keep)
            reference = _Reference(kept, network.outputs, scores, chunk.labels, subject.data.name)
            for name in network.outputs:
                signal[name] += float(kept[name].double().square().sum())
            for site in sites:
                for option in site.options:
                    weight = weights.get((site.site, option))
                    activations = site.activations.get(option, {})
                    got = perturbed(network, site, weight, activations, kept, wanted)
                    reference.compare(got, sums[site.site, option])
                advance(chunk.count)
            done += chunk.count
    values: Values = {site.site: {} for site in sites}
    for (name, option), found in sums.items():
        values[name][option] = found.metrics(signal, done, bool(scores))
    return values


@dataclass
class _Sums:
    """Over all samples, for one site and option."""

    noise: dict[str, float] = field(default_factory=dict)
    divergence: float = 0.0
    lost: float = 0.0

    def metrics(self, signal: Mapping[str, float], samples: int, classes: bool) -> dict[str, float]:
        ratios = [_ratio(self.noise.get(name, 0.0), power) for name, power in signal.items()]
        mse = bounded(sum(ratios) / len(ratios))
        values = {"mse": mse, "sqnr": -10 * math.log10(max(mse, 1 / LARGEST))}
        if classes:
            values["kl"] = bounded(self.divergence / samples)
            values["accuracy"] = self.lost / samples
        return values


class _Reference:
    """The float network's outputs for one chunk, and how others differ from them."""

    def __init__(
        self,
        values: Mapping[str, Tensor],
        outputs: Sequence[str],
        scores: str,
        labels: Tensor | None,
        source: str,
    ) -> None:
        self._outputs = {name: values[name].double() for name in outputs}
        self._scores = scores
        if not scores:
            return
        self._logarithms = torch.log_softmax(values[scores].double(), 1)
        choice = values[scores].argmax(1)
        self._labels = choice if labels is None else labels
        check_labels(self._labels, values[scores].shape[1], source)
        self._right = int((choice == self._labels).sum())

    def compare(self, got: Mapping[str, Tensor], sums: _Sums) -> None:
        for name, expected in self._outputs.items():
            other = got[name].double()
            # Masks are often -inf in both.
            error = torch.where(expected == other, 0.0, expected - other)
            sums.noise[name] = sums.noise.get(name, 0.0) + float(error.square().sum())
        if not self._scores:
            return
        others = got[self._scores].double()
        distance = self._logarithms - torch.log_softmax(others, 1)
        likely = self._logarithms.exp()
        sums.divergence += float(torch.where(likely > 0, likely * distance, 0.0).sum())
        right = (others.argmax(1) == self._labels) & ~others.isnan().any(1)
        sums.lost += self._right - int(right.sum())


def check_labels(labels: Tensor, classes: int, source: str) -> None:
    """Refuse labels that are no classes of the model.

    Raises:
        DataError: one is not in 0..classes - 1.
    """
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= classes:
        raise DataError(
            f"{source} has labels from {low} to {high}, and the model has {classes} classes, "
            f"0..{classes - 1}. Labels must number the model's own classes."
        )


def bounded(value: float) -> float:
    """A loss as a finite number, at least 0."""
    return min(max(value, 0.0), LARGEST) if not math.isnan(value) else LARGEST


def _ratio(noise: float, signal: float) -> float:
    if noise == 0:
        return 0.0
    return noise / signal if signal else LARGEST


def _fast(tensor: Tensor) -> Tensor:
    """Images with channels last, as convolutions on a CPU compute anyway."""
    return tensor.contiguous(memory_format=torch.channels_last) if tensor.ndim == 4 else tensor
