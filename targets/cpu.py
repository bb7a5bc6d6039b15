"""The CPU target: the machine this runs on, through whichever runtime is fastest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from compress.errors import LoadError
from compress.model import Model
from compress.target import Capabilities, Check, Engine, Target
from targets.executorch import ExecuTorch
from targets.onnxruntime import OnnxRuntime
from targets.openvino import OpenVINO
from targets.threads import check_threads


@dataclass(frozen=True, kw_only=True)
class CPU:
    """Run on this machine's CPU, in the runtime that measures fastest.

    What speed-ups refer to, and what a float model is run with, is ONNX Runtime.

    Attributes:
        threads: of all requests together; None takes all usable cores.
        streams: requests in flight at once.
    """

    threads: int | None = None
    streams: int = 1

    name: ClassVar[str] = "cpu"

    def __post_init__(self) -> None:
        check_threads(self.threads, self.streams)

    @property
    def capabilities(self) -> Capabilities:
        """Those of ONNX Runtime."""
        return self._reference.capabilities

    def check(self) -> Check:
        """ONNX Runtime is a core dependency, so this target is always there."""
        return self._reference.check()

    def build(self, model: Model) -> Engine:
        """An ONNX Runtime session."""
        return self._reference.build(model)

    def load(self, directory: Path) -> Engine:
        """The engine of an artifact, by the files that are in it.

        Raises:
            LoadError: there is no model in the directory.
        """
        if (directory / "model.onnx").is_file():
            return self._reference.load(directory)
        if (directory / "model.xml").is_file():
            return self._openvino.load(directory)
        if (directory / "model.pte").is_file():
            return self._executorch.load(directory)
        raise LoadError(
            f"{directory} holds none of model.onnx, model.xml and model.pte. Copy it again."
        )

    def runtimes(self) -> tuple[Target, ...]:
        """ONNX Runtime, then OpenVINO and ExecuTorch where they are installed."""
        return (self._reference, *(one for one in self._optional if one.check().available))

    def missing(self) -> Mapping[str, Check]:
        """OpenVINO and ExecuTorch, where they are not installed."""
        checks = {one.name: one.check() for one in self._optional}
        return {name: check for name, check in checks.items() if not check.available}

    @property
    def _optional(self) -> tuple[OpenVINO | ExecuTorch, ...]:
        return self._openvino, self._executorch

    @property
    def _reference(self) -> OnnxRuntime:
        return OnnxRuntime(threads=self.threads, streams=self.streams)

    @property
    def _openvino(self) -> OpenVINO:
        return OpenVINO(threads=self.threads, streams=self.streams)

    @property
    def _executorch(self) -> ExecuTorch:
        return ExecuTorch(threads=self.threads)
