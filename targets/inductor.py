"""Inductor as a target: an ahead-of-time package of torch, for an NVIDIA GPU or this CPU."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Final, Literal, get_args

from compress.errors import UsageError
from compress.model import Model
from compress.target import Capabilities, Check, Engine, Target
from targets.gpu import DRIVER, Gpu, channel_multiple, features, find_gpu
from targets.inductor_settings import CompileSettings, Precision

OPSET: Final = 21
INSTALL_TORCH: Final = "pip install --force-reinstall torch torchvision (from PyPI: CUDA builds)"
_OLDEST: Final = (7, 0)
"""What Triton, Inductor's GPU compiler, takes (torch._inductor.exc.GPUTooOldForTriton)."""
_OWN: Final = ("int8", "float8")
_SOURCES: Final = (
    "torch 2.13 documentation (AOTInductor, CUDA semantics) and torchao 0.18 documentation "
    "(Int8DynamicActivationInt8WeightConfig, Float8DynamicActivationFloat8WeightConfig)"
)


@dataclass(frozen=True, kw_only=True)
class Inductor:
    """Run a package that torch's Inductor compiles ahead of time.

    Attributes:
        precision: of all operators; "int8" and "float8" are of linear layers, the rest is bfloat16
            then. "tf32" is float32 whose products are rounded to TF32.
        device: "cuda" or "cpu".
        autotune: kernels are chosen by measurement, which takes minutes.
        graphs: on a GPU, calls are replayed from a CUDA graph.
    """

    precision: Precision = "float32"
    device: Literal["cuda", "cpu"] = "cuda"
    autotune: bool = False
    graphs: bool = True

    name: ClassVar[str] = "inductor"

    def __post_init__(self) -> None:
        for option, allowed in (("precision", get_args(Precision)), ("device", ("cuda", "cpu"))):
            given = getattr(self, option)
            if given not in allowed:
                raise UsageError(
                    f"There is no {option} {given!r}; choose from {', '.join(allowed)}."
                )

    @property
    def capabilities(self) -> Capabilities:
        """What Inductor computes in on the device."""
        if self.device == "cpu":
            return inductor_capabilities(None, _has("torchao"))
        found = find_gpu()
        return inductor_capabilities(
            found if isinstance(found, Gpu) else Gpu("no GPU", (0, 0)), _has("torchao")
        )

    def check(self) -> Check:
        """Whether there is a GPU that torch was built for, and a C++ compiler."""
        if self.device == "cuda":
            found = find_gpu()
            if not isinstance(found, Gpu):
                return Check(False, found, DRIVER)
            if (version := torch_build()) is None:
                return Check(False, "The installed torch is built without CUDA.", INSTALL_TORCH)
            if found.compute_capability < _OLDEST:
                reason = f"torch (CUDA {version}) compiles for 7.0 and newer, and this is {found}."
                return Check(False, reason, "a newer GPU")
        compiler = os.environ.get("CXX", "g++")
        if shutil.which(compiler.split()[0]) is None:
            reason = f"Inductor needs a C++ compiler, and there is no {compiler}."
            return Check(False, reason, "apt-get install g++")
        return Check(available=True)

    def build(self, model: Model) -> Engine:
        """An engine that is compiled for the batch size of its first call."""
        from targets.inductor_engine import InductorEngine

        return InductorEngine.from_graph(
            self._name(), model.graph_model, model.inputs, self._settings()
        )

    def load(self, directory: Path) -> Engine:
        """The engine of an artifact's package; its native code is run only if its hash is right."""
        from targets.inductor_engine import InductorEngine

        return InductorEngine.from_directory(self._name(), directory, self._settings())

    def settings(self) -> tuple[Target, ...]:
        """Kernels chosen by measurement; on a GPU, no CUDA graph."""
        others: list[Target] = [dataclasses.replace(self, autotune=not self.autotune)]
        if self.device == "cuda":
            others.append(dataclasses.replace(self, graphs=not self.graphs))
        return tuple(others)

    def _name(self) -> str:
        return f"Inductor {self.device.upper()} {self.precision}"

    def _settings(self) -> CompileSettings:
        return CompileSettings(**dataclasses.asdict(self))


def inductor_capabilities(gpu: Gpu | None, torchao: bool) -> Capabilities:
    """Facts for one GPU, or for this CPU where None is given.

    float32 is exact on a GPU: TF32, which torch has switched on for convolutions by default, is a
    precision of its own.
    """
    if gpu is None:
        precisions: tuple[str, ...] = ("float32", "bfloat16")
        own: tuple[str, ...] = ("int8",)
    else:
        has = features(gpu)
        precisions = ("float32", *(p for p in ("tf32", "float16", "bfloat16") if p in has))
        # The rest of such a model is bfloat16.
        own = tuple(p for p in _OWN if p in has and "bfloat16" in has)
    if not torchao:
        own, note = (), "int8 and FP8 were not tried in Inductor: pip install torchao."
    elif own:
        note = (
            f"Inductor computes {' and '.join(own)} in linear layers alone, with scales that are "
            f"found at run time: the plan of `quantize` is not used."
        )
    else:
        note = "int8 and FP8 were not tried in Inductor: the GPU has neither beside bfloat16."
    return Capabilities(
        source=_SOURCES,
        opset=OPSET,
        precisions=precisions,
        own_precisions=own,
        profiler=False,
        channel_multiple=channel_multiple(gpu, (*precisions, *own)) if gpu is not None else 1,
        notes=(note,),
    )


def torch_build() -> str | None:
    """The CUDA version that torch was built for; None without. torch itself is not imported."""
    try:
        found = importlib.util.find_spec("torch")
        folder = Path(found.origin).parent if found is not None and found.origin else None
        if folder is None:
            return None
        spec = importlib.util.spec_from_file_location("torch_version", folder / "version.py")
        if spec is None or spec.loader is None:
            return None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    except (ImportError, OSError, ValueError):
        return None
    version: str | None = getattr(module, "cuda", None)
    return version


def _has(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except (ImportError, ValueError):  # what stands in its place cannot be imported
        return False
