"""Branches and chains that training needed, as the one layer that they are."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, get_args

import onnx_ir as ir

from compress.data import Data
from compress.errors import EngineError, UsageError
from compress.graph import infer_shapes
from compress.latency import Comparison, Ratio
from compress.model import Model, Step
from compress.passes import Context
from compress.reference import largest_difference, largest_magnitude, reference_session, run
from compress.registry import create_pass, create_target
from compress.reparam.affine import AffineMap, NotMergeableError
from compress.reparam.branches import parts_behind
from compress.reparam.emit import prove, write
from compress.reparam.facts import (
    is_suspicious,
    keep_statistics,
    merge_facts,
    remarks,
    totals,
)
from compress.reparam.frames import hide_frames, show_frames
from compress.reparam.lowrank_errors import fitting_batch
from compress.reparam.measuring import can_time, compare
from compress.reparam.offers import Market, Offer, Profit, affine_map
from compress.reparam.reading import (
    FRAME,
    Layout,
    is_affine,
    is_join,
    operands,
)
from compress.reparam.spread import BATCH, activation_spreads, weight_spreads
from compress.reparam.terms import regroup
from compress.rewrites import (
    RELATIVE_TOLERANCE,
    STATISTICS,
    Statistics,
    listed,
    output_statistics,
    remove_unused,
)
from compress.target import Target, runtimes


@dataclass(frozen=True, kw_only=True)
class MergeBranches:
    """Merge parallel branches without an activation function, and chains, into one layer each.

    What RepVGG, MobileOne, diverse branch blocks, dilated and grouped branches are trained with,
    found by what the graph computes. Numbers are merged in float64; every merge is compared with
    what it replaces, and the whole network on calibration data. What looks alike and is left alone
    is named with the reason. The float network is timed on the target with its branches and
    without.

    Attributes:
        profit: "auto" merges branches where multiply-accumulates grow by less than the tensors
            that are saved are worth, and chains where they fall, and undoes all of it where the
            target gets slower; "all" merges what is exact.
        equalize: let channels share their scales with the next layer (the pass `equalize`) where
            those of a merged layer differ by far more than those of its branches did.
        samples: calibration samples to compare the ranges of channels on.
        seconds: to time both networks where something was merged; 0 does not.
    """

    profit: Profit = "auto"
    equalize: bool = True
    samples: int = 32
    seconds: float = 2.0

    name: ClassVar[str] = "merge_branches"
    stage: ClassVar[Literal["onnx"]] = "onnx"

    def __post_init__(self) -> None:
        if self.profit not in get_args(Profit):
            allowed = ", ".join(get_args(Profit))
            raise UsageError(f"merge_branches: profit is {self.profit!r}; choose from {allowed}.")
        if not self.seconds >= 0:
            raise UsageError(f"merge_branches: seconds is {self.seconds!r}, not 0 or above.")

    def check(self, model: Model, target: Target) -> None:
        """Applies to every model."""

    def apply(self, model: Model, context: Context) -> Model:
        """Merge what pays; outputs equal the input model's within rounding.

        Where the target cannot run either network here, `details` have no "latency".
        """
        graph = model.graph_model.graph
        order = {node: float(index) for index, node in enumerate(graph)}
        framed = any(node.op_type == "ScatterND" for node in graph)
        if not framed and not any(_looks_mergeable(node, order) for node in graph):
            return self._done(model, {"merged": {}, "left": {}})
        before = dataclasses.replace(model, program=model.graph_model.clone())
        shapes = infer_shapes(model.graph_model)
        frames = hide_frames(graph, shapes)
        moves = frozenset(node for frame in frames for node in frame.moves)
        order |= {frame.node: order[frame.producer] + 0.25 for frame in frames}
        sinks = [node for node in graph if _looks_mergeable(node, order, moves)]
        work = _Work(graph, Market(shapes, order, self.profit, moves), shapes)
        work.statistics = output_statistics(model)
        work.merge_all(sinks)
        show_frames(graph, frames)
        remove_unused(model.graph_model)
        details: dict[str, Any] = {"merged": work.merged, "left": work.reasons()}
        if not work.merged:
            return self._done(model, details)
        difference = _difference(before, model, context.calibration)
        if not difference <= RELATIVE_TOLERANCE:
            left = {"": f"together the merges change the outputs by {difference:.2g}"}
            return self._done(before, {"merged": {}, "left": left})
        details |= {"max_relative_difference": difference, STATISTICS: listed(work.statistics)}
        details |= totals(before.graph_model, model.graph_model)
        measured = self._timed(before, model, context)
        if measured is not None:
            details["latency"] = measured.to_dict()
            if self.profit == "auto" and measured.ratios["after"].verdict == "slower":
                return self._done(before, {"merged": {}, "left": _slower(details, context.target)})
        if context.calibration is not None:
            spreads = activation_spreads(before, work.watched, context.calibration, self.samples)
            for name, found in spreads.items():
                work.merged[name]["activation_spread"] = found
        suspicious = [name for name, facts in work.merged.items() if is_suspicious(facts)]
        details["suspicious"] = suspicious
        if suspicious and self.equalize:
            model = self._equalized(model, context, details)
        details["remarks"] = remarks(details, runtimes(context.target)[0].name)
        return self._done(model, details)

    def _timed(self, before: Model, after: Model, context: Context) -> Comparison | None:
        """Both networks on the target, in turns; None where it cannot run them here."""
        target = runtimes(context.target)[0]
        if not self.seconds or not can_time(target):
            return None
        try:
            with context.progress("Time merged branches", total=self.seconds) as advance:
                found = compare(target, before, after, self.seconds, context.seed)
                advance(self.seconds)
        except EngineError:  # what the target refuses is told where candidates are built
            return None
        return found

    def _equalized(self, model: Model, context: Context, details: dict[str, Any]) -> Model:
        """With the scales of channels shared between layers; the function stays as it is."""
        step = create_pass("equalize", absorb=False)
        done = step.apply(model, context)
        found = dict(done.history[-1].details)
        details[STATISTICS] = found.pop(STATISTICS)
        details["equalized"] = found
        return dataclasses.replace(model, program=done.program)

    def _done(self, model: Model, details: dict[str, Any]) -> Model:
        step = Step(self.name, dataclasses.asdict(self), details)
        return model.evolve(model.graph_model, step)


def merge(model: Any, profit: Profit = "auto", **how: Any) -> Model:
    """Merge the branches of any model that `compress.loading.load` takes; ONNX Runtime times it.

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

    loaded = model if isinstance(model, Model) else load(model, **how)
    target = create_target("cpu")
    exported = to_onnx(loaded, target.capabilities.opset)
    done = dataclasses.replace(exported, program=exported.graph_model.clone())
    context = Context(target=target, original=loaded)
    for name in ("remove_identity", "fold_pad", "fold_batchnorm"):
        done = create_pass(name).apply(done, context)
    return MergeBranches(profit=profit).apply(done, context)


def _slower(details: dict[str, Any], target: Target) -> dict[str, str]:
    """Why nothing is merged after all."""
    ratio = Ratio(**details["latency"]["ratios"]["after"])
    layers = len(details["merged"])
    return {"": f"with {layers} merged layers the network runs {ratio} on {target.name}"}


def _looks_mergeable(
    node: ir.Node, order: dict[ir.Node, float], ignored: frozenset[ir.Node] = frozenset()
) -> bool:
    """Whether branches of one tensor meet here, perhaps among others, or a chain ends here."""
    if not is_affine(node):
        return False
    parts = parts_behind(node, order, ignored)
    return any(part.joins or part.layers + part.pools > 1 for part in parts) or (
        is_join(node) and any(p is not None and is_join(p) for p in _producers(node))
    )


def _producers(node: ir.Node) -> list[ir.Node | None]:
    return [value.producer() for value in operands(node)]


@dataclass
class _Work:
    """One graph while it is merged.

    Attributes:
        merged: what the report says of every merged layer, by its name.
        left: why the others were left alone, by their last operator.
        watched: tensors of the branches and of their sum, by the merged layer.
        gone: operators that were merged.
    """

    graph: ir.Graph
    market: Market
    shapes: dict[str, tuple[int, ...]]
    statistics: Statistics = field(default_factory=dict)
    merged: dict[str, Any] = field(default_factory=dict)
    left: dict[ir.Node, str] = field(default_factory=dict)
    watched: dict[str, tuple[list[str], str, Layout]] = field(default_factory=dict)
    gone: set[ir.Node] = field(default_factory=set)

    def merge_all(self, sinks: list[ir.Node]) -> None:
        """From the outputs to the inputs: what ends last holds what ends before."""
        todo = list(sinks)
        while todo:
            sink = todo.pop()
            if sink in self.gone or self._merge_behind(sink) or not is_join(sink):
                continue
            grouped = regroup(self.graph, sink, self.market, self.shapes)
            if grouped is not None:
                self.left.pop(sink, None)
                todo.append(grouped)

    def reasons(self) -> dict[str, str]:
        """Of what was left alone, by name."""
        return {n.name or "": why for n, why in self.left.items() if n not in self.gone}

    def _merge_behind(self, sink: ir.Node) -> bool:
        offers, reasons = self.market.offers(sink)
        self.left |= reasons
        for offer in offers:
            try:
                whole = affine_map(offer, self.shapes)
                difference = prove(offer.part, whole, offer.layout, self.shapes)
            except NotMergeableError as error:
                self.left[sink] = str(error)
                continue
            self._write(offer, whole, difference)
            return True
        return False

    def _write(self, offer: Offer, whole: AffineMap, difference: float) -> None:
        part = offer.part
        name, facts = merge_facts(offer, self.shapes, difference)
        facts["weight_spread"] = weight_spreads(part, whole)
        branches = [n.outputs[0].name or "" for n in part.nodes[:-1] if n.op_type != FRAME]
        self.watched[name] = branches, part.output.name or "", offer.layout
        self.gone |= set(part.nodes)
        keep_statistics(offer, name, self.statistics)
        write(self.graph, part, whole, offer.layout, name)
        self.merged[name] = facts


def _difference(before: Model, model: Model, data: Data | None) -> float:
    """Largest difference of the outputs, relative to the largest output.

    On random inputs, and on the first samples of the data where there are some.
    """
    batches = [model.example()]
    if data is not None:
        size = BATCH if model.dynamic_batch else fitting_batch(model)
        found = next(iter(data.take(size).batches(size)))
        batches += [dict(found.inputs)] if model.dynamic_batch or len(found) == size else []
    sessions = [reference_session(one.graph_model) for one in (before, model)]
    worst = 0.0
    for inputs in batches:
        expected, got = (run(session, inputs) for session in sessions)
        far = max(largest_difference(got[name], array) for name, array in expected.items())
        worst = max(worst, far / max(1e-6, *map(largest_magnitude, expected.values())))
    return worst
