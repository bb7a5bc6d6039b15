"""ONNX Runtime on phones as a target: an ORT-format model, and what a small build needs.

The artifact is made and checked here; the CPU provider here runs the same graph, so accuracy is
that of the device, and latency is not. NNAPI is left out: Android 15 deprecated it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from compress.errors import LoadError
from compress.machine import this_machine
from compress.model import Model
from compress.target import Capabilities, Check, Engine
from targets.onnxruntime import OPSET, PATTERNS
from targets.threads import check_threads, usable_threads

if TYPE_CHECKING:
    from targets.onnxruntime_engine import SessionSettings

_GATES = ("HardSwish", "HardSigmoid")
"""Their integer forms need unsigned activations."""
SOURCE = (
    "int8 activations: ONNX Runtime's XNNPACK provider takes int8 by int8 (one weight scale per "
    "output channel, weights with zero point 0) and uint8 by uint8, never uint8 by int8 "
    "(onnxruntime/core/providers/xnnpack/nn/conv_base.cc, GetConvCompType); MLAS has dot-product "
    "kernels for both on ARM64 (mlas/lib/platform.cpp); documentation, 'Quantize ONNX models': "
    "S8S8 with QDQ first, and no saturation on ARM, so no reduced range"
)


@dataclass(frozen=True, kw_only=True)
class OrtMobile:
    """Make an ORT-format model for onnxruntime-android and iOS; try it on this machine's CPU.

    Attributes:
        threads: of one operator, here; None takes all usable cores.
    """

    threads: int | None = None

    name: ClassVar[str] = "ort-mobile"
    elsewhere: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_threads(self.threads, 1)

    @property
    def capabilities(self) -> Capabilities:
        """What ONNX Runtime's int8 kernels want on 64-bit ARM."""
        return Capabilities(
            source=SOURCE,
            opset=OPSET,
            precisions=("float32", "int8"),
            activation="int8",
            asymmetric=True,
            linear="Gemm",
            patterns=tuple(pattern for pattern in PATTERNS if pattern.op not in _GATES),
            notes=(
                f"Latencies are of this machine ({this_machine().cpu}, "
                f"{this_machine().architecture}) and say nothing about a phone: speed on the "
                f"device is not measured.",
            ),
        )

    def check(self) -> Check:
        """ONNX Runtime is a core dependency, so this target is always there."""
        return Check(available=True)

    def build(self, model: Model) -> Engine:
        """A session of the model in ORT format."""
        from targets.ort_mobile_engine import OrtMobileEngine, to_ort_format

        integers = any(node.op_type == "DequantizeLinear" for node in model.graph_model.graph)
        return OrtMobileEngine(
            f"ONNX Runtime mobile {'int8' if integers else 'float32'}",
            model.graph_model,
            model.inputs,
            self._settings(),
            to_ort_format(model.graph_model),
        )

    def load(self, directory: Path) -> Engine:
        """The session of an artifact's `model.ort`; `model.onnx` names its operators.

        Raises:
            LoadError: one of them is missing.
        """
        from compress.loading import load
        from targets.ort_mobile_engine import OrtMobileEngine

        path = directory / "model.ort"
        if not path.is_file():
            raise LoadError(f"{directory} holds no model.ort. Copy the artifact again.")
        model = load(directory / "model.onnx")
        return OrtMobileEngine(
            "ONNX Runtime mobile",
            model.graph_model,
            model.inputs,
            self._settings(),
            path.read_bytes(),
        )

    def _settings(self) -> SessionSettings:
        from targets.onnxruntime_engine import SessionSettings

        return SessionSettings(threads=usable_threads(self.threads))
