"""ONNX Runtime on an NVIDIA GPU: inputs and outputs bound on the device, CUDA graphs."""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort

from compress.errors import EngineError
from compress.model import Arrays, TensorSpec
from compress.reference import save_onnx, session
from compress.target import Kernel, KernelTime
from targets.onnxruntime_engine import kernels_of

PROVIDER: Final = "CUDAExecutionProvider"
GRAPH_ID: Final = "gpu_graph_id"
"""Run option: which CUDA graph is captured or replayed; -1 for none (ONNX Runtime documentation of
the CUDA execution provider, "Using CUDA Graphs")."""
_NO_GRAPH: Final = "-1"
_MOST_BINDINGS: Final = 4
"""Shapes whose buffers and CUDA graph are kept; the others run without."""


@dataclass
class OnnxRuntimeCudaEngine:
    """A session on a GPU. A call copies inputs there and outputs back, and returns then.

    Attributes:
        name: for tables.
        graph_model: in the types that it is computed in.
        inputs: of the model.
        options: of the execution provider, see `targets.onnxruntime_cuda.provider_options`.
        precision: of its operators.
        device: "cuda"; "cpu" runs the same binding on this machine's processor.
    """

    name: str
    graph_model: ir.Model
    inputs: tuple[TensorSpec, ...]
    options: Mapping[str, str]
    precision: str
    device: str = "cuda"
    outputs: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        self._graphs = self.options.get("enable_cuda_graph") == "1"
        try:
            self._session = self._open(_options(), self.options)
        except EngineError:
            # An operator that is left to the CPU cannot be part of a CUDA graph.
            if not self._graphs:
                raise
            self._graphs = False
            self._session = self._open(_options(), {**self.options, "enable_cuda_graph": "0"})
        self.outputs = tuple(output.name for output in self._session.get_outputs())
        self._lock = threading.Lock()
        self._bound: dict[tuple[tuple[int, ...], ...], _Bound] = {}

    def __call__(self, inputs: Mapping[str, np.ndarray]) -> Arrays:
        """Run once.

        Raises:
            EngineError: other inputs than the model's, or ONNX Runtime fails.
        """
        with self._lock:
            bound = self._binding(inputs)
            bound.enter(inputs)
            bound.compute()
            return bound.results()

    def on_device(self, inputs: Mapping[str, np.ndarray]) -> Callable[[], object]:
        """A function that runs once on inputs that are on the device, and leaves outputs there.

        It returns when the device has finished.
        """
        with self._lock:
            bound = self._binding(inputs)
            bound.enter(inputs)
        return bound.compute

    def save(self, directory: Path) -> list[Path]:
        """`model.onnx`, with `model.data` beside it where protobuf's limit demands."""
        return save_onnx(self.graph_model, directory / "model.onnx")

    def kernels(self) -> tuple[Kernel, ...]:
        """The optimized graph as ONNX Runtime writes it; float operators in this precision."""
        with tempfile.TemporaryDirectory(prefix="hwcompress-") as folder:
            path = Path(folder) / "optimized.onnx"
            options = _options()
            options.optimized_model_filepath = str(path)
            self._open(options, {**self.options, "enable_cuda_graph": "0"})
            optimized = onnx.load(str(path), load_external_data=False)
        return kernels_of(optimized, self.graph_model, self.precision)

    def profile(self, inputs: Mapping[str, np.ndarray], runs: int = 20) -> tuple[KernelTime, ...]:
        """Nothing: the profiler's host times say when kernels are launched, not what they take."""
        return ()

    def _open(self, options: ort.SessionOptions, provider: Mapping[str, str]) -> Any:
        providers: list[Any] = ["CPUExecutionProvider"]
        if self.device == "cuda":
            ort.preload_dlls(msvc=False)  # CUDA and cuDNN of the packages nvidia-*, if there
            providers.insert(0, (PROVIDER, dict(provider)))
        opened = session(self.graph_model, options, providers)
        if self.device == "cuda" and PROVIDER not in opened.get_providers():
            raise EngineError(
                f"ONNX Runtime {ort.__version__} could not load {PROVIDER} and would have run on "
                f"the CPU. Install the CUDA and cuDNN that it names in its documentation: pip "
                f"install 'onnxruntime-gpu[cuda,cudnn]'."
            )
        return opened

    def _binding(self, inputs: Mapping[str, np.ndarray]) -> _Bound:
        """Buffers for these shapes; a CUDA graph holds their addresses."""
        ranks = {name: np.ndim(array) for name, array in inputs.items()}
        expected = {spec.name: len(spec.shape) for spec in self.inputs}
        if ranks != expected:
            raise EngineError(
                f"{self.name} takes inputs of rank {expected}, and it was given {ranks}."
            )
        key = tuple(np.shape(inputs[spec.name]) for spec in self.inputs)
        if key not in self._bound:
            kept = len(self._bound) < _MOST_BINDINGS
            graph = str(len(self._bound) + 1) if self._graphs and kept else _NO_GRAPH
            bound = _Bound(self._session, self.inputs, inputs, self.device, graph)
            if not kept:
                return bound
            self._bound[key] = bound
        return self._bound[key]


class _Bound:
    """Inputs and outputs of one shape on the device."""

    def __init__(
        self,
        runtime: Any,
        specs: tuple[TensorSpec, ...],
        inputs: Mapping[str, np.ndarray],
        device: str,
        graph: str,
    ) -> None:
        self._session, self._specs = runtime, specs
        self._binding = runtime.io_binding()
        self._options = _run_options(graph, device)
        self._inputs = {
            spec.name: ort.OrtValue.ortvalue_from_numpy(
                np.array(inputs[spec.name], spec.dtype, order="C"), device, 0
            )
            for spec in specs
        }
        try:
            self._outputs = self._allocate(runtime, device)
        except Exception as error:
            raise EngineError(f"ONNX Runtime failed while running the model: {error}") from error
        for name, value in self._inputs.items():
            self._binding.bind_ortvalue_input(name, value)
        for name, value in self._outputs.items():
            self._binding.bind_ortvalue_output(name, value)

    def enter(self, inputs: Mapping[str, np.ndarray]) -> None:
        """Put inputs on the device."""
        for spec in self._specs:
            self._inputs[spec.name].update_inplace(
                np.asarray(inputs[spec.name], spec.dtype, order="C")
            )

    def compute(self) -> None:
        """Run once on what was entered, and wait for it."""
        try:
            self._session.run_with_iobinding(self._binding, self._options)
        except Exception as error:
            raise EngineError(f"ONNX Runtime failed while running the model: {error}") from error

    def results(self) -> Arrays:
        """Copies of the outputs."""
        return {name: np.array(value.numpy()) for name, value in self._outputs.items()}

    def _allocate(self, runtime: Any, device: str) -> dict[str, Any]:
        """Outputs as large as one run makes them."""
        first = runtime.io_binding()
        for name, value in self._inputs.items():
            first.bind_ortvalue_input(name, value)
        names = [output.name for output in runtime.get_outputs()]
        for name in names:
            first.bind_output(name, device, 0)
        runtime.run_with_iobinding(first, _run_options(_NO_GRAPH, device))
        return {
            name: ort.OrtValue.ortvalue_from_shape_and_type(
                value.shape(), value.element_type(), device, 0
            )
            for name, value in zip(names, first.get_outputs(), strict=True)
        }


def _options() -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    return options


def _run_options(graph: str, device: str) -> ort.RunOptions:
    options = ort.RunOptions()
    if device == "cuda":
        options.add_run_config_entry(GRAPH_ID, graph)
    return options
