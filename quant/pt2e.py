"""Write a plan into a float graph as PT2E: a program of torch.export with quantize/dequantize.

The form is that of torchao's `convert_pt2e`, which ExecuTorch's partitioners read: activations are
int8 per tensor, weights are stored in int8 and dequantized per channel, biases are float32 (a
backend derives their int32 form), and every reader has a dequantize of its own.
"""

from __future__ import annotations

import keyword
from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir
import torch
import torch.ao.quantization.fx._decomposed  # registers torch.ops.quantized_decomposed
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from compress.errors import UnsupportedError
from compress.model import TensorSpec
from compress.torch_graph.network import Network, Step, to_torch
from compress.torch_graph.operators import OPERATORS, Attributes
from quant.plan import QuantPlan
from quant.quantizer import quantize
from quant.spec import QParams

_LOW, _HIGH = -128, 127


def to_pt2e(
    graph_model: ir.Model, plan: QuantPlan, inputs: Sequence[TensorSpec]
) -> torch.export.ExportedProgram:
    """The float model with quantize/dequantize as the plan says, as an exported program.

    Tensors are rounded where `quant.simulation` rounds them; biases stay float. uint8 becomes
    int8, exactly. Shapes are static; a dynamic batch becomes 1.

    Args:
        graph_model: the float graph; not changed.
        plan: made for it; activations of 8 bits, weights of at most 8, not in groups.
        inputs: of the model.

    Raises:
        UnsupportedError: a format or an operator has no such form.
    """
    _check(plan)
    network = Network(graph_model)
    zeros = {spec.name: np.zeros(spec.concrete(), spec.dtype) for spec in inputs}
    arguments = tuple(to_torch(zeros)[name] for name in network.inputs)
    with torch.no_grad():
        lowering = _Lowering(network, plan, _static(network, arguments))
        # Real tensors: what is computed from shapes becomes plain numbers in the program.
        traced = make_fx(lowering.run, tracing_mode="real", pre_dispatch=True)(*arguments)
        _tidy(traced, network)
        return torch.export.export(traced, arguments)


def _check(plan: QuantPlan) -> None:
    if plan.dynamic:
        raise UnsupportedError(
            f"PT2E needs fixed activation ranges, and {', '.join(plan.dynamic)} would find theirs "
            f"at run time. Give calibration data."
        )
    for kind, found in (("activation", plan.activations), ("constant", plan.constants)):
        for name, params in found.items():
            spec = params.spec
            fits = spec.bits == 8 if kind == "activation" else spec.bits <= 8
            if not spec.integer or not fits or spec.group is not None:
                raise UnsupportedError(
                    f"PT2E stores int8, and the {kind} {name} is {spec.dtype} {spec.granularity}. "
                    f"Quantize activations to 8 bits and weights to at most 8, per channel."
                )


def _static(network: Network, arguments: Sequence[Tensor]) -> dict[str, Tensor]:
    """Tensors that depend on nothing but shapes, by name."""
    values = dict(zip(network.inputs, arguments, strict=True))
    known = set(network.constants)
    for index, step in enumerate(network.steps):
        network.advance(index, values)
        if step.op == "Shape" or known.issuperset(filter(None, step.inputs)):
            known.update(step.outputs)
    return {name: tensor for name, tensor in values.items() if name in known}


def _tidy(traced: torch.fx.GraphModule, network: Network) -> None:
    """Drop what was recorded of shapes, and name the arguments as the network's inputs."""
    traced.graph.eliminate_dead_code()
    taken = {node.name for node in traced.graph.nodes}
    placeholders = traced.graph.find_nodes(op="placeholder")
    for node, name in zip(placeholders, network.inputs, strict=True):
        if name.isidentifier() and not keyword.iskeyword(name) and name not in taken:
            node.name = node.target = name
    used = {node.target for node in traced.graph.find_nodes(op="get_attr")}
    for name, _ in list(traced.named_buffers()):
        if name not in used:
            delattr(traced, name)
    traced.recompile()


class _Stored:
    """A constant in int8; a matrix may be transposed."""

    def __init__(self, array: np.ndarray, params: QParams, transposed: bool) -> None:
        integers = quantize(array, params).astype(np.int16) - _shift(params)
        axis = params.axis
        if transposed:
            integers, axis = integers.T, None if axis is None else 1 - axis
        zero_point = params.zero_point.astype(np.int64) - _shift(params)
        self.params, self.axis = params, axis
        self.integers = torch.tensor(integers, dtype=torch.int8)
        self.scale, self.zero_point = torch.tensor(params.scale), torch.tensor(zero_point)

    def read(self) -> Tensor:
        """The float values."""
        if self.axis is None:
            return _dequantize(self.integers, self.params)
        numbers = (self.scale, self.zero_point, self.axis, _LOW, _HIGH, torch.int8)
        dequantize_per_channel = torch.ops.quantized_decomposed.dequantize_per_channel
        result: Tensor = dequantize_per_channel(self.integers, *numbers)
        return result


class _Lowering:
    """Runs a network once in PT2E's operators, to be recorded."""

    def __init__(self, network: Network, plan: QuantPlan, static: Mapping[str, Tensor]) -> None:
        """Convert all constants, so that nothing of that is recorded.

        Args:
            network: of the float graph.
            plan: made for it.
            static: tensors that depend on nothing but shapes.
        """
        self.network, self.plan = network, plan
        self.constants = {**network.constants, **static}
        self.values: dict[str, Tensor] = {}
        self.integers: dict[str, Tensor] = {}
        self.stored: dict[tuple[str, bool], _Stored] = {}
        self.biases: dict[str, Tensor] = {}
        self.linear = {step.name for step in network.steps if _is_linear(step, network, plan)}
        for step in network.steps:
            for name in step.inputs if step.name in plan.roles else ():
                if name in plan.constants:
                    array, params = network.constants[name].numpy(), plan.constants[name]
                    transposed = self._transposed(step)
                    self.stored[name, transposed] = _Stored(array, params, transposed)
            if plan.roles.get(step.name) == "matmul" and step.inputs[2:] not in ((), ("",)):
                self.biases[step.name] = self._bias(step)

    def _transposed(self, step: Step) -> bool:
        return step.name in self.linear and not step.attributes.get("transB", 0)

    def _bias(self, step: Step) -> Tensor:
        """The floats that are left of a bias in int32 of scale s_x s_w, which kernels use."""
        source, weight, name = step.inputs[:3]
        bias = self.constants[name]
        if source in self.plan.activations and weight in self.plan.constants:
            numbers = self.plan.activations[source].scale * self.plan.constants[weight].scale
            scale = torch.tensor(numbers)
            bias = torch.round(bias / scale) * scale
        return bias.reshape(-1) if step.name in self.linear else bias

    def run(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """The outputs, float."""
        for name, tensor in zip(self.network.inputs, inputs, strict=True):
            self._write(None, name, tensor)
        for step in self.network.steps:
            if self._on_integers(step) or all(name in self.constants for name in step.outputs):
                continue
            for name, tensor in self._compute(step).items():
                self._write(step, name, tensor)
        return tuple(self._read(None, name) for name in self.network.outputs)

    def _on_integers(self, step: Step) -> bool:
        """Run a Slice on the integers themselves, which backends without one cut in int8 too."""
        source = step.inputs[0] if step.inputs else ""
        params = [self.plan.activations.get(name) for name in (source, step.outputs[0])]
        if step.op != "Slice" or source not in self.integers or params[0] != params[1]:
            return False
        operands = [self.constants.get(name) for name in step.inputs[1:]]
        part = OPERATORS["Slice"](step.attributes, self.integers[source], *operands)
        if isinstance(part, Tensor):
            self.integers[step.outputs[0]] = part
        return True

    def _compute(self, step: Step) -> dict[str, Tensor]:
        operands = [self._read(step, name) if name else None for name in step.inputs]
        if step.name in self.biases:
            operands[2] = self.biases[step.name]
        operator = OPERATORS[step.op]
        if step.name in self.linear:
            operator = _linear
        elif step.op == "Clip":
            operator = _clip
        result = operator(step.attributes, *operands)
        outputs = result if isinstance(result, tuple) else (result,)
        return dict(zip(step.outputs, outputs, strict=False))

    def _read(self, step: Step | None, name: str) -> Tensor:
        """A tensor as a step reads it; as an output where there is none."""
        quantized = step is not None and step.name in self.plan.roles
        if name in self.constants:
            if step is None or not quantized or name not in self.plan.constants:
                return self.constants[name]
            return self.stored[name, self._transposed(step)].read()
        if name in self.integers and (quantized or name not in self.values):
            return _dequantize(self.integers[name], self.plan.activations[name])
        return self.values[name]

    def _write(self, step: Step | None, name: str, tensor: Tensor) -> None:
        """Keep a tensor as integers where an int8 operator writes or reads it, else as it is."""
        params = self.plan.activations.get(name)
        written = step is not None and step.name in self.plan.roles
        readers = self.network.readers.get(name, [])
        read = any(self.network.steps[index].name in self.plan.roles for index in readers)
        if params is not None and (written or read):
            self.integers[name] = _quantize(tensor, params)
        if params is None or not written:
            self.values[name] = tensor


def _is_linear(step: Step, network: Network, plan: QuantPlan) -> bool:
    """Whether a step is x W + b with a constant matrix in int8, as linear layers are."""
    if plan.roles.get(step.name) != "matmul" or step.op not in ("Gemm", "MatMul"):
        return False
    weight, plain = step.inputs[1], {"alpha": 1.0, "beta": 1.0, "transA": 0}
    if weight not in plan.constants or network.constants[weight].ndim != 2:
        return False
    return all(step.attributes.get(name, value) == value for name, value in plain.items())


def _linear(
    attributes: Attributes, x: Tensor, weight: Tensor, bias: Tensor | None = None
) -> Tensor:
    """A product with a matrix (out, in), as the operator that backends fuse."""
    return F.linear(x, weight, bias)


def _clip(
    attributes: Attributes, x: Tensor, low: Tensor | None = None, high: Tensor | None = None
) -> Tensor:
    """Clip by constants, as the operator that backends fuse."""
    if low is None or high is None:
        return torch.clamp(x, low, high)
    return F.hardtanh(x, float(low), float(high))


def _quantize(x: Tensor, params: QParams) -> Tensor:
    quantize_per_tensor = torch.ops.quantized_decomposed.quantize_per_tensor
    result: Tensor = quantize_per_tensor(x, *_numbers(params))
    return result


def _dequantize(integers: Tensor, params: QParams) -> Tensor:
    dequantize_per_tensor = torch.ops.quantized_decomposed.dequantize_per_tensor
    result: Tensor = dequantize_per_tensor(integers, *_numbers(params))
    return result


def _numbers(params: QParams) -> tuple[float, int, int, int, torch.dtype]:
    """What the operators take behind the tensor."""
    return float(params.scale), int(params.zero_point) - _shift(params), _LOW, _HIGH, torch.int8


def _shift(params: QParams) -> int:
    """128 for unsigned integers: with that less, values and zero point are those of int8."""
    return 0 if params.spec.format.signed else 128
