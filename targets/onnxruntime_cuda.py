"""ONNX Runtime's CUDA execution provider as a target: float networks on an NVIDIA GPU."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Final, Literal, get_args

from compress.errors import CompressError, EngineError, UsageError
from compress.model import Model
from compress.target import Capabilities, Check, Engine, Target
from targets.gpu import DRIVER, Gpu, channel_multiple, features, find_gpu

OPSET: Final = 21
Precision = Literal["float32", "tf32", "float16"]
INSTALL: Final = "pip uninstall -y onnxruntime && pip install --force-reinstall onnxruntime-gpu"
"""Both packages install the module `onnxruntime`: the one that came last has its files there."""
_LIBRARY: Final = "libonnxruntime_providers_cuda.so"
_DOCUMENTATION: Final = (
    "https://onnxruntime.ai/docs/execution-providers/CUDA-ExecutionProvider.html"
)
NO_INT8: Final = (
    "int8 was not tried in ONNX Runtime's CUDA execution provider: docs/OperatorKernels.md of "
    "ONNX Runtime lists no QLinearConv, QLinearMatMul or QGemm for it (issues 12229 and 24807), so "
    "Q/DQ would be computed in float or on the CPU."
)


@dataclass(frozen=True, kw_only=True)
class OnnxRuntimeCuda:
    """Run on an NVIDIA GPU with ONNX Runtime.

    Attributes:
        precision: "float32", "tf32" (float32 whose products are rounded to TF32) or "float16".
        graphs: calls are replayed from a CUDA graph, where all operators run on the GPU.
        layout: of convolutions, "nhwc" or the model's own, "nchw".
    """

    precision: Precision = "float32"
    graphs: bool = True
    layout: Literal["nchw", "nhwc"] = "nchw"

    name: ClassVar[str] = "onnxruntime_cuda"

    def __post_init__(self) -> None:
        for option, allowed in (("precision", get_args(Precision)), ("layout", ("nchw", "nhwc"))):
            given = getattr(self, option)
            if given not in allowed:
                raise UsageError(
                    f"There is no {option} {given!r}; choose from {', '.join(allowed)}."
                )

    @property
    def capabilities(self) -> Capabilities:
        """What the execution provider computes in on this GPU."""
        found = find_gpu()
        return onnxruntime_cuda_capabilities(found if isinstance(found, Gpu) else None)

    def check(self) -> Check:
        """Whether there is a GPU, and the build of ONNX Runtime for it."""
        found = find_gpu()
        if not isinstance(found, Gpu):
            return Check(False, found, DRIVER)
        if not has_provider():
            return Check(
                False, "The installed onnxruntime has no CUDA execution provider.", INSTALL
            )
        return Check(available=True)

    def build(self, model: Model) -> Engine:
        """A session; the model is typed in float16 where that is asked for.

        Raises:
            EngineError: it cannot be typed, or ONNX Runtime refuses it.
        """
        from compress.half import to_half
        from targets.onnxruntime_cuda_engine import OnnxRuntimeCudaEngine

        graph_model = model.graph_model
        if self.precision == "float16":
            try:
                graph_model = to_half(graph_model, "float16")
            except CompressError as error:
                raise EngineError(str(error)) from error
        return OnnxRuntimeCudaEngine(
            f"ONNX Runtime CUDA {self.precision}",
            graph_model,
            model.inputs,
            provider_options(self),
            self.precision,
        )

    def load(self, directory: Path) -> Engine:
        """The session of an artifact's `model.onnx`, which has its types already."""
        from compress.loading import load
        from targets.onnxruntime_cuda_engine import OnnxRuntimeCudaEngine

        model = load(directory / "model.onnx")
        return OnnxRuntimeCudaEngine(
            f"ONNX Runtime CUDA {self.precision}",
            model.graph_model,
            model.inputs,
            provider_options(self),
            self.precision,
        )

    def settings(self) -> tuple[Target, ...]:
        """Convolutions in the other layout; no CUDA graph."""
        other: Literal["nchw", "nhwc"] = "nchw" if self.layout == "nhwc" else "nhwc"
        return (
            dataclasses.replace(self, layout=other),
            dataclasses.replace(self, graphs=not self.graphs),
        )


def provider_options(target: OnnxRuntimeCuda) -> Mapping[str, str]:
    """Options of the CUDA execution provider, under their documented names.

    Convolution algorithms are searched exhaustively, which is the documented default and happens
    before anything is timed; the arena grows by what is asked for, so that several sessions fit.
    """
    return {
        "device_id": "0",
        "arena_extend_strategy": "kSameAsRequested",
        "cudnn_conv_algo_search": "EXHAUSTIVE",
        "do_copy_in_default_stream": "1",
        "use_tf32": str(int(target.precision == "tf32")),
        "prefer_nhwc": str(int(target.layout == "nhwc")),
        "enable_cuda_graph": str(int(target.graphs)),
    }


def onnxruntime_cuda_capabilities(gpu: Gpu | None) -> Capabilities:
    """Facts for one GPU; without one, what every GPU has.

    Convolutions are in float32 and float16 alone (docs/OperatorKernels.md): bfloat16 is not
    offered.
    """
    has = features(gpu) if gpu is not None else {}
    precisions = ("float32", *(p for p in ("tf32", "float16") if p in has))
    return Capabilities(
        source=f"{_DOCUMENTATION} and docs/OperatorKernels.md of ONNX Runtime",
        opset=OPSET,
        precisions=precisions,
        own_precisions=(),
        profiler=False,
        channel_multiple=channel_multiple(gpu, precisions) if gpu is not None else 1,
        linear="Gemm",
        notes=(NO_INT8,),
    )


@functools.cache
def has_provider() -> bool:
    """Whether the installed onnxruntime has the provider's library."""
    try:
        found = importlib.util.find_spec("onnxruntime")
    except (ImportError, ValueError):  # what stands in its place cannot be imported
        return False
    places = found.submodule_search_locations if found is not None else None
    return any((Path(place) / "capi" / _LIBRARY).is_file() for place in places or ())
