"""Inductor's ahead-of-time packages: compiled once, saved, loaded and called.

A package (`.pt2` of torch._inductor.aoti_compile_and_package) is native code, and loading it runs
that. So an engine loads only what it compiled itself, or what the artifact that it is in vouches
for: `engine.json` has the package's hash and the report has that of both. This protects against
files that were changed or added, and not against whoever made the artifact.
"""

from __future__ import annotations

import functools
import json
import shutil
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from compress.artifact import REPORT, sha256_file
from compress.errors import EngineError, LoadError
from compress.graph import graph_sha256
from compress.model import Arrays, TensorSpec
from compress.target import Kernel, KernelTime
from targets.inductor_program import Precision, make_program

DESCRIPTION: Final = "engine.json"
PACKAGE: Final = "model.pt2"
_WARM_UP_RUNS: Final = 3
"""Before a CUDA graph is captured, on a stream of its own, as torch.cuda.graphs documents it."""


@dataclass(frozen=True, kw_only=True)
class CompileSettings:
    """How a program is compiled and run.

    Attributes:
        precision: of all operators; "int8" and "float8" are of linear layers, the rest is bfloat16
            then. "tf32" is float32 whose products are rounded to TF32.
        device: "cuda" or "cpu".
        autotune: kernels are chosen by measurement (Inductor's max_autotune), which takes minutes.
        graphs: calls are replayed from a CUDA graph.
    """

    precision: Precision = "float32"
    device: str = "cuda"
    autotune: bool = False
    graphs: bool = True


@dataclass(frozen=True)
class Package:
    """A compiled model, and what has to be known to call it.

    Attributes:
        path: of the `.pt2`.
        batch: the size of dynamic axes that it was compiled for.
        inputs: of the model.
        outputs: names, in order.
        batched: whether axis 0 of every output is the batch.
        kernels: the operators that were compiled.
    """

    path: Path
    batch: int
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[str, ...]
    batched: bool
    kernels: tuple[Kernel, ...]


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
        compile_for = functools.partial(_compiled, graph_model, inputs, settings=settings)
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
        package = _described(directory)
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
            package = self._ready(1).package
        path, description = directory / PACKAGE, directory / DESCRIPTION
        shutil.copyfile(package.path, path)
        facts = {
            "sha256": sha256_file(path),
            "batch": package.batch,
            "inputs": [asdict(spec) for spec in package.inputs],
            "outputs": list(package.outputs),
            "batched": package.batched,
            "kernels": [asdict(kernel) for kernel in package.kernels],
        }
        description.write_text(json.dumps(facts, indent=1), encoding="utf-8")
        return [path, description]

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
            raise EngineError(f"A package of Inductor cannot be used: {_line(error)}") from error

    def run(self, inputs: Mapping[str, np.ndarray]) -> Arrays:
        """Copies in, one run, copies out; a copy to the host waits for what computes it."""
        try:
            self.enter(inputs)
            self.compute()
            arrays = [result.cpu().numpy() for result in self._results]
        except Exception as error:
            raise EngineError(f"Inductor's package failed while running: {_line(error)}") from error
        return {
            # Outputs of a CPU are not copied by that, and may be written over.
            name: array.copy() if self._settings.device == "cpu" else array
            for name, array in zip(self.package.outputs, arrays, strict=True)
        }

    def enter(self, inputs: Mapping[str, np.ndarray]) -> None:
        """Put inputs on the device."""
        arrays = (np.ascontiguousarray(inputs[s.name], s.dtype) for s in self.package.inputs)
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
        with torch.inference_mode(), _products(self._settings):
            self._results = self._model(*self._given)

    def _capture(self) -> None:
        shapes = ((s.concrete(self.package.batch), s.dtype) for s in self.package.inputs)
        self._given = tuple(
            torch.zeros(shape, dtype=getattr(torch, dtype), device="cuda")
            for shape, dtype in shapes
        )
        stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.inference_mode(), _products(self._settings):
            with torch.cuda.stream(stream):
                for _ in range(_WARM_UP_RUNS):
                    self._model(*self._given)
            torch.cuda.current_stream().wait_stream(stream)
            with torch.cuda.graph(graph, stream=stream):
                self._results = self._model(*self._given)
        self._replay = graph.replay


@contextmanager
def _products(settings: CompileSettings) -> Iterator[None]:
    """Whether the GPU's libraries round float32 products to TF32, which a global tells them."""
    if settings.device != "cuda":
        yield
        return
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    with warnings.catch_warnings():
        # Inductor reads these names, and torch warns that they will be replaced.
        warnings.simplefilter("ignore")
        before = matmul.allow_tf32, cudnn.allow_tf32
        matmul.allow_tf32 = cudnn.allow_tf32 = settings.precision == "tf32"
        try:
            yield
        finally:
            matmul.allow_tf32, cudnn.allow_tf32 = before


_PACKAGES: dict[str, Package] = {}
"""What this process has compiled: the same model is built again for every session of a
measurement."""


@functools.cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="hwcompress-")


def _compiled(
    graph_model: ir.Model, inputs: tuple[TensorSpec, ...], batch: int, settings: CompileSettings
) -> Package:
    """Compile for one batch size, once in this process.

    Raises:
        EngineError: torch or Inductor refuses the model.
    """
    # CUDA graphs are recorded when a package is loaded.
    how = (batch, settings.precision, settings.device, settings.autotune, inputs)
    key = f"{graph_sha256(graph_model)} {how}"
    if key in _PACKAGES:
        return _PACKAGES[key]
    path = Path(_folder().name) / f"{len(_PACKAGES)}.pt2"
    options: dict[str, Any] = {}
    if settings.autotune:
        # What torch.compile's mode "max-autotune-no-cudagraphs" sets.
        options = {"max_autotune": True, "coordinate_descent_tuning": True}
    try:
        with warnings.catch_warnings(), _products(settings):
            warnings.simplefilter("ignore")  # torch warns of what it uses itself
            program = make_program(graph_model, inputs, batch, settings.precision, settings.device)
            torch._inductor.aoti_compile_and_package(
                program.exported, package_path=str(path), inductor_configs=options
            )
    except EngineError:
        raise
    except Exception as error:
        raise EngineError(f"Inductor refuses the model: {_line(error)}") from error
    results = graph_model.graph.outputs
    batched = all(r.shape and not isinstance(r.shape[0], int) for r in results)
    names = tuple(value.name or "" for value in results)
    found = Package(path, batch, inputs, names, batched, program.kernels)
    return _PACKAGES.setdefault(key, found)


def _parts(
    inputs: Mapping[str, np.ndarray], specs: Sequence[TensorSpec], batch: int, size: int
) -> Iterator[dict[str, np.ndarray]]:
    """The inputs in batches of `size`, the last one filled up with its last sample."""
    dynamic = {spec.name for spec in specs if spec.dynamic_batch}
    for start in range(0, batch, size):
        rows = np.minimum(np.arange(start, start + size), batch - 1)
        yield {n: array[rows] if n in dynamic else array for n, array in inputs.items()}


def _described(directory: Path) -> Package:
    """What `save` wrote, checked against its hashes.

    Raises:
        LoadError: a file is missing, damaged, or not the one that the report names.
    """
    path, description = directory / PACKAGE, directory / DESCRIPTION
    again = "Copy the artifact again, or run `compress run` again."
    try:
        facts = json.loads(description.read_text(encoding="utf-8"))
        package = Package(
            path,
            int(facts["batch"]),
            tuple(_spec(**one) for one in facts["inputs"]),
            tuple(map(str, facts["outputs"])),
            bool(facts["batched"]),
            tuple(Kernel(**kernel) for kernel in facts["kernels"]),
        )
        expected = {PACKAGE: str(facts["sha256"]), DESCRIPTION: sha256_file(description)}
        # A directory without a report is one that this process has just written.
        report = directory / REPORT
        if report.exists():
            files = json.loads(report.read_text(encoding="utf-8"))["files"]
            expected = {name: str(files[name]) for name in expected}
        found = {name: sha256_file(directory / name) for name in expected}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise LoadError(
            f"{directory} holds no package that can be used: {error}. {again}"
        ) from error
    if found != expected or found[PACKAGE] != facts["sha256"]:
        raise LoadError(
            f"{path} is native code, and its sha256 or that of {DESCRIPTION} is not the one that "
            f"was written. It was not loaded. {again}"
        )
    return package


def _spec(name: str, shape: Sequence[int | str], dtype: str) -> TensorSpec:
    return TensorSpec(name, tuple(shape), dtype)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:500]
