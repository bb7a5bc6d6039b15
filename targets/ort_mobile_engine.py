"""The ORT-format model of a phone: made, run on this machine, and packed with what it needs."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir
import onnxruntime as ort

from compress.errors import EngineError
from compress.reference import save_onnx, session
from targets.onnxruntime_engine import PROVIDERS, OnnxRuntimeEngine
from targets.ort_mobile_tools import CONFIGS

MODEL, PACKED = "model.onnx", "model.ort"
_TOOLS_SECONDS = 600


def to_ort_format(graph_model: ir.Model) -> bytes:
    """The model in ORT format, for any 64-bit ARM CPU.

    All optimizations are applied but the blocked layout NCHWc, which only some CPUs have, and
    int8 stays int8: what `onnxruntime.tools.convert_onnx_models_to_ort --target_platform arm
    --optimization_style Fixed` does.

    Raises:
        EngineError: ONNX Runtime refuses the model.
    """
    with tempfile.TemporaryDirectory(prefix="hwcompress-") as folder:
        path = Path(folder) / PACKED
        options = ort.SessionOptions()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.optimized_model_filepath = str(path)
        options.add_session_config_entry("session.save_model_format", "ORT")
        options.add_session_config_entry("session.qdqisint8allowed", "1")
        session(graph_model, options, PROVIDERS, left_out=("NchwcTransformer",))
        return path.read_bytes()


@dataclass
class OrtMobileEngine(OnnxRuntimeEngine):
    """A session of the ORT-format model, and the model that it was made from."""

    packed: bytes

    @property
    def shipped_bytes(self) -> int:
        """Of `model.ort`."""
        return len(self.packed)

    def save(self, directory: Path) -> list[Path]:
        """`model.ort`, `model.onnx` that it was made from, and the configs of a reduced build."""
        files = save_onnx(self.graph_model, directory / MODEL)
        (directory / PACKED).write_bytes(self.packed)
        for name, text in self._examined["configs"].items():
            (directory / name).write_text(text, encoding="utf-8")
        return [*files, directory / PACKED, *(directory / name for name in CONFIGS)]

    def remarks(self) -> tuple[str, ...]:
        """What ONNX Runtime's mobile checker says, and how the model is timed on a phone."""
        # XNNPACK lists ai.onnx:QLinearConv; in model.ort they are com.microsoft's already.
        run = f"onnxruntime_perf_test -m times -r 200 -x 4 -I -e {{}} {PACKED}"
        return (
            *usability(self._examined),
            f"On the phone, after `adb push`: `{run.format('cpu')}`; with XNNPACK "
            f"`{run.format('xnnpack').replace(PACKED, MODEL)}`. A reduced build takes "
            f"`--include_ops_by_config {CONFIGS[0]}`, or {CONFIGS[1]} with "
            f"`--enable_reduced_operator_type_support`.",
        )

    @functools.cached_property
    def _examined(self) -> Mapping[str, Any]:
        """What `targets.ort_mobile_tools` finds; ONNX Runtime's tools run in another process.

        Importing them changes the import path and the logging of the process that does.
        """
        with tempfile.TemporaryDirectory(prefix="hwcompress-") as folder:
            save_onnx(self.graph_model, Path(folder) / MODEL)
            (Path(folder) / PACKED).write_bytes(self.packed)
            command = [sys.executable, "-m", "targets.ort_mobile_tools", MODEL, PACKED]
            try:
                ran = subprocess.run(
                    command, cwd=folder, capture_output=True, text=True, timeout=_TOOLS_SECONDS
                )
                found: dict[str, Any] = json.loads(ran.stdout.splitlines()[-1])
            except (OSError, subprocess.SubprocessError, IndexError, ValueError) as error:
                raise EngineError(
                    f"ONNX Runtime {ort.__version__} cannot list the operators of {PACKED}: "
                    f"{type(error).__name__}: {error}. `pip install --force-reinstall onnxruntime` "
                    f"brings its tools back."
                ) from error
        return found

    def _open(self, options: ort.SessionOptions) -> ort.InferenceSession:
        options.log_severity_level = 4
        try:
            return ort.InferenceSession(self.packed, options, providers=list(PROVIDERS))
        except Exception as error:
            raise EngineError(
                f"ONNX Runtime {ort.__version__} does not run this {PACKED}: {error}. A model in "
                f"ORT format needs the release that wrote it, or a newer one."
            ) from error


def usability(found: Mapping[str, Any]) -> tuple[str, ...]:
    """The checker's findings as sentences."""
    if found["failure"]:
        return (f"ONNX Runtime's mobile checker gave no verdict: {found['failure']}",)
    xnnpack = found["xnnpack"]
    rest = ", ".join(xnnpack["unsupported"]) or "nothing"
    sentences = [
        f"ONNX Runtime's mobile checker: the CPU provider runs all operators. XNNPACK takes "
        f"{xnnpack['supported']} of {xnnpack['nodes']} nodes of {MODEL} by its documented list, in "
        f"{xnnpack['partitions']} groups, and leaves {rest}. With CoreML: {found['coreml']}. NNAPI "
        f"is deprecated in Android 15 and was not checked."
    ]
    if found["dynamic_inputs"]:
        sentences.append(
            f"Inputs {', '.join(found['dynamic_inputs'])} have open sizes; XNNPACK wants channels, "
            f"height and width fixed, CoreML all of them "
            f"(`python -m onnxruntime.tools.make_dynamic_shape_fixed`)."
        )
    return tuple(sentences)
