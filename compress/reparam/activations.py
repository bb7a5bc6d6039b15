"""Activation removal as a pass: layers become one where the activation between them is no loss."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

from compress.errors import ExportError
from compress.fine_tuning import teacher_of
from compress.latency import Comparison
from compress.model import Model
from compress.passes import Context
from compress.reference import reference_session, run
from compress.reparam.activations_graph import (
    as_linear,
    as_merged,
    find_segments,
    is_activation,
)
from compress.reparam.activations_search import Changes, Tried, choose, judge, time_segments
from compress.reparam.affine import NotMergeableError
from compress.reparam.measuring import TimedFineTuning, compare
from compress.rewrites import STATISTICS, check_equal, listed, output_statistics, with_constants
from compress.target import Target

Borders = Literal["move", "keep"]
CONFIRM_SHARE = 1 / 5
"""Of `search_seconds`, and beyond them: to time the whole network."""


@dataclass(frozen=True, kw_only=True)
class RemoveActivations(TimedFineTuning):
    """Merge layers in a row after fine-tuning away the activations between them.

    VanillaNet's deep training (Chen et al. 2023, arXiv 2305.12972, section 3.1) for a network that
    is trained already; whole blocks become one convolution as in DepthShrinker (Fu et al. 2022,
    arXiv 2206.00843). Every run of layers that could become one is timed on the target against
    that one. Of those that are faster, the ones with the largest gain for their sensitivity are
    taken: the squared error of the network's outputs on data, relative to their power, when these
    activations alone are linear. If the network with all of them merged is faster as a whole,
    the slopes of their activations go from the original's to one while the network is trained
    towards the original, and what is linear then is merged in float64 and compared.

    An activation behind a skip connection stays. Fold BatchNorm before this pass.

    Attributes:
        share: of the network's activations that may be removed; `count` of them takes its place.
        max_sensitivity: of one merged layer.
        borders: a padded layer behind another is not one with it where the first has a bias or a
            window. "move" pads in front of the first from the beginning of the training, which
            changes the frame around inner tensors and can be merged; "keep" leaves those layers.
        anneal: share of the training in which slopes grow.
        search_seconds: to time merged layers, those that save most first.
    """

    share: float = 0.25
    max_sensitivity: float = 1.0
    borders: Borders = "move"
    search_seconds: float = 30.0

    name: ClassVar[str] = "remove_activations"
    stage: ClassVar[Literal["onnx"]] = "onnx"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check("max_sensitivity", self.max_sensitivity > 0, "above 0")
        self._check("borders", self.borders in get_args(Borders), "one of move, keep")

    def apply(self, model: Model, context: Context) -> Model:
        """The network with fewer layers, or as it was; details tell what was tried.

        Raises:
            UsageError: there are no data, or the training diverged.
            DataError: the data do not fit.
            EngineError: the target refuses the network.
            UnsupportedError: the graph has an operator that cannot be trained here.
        """
        from compress.teaching import training_data

        self.check(model, context.target)
        data = training_data(context, self.name)
        move = self.borders == "move"
        segments, left = find_segments(model, move)
        details: dict[str, Any] = {"applied": 0, "remark": "", "left": left}
        with context.progress("Time merged layers", total=self.search_seconds) as advance:
            tried = time_segments(model, segments, context, self.search_seconds, advance)
        if any(one.faster for one in tried):
            seen = context.calibration if context.calibration is not None else data
            judge(model, tried, Changes(model, seen), move)
        activations = sum(map(is_activation, model.graph_model.graph))
        chosen = choose(tried, self.most(activations), self.max_sensitivity)
        details["tried"] = [one.row() for one in tried]
        details["not_timed"] = len(segments) - len(tried)
        if not chosen:
            details["remark"] = self._nothing(tried, context.target)
            return self._done(model, details)
        picked = [one.segment for one in chosen]
        merged, _ = as_merged(as_linear(model, picked, move), picked)
        seconds = CONFIRM_SHARE * self.search_seconds
        measured = compare(context.target, model, merged, seconds, context.seed)
        details["speedup"] = dataclasses.asdict(measured.ratios["after"])
        if measured.ratios["after"].verdict != "faster":
            details["remark"] = (
                f"{self._where(context.target)}: nothing is applied. {len(chosen)} merged layers "
                f"are faster alone, and the network with them is not ({measured.ratios['after']})."
            )
            return self._done(model, details)
        return self._trained(model, context, chosen, measured, details)

    def _trained(
        self,
        model: Model,
        context: Context,
        chosen: Sequence[Tried],
        measured: Comparison,
        details: dict[str, Any],
    ) -> Model:
        from compress.reparam.activations_training import Annealed, Annealing, student_of
        from compress.teaching import training_data

        move, picked = self.borders == "move", [one.segment for one in chosen]
        annealed = Annealed()
        arrays, facts = self.taught(
            model,
            student_of(model, picked, annealed, move),
            teacher_of(context),
            training_data(context, self.name),
            functools.partial(Annealing, annealed=annealed, until=self.anneal),
            seed=context.seed,
            progress=context.progress,
        )
        linear = as_linear(model, picked, move)
        linear = dataclasses.replace(linear, program=with_constants(linear.graph_model, arrays))
        try:
            merged, worst = as_merged(linear, picked)
            expected = run(reference_session(linear.graph_model), linear.example())
            equal = check_equal(merged, expected)
        except (NotMergeableError, ExportError) as error:
            details["remark"] = f"{self._where(context.target)}: nothing is applied. {error}"
            return self._done(model, details)
        removed = [name for segment in picked for name in segment.activations]
        gone = {name for segment in picked for name in segment.layers}
        kept = {n: found for n, found in output_statistics(model).items() if n not in gone}
        held = facts["held_out"]
        details |= {
            "applied": len(removed),
            "removed": removed,
            "merged": {str(one.segment): one.row() for one in chosen},
            **facts,
            **equal,
            "largest_relative_difference_of_a_layer": worst,
            STATISTICS: listed(kept),
        }
        details["remark"] = (
            f"{self._where(context.target)}: {len(removed)} activations are removed and "
            f"{len(gone)} layers are {len(picked)}; the network is {measured.ratios['after']} "
            f"before quantization. {held['measure'].capitalize()} on {held['samples']} samples "
            f"held out: {held['before']:.4g} without training, {held['after']:.4g} after "
            f"{facts['steps']} steps."
        )
        return self._done(merged, details)

    def _nothing(self, tried: Sequence[Tried], target: Target) -> str:
        start = f"{self._where(target)}: nothing is applied."
        if not tried:
            return f"{start} No layers in a row could be timed as one; the step tells why."
        faster = [one for one in tried if one.faster]
        if faster:
            least = min(one.sensitivity or 0.0 for one in faster)
            fewest = min(len(one.segment.activations) for one in faster)
            return (
                f"{start} {len(faster)} of {len(tried)} merged layers would be faster, and none "
                f"is within the limits: they take {fewest} activations or more, and change the "
                f"outputs by {least:.3g} of their power or more."
            )
        best = min(tried, key=lambda one: one.after_us / one.before_us)
        return (
            f"{start} None of {len(tried)} merged layers is faster; the closest is "
            f"{best.segment} with {best.before_us:.1f} us before and {best.after_us:.1f} us after."
        )
