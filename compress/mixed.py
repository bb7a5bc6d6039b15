"""Placement by measurement: which regions run in int8 and which stay in float, in one runtime.

Profiles of the two uniform engines say what each region costs at each precision; dynamic
programming over the regions finds the best assignment, conversions at borders included. Then the
clock decides: predicted assignments are built and timed, and single regions are flipped as long
as that helps and time remains.
"""

from __future__ import annotations

import json
import math
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from compress.assignment import assign, total_us
from compress.errors import EngineError
from compress.lowering import Lowered
from compress.regions import Region, cut_regions
from compress.target import KernelTime
from compress.variants import Screening, Variant

INT8 = "int8"
PESSIMISM = (1.0, 3.0, 0.0)
"""Factors on the cost of conversions: as estimated, doubted, and as if they were fused away."""
PATIENCE = 1
"""Rounds of flips without a gain before the search ends."""
FLIPS = 3
"""Flips that are built and timed together."""
GAIN = 0.01
HOPELESS = 1.15
"""Predictions within 15 % of the best that was measured are worth building."""
PROFILE_RUNS = 15
_DEFAULT_US_PER_ELEMENT = 3e-4
"""Quantizing one number, where no kernel of the profile tells: memory-bound, 4 bytes at 13 GB/s."""


@dataclass
class Placement:
    """What the search knows about one runtime.

    Attributes:
        runtime: name of the target.
        wide: the precision of what is not int8.
        regions: in topological order.
        costs_us: for each region, by precision; scaled so that their sums are the latencies.
        edges: for each region, what conversions from earlier ones cost.
        predicted_us: latency of the best assignment, as predicted.
        chosen: precision of each region in the fastest variant that was measured.
        trials: number of placements that were built and timed.
        note: why none was built, or "".
    """

    runtime: str
    wide: str
    regions: tuple[Region, ...]
    costs_us: list[dict[str, float]]
    edges: list[list[tuple[int, Mapping[tuple[str, str], float]]]]
    predicted_us: float = math.nan
    chosen: list[str] = field(default_factory=list)
    trials: int = 0
    note: str = ""

    def rows(self, uniform: str = "") -> list[Mapping[str, Any]]:
        """The region table of the report: as chosen, or every region at one precision."""
        chosen = [uniform] * len(self.regions) if uniform else self.chosen
        pairs = zip(self.regions, self.costs_us, chosen, strict=True)
        return [
            {
                "name": region.name,
                "sites": len(region.sites),
                "macs": region.macs,
                "precision": precision,
                "predicted_us": cost,
            }
            for region, cost, precision in pairs
        ]

    def kept_float(self, assignment: Sequence[str]) -> tuple[str, ...]:
        """Names of the operators of all regions that are not int8."""
        pairs = zip(self.regions, assignment, strict=True)
        return tuple(s for region, p in pairs if p != INT8 for s in region.sites)


def place_by_measurement(
    lowered: Lowered,
    wide: Variant,
    narrow: Variant,
    screening: Screening,
    *,
    deadline: float,
    remembered: Sequence[str] | None = None,
) -> Placement | None:
    """Search between the uniform engines of one runtime.

    Args:
        lowered: makes the model for any placement.
        wide: the uniform variant without int8.
        narrow: the uniform int8 variant; both have been timed.
        screening: builds, times and keeps the variants.
        deadline: of `time.monotonic`; the search stops soon after.
        remembered: precisions that an earlier search chose; only they are tried then.

    Returns:
        None where there is nothing to choose: one region, or a runtime that does not tell which
        kernel executes what.
    """
    placement = profile_regions(lowered, wide, narrow, screening)
    if placement is None:
        return None
    regions = placement.regions
    search = _Search(lowered, narrow, wide, screening, placement)
    if remembered is not None and len(remembered) == len(regions):
        # Which precision is the wide one may have changed since.
        search.try_all([[INT8 if p == INT8 else placement.wide for p in remembered]])
    else:
        search.start()
        if search.hopeless():
            placement.note = (
                f"Mixed placements in {placement.runtime} were not built: the best is predicted at "
                f"{placement.predicted_us / 1e3:.3g} ms, and another variant was measured to be "
                f"faster."
            )
        else:
            search.flush()
            search.climb(deadline)
    placement.chosen = search.best
    if screening.variants[search.best_name].precision == "mixed":
        screening.rename(search.best_name, f"{placement.runtime} mixed")
    return placement


class _Search:
    """Assignments that were tried, and the fastest of them."""

    def __init__(
        self,
        lowered: Lowered,
        narrow: Variant,
        wide: Variant,
        screening: Screening,
        placement: Placement,
    ) -> None:
        self.lowered, self.screening = lowered, screening
        self.target = wide.target
        self.placement = placement
        count = len(placement.regions)
        uniform = {narrow.name: [INT8] * count, wide.name: [placement.wide] * count}
        self.names = {tuple(a): name for name, a in uniform.items()}
        self.best = uniform[screening.fastest([narrow.name, wide.name])]
        self.waiting: list[list[str]] = []

    @property
    def best_name(self) -> str:
        return self.names[tuple(self.best)]

    def start(self) -> None:
        """Queue the best assignments as predicted, with more and less trust in conversions."""
        placement = self.placement
        for factor in PESSIMISM:
            edges = _times(placement.edges, factor)
            found = assign(placement.costs_us, edges)
            if factor == PESSIMISM[0]:
                placement.predicted_us = total_us(placement.costs_us, edges, found)
            self.queue(found)

    def hopeless(self) -> bool:
        """Whether even the prediction is far behind what another runtime was measured at."""
        best = min(self.screening.latency_ms[name] for name in self.screening.engines)
        return self.placement.predicted_us > HOPELESS * best * 1e3

    def queue(self, assignment: list[str]) -> None:
        if tuple(assignment) not in self.names and assignment not in self.waiting:
            self.waiting.append(assignment)

    def flush(self) -> bool:
        found = self.try_all(self.waiting)
        self.waiting = []
        return found

    def try_all(self, assignments: Iterable[list[str]]) -> bool:
        """Build and time these; whether one of them is the new best."""
        variants = []
        for assignment in assignments:
            if tuple(assignment) in self.names:
                continue
            self.placement.trials += 1
            name = f"{self.target.name} mixed {self.placement.trials}"
            kept = self.placement.kept_float(assignment)
            try:
                model = self.lowered.apply(kept, refine=False)
            except EngineError as error:
                self.screening.failures[name] = str(error)
                continue
            self.names[tuple(assignment)] = name
            variants.append(Variant(name, self.target, model, "mixed", kept))
        if not variants:
            return False
        leader = self.screening.variants[self.best_name]
        # Timed again beside the new ones, so that a slow second of the machine hurts all alike.
        self.screening.time([leader, *variants])
        before = self.best_name
        fastest = self.screening.fastest([before, *(v.name for v in variants)])
        gained = self.screening.speed(fastest) > (1 + GAIN) * self.screening.speed(before)
        for variant in variants:
            if variant.name != fastest or not gained:
                self.screening.forget(variant.name)
        if gained:
            if leader.precision == "mixed":
                self.screening.forget(before)
            self.best = next(list(a) for a, name in self.names.items() if name == fastest)
        return gained

    def climb(self, deadline: float) -> None:
        """Flip the regions that promise most."""
        failures = 0
        while failures < PATIENCE and time.monotonic() < deadline:
            flips = list(self.promising())[:FLIPS]
            if not flips:
                return
            failures = 0 if self.try_all(flips) else failures + 1

    def promising(self) -> Iterator[list[str]]:
        """Neighbours of the best that were not tried, by their predicted time."""
        costs, edges = self.placement.costs_us, self.placement.edges
        neighbours = []
        for index, precision in enumerate(self.best):
            other = self.placement.wide if precision == INT8 else INT8
            flipped = [*self.best[:index], other, *self.best[index + 1 :]]
            if tuple(flipped) not in self.names:
                neighbours.append((total_us(costs, edges, flipped), flipped))
        neighbours.sort(key=lambda pair: pair[0])
        now = total_us(costs, edges, self.best)
        # A flip that is predicted to cost more than a tenth of all is not worth building.
        return (flipped for predicted, flipped in neighbours if predicted < 1.1 * now)


def profile_regions(
    lowered: Lowered, wide: Variant, narrow: Variant, screening: Screening
) -> Placement | None:
    """What each region costs in two uniform engines; None where nothing can be chosen."""
    regions = cut_regions(lowered.float_model.graph_model)
    if len(regions) < 2:
        return None
    owners = {site: index for index, region in enumerate(regions) for site in region.sites}
    costs: list[dict[str, float]] = [{} for _ in regions]
    precision = "bfloat16" if wide.precision == "bfloat16" else "float32"
    rate = _DEFAULT_US_PER_ELEMENT
    for label, variant in ((INT8, narrow), (precision, wide)):
        engine = screening.engines.get(variant.name)
        if engine is None:
            return None
        times = engine.profile(screening.workload.inputs, PROFILE_RUNS)
        if not any(one.kernel.site in owners for one in times):
            return None
        total = sum(one.p50_us for one in times)
        scale = screening.latency_ms[variant.name] * 1e3 / total if total else 1.0
        by_region = _by_region(times, owners)
        for index, cost in enumerate(costs):
            cost[label] = by_region.get(index, 0.0) * scale
        if label == INT8:
            rate = _conversion_rate(times, screening) * scale
    batch = screening.workload.batch
    edges: list[list[tuple[int, Mapping[tuple[str, str], float]]]] = []
    for region in regions:
        entries: list[tuple[int, Mapping[tuple[str, str], float]]] = []
        for source in region.inputs:
            cost_us = rate * batch * region.border_elements.get(source, 0)
            prices = {(INT8, precision): cost_us, (precision, INT8): cost_us}
            entries.append((source, prices))
        edges.append(entries)
    return Placement(lowered.context.target.name, precision, regions, costs, edges)


def _by_region(times: Sequence[KernelTime], owners: Mapping[str, int]) -> dict[int, float]:
    """Microseconds of each region; a kernel without a site belongs to the next that has one."""
    sums: dict[int, float] = defaultdict(float)
    pending, last = 0.0, 0
    for one in times:
        owner = owners.get(one.kernel.site)
        if owner is None:
            pending += one.p50_us
            continue
        sums[owner] += one.p50_us + pending
        pending, last = 0.0, owner
    sums[last] += pending
    return dict(sums)


def _conversion_rate(times: Sequence[KernelTime], screening: Screening) -> float:
    """Microseconds for each number at the model's input: all kernels before the first int8 one."""
    elements = sum(array.size for array in screening.workload.inputs.values())
    spent = 0.0
    for one in times:
        if one.kernel.precision not in ("convert", "move"):
            break
        spent += one.p50_us
    return spent / elements if spent and elements else _DEFAULT_US_PER_ELEMENT


def _times(
    edges: Sequence[Sequence[tuple[int, Mapping[tuple[str, str], float]]]], factor: float
) -> list[list[tuple[int, Mapping[tuple[str, str], float]]]]:
    return [[(j, {k: v * factor for k, v in cost.items()}) for j, cost in one] for one in edges]


def recall(file: Path) -> dict[str, list[str]]:
    """Assignments by runtime that an earlier search left; empty where there are none."""
    try:
        stored = json.loads(file.read_text())
        return {str(name): [str(p) for p in found] for name, found in stored.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}  # absent or damaged: search again


def remember(file: Path, placements: Iterable[Placement]) -> None:
    """Keep the assignments; a cache that cannot be written costs time later, not this run."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = file.with_suffix(f".{time.monotonic_ns()}.tmp")
        temporary.write_text(json.dumps({p.runtime: p.chosen for p in placements}))
        temporary.replace(file)
    except OSError:
        return
