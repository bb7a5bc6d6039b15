"""What a graph is made of: sites with shapes, MACs, parameters and live memory."""

from __future__ import annotations

import hashlib
import math
import re
from collections import Counter, defaultdict
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from compress.errors import EngineError
from compress.graph_liveness import program_of
from compress.liveness import sweep
from compress.model import TensorSpec, random_inputs
from compress.reference import reference_session, run

NAME_SCOPES = "pkg.torch.onnx.name_scopes"
"""Metadata of torch's exporter: the modules that an operator came from, outermost first."""


@dataclass(frozen=True)
class Site:
    """One operator that a decision can be taken about.

    Attributes:
        name: from the module path; survives export and every pass that keeps the operator.
        op_type: ONNX operator type.
        inputs: shapes of the activation inputs; weights are not among them.
        output: shape of the first output, batch 1 where it is dynamic. -1 where unknown.
        weight: shape of the weight, or None.
        strides: of a convolution or pool, one for each spatial axis; empty elsewhere.
        groups: of a convolution; 1 elsewhere.
        macs: multiply-accumulates for one run at that shape.
        parameters: numbers in its initializers.
        live_bytes: activations that are in memory while it runs, in the order of the graph, if
            each is freed after its last use (see `compress.graph_liveness.program_of`).
    """

    name: str
    op_type: str
    inputs: tuple[tuple[int, ...], ...]
    output: tuple[int, ...]
    weight: tuple[int, ...] | None
    macs: int
    parameters: int
    live_bytes: int
    strides: tuple[int, ...] = ()
    groups: int = 1

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def graph_sites(graph_model: ir.Model) -> tuple[Site, ...]:
    """The operators of a graph in order of execution; constants and subgraphs are left out."""
    shapes = infer_shapes(graph_model)
    live = sweep(program_of(graph_model.graph, shapes))
    counted: set[str] = set()
    found = []
    for node, in_use in zip(graph_model.graph, live, strict=True):
        if node.op_type == "Constant":
            continue
        output = shapes.get(node.outputs[0].name or "", ())
        found.append(
            Site(
                name=node.name or "",
                op_type=node.op_type,
                inputs=tuple(
                    shapes.get(value.name or "", ())
                    for value in node.inputs
                    if value is not None and value.const_value is None
                ),
                output=output,
                weight=_weight_shape(node),
                macs=_macs(node, shapes),
                parameters=_parameters(node, counted),
                live_bytes=in_use,
                strides=_strides(node),
                groups=node.attributes.get_int("group", 1),
            )
        )
    return tuple(found)


def name_sites(graph_model: ir.Model) -> None:
    """Name every node after the module path it came from; keep the names a model has.

    In a leaf module the operator that owns the parameters gets the bare path
    (`layer1.0.conv1`); everything else is `path/OpType`, numbered where it repeats. The name
    depends on the module alone, not on what else is in the graph.
    """
    nodes = list(graph_model.graph)
    paths = [_module_path(node) for node in nodes]
    by_path: dict[str, list[ir.Node]] = defaultdict(list)
    for node, path in zip(nodes, paths, strict=True):
        if path is not None:
            by_path[path].append(node)
    taken: Counter[str] = Counter()
    for node, path in zip(nodes, paths, strict=True):
        if path is None:
            base = node.name or node.op_type
        else:
            owners = [other for other in by_path[path] if _owns_weight(other)]
            main = owners if len(owners) == 1 else by_path[path]
            leaf = path and (owners or not any(p and p.startswith(path + ".") for p in by_path))
            base = path if leaf and main == [node] else f"{path}/{node.op_type}".lstrip("/")
        node.name = f"{base}.{taken[base]}" if taken[base] else base
        taken[base] += 1
        node.metadata_props.pop(NAME_SCOPES, None)


def graph_sha256(graph_model: ir.Model) -> str:
    """Hash of operators, names, attributes and weights: of everything that decides results."""
    digest = hashlib.sha256()
    for node in graph_model.graph:
        digest.update(f"{node.op_type} {node.name} {list(node.attributes.values())}".encode())
        digest.update(str([value.name if value else None for value in node.inputs]).encode())
    for name, value in graph_model.graph.initializers.items():
        if value.const_value is not None:
            digest.update(name.encode())
            digest.update(np.ascontiguousarray(value.const_value.numpy()).tobytes())
    return digest.hexdigest()


def _module_path(node: ir.Node) -> str | None:
    scopes = re.findall(r"'([^']*)'", node.metadata_props.get(NAME_SCOPES, ""))
    path = scopes[-2] if len(scopes) > 1 else ""
    if path and not path.startswith("_empty"):
        return path
    if not scopes:
        return None
    for value in node.inputs:
        # A program that was exported before has lost its module stack, not its weight names.
        if value is not None and value.const_value is not None and "." in (value.name or ""):
            return str(value.name).rpartition(".")[0]
    return ""


def _owns_weight(node: ir.Node) -> bool:
    return any(
        value is not None and value.const_value is not None and value.const_value.size > 1
        for value in node.inputs[1:2]
    )


def infer_shapes(graph_model: ir.Model) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor with dynamic axes at 1; sizes that stay unknown are -1.

    The model itself is not changed.
    """
    import onnxscript.optimizer as optimizer
    from onnx_ir.passes.common import ShapeInferencePass

    copy = graph_model.clone()
    for value in copy.graph.inputs:
        if value.shape is not None:
            value.shape = ir.Shape([s if isinstance(s, int) else 1 for s in value.shape])
    for node in copy.graph:
        for out in node.outputs:
            out.shape = None
    ShapeInferencePass(data_prop=True)(copy)
    # Shapes that the graph computes itself become known once constants are folded.
    if any(_unknown(out) for node in copy.graph for out in node.outputs):
        optimizer.fold_constants(copy, onnx_shape_inference=True)
        ShapeInferencePass(data_prop=True)(copy)
    measured: dict[str, tuple[int, ...]] = {}
    if any(_unknown(out) for node in copy.graph for out in node.outputs):
        measured = _measured_shapes(graph_model)
    values = [*copy.graph.inputs, *copy.graph.initializers.values()]
    values += [out for node in copy.graph for out in node.outputs]
    return {
        value.name: tuple(s if isinstance(s, int) else -1 for s in value.shape)
        for value in values
        if value.name and value.shape is not None
    } | measured


def _measured_shapes(graph_model: ir.Model) -> dict[str, tuple[int, ...]]:
    """Shapes from running once on random inputs and once on zeros; -1 where the two differ.

    Empty where the model refuses such inputs.
    """
    copy = graph_model.clone()
    present = {value.name for value in copy.graph.outputs}
    values = [out for node in copy.graph for out in node.outputs if out.name not in present]
    copy.graph.outputs.extend(value for value in values if value.name)
    try:
        specs = [_spec(value) for value in copy.graph.inputs]
        inputs = random_inputs(specs, 1, np.random.default_rng(0))
        runtime = reference_session(copy)
        first = run(runtime, inputs)
        second = run(runtime, {name: np.zeros_like(array) for name, array in inputs.items()})
    except (EngineError, TypeError):
        return {}
    pairs = {n: (np.shape(a), np.shape(second[n])) for n, a in first.items()}
    return {
        name: tuple(i if i == j else -1 for i, j in zip(one, other, strict=True))
        for name, (one, other) in pairs.items()
        if len(one) == len(other)
    }


def _spec(value: ir.Value) -> TensorSpec:
    """The input's shape with every open axis at 1.

    Raises:
        TypeError: it is no tensor of a known shape.
    """
    if value.shape is None or value.dtype is None:
        raise TypeError(f"{value.name} has no shape")
    sizes = tuple(size if isinstance(size, int) else 1 for size in value.shape)
    return TensorSpec(value.name or "", sizes, value.dtype.numpy().name)


def macs_in_subgraphs(graph_model: ir.Model) -> int:
    """Multiply-accumulate operators inside If, Loop and Scan, which sites do not count."""
    counted = ("Conv", "ConvTranspose", "Gemm", "MatMul", "LSTM", "GRU", "RNN")
    nodes = graph_model.graph.all_nodes()
    return sum(n.op_type in counted and n.graph is not graph_model.graph for n in nodes)


def _unknown(value: ir.Value) -> bool:
    return value.shape is None or any(not isinstance(size, int) for size in value.shape)


def weight_input(node: ir.Node) -> int | None:
    """Index of the input that holds the weight of a multiply-accumulate, or None."""
    candidates = {"Conv": (1,), "ConvTranspose": (1,), "Gemm": (1, 0), "MatMul": (1, 0)}
    for index in candidates.get(node.op_type, ()):
        value = node.inputs[index] if index < len(node.inputs) else None
        if value is not None and value.const_value is not None:
            return index
    return None


def _strides(node: ir.Node) -> tuple[int, ...]:
    """Of an operator with a window; ones where the attribute is left out."""
    if node.op_type not in ("Conv", "ConvTranspose", "MaxPool", "AveragePool", "LpPool"):
        return ()
    rank = node.inputs[0].shape.rank() if node.inputs[0] and node.inputs[0].shape else 4
    return tuple(node.attributes.get_ints("strides", [1] * (rank - 2)))


def _weight_shape(node: ir.Node) -> tuple[int, ...] | None:
    index = weight_input(node)
    if index is None:
        return None
    value = node.inputs[index]
    if value is None or value.const_value is None:
        return None
    return tuple(value.const_value.shape.numpy())


def _parameters(node: ir.Node, counted: set[str]) -> int:
    """Numbers in the node's initializers; a shared one counts where it is met first."""
    total = 0
    for value in node.inputs:
        if value is None or value.const_value is None or value.name in counted:
            continue
        if value.const_value.dtype.is_floating_point():
            total += value.const_value.size
            counted.add(value.name or "")
    return total


def _macs(node: ir.Node, shapes: dict[str, tuple[int, ...]]) -> int:
    """Multiply-accumulates of one node; 0 for operators without a reduction over weights."""
    ins = [shapes.get(value.name or "", ()) if value is not None else () for value in node.inputs]
    out = shapes.get(node.outputs[0].name or "", ())
    if any(size < 0 for shape in (*ins, out) for size in shape):
        return 0
    match node.op_type:
        case "Conv":
            return math.prod(out) * math.prod(ins[1][1:])
        case "ConvTranspose":
            return math.prod(ins[0]) * math.prod(ins[1][1:])
        case "Gemm":
            transposed = node.attributes.get_int("transA", 0)
            return math.prod(out) * (ins[0][0] if transposed else ins[0][-1]) if ins[0] else 0
        case "MatMul":
            return math.prod(out) * ins[0][-1] if ins[0] else 0
        case "LSTM" | "GRU" | "RNN":
            length, batch = ins[0][0], ins[0][1]
            return length * batch * (math.prod(ins[1]) + math.prod(ins[2]))
        case _:
            return 0
