"""Post-training quantization as a pass."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

from compress.data import Data
from compress.errors import UnsupportedError, UsageError
from compress.graph import weight_input
from compress.model import Arrays, Model, Step
from compress.passes import Context
from compress.target import Capabilities, Target
from quant.calibration import calibration_data, observe
from quant.observers import HistogramObserver, RangeMethod
from quant.placement import Placement, place
from quant.plan import QuantPlan, dynamic_plan, joined, static_plan, weight_only_plan
from quant.refine import STATE, Quantized, emit
from quant.spec import QuantSpec
from quant.weight_only import has_groups, stored_format, untransposed
from quant.widths import (
    AUTO,
    AUTO_WIDTHS,
    FLOATS,
    SiteFormat,
    Width,
    bits_of,
    dtype_of,
    parse_bits,
    spread,
)

NATIVE: Width = 8
"""What targets have kernels for; other widths are weights only, or simulated."""
FLOAT8 = "float8_e4m3fn"
"""Some have kernels for it, too: for multiply-accumulates alone."""


@dataclass(frozen=True, kw_only=True)
class Quantize:
    """Quantize weights and activations to int8 where the target has int8 kernels.

    Weights are symmetric, one scale per output channel; activations asymmetric unless the target
    takes signed ones only, one scale per
    tensor (Krishnamoorthi 2018, arXiv 1806.08342, section 3). Ranges come from calibration
    data; without them from synthetic data that match the model's BatchNorm statistics (ZeroQ,
    arXiv 2001.00281); a model without BatchNorm gets dynamic and weight-only quantization.

    Attributes:
        bits: of weights and activations: 8; 4 where the target stores weights in int4 (they are
            computed with in float); "fp8" where it multiplies 8-bit floats; with `simulate` any
            format of `quant.spec`, such as 6 or "fp8". Several, such as (4, 8), are spread over
            the operators: the least measured loss at `average_bits`. "auto" is 8, and with
            `simulate` a choice from 4, 6 and 8.
        activation_bits: of activations, where they differ from those of weights.
        edge_bits: of the first and the last operator with weights, if `bits` is less; they have
            few weights and lose most (Esser et al. 2020, arXiv 1902.08153, section 3).
        average_bits: of all weights together where there are several widths; the mean of them.
        group: weights of a linear layer that share a scale when they are stored in 4 bits.
        simulate: emulate the formats in float32. The model gets no smaller or faster.
        method: how a range is chosen: minmax, percentile (99.99), mse, entropy, moving_average.
        samples: calibration samples to use.
        per_channel: one weight scale per output channel instead of one per tensor.
        keep_float: names of operators to leave in float (see `compress inspect`).
    """

    bits: int | str | Sequence[int | str] = 8
    activation_bits: int | str | None = None
    edge_bits: int = 8
    average_bits: float | None = None
    group: int = 32
    simulate: bool = False
    method: RangeMethod = "mse"
    samples: int = 128
    per_channel: bool = True
    keep_float: tuple[str, ...] = ()

    name: ClassVar[str] = "quantize"
    stage: ClassVar[Literal["onnx"]] = "onnx"

    def __post_init__(self) -> None:
        object.__setattr__(self, "keep_float", tuple(self.keep_float))
        if isinstance(self.bits, list):
            object.__setattr__(self, "bits", tuple(self.bits))
        widths = parse_bits(self.bits)
        if self.activation_bits is not None:
            parse_bits(self.activation_bits)
        if self.average_bits is not None and AUTO not in widths:
            least = min(bits_of(w) for w in widths)
            if self.average_bits < least:
                raise UsageError(
                    f"average_bits {self.average_bits:g} is below the smallest width, {least}."
                )
        if self.method not in get_args(RangeMethod):
            allowed = ", ".join(get_args(RangeMethod))
            raise UsageError(f"There is no range method {self.method!r}; choose from {allowed}.")
        if self.samples < 1:
            raise UsageError(f"--calibration-samples {self.samples} must be at least 1.")
        if self.group < 16 or self.group & (self.group - 1):
            raise UsageError(f"group {self.group} must be a power of two, 16 or more.")

    @property
    def widths(self) -> tuple[Width, ...]:
        """What there is to choose from."""
        widths = parse_bits(self.bits)
        if widths != (AUTO,):
            return widths
        return AUTO_WIDTHS if self.simulate else (NATIVE,)

    @property
    def makes(self) -> str:
        """The precision of the result, for reports."""
        if self._float8 and not self.simulate:
            return "fp8"
        formats = [f"int{w}" if isinstance(w, int) else w for w in self.widths]
        if self.simulate:
            return f"simulated {' and '.join(formats)}"
        stored = [form for form, w in zip(formats, self.widths, strict=True) if w != NATIVE]
        native = ["int8"] if NATIVE in self.widths else []
        return " and ".join([*native, *(f"{form} weights" for form in stored)])

    @property
    def buys(self) -> Literal["speed", "size", "numbers"]:
        """What the result is for; weights in fewer bits than are computed with are only smaller."""
        if self.simulate:
            return "numbers"
        return "speed" if self.widths == (NATIVE,) or self._float8 else "size"

    @property
    def _float8(self) -> bool:
        """Whether 8-bit floats alone are asked for, which some targets multiply."""
        return len(self.widths) == 1 and FLOATS.get(str(self.widths[0])) == FLOAT8

    def _facts(self, target: Target) -> Capabilities:
        """What the target does in the format: in 8-bit floats it multiplies, and no more."""
        facts = target.capabilities
        if self.simulate or not self._float8:
            return facts
        products = tuple(pattern for pattern in facts.patterns if pattern.role == "matmul")
        return dataclasses.replace(facts, patterns=products)

    def check(self, model: Model, target: Target) -> None:
        """Refuse what the target cannot run.

        Raises:
            UnsupportedError: it has no int8, or not the formats that were asked for.
        """
        facts = target.capabilities
        if "int8" not in facts.precisions:
            raise UnsupportedError(
                f"Target {target.name} cannot run int8; it runs {', '.join(facts.precisions)}."
            )
        if self.simulate:
            return
        if self._float8 and FLOAT8 in facts.precisions and self.activation_bits is None:
            return
        stored = {form.removeprefix("int") for form in facts.weight_only}
        missing = [str(w) for w in self.widths if w != NATIVE and str(w) not in stored]
        if self.activation_bits not in (None, NATIVE):
            missing.append(f"activations of {self.activation_bits}")
        if missing:
            runs = ["8", *(f"{bits} (weights only, computed in float)" for bits in sorted(stored))]
            raise UnsupportedError(
                f"Target {target.name} cannot run --bits {', '.join(missing)}; it runs "
                f"{', '.join(runs)}. Use one of these, or --simulate to see what the format would "
                f"lose."
            )

    def apply(self, model: Model, context: Context) -> Model:
        """The QDQ model; the step's details say what was quantized, from which data, what not."""
        capabilities = self._facts(context.target)
        self._check_names({node.name or "" for node in model.graph_model.graph})
        placement = self._place(model, capabilities, self.keep_float)
        chosen = self._widths(model, placement, context)
        group = self._group(capabilities)
        chosen = self._storable(model, chosen, capabilities, group)
        native = self.simulate or self._float8
        narrow = {} if native else {n: w for n, w in chosen.items() if w != NATIVE}
        plan, source, samples = QuantPlan(), "none: weights only", 0
        if narrow:
            untransposed(model.graph_model.graph, narrow)
        if len(narrow) < len(chosen) or not narrow:
            kept = (*self.keep_float, *narrow)
            data, source = calibration_data(model, context, self.samples)
            plan = self._plan(model, self._place(model, capabilities, kept), chosen, data, context)
            samples = min(self.samples, len(data)) if data is not None else 0
        if narrow:
            graph = model.graph_model.graph
            formats = {
                node.name or "": stored_format(node, group) for node in graph if node.name in narrow
            }
            stored = weight_only_plan(graph, placement, capabilities, formats)
            plan = joined(plan, stored) if plan.roles else stored
        state = Quantized(model.graph_model, plan, model.graph_model, self.simulate)
        details: Mapping[str, Any] = {
            "ranges_from": source,
            "samples": samples,
            "simulated": self.simulate,
            "bits": {name: width for name, width in chosen.items() if width != NATIVE},
            **({"group": group} if group != self.group else {}),
            "reasons": dict(plan.reasons),
            "plan": plan.to_dict(),
            STATE: state,
        }
        options = {**dataclasses.asdict(self), "keep_float": list(self.keep_float)}
        return model.evolve(emit(state), Step(self.name, options, details))

    def other_ranges(self) -> tuple[Quantize, ...]:
        """The same with every other way to choose ranges from what calibration saw."""
        others: tuple[RangeMethod, ...] = ("minmax", "percentile", "mse", "entropy")
        return tuple(dataclasses.replace(self, method=m) for m in others if m != self.method)

    def sensitivity(self, model: Model, context: Context) -> Mapping[str, float]:
        """Relative squared error of the outputs when one operator alone is quantized, by operator.

        Raises:
            UnsupportedError: there are no data, or torch cannot run the graph.
        """
        from quant.choice import losses_by_width

        data, _ = calibration_data(model, context, self.samples)
        if data is None:
            raise UnsupportedError("There are no data to see what each operator loses.")
        placement = self._place(model, self._facts(context.target), self.keep_float)
        plan = self._plan(model, placement, {}, data, context)
        width = min(self.widths, key=bits_of)
        _, losses, found = losses_by_width(model, plan, data, (width,), context)
        context.memo["quantize.sensitivity"] = found.report_rows()
        return {name: by_width[width] for name, by_width in losses.items()}

    def simulate_outputs(self, model: Model, inputs: Arrays) -> Arrays | None:
        """Outputs of the plan in torch; None where the model was not made from one."""
        import torch

        from quant.network import to_torch
        from quant.simulation import Simulation

        state = next(
            (s.details[STATE] for s in reversed(model.history) if STATE in s.details), None
        )
        if not isinstance(state, Quantized) or state.plan.dynamic:
            return None
        with torch.inference_mode():
            found = Simulation.of(state).run(to_torch(inputs))
        return {name: tensor.numpy() for name, tensor in found.items()}

    def _place(
        self, model: Model, capabilities: Capabilities, keep_float: Sequence[str]
    ) -> Placement:
        return place(model.graph_model.graph, capabilities, frozenset(keep_float))

    def _plan(
        self,
        model: Model,
        placement: Placement,
        chosen: Mapping[str, Width],
        data: Data | None,
        context: Context,
    ) -> QuantPlan:
        graph, capabilities = model.graph_model.graph, self._facts(context.target)
        if data is None and not capabilities.dynamic:
            raise UnsupportedError(
                f"There are no data for activation ranges, and without BatchNorm none can be made; "
                f"target {context.target.name} cannot find ranges at run time. Give --calibration."
            )
        if data is None:
            return dynamic_plan(graph, placement, capabilities)
        observers: dict[str, HistogramObserver] = observe(
            model,
            [name for group in placement.groups for name in group],
            data,
            samples=self.samples,
            bins=0 if self.method in ("minmax", "moving_average") else 2048,
            cache=context.cache,
            memo=context.memo.setdefault("quantize.observers", {}),
            progress=context.progress,
        )
        formats = {}
        if self.simulate:
            formats = {n: self._simulated(w, capabilities) for n, w in chosen.items()}
        elif self._float8:
            form = self._simulated(self.widths[0], capabilities)
            formats = {name: form for name, role in placement.roles.items() if role == "matmul"}
        return static_plan(
            graph, placement, observers, capabilities, self.method, self.per_channel, formats
        )

    def _simulated(self, width: Width, capabilities: Capabilities) -> SiteFormat:
        asked = width if self.activation_bits is None else self.activation_bits
        activation: Width = parse_bits(asked)[0]
        if isinstance(activation, int) and isinstance(width, int):
            activation = max(activation, width) if width == self.edge_bits else activation
        signed = capabilities.activation == "int8"
        dtype = dtype_of(activation, signed)
        symmetric = signed or isinstance(activation, str)
        return SiteFormat(
            QuantSpec(dtype_of(width, signed=True)),  # type: ignore[arg-type]
            QuantSpec(dtype, symmetric=symmetric),  # type: ignore[arg-type]
        )

    def _widths(self, model: Model, placement: Placement, context: Context) -> dict[str, Width]:
        """The width of each operator with a weight that is quantized."""
        graph = model.graph_model.graph
        sites = [
            node.name or ""
            for node in graph
            if placement.roles.get(node.name or "") == "matmul" and weight_input(node) is not None
        ]
        widths = self.widths
        chosen = dict.fromkeys(sites, widths[0])
        edges = dict.fromkeys((*sites[:1], *sites[-1:]), self.edge_bits)
        edges = {n: w for n, w in edges.items() if self.simulate and w > max(map(bits_of, widths))}
        if len(widths) > 1:
            chosen = self._spread(model, placement, context, sites)
        return chosen | edges

    def _group(self, capabilities: Capabilities) -> int:
        """The smallest group that the target takes and that is not below the one asked for."""
        allowed = sorted(capabilities.weight_groups)
        return next((g for g in allowed if g >= self.group), max(allowed, default=self.group))

    def _storable(
        self, model: Model, chosen: dict[str, Width], capabilities: Capabilities, group: int
    ) -> dict[str, Width]:
        """Without the narrow widths of weights that cannot be stored in the target's groups."""
        if self.simulate or self._float8 or not capabilities.weight_groups:
            return chosen
        nodes = {node.name or "": node for node in model.graph_model.graph}
        narrow = [name for name, width in chosen.items() if width != NATIVE]
        fits = {name for name in narrow if has_groups(nodes[name], group)}
        if NATIVE in self.widths:
            return chosen | dict.fromkeys((n for n in narrow if n not in fits), NATIVE)
        if narrow and not fits:
            raise UnsupportedError(
                f"No weight can be stored in 4 bits: this target takes them for linear layers "
                f"only, with input features in groups of {group}. Use --bits 8."
            )
        return {name: width for name, width in chosen.items() if name in fits}

    def _spread(
        self, model: Model, placement: Placement, context: Context, sites: Sequence[str]
    ) -> dict[str, Width]:
        from quant.choice import losses_by_width

        average = self.average_bits
        if average is None:
            average = sum(map(bits_of, self.widths)) / len(self.widths)
        data, _ = calibration_data(model, context, self.samples)
        if data is None:
            raise UnsupportedError(
                f"--bits {self.bits} chooses a width for each operator by what it loses, and there "
                f"are no data to see that with. Give --calibration, or one width."
            )
        plan = self._plan(model, placement, {}, data, context)
        parameters, losses, _ = losses_by_width(
            model, plan, data, self.widths, context, activations=self.simulate
        )
        known = [name for name in sites if name in losses]
        chosen = spread(
            {n: parameters[n] for n in known}, {n: losses[n] for n in known}, self.widths, average
        )
        widest = max(self.widths, key=bits_of)
        return {name: chosen.get(name, widest) for name in sites}

    def _check_names(self, known: set[str]) -> None:
        unknown = [name for name in self.keep_float if name not in known]
        if unknown:
            raise UsageError(
                f"keep_float names {', '.join(unknown)}, which the graph does not have; "
                f"`compress inspect MODEL` lists the names."
            )
