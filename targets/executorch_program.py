"""An ONNX graph, float or QDQ, as a torch program in the form that ExecuTorch's partitioners read.

That form is PT2E, as torchao's `convert_pt2e` writes it: activations are int8 per tensor, weights
are stored in int8 and dequantized per channel, biases are float32 (a backend derives their int32
form), and every reader has a dequantize of its own. An operator between dequantize and quantize
runs in int8; the quantization behind it saturates, so an activation that the graph absorbed is
exact. uint8 becomes int8 by subtracting 128, exactly.

What XNNPACK lacks is written as what it has, with equal numbers: a Slice with steps in height and
width as a depthwise convolution by one, a Split as slices, a Squeeze as a reshape.
"""

from __future__ import annotations

import keyword
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import torch
import torch.ao.quantization.fx._decomposed  # registers torch.ops.quantized_decomposed
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.traceback import annotate, preserve_node_meta

from compress.errors import UnsupportedError
from compress.model import TensorSpec
from compress.torch_graph.network import Network, Step, to_torch
from compress.torch_graph.operators import Attributes
from targets.executorch_files import SITE

QUANTIZE, DEQUANTIZE = "QuantizeLinear", "DequantizeLinear"
_LOW, _HIGH = -128, 127
_MULTIPLIES = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_IN_INT8 = (*_MULTIPLIES, "Add", "Mul", "Sub")
"""What reads constants in int8, where it computes in int8."""
_SAME_SCALE = (
    "Concat", "Flatten", "MaxPool", "Reshape", "Slice", "Split", "Squeeze", "Transpose",
    "Unsqueeze",
)  # fmt: skip
"""What moves integers, so that XNNPACK wants one scale for what it reads and writes."""
_RESHAPES = ("Flatten", "Reshape", "Squeeze", "Unsqueeze")


def to_program(graph_model: ir.Model, inputs: Sequence[TensorSpec]) -> torch.export.ExportedProgram:
    """The graph as an exported program; a dynamic batch becomes 1.

    Args:
        graph_model: float, or with quantized activations of 8 bits and weights of at most 8, per
            tensor or per channel; not changed.
        inputs: of the model.

    Raises:
        UnsupportedError: a format or an operator has no such form.
    """
    network = Network(graph_model, {QUANTIZE: _quantize_linear, DEQUANTIZE: _dequantize_linear})
    zeros = {spec.name: np.zeros(spec.concrete(), spec.dtype) for spec in inputs}
    arguments = tuple(to_torch(zeros)[name] for name in network.inputs)
    with torch.no_grad(), preserve_node_meta():
        lowering = _Lowering(network, *_dry_run(network, arguments))
        # Real tensors: what is computed from shapes becomes plain numbers in the program.
        traced = make_fx(lowering.run, tracing_mode="real", pre_dispatch=True)(*arguments)
        _tidy(traced, network)
        _separate_pads(traced.graph)
        traced.recompile()
        return torch.export.export(traced, arguments)


def _dry_run(
    network: Network, arguments: Sequence[Tensor]
) -> tuple[dict[str, Tensor], dict[str, tuple[int, ...]]]:
    """Tensors that depend on nothing but constants and shapes; and the shapes of all, by name."""
    values = dict(zip(network.inputs, arguments, strict=True))
    known, shapes = set(network.constants), {name: tuple(t.shape) for name, t in values.items()}
    for index, step in enumerate(network.steps):
        network.advance(index, values)
        shapes |= {name: tuple(values[name].shape) for name in step.outputs if name in values}
        if step.op == "Shape" or known.issuperset(filter(None, step.inputs)):
            known.update(step.outputs)
        network.release(values, index, known)
    return network.constants | {name: t for name, t in values.items() if name in known}, shapes


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


def _separate_pads(graph: torch.fx.Graph) -> None:
    """Quantize behind a Pad of dequantized numbers for those who read floats.

    XNNPACK's own pass would make the Pad write int8 for them too (executorch 1.5,
    `InsertPadQDQPass`), which only an int8 convolution can read.
    """
    for node in [n for n in graph.nodes if _called(n) in ("pad", "constant_pad_nd")]:
        source = node.args[0]
        if _called(source) != "dequantize_per_tensor":
            continue
        if any(_reads_int8(user) and len(node.users) == 1 for user in node.users):
            continue
        with graph.inserting_after(node):
            quantize = torch.ops.quantized_decomposed.quantize_per_tensor.default
            made = graph.call_function(quantize, (node, *source.args[1:]))
        with graph.inserting_after(made):
            again = graph.call_function(source.target, (made, *source.args[1:]))
        for new in (made, again):
            new.meta["custom"] = node.meta.get("custom", {})
        node.replace_all_uses_with(again, delete_user_cb=lambda user, new=made: user is not new)


def _called(node: torch.fx.Node) -> str:
    """Name of the operator that a node calls, without library and overload."""
    target = node.target if node.op == "call_function" else None
    return target._opname if isinstance(target, torch._ops.OpOverload) else ""


def _reads_int8(node: torch.fx.Node) -> bool:
    """Whether a node quantizes, or is a convolution with weights in int8."""
    if _called(node) == "quantize_per_tensor":
        return True
    weight = node.args[1] if _called(node) in ("conv1d", "conv2d") else None
    return isinstance(weight, torch.fx.Node) and "dequantize" in _called(weight)


@dataclass(frozen=True)
class _Grid:
    """Scale and zero point of an activation, as int8."""

    scale: float
    zero_point: int

    def quantize(self, x: Tensor) -> Tensor:
        quantize_per_tensor = torch.ops.quantized_decomposed.quantize_per_tensor
        result: Tensor = quantize_per_tensor(x, *self._numbers)
        return result

    def dequantize(self, integers: Tensor) -> Tensor:
        dequantize_per_tensor = torch.ops.quantized_decomposed.dequantize_per_tensor
        result: Tensor = dequantize_per_tensor(integers, *self._numbers)
        return result

    @property
    def _numbers(self) -> tuple[float, int, int, int, torch.dtype]:
        return self.scale, self.zero_point, _LOW, _HIGH, torch.int8


@dataclass(frozen=True)
class _Stored:
    """A constant in int8: numbers, scales and zero points, and the axis of several."""

    integers: Tensor
    scale: Tensor
    zero_point: Tensor
    axis: int | None = None

    def transposed(self) -> _Stored:
        """A matrix the other way round."""
        axis = None if self.axis is None else 1 - self.axis
        integers = self.integers.T.contiguous()
        return _Stored(integers, self.scale, self.zero_point, axis)

    def read(self) -> Tensor:
        """The float values."""
        if self.axis is None:
            return _Grid(float(self.scale), int(self.zero_point)).dequantize(self.integers)
        numbers = (self.scale, self.zero_point, self.axis, _LOW, _HIGH, torch.int8)
        dequantize_per_channel = torch.ops.quantized_decomposed.dequantize_per_channel
        result: Tensor = dequantize_per_channel(self.integers, *numbers)
        return result


class _Lowering:
    """Runs a network once in the program's operators, to be recorded."""

    def __init__(
        self,
        network: Network,
        known: Mapping[str, Tensor],
        shapes: Mapping[str, tuple[int, ...]],
    ) -> None:
        """Convert all constants, so that nothing of that is recorded.

        Args:
            network: of the graph.
            known: tensors that depend on nothing but constants and shapes.
            shapes: of all other tensors, with batch 1.
        """
        self.network, self.known, self.shapes = network, known, shapes
        self.makers = {out: step for step in network.steps for out in step.outputs}
        self.values: dict[str, Tensor] = {}
        self.integers: dict[str, Tensor] = {}
        self.grids: dict[str, _Grid] = {}
        self.constants: dict[tuple[str, str], Tensor | _Stored] = {}
        self.ones: dict[str, Tensor | _Stored] = {}
        self.linear = {step.name for step in network.steps if self._is_linear(step)}
        for step in network.steps:
            if step.op == QUANTIZE and step.outputs[0] not in known:
                self.grids[step.outputs[0]] = _grid(step, known)
            elif step.op == "Slice" and any(cut.step > 1 for cut in self._cuts(step)):
                ones = torch.ones((shapes[step.inputs[0]][1], 1, 1, 1))
                self.ones[step.name] = _by_one(len(ones)) if self._in_int8(step) else ones
            elif step.op in _IN_INT8:
                self._prepare(step)

    def _prepare(self, step: Step) -> None:
        """The constants of an operator as it reads them."""
        in_int8 = self._in_int8(step)
        for index, name in enumerate(step.inputs):
            if name not in self.known:
                continue
            maker, constant = self.makers.get(name), self.known[name]
            found = _stored(maker, self.known) if in_int8 and maker is not None else None
            if index == 1 and step.name in self.linear and not step.attributes.get("transB", 0):
                self.constants[step.name, name] = (
                    found.transposed() if found is not None else constant.T.contiguous()
                )
            elif index == 2 and step.name in self.linear:
                self.constants[step.name, name] = constant.reshape(-1)
            elif found is not None:
                self.constants[step.name, name] = found

    def _is_linear(self, step: Step) -> bool:
        """Whether a step is x W + b with a constant matrix, as linear layers are."""
        if step.op not in ("Gemm", "MatMul") or step.inputs[0] in self.known:
            return False
        weight, plain = self.known.get(step.inputs[1]), {"alpha": 1.0, "beta": 1.0, "transA": 0}
        if weight is None or weight.ndim != 2 or not weight.is_floating_point():
            return False
        if any(step.attributes.get(name, value) != value for name, value in plain.items()):
            return False
        if len(step.inputs) < 3 or not step.inputs[2]:
            return True
        bias = self.known.get(step.inputs[2])
        width = weight.shape[0 if step.attributes.get("transB", 0) else 1]
        return bias is not None and bias.numel() == width and bias.shape[-1:] == (width,)

    def _in_int8(self, step: Step) -> bool:
        """Whether what a step reads was dequantized, and what it writes is quantized."""
        activations = [name for name in step.inputs if name and name not in self.known]
        makers = [self.makers.get(name) for name in activations]
        if not activations or any(m is None or m.op != DEQUANTIZE for m in makers):
            return False
        reader = self._only_reader(step)
        if reader is not None and reader.op in ("Relu", "Clip"):
            reader = self._only_reader(reader)
        return reader is not None and reader.op == QUANTIZE

    def _only_reader(self, step: Step) -> Step | None:
        """The step that alone reads what this one writes."""
        name, readers = step.outputs[0], self.network.readers.get(step.outputs[0], [])
        if len(step.outputs) > 1 or len(readers) != 1 or name in self.network.outputs:
            return None
        return self.network.steps[readers[0]]

    def run(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """The outputs."""
        self.values = dict(zip(self.network.inputs, inputs, strict=True))
        for step in self.network.steps:
            if any(n not in self.known and n not in self.integers for n in step.outputs):
                with annotate({SITE: step.name}):
                    self._step(step)
        return tuple(self._read(None, name) for name in self.network.outputs)

    def _step(self, step: Step) -> None:
        out, on_integers = step.outputs[0], any(name in self.integers for name in step.inputs)
        if on_integers != (step.op == DEQUANTIZE) and not (on_integers and step.op == "Clip"):
            raise UnsupportedError(
                f"{step.name} ({step.op}) has no counterpart: of quantized tensors only "
                f"DequantizeLinear and Clip read, and DequantizeLinear reads nothing else."
            )
        if step.op == QUANTIZE:
            self._quantize(step)
        elif on_integers and step.op == "Clip":
            grid = self.grids[step.inputs[0]]
            x = _limited(grid.dequantize(self.integers[step.inputs[0]]), self._limits(step), grid)
            self._keep(out, grid.quantize(x), grid)
        elif step.op == "Slice" and self._cuts(step):
            self.values[out] = self._slice(step)
        elif step.op == "Split":
            self.values |= self._split(step)
        elif step.op in _RESHAPES:
            self.values[out] = self._read(step, step.inputs[0]).reshape(self.shapes[out])
        elif not on_integers:
            self.values |= self._compute(step)

    def _compute(self, step: Step) -> dict[str, Tensor]:
        operands = [self._read(step, name) if name else None for name in step.inputs]
        operator = self.network.operators[step.op]
        if step.name in self.linear:
            operator = _linear
        elif step.op == "Clip":
            operator = _clip
        result = operator(step.attributes, *operands)
        outputs = result if isinstance(result, tuple) else (result,)
        return dict(zip(step.outputs, outputs, strict=False))

    def _read(self, step: Step | None, name: str) -> Tensor:
        """A tensor as a step reads it; as an output of the graph where there is none."""
        if step is not None and (step.name, name) in self.constants:
            return _floats(self.constants[step.name, name])
        if name in self.known:
            return self.known[name]
        maker = self.makers.get(name)
        if maker is not None and maker.op == DEQUANTIZE:
            source = maker.inputs[0]
            return self._rescaled(
                step, source, self.grids[source].dequantize(self.integers[source])
            )
        return self.values[name]

    def _rescaled(self, step: Step | None, source: str, x: Tensor) -> Tensor:
        """Dequantized numbers on the grid of what a step writes, where it only moves integers."""
        if step is None or step.op not in _SAME_SCALE or not self._in_int8(step):
            return x
        reader = self._only_reader(step)
        if reader is None or reader.op != QUANTIZE:
            return x
        grid = self.grids[reader.outputs[0]]
        return x if grid == self.grids[source] else grid.dequantize(grid.quantize(x))

    def _quantize(self, step: Step) -> None:
        """Quantize; limits that follow are kept before, where a product's kernel keeps them."""
        source, out = step.inputs[0], step.outputs[0]
        x, grid, maker = self._read(step, source), self.grids[out], self.makers.get(source)
        reader = self._only_reader(step)
        fuses = maker is not None and maker.op in _MULTIPLIES and self._only_reader(maker) is step
        if fuses and reader is not None and reader.op == "Clip":
            x = _limited(x, self._limits(reader), grid)
            self._keep(reader.outputs[0], grid.quantize(x), grid)
        if reader is None or reader.outputs[0] not in self.integers:
            self._keep(out, grid.quantize(x), grid)

    def _keep(self, name: str, integers: Tensor, grid: _Grid) -> None:
        self.integers[name], self.grids[name] = integers, grid

    def _limits(self, step: Step) -> tuple[int, int]:
        """The bounds of a Clip of integers, as int8."""
        bounds = [self.known[name] if name else None for name in step.inputs[1:3]]
        low, high = (None if b is None else int(b) - _shift(b.dtype) for b in (*bounds, None)[:2])
        return _LOW if low is None else low, _HIGH if high is None else high

    def _cuts(self, step: Step) -> tuple[range, ...]:
        """For each axis what a Slice takes; none where that has another form."""
        shape = self.shapes.get(step.inputs[0], ())
        operands = [self.known.get(name) for name in step.inputs[1:]]
        if step.inputs[0] in self.known or any(operand is None for operand in operands):
            return ()
        numbers = [[int(i) for i in t.tolist()] for t in operands if t is not None]
        begins, ends = numbers[:2]
        axes = numbers[2] if len(numbers) > 2 else range(len(begins))
        steps = numbers[3] if len(numbers) > 3 else [1] * len(begins)
        cuts = [range(size) for size in shape]
        for begin, end, axis, stride in zip(begins, ends, axes, steps, strict=True):
            cuts[axis] = cuts[axis][slice(begin, end, stride)] if stride > 0 else range(0, 0, -1)
        strided = [axis for axis, cut in enumerate(cuts) if cut.step != 1]
        if any(not cut for cut in cuts) or (strided and (len(cuts) != 4 or min(strided) < 2)):
            return ()
        return tuple(cuts)

    def _slice(self, step: Step) -> Tensor:
        x, cuts, shape = self._read(step, step.inputs[0]), self._cuts(step), self.shapes
        cut = False
        for axis, (size, taken) in enumerate(zip(shape[step.inputs[0]], cuts, strict=True)):
            if taken[0] or len(taken) != len(range(0, size, taken.step)):
                x, cut = x.narrow(axis, taken[0], taken[-1] + 1 - taken[0]), True
        if step.name not in self.ones:
            return x
        if cut and isinstance(self.ones[step.name], _Stored):
            grid = self.grids[self.makers[step.inputs[0]].inputs[0]]
            x = grid.dequantize(grid.quantize(x))
        strides = [taken.step for taken in cuts[2:]]
        return F.conv2d(x, _floats(self.ones[step.name]), None, strides, groups=x.shape[1])

    def _split(self, step: Step) -> dict[str, Tensor]:
        axis, begin, parts = step.attributes.get("axis", 0), 0, {}
        for name in step.outputs:
            size = self.shapes[name][axis]
            parts[name] = self._read(step, step.inputs[0]).narrow(axis, begin, size)
            begin += size
        return parts


def _floats(constant: Tensor | _Stored) -> Tensor:
    return constant.read() if isinstance(constant, _Stored) else constant


def _by_one(channels: int) -> _Stored:
    """The weights of a depthwise convolution that changes no integer."""
    ones = torch.ones((channels, 1, 1, 1), dtype=torch.int8)
    return _Stored(ones, torch.ones(channels), torch.zeros(channels, dtype=torch.int64), 0)


def _limited(x: Tensor, limits: tuple[int, int], grid: _Grid) -> Tensor:
    """The floats of integers within limits."""
    low, high = limits
    if low == grid.zero_point and high >= _HIGH:
        return F.relu(x)
    least, most = ((limit - grid.zero_point) * grid.scale for limit in limits)
    return F.hardtanh(x, least, most)


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


def _quantize_linear(
    attributes: Attributes, x: Tensor, scale: Tensor, zero_point: Tensor | None = None
) -> Tensor:
    """QuantizeLinear, to learn shapes and constants."""
    dtype = torch.uint8 if zero_point is None else zero_point.dtype
    info = torch.iinfo(dtype)
    scale, zero = _spread(attributes, x, scale), _spread(attributes, x, zero_point)
    return torch.clamp(torch.round(x / scale) + zero, info.min, info.max).to(dtype)


def _dequantize_linear(
    attributes: Attributes, x: Tensor, scale: Tensor, zero_point: Tensor | None = None
) -> Tensor:
    """DequantizeLinear, to learn shapes and constants."""
    scale, zero = _spread(attributes, x, scale), _spread(attributes, x, zero_point)
    return (x.to(torch.float64) - zero).to(torch.float32) * scale


def _spread(attributes: Attributes, x: Tensor, numbers: Tensor | None) -> Tensor:
    """Scales or zero points along their axis."""
    if numbers is None:
        return torch.zeros(())
    if numbers.ndim > 1 or attributes.get("block_size", 0):
        raise UnsupportedError("Quantization in blocks has no counterpart in int8 programs.")
    if numbers.numel() == 1:
        return numbers.reshape(())
    shape = [1] * x.ndim
    shape[attributes.get("axis", 1)] = -1
    return numbers.reshape(shape)


def _grid(step: Step, known: Mapping[str, Tensor]) -> _Grid:
    """The int8 grid of a QuantizeLinear.

    Raises:
        UnsupportedError: it is none.
    """
    scale = known.get(step.inputs[1])
    zero = known.get(step.inputs[2]) if len(step.inputs) > 2 else torch.zeros((), dtype=torch.uint8)
    plain = scale is not None and zero is not None and scale.numel() == zero.numel() == 1
    if scale is None or zero is None or not plain or zero.dtype not in (torch.uint8, torch.int8):
        raise UnsupportedError(
            f"{step.name} quantizes to another format than int8 with one constant scale. "
            f"Quantize activations to 8 bits per tensor."
        )
    return _Grid(float(scale), int(zero) - _shift(zero.dtype))


def _stored(step: Step, known: Mapping[str, Tensor]) -> _Stored | None:
    """The constant that a DequantizeLinear reads, as int8; None where it is none of 8 bits."""
    integers = known[step.inputs[0]] if step.op == DEQUANTIZE else None
    if integers is None or integers.dtype not in (torch.uint8, torch.int8):
        return None
    shift = _shift(integers.dtype)
    scale = known[step.inputs[1]]
    zero = known[step.inputs[2]] if len(step.inputs) > 2 else torch.zeros_like(scale)
    axis = None if scale.numel() == 1 else int(step.attributes.get("axis", 1)) % integers.ndim
    numbers = (integers.to(torch.int16) - shift).to(torch.int8)
    shape = () if axis is None else (-1,)
    zeros = zero.to(torch.int64).reshape(shape) - shift
    return _Stored(numbers, scale.to(torch.float32).reshape(shape), zeros, axis)


def _shift(dtype: torch.dtype) -> int:
    """128 for unsigned integers: with that less, values and zero point are those of int8."""
    return 128 if dtype == torch.uint8 else 0
