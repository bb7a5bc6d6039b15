"""ExecuTorch as a target: programs for phones and boards, run on this machine's CPU by XNNPACK."""

from __future__ import annotations

import functools
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from compress.machine import Machine, this_machine
from compress.model import Model
from compress.target import Capabilities, Check, Engine, FusablePattern
from targets.threads import check_threads, int8_notes, usable_threads

if TYPE_CHECKING:
    from targets.executorch_files import Program

OPSET = 21
_GEMM = "executorch 1.5 backends/xnnpack/partition/config/gemm_configs.py: STATIC_QUANT"
_GENERIC = "executorch 1.5 backends/xnnpack/partition/config/generic_node_configs.py: STATIC_QUANT"
_FUSED = "executorch 1.5 XNNPACK: the quantization behind the operator saturates"
_PAD = "executorch 1.5 generic_node_configs.py: float32 only, between conversions"

PATTERNS = (
    FusablePattern("Conv", "matmul", _GEMM, max_rank=4),
    FusablePattern("ConvTranspose", "matmul", _GEMM, max_rank=4),
    FusablePattern("Gemm", "matmul", _GEMM),
    FusablePattern("MatMul", "matmul", _GEMM, constant_weight=True),
    FusablePattern("Add", "elementwise", _GENERIC),
    FusablePattern("Sub", "elementwise", _GENERIC),
    FusablePattern("Mul", "elementwise", _GENERIC),
    FusablePattern("GlobalAveragePool", "pool", _GENERIC, max_rank=4),
    FusablePattern("Concat", "concat", _GENERIC),
    FusablePattern("MaxPool", "same_scale", _GENERIC, max_rank=4),
    FusablePattern("Reshape", "same_scale", _GENERIC),
    FusablePattern("Flatten", "same_scale", _GENERIC),
    FusablePattern("Squeeze", "same_scale", _GENERIC),
    FusablePattern("Unsqueeze", "same_scale", _GENERIC),
    FusablePattern("Transpose", "same_scale", _GENERIC),
    FusablePattern("Slice", "same_scale", _GENERIC),
    FusablePattern("Split", "same_scale", _GENERIC),
    FusablePattern("Pad", "same_scale", _PAD),
    FusablePattern("Relu", "activation", _FUSED),
    FusablePattern("Clip", "activation", _FUSED),
)
"""Average pools, sigmoids, tanh, softmax and products of two activations are float32 there."""


@dataclass(frozen=True, kw_only=True)
class ExecuTorch:
    """Make a program for ExecuTorch with the XNNPACK delegate, and run it on this machine.

    Attributes:
        threads: of one request; None takes all usable cores. Requests run one after another.
    """

    threads: int | None = None

    name: ClassVar[str] = "executorch"
    isolated: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_threads(self.threads, 1)

    @property
    def capabilities(self) -> Capabilities:
        """What XNNPACK's int8 kernels take, by its partitioner."""
        return executorch_capabilities(this_machine())

    def check(self) -> Check:
        """Whether the package is installed."""
        try:
            found = importlib.util.find_spec("executorch.runtime") is not None
        except (ImportError, ValueError):  # nothing, or what stands in its place
            found = False
        if found:
            return Check(available=True)
        return Check(False, "ExecuTorch is not installed.", "pip install 'hwcompress[executorch]'")

    def prepare(self, model: Model) -> None:
        """Make the program, which the build in another process then finds in the cache."""
        self._lowered(model)

    def build(self, model: Model) -> Engine:
        """The program of a model, loaded."""
        from targets.executorch_engine import ExecuTorchEngine

        return ExecuTorchEngine(self._lowered(model), usable_threads(self.threads))

    def load(self, directory: Path) -> Engine:
        """The program of an artifact's `model.pte`."""
        from targets.executorch_engine import ExecuTorchEngine
        from targets.executorch_files import Program

        return ExecuTorchEngine(Program.read(directory), usable_threads(self.threads))

    def _lowered(self, model: Model) -> Program:
        from targets.executorch_engine import lowered

        integers = any(node.op_type == "DequantizeLinear" for node in model.graph_model.graph)
        name = f"ExecuTorch {'int8' if integers else 'float32'}"
        return lowered(name, model.graph_model, model.inputs)


@functools.cache
def executorch_capabilities(machine: Machine) -> Capabilities:
    """Facts of the partitioner; whether int8 pays follows from the instruction set.

    The kernels take int8; unsigned integers become signed by subtracting 128, so they are asked
    for here, with a zero point for each tensor. Sums are exact on every instruction set.
    """
    return Capabilities(
        source=(
            "executorch 1.5 XNNPACK partitioner and quantizer: activations int8 with a zero point "
            "per tensor, weights int8 symmetric per channel"
        ),
        opset=OPSET,
        precisions=("float32", "int8"),
        activation="uint8",
        linear="Gemm",
        convolved_pools=False,  # measured on a keyword network, whose pool has a window of 25 x 5
        int8_dot_product=machine.int8_dot_product,
        patterns=PATTERNS,
        profiler=False,
        notes=(
            *int8_notes(machine, machine.int8_dot_product),
            "model.pte has a batch of 1. It was measured on this machine; on a phone or board "
            "`executor_runner --model_path=model.pte` runs it, which was not verified on a device.",
        ),
    )
