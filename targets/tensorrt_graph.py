"""An ONNX graph as TensorRT's rules look at it: what is quantized, how, and who reads it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, TypeAlias

import numpy as np
import onnx_ir as ir

from compress.element_types import Types, constant_tensor, element_types

WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")
"""What NVIDIA calls weighted operations."""
MOVES = ("Flatten", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze")
QUANTIZE, DEQUANTIZE = "QuantizeLinear", "DequantizeLinear"

Severity = Literal["error", "performance", "note"]
Found: TypeAlias = Iterator[tuple[ir.Node | None, str]]
"""Operators that break a rule, with the sentence about each; None for the model as a whole."""


@dataclass(frozen=True)
class Reading:
    """A tensor as a DequantizeLinear gives it.

    Attributes:
        node: the DequantizeLinear.
        dtype: of the quantized tensor.
        scale: None where it is not constant.
        constant: a constant is read, quantized in the file or by a QuantizeLinear.
        source: the tensor before QuantizeLinear; where there is none, the quantized tensor.
    """

    node: ir.Node
    dtype: ir.DataType | None
    scale: np.ndarray | None
    constant: bool
    source: ir.Value | None

    def same_scale(self, other: Reading) -> bool:
        """Whether both have the same type and scale."""
        if self.scale is None or other.scale is None:
            return self.node.inputs[1] is other.node.inputs[1]
        return self.dtype == other.dtype and np.array_equal(self.scale, other.scale)


class Network:
    """A graph of a model, its types, and the pairs of Q and DQ in it.

    Attributes:
        model: what is checked.
        graph: its graph, or one inside of an If, Loop or Scan.
        major: version of TensorRT.
        opset: of ONNX's own operators; 0 where the model names none.
    """

    def __init__(self, model: ir.Model, graph: ir.Graph, major: int) -> None:
        self.model, self.graph, self.major = model, graph, major
        imports = model.opset_imports
        self.opset = imports.get("", imports.get("ai.onnx", 0))

    @property
    def outermost(self) -> bool:
        """Whether the graph is the model's own."""
        return self.graph is self.model.graph

    @cached_property
    def types(self) -> Types:
        """The type of every tensor."""
        return element_types(self.graph)

    @cached_property
    def pairs(self) -> list[ir.Node]:
        """Every QuantizeLinear and DequantizeLinear."""
        return [node for node in self.graph if node.op_type in (QUANTIZE, DEQUANTIZE)]

    def of(self, *ops: str) -> Iterator[ir.Node]:
        """The operators of some types."""
        return (node for node in self.graph if node.op_type in ops)

    def dtype(self, node: ir.Node) -> ir.DataType | None:
        """The quantized type of a Q or DQ."""
        value = node.outputs[0] if node.op_type == QUANTIZE else node.inputs[0]
        return self.types.get(value) if value is not None else None

    def quantizes_constant(self, node: ir.Node) -> bool:
        """Whether a Q or DQ works on a constant."""
        source = node.inputs[0]
        producer = source.producer() if source is not None else None
        if producer is not None and producer.op_type == QUANTIZE:
            return self.quantizes_constant(producer)
        return constant_tensor(source) is not None

    def reading(self, value: ir.Value | None) -> Reading | None:
        """How a tensor was dequantized, also through moves of constants; None where it was not."""
        node = value.producer() if value is not None else None
        while node is not None and node.op_type in MOVES and node.inputs[0] is not None:
            before = node.inputs[0].producer()
            if before is None or before.op_type not in (DEQUANTIZE, *MOVES):
                return None
            if before.op_type == DEQUANTIZE and not self.quantizes_constant(before):
                return None
            node = before
        if node is None or node.op_type != DEQUANTIZE:
            return None
        source = node.inputs[0]
        quantize = source.producer() if source is not None else None
        if quantize is not None and quantize.op_type == QUANTIZE:
            source = quantize.inputs[0]
        constant = self.quantizes_constant(node)
        return Reading(node, self.dtype(node), array(node.inputs[1]), constant, source)


@dataclass(frozen=True)
class Rule:
    """One documented rule.

    Attributes:
        id: in violations.
        severity: what breaking it costs.
        source: page that says so.
        find: the operators that break it.
    """

    id: str
    severity: Severity
    source: str
    find: Callable[[Network], Found]


def operand(node: ir.Node, index: int) -> ir.Value | None:
    """An input; None where it is left out."""
    return node.inputs[index] if index < len(node.inputs) else None


def array(value: ir.Value | None) -> np.ndarray | None:
    """The numbers of an initializer or of a Constant; None for anything else."""
    tensor = constant_tensor(value)
    return np.asarray(tensor.numpy()) if tensor is not None else None


def sizes(value: ir.Value | None) -> tuple[int, ...] | None:
    """The shape, with -1 for what is not known; None where even the rank is not."""
    tensor = constant_tensor(value)
    if tensor is not None:
        return tuple(int(size) for size in tensor.shape.numpy())
    if value is None or value.shape is None:
        return None
    return tuple(size if isinstance(size, int) else -1 for size in value.shape)


def readers(node: ir.Node) -> list[ir.Node]:
    """The operators that read any output of a node."""
    return [use.node for out in node.outputs for use in out.uses()]


def is_blocked(node: ir.Node) -> bool:
    """Whether a Q or DQ has a scale for each block of a tensor."""
    scale = sizes(operand(node, 1))
    return scale is not None and len(scale) > 1 and math.prod(scale) > 1


def axis_of(node: ir.Node) -> int | None:
    """The axis that the scales of a Q or DQ belong to; None per tensor or where it is not known."""
    scale, shape = sizes(operand(node, 1)), sizes(operand(node, 0))
    if scale is None or math.prod(scale) == 1 or shape is None:
        return None
    axis = node.attributes.get_int("axis", 1)
    return axis + len(shape) if axis < 0 else axis
