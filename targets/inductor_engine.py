"""An engine of one of Inductor's packages: batches, copies, CUDA graphs."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from compress.errors import EngineError
from compress.model import Arrays, TensorSpec
from compress.target import Kernel, KernelTime
from targets.inductor_package import (
    Package,
    compile_package,
    one_line,
    products,
    read_package,
    write_package,
)
from targets.inductor_settings import CompileSettings

_WARM_UP_RUNS: Final = 3
"""Before a CUDA graph is captured, on a stream of its own, as torch.cuda.graphs documents it."""


class InductorEngine:
    """A model, compiled for the batch size of its first call.

    Other batches are cut, and filled up with copies of the last sample, so that what was measured
    is what computes them. A call copies inputs to the device and outputs back, and returns when
    they are there.
    """

    def __init__(
        self,
        name: str,
        inputs: tuple[TensorSpec, ...],
        outputs: tuple[str, ...],
        settings: CompileSettings,
        compile_for: Callable[[int], Package],
    ) -> None:
        self.name, self.inputs, self.outputs = name, inputs, outputs
        self._settings, self._compile_for = settings, compile_for
        self._lock = threading.Lock()
        self._loaded: _Loaded | None = None

    @classmethod
    def from_graph(
        cls,
        name: str,
        graph_model: ir.Model,
        inputs: tuple[TensorSpec, ...],
        settings: CompileSettings,
    ) -> InductorEngine:
        """Compile an ONNX graph when it is first called."""
        outputs = tuple(value.name or "" for value in graph_model.graph.outputs)
        compile_for = functools.partial(compile_package, graph_model, inputs, settings=settings)
        return cls(name, inputs, outputs, settings, compile_for)

    @classmethod
    def from_directory(
        cls, name: str, directory: Path, settings: CompileSettings
    ) -> InductorEngine:
        """Load what `save` wrote.

        Raises:
            LoadError: it is damaged, or not what the artifact's report names.
            EngineError: torch cannot load the package.
        """
        package = read_package(directory)
        engine = cls(name, package.inputs, package.outputs, settings, lambda _: package)
        # At once: what was checked is what is loaded.
        engine._ready(package.batch)
        return engine

    def __call__(self, inputs: Mapping[str, np.ndarray]) -> Arrays:
        """Run once, or several times where the batch is larger than that of the package.

        Raises:
            EngineError: Inductor refuses the model, or it fails.
        """
        batch = self._batch(inputs)
        with self._lock:
            loaded = self._ready(batch)
            size = loaded.package.batch
            if batch == size:
                return loaded.run(inputs)
            if not loaded.package.batched:
                raise EngineError(
                    f"{self.name} was compiled for a batch of {size} and given {batch}, and its "
                    f"outputs have no batch axis to cut. Call it with {size}."
                )
            parts = [loaded.run(part) for part in _parts(inputs, self.inputs, batch, size)]
        joined = {name: np.concatenate([part[name] for part in parts]) for name in self.outputs}
        return {name: array[:batch] for name, array in joined.items()}

    def on_device(self, inputs: Mapping[str, np.ndarray]) -> Callable[[], object]:
        """A function that runs once on inputs that are on the device, and leaves outputs there.

        It returns before the device has finished; to be timed with CUDA events.

        Raises:
            EngineError: the batch is not the one that the package was compiled for.
        """
        batch = self._batch(inputs)
        with self._lock:
            loaded = self._ready(batch)
        if batch != loaded.package.batch:
            raise EngineError(f"{self.name} was compiled for a batch of {loaded.package.batch}.")
        loaded.enter(inputs)
        return loaded.compute

    def save(self, directory: Path) -> list[Path]:
        """The package, and `engine.json` with its hash and what it takes and gives."""
        with self._lock:
            return write_package(self._ready(1).package, directory)

    def kernels(self) -> tuple[Kernel, ...]:
        """The operators that were handed to Inductor, which does not tell what it fused."""
        with self._lock:
            return self._ready(1).package.kernels

    def profile(self, inputs: Mapping[str, np.ndarray], runs: int = 20) -> tuple[KernelTime, ...]:
        """Nothing: packages have no profiler that knows the operators."""
        return ()

    def _batch(self, inputs: Mapping[str, np.ndarray]) -> int:
        """Size of the dynamic axes; 1 where there are none.

        Raises:
            EngineError: other inputs than the model's, or of other shapes.
        """
        sizes = {len(inputs[s.name]) for s in self.inputs if s.dynamic_batch and s.name in inputs}
        batch = sizes.pop() if len(sizes) == 1 else 1
        expected = {spec.name: spec.concrete(batch) for spec in self.inputs}
        shapes = {name: np.shape(array) for name, array in inputs.items()}
        if shapes != expected or batch < 1:
            wanted = ", ".join(map(str, self.inputs))
            raise EngineError(f"{self.name} takes {wanted}, and it was given {shapes}.")
        return batch

    def _ready(self, batch: int) -> _Loaded:
        if self._loaded is None:
            self._loaded = _Loaded(self._compile_for(batch), self._settings)
        return self._loaded


class _Loaded:
    """A package in memory, with tensors that stay in place where a CUDA graph needs that."""

    def __init__(self, package: Package, settings: CompileSettings) -> None:
        self.package, self._settings = package, settings
        self._given: tuple[Tensor, ...] = ()
        self._results: Sequence[Tensor] = ()
        self._replay: Callable[[], object] | None = None
        # The loader's own locks would record events, which a graph cannot hold.
        graphs = settings.graphs and settings.device == "cuda"
        try:
            self._model = torch._inductor.aoti_load_package(
                str(package.path), run_single_threaded=graphs
            )
            if graphs:
                self._capture()
        except Exception as error:
            raise EngineError(f"A package of Inductor cannot be used: {one_line(error)}") from error

    def run(self, inputs: Mapping[str, np.ndarray]) -> Arrays:
        """Copies in, one run, copies out; a copy to the host waits for what computes it."""
        try:
            self.enter(inputs)
            self.compute()
            arrays = [result.cpu().numpy() for result in self._results]
        except Exception as error:
            raise EngineError(
                f"Inductor's package failed while running: {one_line(error)}"
            ) from error
        return {
            # Outputs of a CPU are not copied by that, and may be written over.
            name: array.copy() if self._settings.device == "cpu" else array
            for name, array in zip(self.package.outputs, arrays, strict=True)
        }

    def enter(self, inputs: Mapping[str, np.ndarray]) -> None:
        """Put inputs on the device."""
        arrays = (np.asarray(inputs[s.name], s.dtype, order="C") for s in self.package.inputs)
        # torch wants to be able to write where it reads.
        tensors = [torch.from_numpy(a if a.flags.writeable else a.copy()) for a in arrays]
        if self._replay is None:
            self._given = tuple(tensor.to(self._settings.device) for tensor in tensors)
            return
        for place, tensor in zip(self._given, tensors, strict=True):
            place.copy_(tensor)

    def compute(self) -> None:
        """One run on what was entered; on a GPU it is only started."""
        if self._replay is not None:
            self._replay()
            return
        with torch.inference_mode(), products(self._settings):
            self._results = self._model(*self._given)

    def _capture(self) -> None:
        shapes = ((s.concrete(self.package.batch), s.dtype) for s in self.package.inputs)
        self._given = tuple(
            torch.zeros(shape, dtype=getattr(torch, dtype), device="cuda")
            for shape, dtype in shapes
        )
        stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.inference_mode(), products(self._settings):
            with torch.cuda.stream(stream):
                for _ in range(_WARM_UP_RUNS):
                    self._model(*self._given)
            torch.cuda.current_stream().wait_stream(stream)
            with torch.cuda.graph(graph, stream=stream):
                self._results = self._model(*self._given)
        self._replay = graph.replay


def _parts(
    inputs: Mapping[str, np.ndarray], specs: Sequence[TensorSpec], batch: int, size: int
) -> Iterator[dict[str, np.ndarray]]:
    """The inputs in batches of `size`, the last one filled up with its last sample."""
    dynamic = {spec.name for spec in specs if spec.dynamic_batch}
    for start in range(0, batch, size):
        rows = np.minimum(np.arange(start, start + size), batch - 1)
        yield {n: array[rows] if n in dynamic else array for n, array in inputs.items()}
