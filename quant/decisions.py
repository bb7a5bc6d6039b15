"""What can be decided about a network under a plan: the formats of each multiply-accumulate.

A decision covers a site's weight together with the tensor that it writes, or those that it reads;
granularity, signedness and symmetry stay as the plan has them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, cast

import torch
from torch import Tensor

from compress.data import Data
from compress.errors import UsageError
from compress.model import Model
from compress.progress import Progress, silent
from compress.torch_graph.network import Network
from quant.calibration import observe
from quant.fake import fake_quantize
from quant.observers import HistogramObserver, RangeMethod, find_range
from quant.plan import QuantPlan
from quant.quantizer import qparams_from_range
from quant.spec import FORMATS, DType, FloatFormat, QParams, QuantSpec
from quant.weight_scale import narrow_weight

Side = Literal["output", "input"]
"""Which activations belong to a site: the tensor behind it, or the ones that it reads. On either
side every tensor between two sites is counted once; a plan made by readers wants "input"."""


@dataclass(frozen=True)
class Option:
    """Formats for one site.

    Attributes:
        weight: a key of `FORMATS`; None leaves the weight in float.
        activation: the same for the tensor on the `Side` of the site that counts. Of integers
            the width counts: the plan says whether they are signed.
    """

    weight: DType | None
    activation: DType | None

    def __post_init__(self) -> None:
        for given in (self.weight, self.activation):
            if given is not None and given not in FORMATS:
                raise UsageError(
                    f"{given!r} is not a format. Use one of {', '.join(FORMATS)}, or None for "
                    f"what stays in float."
                )


def uniform(*formats: DType) -> dict[str, Option]:
    """Options that give weight and output the same format, by its name."""
    return {name: Option(name, name) for name in formats}


@dataclass(frozen=True)
class Decision:
    """One site and what it would be under each option.

    Attributes:
        site: name of the node.
        index: of its step in the network.
        weight: name of its constant in the plan; "" where it has none.
        side: that `tensors` are on.
        tensors: names of its activations that carry Q/DQ in the plan.
        suffix: indices of the step and of all steps that depend on it, ascending.
        weights: parameters of the weight by option, without options that leave it in float.
        activations: parameters of the tensors by option and name, likewise.
    """

    site: str
    index: int
    weight: str
    side: Side
    tensors: tuple[str, ...]
    suffix: tuple[int, ...]
    weights: Mapping[str, QParams] = field(default_factory=dict)
    activations: Mapping[str, Mapping[str, QParams]] = field(default_factory=dict)

    @property
    def options(self) -> tuple[str, ...]:
        """Those that quantize something."""
        return tuple(dict.fromkeys([*self.weights, *self.activations]))


def decisions(network: Network, plan: QuantPlan, side: Side = "output") -> list[Decision]:
    """The sites of a plan in order of execution, without any parameters yet."""
    found = []
    for index, step in enumerate(network.steps):
        if plan.roles.get(step.name) != "matmul":
            continue
        weight = next((name for name in step.inputs[:2] if name in plan.constants), "")
        if side == "output":
            tensors = _quantized_output(network, plan, index)
        else:
            tensors = tuple(dict.fromkeys(n for n in step.inputs if n in plan.activations))
        if weight or tensors:
            suffix = _suffix(network, index)
            found.append(Decision(step.name, index, weight, side, tensors, suffix))
    return found


def decide(
    model: Model,
    network: Network,
    plan: QuantPlan,
    data: Data,
    options: Mapping[str, Option],
    *,
    side: Side = "output",
    method: RangeMethod = "mse",
    samples: int = 128,
    cache: Path | None = None,
    progress: Progress = silent,
) -> list[Decision]:
    """The sites with their parameters under each option.

    Where an option is what the plan has already, the parameters are the plan's. Other activations
    get a range from the histogram of the float model's tensor, other weights one from their values.

    Args:
        model: the float model that the plan was made for.
        network: of its graph.
        plan: see above.
        data: to observe activations with.
        options: by name.
        side: see `Side`.
        method: how a range is chosen from a histogram.
        samples: to observe.
        cache: folder for the histograms.
        progress: opens a tracker.
    """
    sites = decisions(network, plan, side)
    ranges = _Ranges(plan, method)
    wanted = {name for site in sites for name in site.tensors}
    new = ranges.unknown(wanted, options.values())
    if new:
        bins = 0 if method in ("minmax", "moving_average") else 2048
        ranges.observers = observe(
            model, new, data, samples=samples, bins=bins, cache=cache, progress=progress
        )

    def weight(site: Decision, name: DType) -> QParams:
        before = plan.constants[site.weight]
        spec = in_format(before.spec, name)
        if spec == before.spec:
            return before
        return narrow_weight(network.constants[site.weight].numpy(), spec, before.axis)

    return [
        dataclasses.replace(
            site,
            weights={
                k: weight(site, o.weight) for k, o in options.items() if site.weight and o.weight
            },
            activations={
                k: {name: ranges.params(name, o.activation) for name in site.tensors}
                for k, o in options.items()
                if site.tensors and o.activation
            },
        )
        for site in sites
    ]


def in_format(spec: QuantSpec, name: DType) -> QuantSpec:
    """A spec in another format, with the same granularity and, for integers, the same sign."""
    wanted, before = FORMATS[name], spec.format
    if isinstance(wanted, FloatFormat):
        if name == spec.dtype:
            return spec
        return dataclasses.replace(
            spec, dtype=name, symmetric=True, reduced=False, restricted=False
        )
    dtype = cast(DType, f"{'int' if before.signed else 'uint'}{wanted.bits}")
    if dtype == spec.dtype:
        return spec
    return dataclasses.replace(spec, dtype=dtype, reduced=False)


def rounded(tensor: Tensor, params: QParams) -> Tensor:
    """What is left of a tensor after quantization."""
    scale = torch.tensor(params.scale)
    zero_point = torch.tensor(params.zero_point.astype("float32"))
    return fake_quantize(tensor, scale, zero_point, params.spec, params.axis)


def _quantized_output(network: Network, plan: QuantPlan, index: int) -> tuple[str, ...]:
    """Follow what the kernel absorbs (Relu, HardSwish) to the first tensor in the plan."""
    name = network.steps[index].outputs[0]
    while name not in plan.activations:
        readers = network.readers.get(name, [])
        roles = {plan.roles.get(network.steps[i].name) for i in readers}
        if not readers or not roles <= {"activation", "epilogue"}:
            return ()
        name = network.steps[readers[-1]].outputs[0]
    return (name,)


def _suffix(network: Network, index: int) -> tuple[int, ...]:
    changed = set(network.steps[index].outputs)
    found = [index]
    for later in range(index + 1, len(network.steps)):
        step = network.steps[later]
        if not changed.isdisjoint(step.inputs):
            changed.update(step.outputs)
            found.append(later)
    return tuple(found)


class _Ranges:
    """Parameters of activations; tensors that share theirs in the plan share a range in others."""

    def __init__(self, plan: QuantPlan, method: RangeMethod) -> None:
        self.observers: Mapping[str, HistogramObserver] = {}
        self._plan, self._method = plan, method
        self._groups: dict[object, list[str]] = {}
        for name, params in plan.activations.items():
            self._groups.setdefault(_key(params), []).append(name)

    def unknown(self, names: Iterable[str], options: Iterable[Option]) -> list[str]:
        """Tensors to observe: those of which the plan has no range for some option."""
        formats = [option.activation for option in options if option.activation is not None]
        found: dict[str, None] = {}
        for name in names:
            before = self._plan.activations[name]
            if any(in_format(before.spec, one) != before.spec for one in formats):
                found |= dict.fromkeys(self._groups[_key(before)])
        return list(found)

    def params(self, name: str, wanted: DType) -> QParams:
        before = self._plan.activations[name]
        spec = in_format(before.spec, wanted)
        if spec == before.spec:
            return before
        first, *others = (self.observers[member] for member in self._groups[_key(before)])
        merged = HistogramObserver(first.name, first.bins)
        for observer in (first, *others):
            merged.merge(observer)
        return qparams_from_range(*find_range(merged, self._method, spec), spec)


def _key(params: QParams) -> tuple[QuantSpec, bytes, bytes]:
    return params.spec, params.scale.tobytes(), params.zero_point.tobytes()
