"""The first stage of a network: operators that only look at a neighbourhood, up to a cut."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import onnx_ir as ir

from compress.errors import UnsupportedError
from compress.graph import Site, graph_sites, infer_shapes
from compress.graph_liveness import COMBINING, POINTWISE, data_tensors, inputs_of, reads_numbers
from compress.memory.halo import Layer, Window

_Shapes = Mapping[str, tuple[int, ...]]
_BY_CHANNEL = POINTWISE | COMBINING | {"BatchNormalization", "Cast", "Dropout", "Identity"}
_WINDOWED = frozenset(["AveragePool", "Conv", "MaxPool", "Pad"])


@dataclass(frozen=True)
class Stage:
    """The operators in front of a cut, through which one tensor goes and nothing else.

    Attributes:
        end: the tensor.
        site: name of the operator that writes it.
        steps: positions in the graph of the operators in front of the cut that work on data.
        layers: the same, as they read their neighbourhoods.
        channels: of the tensor.
    """

    end: str
    site: str
    steps: tuple[int, ...]
    layers: tuple[Layer, ...]
    channels: int


@dataclass(frozen=True)
class Stages:
    """All stages that a network can begin with.

    Attributes:
        image: name of the network's input.
        sizes: spatial sizes of all tensors in the longest stage.
        stages: the shortest first.
        limit: why the longest is not longer, in words.
    """

    image: str
    sizes: Mapping[str, tuple[int, ...]]
    stages: tuple[Stage, ...]
    limit: str


def first_stages(graph_model: ir.Model) -> Stages:
    """The stages that end where one tensor alone goes on.

    A stage does not end directly before an operator that works number by number, as that one
    belongs to it.

    Raises:
        UnsupportedError: there is none; the message says what sees all of the image at once.
    """
    graph, shapes = graph_model.graph, infer_shapes(graph_model)
    data = data_tensors(graph)
    images = [value for value in graph.inputs if value in data]
    shape = shapes.get(images[0].name or "", ()) if images else ()
    if len(images) != 1 or len(shape) < 3 or min(shape) < 1:
        raise UnsupportedError(
            "Patch-based execution needs a network with one input with batch, channels and "
            "spatial axes of known size, such as 1x3x224x224. Give another model, or --input."
        )
    image = images[0].name or ""
    sites, rank = {id(n): s for n, s in _with_sites(graph_model)}, len(shape) - 2
    layers: list[Layer] = []
    steps: list[int] = []
    found: list[Stage] = []
    limit = "the network ends there"
    alive = {images[0]}
    last = _last_readers(graph)
    for index, node in enumerate(graph):
        reads = [value for value in inputs_of(node) if value in data]
        if not reads or not reads_numbers(node):
            continue
        try:
            layers.append(_layer(node, reads, shapes, rank, sites[id(node)].macs))
        except _GlobalError as error:
            limit = f"{node.name} ({node.op_type}) {error}"
            break
        steps.append(index)
        alive = {value for value in (*alive, *node.outputs) if last.get(value, -1) > index}
        if len(alive) == 1 and (end := next(iter(alive))) in node.outputs and _is_cut(end):
            found.append(
                Stage(
                    end=end.name or "",
                    site=node.name or "",
                    steps=tuple(steps),
                    layers=tuple(layers),
                    channels=shapes[end.name or ""][1],
                )
            )
    if not any(layer.windows != (Window(),) * rank for layer in layers) or not found:
        raise UnsupportedError(
            f"The network has no first stage that patches could run: {limit}. Patch-based "
            f"execution is for convolutions, pools and operators number by number at the start."
        )
    names = {image, *(name for layer in layers for name in layer.writes)}
    return Stages(image, {name: shapes[name][2:] for name in names}, tuple(found), limit)


def _with_sites(graph_model: ir.Model) -> list[tuple[ir.Node, Site]]:
    nodes = [node for node in graph_model.graph if node.op_type != "Constant"]
    return list(zip(nodes, graph_sites(graph_model), strict=True))


def _last_readers(graph: ir.Graph) -> dict[ir.Value, int]:
    """Position of the last node that reads each tensor; outputs are read behind the last."""
    nodes = [(i, node) for i, node in enumerate(graph) if reads_numbers(node)]
    found = {value: i for i, node in nodes for value in inputs_of(node)}
    return found | dict.fromkeys(graph.outputs, len(list(graph)))


def _is_cut(end: ir.Value) -> bool:
    users = [use.node for use in end.uses()]
    alone = len(users) == 1 and users[0].op_type in _BY_CHANNEL
    return not end.is_graph_output() and not (alone and _is_unary(users[0]))


def _is_unary(node: ir.Node) -> bool:
    return sum(value.const_value is None for value in node.inputs if value is not None) == 1


class _GlobalError(Exception):
    """An operator does not only look at a neighbourhood."""


def _layer(node: ir.Node, reads: list[ir.Value], shapes: _Shapes, rank: int, macs: int) -> Layer:
    names = tuple(dict.fromkeys(value.name or "" for value in reads))
    writes = tuple(value.name or "" for value in node.outputs if value.name in shapes)
    known = [shapes.get(name, ()) for name in (*names, *writes)]
    if not writes or any(len(one) != rank + 2 or min(one) < 1 for one in known):
        raise _GlobalError("does not keep the axes of an image")
    windows = (Window(),) * rank
    if node.op_type == "MaxPool" and len(writes) > 1:
        raise _GlobalError("also says where its largest numbers were")
    if node.op_type in _WINDOWED:
        windows = _windows(node, shapes[names[0]], rank)
    elif node.op_type in ("Concat", "Split"):
        if node.attributes.get_int("axis", 0) % (rank + 2) != 1:
            raise _GlobalError("works on another axis than the channels")
    elif node.op_type not in _BY_CHANNEL:
        raise _GlobalError(_reason(node.op_type))
    elif len({one[2:] for one in known}) > 1:
        raise _GlobalError("combines tensors of different sizes")
    _check_constants(node, rank)
    return Layer(node.name or "", node.op_type, names, writes, windows, macs)


def _reason(op_type: str) -> str:
    if op_type.startswith(("Global", "Reduce")):
        return "looks at the whole image"
    if op_type in ("MatMul", "Gemm", "Softmax", "Attention", "Einsum"):
        return "combines all positions"
    if op_type in ("Resize", "Upsample", "ConvTranspose", "DepthToSpace", "SpaceToDepth"):
        return "changes the resolution in another way than a window does"
    return "is no convolution, no pool and does not work number by number"


def _check_constants(node: ir.Node, rank: int) -> None:
    """Refuse constants that differ from place to place in the image."""
    if node.op_type in _WINDOWED or node.op_type in ("Concat", "Split", "BatchNormalization"):
        constant = any(v is not None and v.const_value is not None for v in node.inputs)
        if node.op_type == "Concat" and constant:
            raise _GlobalError("joins a constant to the image")
        return
    for value in node.inputs:
        number = value.const_value if value is not None else None
        if number is not None and math.prod(tuple(number.shape.numpy())[-rank:]) != 1:
            raise _GlobalError("has a constant that differs from place to place")


def _windows(node: ir.Node, shape: tuple[int, ...], rank: int) -> tuple[Window, ...]:
    attributes = node.attributes
    if node.op_type == "Pad":
        return _padding(node, rank)
    weight = node.inputs[1] if node.op_type == "Conv" else None
    if weight is not None and weight.const_value is None:
        raise _GlobalError("has a weight that is computed")
    given = list(attributes.get_ints("kernel_shape", []))
    if weight is not None and weight.const_value is not None:
        given = list(weight.const_value.shape.numpy()[2:])
    strides = attributes.get_ints("strides", [1] * rank)
    dilations = attributes.get_ints("dilations", [1] * rank)
    mode = attributes.get_string("auto_pad", "NOTSET")
    pads = list(attributes.get_ints("pads", [0] * (2 * rank)))
    windows = []
    for axis in range(rank):
        before = 0 if mode == "VALID" else pads[axis]
        if mode.startswith("SAME"):
            size, stride = shape[2 + axis], strides[axis]
            reached = (math.ceil(size / stride) - 1) * stride + (given[axis] - 1) * dilations[axis]
            total = max(reached + 1 - size, 0)
            before = total // 2 if mode == "SAME_UPPER" else total - total // 2
        windows.append(Window(given[axis], strides[axis], dilations[axis], before))
    if node.op_type == "AveragePool":
        whole = attributes.get_int("count_include_pad", 0)
        padded = any(pads) or mode.startswith("SAME")
        if (padded and not whole) or attributes.get_int("ceil_mode", 0) != 0:
            raise _GlobalError("averages over fewer numbers at the border")
    return tuple(windows)


def _padding(node: ir.Node, rank: int) -> tuple[Window, ...]:
    mode = node.attributes.get_string("mode", "constant")
    constants = [v.const_value if v is not None else None for v in node.inputs[1:]]
    amounts = constants[0].numpy().tolist() if constants and constants[0] is not None else None
    axes = len(constants) > 2 and constants[2] is not None
    if mode != "constant" or amounts is None or axes or len(amounts) != 2 * (rank + 2):
        raise _GlobalError("pads with something else than a constant")
    if any(amounts[:2] + amounts[rank + 2 : rank + 4]) or min(amounts) < 0:
        raise _GlobalError("pads channels, or cuts")
    return tuple(Window(before=before) for before in amounts[2 : rank + 2])
