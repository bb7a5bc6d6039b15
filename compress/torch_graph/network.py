"""A float ONNX graph in torch, node by node: to watch, perturb and train its tensors by name.

ONNX Runtime runs graphs faster; this is for what needs gradients, or a look between two nodes.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from compress.errors import UnsupportedError
from compress.torch_graph.operators import OPERATORS, Operator


@dataclass(frozen=True)
class Step:
    """One node.

    Attributes:
        name: of the node, the site.
        op: its ONNX type.
        inputs: names of the tensors that it reads; "" where one is left out.
        outputs: names of the tensors that it writes.
        attributes: as plain values.
    """

    name: str
    op: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, Any]


class Network:
    """The steps of a graph and its constants.

    Attributes:
        inputs: names of the graph's inputs.
        outputs: names of its outputs.
        steps: in order of execution.
        constants: initializers by name; not copied where numpy can share its memory.
        producer: index of the step that writes a tensor.
        readers: indices of the steps that read a tensor, ascending.
        operators: what computes each ONNX type.

    Args:
        graph_model: the graph.
        also: operators besides those of `operators.OPERATORS`, by ONNX type.

    Raises:
        UnsupportedError: an operator has no counterpart in torch here.
    """

    def __init__(self, graph_model: ir.Model, also: Mapping[str, Operator] | None = None) -> None:
        graph = graph_model.graph
        self.operators = {**OPERATORS, **(also or {})}
        self.inputs = tuple(v.name or "" for v in graph.inputs if v.const_value is None)
        self.outputs = tuple(value.name or "" for value in graph.outputs)
        self.constants = {
            name: _tensor(value.const_value.numpy())
            for name, value in graph.initializers.items()
            if value.const_value is not None
        }
        self.steps = tuple(self._steps(graph))
        self.producer = {out: i for i, step in enumerate(self.steps) for out in step.outputs}
        self.readers: dict[str, list[int]] = {}
        for index, step in enumerate(self.steps):
            for name in dict.fromkeys(step.inputs):
                self.readers.setdefault(name, []).append(index)

    def _steps(self, graph: ir.Graph) -> Iterable[Step]:
        unknown = sorted(
            {n.op_type for n in graph if n.op_type not in (*self.operators, "Constant")}
        )
        foreign = sorted({n.domain for n in graph if n.domain not in ("", "ai.onnx")})
        if unknown or foreign:
            raise UnsupportedError(
                f"The graph cannot be run in torch: it has {', '.join(unknown + foreign)}. "
                f"What needs that (reconstruction, bias correction, training, ExecuTorch) is not "
                f"possible for it."
            )
        for node in graph:
            if node.op_type == "Constant":
                value = node.outputs[0].const_value
                if value is not None:
                    self.constants[node.outputs[0].name or ""] = _tensor(value.numpy())
                continue
            yield Step(
                node.name or "",
                node.op_type,
                tuple(value.name or "" if value is not None else "" for value in node.inputs),
                tuple(value.name or "" for value in node.outputs),
                {"outputs": len(node.outputs), **_plain(node)},
            )

    def execute(self, index: int, read: Callable[[int, str], Tensor]) -> dict[str, Tensor]:
        """Run one step; `read` gives its inputs by position and name. Its outputs by name."""
        step = self.steps[index]
        operands = [read(i, name) if name else None for i, name in enumerate(step.inputs)]
        result = self.operators[step.op](step.attributes, *operands)
        outputs = result if isinstance(result, tuple) else (result,)
        return dict(zip(step.outputs, outputs, strict=False))

    def advance(self, index: int, values: dict[str, Tensor]) -> None:
        """Run one step on these values, and add its outputs to them."""
        values.update(self.execute(index, lambda _, name: self.value(values, name)))

    def run(self, inputs: Mapping[str, Tensor], keep: Collection[str] = ()) -> dict[str, Tensor]:
        """The graph's outputs, and the tensors named in `keep`, by name."""
        values = dict(inputs)
        wanted = {*self.outputs, *keep}
        for index in range(len(self.steps)):
            self.advance(index, values)
            self.release(values, index, wanted)
        return {name: self.value(values, name) for name in wanted}

    def value(self, values: Mapping[str, Tensor], name: str) -> Tensor:
        """A tensor of this run, or a constant."""
        return self.constants[name] if name in self.constants else values[name]

    def release(self, values: dict[str, Tensor], index: int, keep: Collection[str] = ()) -> None:
        """Forget tensors that no step after this one reads."""
        step = self.steps[index]
        for name in (*step.inputs, *step.outputs):
            last = self.readers.get(name, [-1])[-1]
            if last <= index and name not in keep:
                values.pop(name, None)


def to_torch(arrays: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
    """Arrays as tensors, sharing memory where that is possible."""
    return {name: _tensor(array) for name, array in arrays.items()}


def _tensor(array: np.ndarray) -> Tensor:
    array = np.asarray(array)
    if not array.flags.writeable or not array.flags.c_contiguous:
        array = np.array(array, order="C")
    return torch.from_numpy(array)


def _plain(node: ir.Node) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, attribute in node.attributes.items():
        value = attribute.value if isinstance(attribute, ir.Attr) else None
        if isinstance(value, ir.TensorProtocol):
            value = value.numpy()
        elif isinstance(value, (tuple, list)):
            value = list(value)
        values[name] = value
    return values
