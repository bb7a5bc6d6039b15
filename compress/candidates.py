"""Build the candidates, measure them on the target, and choose: never worse than what came in."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from compress.artifact import size_of
from compress.data import Data
from compress.errors import UsageError
from compress.fidelity import Fidelity, fidelity
from compress.graph import Site
from compress.max_drop import MaxDrop, parse_max_drop
from compress.memory.limit import memory_facts, parse_memory
from compress.metrics import Evaluator, Score, paired_drop
from compress.model import Model
from compress.progress import Progress
from compress.remote import Artifact, Device, OnDevice, measure_on
from compress.report import Candidate
from compress.search import Searched
from compress.sessions import MARGIN, SESSIONS, measure_sessions
from compress.target import Engine, Kernel
from compress.variants import BASELINE, Variant, settings

DEFAULT_MAX_DROP = "1%"
FLOAT = BASELINE
FUSED = "fused"
HERE = "this machine"


@dataclass(frozen=True)
class Limits:
    """The budget.

    Attributes:
        max_drop: largest loss of the evaluation; None where nothing is evaluated.
        min_speedup: smallest speed-up over the original; None asks only for faster.
        max_memory: bytes of activations at once; None where they do not matter.
    """

    max_drop: MaxDrop | None
    min_speedup: float | None
    max_memory: int | None = None

    @classmethod
    def parse(
        cls,
        max_drop: str | float | None,
        min_speedup: float | None,
        evaluated: bool,
        max_memory: str | int | None = None,
    ) -> Limits:
        """Read the options.

        Raises:
            UsageError: one of them makes no sense, or a drop is limited and not measured.
        """
        if max_drop is not None and not evaluated:
            raise UsageError(
                f"--max-drop {max_drop} needs something to measure the drop with: give "
                f"--eval data.npz or --eval module:function."
            )
        if min_speedup is not None and not 0 < min_speedup < 1000:
            raise UsageError(f"--min-speedup {min_speedup} is no factor; 1.5 means 1.5 times.")
        given = DEFAULT_MAX_DROP if max_drop is None else max_drop
        limit = parse_max_drop(given) if evaluated else None
        memory = parse_memory(max_memory) if max_memory is not None else None
        return cls(limit, min_speedup, memory)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for the report."""
        limit = str(self.max_drop) if self.max_drop is not None else None
        facts = {"max_drop": limit, "min_speedup": self.min_speedup}
        return facts | ({"max_memory": self.max_memory} if self.max_memory is not None else {})


@dataclass(frozen=True)
class Built:
    """A candidate with the engine that was measured, and what it was built from."""

    candidate: Candidate
    engine: Engine
    variant: Variant


@dataclass(frozen=True)
class Measured:
    """All candidates, the original first; `failures` says by name why one is not among them.

    Where they were measured on other machines, `devices` has this one and then those.
    """

    all: tuple[Built, ...]
    latency: Mapping[str, Any]
    failures: Mapping[str, str] = field(default_factory=dict)
    devices: tuple[OnDevice, ...] = ()

    def built(self, name: str) -> Built:
        """The candidate of that name."""
        return next(one for one in self.all if one.candidate.name == name)


def measure_finals(
    searched: Searched,
    sites: Sequence[Site],
    *,
    data: Data | None,
    evaluator: Evaluator | None,
    limits: Limits,
    seconds: float,
    seed: int,
    progress: Progress,
    known: dict[str, Score],
    devices: Sequence[Device] = (),
) -> Measured:
    """Latency of the finalists in several sessions, then accuracy and fidelity in their runtimes.

    Accuracy is measured from the fastest on, until one keeps the limit on the drop; what was made
    for its size or its numbers is always judged. `known` holds scores by name, and gets new ones.
    With devices, latencies are those of the first that answers; what fails there is left out.
    """
    workload, engines = searched.screening.workload, searched.screening.engines
    here = measure_sessions(
        lambda: {
            v.name: workload.call(v.target.build(v.model), v.target) for v in searched.finalists
        },
        seconds=seconds,
        requests=workload.requests,
        seed=seed,
        progress=progress,
    )
    elsewhere = _elsewhere(devices, searched, seconds=seconds, seed=seed, progress=progress)
    answered = [(one, one.comparison) for one in elsewhere if one.comparison is not None]
    deciding, comparison = next(iter(answered), (OnDevice(HERE, here), here))
    finalists = [v for v in searched.finalists if v.name in comparison.timings]
    order = sorted(comparison.ratios, key=lambda name: -comparison.ratios[name].value)
    scores: dict[str, Score | None] = dict.fromkeys((FLOAT, *order))
    agreements: dict[str, Fidelity] = {}
    real = data or (evaluator.data if evaluator else None)
    source = "calibration data" if data else "evaluation data"
    variants = {variant.name: variant for variant in finalists}

    def score(name: str) -> Score | None:
        if evaluator is not None and name not in known:
            known[name] = evaluator(engines[name], progress)
        return known.get(name)

    memory = {
        variant.name: memory_facts(engines[variant.name], workload.batch, limits.max_memory)
        for variant in finalists
    }
    scores[FLOAT] = score(FLOAT)
    found = False
    for name in order:
        if found and variants[name].buys == "speed":
            continue
        agreements[name] = fidelity(
            engines[FLOAT], engines[name], real, source=source, seed=seed, progress=progress
        )
        scores[name] = score(name)
        kept = evaluator is not None and keeps_limit(scores[FLOAT], scores[name], limits)
        found |= kept and memory[name]["fits"] is not False

    def candidate(variant: Variant) -> Candidate:
        name = variant.name
        before, after = scores[FLOAT], scores[name]
        ratio, agreement = comparison.ratios.get(name), agreements.get(name)
        judged = evaluator is None or after is not None
        keeps = name == FLOAT or (judged and keeps_limit(before, after, limits))
        return Candidate(
            name=name,
            runtime=variant.target.name,
            precision=variant.precision,
            settings=settings(variant.target),
            size_bytes=size_of(engines[name]),
            timing=dataclasses.asdict(comparison.timings[name]),
            speedup=dataclasses.asdict(ratio) if ratio is not None else None,
            score=score_facts(after),
            drop=drop_facts(before, after) if name != FLOAT else None,
            fidelity=agreement.to_dict() if agreement is not None else None,
            int8_macs=int8_share(engines[name].kernels(), merged_sites(sites, variant.model)),
            buys=variant.buys,
            memory=memory[name],
            allowed=keeps and memory[name]["fits"] is not False,
        )

    latency = {
        **workload.to_dict(),
        "threads": getattr(searched.finalists[0].target, "threads", None) or "all",
        "sessions": SESSIONS,
        "rounds": comparison.rounds,
        "seconds": comparison.seconds,
        "notes": list(comparison.notes),
        "device": deciding.device,
    }
    failed_there = {k: f"on {deciding.device}: {why}" for k, why in deciding.failures.items()}
    return Measured(
        tuple(Built(candidate(v), engines[v.name], v) for v in finalists),
        latency,
        {**searched.screening.failures, **failed_there},
        (OnDevice(HERE, here), *elsewhere) if elsewhere else (),
    )


def _elsewhere(
    devices: Sequence[Device],
    searched: Searched,
    *,
    seconds: float,
    seed: int,
    progress: Progress,
) -> tuple[OnDevice, ...]:
    """The finalists on other machines, by the rules of `measure_sessions`."""
    if not devices:
        return ()
    engines, inputs = searched.screening.engines, searched.screening.workload.inputs
    return measure_on(
        devices,
        {v.name: Artifact(engines[v.name], settings(v.target)) for v in searched.finalists},
        inputs,
        seconds=seconds,
        sessions=SESSIONS,
        margin=MARGIN,
        seed=seed,
        progress=progress,
    )


def merged_sites(sites: Sequence[Site], model: Model) -> tuple[Site, ...]:
    """Sites of the original, the work of each that was merged into another counted there."""
    into = {
        site: name
        for step in model.history
        for name, facts in step.details.get("merged", {}).items()
        for site in facts["from"]
    }
    macs = {site.name: 0 for site in sites}
    for site in sites:
        home = into.get(site.name, site.name)
        macs[home if home in macs else site.name] += site.macs
    return tuple(dataclasses.replace(site, macs=macs[site.name]) for site in sites)


def int8_share(kernels: Sequence[Kernel], sites: Sequence[Site]) -> float:
    """Share of all multiply-accumulates that int8 kernels execute, 0..1."""
    macs = {site.name: site.macs for site in sites}
    total = sum(macs.values())
    done = {kernel.site for kernel in kernels if kernel.precision == "int8"}
    return sum(macs.get(name, 0) for name in done) / total if total else 0.0


def site_rows(
    sites: Sequence[Site], kernels: Sequence[Kernel], reasons: Mapping[str, str]
) -> tuple[Mapping[str, Any], ...]:
    """What became of every site in the compressed engine, and why it is not int8."""
    executed: dict[str, str] = {}
    for kernel in kernels:
        if kernel.site and executed.get(kernel.site) != "int8":
            executed[kernel.site] = kernel.precision
    rows = []
    for site in sites:
        precision = executed.get(site.name, FUSED)
        reason = reasons.get(site.name, "") if precision != "int8" else ""
        if site.macs and precision == FLOAT and not reason:
            reason = "the runtime left it in float32 although Q/DQ surround it"
        rows.append(
            {
                "name": site.name,
                "op_type": site.op_type,
                "macs": site.macs,
                "parameters": site.parameters,
                "precision": precision,
                "reason": reason,
            }
        )
    return tuple(rows)


def reasons(model: Model) -> Mapping[str, str]:
    """Why operators stay in float, by site, as the last pass that decided said."""
    for step in reversed(model.history):
        if "reasons" in step.details:
            return dict(step.details["reasons"])
    return {}


def score_facts(score: Score | None) -> dict[str, Any] | None:
    """Plain values of a score for the report."""
    if score is None:
        return None
    return {"value": score.value, "unit": score.unit, "n": score.n}


def drop_facts(before: Score | None, after: Score | None) -> dict[str, Any] | None:
    """Plain values of what was lost, where both are a top-1."""
    if before is None or after is None or before.accuracy is None or after.accuracy is None:
        return None
    return dataclasses.asdict(paired_drop(before.accuracy, after.accuracy))


def keeps_limit(before: Score | None, after: Score | None, limits: Limits) -> bool:
    """Whether a score is within the limit on the drop; so is what nobody measured."""
    if before is None or after is None or limits.max_drop is None:
        return True
    return after.value >= before.value - limits.max_drop.allowed(before.value) - 1e-12
