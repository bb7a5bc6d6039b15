"""LayerNorm on its way to a BatchNorm, in the course of a training."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from compress.data import Batch
from compress.fine_tuning import Course
from compress.model import Model
from compress.reparam.layernorm_graph import Affine, Norm
from compress.rewrites import new_constant, replace_node
from compress.teaching import Teaching
from compress.torch_graph.network import Network, to_torch
from compress.training import Score

if TYPE_CHECKING:
    from compress.fine_tuning import Arrays

PREPBN = "PRepBN"
"""Stands for a LayerNorm in the graph that is trained; there is no such ONNX operator."""
PARTS = ("gamma", "beta", "alpha")
STATISTICS = ("mean", "variance")
MOMENTUM = 0.1
"""Of running statistics, as in torch's BatchNorm."""
EPSILON = 1e-5


@dataclass(frozen=True)
class Fit:
    """The map y = a x + c of each channel that is nearest to a LayerNorm on data.

    Attributes:
        mean: of x, (C,).
        variance: of x, (C,).
        map: a and c.
        error: squared error, relative to the variance of y.
    """

    mean: np.ndarray
    variance: np.ndarray
    map: Affine
    error: float

    def parameters(self) -> dict[str, np.ndarray]:
        """Of a RepBN that computes it: gamma and beta (C,), alpha of no axes."""
        a, c = self.map
        gamma = a * np.sqrt(self.variance + EPSILON)
        return {"gamma": gamma, "beta": c + a * self.mean, "alpha": np.zeros(())}


class PRepBN:
    """share LN(x) + (1 - share) RepBN(x), with RepBN(x) = BN(x) + alpha x.

    SLAB (Guo et al. 2024, arXiv 2405.11582, section 3.1); there share is called lambda.

    Attributes:
        share: 1 is the LayerNorm; 0 is the BatchNorm.
        learns: use the statistics of the batch, and update the running ones.
        statistics: running mean and variance (C,), by the name of the LayerNorm.
    """

    def __init__(self, statistics: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        self.share, self.learns = 1.0, False
        self.statistics = dict(statistics)

    def __call__(
        self,
        attributes: Mapping[str, Any],
        x: Tensor,
        scale: Tensor,
        bias: Tensor | None,
        gamma: Tensor,
        beta: Tensor,
        alpha: Tensor,
    ) -> Tensor:
        """Of x (..., C); the others are (C,), alpha has no axes."""
        mean, variance = self._statistics(attributes["site"], x)
        made = (x - mean) * (gamma / torch.sqrt(variance + EPSILON)) + beta + alpha * x
        if self.share == 0:
            return made
        epsilon = attributes.get("epsilon", 1e-5)
        return torch.lerp(made, F.layer_norm(x, scale.shape, scale, bias, epsilon), self.share)

    def _statistics(self, site: str, x: Tensor) -> tuple[Tensor, Tensor]:
        running = self.statistics[site]
        rows = x.reshape(-1, x.shape[-1])
        if not self.learns or len(rows) < 2:
            return running
        mean, variance = rows.mean(0), rows.var(0, unbiased=False)
        with torch.no_grad():
            for old, new in zip(running, (mean, variance), strict=True):
                old.lerp_(new, MOMENTUM)
        return mean, variance


def fit_norms(
    model: Model, norms: Sequence[Norm], batches: Iterable[Mapping[str, np.ndarray]]
) -> dict[str, Fit]:
    """The nearest map of each LayerNorm on some batches, by its name."""
    network = Network(model.graph_model)
    names = {name for norm in norms for name in (norm.source, norm.out)}
    sums = {norm.name: np.zeros((6, norm.channels)) for norm in norms}
    with torch.no_grad():
        for inputs in batches:
            found = network.run(to_torch(inputs), names)
            for norm in norms:
                x, y = (
                    found[name].double().reshape(-1, norm.channels).numpy()
                    for name in (norm.source, norm.out)
                )
                moments = [np.ones_like(x), x, y, x * x, x * y, y * y]
                sums[norm.name] += [moment.sum(0) for moment in moments]
    return {name: _fit(total) for name, total in sums.items()}


def _fit(total: np.ndarray) -> Fit:
    x, y, xx, xy, yy = total[1:] / total[0]
    variance = np.maximum(xx - x * x, 0)
    covariance = xy - x * y
    a = covariance / np.maximum(variance, 1e-12)
    spread = np.maximum(yy - y * y, 0)
    error = float(np.maximum(spread - a * covariance, 0).sum() / max(spread.sum(), 1e-12))
    return Fit(x, variance, (a, y - a * x), error)


def student_of(model: Model, norms: Sequence[Norm], fits: Mapping[str, Fit]) -> Network:
    """The network whose LayerNorms become BatchNorms; its `operators` hold the `PRepBN`."""
    graph_model = model.graph_model.clone()
    graph = graph_model.graph
    nodes = {node.name: node for node in graph}
    for norm in norms:
        node = nodes[norm.name]
        made = [
            new_constant(graph, array.astype(np.float32), _name(norm.name, part))
            for part, array in fits[norm.name].parameters().items()
        ]
        given = [*node.inputs, None][:3]
        attributes = [*node.attributes.values(), ir.AttrString("site", norm.name)]
        replace_node(graph, node, [ir.Node("", PREPBN, [*given, *made], attributes)])
    statistics = {
        norm.name: (_float(fits[norm.name].mean), _float(fits[norm.name].variance))
        for norm in norms
    }
    return Network(graph_model, {PREPBN: PRepBN(statistics)})


def _float(array: np.ndarray) -> Tensor:
    return torch.from_numpy(array.astype(np.float32))


def _name(norm: str, part: str) -> str:
    return f"{norm}.repbn.{part}"


def folded_map(norm: str, arrays: Arrays) -> Affine:
    """A = gamma / sigma + alpha and c = beta - gamma mu / sigma, from a state of `Replacing`."""
    gamma, beta, alpha, mean, variance = (
        arrays[_name(norm, part)].astype(np.float64) for part in (*PARTS, *STATISTICS)
    )
    factor = gamma / np.sqrt(variance + EPSILON)
    return factor + alpha, beta - factor * mean


class Replacing(Course):
    """A training in which LayerNorms become BatchNorms; judged as what they will be.

    Args:
        network: of `student_of`.
        teaching: by the original.
        rate: largest learning rate.
        until: share of the training after which nothing of a LayerNorm is left.
    """

    def __init__(
        self, network: Network, teaching: Teaching[Arrays], rate: float, until: float
    ) -> None:
        super().__init__(network, teaching, rate)
        operator = network.operators[PREPBN]
        assert isinstance(operator, PRepBN)
        self.norm, self.until = operator, until
        for name in (_name(norm, part) for norm in operator.statistics for part in PARTS):
            self.weights[name] = torch.nn.Parameter(network.constants[name].clone())
        network.constants.update(self.weights)

    def begin(self, progress: float) -> None:
        """The share of LayerNorm falls with every step."""
        self.norm.share = max(0.0, 1 - progress / self.until)

    def loss(self, batch: Batch) -> Tensor:
        """With the statistics of the batch."""
        self.norm.learns = True
        try:
            return super().loss(batch)
        finally:
            self.norm.learns = False

    def score(self) -> Score:
        """Of the network with running statistics and without LayerNorm, whatever it is now."""
        now, self.norm.share = self.norm.share, 0.0
        try:
            return super().score()
        finally:
            self.norm.share = now

    def state(self) -> Arrays:
        """Weights and running statistics."""
        running = {
            _name(norm, part): tensor.numpy().copy()
            for norm, pair in self.norm.statistics.items()
            for part, tensor in zip(STATISTICS, pair, strict=True)
        }
        return {**super().state(), **running}


def set_state(network: Network, arrays: Arrays) -> None:
    """Give a student a state of `Replacing`, without anything of its LayerNorms."""
    operator = network.operators[PREPBN]
    assert isinstance(operator, PRepBN)
    operator.share, operator.learns = 0.0, False
    tensors = to_torch(arrays)
    network.constants.update({n: t for n, t in tensors.items() if n in network.constants})
    for norm in operator.statistics:
        mean, variance = (tensors[_name(norm, part)] for part in STATISTICS)
        operator.statistics[norm] = (mean, variance)
