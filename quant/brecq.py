"""Roundings and activation scales of a whole block, learned so that its output stays.

BRECQ: Li et al. 2021, arXiv 2102.05426. Layers of a block make up for each other's errors, and what
an activation function cuts off does not count, neither of which a single layer can see.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from compress.torch_graph.network import Network
from quant.blocks import Piece, Walk
from quant.learned import LearnedScale, fixed_scales, scale_ceilings, shared_tensors
from quant.rounding import RATE, SoftRounding, exponent_at, pull
from quant.simulation import Simulation
from quant.sites import Site

TRUST = 0.5
"""How far the soft roundings begin from the weights, towards the roundings chosen before."""
BIAS_RATE = 1e-3
"""Of Adam, relative to the mean size of a bias."""
SCALE_RATE = 4e-3
"""Of Adam, for the logarithms of scales; it falls to 0 along a cosine."""


class Block:
    """A piece of a network with the outputs that it should have.

    Attributes:
        walk: in front of the piece.
        piece: what is learned.
        importance: factors on the squared errors of outputs, by name; see `fisher`.
    """

    def __init__(self, walk: Walk, piece: Piece, importance: Mapping[str, Tensor]) -> None:
        self.walk, self.piece, self.importance = walk, piece, importance
        with torch.no_grad():
            runs = (walk.run_float(b, piece.steps.stop, piece.outputs) for b in walk.floats)
            self._targets = [{name: run[name] for name in piece.outputs} for run in runs]

    def __len__(self) -> int:
        """Number of batches."""
        return len(self._targets)

    def loss(self, index: int) -> Tensor:
        """Squared error of one batch: the sum over channels, the mean over all else."""
        values = self.walk.run_rounded(
            self.walk.rounded[index], self.piece.steps.stop, self.piece.outputs
        )
        losses = []
        for name, target in self._targets[index].items():
            error = (self.walk.simulation.seen(values, name) - target).square()
            if name in self.importance:
                error = error * self.importance[name]
            losses.append(error.mean() * (target.shape[1] if target.ndim > 1 else 1))
        return torch.stack(losses).sum()

    @torch.no_grad()
    def error(self) -> float:
        """Mean loss of all batches."""
        return sum(self.loss(index).item() for index in range(len(self))) / len(self)


def learn_roundings(
    block: Block,
    sites: Sequence[Site],
    iterations: int,
    generator: torch.Generator,
    seconds: float = math.inf,
) -> list[Site]:
    """The sites with roundings and biases that give the block a smaller error.

    The simulation holds them then. Where the error did not fall, everything stays as it was. With
    less time than the iterations need they are fewer, and what depends on progress goes faster.
    """
    simulation = block.walk.simulation
    before = block.error()
    kept = dict(simulation.rounded), dict(simulation.values)
    soft = [SoftRounding(site.rounding, _between(site)) for site in sites]
    start = {site.bias: simulation.constant(site.bias) for site in sites if site.bias}
    shifts = {name: torch.zeros_like(bias).requires_grad_() for name, bias in start.items()}
    groups = [{"params": [one.logits for one in soft], "lr": RATE}]
    if shifts:
        groups.append({"params": list(shifts.values()), "lr": BIAS_RATE})

    def prepare(progress: float) -> Tensor | float:
        for site, one in zip(sites, soft, strict=True):
            simulation.rounded[site.weight] = site.tensor(one.values())
        for name, shift in shifts.items():
            simulation.values[name] = start[name] + shift * start[name].abs().mean()
        exponent = exponent_at(progress)
        return pull(soft, exponent) if exponent else 0.0

    _minimise(block, groups, prepare, before, iterations, generator, seconds)
    with torch.no_grad():
        prepare(1.0)
        learned = [
            dataclasses.replace(site, integers=one.integers())
            for site, one in zip(sites, soft, strict=True)
        ]
        simulation.rounded |= {site.weight: site.rounded() for site in learned}
    if block.error() < before:
        return learned
    simulation.rounded, simulation.values = kept
    return list(sites)


def _between(site: Site) -> Tensor:
    """Where soft roundings begin: inside of (0, 1), so that each can still change its mind."""
    rounding = site.rounding
    chosen = (site.integers - rounding.floor).clamp(0, 1)
    return torch.lerp(rounding.fraction, chosen, TRUST).clamp(0.01, 0.99)


def learn_scales(
    block: Block,
    scales: Sequence[tuple[LearnedScale, tuple[str, ...]]],
    iterations: int,
    generator: torch.Generator,
    seconds: float = math.inf,
) -> bool:
    """Learn scales of activations that are made in the block (LSQ: Esser et al. 2020).

    Args:
        block: with its roundings chosen.
        scales: each with the tensors that share it; see `block_scales`.
        iterations: steps of Adam.
        generator: chooses batches.
        seconds: to take at most, as in `learn_roundings`.

    Returns:
        whether the error fell; if not, the simulation has its scales back.
    """
    simulation = block.walk.simulation
    before, kept = block.error(), dict(simulation.scales)
    parameters = [p for scale, _ in scales for p in scale.parameters.values()]
    groups = [{"params": parameters, "lr": SCALE_RATE, "falls": True}]

    def prepare(_: float) -> float:
        for scale, names in scales:
            scale.restrain()
            value = scale.value(simulation.plan.activations[names[0]].spec.dtype)
            simulation.scales |= dict.fromkeys(names, value)
        return 0.0

    _minimise(block, groups, prepare, before, iterations, generator, seconds)
    with torch.no_grad():
        prepare(1.0)
    if block.error() < before:
        return True
    simulation.scales = kept
    return False


def block_scales(
    simulation: Simulation, piece: Piece
) -> list[tuple[LearnedScale, tuple[str, ...]]]:
    """Scales of integers that only tensors made in the piece have, and no operator dictates."""
    network, plan = simulation.network, simulation.plan
    made = {name for index in piece.steps for name in network.steps[index].outputs}
    fixed, ceilings = fixed_scales(network, plan), scale_ceilings(network, plan)
    scales = []
    for names in shared_tensors(plan):
        params = plan.activations[names[0]]
        free = params.spec.integer and not params.spec.power_of_two
        if free and made.issuperset(names) and fixed.isdisjoint(names):
            largest = min(ceilings.get(name, math.inf) for name in names)
            scales.append((LearnedScale(params, largest=largest), names))
    return scales


def _minimise(
    block: Block,
    groups: Sequence[dict[str, object]],
    prepare: Callable[[float], Tensor | float],
    unit: float,
    iterations: int,
    generator: torch.Generator,
    seconds: float,
) -> None:
    """Adam on the block's error in units of `unit` plus what `prepare` adds.

    The learning rate of a group with "falls" goes to 0 along a cosine.
    """
    optimizer = torch.optim.Adam(groups)
    rates = [group["lr"] for group in optimizer.param_groups]
    start = time.perf_counter()
    for iteration in range(iterations):
        progress = iteration / iterations
        if math.isfinite(seconds):
            progress = max(progress, (time.perf_counter() - start) / max(seconds, 1e-9))
        if progress >= 1:
            return
        extra = prepare(progress)
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            if group.get("falls"):
                group["lr"] = rate * (1 + math.cos(math.pi * progress)) / 2
        index = int(torch.randint(len(block), (1,), generator=generator))
        loss = block.loss(index) / max(unit, 1e-30) + extra
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()


def fisher(
    reference: Network,
    names: Iterable[str],
    batches: Sequence[Mapping[str, Tensor]],
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """How much the network's output depends on each element of some tensors, with mean 1.

    The diagonal of the Fisher matrix: E[(dL/dz)^2] with L = -log p(y | x) and y drawn from the
    network's own p, which is half the curvature of the KL divergence (BRECQ, section 3.3, takes
    it for the Hessian). Outputs of shape (N, classes) are class scores, or probabilities behind a
    Softmax; any other output z is the mean of a normal distribution, so that L = v z with v ~ N.

    Args:
        reference: the float network.
        names: of the tensors.
        batches: inputs.
        generator: draws classes and v.

    Returns:
        by name, of the tensor's shape with axis 0 of size 1.
    """
    wanted = list(names)
    sums: dict[str, Tensor] = {}
    for batch in batches:
        values: dict[str, Tensor] = dict(batch)
        held: dict[str, Tensor] = {}
        for index, step in enumerate(reference.steps):
            reference.advance(index, values)
            for name in step.outputs:
                if name in wanted:
                    held[name] = values[name] = _watched(values[name])
            reference.release(values, index, reference.outputs)
        outputs = [(name, reference.value(values, name)) for name in reference.outputs]
        losses = [_surprise(reference, n, z, generator) for n, z in outputs if z.requires_grad]
        if not losses:
            return {}
        found = torch.autograd.grad(
            torch.stack(losses).sum(), list(held.values()), allow_unused=True
        )
        for name, gradient in zip(held, found, strict=True):
            if gradient is not None:
                squares = gradient.square().mean(0, keepdim=True)
                sums[name] = sums.get(name, 0.0) + squares
    means = {name: total.mean() for name, total in sums.items()}
    return {name: total / means[name] for name, total in sums.items() if means[name] > 0}


def _watched(tensor: Tensor) -> Tensor:
    return tensor if tensor.requires_grad else tensor.detach().requires_grad_()


def _surprise(reference: Network, name: str, z: Tensor, generator: torch.Generator) -> Tensor:
    """-log p of an outcome drawn from the output, summed over samples; up to a constant."""
    if z.ndim != 2 or z.shape[1] < 2:
        return (z * torch.randn(z.shape, generator=generator)).sum()
    producer = reference.steps[reference.producer[name]].op
    scores = z.clamp_min(1e-12).log() if producer == "Softmax" else z
    logarithms = torch.log_softmax(scores, 1)
    drawn = torch.multinomial(logarithms.detach().exp(), 1, generator=generator)
    return -logarithms.gather(1, drawn).sum()
