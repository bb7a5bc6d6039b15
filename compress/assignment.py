"""One precision for each region, so that regions and conversions together take the least time."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
from scipy.optimize import LinearConstraint, milp
from scipy.sparse import coo_array

from compress.errors import EngineError, UsageError

Costs: TypeAlias = Sequence[Mapping[str, float]]
"""For each region, its time in microseconds in each precision that it may have."""
Edges: TypeAlias = Sequence[Sequence[tuple[int, Mapping[tuple[str, str], float]]]]
"""For each region, the earlier regions that it reads, and microseconds for the conversion by
(precision there, precision here). Equal precisions may be left out where they cost nothing."""

MAX_STATES = 3**12
"""Precisions of the regions on the frontier; 4 MB of costs. Wider graphs go to the solver."""
_MAX_AXES = 32


def assign(costs_us: Costs, edges: Edges) -> list[str]:
    """The precision of each region with the least total time; exact.

    Regions are eliminated one by one as soon as no later one reads them (dynamic programming,
    Bertele and Brioschi 1972, Nonserial Dynamic Programming), and of equals the precision
    that is listed first is taken. Where too many regions wait at once, a mixed-integer program
    is solved; it gives the same answer every time, but any one of equals.

    Raises:
        UsageError: a region has no precision, an edge does not come from an earlier region, or
            a number is missing or not finite.
        EngineError: the solver gave up.
    """
    _check(costs_us, edges)
    last_reader = list(range(len(costs_us)))
    for region, sources in enumerate(edges):
        for source, _ in sources:
            last_reader[source] = region
    if _is_narrow([len(costs) for costs in costs_us], last_reader):
        choices = _eliminate(costs_us, edges, last_reader)
    else:
        choices = _solve(costs_us, edges)
    return [list(costs)[choice] for costs, choice in zip(costs_us, choices, strict=True)]


def assign_within(costs_us: Costs, edges: Edges, losses: Costs, limit: float) -> list[str]:
    """The precision of each region with the least total time among those that lose little enough.

    A multiple-choice knapsack with conversions, solved exactly as a mixed-integer program.

    Args:
        costs_us: see `Costs`.
        edges: see `Edges`.
        losses: for each region, what each of its precisions loses, at least 0.
        limit: of the sum of losses.

    Raises:
        UsageError: as `assign`; or even the choices that lose least lose more than the limit.
        EngineError: the solver gave up.
    """
    _check(costs_us, edges)
    least = sum(min(loss.values()) for loss in losses)
    if not least <= limit:
        raise UsageError(
            f"No assignment loses at most {limit:.4g}: the one that loses least loses {least:.4g}. "
            f"Give each region a precision that loses less, or allow more."
        )
    choices = _solve(costs_us, edges, losses, limit)
    return [list(costs)[choice] for costs, choice in zip(costs_us, choices, strict=True)]


def total_us(costs_us: Costs, edges: Edges, assignment: Sequence[str]) -> float:
    """The time that an assignment is predicted to take: its regions and its conversions."""
    regions = sum(costs[chosen] for costs, chosen in zip(costs_us, assignment, strict=True))
    conversions = sum(
        _conversion_us(table, (assignment[source], chosen))
        for sources, chosen in zip(edges, assignment, strict=True)
        for source, table in sources
    )
    return regions + conversions


def _conversion_us(table: Mapping[tuple[str, str], float], pair: tuple[str, str]) -> float:
    return table.get(pair, 0.0) if pair[0] == pair[1] else table[pair]


def _check(costs_us: Costs, edges: Edges) -> None:
    if len(costs_us) != len(edges):
        raise UsageError(
            f"There are costs of {len(costs_us)} regions and edges of {len(edges)}: give one "
            "entry for each region in both, an empty one where a region reads no other."
        )
    for region, (costs, sources) in enumerate(zip(costs_us, edges, strict=True)):
        if not costs:
            raise UsageError(
                f"Region {region} has no precision to choose from: give it the cost of at least "
                "one, float32 for example."
            )
        for source, table in sources:
            if not 0 <= source < region:
                raise UsageError(
                    f"Region {region} has an edge from region {source}: a region reads earlier "
                    "ones only. Put the regions in order of execution."
                )
            pairs = [(a, b) for a in costs_us[source] for b in costs if a != b]
            missing = [pair for pair in pairs if pair not in table]
            if missing:
                raise UsageError(
                    f"The edge from region {source} to region {region} has no cost for the "
                    f"conversion {missing[0]}: give one for each pair of different precisions."
                )
        times = [*costs.values(), *(time for _, table in sources for time in table.values())]
        if not all(map(math.isfinite, times)):
            raise UsageError(
                f"A cost of region {region} or of its edges is not a finite number: leave out a "
                "precision that the region cannot have."
            )


def _is_narrow(sizes: Sequence[int], last_reader: Sequence[int]) -> bool:
    """Whether the tables of the elimination stay small."""
    waiting: list[int] = []
    for region in range(len(sizes)):
        waiting.append(region)
        if math.prod(sizes[w] for w in waiting) > MAX_STATES or len(waiting) > _MAX_AXES:
            return False
        waiting = [w for w in waiting if last_reader[w] > region]
    return True


def _conversions(costs_us: Costs, source: int, region: int, table: Mapping[Any, float]) -> Any:
    """The times of an edge as an array (precisions of the source, precisions of the region)."""
    pairs = [[(a, b) for b in costs_us[region]] for a in costs_us[source]]
    return np.array([[_conversion_us(table, pair) for pair in row] for row in pairs])


def _eliminate(costs_us: Costs, edges: Edges, last_reader: Sequence[int]) -> list[int]:
    # One axis for each waiting region: the least time so far for every choice of theirs.
    table = np.zeros(())
    waiting: list[int] = []
    steps: list[tuple[int, list[int], Any]] = []
    for region, (costs, sources) in enumerate(zip(costs_us, edges, strict=True)):
        table = table[..., None] + np.array(list(costs.values()))
        waiting = [*waiting, region]
        for source, conversion in sources:
            shape = [1] * table.ndim
            axis = waiting.index(source)
            shape[axis], shape[-1] = table.shape[axis], table.shape[-1]
            times = _conversions(costs_us, source, region, conversion)
            table = table + times.reshape(shape)
        for done in [w for w in waiting if last_reader[w] <= region]:
            axis = waiting.index(done)
            waiting = [w for w in waiting if w != done]
            steps.append((done, waiting, table.argmin(axis).astype(np.uint8)))
            table = table.min(axis)
    choices = [0] * len(costs_us)
    for region, others, best in reversed(steps):
        choices[region] = int(best[tuple(choices[other] for other in others)])
    return choices


def _solve(
    costs_us: Costs, edges: Edges, losses: Costs | None = None, limit: float = math.inf
) -> list[int]:
    """The same as a program: one variable for each choice, and one for each pair on an edge.

    A pair's variables sum to those of its two ends, so only the choices need to be integers.
    With `losses`, one more row keeps their sum within the limit.
    """
    starts = np.cumsum([0, *(len(costs) for costs in costs_us)])
    weights = [time for costs in costs_us for time in costs.values()]
    integral = [1] * len(weights)
    entries: list[tuple[int, int, float]] = []
    sums: list[float] = []
    for region in range(len(costs_us)):
        entries += [(len(sums), column, 1.0) for column in range(*starts[region : region + 2])]
        sums.append(1.0)
    for region, sources in enumerate(edges):
        for source, table in sources:
            times = _conversions(costs_us, source, region, table)
            columns = len(weights) + np.arange(times.size).reshape(times.shape)
            weights += times.ravel().tolist()
            integral += [0] * times.size
            for end, groups in ((source, columns), (region, columns.T)):
                for choice, group in enumerate(groups):
                    entries.append((len(sums), int(starts[end]) + choice, -1.0))
                    entries += [(len(sums), int(column), 1.0) for column in group]
                    sums.append(0.0)
    lower = list(sums)
    if losses is not None:
        chosen = [loss[p] for costs, loss in zip(costs_us, losses, strict=True) for p in costs]
        # In shares of the limit: the solver's tolerance is absolute.
        unit = limit if limit > 0 else 1.0
        entries += [(len(sums), column, loss / unit) for column, loss in enumerate(chosen)]
        lower.append(-math.inf)
        sums.append(limit / unit)
    rows, positions, factors = zip(*entries, strict=True)
    matrix = coo_array((factors, (rows, positions)), shape=(len(sums), len(weights)))
    result = milp(
        weights,
        integrality=integral,
        bounds=(0, 1),
        constraints=LinearConstraint(matrix.tocsr(), lower, sums),
        options={"mip_rel_gap": 0.0},
    )
    if result.x is None:
        raise EngineError(
            f"The solver found no assignment of {len(costs_us)} regions: {result.message} Join "
            "regions, or give each fewer precisions."
        )
    return [int(np.argmax(result.x[a:b])) for a, b in itertools.pairwise(starts)]
