"""ONNX Runtime on the CPU: engine, optimized graph, profiler."""

from __future__ import annotations

import json
import re
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort

from compress.errors import EngineError
from compress.liveness import Program
from compress.model import Arrays, TensorSpec
from compress.reference import run, session
from compress.target import Kernel, KernelTime

_INT8_KERNELS = frozenset(
    [
        "QLinearConv",
        "QGemm",
        "QLinearMatMul",
        "MatMulIntegerToFloat",
        "MatMulInteger",
        "ConvInteger",
        "DynamicQuantizeMatMul",
        "QLinearAdd",
        "QLinearMul",
        "QLinearSigmoid",
        "QLinearLeakyRelu",
        "QLinearConcat",
        "QLinearAveragePool",
        "QLinearGlobalAveragePool",
        "QLinearSoftmax",
        "QLinearReduceMean",
        "QLinearWhere",
        "QAttention",
        "NhwcMaxPool",
    ]
)
_CONVERSIONS = frozenset(["QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "Cast"])
_MOVES = frozenset(
    [
        "Transpose",
        "Reshape",
        "Flatten",
        "Squeeze",
        "Unsqueeze",
        "ReorderInput",
        "ReorderOutput",
        "Concat",
        "Split",
        "Slice",
        "Gather",
        "Expand",
        "Shape",
        "Pad",
        "Identity",
        "ConstantOfShape",
        "Resize",
    ]
)


@dataclass(frozen=True, kw_only=True)
class SessionSettings:
    """How a session runs.

    Attributes:
        threads: of one operator; 0 lets ONNX Runtime take all cores.
        layout: "blocked" lets ONNX Runtime lay float convolutions out in blocks of channels
            (NCHWc), "plain" keeps the model's own.
        arena: memory is kept for the next call.
        spinning: threads that wait for work stay awake.
    """

    threads: int = 0
    layout: Literal["blocked", "plain"] = "blocked"
    arena: bool = True
    spinning: bool = True


@dataclass
class OnnxRuntimeEngine:
    """A session and what it was made from."""

    name: str
    graph_model: ir.Model
    inputs: tuple[TensorSpec, ...]
    settings: SessionSettings
    outputs: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        self._session = self._open(session_options(self.settings))
        self.outputs = tuple(output.name for output in self._session.get_outputs())

    def __call__(self, inputs: Mapping[str, np.ndarray]) -> Arrays:
        """Run once; ONNX Runtime's CPU provider is synchronous."""
        return run(self._session, inputs)

    def save(self, directory: Path) -> list[Path]:
        """`model.onnx`, with `model.data` beside it where protobuf's limit demands."""
        from compress.reference import save_onnx

        return save_onnx(self.graph_model, directory / "model.onnx")

    def kernels(self) -> tuple[Kernel, ...]:
        """The optimized graph as ONNX Runtime writes it."""
        return kernels_of(self._optimized(session_options(self.settings)), self.graph_model)

    def schedule(self, batch: int = 1) -> Program | None:
        """The optimized graph, with ONNX Runtime's plan of its buffers."""
        from targets.onnxruntime_memory import planned

        options = session_options(self.settings)
        for name in dict.fromkeys(s for spec in self.inputs for s in spec.shape):
            if isinstance(name, str):
                options.add_free_dimension_override_by_name(name, batch)
        return planned(self._optimized(options))

    def memory_in_use(self, inputs: Mapping[str, np.ndarray]) -> int | None:
        """What the session's arena had given out at most during the first run, and the inputs."""
        from targets.onnxruntime_memory import most_in_use

        options = session_options(self.settings)
        # Each tensor for itself: with a pattern, one block for all of them hides what is alive.
        options.enable_mem_pattern = False
        options.enable_cpu_mem_arena = True
        activations = most_in_use(self._events(options, inputs, 1))
        if activations is None:
            return None
        return activations + sum(np.asarray(array).nbytes for array in inputs.values())

    def _optimized(self, options: ort.SessionOptions) -> onnx.ModelProto:
        with tempfile.TemporaryDirectory(prefix="hwcompress-") as folder:
            path = Path(folder) / "optimized.onnx"
            options.optimized_model_filepath = str(path)
            if _is_large(self.graph_model):
                key = "session.optimized_model_external_initializers_file_name"
                options.add_session_config_entry(key, "optimized.data")
            self._open(options)
            return onnx.load(str(path), load_external_data=False)

    def profile(self, inputs: Mapping[str, np.ndarray], runs: int = 20) -> tuple[KernelTime, ...]:
        """Median time of each kernel under ONNX Runtime's profiler."""
        events = self._events(session_options(self.settings), inputs, runs + 3)
        return _kernel_times(events, _Sites(self.graph_model), runs)

    def _events(
        self, options: ort.SessionOptions, inputs: Mapping[str, np.ndarray], runs: int
    ) -> list[dict[str, Any]]:
        """What the profiler writes about that many runs."""
        with tempfile.TemporaryDirectory(prefix="hwcompress-") as folder:
            options.enable_profiling = True
            options.profile_file_prefix = str(Path(folder) / "profile")
            runtime = self._open(options)
            for _ in range(runs):
                run(runtime, inputs)
            events: list[dict[str, Any]] = json.loads(Path(runtime.end_profiling()).read_text())
        return events

    def _open(self, options: ort.SessionOptions) -> ort.InferenceSession:
        return session(self.graph_model, options, PROVIDERS)


PROVIDERS = ("CPUExecutionProvider",)


def kernels_of(
    optimized: onnx.ModelProto, graph_model: ir.Model, wide: str = "float32"
) -> tuple[Kernel, ...]:
    """The nodes of the graph that ONNX Runtime made of a model; floats are in precision `wide`."""
    sites = _Sites(graph_model)
    integers = {i.name for i in optimized.graph.initializer if i.data_type in _INTEGER_TYPES}
    found = (
        _kernel(
            node.name, node.op_type, sites, node.op_type == "Clip" and node.input[1] in integers
        )
        for node in optimized.graph.node
    )
    return tuple(replace(k, precision=wide) if k.precision == "float32" else k for k in found)


_INTEGER_TYPES = (onnx.TensorProto.UINT8, onnx.TensorProto.INT8)


def session_options(settings: SessionSettings) -> ort.SessionOptions:
    """The same for ONNX Runtime."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = settings.threads
    level = ort.GraphOptimizationLevel
    blocked = settings.layout == "blocked"
    # NCHWc is the only rewrite of the last level that concerns the CPU.
    options.graph_optimization_level = (
        level.ORT_ENABLE_ALL if blocked else level.ORT_ENABLE_EXTENDED
    )
    options.enable_cpu_mem_arena = settings.arena
    options.add_session_config_entry("session.intra_op.allow_spinning", str(int(settings.spinning)))
    return options


def _is_large(graph_model: ir.Model) -> bool:
    from compress.reference import initializer_bytes

    return initializer_bytes(graph_model) > 1_000_000_000


class _Sites:
    """Finds the site that a kernel of the optimized graph executes.

    A fused kernel carries the name of one of its operators, or of its output tensor, with a
    suffix such as `_token_7` or `_nchwc`. Where that is not the multiply-accumulate itself, it
    is the end of a short chain behind it (Conv, BatchNormalization, Relu).
    """

    def __init__(self, graph_model: ir.Model) -> None:
        nodes = list(graph_model.graph)
        self.nodes = {out.name or "": node for node in nodes for out in node.outputs}
        self.nodes |= {node.name: node for node in nodes if node.name}

    def find(self, name: str, op_type: str) -> str:
        """Name of the site, or "" for what ONNX Runtime inserted."""
        node = None
        while name and (node := self.nodes.get(name)) is None:
            shorter = re.sub(r"_[A-Za-z0-9]+$", "", name)
            name = shorter if shorter != name else ""
        if node is None:
            return ""
        if any(kind in op_type for kind in ("Conv", "Gemm", "MatMul")):
            return _behind(node)
        return node.name or ""


def _behind(node: ir.Node) -> str:
    """The multiply-accumulate that a chain of fused operators starts with."""
    last: ir.Node | None = node
    for _ in range(_LONGEST_FUSED_CHAIN):
        if last is None or last.op_type in ("Conv", "ConvTranspose", "Gemm", "MatMul"):
            break
        source = last.inputs[0] if last.inputs else None
        last = source.producer() if source is not None else None
    found = last is not None and last.op_type in ("Conv", "ConvTranspose", "Gemm", "MatMul")
    return (last if found and last is not None else node).name or ""


_LONGEST_FUSED_CHAIN = 4
"""Conv, BatchNormalization, Add, Relu."""


def _precision(op_type: str, on_integers: bool) -> str:
    if op_type in _INT8_KERNELS or on_integers:
        return "int8"
    if op_type in _CONVERSIONS:
        return "convert"
    if op_type in _MOVES:
        return "move"
    return "float32"


def _kernel(name: str, op_type: str, sites: _Sites, on_integers: bool) -> Kernel:
    return Kernel(name, op_type, _precision(op_type, on_integers), sites.find(name, op_type))


def _kernel_times(events: list[dict[str, Any]], sites: _Sites, runs: int) -> tuple[KernelTime, ...]:
    times: dict[str, list[float]] = defaultdict(list)
    types: dict[str, str] = {}
    integers: set[str] = set()
    for event in events:
        if event.get("cat") != "Node" or not event["name"].endswith("_kernel_time"):
            continue
        name = event["name"].removesuffix("_kernel_time")
        times[name].append(float(event["dur"]))
        types[name] = event["args"]["op_name"]
        if types[name] == "Clip" and "int8" in str(event["args"].get("input_type_shape", "")):
            integers.add(name)
    if not times:
        raise EngineError("ONNX Runtime's profiler returned no kernels; is the graph empty?")
    return tuple(
        KernelTime(
            _kernel(name, types[name], sites, name in integers),
            statistics.median(durations[-runs:]),
        )
        for name, durations in times.items()
    )
