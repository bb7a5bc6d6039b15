"""Engines of TensorRT from ONNX graphs: parser, builder, profiles, timing cache.

Written to the documentation of 10.x and 11.x and unverified on hardware; see
`targets.tensorrt_api` for what is called.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import tensorrt as trt

from compress.model import Model
from compress.reference import save_onnx
from targets.tensorrt_log import log_of_process, refused

_STRONGLY_TYPED_ALWAYS: Final = 11
"""From this major version on every network is strongly typed, and the flag is deprecated."""


@dataclass(frozen=True, kw_only=True)
class BuildSettings:
    """How an engine is built.

    Attributes:
        workspace_bytes: memory that kernels may use besides tensors and weights.
        profiles: smallest ("min"), usual ("opt") and largest ("max") shape of each input with a
            dynamic axis.
        version_compatible: the engine loads in later versions too, and holds host code.
        hardware_compatible: "none", "ampere_plus" or "same_compute_capability".
        timings: file of what kernels were measured to take, read and written; None keeps none.
    """

    workspace_bytes: int
    profiles: Mapping[str, Mapping[str, list[int]]]
    version_compatible: bool = False
    hardware_compatible: str = "none"
    timings: Path | None = None


def build_plan(model: Model, settings: BuildSettings) -> bytes:
    """A serialized engine from an ONNX graph, whose types are those that it computes in.

    Raises:
        EngineError: TensorRT refuses the model.
    """
    log = log_of_process()
    log.errors.clear()
    builder = trt.Builder(log)
    network = builder.create_network(_network_flags())
    parser = trt.OnnxParser(network, log)
    # The parser may refer to weights in the file until the engine is built.
    with tempfile.TemporaryDirectory(prefix="hwcompress-") as folder:
        path = save_onnx(model.graph_model, Path(folder) / "model.onnx")[0]
        if not parser.parse_from_file(str(path)):
            errors = [parser.get_error(index) for index in range(parser.num_errors)]
            found = [error.desc() for error in errors]
            raise refused(f"does not read {model.name}", found or log.errors)
        config = _config(builder, settings)
        if settings.timings is not None:
            _use_timings(config, settings.timings)
        plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise refused(f"cannot build {model.name}", log.errors)
    if settings.timings is not None:
        _keep_timings(config, settings.timings)
    return bytes(plan)


def _network_flags() -> int:
    if int(trt.__version__.partition(".")[0]) >= _STRONGLY_TYPED_ALWAYS:
        return 0
    return 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)


def _config(builder: Any, settings: BuildSettings) -> Any:
    config = builder.create_builder_config()
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, settings.workspace_bytes)
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if settings.version_compatible:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    if settings.hardware_compatible == "ampere_plus":
        config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
    elif settings.hardware_compatible == "same_compute_capability":
        config.hardware_compatibility_level = _same_compute_capability()
    if settings.profiles:
        profile = builder.create_optimization_profile()
        for name, shapes in settings.profiles.items():
            profile.set_shape(name, shapes["min"], shapes["opt"], shapes["max"])
        if config.add_optimization_profile(profile) < 0:
            raise refused(
                f"refuses the optimization profile {settings.profiles}", log_of_process().errors
            )
    return config


def _same_compute_capability() -> Any:
    try:
        return trt.HardwareCompatibilityLevel.SAME_COMPUTE_CAPABILITY
    except AttributeError:
        raise refused(
            "has no hardware_compatible same_compute_capability; upgrade it", []
        ) from None


def _use_timings(config: Any, path: Path) -> None:
    """Start from earlier timings; those of another GPU or version are left out."""
    earlier = path.read_bytes() if path.is_file() else b""
    for stored in dict.fromkeys((earlier, b"")):
        cache = config.create_timing_cache(stored)
        if cache is not None and config.set_timing_cache(cache, False):
            return


def _keep_timings(config: Any, path: Path) -> None:
    cache = config.get_timing_cache()
    if cache is None:
        return
    temporary = path.with_suffix(".part")
    temporary.write_bytes(bytes(cache.serialize()))
    os.replace(temporary, path)
