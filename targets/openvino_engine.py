"""OpenVINO on the CPU: engine, execution graph, profiler."""

from __future__ import annotations

import functools
import json
import math
import re
import statistics
import tempfile
import threading
from collections import defaultdict, deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx_ir as ir
import openvino as ov

from compress.errors import EngineError, OutputError
from compress.liveness import Program
from compress.model import BATCH, Arrays, TensorSpec
from compress.target import Kernel, KernelTensors, KernelTime, TensorType
from targets.heap import heap_in_use

_MOST_STATIC_SIZES = 3
"""Batch sizes that get a compiled model of their own; further ones share a slower dynamic one."""
_ANY = 0
_WARM_UP_RUNS = 3


@dataclass(frozen=True, kw_only=True)
class CompileSettings:
    """How a model is compiled.

    Attributes:
        threads: of all streams together.
        streams: requests in flight at once; as many threads may call the engine.
        precision: of what is not int8.
        pinned: threads stay on their cores.
    """

    threads: int
    streams: int = 1
    precision: Literal["float32", "bfloat16"] = "float32"
    pinned: bool = True


@dataclass
class OpenVinoEngine:
    """A model, compiled for each batch size that it meets."""

    name: str
    model: ov.Model
    inputs: tuple[TensorSpec, ...]
    settings: CompileSettings
    outputs: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        self.outputs = tuple(output.get_any_name() for output in self.model.outputs)
        self._lock = threading.Lock()
        self._compiled = {1: self._compile(1)}

    @classmethod
    def from_graph(
        cls,
        name: str,
        graph_model: ir.Model,
        inputs: tuple[TensorSpec, ...],
        settings: CompileSettings,
    ) -> OpenVinoEngine:
        """Convert an ONNX graph.

        Raises:
            EngineError: OpenVINO refuses the model.
        """
        from compress.reference import save_onnx

        # Through a file at any size: protobuf's limit would need one for large models anyway.
        with tempfile.TemporaryDirectory(prefix="hwcompress-") as folder:
            path = Path(folder) / "model.onnx"
            save_onnx(graph_model, path)
            model = _read(path)
        _name_sites(model, graph_model)
        _fuse_gates(model)
        return cls(name, model, inputs, settings)

    @classmethod
    def from_file(
        cls,
        name: str,
        path: Path,
        inputs: tuple[TensorSpec, ...] | None,
        settings: CompileSettings,
    ) -> OpenVinoEngine:
        """Read a model that `save` wrote; `inputs` are the file's own where None is given.

        Raises:
            EngineError: OpenVINO refuses the model.
        """
        model = _read(path)
        return cls(name, model, inputs or tuple(map(_spec, model.inputs)), settings)

    def __call__(self, inputs: Mapping[str, np.ndarray]) -> Arrays:
        """Run once; as many threads may call at once as there are streams.

        Raises:
            EngineError: OpenVINO fails.
        """
        return self._compiled_for(inputs).run(inputs)

    def save(self, directory: Path) -> list[Path]:
        """`model.xml` with `model.bin` beside it; the batch stays dynamic.

        Raises:
            OutputError: the files cannot be written.
        """
        path = directory / "model.xml"
        try:
            ov.save_model(self.model, path, compress_to_fp16=False)
        except RuntimeError as error:
            raise OutputError(f"OpenVINO cannot write {path}: {_line(error)}") from error
        return [path, path.with_suffix(".bin")]

    def kernels(self) -> tuple[Kernel, ...]:
        """The execution graph of the first batch size."""
        sites = _Sites(self.model)
        return tuple(_kernel(op, sites) for op in _executed(self._compiled[1].model))

    def profile(self, inputs: Mapping[str, np.ndarray], runs: int = 20) -> tuple[KernelTime, ...]:
        """Median time of each kernel under OpenVINO's performance counters."""
        compiled = self._compile(self._batch(inputs), PERF_COUNT=True)
        times: dict[str, list[float]] = defaultdict(list)
        for index in range(_WARM_UP_RUNS + runs):
            counters = compiled.counters(inputs)
            if index >= _WARM_UP_RUNS:
                for name, duration_us in counters.items():
                    times[name].append(duration_us)
        sites = _Sites(self.model)
        return tuple(
            KernelTime(_kernel(op, sites), statistics.median(times[op.get_friendly_name()]))
            for op in _executed(compiled.model)
            if op.get_friendly_name() in times
        )

    def schedule(self, batch: int = 1) -> Program | None:
        """The execution graph, one tensor for each output of its kernels."""
        from targets.openvino_memory import planned

        compiled = self._compiled.get(batch) or self._compile(batch)
        ops = compiled.model.get_runtime_model().get_ordered_ops()
        return planned(sorted(ops, key=lambda op: int(_info(op, "execOrder"))), _info)

    def memory_in_use(self, inputs: Mapping[str, np.ndarray]) -> int | None:
        """What a compiled model gives back when it is told to release its memory, and the inputs.

        None where the C library does not count.
        """
        compiled, released = self._compile(self._batch(inputs)), []
        for _ in range(2):
            compiled.run(inputs)
            before = heap_in_use()
            compiled.model.release_memory()
            after = heap_in_use()
            if before is None or after is None:
                return None
            released.append(before - after)
        # The first run may also give back what only the start needed.
        return min(released) + sum(np.asarray(array).nbytes for array in inputs.values())

    def _batch(self, inputs: Mapping[str, np.ndarray]) -> int:
        """Size of the dynamic axis; 1 where there is none.

        Raises:
            EngineError: other inputs than the model's, or of another rank.
        """
        ranks = {name: np.ndim(array) for name, array in inputs.items()}
        expected = {spec.name: len(spec.shape) for spec in self.inputs}
        # OpenVINO would silently run with whatever a missing input held before.
        if ranks != expected:
            raise EngineError(
                f"OpenVINO failed while running the model: it takes inputs of rank {expected}, "
                f"and it was given {ranks}."
            )
        dynamic = [spec.name for spec in self.inputs if spec.dynamic_batch]
        return len(inputs[dynamic[0]]) if dynamic else 1

    def _compiled_for(self, inputs: Mapping[str, np.ndarray]) -> _Compiled:
        batch = self._batch(inputs)
        if found := self._compiled.get(batch):
            return found
        with self._lock:
            if batch not in self._compiled and len(self._compiled) >= _MOST_STATIC_SIZES:
                batch = _ANY
            if batch not in self._compiled:
                self._compiled[batch] = self._compile(batch)
            return self._compiled[batch]

    def _compile(self, batch: int, **options: Any) -> _Compiled:
        """A compiled model for one batch size, or for any: static shapes are clearly faster."""
        settings = self.settings
        options |= {
            "INFERENCE_NUM_THREADS": settings.threads,
            "NUM_STREAMS": settings.streams,
            "PERFORMANCE_HINT": "LATENCY" if settings.streams == 1 else "THROUGHPUT",
            "INFERENCE_PRECISION_HINT": {"float32": "f32", "bfloat16": "bf16"}[settings.precision],
            "ENABLE_CPU_PINNING": settings.pinned,
        }
        try:
            model = self.model.clone()
            model.reshape({spec.name: list(spec.concrete(batch or -1)) for spec in self.inputs})
            return _Compiled(_core().compile_model(model, "CPU", options), self.outputs)
        except Exception as error:
            raise _refused(error) from error


class _Compiled:
    """A compiled model with the requests that no thread is using."""

    def __init__(self, model: Any, outputs: tuple[str, ...]) -> None:
        self.model = model
        self._outputs = outputs
        self._idle: deque[Any] = deque()

    def run(self, inputs: Mapping[str, np.ndarray]) -> Arrays:
        request = self._request()
        results = _infer(request, inputs)
        self._idle.append(request)
        return {name: results[index] for index, name in enumerate(self._outputs)}

    def counters(self, inputs: Mapping[str, np.ndarray]) -> dict[str, float]:
        """Microseconds by kernel, of those that ran."""
        request = self._request()
        _infer(request, inputs)
        found = {
            counter.node_name: counter.real_time.total_seconds() * 1e6
            for counter in request.get_profiling_info()
            if str(counter.status).endswith(".EXECUTED")
        }
        self._idle.append(request)
        return found

    def _request(self) -> Any:
        try:
            return self._idle.pop()
        except IndexError:
            return self.model.create_infer_request()


def _infer(request: Any, inputs: Mapping[str, np.ndarray]) -> Any:
    try:
        # Inputs are read where they lie; outputs are copied, as the next call writes over them.
        arrays = {name: np.asarray(array, order="C") for name, array in inputs.items()}
        return request.infer(arrays, share_inputs=True, share_outputs=False)
    except Exception as error:
        raise EngineError(f"OpenVINO failed while running the model: {_line(error)}") from error


@functools.cache
def _core() -> Any:
    core = ov.Core()
    # A mapped file that somebody writes over takes the process down with it.
    core.set_property({"ENABLE_MMAP": False})
    return core


def _read(path: Path) -> Any:
    try:
        return _core().read_model(path)
    except Exception as error:
        raise _refused(error) from error


def _refused(error: Exception) -> EngineError:
    version = ov.__version__.split("-")[0]
    return EngineError(f"OpenVINO {version} refuses the model: {_line(error)}")


def _line(error: Exception) -> str:
    return " ".join(str(error).split())


def _spec(port: Any) -> TensorSpec:
    shape = (BATCH if size.is_dynamic else size.get_length() for size in port.get_partial_shape())
    dtype = np.dtype(port.get_element_type().to_dtype()).name
    return TensorSpec(port.get_any_name(), tuple(shape), dtype)


_SITES = ["hwcompress", "sites"]
_NOT_SITES = frozenset(["QuantizeLinear", "DequantizeLinear", "Constant"])


def _name_sites(model: Any, graph_model: ir.Model) -> None:
    """Write the graph's names into the OpenVINO model, which the file then keeps."""
    nodes = list(graph_model.graph)
    names = [node.name for node in nodes if node.name and node.op_type not in _NOT_SITES]
    model.set_rt_info(json.dumps(names), _SITES)
    # What produces an output of the model is called after the tensor, not after the node.
    for result, value in zip(model.get_results(), graph_model.graph.outputs, strict=True):
        node, op = value.producer(), result.input(0).get_source_output().get_node()
        if node is not None and node.name and op.get_friendly_name() == value.name:
            op.set_friendly_name(node.name)
    # The Add of a transposed convolution's bias gets its name, and the convolution none.
    for op in model.get_ops():
        if op.get_type_name().endswith("ConvolutionBackpropData"):
            users = op.output(0).get_target_inputs()
            name = next((user.get_node().get_friendly_name() for user in users), "")
            if op.get_friendly_name() not in names and name in names:
                op.set_friendly_name(f"{name}/WithoutBiases")


_EXACT = 1e-6


def _fuse_gates(model: Any) -> None:
    """Give HardSigmoid in its usual form, relu6(x + 3) / 6, the operator that kernels fuse.

    The general one, which ONNX is read as, is a slow kernel by itself.
    """
    for op in model.get_ops():
        if op.get_type_name() != "HardSigmoid":
            continue
        slope, offset = (_scalar(op.input(index)) for index in (1, 2))
        if abs(slope - 1 / 6) < _EXACT and abs(offset - 0.5) < _EXACT:
            gate = ov.opset13.hsigmoid(op.input(0).get_source_output())
            gate.set_friendly_name(op.get_friendly_name())
            ov.utils.replace_node(op, gate)


def _scalar(port: Any) -> float:
    node = port.get_source_output().get_node()
    return float(node.get_data()) if node.get_type_name() == "Constant" else math.nan


_MULTIPLIES = frozenset([
    "Convolution", "ConvolutionBackpropData", "GroupConvolution", "GroupConvolutionBackpropData",
    "MatMul",
])  # fmt: skip
_MULTIPLYING_KERNELS = frozenset(["Convolution", "Deconvolution", "FullyConnected", "MatMul"])
_SUFFIX = re.compile(r"(/WithoutBiases|/DequantizationMultiply|\.\d+)$")
_LONGEST_FUSED_CHAIN = 4
"""Conv, BatchNormalization, Add, Relu."""


class _Sites:
    """Finds the site that a kernel executes.

    A kernel lists the operators that it was made from, under their ONNX names or with a suffix
    such as `/WithoutBiases`, between names that OpenVINO made up. Where a multiply-accumulate
    lost its name, it is the start of the chain that ends in the first operator with a name.
    """

    def __init__(self, model: Any) -> None:
        self.ops = {op.get_friendly_name(): op for op in model.get_ops()}
        stored = model.has_rt_info(_SITES)
        self.names = frozenset(json.loads(model.get_rt_info(_SITES).value) if stored else self.ops)
        multiplies = (name for name, op in self.ops.items() if op.get_type_name() in _MULTIPLIES)
        self.multiplies = frozenset(map(self.known, multiplies)) - {""}
        self.quantized = any(op.get_type_name() == "FakeQuantize" for op in self.ops.values())

    def known(self, name: str) -> str:
        """The site that an operator's name stands for, or ""."""
        while name not in self.names:
            shorter = _SUFFIX.sub("", name)
            if shorter == name:
                return ""
            name = shorter
        return name

    def find(self, originals: list[str], layer: str) -> str:
        """Name of the site, or "" for what OpenVINO inserted."""
        found = [site for name in originals if (site := self.known(name))]
        if multiply := next((site for site in found if site in self.multiplies), ""):
            return multiply
        first = next(iter(found), "")
        return (first and self._behind(first)) if layer in _MULTIPLYING_KERNELS else first

    def others(self, originals: list[str], site: str) -> list[str]:
        """Types of the operators that a kernel was made from besides its site."""
        names = (name for name in originals if self.known(name) not in ("", site))
        return [self.ops[name].get_type_name() for name in names if name in self.ops]

    def _behind(self, site: str) -> str:
        """The multiply-accumulate that a chain of fused operators starts with."""
        op = self.ops.get(site)
        for _ in range(_LONGEST_FUSED_CHAIN):
            if op is None or self.known(op.get_friendly_name()) in self.multiplies:
                break
            ports = op.inputs()
            op = ports[0].get_source_output().get_node() if ports else None
        found = self.known(op.get_friendly_name()) if op is not None else ""
        return found if found in self.multiplies else site


_CONVERSIONS = frozenset(["FakeQuantize", "Convert"])
_MOVES = frozenset([
    "Broadcast", "Concatenation", "DepthToSpace", "Gather", "Identity", "Interpolate", "Pad",
    "Reorder", "Reshape", "ShapeOf", "ShuffleChannels", "SpaceToDepth", "Split", "StridedSlice",
    "Tile", "Transpose",
])  # fmt: skip
_ELEMENTWISE = frozenset(["Eltwise", "Subgraph"])
_INT8 = frozenset(["u8", "i8"])
_NOT_KERNELS = frozenset(["Input", "Output", "Const"])


def _executed(compiled: Any) -> list[Any]:
    """Operators of the execution graph in its order, less what depends on constants alone."""
    kept: list[Any] = []
    changing: set[str] = set()
    for op in compiled.get_runtime_model().get_ordered_ops():
        name, layer = op.get_friendly_name(), _info(op, "layerType")
        if layer == "Input" or any(source in changing for source in _sources(op)):
            changing.add(name)
            if layer not in _NOT_KERNELS:
                kept.append(op)
    return sorted(kept, key=lambda op: int(_info(op, "execOrder")))


def _sources(op: Any) -> dict[str, Any]:
    sources = (port.get_source_output().get_node() for port in op.inputs())
    return {source.get_friendly_name(): source for source in sources}


def _info(op: Any, key: str) -> str:
    info = op.get_rt_info()
    return str(info[key].value) if key in info else ""


def _kernel(op: Any, sites: _Sites) -> Kernel:
    layer = _info(op, "layerType")
    originals = _info(op, "originalLayersNames").split(",")
    site = sites.find(originals, layer)
    return Kernel(
        op.get_friendly_name(),
        layer,
        _precision(op, layer, site, sites),
        site,
        fused="+".join(sites.others(originals, site)),
        tensors=_tensors(op),
    )


def _tensors(op: Any) -> KernelTensors | None:
    """What a kernel moves; None where the plug-in does not tell a type ("dynamic")."""
    reads: list[TensorType] = []
    weights: list[TensorType] = []
    stored = _DTYPES.get(_info(op, "runtimePrecision"), "")
    for port in op.inputs():
        one = _tensor_type(port)
        constant = _info(port.get_source_output().get_node(), "layerType") == "Const"
        # A bias may have been converted on its way.
        if not constant and len(one.shape) != 1:
            reads.append(one)
        else:
            # The execution graph shows constants as they were before the kernel packed them.
            narrowed = stored and one.dtype == "float32"
            weights.append(TensorType(one.shape, stored) if narrowed else one)
    found = KernelTensors(tuple(reads), tuple(weights), tuple(map(_tensor_type, op.outputs())))
    types = {one.dtype for one in (*found.inputs, *found.weights, *found.outputs)}
    return found if _UNTOLD.isdisjoint(types) else None


def _tensor_type(port: Any) -> TensorType:
    shape = (-1 if size.is_dynamic else size.get_length() for size in port.get_partial_shape())
    name = port.get_element_type().get_type_name()
    return TensorType(tuple(shape), _DTYPES.get(name, name))


_UNTOLD = frozenset({"dynamic", "undefined"})
_DTYPES = {
    "f32": "float32",
    "f16": "float16",
    "bf16": "bfloat16",
    "i8": "int8",
    "u8": "uint8",
    "i32": "int32",
    "i64": "int64",
    "boolean": "bool",
}


def _precision(op: Any, layer: str, site: str, sites: _Sites) -> str:
    read, written = _info(op, "runtimePrecision"), _info(op, "outputPrecisions")
    if layer in _CONVERSIONS or (layer == "Reorder" and read != written):
        return "convert"
    if layer in _MOVES:
        return "move"
    # A truth value is a byte as well.
    integers = sites.quantized and read in _INT8
    if layer in _ELEMENTWISE and not site and (integers or written in _INT8):
        return "convert"
    if integers:
        return "int8"
    return "bfloat16" if read == "bf16" else "float32"
