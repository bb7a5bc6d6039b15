"""ONNX Runtime on the CPU: engine, optimized graph, profiler."""

from __future__ import annotations

import json
import re
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort

from compress.errors import EngineError
from compress.liveness import Program
from compress.model import Arrays, TensorSpec, random_inputs
from compress.reference import run, session
from compress.target import Kernel, KernelTensors, KernelTime, TensorType

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
        """The optimized graph as ONNX Runtime writes it.

        What each kernel reads and writes is read off one run on random inputs at batch 1, and
        unknown where the model refuses those.
        """
        options = session_options(self.settings)
        try:
            inputs = random_inputs(self.inputs, 1, np.random.default_rng(0))
            optimized, events = self._traced(options, inputs, runs=1)
        except EngineError:
            optimized, events = self._traced(session_options(self.settings), {}, runs=0)
        return kernels_of(optimized, self.graph_model, events=_kernel_events(events))

    def profile(self, inputs: Mapping[str, np.ndarray], runs: int = 20) -> tuple[KernelTime, ...]:
        """Median time of each kernel under ONNX Runtime's profiler."""
        options = session_options(self.settings)
        optimized, found = self._traced(options, inputs, runs=runs + 3)
        events = _kernel_events(found)
        return _kernel_times(events, kernels_of(optimized, self.graph_model, events=events), runs)

    def schedule(self, batch: int = 1) -> Program | None:
        """The optimized graph, with ONNX Runtime's plan of its buffers."""
        from targets.onnxruntime_memory import planned

        optimized, _ = self._traced(session_options(self.settings), {}, runs=0)
        return planned(optimized, batch)

    def memory_in_use(self, inputs: Mapping[str, np.ndarray]) -> int | None:
        """What the session's arena had given out at most during the first run, and the inputs."""
        from targets.onnxruntime_memory import most_in_use

        options = session_options(self.settings)
        # Each tensor for itself: with a pattern, one block for all of them hides what is alive.
        options.enable_mem_pattern = False
        options.enable_cpu_mem_arena = True
        _, events = self._traced(options, inputs, runs=1)
        activations = most_in_use(events)
        if activations is None:
            return None
        return activations + sum(np.asarray(array).nbytes for array in inputs.values())

    def _traced(
        self, options: ort.SessionOptions, inputs: Mapping[str, np.ndarray], runs: int
    ) -> tuple[onnx.ModelProto, list[dict[str, Any]]]:
        """The optimized graph, and the profiler's events of so many runs."""
        with tempfile.TemporaryDirectory(prefix="hwcompress-") as folder:
            path = Path(folder) / "optimized.onnx"
            options.optimized_model_filepath = str(path)
            if _is_large(self.graph_model):
                key = "session.optimized_model_external_initializers_file_name"
                options.add_session_config_entry(key, "optimized.data")
            options.enable_profiling = True
            options.profile_file_prefix = str(Path(folder) / "profile")
            runtime = self._open(options)
            try:
                for _ in range(runs):
                    run(runtime, inputs)
            finally:
                written = Path(runtime.end_profiling())
            return onnx.load(str(path), load_external_data=False), json.loads(written.read_text())

    def _open(self, options: ort.SessionOptions) -> ort.InferenceSession:
        return session(self.graph_model, options, PROVIDERS)


PROVIDERS = ("CPUExecutionProvider",)


def kernels_of(
    optimized: onnx.ModelProto,
    graph_model: ir.Model,
    wide: str = "float32",
    events: Sequence[Mapping[str, Any]] = (),
) -> tuple[Kernel, ...]:
    """The nodes of the graph that ONNX Runtime made of a model.

    Args:
        optimized: that graph.
        graph_model: the model.
        wide: precision of what is computed in float.
        events: of the profiler, which know shapes.
    """
    sites = _Sites(graph_model)
    constants = {i.name: _constant_type(i) for i in optimized.graph.initializer}
    told = {_kernel_name(event): event["args"] for event in events}
    found = []
    for node in optimized.graph.node:
        bounds = constants.get(node.input[1]) if node.op_type == "Clip" else None
        on_integers = bounds is not None and bounds.dtype in ("uint8", "int8")
        precision = _precision(node.op_type, on_integers)
        found.append(
            Kernel(
                node.name,
                node.op_type,
                wide if precision == "float32" else precision,
                sites.find(node.name, node.op_type),
                fused=_fused(node),
                tensors=_tensors(node, constants, told.get(node.name, {})),
            )
        )
    return tuple(found)


def _tensors(
    node: onnx.NodeProto, constants: Mapping[str, TensorType], told: Mapping[str, Any]
) -> KernelTensors | None:
    """What an event of the profiler says that a node reads and writes."""
    types, written = (
        [_tensor_type(one) for one in told.get(key, ())]
        for key in ("input_type_shape", "output_type_shape")
    )
    reads: list[TensorType] = []
    for name in filter(None, node.input):
        # Constants that the kernel has packed for itself are missing from the event.
        if name not in constants or (types and types[0] == constants[name]):
            if not types:
                return None
            found = types.pop(0)
            reads += [found] if name not in constants else []
    if types or not written:
        return None
    weights = tuple(constants[name] for name in node.input if name in constants)
    return KernelTensors(tuple(reads), weights, tuple(written))


def _tensor_type(told: Mapping[str, Sequence[int]]) -> TensorType:
    """From {"float": [1, 16, 32, 32]}."""
    ((dtype, shape),) = told.items()
    return TensorType(tuple(shape), _dtype(dtype))


def _constant_type(tensor: onnx.TensorProto) -> TensorType:
    return TensorType(tuple(tensor.dims), _dtype(onnx.TensorProto.DataType.Name(tensor.data_type)))


def _dtype(name: str) -> str:
    name = name.lower()
    if name.startswith("float8"):
        return "float8"
    return {"float": "float32", "double": "float64"}.get(name, name)


def _fused(node: onnx.NodeProto) -> str:
    """What ONNX Runtime says that it computes inside a kernel: a sum, an activation."""
    # The fourth input of a convolution in float is added to its result.
    summed = node.op_type in ("Conv", "FusedConv") and len(node.input) == 4
    names = [a.s.decode() for a in node.attribute if a.name == "activation" and a.s]
    return "+".join((["Add"] if summed else []) + names)


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


def _kernel_events(events: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [e for e in events if e.get("cat") == "Node" and e["name"].endswith(_SUFFIX)]


def _kernel_name(event: Mapping[str, Any]) -> str:
    return str(event["name"]).removesuffix(_SUFFIX)


_SUFFIX = "_kernel_time"


def _kernel_times(
    events: Sequence[Mapping[str, Any]], kernels: Sequence[Kernel], runs: int
) -> tuple[KernelTime, ...]:
    """The kernels with their times in the profiler's events, in order of execution.

    Raises:
        EngineError: the profiler told nothing.
    """
    known = {kernel.name: kernel for kernel in kernels}
    times: dict[str, list[float]] = defaultdict(list)
    for event in events:
        name, op_type = _kernel_name(event), event["args"]["op_name"]
        times[name].append(float(event["dur"]))
        # What runs inside an If is no node of the graph itself.
        known.setdefault(name, Kernel(name, op_type, _precision(op_type, False)))
    if not times:
        raise EngineError("ONNX Runtime's profiler returned no kernels; is the graph empty?")
    return tuple(
        KernelTime(known[name], statistics.median(durations[-runs:]))
        for name, durations in times.items()
    )
