"""SmoothQuant: move the outliers of activations into the weights that read them.

A few channels behind a transformer's norm are far larger than all others, and one scale for the
whole tensor leaves the others few levels. X / s and s W give the same product (Xiao et al. 2022,
arXiv 2211.10438), and the norm before can divide by s for nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import onnx_ir as ir

from compress.errors import UsageError
from compress.model import Model, Step
from compress.passes import Context
from compress.reference import reference_session, run
from compress.rewrites import (
    STATISTICS,
    Statistics,
    check_equal,
    constant_array,
    listed,
    output_statistics,
    replace_constant,
)
from compress.target import Target
from quant.placement import single_use
from quant.scaling import Linear, Reader, channel_maxima, readers

SMALLEST = 1e-5
"""Of a scale: a channel that hardly ever holds anything is not blown up without bound."""

_NORMS = ("LayerNormalization", "RMSNormalization")


@dataclass(frozen=True, kw_only=True)
class Smooth:
    """Divide the inputs of linear layers by s and multiply their weights by it.

    s_j = max|X_j|^alpha / max|W_j|^(1 - alpha) for each input channel j, with W of all layers
    that read the tensor. What comes before takes 1 / s into its own numbers: LayerNormalization,
    the product and sum at the end of a norm written in parts, or a linear layer or convolution
    with a ReLU behind it. A tensor with any other reader (a residual behind a norm) is left.

    Attributes:
        alpha: at 1 all channels of the activations reach 1, at 0 all those of the weights do.
        samples: calibration samples to find max|X_j| with.
    """

    alpha: float = 0.5
    samples: int = 32

    name: ClassVar[str] = "smooth"
    stage: ClassVar[Literal["onnx"]] = "onnx"

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise UsageError(f"smooth: alpha is {self.alpha} and must be from 0 to 1.")
        if self.samples < 1:
            raise UsageError(f"smooth: samples is {self.samples} and must be at least 1.")

    def check(self, model: Model, target: Target) -> None:
        """Applies to every model."""

    def apply(self, model: Model, context: Context) -> Model:
        """The same function with other numbers; nothing changes without calibration data.

        Raises:
            ExportError: outputs differ by more than rounding.
        """
        graph, options = model.graph_model.graph, dataclasses.asdict(self)
        if context.calibration is None:
            reason = "there are no calibration data to find large activations in"
            return model.evolve(
                model.graph_model, Step(self.name, options, {"smoothed": 0, "reason": reason})
            )
        groups, left = find_groups(graph)
        expected = run(reference_session(model.graph_model), model.example()) if groups else {}
        tensors = {
            reader.source.name or "": reader.axis for group in groups for reader in group.readers
        }
        largest = channel_maxima(model, tensors, context.calibration, self.samples)
        statistics = output_statistics(model)
        for group in groups:
            scale = smoothing_scale(*_ranges(group, largest), self.alpha)
            group.producer.divide(graph, scale, statistics)
            for reader in group.readers:
                reader.layer.scale(graph, inputs=np.repeat(scale, reader.repeat))
        details: dict[str, Any] = {"smoothed": len(groups), "left": left}
        details |= {**check_equal(model, expected), STATISTICS: listed(statistics)}
        return model.evolve(model.graph_model, Step(self.name, options, details))


@dataclass(frozen=True)
class Producer:
    """What can divide the channels of its output by s in its own numbers.

    Attributes:
        name: of the operator that writes the output.
        output: the tensor.
        axis: of the channels.
        vectors: constants with one number for each channel, as operator and index of its input;
            empty for a layer.
        layer: a linear layer or convolution, or None.
    """

    name: str
    output: ir.Value
    axis: int
    vectors: tuple[tuple[ir.Node, int], ...] = ()
    layer: Linear | None = None

    def divide(self, graph: ir.Graph, scale: np.ndarray, statistics: Statistics) -> None:
        """Divide the channels; the statistics of a layer's output follow."""
        if self.layer is not None:
            self.layer.scale(graph, outputs=1 / scale)
            if self.layer.name in statistics:
                mean, deviation = statistics[self.layer.name]
                statistics[self.layer.name] = mean / scale, deviation / scale
        for node, index in self.vectors:
            old = np.asarray(constant_array(node.inputs[index]))
            new = (old.astype(np.float64) / scale).astype(old.dtype)
            replace_constant(graph, node, index, new, f"{node.name}.{index}")


@dataclass(frozen=True)
class Group:
    """Linear layers that share their input, and what writes it."""

    producer: Producer
    readers: Sequence[Reader]


def find_groups(graph: ir.Graph) -> tuple[list[Group], dict[str, str]]:
    """Groups in order, and what else reads the inputs of linear layers that are in none."""
    groups, left = [], {}
    for node in graph:
        producer = _producer(node)
        if producer is None:
            continue
        found, other = readers(producer.output, producer.axis, clips=False)
        linear = [reader for reader in found if reader.layer.node.op_type in ("Gemm", "MatMul")]
        if linear and (other or len(linear) < len(found)):
            left[producer.name] = other or "a convolution reads it"
        elif linear:
            groups.append(Group(producer, found))
    return groups, left


def smoothing_scale(activation: np.ndarray, weight: np.ndarray, alpha: float) -> np.ndarray:
    """The scale activation^alpha / weight^(1 - alpha), (C,); 1 where either is 0.

    Args:
        activation: max|X_j|, (C,).
        weight: max|W_j|, (C,).
        alpha: see `Smooth`.
    """
    alive = (activation > 0) & (weight > 0)
    x, w = np.where(alive, activation, 1.0), np.where(alive, weight, 1.0)
    return np.where(alive, np.maximum(x**alpha / w ** (1 - alpha), SMALLEST), 1.0)


def _ranges(group: Group, largest: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Largest magnitudes of the inputs and of the weights that read them, (C,) each."""
    inputs, weights = [], []
    for reader in group.readers:
        weight = np.abs(reader.layer.weight).max((1, 3)).astype(np.float64)
        inputs.append(largest[reader.source.name or ""].reshape(-1, reader.repeat).max(1))
        weights.append(weight.reshape(-1, reader.repeat).max(1))
    return np.max(inputs, 0), np.max(weights, 0)


def _producer(node: ir.Node) -> Producer | None:
    """A norm, the end of one, or a layer; None for any other operator."""
    layer = Linear.of(node)
    if layer is not None:
        return Producer(layer.name, layer.output, layer.axis, layer=layer)
    out = node.outputs[0]
    if node.domain not in ("", "ai.onnx") or out.shape is None or not len(out.shape):
        return None
    axis = len(out.shape) - 1
    vectors = _norm(node) if node.op_type in _NORMS else _tail(node)
    return Producer(node.name or "", out, axis, vectors) if vectors else None


def _norm(node: ir.Node) -> tuple[tuple[ir.Node, int], ...]:
    """Scale and bias of a norm, where they belong to the last axis alone."""
    inputs = [index for index, value in enumerate(node.inputs) if index and value is not None]
    alone = all(_is_vector(node, index) for index in inputs)
    return tuple((node, index) for index in inputs) if alone else ()


def _tail(node: ir.Node) -> tuple[tuple[ir.Node, int], ...]:
    """The factors of a product with a constant vector, and the addends of a sum behind it."""
    index = next((i for i in (0, 1) if node.op_type in ("Mul", "Add") and _is_vector(node, i)), -1)
    if index < 0:
        return ()
    if node.op_type == "Mul":
        return ((node, index),)
    source = node.inputs[1 - index]
    before = source.producer() if source is not None and single_use(source) else None
    factors = _tail(before) if before is not None and before.op_type == "Mul" else ()
    return (*factors, (node, index)) if factors else ()


def _is_vector(node: ir.Node, index: int) -> bool:
    """Whether an operand is a constant with one number for each channel of the last axis."""
    array, out = constant_array(node.inputs[index]), node.outputs[0]
    if array is None or out.shape is None or not np.issubdtype(array.dtype, np.floating):
        return False
    return array.shape[-1:] == (array.size,) == tuple(out.shape[-1:])
