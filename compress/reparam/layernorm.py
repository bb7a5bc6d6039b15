"""LayerNorm to BatchNorm as a pass: a normalisation that costs nothing once it is folded."""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np

from compress.data import Data
from compress.fine_tuning import teacher_of
from compress.latency import Comparison
from compress.model import Model
from compress.passes import Context
from compress.reference import largest_difference, largest_magnitude, reference_session, run
from compress.reparam.activations_search import BATCH, SAMPLES, Changes
from compress.reparam.layernorm_graph import Norm, find_norms, without_norms
from compress.reparam.lowrank_errors import fitting_batch
from compress.reparam.measuring import TimedFineTuning, compare
from compress.rewrites import RELATIVE_TOLERANCE, with_constants


@dataclass(frozen=True, kw_only=True)
class LayerNormToBatchNorm(TimedFineTuning):
    """Replace LayerNorm by BatchNorm in a fine-tuning, and fold it into the layers around it.

    PRepBN of SLAB (Guo et al. 2024, arXiv 2405.11582, section 3.1): the share of LayerNorm falls
    linearly from one to zero while the network is trained towards the original. The BatchNorm
    starts as the factor and shift of each channel that are nearest to the LayerNorm on data, in
    place of ones and zeros. At the end it is a factor and a shift: inside the linear layers that
    read it, or the one before it, or on its own where neither can take it. SLAB trains for
    hundreds of epochs; expect a loss after a short training.

    The network without its LayerNorms is timed first; where it is not faster on the target,
    nothing is trained.

    Options are those of `TimedFineTuning`: its parts are the LayerNorms.
    """

    name: ClassVar[str] = "layernorm_to_batchnorm"
    stage: ClassVar[Literal["onnx"]] = "onnx"

    def apply(self, model: Model, context: Context) -> Model:
        """The network without these LayerNorms, or as it was; details tell why.

        Raises:
            UsageError: there are no data, or the training diverged.
            DataError: the data do not fit.
            EngineError: the target refuses the network.
            UnsupportedError: the graph has an operator that cannot be trained here.
        """
        from compress.reparam.layernorm_training import fit_norms
        from compress.teaching import training_data

        self.check(model, context.target)
        data = training_data(context, self.name)
        norms, left = find_norms(model.graph_model.graph)
        details: dict[str, Any] = {"applied": 0, "remark": "", "left": left}
        if not norms:
            others = f" {len(left)} LayerNorms stay; the step tells why." if left else ""
            details["remark"] = (
                f"{self._nothing(context)} There is no LayerNorm to replace.{others}"
            )
            return self._done(model, details)
        seen = context.calibration if context.calibration is not None else data
        fits = fit_norms(model, norms, _batches(model, seen))
        maps = {name: fit.map for name, fit in fits.items()}
        changes = Changes(model, seen)
        loss = {n.name: changes(without_norms(model, {n.name: maps[n.name]})[0]) for n in norms}
        chosen = sorted(norms, key=lambda norm: loss[norm.name])[: self.most(len(norms))]
        made, places = without_norms(model, {norm.name: maps[norm.name] for norm in chosen})
        measured = compare(context.target, model, made, self.search_seconds, context.seed)
        details["speedup"] = dataclasses.asdict(measured.ratios["after"])
        details["norms"] = {
            n.name: {
                "sensitivity": loss[n.name],
                "error": fits[n.name].error,
                "place": places.get(n.name, ""),
            }
            for n in norms
        }
        if measured.ratios["after"].verdict != "faster":
            details["remark"] = (
                f"{self._nothing(context)} The network with {len(chosen)} of {len(norms)} "
                f"LayerNorms replaced is not faster ({measured.ratios['after']})."
            )
            return self._done(model, details)
        return self._trained(model, context, chosen, fits, measured, details)

    def _trained(
        self,
        model: Model,
        context: Context,
        chosen: list[Norm],
        fits: Mapping[str, Any],
        measured: Comparison,
        details: dict[str, Any],
    ) -> Model:
        from compress.reparam.layernorm_training import Replacing, folded_map, student_of
        from compress.teaching import training_data

        student = student_of(model, chosen, fits)
        arrays, facts = self.taught(
            model,
            student,
            teacher_of(context),
            training_data(context, self.name),
            functools.partial(Replacing, until=self.anneal),
            seed=context.seed,
            progress=context.progress,
        )
        own = {
            name: a for name, a in arrays.items() if name in model.graph_model.graph.initializers
        }
        trained = dataclasses.replace(model, program=with_constants(model.graph_model, own))
        maps = {norm.name: folded_map(norm.name, arrays) for norm in chosen}
        made, places = without_norms(trained, maps)
        difference = _difference(student, arrays, made)
        if not difference <= RELATIVE_TOLERANCE:
            details["remark"] = (
                f"{self._nothing(context)} Folded, the trained network differs by "
                f"{difference:.2g} of its largest output from what was trained."
            )
            return self._done(model, details)
        counts = Counter(places.values())
        held = facts["held_out"]
        details |= {
            "applied": len(chosen),
            **facts,
            "folded": dict(counts),
            "max_relative_difference": difference,
        }
        details["remark"] = (
            f"{self.name} on {context.target.name}: {len(chosen)} of {len(details['norms'])} "
            f"LayerNorms are replaced ({counts['next']} inside the next layers, "
            f"{counts['previous']} inside the previous, {counts['kept']} on their own); the "
            f"network is {measured.ratios['after']} before quantization. "
            f"{held['measure'].capitalize()} on {held['samples']} samples held out: "
            f"{held['before']:.4g} without training, {held['after']:.4g} after {facts['steps']} "
            f"steps."
        )
        return self._done(made, details)

    def _nothing(self, context: Context) -> str:
        return f"{self._where(context.target)}: nothing is applied."


def _batches(model: Model, data: Data) -> list[dict[str, np.ndarray]]:
    size = BATCH if model.dynamic_batch else fitting_batch(model)
    return [dict(batch.inputs) for batch in data.take(max(SAMPLES, size)).batches(size)]


def _difference(student: Any, arrays: dict[str, np.ndarray], made: Model) -> float:
    """Largest difference between what was trained and what was folded, relative."""
    import torch

    from compress.reparam.layernorm_training import set_state
    from compress.torch_graph.network import to_torch

    set_state(student, arrays)
    inputs = made.example()
    with torch.no_grad():
        found = student.run(to_torch(inputs))
    got = run(reference_session(made.graph_model), inputs)
    expected = {name: found[name].numpy() for name in got}
    worst = max(largest_difference(got[name], array) for name, array in expected.items())
    return worst / max(1e-6, *(largest_magnitude(array) for array in expected.values()))
