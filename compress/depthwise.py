"""BatchNorm and average pooling as depthwise convolutions, which runtimes have in fast int8."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import onnx_ir as ir

from compress.model import Model, Step
from compress.passes import Context
from compress.reference import reference_session, run
from compress.rewrites import (
    check_equal,
    constant_array,
    remove_unused,
    replace_constant,
    replace_node,
)
from compress.target import Target

Attributes = dict[str, int | Sequence[int]]
_POOL_ATTRIBUTES = {"kernel_shape", "strides", "pads", "count_include_pad", "ceil_mode", "auto_pad"}


@dataclass(frozen=True)
class DepthwiseForm:
    """Write what is left of BatchNorm, and average pooling, as depthwise convolutions.

    A BatchNorm that could not be folded (DenseNet: it follows a concat) is a 1x1 depthwise
    convolution with W = gamma / sqrt(var + eps) and b = beta - W mean. An average over k x k is
    one with W = 1 / k^2. Each channel of a 1x1 or constant kernel fits its own int8 scale
    exactly, so quantization loses nothing in these weights. A target that computes a scale and
    a shift on the way to the next kernel keeps its BatchNorm, and one that averages faster than it
    convolves its pools.
    """

    name: ClassVar[str] = "depthwise_form"
    stage: ClassVar[Literal["onnx"]] = "onnx"

    def check(self, model: Model, target: Target) -> None:
        """Applies to every model."""

    def apply(self, model: Model, context: Context) -> Model:
        """Rewrite every such operator on a rank-4 tensor whose channels are known."""
        graph = model.graph_model.graph
        kinds = {"BatchNormalization", "AveragePool"}
        if context.target.capabilities.pattern("BatchNormalization") is not None:
            kinds.remove("BatchNormalization")
        if not context.target.capabilities.convolved_pools:
            kinds.remove("AveragePool")
        candidates = [node for node in graph if node.op_type in kinds]
        expected = {}
        if candidates:
            expected = run(reference_session(model.graph_model), model.example())
        rewritten = []
        for node in candidates:
            made = _convolution(node)
            if made is None:
                continue
            attributes, weight, bias = made
            conv = ir.node("Conv", [node.inputs[0]], attributes, name=node.name)
            replace_node(graph, node, [conv])
            replace_constant(graph, conv, 1, weight.astype(np.float32), f"{conv.name}.weight")
            replace_constant(graph, conv, 2, bias.astype(np.float32), f"{conv.name}.bias")
            rewritten.append(conv.name)
        remove_unused(model.graph_model)
        details = {"rewritten": len(rewritten), **check_equal(model, expected)}
        return model.evolve(model.graph_model, Step(self.name, {}, details))


def _convolution(
    node: ir.Node,
) -> tuple[Attributes, np.ndarray, np.ndarray] | None:
    """Attributes, weight (C, 1, k, k) and bias (C,) of the equal convolution, or None."""
    source = node.inputs[0]
    if source is None or source.shape is None or len(source.shape) != 4:
        return None
    channels = source.shape[1]
    if not isinstance(channels, int) or source.dtype not in (ir.DataType.FLOAT, None):
        return None
    if node.op_type == "BatchNormalization":
        constants = [constant_array(value) for value in node.inputs[1:5]]
        if any(c is None for c in constants) or node.attributes.get_int("training_mode", 0) == 1:
            return None
        gamma, beta, mean, var = (np.asarray(c, np.float64) for c in constants)
        scale = gamma / np.sqrt(var + node.attributes.get_float("epsilon", 1e-5))
        shape: Attributes = {"kernel_shape": [1, 1], "group": channels}
        return shape, scale.reshape(-1, 1, 1, 1), beta - scale * mean
    attributes = node.attributes
    kernel = list(attributes.get_ints("kernel_shape", ()))
    pads = list(attributes.get_ints("pads", (0, 0, 0, 0)))
    counts_padding = attributes.get_int("count_include_pad", 0) == 1
    padded = any(pads) and not counts_padding
    unusual = (
        attributes.get_string("auto_pad", "NOTSET") != "NOTSET"
        or not set(attributes) <= _POOL_ATTRIBUTES
    )
    if len(kernel) != 2 or padded or unusual or attributes.get_int("ceil_mode", 0) == 1:
        return None
    strides = list(attributes.get_ints("strides", (1, 1)))
    shape = {"kernel_shape": kernel, "strides": strides, "pads": pads, "group": channels}
    weight = np.full((channels, 1, *kernel), 1 / (kernel[0] * kernel[1]))
    return shape, weight, np.zeros(channels)
