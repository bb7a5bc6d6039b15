"""TensorRT engines: build, load, run, time, profile.

Written to the documentation of 10.x and 11.x and unverified on hardware. Every call that is made
of TensorRT is listed in `targets.tensorrt_api` with its page; names of objects say which class
they are of, and a test holds this module to that list. Memory, streams, events and graphs of CUDA
are torch's.
"""

from __future__ import annotations

import functools
import json
import os
import statistics
import tempfile
import threading
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import tensorrt as trt
import torch

from compress.errors import EngineError
from compress.model import BATCH, Arrays, Model, TensorSpec
from compress.reference import save_onnx
from compress.target import Kernel, KernelTime
from targets.tensorrt_layers import kernel_of

FILE: Final = "model.engine"
_DEVICE: Final = "cuda"
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


def build_engine(name: str, model: Model, settings: BuildSettings) -> TensorRtEngine:
    """Build an engine from an ONNX graph, whose types are those that it computes in, and load it.

    Raises:
        EngineError: TensorRT refuses the model.
    """
    log = _log()
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
            raise _refused(f"does not read {model.name}", found or log.errors)
        config = _config(builder, settings)
        if settings.timings is not None:
            _use_timings(config, settings.timings)
        plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise _refused(f"cannot build {model.name}", log.errors)
    if settings.timings is not None:
        _keep_timings(config, settings.timings)
    return TensorRtEngine(name, bytes(plan), host_code=settings.version_compatible)


def load_engine(name: str, path: Path, *, host_code: bool) -> TensorRtEngine:
    """Load an engine file, which is executable content: check where it is from before.

    Args:
        name: for messages.
        path: of the file.
        host_code: allow code for the host in it, as version-compatible engines have.
    """
    return TensorRtEngine(name, path.read_bytes(), host_code=host_code)


class TensorRtEngine:
    """An engine on the first visible GPU.

    A call copies inputs to the device and outputs back, and returns when they are there. Runs of
    one shape are replayed from a CUDA graph, where the network can be captured.
    """

    def __init__(self, name: str, plan: bytes, *, host_code: bool) -> None:
        log = _log()
        log.errors.clear()
        runtime = trt.Runtime(log)
        runtime.engine_host_code_allowed = host_code
        engine = runtime.deserialize_cuda_engine(plan)
        if engine is None:
            raise _refused(
                "does not load the engine, which needs the TensorRT and the GPU that built it "
                "(or version_compatible and hardware_compatible); run `compress build` here",
                log.errors,
            )
        context = engine.create_execution_context()
        if context is None:
            raise _refused("has no memory for the engine", log.errors)
        self.name = name
        self._plan, self._runtime, self._engine, self._context = plan, runtime, engine, context
        self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self._lock = threading.Lock()
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        given = [one for one in names if engine.get_tensor_mode(one) == trt.TensorIOMode.INPUT]
        self.inputs = tuple(self._spec(one) for one in given)
        self.outputs = tuple(one for one in names if one not in given)
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._tensors: dict[str, torch.Tensor] = {}
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, inputs: Mapping[str, np.ndarray]) -> Arrays:
        """Run once, or in parts where the batch is larger than the profile's largest.

        Raises:
            EngineError: the shapes do not fit, or the run failed.
        """
        batch, largest = self._batch(inputs), self._largest_batch()
        if largest is None or batch <= largest:
            return self._run(inputs)
        parts = [
            self._run(self._rows(inputs, start, start + largest))
            for start in range(0, batch, largest)
        ]
        return {one: np.concatenate([part[one] for part in parts]) for one in self.outputs}

    def timed(self, inputs: Mapping[str, np.ndarray]) -> Callable[[], float]:
        """A function that runs once on inputs on the GPU: seconds between two CUDA events."""
        with self._lock:
            self._enter(inputs)
        begin, end = _event(), _event()

        def run() -> float:
            with self._lock:
                self._bind(inputs)
                begin.record(self._stream)
                self._launch()
                end.record(self._stream)
                end.synchronize()
            return float(begin.elapsed_time(end)) / 1e3

        return run

    def save(self, directory: Path) -> list[Path]:
        """`model.engine`."""
        path = directory / FILE
        path.write_bytes(self._plan)
        return [path]

    def kernels(self) -> tuple[Kernel, ...]:
        """The layers of the engine, from TensorRT's inspector."""
        inspector = self._engine.create_engine_inspector()
        text = inspector.get_engine_information(trt.LayerInformationFormat.JSON)
        return tuple(kernel_of(layer) for layer in json.loads(text)["Layers"])

    def profile(self, inputs: Mapping[str, np.ndarray], runs: int = 20) -> tuple[KernelTime, ...]:
        """Median time of each layer under TensorRT's profiler, which a CUDA graph would hide."""
        times = _Times()
        context = self._engine.create_execution_context()
        with self._lock:
            self._enter(inputs)
            for spec in self.inputs:
                context.set_input_shape(spec.name, self._shapes[spec.name])
            for one, tensor in self._tensors.items():
                context.set_tensor_address(one, tensor.data_ptr())
            context.profiler = times
            for _ in range(runs + 3):
                context.execute_async_v3(self._stream.cuda_stream)
                self._stream.synchronize()
        known = {kernel.name: kernel for kernel in self.kernels()}
        return tuple(
            KernelTime(known.get(one) or kernel_of(one), statistics.median(found[-runs:]) * 1e3)
            for one, found in times.milliseconds.items()
        )

    def _run(self, inputs: Mapping[str, np.ndarray]) -> Arrays:
        with self._lock:
            self._enter(inputs)
            self._launch()
            with torch.cuda.stream(self._stream):
                return {one: _on_host(self._tensors[one]) for one in self.outputs}

    def _enter(self, inputs: Mapping[str, np.ndarray]) -> None:
        """Bind memory for these shapes and copy the inputs to the device."""
        self._bind(inputs)
        with torch.cuda.stream(self._stream):
            for spec in self.inputs:
                array = np.ascontiguousarray(inputs[spec.name])
                self._tensors[spec.name].copy_(torch.from_numpy(array))

    def _bind(self, inputs: Mapping[str, np.ndarray]) -> None:
        """Tell TensorRT the shapes and where the tensors are, and capture the run."""
        shapes = {spec.name: tuple(np.shape(inputs[spec.name])) for spec in self.inputs}
        if shapes == self._shapes:
            return
        self._shapes, self._graph = {}, None
        for one, shape in shapes.items():
            if not self._context.set_input_shape(one, shape):
                wanted = ", ".join(map(str, self.inputs))
                raise _refused(f"refuses shape {shape} for {one}: {self.name} takes {wanted}", [])
        with torch.cuda.stream(self._stream):
            self._tensors = {one: self._empty(one) for one in (*shapes, *self.outputs)}
        for one, tensor in self._tensors.items():
            if not self._context.set_tensor_address(one, tensor.data_ptr()):
                raise _refused(f"refuses the memory of {one}", _log().errors)
        self._graph = self._captured()
        self._shapes = shapes

    def _empty(self, name: str) -> torch.Tensor:
        shape = tuple(self._context.get_tensor_shape(name))
        if any(size < 0 for size in shape):
            raise EngineError(
                f"{self.name}: the shape of {name} depends on values, which is not supported."
            )
        kind = np.empty(0, trt.nptype(self._engine.get_tensor_dtype(name)))
        return torch.empty(shape, dtype=torch.from_numpy(kind).dtype, device=_DEVICE)

    def _captured(self) -> torch.cuda.CUDAGraph | None:
        """The run as a CUDA graph; None where the network cannot be captured (loops, host sync).

        The first run after a change of shapes does work that may not be captured.
        """
        self._enqueue()
        self._stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=self._stream):
                self._enqueue()
        except (RuntimeError, EngineError):
            return None
        return graph

    def _launch(self) -> None:
        if self._graph is None:
            self._enqueue()
            return
        with torch.cuda.stream(self._stream):
            self._graph.replay()

    def _enqueue(self) -> None:
        if not self._context.execute_async_v3(self._stream.cuda_stream):
            raise _refused(f"failed while running {self.name}", _log().errors)

    def _spec(self, name: str) -> TensorSpec:
        shape = tuple(self._engine.get_tensor_shape(name))
        sizes: tuple[int | str, ...] = tuple(BATCH if size < 0 else size for size in shape)
        kind = np.dtype(trt.nptype(self._engine.get_tensor_dtype(name)))
        return TensorSpec(name, sizes, kind.name)

    def _batch(self, inputs: Mapping[str, np.ndarray]) -> int:
        missing = [spec.name for spec in self.inputs if spec.name not in inputs]
        if missing:
            wanted = ", ".join(map(str, self.inputs))
            raise EngineError(f"{self.name} takes {wanted}; {', '.join(missing)} is missing.")
        sizes = [len(inputs[spec.name]) for spec in self.inputs if spec.dynamic_batch]
        return max(sizes, default=1)

    def _largest_batch(self) -> int | None:
        """The profile's largest batch; None where no axis is dynamic, or results have no batch."""
        names = [spec.name for spec in self.inputs if spec.dynamic_batch]
        whole = any(tuple(self._engine.get_tensor_shape(one))[:1] != (-1,) for one in self.outputs)
        if not names or whole:
            return None
        _, _, largest = self._engine.get_tensor_profile_shape(names[0], 0)
        return int(largest[0])

    def _rows(self, inputs: Mapping[str, np.ndarray], start: int, stop: int) -> Arrays:
        cut = {spec.name for spec in self.inputs if spec.dynamic_batch}
        return {k: v[start:stop] if k in cut else v for k, v in inputs.items()}


class _Log(trt.ILogger):  # type: ignore[misc]
    """Keeps what TensorRT says is wrong, for messages."""

    def __init__(self) -> None:
        trt.ILogger.__init__(self)
        self.errors: list[str] = []

    def log(self, severity: Any, msg: str) -> None:
        """Called by TensorRT."""
        if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
            self.errors.append(msg)


class _Times(trt.IProfiler):  # type: ignore[misc]
    """Milliseconds of each layer, run by run."""

    def __init__(self) -> None:
        trt.IProfiler.__init__(self)
        self.milliseconds: dict[str, list[float]] = defaultdict(list)

    def report_layer_time(self, layer_name: str, ms: float) -> None:
        """Called by TensorRT."""
        self.milliseconds[layer_name].append(ms)


@functools.cache
def _log() -> _Log:
    """One for the process, since builder and runtime keep a reference to it."""
    return _Log()


def _on_host(tensor: torch.Tensor) -> np.ndarray:
    """A copy, made when the work before it on the stream is done."""
    return np.asarray(tensor.to("cpu", copy=True).numpy())


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


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
            raise _refused(f"refuses the optimization profile {settings.profiles}", _log().errors)
    return config


def _same_compute_capability() -> Any:
    try:
        return trt.HardwareCompatibilityLevel.SAME_COMPUTE_CAPABILITY
    except AttributeError:
        raise _refused(
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


def _refused(what: str, errors: list[str]) -> EngineError:
    said = " ".join(one.strip() for one in errors[-3:])
    return EngineError(f"TensorRT {trt.__version__} {what}. {said}".strip())
