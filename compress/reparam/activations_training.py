"""Activations that become linear in the course of a training."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

import onnx_ir as ir
import torch
from torch import Tensor

from compress.fine_tuning import Course
from compress.graph import infer_shapes
from compress.model import Model
from compress.reparam.activations_graph import Segment, is_activation, move_padding, nodes_of
from compress.rewrites import replace_node
from compress.teaching import Teaching
from compress.torch_graph.network import Network
from compress.torch_graph.operators import OPERATORS
from compress.training import Score

if TYPE_CHECKING:
    from compress.fine_tuning import Arrays

ANNEALED = "Annealed"
"""Stands for an activation in the graph that is trained; there is no such ONNX operator."""


class Annealed:
    """(1 - share) f(x) + share x; of a ReLU, the leaky one with the slope `share`.

    VanillaNet (Chen et al. 2023, arXiv 2305.12972, section 3.1) with the share e / E.

    Attributes:
        share: 0 leaves the activation f as it is; 1 is the identity, exactly.
    """

    def __init__(self) -> None:
        self.share = 0.0

    def __call__(self, attributes: Mapping[str, Any], x: Tensor, *bounds: Tensor | None) -> Tensor:
        """The activation of `attributes["function"]` on its way to the identity."""
        if self.share == 1.0:
            return x
        made = OPERATORS[attributes["function"]](attributes, x, *bounds)
        assert isinstance(made, Tensor)
        return torch.lerp(made, x, self.share)


def student_of(
    model: Model, segments: Collection[Segment], annealed: Annealed, move: bool
) -> Network:
    """The network whose activations in these segments follow `annealed`.

    Args:
        model: at the ONNX stage; it is not changed.
        segments: that will be merged.
        annealed: shared by all of their activations.
        move: padding between their layers moves in front of the first, from the first step on.
    """
    graph_model = model.graph_model.clone()
    graph = graph_model.graph
    shapes = infer_shapes(graph_model)
    for segment in segments:
        nodes = nodes_of(graph, segment)
        if move:
            move_padding(nodes, shapes)
        for node in filter(is_activation, nodes):
            function = ir.AttrString("function", node.op_type)
            attributes = [*node.attributes.values(), function]
            replace_node(graph, node, [ir.Node("", ANNEALED, node.inputs, attributes)])
    return Network(graph_model, {ANNEALED: annealed})


class Annealing(Course):
    """A training in which activations become linear; judged as what it will be: linear.

    Args:
        network: with `Annealed` activations.
        teaching: by the original.
        rate: largest learning rate.
        annealed: the operator of the activations.
        until: share of the training after which they are linear.
    """

    def __init__(
        self,
        network: Network,
        teaching: Teaching[Arrays],
        rate: float,
        annealed: Annealed,
        until: float,
    ) -> None:
        super().__init__(network, teaching, rate)
        self.annealed, self.until = annealed, until

    def begin(self, progress: float) -> None:
        """The share that is linear grows with every step."""
        self.annealed.share = min(1.0, progress / self.until)

    def score(self) -> Score:
        """Of the network with linear activations, whatever they are at this step."""
        now, self.annealed.share = self.annealed.share, 1.0
        try:
            return super().score()
        finally:
            self.annealed.share = now
