"""ExecuTorch: an ONNX graph lowered to XNNPACK, the program file, and the engine that runs it."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from compress.errors import CompressError, EngineError, OutputError
from compress.model import Arrays, TensorSpec
from compress.target import Kernel, KernelTime
from targets.executorch_files import SITE, Cache, Program, fingerprint
from targets.executorch_runtime import Method, imported, last_words, quiet

BACKEND = "XNNPACK"

_HELD: weakref.WeakValueDictionary[str, Program] = weakref.WeakValueDictionary()
"""Programs that engines still hold."""


def lowered(name: str, graph_model: ir.Model, inputs: tuple[TensorSpec, ...]) -> Program:
    """The program of a graph; made once, since that takes seconds.

    Raises:
        EngineError: ExecuTorch refuses the graph.
    """
    key = Cache.key(name, fingerprint(graph_model), str(inputs))
    if (program := _HELD.get(key)) is None:
        cache = Cache()
        program = cache.get(key)
        if program is None:
            with quiet() as written:
                try:
                    program = _lower(name, graph_model, inputs)
                except Exception as error:
                    raise _refused(error, last_words(written)) from error
            cache.put(key, program)
        _HELD[key] = program
    return program


def _lower(name: str, graph_model: ir.Model, inputs: tuple[TensorSpec, ...]) -> Program:
    from targets.executorch_program import to_program

    exported = to_program(graph_model, inputs)
    partitioner = imported("executorch.backends.xnnpack.partition.xnnpack_partitioner")
    exir = imported("executorch.exir")
    imported("executorch.kernels.quantized")  # registers the forms of Q/DQ that programs call
    edge = exir.to_edge_transform_and_lower(
        exported,
        partitioner=[partitioner.XnnpackPartitioner()],
        # Operators beyond the core set run in portable kernels; what has none is refused later.
        compile_config=exir.EdgeCompileConfig(_check_ir_validity=False),
    )
    # Before the program is made, which adds nodes for its memory.
    operators = tuple(_operators(edge.exported_program().graph_module))
    specs = {spec.name: spec for spec in inputs}
    graph, dynamic = graph_model.graph, any(spec.dynamic_batch for spec in inputs)
    return Program(
        name=name,
        data=bytes(edge.to_executorch().buffer),
        inputs=tuple(specs[v.name or ""] for v in graph.inputs if v.name in specs),
        outputs=tuple(value.name or "" for value in graph.outputs),
        batched=tuple(v.name or "" for v in graph.outputs if dynamic and _has_rows(v)),
        operators=operators,
    )


def _has_rows(output: ir.Value) -> bool:
    """Whether the first axis of an output may have any size, as that of the inputs."""
    return output.shape is None or (len(output.shape) > 0 and not isinstance(output.shape[0], int))


class ExecuTorchEngine:
    """A program for XNNPACK in the runtime of this process.

    The program has a batch of 1; the samples of a larger one run one after another.
    """

    def __init__(self, program: Program, threads: int) -> None:
        """Load the program.

        Raises:
            EngineError: the runtime refuses it.
        """
        self.name, self.inputs, self.outputs = program.name, program.inputs, program.outputs
        self._program = program
        try:
            self._method = Method(program.data, threads)
        except Exception as error:
            raise _refused(error) from error

    def __call__(self, inputs: Mapping[str, np.ndarray]) -> Arrays:
        """Run once for each sample; several threads take turns.

        Raises:
            EngineError: the inputs do not fit, or ExecuTorch fails.
        """
        from compress.torch_graph.network import to_torch

        batch = self._batch(inputs)
        tensors = to_torch(inputs)
        rows = []
        for index in range(batch):
            arguments = [
                tensors[spec.name][index : index + 1] if spec.dynamic_batch else tensors[spec.name]
                for spec in self.inputs
            ]
            try:
                rows.append(self._method(arguments))
            except Exception as error:
                raise EngineError(f"ExecuTorch failed while running the model: {error}") from error
        return {
            name: np.concatenate(parts) if batch > 1 else parts[0]
            for name, parts in zip(self.outputs, zip(*rows, strict=True), strict=True)
        }

    def save(self, directory: Path) -> list[Path]:
        """`model.pte`, and `model.json` with what its file does not tell.

        Raises:
            OutputError: the files cannot be written.
        """
        try:
            return self._program.write(directory)
        except OSError as error:
            raise OutputError(f"{directory} cannot be written to: {error}.") from error

    def kernels(self) -> tuple[Kernel, ...]:
        """The operators of the program; XNNPACK fuses some of its own further."""
        return self._program.operators

    def profile(self, inputs: Mapping[str, np.ndarray], runs: int = 20) -> tuple[KernelTime, ...]:
        """Nothing: the Python runtime tells no times."""
        return ()

    def memory_in_use(self, inputs: Mapping[str, np.ndarray]) -> int | None:
        """The program's memory plan, inputs and outputs in it, and XNNPACK's workspace."""
        from targets.executorch_memory import planned_bytes, workspace_bytes

        first = [
            np.asarray(inputs[spec.name])[:1]
            if spec.dynamic_batch
            else np.asarray(inputs[spec.name])
            for spec in self.inputs
        ]
        workspace = workspace_bytes(self._program.data, first)
        return planned_bytes(self._program.data) + workspace if workspace is not None else None

    def _batch(self, inputs: Mapping[str, np.ndarray]) -> int:
        """Samples in the inputs.

        Raises:
            EngineError: they are not what the program takes.
        """
        got = {name: (np.shape(array), np.asarray(array).dtype) for name, array in inputs.items()}
        rows = [got[s.name][0][:1] for s in self.inputs if s.dynamic_batch and s.name in got]
        batch = rows[0][0] if rows and rows[0] else 1
        wanted = {s.name: (s.concrete(batch), np.dtype(s.dtype)) for s in self.inputs}
        if got != wanted or batch < 1:
            raise EngineError(
                f"ExecuTorch failed while running the model: it takes {wanted}, and it was given "
                f"{got}."
            )
        single = [name for name in self.outputs if name not in self._program.batched]
        if batch > 1 and single:
            raise EngineError(
                f"ExecuTorch runs samples one by one, and {', '.join(single)} has no row for each "
                f"sample. Call it with a batch of 1."
            )
        return batch


def _refused(error: Exception, said: str = "") -> EngineError:
    from importlib.metadata import version

    what = " ".join(str(error).split())[:500]
    kind = "" if isinstance(error, CompressError) else f"{type(error).__name__}: "
    more = f" ({said[:300]})" if said and not isinstance(error, CompressError) else ""
    return EngineError(f"ExecuTorch {version('executorch')} refuses the model: {kind}{what}{more}")


_IMPLICIT = "IS_IMPLICIT_Q_DQ_TAG"
"""Mark of the partitioner on Q/DQ that become the format of a tensor."""
_WEIGHTS = "dequantize_per_channel"
_MOVES = frozenset([
    "_clone_dim_order", "_to_dim_order_copy", "cat", "clone", "constant_pad_nd", "copy",
    "expand_copy", "index", "index_select", "permute_copy", "repeat", "select_copy", "slice_copy",
    "split_with_sizes_copy", "squeeze_copy", "stack", "transpose_copy", "unsqueeze_copy",
    "view_copy",
])  # fmt: skip


def _operators(module: Any) -> Iterator[Kernel]:
    """Operators of a lowered module in order, those of the backend inside their calls."""
    for node in module.graph.nodes:
        if "call_delegate" in str(node.target):
            inner = getattr(module, node.args[0].target).original_module
            yield from (one for each in inner.graph.nodes if (one := _kernel(each, BACKEND)))
        elif (one := _kernel(node, "")) is not None:
            yield one


def _kernel(node: Any, backend: str) -> Kernel | None:
    """An operator; None for what is none, or only dresses another one."""
    kind = _kind(node)
    dress = bool(backend) and (kind == _WEIGHTS or node.meta.get(_IMPLICIT, False))
    if not kind or kind == "getitem" or (dress and "quantize" in kind):
        return None
    site = (node.meta.get("custom") or {}).get(SITE, "")
    return Kernel(node.name, kind, _precision(node, kind, backend), site, backend)


def _kind(node: Any) -> str:
    """The operator's name without library and overload; "" for inputs and outputs."""
    if node.op != "call_function":
        return ""
    name = str(getattr(node.target, "__name__", node.target))
    parts = name.split(".")
    return parts[1] if len(parts) == 3 else parts[0]


def _precision(node: Any, kind: str, backend: str) -> str:
    if "quantize" in kind:
        return "convert"
    if kind in _MOVES:
        return "move"
    dressed = any(
        "dequantize" in _kind(one) and one.meta.get(_IMPLICIT, False)
        for one in node.all_input_nodes
    )
    return "int8" if backend and dressed else "float32"
