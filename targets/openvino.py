"""OpenVINO as a target: the machine's CPU, and what its int8 kernels want."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from compress.machine import Machine, this_machine
from compress.model import Model
from compress.target import Capabilities, Check, Engine, FusablePattern, Target
from targets.threads import check_threads, int8_notes, usable_threads

if TYPE_CHECKING:
    from targets.openvino_engine import CompileSettings

OPSET = 21
_POST = "openvino 2026.4 CPU plug-in, post-operations of int8 kernels, read from execution graphs"
_LPT = "openvino 2026.4 low-precision transformations, read from execution graphs"

PATTERNS = (
    FusablePattern("Conv", "matmul", _LPT, max_rank=5),
    FusablePattern("Gemm", "matmul", _LPT, float_output=True, symmetric=True),
    FusablePattern("MatMul", "matmul", _LPT, float_output=True, symmetric=True),
    FusablePattern("Add", "elementwise", _POST),
    FusablePattern("Mul", "elementwise", _POST, float_operand=True),
    FusablePattern("BatchNormalization", "unary", _POST),
    FusablePattern("Sigmoid", "epilogue", _POST),
    FusablePattern("HardSwish", "epilogue", _POST),
    FusablePattern("HardSigmoid", "epilogue", _POST),
    FusablePattern("LeakyRelu", "epilogue", _POST),
    FusablePattern("Elu", "epilogue", _POST),
    FusablePattern("Tanh", "epilogue", _POST),
    FusablePattern("Gelu", "epilogue", _POST),
    FusablePattern("AveragePool", "pool", _LPT),
    FusablePattern("GlobalAveragePool", "pool", _LPT),
    FusablePattern("Concat", "join", _LPT),
    FusablePattern("MaxPool", "transparent", _LPT),
    FusablePattern("Reshape", "transparent", _LPT),
    FusablePattern("Flatten", "transparent", _LPT),
    FusablePattern("Squeeze", "transparent", _LPT),
    FusablePattern("Unsqueeze", "transparent", _LPT),
    FusablePattern("Transpose", "transparent", _LPT),
    # Without Q/DQ it becomes ShuffleChannels, whose int8 kernel is slow.
    FusablePattern("ChannelShuffle", "same_scale", _LPT),
    FusablePattern("Split", "transparent", _LPT),
    FusablePattern("Gather", "transparent", _LPT),
    FusablePattern("Slice", "transparent", _LPT),
    FusablePattern("Pad", "transparent", _LPT),
    FusablePattern("Resize", "transparent", _LPT),
    FusablePattern("Relu", "activation", _POST),
    FusablePattern("Clip", "activation", _POST),
)


@dataclass(frozen=True, kw_only=True)
class OpenVINO:
    """Run on this machine's CPU with OpenVINO.

    Attributes:
        threads: of all requests together; None takes all usable cores.
        streams: requests in flight at once.
        precision: of what is not int8; bfloat16 where the processor has it.
        pinned: threads stay on their cores.
    """

    threads: int | None = None
    streams: int = 1
    precision: Literal["float32", "bfloat16"] = "float32"
    pinned: bool = True

    name: ClassVar[str] = "openvino"
    isolated: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_threads(self.threads, self.streams)

    @property
    def capabilities(self) -> Capabilities:
        """What OpenVINO's int8 kernels want on this CPU."""
        return openvino_capabilities(this_machine(), os.environ.get("ONEDNN_MAX_CPU_ISA", ""))

    def check(self) -> Check:
        """Whether the package is installed."""
        try:
            found = importlib.util.find_spec("openvino") is not None
        except (ImportError, ValueError):  # what stands in its place cannot be imported
            found = False
        if found:
            return Check(available=True)
        return Check(False, "OpenVINO is not installed.", "pip install 'hwcompress[openvino]'")

    def build(self, model: Model) -> Engine:
        """A compiled model."""
        from targets.openvino_engine import OpenVinoEngine

        integers = any(node.op_type == "DequantizeLinear" for node in model.graph_model.graph)
        name = f"OpenVINO {'int8' if integers else self.precision}"
        return OpenVinoEngine.from_graph(name, model.graph_model, model.inputs, self._settings())

    def load(self, directory: Path) -> Engine:
        """The compiled model of an artifact's `model.xml`."""
        from targets.openvino_engine import OpenVinoEngine

        path = directory / "model.xml"
        return OpenVinoEngine.from_file("OpenVINO", path, None, self._settings())

    def settings(self) -> tuple[Target, ...]:
        """Threads that may move between cores, and for throughput all of them on one request."""
        others: list[Target] = [dataclasses.replace(self, pinned=not self.pinned)]
        if self.streams > 1:
            others.append(dataclasses.replace(self, streams=1))
        return tuple(others)

    def _settings(self) -> CompileSettings:
        from targets.openvino_engine import CompileSettings

        return CompileSettings(
            threads=usable_threads(self.threads),
            streams=self.streams,
            precision=self.precision,
            pinned=self.pinned,
        )


_LEVELS = {
    "SSE41": 0, "AVX": 0, "AVX2": 0, "AVX512_CORE": 0,
    "AVX2_VNNI": 1, "AVX512_CORE_VNNI": 1,
}  # fmt: skip
"""ONEDNN_MAX_CPU_ISA: 0 has neither int8 dot product nor bfloat16, 1 has only the former."""


@functools.cache
def openvino_capabilities(machine: Machine, max_isa: str = "") -> Capabilities:
    """Facts that follow from the instruction set, as far as ONEDNN_MAX_CPU_ISA allows its use.

    x86 multiplies unsigned by signed bytes, and without VNNI in 16-bit sums that saturate unless
    weights keep to 7 bits (OpenVINO documentation, "Model Optimization", saturation issue).
    """
    level = _LEVELS.get(max_isa.upper(), 2)
    fast = machine.int8_dot_product and level >= 1
    wide = ("bfloat16",) if machine.bfloat16 and level >= 2 else ()
    return Capabilities(
        source="OpenVINO 2026.4 execution graphs and performance counters, AVX512-VNNI Xeon",
        opset=OPSET,
        precisions=("float32", *wide, "int8"),
        activation="uint8",
        reduced_weights=machine.is_x86 and not fast,
        costly_moves=True,
        int8_dot_product=fast,
        patterns=PATTERNS,
        weight_only=("int4",),
        notes=int8_notes(machine, fast),
    )
