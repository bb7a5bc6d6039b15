"""Channel shuffle inside convolutions, which are cheaper in int8 than moving bytes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import onnx_ir as ir
import onnx_ir.convenience as convenience

from compress.model import Model, Step
from compress.passes import Context
from compress.rewrites import (
    STATISTICS,
    axis_size,
    constant_array,
    listed,
    output_statistics,
    replace_constant,
    rewrite_all,
)
from compress.target import Target


@dataclass(frozen=True)
class ShuffleInConvolution:
    """Let the convolutions behind a channel shuffle do the shuffling.

    A shuffle (ShuffleNet, arXiv 1707.01083), with or without the split behind it, selects
    channels: y = x[:, order]. A convolution that reads y can read x instead, with its weights at
    the selected channels and zeros elsewhere. What else reads y gets a 1x1 convolution with one 1
    for each output channel; int8 represents it exactly. Moves between memory layouts disappear,
    products are added: only for targets where that is the faster way.
    """

    name: ClassVar[str] = "shuffle_in_convolution"
    stage: ClassVar[Literal["onnx"]] = "onnx"

    def check(self, model: Model, target: Target) -> None:
        """Applies to every model."""

    def apply(self, model: Model, context: Context) -> Model:
        """Rewrite every shuffle of channels on a rank-4 tensor."""
        wanted = context.target.capabilities.costly_moves
        nodes = model.graph_model.graph if wanted else ()
        found = [shuffle for node in nodes if (shuffle := _shuffle(node)) is not None]
        moved: dict[str, np.ndarray] = {}
        rewritten = rewrite_all(model, self.name, found, lambda g, one: _select(g, *one, moved))
        return _with_statistics(rewritten, moved)


def _with_statistics(model: Model, moved: Mapping[str, np.ndarray]) -> Model:
    """Record the statistics of convolutions anew whose channels have another order now."""
    known = output_statistics(model)
    changed = {n: (known[n][0][back], known[n][1][back]) for n, back in moved.items() if n in known}
    if not changed:
        return model
    last = model.history[-1]
    step = Step(last.name, last.options, {**last.details, STATISTICS: listed(known | changed)})
    return dataclasses.replace(model, history=(*model.history[:-1], step))


def _shuffle(node: ir.Node) -> tuple[ir.Value, ir.Value, np.ndarray] | None:
    """Source, result and order of channels of Reshape, Transpose, Reshape; None if it is none."""
    if node.op_type != "Transpose":
        return None
    inner, turned = node.inputs[0], node.outputs[0]
    before = inner.producer() if inner is not None else None
    after = next((use.node for use in turned.uses()), None)
    if inner is None or before is None or after is None or len(turned.uses()) > 1:
        return None
    if before.op_type != "Reshape" or after.op_type != "Reshape" or inner.shape is None:
        return None
    source, result = before.inputs[0], after.outputs[0]
    if source is None or source.shape is None or source.dtype != ir.DataType.FLOAT:
        return None
    rank = (len(source.shape), len(inner.shape))
    if rank != (4, 5) or tuple(node.attributes.get_ints("perm", ())) != (0, 2, 1, 3, 4):
        return None
    groups, width, channels = axis_size(inner, 1), axis_size(inner, 2), axis_size(source, 1)
    if channels != groups * width or channels == 0 or result.shape is None:
        return None
    if source.shape[1:] != result.shape[1:] or source.shape[2:] != inner.shape[3:]:
        return None
    return source, result, np.arange(channels).reshape(groups, width).T.reshape(-1)


def _select(
    graph: ir.Graph,
    source: ir.Value,
    selected: ir.Value,
    order: np.ndarray,
    moved: dict[str, np.ndarray],
) -> None:
    """Let every reader of selected = source[:, order] read the source.

    `moved` gets the new order of channels of each convolution whose output has one.
    """
    rest = selected.is_graph_output()
    for use in list(selected.uses()):
        node = use.node
        if node.op_type == "Split" and (parts := _parts(node, order)) is not None:
            for out, part in zip(node.outputs, parts, strict=True):
                _select(graph, source, out, part, moved)
        elif use.idx == 0 and _is_dense(node):
            _read(graph, node, source, order)
        elif use.idx == 0 and len(order) == axis_size(source, 1) and _permutes(node, order):
            _push(graph, node, source, order)
            moved[node.name or ""] = np.argsort(order)
        else:
            rest = True
    if rest:
        _convolve(graph, source, selected, order)


def _parts(split: ir.Node, order: np.ndarray) -> list[np.ndarray] | None:
    """The channels of each output of a split of channels."""
    if split.attributes.get_int("axis", 0) != 1:
        return None
    sizes = [axis_size(out, 1) for out in split.outputs]
    return np.split(order, np.cumsum(sizes)[:-1]) if sum(sizes) == len(order) else None


def _is_dense(node: ir.Node) -> bool:
    """Whether every output channel of a convolution reads every input channel."""
    constant = node.op_type == "Conv" and constant_array(node.inputs[1]) is not None
    return constant and node.attributes.get_int("group", 1) == 1


def _read(graph: ir.Graph, conv: ir.Node, source: ir.Value, order: np.ndarray) -> None:
    """A dense convolution with its weights where the selected channels are in the source."""
    weight = np.asarray(constant_array(conv.inputs[1]))
    spread = np.zeros((len(weight), axis_size(source, 1), *weight.shape[2:]), weight.dtype)
    spread[:, order] = weight
    conv.replace_input_with(0, source)
    replace_constant(graph, conv, 1, spread, f"{conv.name}.weight")


def _permutes(conv: ir.Node, order: np.ndarray) -> bool:
    """Whether a depthwise convolution can work in the source's order: its readers take that."""
    weight = constant_array(conv.inputs[1]) if conv.op_type == "Conv" else None
    out = conv.outputs[0]
    readers = [use.node for use in out.uses() if use.idx == 0]
    return (
        weight is not None
        and conv.attributes.get_int("group", 1) == len(weight) == len(order) == len(set(order))
        and not out.is_graph_output()
        and len(readers) == len(out.uses())
        and all(_is_dense(reader) for reader in readers)
    )


def _push(graph: ir.Graph, conv: ir.Node, source: ir.Value, order: np.ndarray) -> None:
    """Let a depthwise convolution keep the source's order, and its readers select."""
    back = np.argsort(order)
    conv.replace_input_with(0, source)
    for index, kind in ((1, "weight"), (2, "bias")):
        numbers = constant_array(conv.inputs[index]) if index < len(conv.inputs) else None
        if numbers is not None:
            replace_constant(graph, conv, index, numbers[back], f"{conv.name}.{kind}")
    for use in list(conv.outputs[0].uses()):
        _read(graph, use.node, conv.outputs[0], order)


def _convolve(graph: ir.Graph, source: ir.Value, selected: ir.Value, order: np.ndarray) -> None:
    """Compute the selection as a 1x1 convolution, for readers that need it itself."""
    producer = selected.producer()
    if producer is None:
        return
    weight = np.zeros((len(order), axis_size(source, 1), 1, 1), np.float32)
    weight[np.arange(len(order)), order] = 1
    name = selected.name or ""
    conv = ir.node("Conv", [source], {"kernel_shape": [1, 1]}, name=f"{name}/selection")
    out = conv.outputs[0]
    out.shape, out.type = selected.shape, selected.type
    graph.insert_after(producer, conv)
    replace_constant(graph, conv, 1, weight, f"{conv.name}.weight")
    convenience.replace_all_uses_with(selected, out, replace_graph_outputs=True)
    selected.name, out.name = f"{name}/moved", name
