"""TensorRT engines: load, run, time, profile.

Written to the documentation of 10.x and 11.x and unverified on hardware. Every call that is made
of TensorRT, here and in `targets.tensorrt_build`, is listed in `targets.tensorrt_api` with its
page; names of objects say which class they are of, and a test holds these modules to that list.
Memory, streams, events and graphs of CUDA are torch's.
"""

from __future__ import annotations

import json
import statistics
import threading
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

import numpy as np
import tensorrt as trt
import torch

from compress.errors import EngineError
from compress.model import BATCH, Arrays, TensorSpec
from compress.target import Kernel, KernelTime
from targets.tensorrt_layers import kernel_of
from targets.tensorrt_log import log_of_process, refused

FILE: Final = "model.engine"
_DEVICE: Final = "cuda"


class TensorRtEngine:
    """An engine on the first visible GPU.

    A call copies inputs to the device and outputs back, and returns when they are there. Runs of
    one shape are replayed from a CUDA graph, where the network can be captured.

    Args:
        name: for messages.
        plan: a serialized engine. It is executable content: know where it is from.
        host_code: allow code for the host in it, as version-compatible engines have.

    Raises:
        EngineError: TensorRT does not load it.
    """

    def __init__(self, name: str, plan: bytes, *, host_code: bool) -> None:
        log = log_of_process()
        log.errors.clear()
        runtime = trt.Runtime(log)
        runtime.engine_host_code_allowed = host_code
        engine = runtime.deserialize_cuda_engine(plan)
        if engine is None:
            raise refused(
                "does not load the engine, which needs the TensorRT and the GPU that built it "
                "(or version_compatible and hardware_compatible); run `compress build` here",
                log.errors,
            )
        context = engine.create_execution_context()
        if context is None:
            raise refused("has no memory for the engine", log.errors)
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
                raise refused(f"refuses shape {shape} for {one}: {self.name} takes {wanted}", [])
        with torch.cuda.stream(self._stream):
            self._tensors = {one: self._empty(one) for one in (*shapes, *self.outputs)}
        for one, tensor in self._tensors.items():
            if not self._context.set_tensor_address(one, tensor.data_ptr()):
                raise refused(f"refuses the memory of {one}", log_of_process().errors)
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
            raise refused(f"failed while running {self.name}", log_of_process().errors)

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


class _Times(trt.IProfiler):  # type: ignore[misc]
    """Milliseconds of each layer, run by run."""

    def __init__(self) -> None:
        trt.IProfiler.__init__(self)
        self.milliseconds: dict[str, list[float]] = defaultdict(list)

    def report_layer_time(self, layer_name: str, ms: float) -> None:
        """Called by TensorRT."""
        self.milliseconds[layer_name].append(ms)


def _on_host(tensor: torch.Tensor) -> np.ndarray:
    """A copy, made when the work before it on the stream is done."""
    return np.asarray(tensor.to("cpu", copy=True).numpy())


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
