"""The facts of a run as plain values for its report."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from compress.candidates import HERE, Built, Measured, reasons, site_rows
from compress.data import Data
from compress.device_sheet import DeviceSheet
from compress.errors import EngineError
from compress.graph import Site, macs_in_subgraphs
from compress.kernel_rows import kernel_rows
from compress.model import Arrays, Model, Step
from compress.rewrites import STATISTICS
from compress.roofline import predict
from compress.search import Searched
from compress.target import Kernel, ManyRuntimes, Shipped, Target
from compress.variants import settings as settings_of

_RUNS = 20
"""Of each kernel under the profiler."""
LISTED = 8
"""Operators that a sentence names; `compress profile` and `Engine.kernels` know all."""


def shown_model(measured: Measured, chosen: str) -> Model:
    """The model whose steps and sites the report shows: the best other where it is the original."""
    first, *others = measured.all
    built = next((one for one in others if one.candidate.name == chosen), None)
    return (built or next(iter(others), first)).variant.model


def site_rows_of(
    sites: Sequence[Site], measured: Measured, chosen: str
) -> tuple[Mapping[str, Any], ...]:
    """What became of every operator in the model that the report shows."""
    model = shown_model(measured, chosen)
    built = next(one for one in measured.all if one.variant.model is model)
    return site_rows(sites, built.engine.kernels(), reasons(model))


def explained(measured: Measured, chosen: Built) -> tuple[Built, Built] | tuple[Built]:
    """Whose kernels the report keeps: the original's and the artifact's.

    Where the original is kept, the fastest other one shows why.
    """
    first, *others = measured.all
    if chosen is not first:
        return first, chosen
    speed = {one.candidate.name: (one.candidate.speedup or {}).get("value", 0.0) for one in others}
    best = max(others, key=lambda one: speed[one.candidate.name], default=None)
    return (first, best) if best is not None else (first,)


def region_rows(searched: Searched, chosen: Built) -> tuple[Mapping[str, Any], ...]:
    """The placement table of the runtime that was chosen; empty where none was searched."""
    placement = searched.placements.get(chosen.candidate.runtime)
    if placement is None or chosen.variant.made_by:
        return ()
    precision = chosen.candidate.precision
    return tuple(placement.rows("" if precision == "mixed" else precision))


def remarks(searched: Searched, exported: Model, target: Target) -> list[str]:
    """What a reader must know about ranges, runtimes and machine."""
    remarks = data_remarks(calibration_facts(searched), exported)
    remarks += searched.notes
    histories = [variant.model.history for variant in searched.screening.variants.values()]
    steps = (step.details for history in histories for step in history)
    remarks += dict.fromkeys(str(facts["remark"]) for facts in steps if "remark" in facts)
    if isinstance(target, ManyRuntimes):
        remarks += [
            f"{name} was not tried: {check.reason} Install it with: {check.install}."
            for name, check in target.missing().items()
        ]
    return [*remarks, *target.capabilities.notes]


def step_remarks(model: Model) -> list[str]:
    """What the passes that a model went through want a reader to know."""
    return [text for step in model.history for text in step.details.get("remarks", ())]


def data_remarks(calibration: Mapping[str, Any], exported: Model) -> list[str]:
    """What a reader must know about ranges and about operators that nobody counts."""
    remarks = [
        f"The shape of an input was assumed: {spec}; "
        f"neither the file nor --input says it. Give --input where the network was trained with "
        f"another."
        for spec in exported.inputs
        if spec.assumed
    ]
    source = calibration["ranges_from"]
    if source and source != "calibration data":
        remarks.append(f"No calibration data were given; ranges come from {source}.")
    if hidden := macs_in_subgraphs(exported.graph_model):
        remarks.append(
            f"{hidden} operators with multiply-accumulates are inside If, Loop or Scan: they stay "
            f"in float, and the shares of MACs do not count them."
        )
    return remarks


def delegation(kernels: Sequence[Kernel], sites: Sequence[Site]) -> list[str]:
    """What a backend executes of the artifact, and what is left to the runtime's own operators.

    Empty where the runtime hands nothing to a backend.
    """
    backends = sorted({kernel.backend for kernel in kernels} - {""})
    if not backends:
        return []
    own = [kernel for kernel in kernels if not kernel.backend]
    macs = {site.name: site.macs for site in sites}
    left = sum(macs.get(name, 0) for name in {kernel.site for kernel in own})
    share = 1 - left / sum(macs.values()) if any(macs.values()) else 1.0
    names = sorted({f"{one.op_type} ({one.site})" if one.site else one.op_type for one in own})
    shown = ", ".join(names[:LISTED]) + (f" and {len(names) - LISTED} more" * (len(names) > LISTED))
    return [
        f"{' and '.join(backends)} executes {100 * share:.4g} % of the multiply-accumulates and "
        f"{len(kernels) - len(own)} of {len(kernels)} operators; "
        + (f"the runtime's own kernels execute {shown}." if names else "nothing is left to others.")
    ]


def shipping_remarks(chosen: Built) -> tuple[str, ...]:
    """What an artifact for another device was checked for, and how it is run there."""
    return chosen.engine.remarks() if isinstance(chosen.engine, Shipped) else ()


def predicted_facts(
    device: DeviceSheet, sites: Sequence[Site], rows: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """The device sheet, and what the model takes at least on it, in float32 and in int8.

    int8 are the operators that run so by `rows`, or all of them where none does.
    """
    placed = any(row["precision"] == "int8" for row in rows)
    narrow = {row["name"] for row in rows if row["precision"] != "float32"} if placed else None
    first = device.clusters[0].count
    cores = sorted({1, first})
    return {
        "device": device.to_dict(),
        "operators": "as placed" if placed else "all",
        "rows": [
            *(predict(sites, device, "float32", cores=n).to_dict() for n in cores),
            *(predict(sites, device, "int8", cores=n, narrow=narrow).to_dict() for n in cores),
        ],
    }


STRANGE_DB = 20.0
"""Outputs of one model on two processors are much closer than this; rounding alone costs less."""


def device_remarks(measured: Measured) -> list[str]:
    """What a reader must know first where candidates were measured on other machines."""
    if not measured.devices:
        return []
    device = measured.latency["device"]
    remarks = [
        f"Latencies are those of {device}, and so is the choice; int8 was placed by this machine's."
        if device != HERE
        else "No device could measure the candidates: latencies and choice are this machine's."
    ]
    for one in measured.devices[1:]:
        remarks += [f"Dropped out: {one.error}"] if one.error else []
        remarks += [
            f"On {one.device} the outputs of {name} are not those of this machine (SQNR "
            f"{close.sqnr_db:.1f} dB): accuracy was measured here and may not hold there."
            for name, close in one.closeness.items()
            if close.sqnr_db < STRANGE_DB
        ]
    return remarks


def calibration_facts(searched: Searched) -> dict[str, Any]:
    """Where ranges come from, and how many samples were used."""
    return range_facts([variant.model for variant in searched.screening.variants.values()])


def range_facts(models: Iterable[Model]) -> dict[str, Any]:
    """The same of these models."""
    steps = (step for model in models for step in model.history)
    found = next((step.details for step in steps if "ranges_from" in step.details), {})
    return {
        "ranges_from": found.get("ranges_from", ""),
        "samples": found.get("samples", 0),
    }


def data_facts(data: Data | None) -> dict[str, Any]:
    """Name and hash of the data; empty without any."""
    return {"data": data.name, "sha256": data.sha256} if data is not None else {}


def plan_of(model: Model) -> Mapping[str, Any]:
    """The quantization plan that a model was made with; empty where there is none."""
    found = (step.details["plan"] for step in model.history if "plan" in step.details)
    return next(found, {})


def step_facts(step: Step) -> dict[str, Any]:
    """A step without the plan, which is written to a file of its own, and what only passes read."""
    hidden = ("plan", "quantized", "reasons", "remarks", STATISTICS)
    details = {k: v for k, v in step.details.items() if k not in hidden}
    return {"name": step.name, "options": dict(step.options), "details": details}


def model_facts(original: Model, exported: Model) -> dict[str, Any]:
    """What was loaded."""
    return {
        "name": original.name,
        "source": original.source,
        "sha256": original.sha256,
        "inputs": [str(spec) for spec in exported.inputs],
    }


def target_facts(asked: Target, target: Target) -> dict[str, Any]:
    """The runtime and the settings of the artifact, and the target that was asked for."""
    facts = target.capabilities
    return {
        "asked": asked.name,
        "name": target.name,
        "options": settings_of(target),
        "source": facts.source,
        "opset": facts.opset,
        "activation": facts.activation,
        "reduced_weights": facts.reduced_weights,
        "int8_dot_product": facts.int8_dot_product,
    }


def command_line() -> str:
    """The command line, when this is the console script."""
    if Path(sys.argv[0]).name != "compress":
        return ""
    return shlex.join(["compress", *sys.argv[1:]])


def kernel_tables(
    built: Sequence[Built], inputs: Arrays, sites: Sequence[Site], batch: int = 1
) -> dict[str, Mapping[str, Any]]:
    """For the report: by candidate, its runtime and the rows of its kernels on this machine.

    Candidates whose runtime tells no times are left out.

    Args:
        built: the candidates.
        inputs: of one run.
        sites: of the model, where a dynamic batch counts as one sample.
        batch: samples in `inputs` where the model's batch is dynamic.
    """
    macs = {site.name: site.macs * batch for site in sites}
    tables: dict[str, Mapping[str, Any]] = {}
    for one in built:
        try:
            times = one.engine.profile(inputs, _RUNS)
        except EngineError:  # the engine was measured; its profiler alone fails
            continue
        if times:
            rows = kernel_rows(times, macs)
            tables[one.candidate.name] = {"runtime": one.variant.target.name, "rows": rows}
    return tables
