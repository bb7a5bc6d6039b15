"""How differently the channels of merged layers are scaled, which decides what int8 keeps of them.

Branches that were normalised one by one can add up to kernels whose channels differ by far more:
RepVGG loses most of its accuracy to int8 with one scale for a tensor (Chu et al. 2024,
arXiv 2212.01593, section 3).
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from compress.data import Data
from compress.model import Model
from compress.reference import reference_session, run
from compress.reparam.affine import AffineMap
from compress.reparam.branches import Part
from compress.reparam.reading import WEIGHTED, Layout
from compress.rewrites import constant_array

LARGE = 8.0
"""With one scale for the tensor, the channel in the middle keeps 5 of 8 bits."""
GROWN = 1.25
"""A spread that the branches had before says nothing about the merge."""
BATCH = 4


def spread(ranges: np.ndarray) -> float:
    """Largest range over the one in the middle; 1 where there is none. Ranges are (channels,)."""
    alive = ranges[ranges > 0]
    return float(alive.max() / np.median(alive)) if alive.size else 1.0


def weight_spreads(part: Part, whole: AffineMap) -> list[float]:
    """Of the kernels before, the worst of them, and of the merged one."""
    before = [
        spread(_ranges(np.asarray(constant_array(node.inputs[1])), node))
        for node in part.nodes
        if node.op_type in WEIGHTED
    ]
    weight = np.abs(whole.weight).reshape(len(whole.weight), -1)
    return [max(before, default=1.0), spread(weight.max(1))]


def _ranges(weight: np.ndarray, node: ir.Node) -> np.ndarray:
    """Largest weight of every output channel."""
    rows = node.op_type == "Conv" or bool(node.attributes.get_int("transB", 0))
    found = np.abs(weight).reshape(len(weight), -1).max(1) if rows else np.abs(weight).max(-2)
    return np.asarray(found).reshape(-1)


def activation_spreads(
    model: Model, watched: dict[str, tuple[list[str], str, Layout]], data: Data, samples: int
) -> dict[str, list[float]]:
    """Of what branches write, the worst of them, and of their sum.

    Args:
        model: before anything was merged.
        watched: by the merged layer: tensors of the branches, that of the sum, and their layout.
        data: calibration data.
        samples: how many of them to look at.
    """
    copy = model.graph_model.clone()
    values = {out.name: out for node in copy.graph for out in node.outputs}
    # What was only made while merging has no tensor here.
    known = {
        layer: ([name for name in branches if name in values], total, layout)
        for layer, (branches, total, layout) in watched.items()
        if total in values
    }
    axes = {
        name: 1 if layout.dims is not None else -1
        for branches, total, layout in known.values()
        for name in (*branches, total)
    }
    present = {value.name for value in copy.graph.outputs}
    copy.graph.outputs.extend(values[name] for name in axes if name not in present)
    runtime = reference_session(copy, optimize=True)
    largest: dict[str, np.ndarray] = {}
    size = BATCH if model.dynamic_batch else 1
    for batch in data.take(samples).batches(size):
        if not model.dynamic_batch and len(batch) != model.inputs[0].concrete()[0]:
            return {}
        outputs = run(runtime, batch.inputs)
        for name, axis in axes.items():
            moved = np.moveaxis(np.abs(outputs[name]), axis, 0)
            found = moved.reshape(len(moved), -1).max(1)
            largest[name] = np.maximum(found, largest.get(name, np.zeros(())))
    return {
        layer: [
            max((spread(largest[name]) for name in branches), default=1.0),
            spread(largest[total]),
        ]
        for layer, (branches, total, _) in known.items()
        if total in largest
    }


def is_wide(spreads: list[float]) -> bool:
    """Whether a spread is large, and was not before."""
    before, after = spreads
    return after > LARGE and after > GROWN * before
