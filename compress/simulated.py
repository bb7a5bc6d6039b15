"""A target that cannot be built here, stood in for by ONNX Runtime: numbers, never latencies.

Every operator runs as the file says it: Q/DQ quantize and dequantize, and what lies between them
computes in the type that it has. So accuracy is that of the numbers which the file asks for; what
the target's own kernels round differently shows when the engine is built.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from compress.model import Arrays, Model, TensorSpec
from compress.reference import reference_session, run, save_onnx
from compress.target import Capabilities, Check, Engine, Kernel, KernelTime, Target

WHERE = "simulated in ONNX Runtime"
_WITH_WEIGHTS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_STORED: dict[ir.DataType | None, str] = {
    ir.DataType.INT8: "int8",
    ir.DataType.FLOAT8E4M3FN: "float8",
}
_HALF = {ir.DataType.FLOAT16: "float16", ir.DataType.BFLOAT16: "bfloat16"}


@dataclass
class SimulatedEngine:
    """The graph as it is written, on the CPU."""

    name: str
    graph_model: ir.Model
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        self._session = reference_session(self.graph_model)
        self.outputs = tuple(output.name for output in self._session.get_outputs())

    def __call__(self, inputs: Mapping[str, np.ndarray]) -> Arrays:
        """Run once."""
        return run(self._session, inputs)

    def save(self, directory: Path) -> list[Path]:
        """`model.onnx`."""
        return save_onnx(self.graph_model, directory / "model.onnx")

    def kernels(self) -> tuple[Kernel, ...]:
        """The operators with weights, in the precision that the file asks for."""
        nodes = (node for node in self.graph_model.graph if node.op_type in _WITH_WEIGHTS)
        return tuple(
            Kernel(node.name or "", node.op_type, _asked(node), node.name or "") for node in nodes
        )

    def profile(self, inputs: Mapping[str, np.ndarray], runs: int = 20) -> tuple[KernelTime, ...]:
        """Nothing: times of a simulation say nothing about the target."""
        return ()


@dataclass(frozen=True)
class Simulated:
    """Stands in for a target: its name and facts, and engines that simulate its own.

    Attributes:
        target: that cannot be built here.
    """

    target: Target

    name: ClassVar[str] = "simulated"

    @property
    def capabilities(self) -> Capabilities:
        """Those of the target."""
        return self.target.capabilities

    def check(self) -> Check:
        """ONNX Runtime is a core dependency."""
        return Check(available=True)

    def build(self, model: Model) -> Engine:
        """A simulation of what the target will compute."""
        name = f"{self.target.name} {WHERE}"
        return SimulatedEngine(name, model.graph_model, model.inputs)

    def load(self, directory: Path) -> Engine:
        """The simulation of `model.onnx`."""
        from compress.loading import load

        return self.build(load(directory / "model.onnx"))


def _asked(node: ir.Node) -> str:
    """The type that both operands were stored in before DequantizeLinear, else the output's."""
    stored = {_stored(value) for value in node.inputs[:2]}
    if len(stored) == 1 and None not in stored:
        return _STORED.get(stored.pop(), "float32")
    dtype = node.outputs[0].dtype
    return _HALF.get(dtype, "float32") if dtype is not None else "float32"


def _stored(value: ir.Value | None) -> ir.DataType | None:
    """What DequantizeLinear reads to give this value; None where it gives none."""
    maker = value.producer() if value is not None else None
    if maker is None or maker.op_type != "DequantizeLinear" or maker.inputs[0] is None:
        return None
    return maker.inputs[0].dtype
