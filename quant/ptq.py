"""Post-training quantization as a pass."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

from compress.data import Data, load_data
from compress.errors import UnsupportedError, UsageError
from compress.model import Model, Step
from compress.passes import Context
from compress.target import Capabilities, Target
from quant.calibration import observe
from quant.emit import emit_qdq
from quant.observers import HistogramObserver, RangeMethod
from quant.placement import Placement, place
from quant.plan import QuantPlan, dynamic_plan, static_plan


@dataclass(frozen=True, kw_only=True)
class Quantize:
    """Quantize weights and activations to int8 where the target has int8 kernels.

    Weights are symmetric, one scale per output channel; activations asymmetric, one scale per
    tensor (Krishnamoorthi 2018, arXiv 1806.08342, section 3). Ranges come from calibration
    data; without them from synthetic data that match the model's BatchNorm statistics (ZeroQ,
    arXiv 2001.00281); a model without BatchNorm gets dynamic and weight-only quantization.

    Attributes:
        bits: of weights and activations; 8.
        method: how a range is chosen: minmax, percentile (99.99), mse or entropy.
        samples: calibration samples to use.
        per_channel: one weight scale per output channel instead of one per tensor.
        keep_float: names of operators to leave in float (see `compress inspect`).
    """

    bits: int = 8
    method: RangeMethod = "mse"
    samples: int = 128
    per_channel: bool = True
    keep_float: tuple[str, ...] = ()

    name: ClassVar[str] = "quantize"
    stage: ClassVar[Literal["onnx"]] = "onnx"

    def __post_init__(self) -> None:
        object.__setattr__(self, "keep_float", tuple(self.keep_float))
        if self.bits != 8:
            raise UsageError(f"--bits {self.bits} is not supported yet; this version has 8.")
        if self.method not in get_args(RangeMethod):
            allowed = ", ".join(get_args(RangeMethod))
            raise UsageError(f"There is no range method {self.method!r}; choose from {allowed}.")
        if self.samples < 1:
            raise UsageError(f"--calibration-samples {self.samples} must be at least 1.")

    def check(self, model: Model, target: Target) -> None:
        """Refuse a target without int8.

        Raises:
            UnsupportedError: it cannot run int8.
        """
        precisions = target.capabilities.precisions
        if "int8" not in precisions:
            raise UnsupportedError(
                f"Target {target.name} cannot run int8; it runs {', '.join(precisions)}."
            )

    def apply(self, model: Model, context: Context) -> Model:
        """The QDQ model; the step's details say what was quantized, from which data, what not."""
        capabilities = context.target.capabilities
        graph = model.graph_model.graph
        self._check_names({node.name or "" for node in graph})
        placement = place(graph, capabilities, frozenset(self.keep_float))
        data, source = self._calibration(context, model)
        if data is None:
            plan = dynamic_plan(graph, placement, capabilities)
        else:
            plan = self._static(model, placement, data, capabilities, context)
        details: Mapping[str, Any] = {
            "ranges_from": source,
            "samples": min(self.samples, len(data)) if data is not None else 0,
            "reasons": dict(plan.reasons),
            "plan": plan.to_dict(),
        }
        options = {
            "bits": self.bits,
            "method": self.method,
            "samples": self.samples,
            "per_channel": self.per_channel,
            "keep_float": list(self.keep_float),
        }
        emitted = emit_qdq(model.graph_model, plan)
        return model.evolve(emitted, Step(self.name, options, details))

    def _static(
        self,
        model: Model,
        placement: Placement,
        data: Data,
        capabilities: Capabilities,
        context: Context,
    ) -> QuantPlan:
        observers: dict[str, HistogramObserver] = observe(
            model,
            [name for group in placement.groups for name in group],
            data,
            samples=self.samples,
            bins=0 if self.method == "minmax" else 2048,
            cache=context.cache,
            memo=context.memo.setdefault("quantize.observers", {}),
            progress=context.progress,
        )
        graph = model.graph_model.graph
        return static_plan(graph, placement, observers, capabilities, self.method, self.per_channel)

    def _calibration(self, context: Context, model: Model) -> tuple[Data | None, str]:
        if context.calibration is not None:
            key = f"quantize.samples {self.samples}"
            if key not in context.memo:
                # Samples from all of it: data sorted by class would give one class's ranges.
                context.memo[key] = context.calibration.take(self.samples)
            chosen: Data = context.memo[key]
            return chosen, "calibration data"
        original = context.original
        if original.stage == "torch":
            from quant.synthetic import synthesize

            if "quantize.synthetic" not in context.memo:
                made = synthesize(
                    original.torch_module,
                    original.inputs,
                    seed=context.seed,
                    progress=context.progress,
                )
                data = load_data(made.arrays, model.inputs) if made is not None else None
                context.memo["quantize.synthetic"] = data
            if context.memo["quantize.synthetic"] is not None:
                found: Data = context.memo["quantize.synthetic"]
                return found, "synthetic data from BatchNorm statistics"
        return None, "none: dynamic and weight-only"

    def _check_names(self, known: set[str]) -> None:
        unknown = [name for name in self.keep_float if name not in known]
        if unknown:
            raise UsageError(
                f"keep_float names {', '.join(unknown)}, which the graph does not have; "
                f"`compress inspect MODEL` lists the names."
            )
