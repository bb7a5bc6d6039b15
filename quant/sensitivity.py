"""How much each site suffers from each format: the figures behind mixed precision.

One site is quantized at a time, so the figures of different sites can be added up only as far as
their errors do not interact.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import isfinite
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

from compress.data import Data
from compress.errors import UnsupportedError, UsageError
from compress.graph import graph_sha256, graph_sites, infer_shapes
from compress.model import Model
from compress.progress import Progress, silent
from compress.torch_graph.network import Network
from quant.curvature import ROUNDS, TOLERANCE, Trace, fisher_metric, hutchinson_metric
from quant.decisions import Option, Side, decide, uniform
from quant.observers import RangeMethod
from quant.perturbation import Subject, Values, output_metrics
from quant.plan import QuantPlan

Metric = Literal["kl", "mse", "sqnr", "accuracy", "fisher", "hutchinson"]
"""What a figure means; all but `sqnr` grow with the damage.

kl          KL(p_float || p_quantized) of the classes' probabilities, mean over samples, in nats
mse         power of the outputs' error over their own power; several outputs count alike
sqnr        the same in decibels, -10 log10(mse), within -200 and 200
accuracy    share of samples whose top-1 is lost: right before and wrong now, less the reverse;
            without labels the share whose top-1 changes
fisher      predicted rise of the cross-entropy, 1/2 sum F d**2 over the rounding d of weight and
            activations, F the diagonal of the empirical Fisher matrix
hutchinson  tr(H) / n ||Q(W) - W||**2 with the Hessian H of the cross-entropy in the site's n
            weights (HAWQ-V2, arXiv 1911.03852, section 3.1); activations are not looked at
"""
OPTIONS: Mapping[str, Option] = uniform("int8", "int6", "int4")
"""What is tried where nothing else is asked for."""

_FAMILIES: Mapping[str, tuple[Metric, ...]] = {
    "output": ("kl", "mse", "sqnr", "accuracy"),
    "fisher": ("fisher",),
    "hutchinson": ("hutchinson",),
}
"""Metrics that are measured, and cached, together."""
_CACHE_VERSION = 1
_Found: TypeAlias = tuple[Values, dict[str, Trace]]


@dataclass(frozen=True)
class SiteSensitivity:
    """One site.

    Attributes:
        site: name of the operator.
        op_type: its ONNX type.
        macs: multiply-accumulates for one run at batch 1.
        parameters: numbers in its initializers.
        values: by option and metric.
        trace: of the Hessian, where `hutchinson` was asked for.
    """

    site: str
    op_type: str
    macs: int
    parameters: int
    values: Mapping[str, Mapping[str, float]]
    trace: Trace | None = None


@dataclass(frozen=True)
class Sensitivity:
    """What `measure_sensitivity` found.

    Attributes:
        metric: that decides where none is named: the first one asked for, or what took its place.
        options: names.
        rows: in order of execution.
        samples: that were used.
        data: name of the data.
        labelled: whether labels were used.
        notes: sentences about what is missing or uncertain.
    """

    metric: Metric
    options: tuple[str, ...]
    rows: tuple[SiteSensitivity, ...]
    samples: int
    data: str
    labelled: bool
    notes: tuple[str, ...] = ()

    def losses(self, option: str, metric: Metric | None = None) -> dict[str, float]:
        """Damage by site, more is worse; of `sqnr` the negative decibels.

        Raises:
            UsageError: there is no such option, or the metric was not measured.
        """
        name = metric or self.metric
        if option not in self.options:
            raise UsageError(
                f"There is no option {option!r}; measured were {', '.join(self.options)}."
            )
        sign = -1 if name == "sqnr" else 1
        try:
            return {row.site: sign * row.values[option][name] for row in self.rows}
        except KeyError:
            known = sorted({m for row in self.rows for m in row.values[option]})
            raise UsageError(
                f"{name} was not measured; there are {', '.join(known)}. Name it in `metrics`."
            ) from None

    def ranked(self, option: str, metric: Metric | None = None) -> tuple[str, ...]:
        """Names of the sites, the most sensitive first; of equals the first in the network.

        Raises:
            UsageError: there is no such option, or the metric was not measured.
        """
        losses = self.losses(option, metric)
        return tuple(sorted(losses, key=lambda site: -losses[site]))

    def report_rows(self) -> tuple[dict[str, Any], ...]:
        """For `Report.sensitivity`: one row per site and option, the deciding metric first."""
        return tuple(
            {
                "name": row.site,
                "format": option,
                "metrics": {self.metric: row.values[option][self.metric], **row.values[option]},
            }
            for row in self.rows
            for option in self.options
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; every figure is finite."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Sensitivity:
        """The inverse of `to_dict`, also after a way through JSON."""
        rows = tuple(
            SiteSensitivity(**{**row, "trace": row["trace"] and Trace(**row["trace"])})
            for row in values["rows"]
        )
        listed = {name: tuple(values[name]) for name in ("options", "notes")}
        return cls(**{**values, **listed, "rows": rows})


def measure_sensitivity(
    model: Model,
    plan: QuantPlan,
    data: Data,
    *,
    options: Mapping[str, Option] = OPTIONS,
    metrics: Sequence[Metric] = ("kl",),
    side: Side = "output",
    method: RangeMethod = "mse",
    samples: int = 128,
    rounds: int = ROUNDS,
    seed: int = 0,
    cache: Path | None = None,
    progress: Progress = silent,
) -> Sensitivity:
    """Quantize one site at a time: its weight and its activations, everything else in float.

    Sites are the multiply-accumulates of the plan; biases stay in float. kl, mse, sqnr and
    accuracy come from the same runs, so asking for one gives all. The loss of `fisher` and
    `hutchinson` is the cross-entropy with the labels, without them with the float model's own
    choices.

    Args:
        model: the float model at the ONNX stage that the plan was made for.
        plan: says which tensors of a site carry Q/DQ, and how.
        data: labelled or not.
        options: formats to try, by name; see `quant.decisions.uniform`.
        metrics: what to measure; the first one decides where a ranking names none.
        side: which activations belong to a site; see `quant.decisions.Side`.
        method: how ranges are chosen for formats that the plan does not have.
        samples: to use; `Data.take` chooses them.
        rounds: of Hutchinson's probes, at most.
        seed: of these probes.
        cache: folder for the results, keyed by hashes of graph, data and parameters.
        progress: opens a tracker for each long step.

    Raises:
        DataError: no whole batch for a model with a fixed batch, or labels that are no classes.
        UnsupportedError: torch cannot run an operator of the graph; or `fisher` or `hutchinson`
            where no output holds class scores.
        UsageError: no options, no samples, no or unknown metrics.
    """
    _check(options, metrics, samples)
    data = data.take(samples)
    shapes = infer_shapes(model.graph_model)
    network = Network(model.graph_model)
    sites = decide(
        model, network, plan, data, options,
        side=side, method=method, samples=samples, cache=cache, progress=progress,
    )  # fmt: skip
    subject = Subject(model, network, sites, tuple(options), data, shapes, progress)
    values: Values = {site.site: {name: {} for name in options} for site in sites}
    traces: dict[str, Trace] = {}
    for family, members in _FAMILIES.items():
        if set(metrics).isdisjoint(members) or not sites:
            continue
        if family != "output" and not subject.scores:
            raise UnsupportedError(
                f"{family} needs a loss, and no output holds class scores (N, classes). Use the "
                f"metric mse."
            )
        found, known = _cached(cache, family, subject, rounds, seed)
        traces |= known
        for site, by_option in found.items():
            for option, figures in by_option.items():
                values[site][option] |= figures
    first = metrics[0]
    return Sensitivity(
        metric=first if subject.scores or first not in ("kl", "accuracy") else "mse",
        options=tuple(options),
        rows=_rows(subject, values, traces),
        samples=len(data),
        data=data.name,
        labelled=data.labelled,
        notes=_notes(subject, traces),
    )


def _check(options: Mapping[str, Option], metrics: Sequence[Metric], samples: int) -> None:
    unknown = [name for name in metrics if name not in get_args(Metric)]
    if unknown or not metrics:
        raise UsageError(
            f"{', '.join(unknown) or 'Nothing'} is not what sensitivity can be measured by; choose "
            f"at least one of {', '.join(get_args(Metric))}."
        )
    if not options or samples < 1:
        raise UsageError(
            f"Sensitivity needs an option and a sample at least; got {len(options)} and {samples}."
        )


def _rows(
    subject: Subject, values: Values, traces: Mapping[str, Trace]
) -> tuple[SiteSensitivity, ...]:
    facts = {site.name: site for site in graph_sites(subject.model.graph_model)}
    return tuple(
        SiteSensitivity(
            site=site.site,
            op_type=facts[site.site].op_type,
            macs=facts[site.site].macs,
            parameters=facts[site.site].parameters,
            values=values[site.site],
            trace=traces.get(site.site),
        )
        for site in subject.sites
    )


def _notes(subject: Subject, traces: Mapping[str, Trace]) -> tuple[str, ...]:
    notes = []
    if not subject.scores:
        notes.append(
            "No output holds class scores (N, classes), so there is neither kl nor accuracy, and "
            "mse of the outputs decides instead."
        )
    open_ends = [name for name, trace in traces.items() if not trace.settled]
    if open_ends:
        notes.append(
            f"{len(open_ends)} of {len(traces)} Hessian traces are known less well than to "
            f"{TOLERANCE:.0%}, among them that of {open_ends[0]}. More rounds would help."
        )
    return tuple(notes)


def _cached(cache: Path | None, family: str, subject: Subject, rounds: int, seed: int) -> _Found:
    if cache is None:
        return _measure(family, subject, rounds, seed)
    file = cache / f"sensitivity-{_key(family, subject, rounds, seed)}.json"
    found = _read(file, family, subject)
    if found is None:
        found = _measure(family, subject, rounds, seed)
        _write(file, found)
    return found


def _measure(family: str, subject: Subject, rounds: int, seed: int) -> _Found:
    """Figures of one family of metrics."""
    if family == "hutchinson":
        return hutchinson_metric(subject, seed, rounds)
    return (fisher_metric if family == "fisher" else output_metrics)(subject), {}


def _key(family: str, subject: Subject, rounds: int, seed: int) -> str:
    """Hash of everything that decides the figures of a family."""
    parts: list[object] = [_CACHE_VERSION, family, graph_sha256(subject.model.graph_model)]
    parts += [subject.data.sha256, subject.options]
    parts += [rounds, seed] if family == "hutchinson" else []
    digest = hashlib.sha256(json.dumps(parts).encode())
    for site in subject.sites:
        digest.update(f"{site.site} {site.weight} {site.side} {site.tensors}".encode())
        for option in site.options:
            weight = {"": site.weights[option]} if option in site.weights else {}
            for name, params in {**weight, **site.activations.get(option, {})}.items():
                digest.update(f"{option} {name} {params.spec} {params.axis}".encode())
                digest.update(params.scale.tobytes() + params.zero_point.tobytes())
    return digest.hexdigest()[:32]


def _read(file: Path, family: str, subject: Subject) -> _Found | None:
    """What was stored, if it is whole."""
    expected = set(_FAMILIES[family]) - (set() if subject.scores else {"kl", "accuracy"})
    try:
        stored = json.loads(file.read_text())
        values = {
            site.site: {
                option: {k: float(v) for k, v in stored["values"][site.site][option].items()}
                for option in subject.options
            }
            for site in subject.sites
        }
        traces = {name: Trace(**trace) for name, trace in stored["traces"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None  # absent or damaged: measure again
    figures = [one for options in values.values() for one in options.values()]
    whole = all(set(one) == expected and all(map(isfinite, one.values())) for one in figures)
    return (values, traces) if whole else None


def _write(file: Path, found: _Found) -> None:
    """A cache that cannot be written costs time later, not this run."""
    values, traces = found
    stored = {"values": values, "traces": {name: asdict(trace) for name, trace in traces.items()}}
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = file.with_suffix(f".{id(found)}.tmp")
        temporary.write_text(json.dumps(stored))
        temporary.replace(file)
    except OSError:
        return
