"""Cross-layer equalisation: let two layers share the scales that their channels differ by.

With one scale for a whole weight tensor, a channel whose weights are small is rounded to nothing.
W1 / s and W2 s compute the same as W1 and W2, and s can make the ranges of both equal (Nagel et
al. 2019, arXiv 1906.04721, section 4.1).

ReLU6 is no f(s x) = s f(x). On networks trained with it, a ReLU in its place can cost most of the
accuracy; it may stay where a channel that reaches the bound keeps its scale, and any other gets
none that takes it there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

import numpy as np
import onnx_ir as ir

from compress.errors import UsageError
from compress.model import Arrays, Model, Step
from compress.passes import Context
from compress.reference import reference_session, run
from compress.rewrites import (
    STATISTICS,
    Statistics,
    check_equal,
    listed,
    output_statistics,
    replace_node,
)
from compress.target import Target
from quant.placement import clip_bounds
from quant.scaling import (
    HOMOGENEOUS,
    Linear,
    Reader,
    channel_maxima,
    output_changes,
    readers,
    rectifies,
    sample_batches,
)

if TYPE_CHECKING:
    from compress.data import Data

Relu6 = Literal["keep", "bounded", "replace"]
CONVERGED = 2e-7
"""Mean change of the scales in one sweep below which no other follows."""

HEADROOM = 1.25
"""Of a channel's largest value below the bound of its ReLU6, for data that were not seen."""

TAIL = 3.0
"""Deviations below its mean that a channel hardly ever is: 0.1 % of a normal distribution."""

PEAK = 4.0
"""Deviations above its mean that stand for a channel's largest value where nothing is measured."""

_SHIFTED = {"Identity", "MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool", "Pad"}
_SHIFTED |= {"Flatten", "Reshape", "Squeeze", "Unsqueeze", "Transpose"}


@dataclass(frozen=True, kw_only=True)
class Equalize:
    """Equalise the ranges of weights across layers, and absorb high biases into the next layer.

    Between two layers s = sqrt(r1 r2) / r2 for each channel, with r1 the largest weight that
    writes it and r2 the largest that reads it; sweeps over all pairs until nothing moves. Where
    the channels' largest values are known, from calibration data or BatchNorm statistics, no
    channel is scaled beyond the largest of its tensor.

    What a ReLU leaves as it is, c = max(0, mean - 3 std), moves from the bias of the layer before
    into the bias of the layer behind: exact where the channel stays above c.

    Attributes:
        iterations: sweeps at most.
        relu6: pairs with a ReLU6 (any Clip from 0) in between: "keep" leaves them alone;
            "bounded" scales the channels that stay below the bound, so that they still do: exact
            on the data that the bounds are from; "replace" makes it a ReLU.
        absorb: whether to absorb high biases, where BatchNorm statistics are known.
        absorb_padded: absorb into convolutions with zero padding too; where they read padding,
            their outputs then shift by c times the weights on it.
        samples: calibration samples to find the largest values with, and to compare outputs on.
    """

    iterations: int = 20
    relu6: Relu6 = "keep"
    absorb: bool = True
    absorb_padded: bool = False
    samples: int = 128

    name: ClassVar[str] = "equalize"
    stage: ClassVar[Literal["onnx"]] = "onnx"

    def __post_init__(self) -> None:
        if self.relu6 not in get_args(Relu6):
            allowed = ", ".join(get_args(Relu6))
            raise UsageError(f"equalize: relu6 is {self.relu6!r}; choose from {allowed}.")
        for name in ("iterations", "samples"):
            if getattr(self, name) < 1:
                raise UsageError(
                    f"equalize: {name} is {getattr(self, name)}, at least 1 is needed."
                )

    def check(self, model: Model, target: Target) -> None:
        """Applies to every model."""

    def apply(self, model: Model, context: Context) -> Model:
        """The same function with other weights; details say what could change and by how much.

        Raises:
            ExportError: the scales alone changed outputs by more than rounding; not checked with
                a bounded ReLU6, whose change is reported.
        """
        graph, data = model.graph_model.graph, context.calibration
        before = reference_session(model.graph_model)
        replaced = _replace_clips(graph) if self.relu6 == "replace" else 0
        pairs, left = find_pairs(graph, clips=self.relu6 == "bounded")
        statistics = output_statistics(model)
        peaks = _peaks(model, pairs, statistics, data, self.samples)
        for pair in [pair for pair in pairs if pair.bound < np.inf and pair.name not in peaks]:
            left[pair.name] = "nothing is known about the largest values before its Clip"
            pairs.remove(pair)
        limits = [_limit(pair, peaks.get(pair.name)) for pair in pairs]
        bounded = any(pair.bound < np.inf for pair in pairs)
        expected = {}
        if pairs and not bounded:
            expected = run(reference_session(model.graph_model), model.example())
        scales, sweeps = equal_scales(pairs, limits, self.iterations)
        _rescale(graph, pairs, scales, statistics)
        details: dict[str, Any] = {"pairs": len(pairs), "sweeps": sweeps, "left": left}
        details |= {"replaced": replaced, "held": sum(int(one.held.sum()) for one in limits)}
        details |= {} if bounded else check_equal(model, expected)
        chosen = [pair for pair in pairs if self.absorb and _absorbs(pair, self.absorb_padded)]
        absorbed = sum(_absorb(graph, pair, statistics) for pair in chosen)
        details["absorbed"] = absorbed
        if replaced or bounded or absorbed:
            batches: Iterable[Arrays] = [model.example()]
            if data is not None:
                batches = sample_batches(model, data, self.samples)
            after = reference_session(model.graph_model)
            details |= output_changes(before, after, batches)
            details["compared_on"] = "calibration data" if data is not None else "random inputs"
        details[STATISTICS] = listed(statistics)
        return model.evolve(model.graph_model, Step(self.name, dataclasses.asdict(self), details))


@dataclass(frozen=True)
class Pair:
    """Two layers with nothing in between that minds another scale.

    Attributes:
        first: writes the channels.
        reader: alone reads them.
    """

    first: Linear
    reader: Reader

    @property
    def name(self) -> str:
        """Of the first layer."""
        return self.first.name

    @property
    def bound(self) -> float:
        """Where a ReLU6 in between cuts off; infinite without one."""
        clips = [node for node in self.reader.path if node.op_type == "Clip"]
        return min((clip_bounds(node)[1] or np.inf for node in clips), default=np.inf)

    @property
    def activation(self) -> ir.Value:
        """The channels behind the activation function, if it follows at once."""
        value = self.first.output
        for node in self.reader.path:
            if node.op_type not in HOMOGENEOUS and node.op_type != "Clip":
                break
            value = node.outputs[0]
        return value


@dataclass(frozen=True)
class Limit:
    """What scales the channels of a pair may have.

    Attributes:
        low: smallest scale of each channel, (C,).
        held: channels whose scale must stay 1, (C,).
    """

    low: np.ndarray
    held: np.ndarray


def find_pairs(graph: ir.Graph, clips: bool) -> tuple[list[Pair], dict[str, str]]:
    """Pairs of layers in order, and why each other layer is not the first of one.

    Args:
        graph: float.
        clips: look through Clip(0, x) as well.
    """
    pairs, left = [], {}
    for layer in filter(None, map(Linear.of, graph)):
        found, other = readers(layer.output, layer.axis, clips)
        if not other and len(found) == 1:
            pairs.append(Pair(layer, found[0]))
        else:
            left[layer.name] = other or f"{len(found) or 'no'} layers read it"
    return pairs, left


def equal_scales(
    pairs: Sequence[Pair], limits: Sequence[Limit], iterations: int
) -> tuple[list[np.ndarray], int]:
    """A scale s for each channel between the layers of each pair, and the sweeps that it took.

    The first layer is to be divided by s, the second to be multiplied. A channel without weights
    on either side keeps 1.
    """
    layers = {layer.name: layer for pair in pairs for layer in (pair.first, pair.reader.layer)}
    weights = {name: np.abs(layer.weight).max(-1) for name, layer in layers.items()}
    largest = {name: array.astype(np.float64) for name, array in weights.items()}
    scales = [np.ones(len(limit.low)) for limit in limits]
    for sweep in range(1, iterations + 1):
        moves = []
        for index, (pair, limit) in enumerate(zip(pairs, limits, strict=True)):
            first, second = largest[pair.name], largest[pair.reader.layer.name]
            r1 = first.max(2).reshape(-1)
            r2 = second.max(1).reshape(len(r1), pair.reader.repeat).max(1)
            free = (r1 > 0) & (r2 > 0) & ~limit.held
            wanted = np.sqrt(np.divide(r1, r2, out=np.ones_like(r1), where=free))
            scale = np.where(free, np.maximum(scales[index] * wanted, limit.low), scales[index])
            move = scale / scales[index]
            scales[index] = scale
            first /= move.reshape(len(first), -1, 1)
            second *= np.repeat(move, pair.reader.repeat).reshape(len(second), 1, -1)
            moves.append(np.abs(move - 1))
        if not moves or np.concatenate(moves).mean() < CONVERGED:
            return scales, sweep
    return scales, iterations


def _peaks(
    model: Model,
    pairs: Sequence[Pair],
    statistics: Statistics,
    data: Data | None,
    samples: int,
) -> dict[str, np.ndarray]:
    """Largest magnitude of each channel behind the activation, (C,), by the pair's name."""
    if data is not None and pairs:
        tensors = {pair.activation.name or "": pair.first.axis for pair in pairs}
        found = channel_maxima(model, tensors, data, samples)
        return {pair.name: found[pair.activation.name or ""] for pair in pairs}
    known = [pair for pair in pairs if pair.name in statistics]
    peaks = {}
    for pair in known:
        mean, deviation = statistics[pair.name]
        rectified = any(node.op_type in ("Relu", "Clip") for node in pair.reader.path)
        level = np.maximum(mean, 0) if rectified else np.abs(mean)
        peaks[pair.name] = level + PEAK * deviation
    return peaks


def _limit(pair: Pair, peaks: np.ndarray | None) -> Limit:
    channels = int(np.prod(pair.first.weight.shape[:2]))
    held = np.zeros(channels, bool)
    if peaks is None or not peaks.any():
        return Limit(np.zeros(channels), held)
    if pair.bound == np.inf:
        return Limit(peaks / peaks.max(), held)
    return Limit(np.minimum(HEADROOM * peaks / pair.bound, 1), peaks >= pair.bound)


def _replace_clips(graph: ir.Graph) -> int:
    """Make every ReLU6 between two layers of a pair a ReLU; how many there were."""
    clips = [
        node
        for pair in find_pairs(graph, clips=True)[0]
        for node in pair.reader.path
        if rectifies(node, clips=True) and not rectifies(node, clips=False)
    ]
    for node in clips:
        replace_node(graph, node, [ir.node("Relu", [node.inputs[0]], name=node.name)])
    return len(clips)


def _rescale(
    graph: ir.Graph, pairs: Sequence[Pair], scales: Sequence[np.ndarray], statistics: Statistics
) -> None:
    """Give the weights their scales, and the statistics of the channels too."""
    layers = {layer.name: layer for pair in pairs for layer in (pair.first, pair.reader.layer)}
    outputs = {pair.name: 1 / scale for pair, scale in zip(pairs, scales, strict=True)}
    inputs = {
        pair.reader.layer.name: np.repeat(scale, pair.reader.repeat)
        for pair, scale in zip(pairs, scales, strict=True)
    }
    for name, layer in layers.items():
        layer.scale(graph, outputs.get(name, 1.0), inputs.get(name, 1.0))
    for name in outputs.keys() & statistics.keys():
        mean, deviation = statistics[name]
        statistics[name] = mean * outputs[name], deviation * outputs[name]


def _absorbs(pair: Pair, padded: bool) -> bool:
    """Whether max(0, x - c) + c = x reaches the second layer as a constant c."""
    path = pair.reader.path
    rectifiers = [node for node in path if node.op_type == "Relu" or rectifies(node, clips=False)]
    others = [node for node in path if node not in rectifiers]
    second = pair.reader.layer
    if len(rectifiers) != 1 or any(node.op_type not in _SHIFTED for node in others):
        return False
    if not pair.first.takes_bias or not second.takes_bias or second.node.op_type == "ConvTranspose":
        return False  # behind a ConvTranspose the constant depends on the position
    return padded or not any(_adds_zeros(node) for node in (*others, second.node))


def _adds_zeros(node: ir.Node) -> bool:
    """Whether zeros join what an operator computes with."""
    if node.op_type == "Pad":
        return True
    if node.op_type != "Conv" and not node.attributes.get_int("count_include_pad", 0):
        return False
    automatic = node.attributes.get_string("auto_pad", "NOTSET")
    return automatic not in ("NOTSET", "VALID") or any(node.attributes.get_ints("pads", ()))


def _absorb(graph: ir.Graph, pair: Pair, statistics: Statistics) -> int:
    """Move the high part of the first bias into the second; how many channels have one."""
    first, second = pair.first, pair.reader.layer
    if pair.name not in statistics:
        return 0
    mean, deviation = statistics[pair.name]
    high = np.maximum(0, mean - TAIL * deviation)
    if not high.any():
        return 0
    weight = second.weight.astype(np.float64).sum(-1)
    inputs = np.repeat(high, pair.reader.repeat).reshape(len(weight), -1)
    shift = np.einsum("goi,gi->go", weight, inputs).reshape(-1)
    first.replace_bias(graph, (0 if first.bias is None else first.bias) - high)
    second.replace_bias(graph, (0 if second.bias is None else second.bias) + shift)
    statistics[pair.name] = mean - high, deviation
    return int(np.count_nonzero(high))
