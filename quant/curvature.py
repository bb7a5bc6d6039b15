"""Second derivatives of the loss: what a perturbation of weights and activations is likely to cost.

Both estimates look at each tensor by itself; interactions between tensors are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from quant.decisions import Decision, rounded
from quant.perturbation import Chunk, Subject, Values, check_labels, chunks
from quant.spec import QParams

TOLERANCE = 0.05
"""Relative standard deviation at which a trace is good enough."""
ROUNDS = 50
"""Of probes, at most; each sees all of the data."""
HESSIAN_BATCH = 16
"""Samples that share a probe: few, so that a round averages over many probes; with fewer still
the time goes into calls (measured on a ResNet-20)."""
_FREEDOM = 8
"""Degrees of freedom below which a standard deviation is not believed."""


@dataclass(frozen=True)
class Trace:
    """An estimated trace of a Hessian.

    Attributes:
        value: the mean over rounds.
        deviation: standard deviation of `value`.
        rounds: how many there were.
    """

    value: float
    deviation: float
    rounds: int

    @property
    def settled(self) -> bool:
        """Whether it is known to within `TOLERANCE`."""
        return self.deviation <= TOLERANCE * abs(self.value)


def hessian_traces(
    tensors: Mapping[str, Tensor],
    parts: Callable[[], Iterable[tuple[int, Tensor]]],
    *,
    seed: int = 0,
    limit: int = ROUNDS,
    advance: Callable[[], None] = lambda: None,
) -> dict[str, Trace]:
    """tr(H) = E[v' H v] for each tensor's own block of the Hessian, v of random signs (Hutchinson).

    H is that of the mean loss over all samples, which come in parts: a round takes a fresh v for
    every part, so that the noise of many probes averages out at the cost of one pass over the
    data. Rounds end for a tensor when its trace is known to within `TOLERANCE`. After HAWQ-V2
    (Dong et al., arXiv 1911.03852, section 3.1).

    Args:
        tensors: leaves that need gradients.
        parts: begins another pass and yields the number of samples of each part with the mean
            loss over them.
        seed: of the probes.
        limit: rounds at most; at least 2.
        advance: called after each round.
    """
    generator = torch.Generator().manual_seed(seed)
    rounds: dict[str, list[list[float]]] = {name: [] for name in tensors}
    unsettled = dict(tensors)
    for _ in range(max(limit, 2)):
        if not unsettled:
            break
        counts: list[int] = []
        found: dict[str, list[float]] = {name: [] for name in unsettled}
        for count, loss in parts():
            counts.append(count)
            leaves = list(unsettled.values())
            slopes = torch.autograd.grad(loss, leaves, create_graph=True, allow_unused=True)
            for (name, leaf), slope in zip(unsettled.items(), slopes, strict=True):
                found[name].append(count * _probe(leaf, slope, generator))
        for name, values in found.items():
            rounds[name].append([value / sum(counts) for value in values])
        advance()
        unsettled = {n: leaf for n, leaf in unsettled.items() if not _is_known(rounds[n])}
    return {name: _trace(values) for name, values in rounds.items()}


def fisher_metric(subject: Subject) -> Values:
    """fisher: 1/2 mean_n sum_i g_ni**2 d_i**2, the loss that a site's rounding is to add.

    g_n is the gradient of one sample's loss and d what rounding adds, over the weight and the
    activations of the site; the mean of g_n**2 is the diagonal of the empirical Fisher matrix. The
    square of a batch's gradient would not do: it holds the products of different samples too.
    """
    network, sites = subject.network, subject.sites
    leaves = _leaves(subject)
    diagonals = {name: torch.zeros_like(leaf) for name, leaf in leaves.items()}
    sums = {(site.site, option): 0.0 for site in sites for option in subject.options}
    done = 0
    with subject.progress("Fisher information", total=len(subject.data)) as advance:
        for chunk in chunks(subject.model, subject.data, 1):
            seen: dict[tuple[int, str], Tensor] = {}
            losses = _losses(subject, leaves, chunk, seen)
            steps = _squared_steps(sites, seen)
            for squares in _squared_gradients(losses, [*leaves.values(), *seen.values()]):
                for diagonal, square in zip(diagonals.values(), squares, strict=False):
                    diagonal += square
                for step, square in zip(steps, squares[len(leaves) :], strict=True):
                    for key, squared in step.items():
                        sums[key] += float((squared * square).sum())
            done += chunk.count
            advance(chunk.count)
    for site in sites:
        for option, params in site.weights.items():
            squared = _squared_step(network.constants[site.weight], params)
            sums[site.site, option] += float((squared * diagonals[site.site]).sum())
    found: Values = {site.site: {} for site in sites}
    for (name, option), total in sums.items():
        found[name][option] = {"fisher": total / (2 * done)}
    return found


def hutchinson_metric(
    subject: Subject, seed: int = 0, limit: int = ROUNDS
) -> tuple[Values, dict[str, Trace]]:
    """hutchinson: tr(H) / n ||Q(W) - W||**2, and the traces by site.

    H is the Hessian of the mean loss in the n weights of a site.
    """
    leaves = _leaves(subject)
    size = subject.fitting(subject.network.producer, HESSIAN_BATCH)

    def parts() -> Iterator[tuple[int, Tensor]]:
        for chunk in chunks(subject.model, subject.data, size):
            yield chunk.count, _losses(subject, leaves, chunk, {}).mean()

    with subject.progress("Hessian traces", total=limit) as advance:
        traces = hessian_traces(leaves, parts, seed=seed, limit=limit, advance=advance)
    values: Values = {}
    for site in subject.sites:
        values[site.site] = {option: {"hutchinson": 0.0} for option in subject.options}
        for option, params in site.weights.items():
            weight = subject.network.constants[site.weight]
            squared = float(_squared_step(weight, params).sum())
            loss = traces[site.site].value / weight.numel() * squared
            values[site.site][option]["hutchinson"] = loss
    return values, traces


def _leaves(subject: Subject) -> dict[str, Tensor]:
    """A leaf that needs gradients for the weight of each site; a shared weight has several."""
    constants = subject.network.constants
    return {
        site.site: constants[site.weight].detach().clone().requires_grad_()
        for site in subject.sites
        if site.weight
    }


def _losses(
    subject: Subject,
    leaves: Mapping[str, Tensor],
    chunk: Chunk,
    seen: dict[tuple[int, str], Tensor],
) -> Tensor:
    """Cross-entropy of each sample as a function of the leaves.

    Without labels the class that the model chooses takes their place. `seen` receives the
    activations of each site, by the index of its step and their name.
    """
    network, scores = subject.network, subject.scores
    values = dict(chunk.inputs)
    at = {site.index: site for site in subject.sites}
    behind = {n: s.index for s in subject.sites if s.side == "output" for n in s.tensors}
    for index in range(len(network.steps)):
        site = at.get(index)

        def read(_: int, name: str, site: Decision | None = site) -> Tensor:
            if site is not None and name == site.weight:
                return leaves[site.site]
            value = network.value(values, name)
            if site is None or site.side == "output" or name not in site.tensors:
                return value
            # A tensor of its own, so that the gradient is this site's and no other reader's.
            return seen.setdefault((site.index, name), _with_gradient(value.view_as(value)))

        made = network.execute(index, read)
        for name in made.keys() & behind.keys():
            made[name] = seen[behind[name], name] = _with_gradient(made[name])
        values.update(made)
        network.release(values, index, {scores})
    labels = values[scores].detach().argmax(1) if chunk.labels is None else chunk.labels
    check_labels(labels, values[scores].shape[1], subject.data.name)
    return F.cross_entropy(values[scores], labels, reduction="none")


def _with_gradient(tensor: Tensor) -> Tensor:
    """The tensor, or a leaf in its place where no weight comes before it."""
    return tensor if tensor.requires_grad else tensor.detach().requires_grad_()


def _squared_steps(
    sites: Sequence[Decision], seen: Mapping[tuple[int, str], Tensor]
) -> list[dict[tuple[str, str], Tensor]]:
    """What rounding adds to each tensor, squared, by site and option."""
    at = {site.index: site for site in sites}
    return [
        {
            (at[index].site, option): _squared_step(tensor.detach(), params[name])
            for option, params in at[index].activations.items()
        }
        for (index, name), tensor in seen.items()
    ]


def _squared_gradients(losses: Tensor, tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """For each sample's loss the squared gradient of each tensor; one backward pass each."""
    for row, loss in enumerate(losses):
        slopes = torch.autograd.grad(
            loss,
            tensors,
            retain_graph=row + 1 < len(losses),
            allow_unused=True,
            materialize_grads=True,
        )
        yield [slope.square() for slope in slopes]


def _squared_step(tensor: Tensor, params: QParams) -> Tensor:
    return (rounded(tensor, params) - tensor).square_()


def _probe(leaf: Tensor, slope: Tensor | None, generator: torch.Generator) -> float:
    """One v' H v; a slope that does not depend on the leaf has no curvature."""
    if slope is None or not slope.requires_grad:
        return 0.0
    signs = torch.randint(0, 2, leaf.shape, generator=generator).to(leaf.dtype) * 2 - 1
    (product,) = torch.autograd.grad(slope, leaf, signs, retain_graph=True, allow_unused=True)
    return 0.0 if product is None else float((signs * product).sum(dtype=torch.float64))


def _trace(rounds: Sequence[Sequence[float]]) -> Trace:
    """Parts have traces of their own, so the noise is what differs between rounds of one part."""
    values = np.asarray(rounds)  # (rounds, parts)
    noise = values.var(axis=0, ddof=1).sum() / len(values)
    return Trace(float(values.sum(axis=1).mean()), float(np.sqrt(noise)), len(values))


def _is_known(rounds: Sequence[Sequence[float]]) -> bool:
    freedom = (len(rounds) - 1) * len(rounds[0])
    return freedom >= _FREEDOM and _trace(rounds).settled
