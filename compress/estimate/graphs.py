"""Small ONNX networks with random weights, in float and, through the project's passes, in int8."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from compress.data import load_data
from compress.model import Model, TensorSpec
from compress.passes import Context
from compress.target import Target

Shape = tuple[int, ...]
_SAMPLES = 2
"""Ranges decide no time; what calibrates them need not be more."""


@dataclass
class Tensor:
    """A tensor of the network that is being written."""

    name: str
    shape: Shape


@dataclass
class Network:
    """Writes an ONNX graph node by node; every method returns the tensor that it adds.

    Attributes:
        shape: of the input, with the batch.
        opset: of the graph.
        name: of the model; seeds its weights.
    """

    shape: Shape
    opset: int = 21
    name: str = "network"
    nodes: list[Any] = field(default_factory=list)
    weights: list[Any] = field(default_factory=list)

    @property
    def start(self) -> Tensor:
        """The input."""
        return Tensor("x", self.shape)

    def conv(
        self, x: Tensor, channels: int, kernel: int = 3, stride: int = 1, groups: int = 1
    ) -> Tensor:
        """Convolution with bias, padded so that stride 1 keeps the size."""
        size = tuple((n + stride - 1) // stride for n in x.shape[2:])
        pads = [kernel // 2] * 4
        attributes = {
            "pads": pads,
            "strides": [stride] * 2,
            "kernel_shape": [kernel] * 2,
            "group": groups,
        }
        constants = [
            self._constant((channels, x.shape[1] // groups, kernel, kernel)),
            self._constant((channels,)),
        ]
        out = (x.shape[0], channels, *size)
        return self.node("Conv", [x], out, constants, attributes)

    def linear(self, x: Tensor, channels: int) -> Tensor:
        """Gemm with bias on (N, C)."""
        constants = [self._constant((channels, x.shape[1])), self._constant((channels,))]
        return self.node("Gemm", [x], (x.shape[0], channels), constants, {"transB": 1})

    def relu(self, x: Tensor) -> Tensor:
        """max(x, 0)."""
        return self.node("Relu", [x], x.shape)

    def relu6(self, x: Tensor) -> Tensor:
        """Between 0 and 6."""
        bounds = [self._scalar(0.0), self._scalar(6.0)]
        return self.node("Clip", [x], x.shape, bounds)

    def unary(self, op_type: str, x: Tensor) -> Tensor:
        """An operator on each element: "HardSwish", "Sigmoid"."""
        return self.node(op_type, [x], x.shape)

    def binary(self, op_type: str, x: Tensor, y: Tensor) -> Tensor:
        """Add or Mul of tensors of one shape, or with `y` of size 1 in some axes."""
        return self.node(op_type, [x, y], x.shape)

    def pool(self, x: Tensor, op_type: str = "MaxPool", kernel: int = 2, stride: int = 2) -> Tensor:
        """A window that moves by `stride`; 3x3 windows are padded by one."""
        pad = kernel // 2 if kernel % 2 else 0
        size = tuple((n + 2 * pad - kernel) // stride + 1 for n in x.shape[2:])
        attributes = {"kernel_shape": [kernel] * 2, "strides": [stride] * 2, "pads": [pad] * 4}
        return self.node(op_type, [x], (*x.shape[:2], *size), attributes=attributes)

    def global_pool(self, x: Tensor) -> Tensor:
        """(N, C, 1, 1)."""
        return self.node("GlobalAveragePool", [x], (*x.shape[:2], 1, 1))

    def flatten(self, x: Tensor) -> Tensor:
        """(N, C)."""
        return self.node("Flatten", [x], (x.shape[0], int(np.prod(x.shape[1:]))))

    def concat(self, parts: Sequence[Tensor]) -> Tensor:
        """Along the channels."""
        first = parts[0].shape
        shape = (first[0], sum(part.shape[1] for part in parts), *first[2:])
        return self.node("Concat", list(parts), shape, attributes={"axis": 1})

    def node(
        self,
        op_type: str,
        inputs: Sequence[Tensor],
        shape: Shape,
        constants: Sequence[str] = (),
        attributes: dict[str, Any] | None = None,
    ) -> Tensor:
        """Any operator."""
        from onnx import helper

        name = f"{op_type}_{len(self.nodes)}"
        names = [one.name for one in inputs] + list(constants)
        made = helper.make_node(op_type, names, [f"{name}_out"], name=name, **(attributes or {}))
        self.nodes.append(made)
        return Tensor(f"{name}_out", shape)

    def model(self, out: Tensor) -> Model:
        """The network up to `out` at the ONNX stage."""
        import onnx
        import onnx_ir as ir
        from onnx import TensorProto, helper

        given = helper.make_tensor_value_info("x", TensorProto.FLOAT, self.shape)
        # Under a name of its own, as every operator's tensor may be renamed by a pass.
        self.nodes[-1].output[0] = "y"
        made = helper.make_tensor_value_info("y", TensorProto.FLOAT, out.shape)
        graph = helper.make_graph(self.nodes, self.name, [given], [made], self.weights)
        opsets = [helper.make_opsetid("", self.opset)]
        proto = helper.make_model(graph, opset_imports=opsets, ir_version=10)
        program = ir.from_proto(onnx.shape_inference.infer_shapes(proto))
        return Model(program, (TensorSpec("x", self.shape),), self.name, source="random weights")

    def _constant(self, shape: Shape) -> str:
        from onnx import numpy_helper

        name = f"w{len(self.weights)}"
        rng = np.random.default_rng(zlib.crc32(f"{self.name} {name}".encode()))
        # He et al. 2015 (arXiv 1502.01852): activations keep their size from layer to layer.
        fan = int(np.prod(shape[1:])) if len(shape) > 1 else 100
        values = rng.standard_normal(shape, dtype=np.float32) * np.float32((2 / fan) ** 0.5)
        self.weights.append(numpy_helper.from_array(values, name))
        return name

    def _scalar(self, value: float) -> str:
        from onnx import numpy_helper

        name = f"w{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(np.array(value, np.float32), name))
        return name


def quantized(model: Model, target: Target) -> Model:
    """The model in int8 as the default recipe places it, with ranges of random data.

    Its outputs mean nothing; its kernels are those of a model that was calibrated with care.

    Raises:
        UnsupportedError: the target has no int8.
    """
    from compress.lowering import lower
    from compress.recipe import default_passes

    rng = np.random.default_rng(0)
    spec = model.inputs[0]
    count = max(_SAMPLES, spec.concrete()[0])
    samples = rng.standard_normal((count, *spec.concrete()[1:]), dtype=np.float32)
    data = load_data(samples, model.inputs)
    passes = default_passes(bits=8, method="minmax", samples=count)
    context = Context(target=target, original=model, calibration=data)
    lowered = lower(model, passes, context)
    return lowered.apply(refine=False)
