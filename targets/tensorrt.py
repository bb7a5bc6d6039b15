"""TensorRT as a target: NVIDIA GPUs, through engines that are built on the machine with the GPU.

Written to the documentation of TensorRT 10.x and 11.x, unverified on hardware. An engine file is
executable content: TensorRT runs the kernels in it, and with `version_compatible` host code too.
So an engine is loaded only out of an artifact whose report has its hash (`compress.load`), which
protects against files that were changed or added, and not against whoever made the artifact.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, ClassVar, Final, Literal, get_args

from compress.errors import UnsupportedError, UsageError
from compress.model import Model, TensorSpec
from compress.target import Capabilities, Check, Engine
from targets.gpu import DRIVER, Gpu, find_gpu
from targets.tensorrt_capabilities import tensorrt_capabilities
from targets.tensorrt_rules import check

ENGINE: Final = "model.engine"
TIMING_CACHE: Final = "timing.cache"
VERSIONS: Final = ">=10.0,<12"
UNVERIFIED: Final = (
    "The TensorRT target is unverified on hardware: it was written to NVIDIA's documentation of "
    "TensorRT 10 and 11, without a GPU. Please report what you see."
)
INSTALL: Final = "pip install 'hwcompress[tensorrt]'"
INSTALL_TORCH: Final = "pip install --force-reinstall torch"
HardwareCompatibility = Literal["none", "ampere_plus", "same_compute_capability"]


@dataclass(frozen=True, kw_only=True)
class TensorRT:
    """Run on an NVIDIA GPU with TensorRT.

    Attributes:
        batch: that kernels are chosen for, where the model's batch is dynamic; `--batch`.
        min_batch: smallest batch that the engine takes.
        max_batch: largest batch of one run; larger ones are run in parts.
        workspace_mib: memory that kernels may use besides tensors and weights.
        version_compatible: the engine also loads in later versions of TensorRT; it may be slower,
            and holds host code.
        hardware_compatible: GPUs that the engine also runs on besides the one that built it: none,
            every one since Ampere, or all of the same compute capability.
        timing_cache: measurements of kernels are kept beside the artifact for the next build.
        compute_capability: of the GPU that it is for, such as "8.9", where this machine has none;
            it decides which formats there are.
    """

    batch: int = 1
    min_batch: int = 1
    max_batch: int = 32
    workspace_mib: int = 4096
    version_compatible: bool = False
    hardware_compatible: HardwareCompatibility = "none"
    timing_cache: bool = True
    compute_capability: str = ""

    name: ClassVar[str] = "tensorrt"

    def __post_init__(self) -> None:
        numbers = (self.min_batch, self.batch, self.max_batch, self.workspace_mib)
        if any(type(number) is not int or number < 1 for number in numbers):
            raise UsageError(
                f"min_batch {self.min_batch}, batch {self.batch}, max_batch {self.max_batch} and "
                f"workspace_mib {self.workspace_mib} must be whole numbers of at least 1."
            )
        if not self.min_batch <= self.batch:
            raise UsageError(f"min_batch {self.min_batch} is above the batch {self.batch}.")
        object.__setattr__(self, "max_batch", max(self.max_batch, self.batch))
        if self.hardware_compatible not in get_args(HardwareCompatibility):
            allowed = ", ".join(get_args(HardwareCompatibility))
            raise UsageError(
                f"There is no hardware_compatible {self.hardware_compatible!r}; choose from "
                f"{allowed}."
            )
        if self.compute_capability and not re.fullmatch(r"\d+\.\d", self.compute_capability):
            raise UsageError(
                f"compute_capability {self.compute_capability!r} is none; write 8.9, for example."
            )

    @property
    def capabilities(self) -> Capabilities:
        """What TensorRT wants, on this machine's GPU, on the one named, or on any since Ampere."""
        found = find_gpu()
        known = found if isinstance(found, Gpu) else None
        if known is None and self.compute_capability:
            major, minor = self.compute_capability.split(".")
            known = Gpu(f"A GPU of {self.compute_capability}", (int(major), int(minor)))
        facts = tensorrt_capabilities(known)
        return dataclasses.replace(facts, notes=(UNVERIFIED, *facts.notes))

    def check(self) -> Check:
        """Whether engines can be built here; everything that is missing, if not."""
        found = find_gpu()
        missing: dict[str, str] = {}
        if not isinstance(found, Gpu):
            missing[found] = DRIVER
        if _version("tensorrt") is None and not _importable("tensorrt"):
            missing["TensorRT is not installed."] = INSTALL
        if (_version("torch") or "").endswith("+cpu"):
            missing["The installed torch is built without CUDA."] = INSTALL_TORCH
        return Check(not missing, " ".join(missing), "; ".join(missing.values()))

    def build(self, model: Model) -> Engine:
        """An engine; minutes, since TensorRT times kernels.

        Raises:
            EngineError: TensorRT refuses the model.
        """
        return self._build(model, None)

    def build_in(self, model: Model, folder: Path) -> Engine:
        """The same, with the timing cache in `folder`."""
        return self._build(model, folder / TIMING_CACHE if self.timing_cache else None)

    def load(self, directory: Path) -> Engine:
        """The engine of an artifact whose files `compress.load` has compared with its report."""
        from targets.tensorrt_engine import TensorRtEngine

        plan = (directory / ENGINE).read_bytes()
        return TensorRtEngine("TensorRT", plan, host_code=self.version_compatible)

    def check_input(self, model: Model) -> tuple[str, ...]:
        """What TensorRT 10 and 11 do otherwise than the graph says, in sentences.

        Raises:
            UnsupportedError: a documented rule does not hold.
        """
        found = {
            (one.rule, one.node): one
            for version in ("10", "11")
            for one in check(model.graph_model, version=version)
        }
        errors = [one for one in found.values() if one.severity == "error"]
        if errors:
            named = " ".join(f"{one.sentence} ({one.rule}, {one.source})" for one in errors[:3])
            more = f" There are {len(errors) - 3} more." if len(errors) > 3 else ""
            raise UnsupportedError(
                f"TensorRT's documented rules do not hold for this model: {named}{more}"
            )
        return tuple(dict.fromkeys(one.sentence for one in found.values()))

    def build_sheet(self, inputs: tuple[TensorSpec, ...]) -> Mapping[str, Any]:
        """Versions, profiles and the settings of the builder."""
        return {
            "unverified": UNVERIFIED,
            "requires": {"tensorrt": VERSIONS},
            "network": "strongly typed: the types are those of the ONNX file",
            "profiles": self.profiles(inputs),
            "workspace_bytes": self.workspace_mib << 20,
            "version_compatible": self.version_compatible,
            "hardware_compatible": self.hardware_compatible,
            "timing_cache": TIMING_CACHE if self.timing_cache else None,
        }

    def builder(self) -> Mapping[str, str]:
        """TensorRT and the GPU, as far as they are here."""
        found, facts = find_gpu(), {}
        version = _version("tensorrt")
        if version is not None:
            facts["tensorrt"] = version
        if isinstance(found, Gpu):
            facts["gpu"] = found.name
            facts["compute_capability"] = ".".join(map(str, found.compute_capability))
        return facts

    def profiles(self, inputs: tuple[TensorSpec, ...]) -> dict[str, dict[str, list[int]]]:
        """Shapes of the optimization profile, by input; empty where no axis is dynamic."""
        sizes = {"min": self.min_batch, "opt": self.batch, "max": self.max_batch}
        return {
            spec.name: {end: list(spec.concrete(size)) for end, size in sizes.items()}
            for spec in inputs
            if spec.dynamic_batch
        }

    def _build(self, model: Model, timings: Path | None) -> Engine:
        from targets.tensorrt_build import BuildSettings, build_plan
        from targets.tensorrt_engine import TensorRtEngine

        settings = BuildSettings(
            workspace_bytes=self.workspace_mib << 20,
            profiles=self.profiles(model.inputs),
            version_compatible=self.version_compatible,
            hardware_compatible=self.hardware_compatible,
            timings=timings,
        )
        plan = build_plan(model, settings)
        return TensorRtEngine(_name(model), plan, host_code=self.version_compatible)


def _name(model: Model) -> str:
    graph = model.graph_model.graph
    integers = any(node.op_type == "DequantizeLinear" for node in graph)
    halves = any(node.op_type == "Cast" for node in graph)
    return f"TensorRT {'int8' if integers else 'float16' if halves else 'float32'}"


def _importable(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):  # what stands in its place cannot be imported
        return False


def _version(package: str) -> str | None:
    """The installed version, under the names that NVIDIA's wheels have."""
    for name in (package, f"{package}-cu12", f"{package}-cu13"):
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None
