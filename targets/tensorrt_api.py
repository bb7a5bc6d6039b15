"""What the TensorRT target uses of TensorRT's Python API, each name with its documentation.

`SOURCES` can be run only where there is a GPU. So a test reads them and finds every name in this
list, and where NVIDIA's `tensorrt-cu12-bindings` are installed another compares the
list with their signatures, without the libraries that they need to work.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

DOCUMENTATION: Final = {
    "10": "https://docs.nvidia.com/deeplearning/tensorrt/archives/tensorrt-1001/api/python_api",
    "11": "https://docs.nvidia.com/deeplearning/tensorrt/11.4.0/_static/python-api",
}
"""Where the pages begin; the layout is the same in both."""


@dataclass(frozen=True)
class Name:
    """One name of the API.

    Attributes:
        path: below the package, such as "Builder.create_network".
        page: below `DOCUMENTATION`.
        arguments: that it is called with, by their names there; None for what is not called.
        since: the first version that has it.
    """

    path: str
    page: str
    arguments: tuple[str, ...] | None = None
    since: tuple[int, int] = (10, 0)

    def url(self, major: str) -> str:
        """The page for "10" or "11"."""
        return f"{DOCUMENTATION[major]}/{self.page}"


_BUILDER: Final = "infer/Core/Builder.html"
_CONFIG: Final = "infer/Core/BuilderConfig.html"
_CONTEXT: Final = "infer/Core/ExecutionContext.html"
_ENGINE: Final = "infer/Core/Engine.html"
_INSPECTOR: Final = "infer/Core/EngineInspector.html"
_LOGGER: Final = "infer/Core/Logger.html"
_PARSER: Final = "parsers/Onnx/pyOnnx.html"
_PROFILER: Final = "infer/Core/Profiler.html"
_RUNTIME: Final = "infer/Core/Runtime.html"
_SHAPES: Final = "infer/Core/OptimizationProfile.html"
_TIMINGS: Final = "infer/Core/TimingCache.html"
_TYPES: Final = "infer/FoundationalTypes/DataType.html"
_NAMED: Final = ("name",)

NAMES: Final = (
    Name("__version__", "gettingStarted.html"),
    Name("nptype", _TYPES, ("trt_type",)),
    Name("Builder", _BUILDER, ("logger",)),
    Name("Builder.create_network", _BUILDER, ("flags",)),
    Name("Builder.create_builder_config", _BUILDER, ()),
    Name("Builder.create_optimization_profile", _BUILDER, ()),
    Name("Builder.build_serialized_network", _BUILDER, ("network", "config")),
    # From 11 on it is ignored, since every network is strongly typed; it is not passed there.
    Name("NetworkDefinitionCreationFlag.STRONGLY_TYPED", _BUILDER),
    Name("OnnxParser", _PARSER, ("network", "logger")),
    Name("OnnxParser.parse_from_file", _PARSER, ("model",)),
    Name("OnnxParser.num_errors", _PARSER),
    Name("OnnxParser.get_error", _PARSER, ("index",)),
    Name("ParserError.desc", _PARSER, ()),
    Name("IBuilderConfig.set_memory_pool_limit", _CONFIG, ("pool", "pool_size")),
    Name("IBuilderConfig.profiling_verbosity", _CONFIG),
    Name("IBuilderConfig.set_flag", _CONFIG, ("flag",)),
    Name("IBuilderConfig.hardware_compatibility_level", _CONFIG),
    Name("IBuilderConfig.add_optimization_profile", _CONFIG, ("profile",)),
    Name("IBuilderConfig.create_timing_cache", _CONFIG, ("serialized_timing_cache",)),
    Name("IBuilderConfig.set_timing_cache", _CONFIG, ("cache", "ignore_mismatch")),
    Name("IBuilderConfig.get_timing_cache", _CONFIG, ()),
    Name("ITimingCache.serialize", _TIMINGS, ()),
    Name("MemoryPoolType.WORKSPACE", _CONFIG),
    Name("ProfilingVerbosity.DETAILED", _CONFIG),
    Name("BuilderFlag.VERSION_COMPATIBLE", _CONFIG),
    Name("HardwareCompatibilityLevel.AMPERE_PLUS", _CONFIG),
    Name("HardwareCompatibilityLevel.SAME_COMPUTE_CAPABILITY", _CONFIG, None, (10, 9)),
    Name("IOptimizationProfile.set_shape", _SHAPES, ("input", "min", "opt", "max")),
    Name("Runtime", _RUNTIME, ("logger",)),
    Name("Runtime.engine_host_code_allowed", _RUNTIME),
    Name("Runtime.deserialize_cuda_engine", _RUNTIME, ("serialized_engine",)),
    Name("ICudaEngine.create_execution_context", _ENGINE, ()),
    Name("ICudaEngine.create_engine_inspector", _ENGINE, ()),
    Name("ICudaEngine.num_io_tensors", _ENGINE),
    Name("ICudaEngine.get_tensor_name", _ENGINE, ("index",)),
    Name("ICudaEngine.get_tensor_mode", _ENGINE, _NAMED),
    Name("ICudaEngine.get_tensor_dtype", _ENGINE, _NAMED),
    Name("ICudaEngine.get_tensor_shape", _ENGINE, _NAMED),
    Name("ICudaEngine.get_tensor_profile_shape", _ENGINE, ("name", "profile_index")),
    Name("TensorIOMode.INPUT", _ENGINE),
    Name("IExecutionContext.set_input_shape", _CONTEXT, ("name", "shape")),
    Name("IExecutionContext.get_tensor_shape", _CONTEXT, _NAMED),
    Name("IExecutionContext.set_tensor_address", _CONTEXT, ("name", "memory")),
    Name("IExecutionContext.execute_async_v3", _CONTEXT, ("stream_handle",)),
    Name("IExecutionContext.profiler", _CONTEXT),
    Name("EngineInspector.get_engine_information", _INSPECTOR, ("format",)),
    Name("LayerInformationFormat.JSON", _INSPECTOR),
    Name("ILogger", _LOGGER, ()),
    Name("ILogger.log", _LOGGER, ("severity", "msg")),
    Name("ILogger.Severity.ERROR", _LOGGER),
    Name("ILogger.Severity.INTERNAL_ERROR", _LOGGER),
    Name("IProfiler", _PROFILER, ()),
    Name("IProfiler.report_layer_time", _PROFILER, ("layer_name", "ms")),
)

SOURCES: Final = ("tensorrt_build.py", "tensorrt_engine.py", "tensorrt_log.py")
"""The modules that import TensorRT."""
OBJECTS: Final = {
    "builder": "Builder",
    "cache": "ITimingCache",
    "config": "IBuilderConfig",
    "context": "IExecutionContext",
    "engine": "ICudaEngine",
    "error": "ParserError",
    "inspector": "EngineInspector",
    "parser": "OnnxParser",
    "profile": "IOptimizationProfile",
    "runtime": "Runtime",
    "self._context": "IExecutionContext",
    "self._engine": "ICudaEngine",
}
"""What the names of their variables hold."""
ENTERED: Final = {"Log": "ILogger", "_Times": "IProfiler"}
"""Their classes whose methods TensorRT calls."""
