"""Reconstruction: roundings of weights with which each layer, or block, computes what it did.

A learned rounding needs no format of its own: the float weight becomes exactly the number that its
integer stands for, and rounding to nearest finds that integer again.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from compress.data import Data
from compress.errors import UnsupportedError, UsageError
from compress.graph import graph_sites
from compress.model import Model
from compress.passes import Context
from compress.rewrites import with_constants
from compress.target import Target
from compress.torch_graph.network import Network
from quant.blocks import Piece, Walk, batches_of, cut, data_sizes
from quant.brecq import Block, block_scales, fisher, learn_roundings, learn_scales
from quant.calibration import calibration_data
from quant.correct import with_biases
from quant.moments import Moments, sampled_rows
from quant.refine import emitted, state_of
from quant.rounding import Rounding, choose, relax
from quant.simulation import Simulation
from quant.sites import Site, refusal, rounding_of
from quant.spec import QParams
from quant.sweep import Layer, fitting_samples, layers

Granularity = Literal["layer", "block"]
Solver = Literal["descent", "adaround"]

ROWS = 16384
"""Positions that a layer's moments are taken over, at most."""
MEMORY_BYTES = 512_000_000
"""Of what is kept of all samples between two pieces of the network."""
COPIES = 4
"""Of each kept tensor: in float, quantized, before that rounding, and a block's targets."""
LARGEST_MACS = 4e11
"""Of one run over all samples; networks for large images get by with fewer samples."""
FEWEST_SAMPLES = 64
"""However large the network is, unless memory sets the limit."""


@dataclass(frozen=True, kw_only=True)
class Reconstruct:
    """Choose for every weight whether it is rounded up or down, by what its layer computes then.

    Layer by layer (AdaRound: Nagel et al. 2020, arXiv 2004.10568): the output's error, with the
    inputs that the quantized network before it really gives, is a quadratic form of the roundings;
    it is minimised directly, and the bias takes the mean of what is left. Block by block (BRECQ:
    Li et al. 2021, arXiv 2102.05426): from there, roundings, biases and activation scales of a
    residual block are learned together.

    Attributes:
        granularity: "layer", seconds for a small network, or "block", minutes.
        samples: calibration samples at most; fewer where their activations need much memory or
            the network is large.
        solver: of a layer: "descent" is coordinate descent on the roundings themselves,
            "adaround" the continuous relaxation that AdaRound learns.
        iterations: steps of Adam for each block, or for each layer of solver "adaround".
        batch: samples in one of these steps.
        seconds: most time in all. Blocks are learned in fewer iterations then, or not at all;
            layers that it does not suffice for are rounded to nearest.
        refit_bias: let the bias take the mean error of its layer's outputs.
        learn_scales: learn scales of activations too, block by block.
        fisher: weight errors of a block's output by how much the network's output depends on each
            element.
    """

    granularity: Granularity = "layer"
    samples: int = 1024
    solver: Solver = "descent"
    iterations: int = 500
    batch: int = 32
    seconds: float | None = None
    refit_bias: bool = True
    learn_scales: bool = True
    fisher: bool = False

    name: ClassVar[str] = "reconstruct"
    stage: ClassVar[Literal["onnx"]] = "onnx"
    refines: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for field_name, choices in (("granularity", Granularity), ("solver", Solver)):
            value = getattr(self, field_name)
            if value not in get_args(choices):
                allowed = ", ".join(get_args(choices))
                raise UsageError(f"reconstruct: {field_name} is {value!r}; choose from {allowed}.")
        for field_name in ("samples", "iterations", "batch"):
            value = getattr(self, field_name)
            if value < 1:
                raise UsageError(f"reconstruct: {field_name} is {value} and must be at least 1.")
        if self.seconds is not None and not self.seconds > 0:
            raise UsageError(f"reconstruct: seconds is {self.seconds} and must be above 0.")

    def check(self, model: Model, target: Target) -> None:
        """Applies to every target."""

    def apply(self, model: Model, context: Context) -> Model:
        """The same plan with other weights and biases, and in block mode other scales.

        Raises:
            UnsupportedError: there are no data to run, or the graph cannot be simulated.
            DataError: there is no whole batch for a model with a fixed batch size.
        """
        start = time.perf_counter()
        state = with_biases(state_of(model, self.name))
        data, origin = calibration_data(model, context, self.samples)
        if data is None:
            raise UnsupportedError(
                "Pass reconstruct needs to run the network, and there are no data to do that with. "
                "Give --calibration."
            )
        work = _Work(
            self,
            Network(state.reference),
            Simulation.of(state),
            deadline=math.inf if self.seconds is None else start + self.seconds,
            generator=torch.Generator().manual_seed(context.seed),
        )
        macs = sum(site.macs for site in graph_sites(state.reference))
        samples = work.run(model, data, macs, context)
        graph_model = with_constants(state.graph_model, work.constants())
        plan = dataclasses.replace(
            state.plan, activations={**state.plan.activations, **work.scales}
        )
        ratios = [after / before for before, after in work.errors.values() if before > 0]
        details: Mapping[str, Any] = {
            "data": origin,
            "samples": samples,
            "layers": len(work.sites),
            "left": work.left,
            "skipped": work.skipped,
            "error_ratio": float(np.exp(np.mean(np.log(ratios)))) if ratios else 1.0,
            "blocks": work.blocks,
            "scales": len(work.scales),
            "seconds": time.perf_counter() - start,
        }
        after = dataclasses.replace(state, graph_model=graph_model, plan=plan)
        return emitted(model, after, self.name, dataclasses.asdict(self), details)


@dataclass
class _Work:
    """One reconstruction on its way.

    Attributes:
        options: of the pass.
        reference: what is to be computed.
        simulation: the quantized network; it holds what was chosen.
        deadline: moment of `time.perf_counter` at which to stop.
        generator: of everything random.
        sites: layers with chosen roundings.
        skipped: layers that stay as they are, and why.
        left: number of layers that there was no time for.
        layer_seconds: that the layers took so far.
        errors: of each layer's output, rounded to nearest and as chosen.
        blocks: number of blocks that learning improved.
        scales: learned ones, by tensor.
    """

    options: Reconstruct
    reference: Network
    simulation: Simulation
    deadline: float
    generator: torch.Generator
    sites: list[Site] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    left: int = 0
    layer_seconds: float = 0.0
    errors: dict[str, tuple[float, float]] = field(default_factory=dict)
    blocks: int = 0
    scales: dict[str, QParams] = field(default_factory=dict)

    def run(self, model: Model, data: Data, macs: int, context: Context) -> int:
        """Reconstruct every layer that can be; the number of samples that were used."""
        found = {layer.index: layer for layer in layers(self.simulation)}
        reasons = {i: refusal(self.reference, self.simulation.plan, x) for i, x in found.items()}
        self.skipped = {found[i].step.name: reason for i, reason in reasons.items() if reason}
        todo = [index for index, reason in reasons.items() if not reason]
        size = fitting_samples(model, min(self.options.batch, self.options.samples, len(data)))
        first = batches_of(model, data, size, 1)
        sizes = data_sizes(self.reference, first[0])
        pieces = cut(self.reference, sorted(found), sizes)
        crossing = [tuple(first[0]), *(piece.border for piece in pieces)]
        kept = max(sum(sizes[name] for name in names) for names in crossing) / size
        affordable = max(LARGEST_MACS / max(macs, 1), FEWEST_SAMPLES)
        fitting = max(MEMORY_BYTES / (COPIES * 4 * kept), size)
        samples = int(min(self.options.samples, affordable, fitting))
        batches = batches_of(model, data.take(samples), size, samples)
        importance = {}
        if self.options.fisher and self.options.granularity == "block":
            names = [name for piece in pieces for name in piece.outputs]
            importance = fisher(self.reference, names, batches, self.generator)
        walk = Walk(self.reference, self.simulation, batches)
        with context.progress("Reconstruct", total=len(todo)) as advance:
            for piece in pieces:
                for_now = [found[i] for i in piece.layers if i in todo]
                if time.perf_counter() > self.deadline:
                    self.left += len(for_now)
                    continue
                behind = len(todo) - len(self.sites) - self.left - len(for_now)
                self._piece(walk, piece, for_now, importance, behind)
                advance(len(for_now))
                walk.advance(piece.steps.stop)
        return min(len(data), len(batches) * size)

    def _piece(
        self,
        walk: Walk,
        piece: Piece,
        todo: Sequence[Layer],
        importance: Mapping[str, Tensor],
        behind: int,
    ) -> None:
        """Reconstruct one piece that has `behind` layers after it."""
        sites = []
        for layer in todo:
            start = time.perf_counter()
            if start > self.deadline:
                self.left += 1
            else:
                sites.append(self._layer(walk, layer))
                self.layer_seconds += time.perf_counter() - start
        if self.options.granularity == "block" and sites:
            block = Block(walk, piece, importance)
            sites = self._block(block, sites, self._share(len(sites), behind))
        self.sites += sites

    def _share(self, layers: int, behind: int) -> float:
        """Seconds to learn a block of so many layers, so that those behind it get theirs, too."""
        each = self.layer_seconds / (len(self.sites) + layers)
        free = self.deadline - time.perf_counter() - each * behind
        return max(0.0, free * layers / (layers + behind))

    def _layer(self, walk: Walk, layer: Layer) -> Site:
        """Choose one layer's roundings, and its bias."""
        simulation, step = self.simulation, layer.step
        rounding = rounding_of(simulation, layer)
        shape = simulation.constant(layer.weight).shape
        bias = layer.bias if self.options.refit_bias and self._own(layer, rounding) else ""
        moments = self._moments(walk, layer, rounding)
        quadratic = moments.quadratic(centred=bool(bias))
        if self.options.solver == "adaround":
            integers = relax(rounding, quadratic, self.options.iterations)
        else:
            integers = choose(rounding, quadratic)
        change = rounding.values(integers) - rounding.weight
        nearest = rounding.values(rounding.nearest) - rounding.weight
        self.errors[step.name] = quadratic.error(nearest), quadratic.error(change)
        site = Site(step, layer.weight, bias, rounding, integers, shape)
        simulation.rounded[site.weight] = site.rounded()
        if bias:
            x, r = moments.means
            shift = (x[:, :, None] * change).sum(1) + r
            before = simulation.constant(bias)
            simulation.replace(bias, (before - shift.reshape(before.shape)).to(before.dtype))
        return site

    @torch.no_grad()
    def _moments(self, walk: Walk, layer: Layer, rounding: Rounding) -> Moments:
        """Of what the layer reads, and of its error with float weights."""
        step, shape = layer.step, self.simulation.constant(layer.weight).shape
        bias = torch.zeros(rounding.outputs)
        if layer.bias:
            bias = self.simulation.constant(layer.bias).float().reshape(-1).expand(rounding.outputs)
        moments = None
        for floats, rounded in walk.up_to(layer.index):
            self.reference.advance(layer.index, floats)
            x, y = self.simulation.seen(rounded, step.inputs[0]), floats[layer.output]
            count = max(1, ROWS // len(walk.floats))
            rows, wanted = sampled_rows(step, x, y, shape, count, self.generator)
            error = rows @ rounding.weight + bias.reshape(len(rows), 1, -1) - wanted
            if moments is None:
                moments = Moments(rows, error)
            else:
                moments.add(rows, error)
        assert moments is not None
        return moments

    def _own(self, layer: Layer, rounding: Rounding) -> bool:
        """Whether the layer has a bias of one number for each output that nobody else reads."""
        constants = self.simulation.network.constants
        if layer.bias not in constants or len(self.simulation.network.readers[layer.bias]) > 1:
            return False
        return constants[layer.bias].numel() == rounding.outputs

    def _block(self, block: Block, sites: list[Site], seconds: float) -> list[Site]:
        """Learn what is in one block: roundings in half of the time, scales in the other."""
        options, half = self.options, seconds / 2
        learned = learn_roundings(block, sites, options.iterations, self.generator, half)
        self.blocks += any(a is not b for a, b in zip(learned, sites, strict=True))
        scales = block_scales(self.simulation, block.piece) if options.learn_scales else []
        if scales and learn_scales(block, scales, options.iterations, self.generator, half):
            for scale, names in scales:
                dtype = self.simulation.plan.activations[names[0]].spec.dtype
                self.scales |= dict.fromkeys(names, scale.qparams(dtype))
        return learned

    def constants(self) -> dict[str, np.ndarray]:
        """Weights and biases to write into the float graph."""
        arrays = {site.weight: site.rounded().numpy() for site in self.sites}
        biases = {site.bias for site in self.sites if site.bias}
        return arrays | {name: self.simulation.constant(name).detach().numpy() for name in biases}
