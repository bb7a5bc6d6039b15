"""Branches and chains that training needed, as the one layer that they are."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import numpy as np
import onnx_ir as ir

from compress.errors import UsageError
from compress.graph import graph_sites, infer_shapes
from compress.model import Model, Step
from compress.passes import Context
from compress.reference import largest_difference, largest_magnitude, reference_session, run
from compress.reparam.affine import NotMergeableError
from compress.reparam.branches import parts_behind
from compress.reparam.emit import name_of, prove, write
from compress.reparam.frames import hide_frames, show_frames
from compress.reparam.offers import Market, Offer, Profit, affine_map
from compress.reparam.reading import WEIGHTED, Shapes, is_affine, is_join, read
from compress.reparam.terms import regroup
from compress.rewrites import (
    RELATIVE_TOLERANCE,
    STATISTICS,
    Statistics,
    constant_array,
    listed,
    output_statistics,
    remove_unused,
)
from compress.target import Target


@dataclass(frozen=True, kw_only=True)
class MergeBranches:
    """Merge parallel branches without an activation function, and chains, into one layer each.

    What RepVGG, MobileOne, diverse branch blocks, dilated and grouped branches are trained with,
    found by what the graph computes. Numbers are merged in float64; every merge is compared with
    what it replaces. What looks alike and is left alone is named with the reason.

    Attributes:
        profit: "auto" merges branches where multiply-accumulates grow by less than the tensors
            that are saved are worth, and chains where they fall; "all" merges what is exact.
    """

    profit: Profit = "auto"

    name: ClassVar[str] = "merge_branches"
    stage: ClassVar[Literal["onnx"]] = "onnx"

    def __post_init__(self) -> None:
        if self.profit not in get_args(Profit):
            allowed = ", ".join(get_args(Profit))
            raise UsageError(f"merge_branches: profit is {self.profit!r}; choose from {allowed}.")

    def check(self, model: Model, target: Target) -> None:
        """Applies to every model."""

    def apply(self, model: Model, context: Context) -> Model:
        """Merge what pays; outputs equal the input model's within rounding."""
        graph = model.graph_model.graph
        order = {node: float(index) for index, node in enumerate(graph)}
        sinks = [node for node in reversed(graph) if _looks_mergeable(node, order)]
        if not sinks:
            return model.evolve(model.graph_model, Step(self.name, dataclasses.asdict(self)))
        before = model.graph_model.clone()
        shapes = infer_shapes(model.graph_model)
        frames = hide_frames(graph, shapes)
        moves = frozenset(node for frame in frames for node in frame.moves)
        order |= {frame.node: order[frame.producer] + 0.25 for frame in frames}
        market = Market(shapes, order, self.profit, moves)
        statistics = output_statistics(model)
        merged, left = _merge_all(graph, market, sinks, shapes, statistics)
        show_frames(graph, frames)
        remove_unused(model.graph_model)
        details: dict[str, Any] = {"merged": merged, "left": left}
        if merged:
            difference = _difference(before, model)
            if not difference <= RELATIVE_TOLERANCE:
                left = {"": f"together the merges change the outputs by {difference:.2g}"}
                details = {"merged": {}, "left": left}
                return model.evolve(before, Step(self.name, dataclasses.asdict(self), details))
            details |= {"max_relative_difference": difference, STATISTICS: listed(statistics)}
            details |= _totals(before, model.graph_model)
        return model.evolve(model.graph_model, Step(self.name, dataclasses.asdict(self), details))


def merge(model: Any, profit: Profit = "auto", **how: Any) -> Model:
    """Merge the branches of any model that `compress.loading.load` takes.

    Args:
        model: a file, a torch module, an ONNX model or a `Model`.
        profit: see `MergeBranches`.
        how: further arguments of `compress.loading.load`, such as `inputs`.

    Returns:
        A model at the ONNX stage with its BatchNorm folded; the last step of its history tells
        what was merged and what was left alone.
    """
    from compress.export import to_onnx
    from compress.loading import load
    from compress.registry import create_pass, create_target

    loaded = model if isinstance(model, Model) else load(model, **how)
    target = create_target("cpu")
    exported = to_onnx(loaded, target.capabilities.opset)
    done = dataclasses.replace(exported, program=exported.graph_model.clone())
    context = Context(target=target, original=loaded)
    for name in ("remove_identity", "fold_pad", "fold_batchnorm"):
        done = create_pass(name).apply(done, context)
    return MergeBranches(profit=profit).apply(done, context)


def _looks_mergeable(node: ir.Node, order: dict[ir.Node, float]) -> bool:
    """Whether branches meet here or a chain ends here."""
    if not is_affine(node):
        return False
    return is_join(node) or any(part.layers + part.pools > 1 for part in parts_behind(node, order))


def _merge_all(
    graph: ir.Graph,
    market: Market,
    sinks: list[ir.Node],
    shapes: dict[str, tuple[int, ...]],
    statistics: Statistics,
) -> tuple[dict[str, Any], dict[str, str]]:
    """Merge from the outputs to the inputs; what was merged, and why the rest was not."""
    merged: dict[str, Any] = {}
    left: dict[ir.Node, str] = {}
    gone: set[ir.Node] = set()
    todo = sinks[::-1]
    while todo:
        sink = todo.pop()
        if sink in gone:
            continue
        offers, reasons = market.offers(sink)
        left |= reasons
        for offer in offers:
            try:
                whole = affine_map(offer, market.shapes)
                difference = prove(offer.part, whole, offer.layout, market.shapes)
            except NotMergeableError as error:
                left[sink] = str(error)
                continue
            left.pop(sink, None)
            gone |= set(offer.part.nodes)
            name, facts = _facts(offer, market.shapes, difference)
            _keep_statistics(offer, name, statistics)
            write(graph, offer.part, whole, offer.layout, name)
            merged[name] = facts
            break
        else:
            if is_join(sink) and (grouped := regroup(graph, sink, market, shapes)) is not None:
                todo.append(grouped)
    return merged, {node.name or "": reason for node, reason in left.items() if node not in gone}


def _facts(offer: Offer, shapes: Shapes, difference: float) -> tuple[str, dict[str, Any]]:
    """The name of the layer, and what the report says of it."""
    part, parameters = offer.part, 0
    macs: dict[ir.Node, int] = {}
    for node in part.nodes:
        constants = [constant_array(v) for v in node.inputs if v is not None and v.const_value]
        parameters += sum(c.size for c in constants if c is not None and c.dtype == np.float32)
        if node.op_type in WEIGHTED:
            macs[node] = read(node, offer.layout, shapes).geometry.macs
    after = offer.geometry.outputs * offer.geometry.inputs // offer.geometry.groups
    after = after * int(np.prod(offer.geometry.sizes)) + offer.geometry.outputs
    return name_of(part, macs), {
        "from": [node.name or "" for node in part.nodes],
        "macs": list(offer.macs),
        "parameters": [parameters, after],
        "operators": [len(part.nodes), 1],
        "max_relative_difference": difference,
    }


def _keep_statistics(offer: Offer, name: str, statistics: Statistics) -> None:
    """What is known of the merged output: what a BatchNorm or a last layer of a chain said.

    The deviation of a sum depends on how its terms go together, which nobody recorded.
    """
    last = offer.part.nodes[-1]
    kept = statistics.get(last.name or "") if last.op_type in WEIGHTED else None
    if last.op_type == "BatchNormalization":
        gamma, beta, _, var = (
            np.asarray(constant_array(value), np.float64) for value in last.inputs[1:5]
        )
        epsilon = last.attributes.get_float("epsilon", 1e-5)
        kept = beta, np.abs(gamma) * np.sqrt(var / (var + epsilon))
    for node in offer.part.nodes:
        statistics.pop(node.name or "", None)
    if kept is not None:
        statistics[name] = kept


def _difference(before: ir.Model, model: Model) -> float:
    """Largest difference of the outputs on random inputs, relative to the largest output."""
    inputs = model.example()
    expected = run(reference_session(before), inputs)
    got = run(reference_session(model.graph_model), inputs)
    worst = max(largest_difference(got[name], array) for name, array in expected.items())
    return worst / max(1e-6, *(largest_magnitude(array) for array in expected.values()))


def _totals(before: ir.Model, after: ir.Model) -> dict[str, list[int]]:
    """MACs and parameters of the whole network."""
    both = graph_sites(before), graph_sites(after)
    return {
        "macs": [sum(site.macs for site in sites) for sites in both],
        "parameters": [sum(site.parameters for site in sites) for sites in both],
        "operators": [len(sites) for sites in both],
    }
