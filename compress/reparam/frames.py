"""Borders that a network writes by itself: a constant for each channel around an image.

The diverse branch block pads what BatchNorm wrote with what BatchNorm makes of zero. Its published
code assigns to slices, which an exporter turns into dozens of operators that move data. What they
do together is found by running them: they move and fill, so two random images tell all of it.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from compress.errors import EngineError
from compress.reference import reference_session, run
from compress.reparam.branches import small_model, stand_in
from compress.reparam.reading import FRAME, Shapes, is_affine

_MOVES = {"Transpose", "ScatterND", "Pad", "Slice", "Gather", "Expand", "Reshape", "Unsqueeze"}
_MOVES |= {"Squeeze", "Shape", "Range", "Concat", "Constant", "Cast", "Identity"}


@dataclass(frozen=True)
class Frame:
    """A frame, and the one operator that stands for it while branches are merged.

    Attributes:
        node: reads the image and the constants.
        producer: of what is written without it.
        original: what is written without it.
        moves: the operators that it stands for.
    """

    node: ir.Node
    producer: ir.Node
    original: ir.Value
    moves: frozenset[ir.Node]


def hide_frames(graph: ir.Graph, shapes: dict[str, tuple[int, ...]]) -> list[Frame]:
    """Put one operator in the place of every frame; `shapes` learns of its output."""
    found = []
    for node in [node for node in graph if node.op_type == "ScatterND"]:
        value = node.outputs[0]
        while (after := _only_reader(value)) is not None and after.op_type in _MOVES:
            value = after.outputs[0]
        readers = [use.node for use in value.uses()]
        if not readers or not all(map(is_affine, readers)) or value.is_graph_output():
            continue
        if (made := _frame(value, shapes)) is not None:
            found.append(made)
    return found


def show_frames(graph: ir.Graph, frames: list[Frame]) -> None:
    """Take away what still stands for a frame."""
    for frame in frames:
        if frame.node.graph is graph:
            frame.node.outputs[0].replace_all_uses_with(frame.original)
            graph.remove(frame.node, safe=True)


def _only_reader(value: ir.Value) -> ir.Node | None:
    """The operator that alone reads a tensor's numbers; its shape may be read besides."""
    readers = {use.node for use in value.uses() if use.node.op_type != "Shape"}
    return readers.pop() if len(readers) == 1 and not value.is_graph_output() else None


def _frame(value: ir.Value, shapes: dict[str, tuple[int, ...]]) -> Frame | None:
    cone, images, sized = _cone(value)
    outer = shapes.get(value.name or "", ())
    if len(images) != 1 or any(min(shapes.get(v.name or "", (0,))) <= 0 for v in images | sized):
        return None
    (image,) = images
    inner = shapes[image.name or ""]
    if len(inner) < 3 or outer[:2] != inner[:2] or image.dtype != ir.DataType.FLOAT:
        return None
    try:
        seen = _probe(cone, image, sized, value, shapes)
    except EngineError:
        return None
    found = _interpret(*seen)
    if found is None:
        return None
    pads, filling = found
    constant = stand_in(f"{value.name}/frame", filling)
    node = ir.node(FRAME, [image, constant], {"pads": pads}, name=f"{value.name}/frame")
    producer = value.producer()
    graph = producer.graph if producer is not None else None
    if producer is None or graph is None:
        return None
    value.replace_all_uses_with(node.outputs[0])
    graph.insert_after(producer, node)
    made = node.outputs[0]
    made.name, made.shape, made.type = f"{value.name}/framed", value.shape, value.type
    shapes[made.name] = outer
    return Frame(node, producer, value, frozenset(cone))


def _cone(value: ir.Value) -> tuple[list[ir.Node], set[ir.Value], set[ir.Value]]:
    """What moves data towards a tensor, the tensors whose numbers and whose sizes they read."""
    nodes: set[ir.Node] = set()
    images: set[ir.Value] = set()
    sized: set[ir.Value] = set()
    todo = [value]
    while todo:
        producer = todo.pop().producer()
        if producer is None or producer in nodes:
            continue
        nodes.add(producer)
        for read in filter(None, producer.inputs):
            source = read.producer()
            moves = source is not None and source.op_type in _MOVES
            if read.const_value is not None:
                continue
            if moves:
                todo.append(read)
            elif producer.op_type == "Shape":
                sized.add(read)
            else:
                images.add(read)
    graph = next(iter(nodes)).graph if nodes else None
    ordered = [node for node in graph or () if node in nodes]
    return ordered, images, sized - images


def _probe(
    cone: list[ir.Node],
    image: ir.Value,
    sized: set[ir.Value],
    value: ir.Value,
    shapes: Shapes,
) -> tuple[np.ndarray, ...]:
    """Two random images, and what becomes of each."""
    roots = [image, *sized]
    names = {root: f"in{index}" for index, root in enumerate(roots)}
    model = small_model(cone, {root: shapes[root.name or ""] for root in roots}, value)
    runtime = reference_session(model)
    rng = np.random.default_rng(0)
    others = {names[root]: np.zeros(shapes[root.name or ""], np.float32) for root in sized}
    seen = []
    for _ in range(2):
        array = rng.standard_normal(shapes[image.name or ""]).astype(np.float32)
        seen += [array, next(iter(run(runtime, {names[image]: array, **others}).values()))]
    return tuple(seen)


def _interpret(
    one: np.ndarray, framed_one: np.ndarray, other: np.ndarray, framed_other: np.ndarray
) -> tuple[list[int], np.ndarray] | None:
    """Pads (begins, ends) and constant of each channel; None unless it is an image in a frame."""
    room = [b - a for a, b in zip(one.shape[2:], framed_one.shape[2:], strict=True)]
    if min(room) < 0 or len(one) != len(framed_one):
        return None
    for begins in itertools.product(*(range(extra + 1) for extra in room)):
        image = [slice(b, b + n) for b, n in zip(begins, one.shape[2:], strict=True)]
        inside = (slice(None), slice(None), *image)
        if not np.array_equal(framed_one[inside], one):
            continue
        border = np.ones(framed_one.shape, bool)
        border[inside] = False
        outside = np.where(border, framed_one, np.nan)
        axes = (0, *range(2, one.ndim))
        low, high = np.nanmin(outside, axes), np.nanmax(outside, axes)
        same = np.array_equal(framed_one[border], framed_other[border])
        if same and np.array_equal(low, high) and np.array_equal(framed_other[inside], other):
            ends = [extra - b for extra, b in zip(room, begins, strict=True)]
            return [*begins, *ends], low.astype(np.float32)
    return None
