"""Zero padding inside the convolution that follows it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import onnx_ir as ir

from compress.model import Model, Step
from compress.passes import Context
from compress.rewrites import bypass, constant_array, remove_unused
from compress.target import Target


@dataclass(frozen=True)
class FoldPad:
    """Fold padding with zeros into the convolution behind it (TensorFlow's SAME padding).

    A Pad of height and width by zeros, read by one convolution only, adds to its `pads`; the
    sums are the same, so nothing has to be checked in numbers.
    """

    name: ClassVar[str] = "fold_pad"
    stage: ClassVar[Literal["onnx"]] = "onnx"

    def check(self, model: Model, target: Target) -> None:
        """Applies to every model."""

    def apply(self, model: Model, context: Context) -> Model:
        """Fold every such Pad."""
        graph = model.graph_model.graph
        folded = 0
        for node in list(graph):
            pads = _spatial_pads(node) if node.op_type == "Pad" else None
            uses = list(node.outputs[0].uses())
            if pads is None or len(uses) != 1 or node.outputs[0].is_graph_output():
                continue
            conv, source = uses[0].node, node.inputs[0]
            if conv.op_type != "Conv" or uses[0].idx != 0 or source is None:
                continue
            if conv.attributes.get_string("auto_pad", "NOTSET") != "NOTSET":
                continue
            own = conv.attributes.get_ints("pads", [0] * len(pads))
            both = [int(a + b) for a, b in zip(pads, own, strict=True)]
            conv.attributes["pads"] = ir.AttrInt64s("pads", both)
            bypass(graph, node, source)
            folded += 1
        remove_unused(model.graph_model)
        return model.evolve(model.graph_model, Step(self.name, {}, {"folded": folded}))


def _spatial_pads(node: ir.Node) -> list[int] | None:
    """Padding (begins, ends) of the axes from 2 on; None unless it is zeros and only there."""
    if node.attributes.get_string("mode", "constant") != "constant" or len(node.inputs) < 2:
        return None
    pads = constant_array(node.inputs[1])
    value = node.inputs[2] if len(node.inputs) > 2 else None
    if value is not None:
        filling = constant_array(value)
        if filling is None or np.any(filling):
            return None
    if pads is None or (len(node.inputs) > 3 and node.inputs[3] is not None):
        return None
    begins, ends = np.split(pads.astype(int), 2)
    if len(begins) < 3 or (pads < 0).any() or begins[:2].any() or ends[:2].any():
        return None
    return [*begins[2:].tolist(), *ends[2:].tolist()]
