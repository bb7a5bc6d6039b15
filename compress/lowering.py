"""From the model that came in to a graph for one runtime, with any placement of int8."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from compress.errors import EngineError
from compress.export import to_onnx
from compress.fine_tuning import TEACHER
from compress.loading import to_torch
from compress.model import Model
from compress.passes import Compressing, Context, Pass, Placing, Refining, is_left_out


@dataclass(frozen=True)
class Lowered:
    """A model on its way to one runtime, before the first pass that lowers precisions.

    Attributes:
        float_model: every pass before that one has been applied.
        rest: that pass and what follows it; empty where nothing lowers precisions.
        context: of this runtime.
        alternatives: each makes a further model, in place of `rest`.
        own_precisions: what the runtime is to quantize the float model to by itself.
    """

    float_model: Model
    rest: tuple[Pass, ...]
    context: Context
    alternatives: tuple[Pass, ...] = ()
    own_precisions: tuple[str, ...] = ()

    @property
    def places(self) -> bool:
        """Whether operators can be kept in float one by one."""
        return self.placing is not None

    @property
    def placing(self) -> Pass | None:
        """The pass that places precisions."""
        return next((step for step in self.rest if isinstance(step, Placing)), None)

    @property
    def refines(self) -> bool:
        """Whether passes are left for the candidates that stay."""
        return any(isinstance(step, Refining) for step in self.rest)

    def apply(self, keep_float: Sequence[str] = (), refine: bool = True) -> Model:
        """The compressed model, with these operators (by name) in float as well.

        Without `refine` the passes that change numbers only are left out.
        """
        names = {node.name for node in self.float_model.graph_model.graph}
        model = _copy(self.float_model)
        for step in self.rest:
            if isinstance(step, Refining) and not refine:
                continue
            if isinstance(step, Placing) and keep_float:
                kept = (*step.keep_float, *(n for n in keep_float if n in names))
                step = dataclasses.replace(step, keep_float=tuple(dict.fromkeys(kept)))  # type: ignore[type-var]
            model = _step(step, model, self.context)
        return model

    def before(self, step: Pass) -> Lowered:
        """With one more pass before those that lower precisions."""
        model = _step(step, _copy(self.float_model), self.context)
        return dataclasses.replace(self, float_model=model)

    def apply_alternative(self, step: Pass) -> Model:
        """The model that one of the alternatives compresses.

        What follows the pass in whose place it stands improves what that one made, and is left out.
        """
        return _step(step, _copy(self.float_model), self.context)


def export(original: Model, passes: Sequence[Pass], context: Context) -> tuple[Model, Model]:
    """The exported original, and the model after every torch pass, exported too."""
    opset = context.target.capabilities.opset
    exported = to_onnx(original, opset, context.progress, context.calibration)
    context.memo[TEACHER] = exported
    model = original
    for step in passes:
        if step.stage == "torch":
            model = step.apply(_torch_copy(model) if model is original else model, context)
    return exported, exported if model is original else to_onnx(model, opset, context.progress)


def lower(
    start: Model, passes: Sequence[Pass], context: Context, alternatives: Sequence[Pass] = ()
) -> Lowered:
    """Apply the ONNX passes up to the first that lowers precisions.

    Where the runtime quantizes by itself, it is to do so where a pass would have.
    """
    steps = [s for s in passes if s.stage == "onnx" and not is_left_out(s, context.target)]
    asked = any(isinstance(s, Placing) and is_left_out(s, context.target) for s in passes)
    own = context.target.capabilities.own_precisions or ()
    lowering = (i for i, step in enumerate(steps) if isinstance(step, (Placing, Compressing)))
    first = next(lowering, len(steps))
    model = _copy(start)
    for step in steps[:first]:
        model = _step(step, model, context)
    rest = tuple(steps[first:])
    return Lowered(model, rest, context, tuple(alternatives), own if asked else ())


def _torch_copy(original: Model) -> Model:
    """A pass may change its model in place, and the original is still the baseline."""
    model = to_torch(original)
    if model is not original:
        return model
    return dataclasses.replace(model, program=copy.deepcopy(model.torch_module))


def _copy(model: Model) -> Model:
    return dataclasses.replace(model, program=model.graph_model.clone())


def _step(step: Pass, model: Model, context: Context) -> Model:
    before = [value.name for value in model.graph_model.graph.outputs]
    model = step.apply(model, context)
    after = [value.name for value in model.graph_model.graph.outputs]
    if before != after:
        raise EngineError(
            f"Pass {step.name} changed the outputs from {before} to {after}; a pass must keep "
            f"them. Please report it to its author."
        )
    return model
