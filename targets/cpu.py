"""The CPU target: the machine this runs on, through ONNX Runtime."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from compress.errors import UsageError
from compress.machine import Machine, this_machine
from compress.model import Model
from compress.target import Capabilities, Check, Engine

OPSET = 21
_MOST_THREADS = 1024
_INTEGER_OPERATORS = ("DequantizeLinear", "DynamicQuantizeLinear")


@dataclass(frozen=True, kw_only=True)
class CPU:
    """Run on this machine's CPU.

    Attributes:
        threads: of one operator; None takes all usable cores.
    """

    threads: int | None = None

    name: ClassVar[str] = "cpu"

    def __post_init__(self) -> None:
        cores = this_machine().cores
        if self.threads is not None and not 1 <= self.threads <= _MOST_THREADS:
            raise UsageError(
                f"--threads {self.threads} is out of range, 1 to {_MOST_THREADS}: this machine has "
                f"{cores} usable cores. Leave the option out to use all of them."
            )

    @property
    def capabilities(self) -> Capabilities:
        """What ONNX Runtime's int8 kernels want on this CPU."""
        return cpu_capabilities(this_machine())

    def check(self) -> Check:
        """ONNX Runtime is a core dependency, so this target is always there."""
        return Check(available=True)

    def build(self, model: Model) -> Engine:
        """An ONNX Runtime session."""
        from targets.onnxruntime import OnnxRuntimeEngine, SessionSettings

        settings = SessionSettings(threads=self.threads or this_machine().cores)
        integers = any(node.op_type in _INTEGER_OPERATORS for node in model.graph_model.graph)
        name = f"ONNX Runtime {'int8' if integers else 'float32'}"
        return OnnxRuntimeEngine(name, model.graph_model, model.inputs, settings)

    def load(self, directory: Path) -> Engine:
        """The session of an artifact's `model.onnx`."""
        from compress.loading import load

        return self.build(load(directory / "model.onnx"))


@functools.cache
def cpu_capabilities(machine: Machine) -> Capabilities:
    """Facts that follow from the instruction set.

    x86 multiplies unsigned by signed bytes (vpdpbusd with VNNI, vpmaddubsw without), so
    activations are unsigned; without VNNI the 16-bit sums of vpmaddubsw saturate, so weights
    keep to 7 bits (ONNX Runtime documentation, "Quantize ONNX models", reduce_range).
    """
    from targets.onnxruntime import PATTERNS

    x86 = machine.architecture in ("x86_64", "AMD64")
    fast = machine.int8_dot_product
    notes = []
    if not fast:
        instruction = "VNNI" if x86 else "the dot-product extension"
        notes.append(
            f"This CPU ({machine.cpu}) has no int8 dot product ({instruction}): expect int8 "
            f"to save memory more than time."
        )
    return Capabilities(
        source=(
            "ONNX Runtime 1.31 MLAS kernels: U8S8 is the fast form on x86; measured on an AVX512-"
            "VNNI Xeon, one thread"
        ),
        opset=OPSET,
        precisions=("float32", "int8"),
        activation="uint8",
        reduced_weights=x86 and not fast,
        int8_dot_product=fast,
        patterns=PATTERNS,
        notes=tuple(notes),
    )
