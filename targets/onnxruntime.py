"""ONNX Runtime as a target: the machine's CPU, and what its int8 kernels want."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from compress.machine import Machine, this_machine
from compress.model import Model
from compress.target import Capabilities, Check, Engine, FusablePattern, Target
from targets.threads import check_threads, int8_notes, usable_threads

OPSET = 21
_INTEGER_OPERATORS = ("DequantizeLinear", "DynamicQuantizeLinear")

_TRANSFORMER = "onnxruntime 1.31 QDQ selector-action transformer, read from its optimized graphs"
_CONTRIB = "onnxruntime contrib operators (com.microsoft QLinear*), read from its optimized graphs"

PATTERNS = (
    FusablePattern("Conv", "matmul", _TRANSFORMER, max_rank=5),
    FusablePattern("Gemm", "matmul", _TRANSFORMER, float_output=True),
    FusablePattern("MatMul", "matmul", _TRANSFORMER, float_output=True),
    FusablePattern("Add", "elementwise", _CONTRIB),
    FusablePattern("Mul", "elementwise", _CONTRIB),
    FusablePattern("Sigmoid", "unary", _CONTRIB),
    FusablePattern("LeakyRelu", "unary", _CONTRIB),
    FusablePattern("HardSwish", "unary", "integer form of quant.emit: Clip and QLinearMul"),
    FusablePattern("HardSigmoid", "unary", "integer form of quant.emit: no kernel at all"),
    FusablePattern("AveragePool", "pool", _CONTRIB),
    FusablePattern("GlobalAveragePool", "pool", _CONTRIB),
    FusablePattern("Concat", "concat", _CONTRIB),
    FusablePattern("MaxPool", "same_scale", _TRANSFORMER),
    FusablePattern("Reshape", "same_scale", _TRANSFORMER),
    FusablePattern("Flatten", "same_scale", _TRANSFORMER),
    FusablePattern("Squeeze", "same_scale", _TRANSFORMER),
    FusablePattern("Unsqueeze", "same_scale", _TRANSFORMER),
    FusablePattern("Transpose", "same_scale", _TRANSFORMER),
    FusablePattern("Split", "same_scale", _TRANSFORMER),
    FusablePattern("Gather", "same_scale", _TRANSFORMER),
    FusablePattern("Resize", "same_scale", _TRANSFORMER),
    FusablePattern("Slice", "integer", "ONNX Slice takes uint8; the transformer leaves it"),
    FusablePattern("Pad", "integer", "ONNX Pad takes uint8; the transformer leaves it"),
    FusablePattern("Relu", "activation", _TRANSFORMER),
    FusablePattern("Clip", "activation", _TRANSFORMER),
)


@dataclass(frozen=True, kw_only=True)
class OnnxRuntime:
    """Run on this machine's CPU with ONNX Runtime.

    Attributes:
        threads: of all requests together; None takes all usable cores.
        streams: requests in flight at once; each operator gets threads / streams.
        layout: of float convolutions, "blocked" (NCHWc) or "plain" (the model's own).
        arena: memory is kept for the next call.
        spinning: threads that wait for work stay awake.
    """

    threads: int | None = None
    streams: int = 1
    layout: Literal["blocked", "plain"] = "blocked"
    arena: bool = True
    spinning: bool = True

    name: ClassVar[str] = "onnxruntime"

    def __post_init__(self) -> None:
        check_threads(self.threads, self.streams)

    @property
    def capabilities(self) -> Capabilities:
        """What ONNX Runtime's int8 kernels want on this CPU."""
        return onnxruntime_capabilities(this_machine())

    def check(self) -> Check:
        """ONNX Runtime is a core dependency, so this target is always there."""
        return Check(available=True)

    def build(self, model: Model) -> Engine:
        """An ONNX Runtime session."""
        from targets.onnxruntime_engine import OnnxRuntimeEngine, SessionSettings

        settings = SessionSettings(
            threads=max(1, usable_threads(self.threads) // self.streams),
            layout=self.layout,
            arena=self.arena,
            spinning=self.spinning,
        )
        integers = any(node.op_type in _INTEGER_OPERATORS for node in model.graph_model.graph)
        name = f"ONNX Runtime {'int8' if integers else 'float32'}"
        return OnnxRuntimeEngine(name, model.graph_model, model.inputs, settings)

    def load(self, directory: Path) -> Engine:
        """The session of an artifact's `model.onnx`."""
        from compress.loading import load

        return self.build(load(directory / "model.onnx"))

    def settings(self) -> tuple[Target, ...]:
        """Plain layout, no arena; sleeping threads, or all of them on one request."""
        others: list[Target] = [
            dataclasses.replace(self, layout="plain"),
            dataclasses.replace(self, arena=False),
        ]
        if usable_threads(self.threads) > self.streams:
            others.append(dataclasses.replace(self, spinning=False))
        if self.streams > 1:
            others.append(dataclasses.replace(self, streams=1))
        return tuple(others)


@functools.cache
def onnxruntime_capabilities(machine: Machine) -> Capabilities:
    """Facts that follow from the instruction set.

    x86 multiplies unsigned by signed bytes (vpdpbusd with VNNI, vpmaddubsw without), so
    activations are unsigned; without VNNI the 16-bit sums of vpmaddubsw saturate, so weights
    keep to 7 bits (ONNX Runtime documentation, "Quantize ONNX models", reduce_range).
    """
    return Capabilities(
        source=(
            "ONNX Runtime 1.31 MLAS kernels: U8S8 is the fast form on x86; measured on an AVX512-"
            "VNNI Xeon, one thread"
        ),
        opset=OPSET,
        precisions=("float32", "int8"),
        activation="uint8",
        reduced_weights=machine.is_x86 and not machine.int8_dot_product,
        linear="Gemm",
        int8_dot_product=machine.int8_dot_product,
        patterns=PATTERNS,
        weight_only=("int4",),
        notes=int8_notes(machine, machine.int8_dot_product),
    )
