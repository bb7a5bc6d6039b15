"""The CUDA target: an NVIDIA GPU, through whichever runtime is fastest.

Written to the documentation of its runtimes; nobody has run it on a GPU yet.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Final

from compress.errors import LoadError, UnsupportedError
from compress.model import Model
from compress.target import Capabilities, Check, Engine, Target
from targets.gpu import DRIVER, Gpu, find_gpu
from targets.inductor import INSTALL_TORCH, Inductor, torch_build
from targets.inductor_settings import DESCRIPTION
from targets.onnxruntime_cuda import INSTALL, OnnxRuntimeCuda, has_provider

UNVERIFIED: Final = (
    "The CUDA target is written to its runtimes' documentation and unverified on hardware: please "
    "report what you see."
)
COPIES: Final = (
    "Latencies include the copies between host and GPU; `python -m benchmarks.gpu` gives the time "
    "of the GPU alone, by CUDA events."
)


@dataclass(frozen=True, kw_only=True)
class CUDA:
    """Run on this machine's NVIDIA GPU, in the runtime that measures fastest.

    What speed-ups refer to is ONNX Runtime in float32, or Inductor where that is not installed.
    The GPU is the first that CUDA_VISIBLE_DEVICES leaves.
    """

    name: ClassVar[str] = "cuda"

    @property
    def capabilities(self) -> Capabilities:
        """Those of the reference runtime, with what a reader of the report must know."""
        runtimes = self.runtimes()
        facts = (runtimes or (OnnxRuntimeCuda(),))[0].capabilities
        notes = [note for one in runtimes for note in one.capabilities.notes]
        if isinstance(gpu := find_gpu(), Gpu):
            notes.insert(0, f"The GPU is {gpu}.")
        return dataclasses.replace(facts, notes=(UNVERIFIED, COPIES, *dict.fromkeys(notes)))

    def check(self) -> Check:
        """Whether there is a GPU with one of the runtimes; everything that is missing, if not."""
        if self.runtimes():
            return Check(available=True)
        found = find_gpu()
        missing: dict[str, str] = {}
        if not isinstance(found, Gpu):
            missing[found] = DRIVER
        if not has_provider():
            missing["The installed onnxruntime has no CUDA execution provider."] = INSTALL
        if torch_build() is None:
            missing["The installed torch is built without CUDA."] = INSTALL_TORCH
        if not missing:
            missing = {one.reason: one.install for one in self.missing().values()}
        return Check(False, " ".join(missing), "; ".join(dict.fromkeys(missing.values())))

    def build(self, model: Model) -> Engine:
        """An engine of the reference runtime.

        Raises:
            UnsupportedError: there is none.
        """
        for one in self.runtimes():
            return one.build(model)
        check = self.check()
        raise UnsupportedError(f"Target cuda cannot be used here: {check.reason}")

    def load(self, directory: Path) -> Engine:
        """The engine of an artifact, by the files that are in it.

        Raises:
            LoadError: there is no model in the directory.
        """
        if (directory / DESCRIPTION).is_file():
            return Inductor().load(directory)
        if (directory / "model.onnx").is_file():
            return OnnxRuntimeCuda().load(directory)
        raise LoadError(f"{directory} holds neither model.onnx nor {DESCRIPTION}. Copy it again.")

    def runtimes(self) -> tuple[Target, ...]:
        """ONNX Runtime and Inductor, as far as they can be used here."""
        return tuple(one for one in _RUNTIMES if one.check().available)

    def missing(self) -> Mapping[str, Check]:
        """Those that cannot, with the reason."""
        checks = {one.name: one.check() for one in _RUNTIMES}
        return {name: check for name, check in checks.items() if not check.available}


_RUNTIMES: Final[tuple[Target, ...]] = (OnnxRuntimeCuda(), Inductor())
