"""Channels of layers with weights: where they lead, and how to give them other scales.

Dividing the channels of one layer's output by s and multiplying the weights that read them by s
leaves the function as it is, where all in between is positively homogeneous: f(s x) = s f(x).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import onnxruntime as ort

from compress.columns import whole_inputs
from compress.data import Data
from compress.graph import weight_input
from compress.model import Arrays, Model
from compress.reference import largest_difference, largest_magnitude, reference_session, run
from compress.rewrites import constant_array, replace_constant
from quant.placement import clip_bounds, single_use

LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
HOMOGENEOUS = ("Relu", "LeakyRelu", "PRelu", "Identity")
"""Elementwise with f(s x) = s f(x) for s > 0."""
_BATCH = 4
_POOLS = ("MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool")
_RESHAPES = ("Flatten", "Reshape", "Squeeze", "Unsqueeze")


@dataclass(frozen=True)
class Linear:
    """A convolution or linear layer with a constant weight that it shares with no other.

    Attributes:
        node: the operator.
        addition: for a MatMul, the Add with its bias; None where there is none.
        axis: of the channels in its output.
    """

    node: ir.Node
    addition: ir.Node | None
    axis: int

    @classmethod
    def of(cls, node: ir.Node | None) -> Linear | None:
        """The layer that an operator is; None where it is none."""
        if node is None or node.op_type not in LAYERS or node.domain not in ("", "ai.onnx"):
            return None
        weight = node.inputs[1] if weight_input(node) == 1 else None
        if weight is None or len(weight.uses()) > 1 or weight.const_value is None:
            return None
        if not weight.const_value.dtype.is_floating_point():
            return None
        if node.op_type == "MatMul":
            return _product(node, tuple(weight.const_value.shape.numpy()))
        if node.attributes.get_int("transA", 0) or not _has_plain_bias(node):
            return None
        return cls(node, None, 1)

    @property
    def name(self) -> str:
        """Of the operator: the site."""
        return self.node.name or ""

    @property
    def output(self) -> ir.Value:
        """What it writes, its bias included."""
        return (self.addition or self.node).outputs[0]

    @property
    def weight(self) -> np.ndarray:
        """By channels: (groups, outputs of a group, inputs of a group, kernel)."""
        stored = self._stored
        leading, second = stored.shape[:2]
        shape = (self._groups, leading // self._groups, second, math.prod(stored.shape[2:]))
        channels = stored.reshape(shape)
        return channels.swapaxes(1, 2) if self._inputs_first else channels

    @property
    def bias(self) -> np.ndarray | None:
        """One number for each output channel; None without a bias."""
        array = self._stored_bias
        if array is None:
            return None
        groups, outputs = self.weight.shape[:2]
        return np.broadcast_to(array.reshape(-1), groups * outputs)

    @property
    def takes_bias(self) -> bool:
        """Whether a bias can be changed or added: y = W x + b without factors."""
        if self.node.op_type == "MatMul":
            return self.addition is not None
        factors = (self.node.attributes.get_float(name, 1.0) for name in ("alpha", "beta"))
        return self.node.op_type != "Gemm" or all(factor == 1 for factor in factors)

    def replace_weight(self, graph: ir.Graph, channels: np.ndarray) -> None:
        """Give it another weight, in the axes of `weight`."""
        stored = self._stored
        array = (channels.swapaxes(1, 2) if self._inputs_first else channels).reshape(stored.shape)
        replace_constant(graph, self.node, 1, array.astype(stored.dtype), f"{self.name}.weight")

    def replace_bias(self, graph: ir.Graph, bias: np.ndarray) -> None:
        """Give it another bias, one number for each output channel."""
        old = self._stored_bias
        array = bias.astype(self._stored.dtype)
        node, index = (self.node, 2) if self.addition is None else self._bias_at
        if old is not None and old.size == array.size:
            array = array.reshape(old.shape)
        replace_constant(graph, node, index, array, f"{self.name}.bias")

    def scale(
        self, graph: ir.Graph, outputs: np.ndarray | float = 1.0, inputs: np.ndarray | float = 1.0
    ) -> None:
        """Multiply its output channels, bias included, and its input channels, in float64."""
        weight = self.weight.astype(np.float64)
        groups, width, depth, _ = weight.shape
        outputs = np.broadcast_to(outputs, groups * width)
        inputs = np.broadcast_to(inputs, groups * depth)
        weight *= outputs.reshape(groups, width, 1, 1)
        weight *= inputs.reshape(groups, 1, depth, 1)
        bias = self.bias
        self.replace_weight(graph, weight)
        if bias is not None and np.any(outputs != 1):
            self.replace_bias(graph, bias * outputs)

    @property
    def _stored(self) -> np.ndarray:
        return np.asarray(constant_array(self.node.inputs[1]))

    @property
    def _inputs_first(self) -> bool:
        if self.node.op_type == "Gemm":
            return not self.node.attributes.get_int("transB", 0)
        return self.node.op_type != "Conv"

    @property
    def _groups(self) -> int:
        convolution = self.node.op_type in ("Conv", "ConvTranspose")
        return self.node.attributes.get_int("group", 1) if convolution else 1

    @property
    def _bias_at(self) -> tuple[ir.Node, int]:
        if self.addition is None:
            return self.node, 2
        return self.addition, 1 if self.addition.inputs[0] is self.node.outputs[0] else 0

    @property
    def _stored_bias(self) -> np.ndarray | None:
        node, index = self._bias_at
        return constant_array(node.inputs[index]) if index < len(node.inputs) else None


@dataclass(frozen=True)
class Reader:
    """A layer that reads the channels of a tensor.

    Attributes:
        layer: the layer.
        source: the tensor that it reads itself.
        axis: of the channels in that tensor.
        repeat: consecutive inputs of the layer for each channel: more than one behind a flatten.
        path: operators on the way to it, in order.
    """

    layer: Linear
    source: ir.Value
    axis: int
    repeat: int
    path: tuple[ir.Node, ...]


def readers(value: ir.Value, axis: int, clips: bool) -> tuple[list[Reader], str]:
    """The layers that read a tensor through positively homogeneous operators.

    Args:
        value: the tensor.
        axis: of its channels, counted from 0.
        clips: look through Clip(0, x) as well, which is homogeneous once it is a ReLU.

    Returns:
        The layers, and what else reads the tensor in words; "" where nothing else does.
    """
    found: list[Reader] = []
    others = _walk(value, axis, 1, (), clips, found)
    return found, others


def _walk(
    value: ir.Value,
    axis: int,
    repeat: int,
    path: tuple[ir.Node, ...],
    clips: bool,
    found: list[Reader],
) -> str:
    other = f"{value.name} is an output" if value.is_graph_output() else ""
    for use in value.uses():
        node = use.node
        layer = Linear.of(node) if use.idx == 0 else None
        if layer is not None and _reads(layer, value, axis, repeat):
            found.append(Reader(layer, value, axis, repeat, path))
            continue
        place = _carried(node, axis, repeat, clips) if use.idx == 0 else None
        if place is None or node.graph is not _graph(value):
            other = other or f"{node.op_type} {node.name} reads it"
            continue
        reason = _walk(node.outputs[0], *place, (*path, node), clips, found)
        other = other or reason
    return other


def _graph(value: ir.Value) -> ir.Graph | ir.Function | None:
    producer = value.producer()
    return producer.graph if producer is not None else value.graph


def _reads(layer: Linear, value: ir.Value, axis: int, repeat: int) -> bool:
    """Whether a layer sums over this axis of the tensor."""
    if layer.node.graph is not _graph(value):
        return False
    if layer.node.op_type == "MatMul":
        return value.shape is not None and axis == len(value.shape) - 1
    return axis == 1 and (repeat == 1 or layer.node.op_type == "Gemm")


def _carried(node: ir.Node, axis: int, repeat: int, clips: bool) -> tuple[int, int] | None:
    """Axis and repeats of the channels behind a homogeneous operator; None behind any other."""
    op = node.op_type
    if node.domain not in ("", "ai.onnx") or any(out.uses() for out in node.outputs[1:]):
        return None
    if op in HOMOGENEOUS or rectifies(node, clips):
        return axis, repeat
    if op in _RESHAPES:
        return _reshaped(node, axis, repeat)
    if repeat > 1:
        return None
    if (op in _POOLS and axis == 1) or (op == "Pad" and _pads_others(node, axis)):
        return axis, 1
    perm = node.attributes.get_ints("perm", ()) if op == "Transpose" else ()
    return (perm.index(axis), 1) if axis in perm else None


def rectifies(node: ir.Node, clips: bool) -> bool:
    """Whether an operator is a Clip from 0 without, or with `clips` also with, an upper bound."""
    low, high = clip_bounds(node) if node.op_type == "Clip" else (None, None)
    return low == 0 and high is not None and (high == np.inf or (clips and high > 0))


def _reshaped(node: ir.Node, axis: int, repeat: int) -> tuple[int, int] | None:
    source, out = node.inputs[0], node.outputs[0]
    if source is None or source.shape is None or out.shape is None:
        return None
    before, after = list(source.shape), list(out.shape)
    if not before or not after or any(not isinstance(size, int) for size in before[axis:]):
        return None
    if axis == len(before) - 1:
        return (len(after) - 1, repeat) if after[-1] == before[-1] else None
    behind = math.prod(size for size in before[axis + 1 :] if isinstance(size, int))
    merged = axis == 1 and len(after) == 2 and after[1] == before[1] * behind
    return (1, behind) if merged and repeat == 1 and behind else None


def _pads_others(node: ir.Node, axis: int) -> bool:
    """Whether a Pad leaves the channels alone and fills with zeros or copies."""
    amounts = constant_array(node.inputs[1]) if len(node.inputs) > 1 else None
    listed = node.inputs[3] if len(node.inputs) > 3 else None
    filled = node.inputs[2] if len(node.inputs) > 2 else None
    if amounts is None or (listed is not None) or (filled is not None and _is_nonzero(filled)):
        return False
    return not np.any(amounts.reshape(2, -1)[:, axis])


def _is_nonzero(value: ir.Value) -> bool:
    array = constant_array(value)
    return array is None or bool(np.any(array))


def _has_plain_bias(node: ir.Node) -> bool:
    """Whether the bias is constant, one number for each channel or for all, or absent."""
    value = node.inputs[2] if len(node.inputs) > 2 else None
    bias = constant_array(value)
    return value is None or (bias is not None and math.prod(bias.shape[:-1]) == 1)


def _product(node: ir.Node, shape: tuple[int, ...]) -> Linear | None:
    """A MatMul with a matrix (K, N), and the Add of a constant (N,) that is its only reader."""
    source, out = node.inputs[0], node.outputs[0]
    if len(shape) != 2 or source is None or source.shape is None or len(source.shape) < 2:
        return None
    axis = len(source.shape) - 1
    use = next(iter(out.uses())) if single_use(out) else None
    if use is None or use.node.op_type != "Add" or use.node.graph is not node.graph:
        return Linear(node, None, axis)
    bias = constant_array(use.node.inputs[1 - use.idx])
    fits = bias is not None and bias.ndim <= axis + 1 and bias.shape[-1:] == shape[1:]
    alone = bias is not None and bias.size == shape[1]
    return Linear(node, use.node if fits and alone else None, axis)


def sample_batches(model: Model, data: Data, samples: int) -> Iterator[Arrays]:
    """Inputs of the model's batch size; what is missing in the last are copies of a sample."""
    size = _BATCH
    if not model.dynamic_batch:
        sizes = [int(spec.shape[0]) for spec in model.inputs if spec.shape]
        size = 1 if whole_inputs(model.inputs) or not sizes else sizes[0]
    for batch in data.take(samples).batches(size):
        missing = 0 if model.dynamic_batch else size - len(batch)
        yield {
            name: np.concatenate([array, np.repeat(array[-1:], missing, 0)]) if missing else array
            for name, array in batch.inputs.items()
        }


def output_changes(
    before: ort.InferenceSession, after: ort.InferenceSession, batches: Iterable[Arrays]
) -> dict[str, float]:
    """How much the outputs differ: the largest difference, and its root mean square.

    Each is relative to that of the outputs themselves; the worst output counts.
    """
    sums: dict[str, np.ndarray] = {}
    for inputs in batches:
        got = run(after, inputs)
        for name, expected in run(before, inputs).items():
            found = sums.setdefault(name, np.zeros(4))
            peaks = largest_difference(got[name], expected), largest_magnitude(expected)
            found[:2] = np.maximum(found[:2], peaks)
            pair = np.stack([got[name], expected]).astype(np.float64)
            pair = pair[:, np.isfinite(pair).all(0)]
            found[2:] += np.square(pair[0] - pair[1]).sum(), np.square(pair[1]).sum()
    worst, scale, noise, signal = np.array(list(sums.values())).T
    return {
        "largest_change": float((worst / np.maximum(scale, 1e-30)).max()),
        "rms_change": float(np.sqrt(noise / np.maximum(signal, 1e-30)).max()),
    }


def channel_maxima(
    model: Model, tensors: Mapping[str, int], data: Data, samples: int
) -> dict[str, np.ndarray]:
    """Largest magnitude in each channel of some tensors over calibration data, in one pass.

    Args:
        model: at the ONNX stage.
        tensors: axis of the channels by name; not inputs of the graph.
        data: of the model's inputs.
        samples: how many to use.
    """
    watched = model.graph_model.clone()
    present = {value.name for value in watched.graph.outputs}
    values = {out.name: out for node in watched.graph for out in node.outputs}
    watched.graph.outputs.extend(values[name] for name in tensors if name not in present)
    runtime = reference_session(watched, optimize=True)
    largest: dict[str, np.ndarray] = {}
    for inputs in sample_batches(model, data, samples):
        outputs = run(runtime, inputs)
        for name, axis in tensors.items():
            rest = tuple(i for i in range(outputs[name].ndim) if i != axis)
            found = np.abs(outputs[name]).max(rest).astype(np.float64)
            largest[name] = np.maximum(found, largest.get(name, 0.0))
    return largest
