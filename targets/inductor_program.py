"""From an ONNX graph to the program that Inductor compiles: torch operators, typed, on a device.

Shapes are fixed when the graph is recorded, so that what is computed from them becomes plain
numbers. Linear layers are modules of their own, which torchao can quantize: weights in int8 or
FP8 with one scale for each output, activations quantized with one scale for each row when they
are computed (torchao documentation, "Quantized Inference", dynamic activation quantization).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import onnx_ir as ir
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

from compress.errors import EngineError
from compress.model import TensorSpec
from compress.target import Kernel
from compress.torch_graph.network import Network, Step, to_torch
from compress.torch_graph.operators import OPERATORS
from targets.inductor_settings import Precision

REST: Final = {
    "float32": torch.float32,
    "tf32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "int8": torch.bfloat16,
    "float8": torch.bfloat16,
}
"""What is computed in by precision; where that is of linear layers alone, what the others are."""
_MULTIPLE: Final = 16
"""Rows and columns of a matrix: `torch._scaled_mm` takes multiples of 16 only (and torchao leaves
other layers alone), and Tensor Cores want them for int8, see `targets.gpu.FEATURES`."""
_FEWEST_ROWS: Final = 17
"""Of activations: `torch._int_mm` on CUDA refuses 16 and fewer (aten/src/ATen/native/cuda)."""
_LINEAR = torch.ops.aten.linear.default


@dataclass(frozen=True)
class Program:
    """What Inductor gets, and which operators of the graph it consists of.

    Attributes:
        exported: with static shapes, weights on the device.
        kernels: the operators in order of execution, each with the precision that it is given;
            Inductor fuses them, and does not tell how.
    """

    exported: torch.export.ExportedProgram
    kernels: tuple[Kernel, ...]


def make_program(
    graph_model: ir.Model,
    inputs: Sequence[TensorSpec],
    batch: int,
    precision: Precision,
    device: str,
) -> Program:
    """Record a float graph for one batch size.

    Args:
        graph_model: the float graph; not changed.
        inputs: of the model.
        batch: size of every dynamic axis.
        precision: of all operators, or of linear layers; inputs and outputs keep their types.
        device: "cuda" or "cpu".

    Raises:
        UnsupportedError: an operator has no counterpart in torch here.
        EngineError: no layer can be computed in int8 or FP8.
    """
    zeros = {spec.name: np.zeros(spec.concrete(batch), spec.dtype) for spec in inputs}
    given = to_torch(zeros)
    arguments = tuple(given.values())
    with torch.no_grad():
        recorder = _Recorder(Network(graph_model), given)
        # Real tensors: what is computed from shapes becomes plain numbers in the program.
        traced = make_fx(recorder.run, tracing_mode="real", pre_dispatch=True)(*arguments)
        traced.graph.eliminate_dead_code()
        _separate_linear_layers(traced)
        module = _Typed(traced, REST[precision], device)
        narrow: frozenset[str] = frozenset()
        if precision in ("int8", "float8"):
            narrow = _quantize(traced, recorder.rows, precision)
        examples = tuple(argument.to(device) for argument in arguments)
        exported = torch.export.export(module, examples, strict=False)
    return Program(exported, tuple(_kernels(recorder, precision, narrow)))


class _Recorder:
    """Runs a network, less what depends on nothing but shapes.

    Attributes:
        executed: the steps that are part of the program.
        rows: of what each linear layer (x W + b with a constant matrix) reads, by the step's name,
            in order of execution; known once it has run.
    """

    def __init__(self, network: Network, inputs: Mapping[str, Tensor]) -> None:
        self._network, self._names = network, tuple(inputs)
        self._constants = {**network.constants, **_static(network, inputs)}
        self.executed = [
            step for step in network.steps if not self._constants.keys() >= set(step.outputs)
        ]
        self.rows: dict[str, int] = {}
        # Before anything is recorded, and with a weight of its own for each layer.
        self._layers = {
            step.name: _layer(step, self._constants)
            for step in self.executed
            if _is_linear(step, self._constants)
        }

    def run(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """The graph's outputs."""
        network = self._network
        values = {**self._constants, **dict(zip(self._names, inputs, strict=True))}
        executed = {step.name for step in self.executed}
        for index, step in enumerate(network.steps):
            if step.name in executed:
                operands = [values[name] if name else None for name in step.inputs]
                values.update(zip(step.outputs, self._compute(step, operands), strict=False))
            network.release(values, index, network.outputs)
        return tuple(values[name] for name in network.outputs)

    def _compute(self, step: Step, operands: list[Any]) -> tuple[Tensor, ...]:
        if step.name not in self._layers:
            result = OPERATORS[step.op](step.attributes, *operands)
            return result if isinstance(result, tuple) else (result,)
        self.rows[step.name] = operands[0].shape[:-1].numel()
        return (F.linear(operands[0], *self._layers[step.name]),)


def _static(network: Network, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors that depend on nothing but shapes, by name."""
    values = dict(inputs)
    known = set(network.constants)
    kept: dict[str, Tensor] = {}
    for index, step in enumerate(network.steps):
        network.advance(index, values)
        if step.op == "Shape" or known.issuperset(filter(None, step.inputs)):
            known.update(step.outputs)
            kept |= {name: values[name] for name in step.outputs if name}
        network.release(values, index, kept)
    return kept


def _is_linear(step: Step, constants: Mapping[str, Tensor]) -> bool:
    if step.op not in ("Gemm", "MatMul") or constants.keys().isdisjoint(step.inputs[1:2]):
        return False
    plain = {"alpha": 1.0, "beta": 1.0, "transA": 0}
    weight, biases = _weight(step, constants), [name for name in step.inputs[2:] if name]
    return (
        weight.ndim == 2
        and step.inputs[0] not in constants
        and all(name in constants and constants[name].numel() == len(weight) for name in biases)
        and all(step.attributes.get(name, value) == value for name, value in plain.items())
    )


def _layer(step: Step, constants: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
    """Copies of weight (out, in) and bias (out,)."""
    weight = _weight(step, constants).clone(memory_format=torch.contiguous_format)
    names = [name for name in step.inputs[2:] if name]
    return weight, constants[names[0]].reshape(-1).clone() if names else None


def _weight(step: Step, constants: Mapping[str, Tensor]) -> Tensor:
    """A matrix as (out, in); a constant of another rank as it is."""
    matrix = constants[step.inputs[1]]
    return matrix if step.attributes.get("transB", 0) or matrix.ndim != 2 else matrix.t()


def _separate_linear_layers(traced: torch.fx.GraphModule) -> None:
    """Make modules of linear layers, in order of execution, for torchao to find."""
    graph = traced.graph
    for index, node in enumerate(graph.find_nodes(op="call_function", target=_LINEAR)):
        source, weight, bias = (*node.args, None)[:3]
        matrix = getattr(traced, weight.target)
        layer = nn.Linear(matrix.shape[1], matrix.shape[0], bias=bias is not None, device="meta")
        layer.weight = nn.Parameter(matrix, requires_grad=False)
        if bias is not None:
            layer.bias = nn.Parameter(getattr(traced, bias.target), requires_grad=False)
        traced.add_submodule(f"{_LAYER}{index}", layer)
        with graph.inserting_before(node):
            node.replace_all_uses_with(graph.call_module(f"{_LAYER}{index}", (source,)))
        graph.erase_node(node)
    graph.eliminate_dead_code()
    used = {node.target for node in graph.find_nodes(op="get_attr")}
    for name, _ in list(traced.named_buffers(recurse=False)):
        if name not in used:
            delattr(traced, name)
    traced.recompile()


_LAYER = "linear"


class _Typed(nn.Module):
    """A recorded float32 program in another type on a device, with channels-last images."""

    def __init__(self, traced: torch.fx.GraphModule, dtype: torch.dtype, device: str) -> None:
        super().__init__()
        for node in traced.graph.nodes:
            node.args = torch.fx.node.map_aggregate(node.args, _replaced(dtype, device))
            node.kwargs = torch.fx.node.map_aggregate(node.kwargs, _replaced(dtype, device))
        traced.recompile()
        traced.to(device=device, dtype=dtype)
        self.traced = traced.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._dtype = dtype

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Outputs in float32."""
        outputs = self.traced(*map(self._enter, inputs))
        return tuple(one.float() if one.is_floating_point() else one for one in outputs)

    def _enter(self, x: Tensor) -> Tensor:
        typed = x.to(self._dtype) if x.is_floating_point() else x
        return typed.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else typed


def _replaced(dtype: torch.dtype, device: str) -> Any:
    def replace(value: Any) -> Any:
        if value is torch.float32:
            return dtype
        return torch.device(device) if isinstance(value, torch.device) else value

    return replace


def _quantize(
    traced: torch.fx.GraphModule, rows: Mapping[str, int], precision: Precision
) -> frozenset[str]:
    """Quantize the linear layers that can be; the names of their steps.

    Raises:
        EngineError: there is none, or torchao is missing or refuses.
    """
    chosen = {}
    for index, (name, count) in enumerate(rows.items()):
        sizes = traced.get_parameter(f"{_LAYER}{index}.weight").shape
        if count >= _FEWEST_ROWS and all(size % _MULTIPLE == 0 for size in sizes):
            chosen[f"{_LAYER}{index}"] = name
    if not chosen:
        raise EngineError(
            f"No linear layer can be computed in {precision}: that takes sizes that are multiples "
            f"of {_MULTIPLE} and activations of at least {_FEWEST_ROWS} rows. Convolutions have no "
            f"kernel in it."
        )
    try:
        from torchao.quantization import (
            Float8DynamicActivationFloat8WeightConfig,
            Int8DynamicActivationInt8WeightConfig,
            PerRow,
            quantize_,
        )
    except ImportError as error:
        raise EngineError(
            f"Linear layers in {precision} need torchao ({error}): pip install torchao."
        ) from error
    config: Any = (
        Int8DynamicActivationInt8WeightConfig(set_inductor_config=False)
        if precision == "int8"
        else Float8DynamicActivationFloat8WeightConfig(
            granularity=PerRow(), set_inductor_config=False
        )
    )
    try:
        quantize_(traced, config, filter_fn=lambda _, name: name in chosen)
    except (RuntimeError, ValueError, AssertionError) as error:
        raise EngineError(f"torchao cannot quantize to {precision} here: {error}") from error
    return frozenset(chosen.values())


_MOVES = frozenset([
    "Concat", "DepthToSpace", "Expand", "Flatten", "Gather", "Identity", "Pad", "Reshape", "Resize",
    "Slice", "Split", "Squeeze", "Tile", "Transpose", "Unsqueeze", "Dropout",
])  # fmt: skip


def _kernels(recorder: _Recorder, precision: Precision, narrow: frozenset[str]) -> list[Kernel]:
    rest = str(REST[precision]).removeprefix("torch.") if narrow else precision
    kernels = []
    for step in recorder.executed:
        kind = "convert" if step.op == "Cast" else "move" if step.op in _MOVES else rest
        kind = precision if step.name in narrow else kind
        kernels.append(Kernel(step.name, step.op, kind, step.name))
    return kernels
