from __future__ import annotations

import itertools
import math
import random
import time
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.assignment import (
    MAX_STATES,
    Costs,
    Edges,
    assign,
    assign_within,
    total_us,
)
from compress.errors import UsageError

PRECISIONS = ("int8", "bfloat16", "float32")
SWITCH = {(a, b): 3.0 for a in PRECISIONS for b in PRECISIONS if a != b}


@st.composite
def problems(draw: st.DrawFn) -> tuple[Costs, Edges]:
    time_us = st.floats(0, 100)
    size = draw(st.integers(1, 7))
    precisions = st.lists(st.sampled_from(PRECISIONS), min_size=1, max_size=3, unique=True)
    costs = [{p: draw(time_us) for p in draw(precisions)} for _ in range(size)]
    edges = []
    for region in range(size):
        # A source may come twice: two tensors that are converted separately.
        sources = draw(st.lists(st.integers(0, region - 1), max_size=4)) if region else []
        pairs = [list(itertools.product(costs[source], costs[region])) for source in sources]
        tables = [{pair: draw(time_us) for pair in product} for product in pairs]
        edges.append(list(zip(sources, tables, strict=True)))
    return costs, edges


def random_problem(size: int, reads: int, seed: int) -> tuple[Costs, Edges]:
    """Regions that read the one before and `reads` others, at random."""
    rng = random.Random(seed)
    costs = [{p: rng.uniform(5, 20) for p in PRECISIONS} for _ in range(size)]
    edges: list[list[tuple[int, dict[tuple[str, str], float]]]] = []
    for region in range(size):
        sources = {region - 1, *(rng.randrange(region or 1) for _ in range(reads))} - {-1, region}
        edges.append([(s, {pair: rng.uniform(0, 9) for pair in SWITCH}) for s in sorted(sources)])
    return costs, edges


def widest(size: int, edges: Edges) -> int:
    """The most regions that wait for a later reader at once, the current one among them."""
    last = {source: region for region in range(size) for source, _ in edges[region]}
    return max(
        1 + sum(source < region <= last[source] for source in last) for region in range(size)
    )


@settings(max_examples=150)
@given(problems())
def test_no_assignment_is_better(problem: tuple[Costs, Edges]) -> None:
    costs, edges = problem
    best = min(total_us(costs, edges, choice) for choice in itertools.product(*costs))
    assert total_us(costs, edges, assign(costs, edges)) == pytest.approx(best, abs=1e-9)


def test_a_conversion_must_pay() -> None:
    costs = [{"int8": 10.0, "float32": 20.0}, {"int8": 9.0, "float32": 5.0}, {"int8": 10.0}]
    edges: Edges = [[], [(0, SWITCH)], [(1, SWITCH)]]
    assert assign(costs, edges) == ["int8", "int8", "int8"]
    costs[1]["float32"] = 2.5
    assert assign(costs, edges) == ["int8", "float32", "int8"]
    assert total_us(costs, edges, ["int8", "float32", "int8"]) == 10 + 3 + 2.5 + 3 + 10


def test_the_precision_that_is_listed_first_wins_a_tie() -> None:
    edges: Edges = [[], [(0, SWITCH)], [(0, SWITCH), (1, SWITCH)]]
    for order in itertools.permutations(PRECISIONS):
        assert assign([dict.fromkeys(order, 1.0)] * 3, edges) == [order[0]] * 3


def test_no_regions_need_no_precision() -> None:
    assert assign([], []) == []
    assert total_us([], [], []) == 0


def test_a_long_chain_takes_no_time() -> None:
    costs, edges = random_problem(60, 0, seed=1)
    started = time.perf_counter()
    chosen = assign(costs, edges)
    # Some hundredths of a second on a busy machine; trying all would take 3 ** 60 steps.
    assert time.perf_counter() - started < 1
    for region, precision in itertools.product(range(60), PRECISIONS):
        changed = [*chosen[:region], precision, *chosen[region + 1 :]]
        assert total_us(costs, edges, changed) >= total_us(costs, edges, chosen) - 1e-9


def test_a_wide_graph_goes_to_the_solver_and_is_exact() -> None:
    # Fourteen free regions that one reads: given its precision, each chooses for itself.
    size = 14
    costs, _ = random_problem(size, 0, seed=2)
    rng = random.Random(3)
    tables = [{pair: rng.uniform(0, 9) for pair in SWITCH} for _ in range(size)]
    last = {p: rng.uniform(5, 20) for p in PRECISIONS}
    edges: Edges = [*([] for _ in range(size)), list(enumerate(tables))]
    assert 3 ** widest(size + 1, edges) > MAX_STATES

    def given_the_last(precision: str) -> float:
        return last[precision] + sum(
            min(us + table.get((p, precision), 0) for p, us in region.items())
            for region, table in zip(costs, tables, strict=True)
        )

    chosen = assign([*costs, last], edges)
    assert total_us([*costs, last], edges, chosen) == pytest.approx(min(map(given_the_last, last)))
    assert assign([*costs, last], edges) == chosen


def test_a_wide_graph_agrees_with_its_narrow_form() -> None:
    # A last region that reads all of a chain keeps every one waiting; it has one precision and
    # its edges only add to the costs.
    size = 24
    costs, edges = random_problem(size, 0, seed=4)
    extra = [{(p, "float32"): i * 0.1 for p in PRECISIONS} for i in range(size)]
    for table in extra:
        table["int8", "float32"] += 2.5
    wide = [*costs, {"float32": 0.0}], [*edges, list(enumerate(extra))]
    assert 3 ** widest(size + 1, wide[1]) > MAX_STATES
    narrow = [
        {p: us + table[p, "float32"] for p, us in region.items()}
        for region, table in zip(costs, extra, strict=True)
    ]
    best = total_us(narrow, edges, assign(narrow, edges))
    assert total_us(*wide, assign(*wide)) == pytest.approx(best)


@pytest.mark.parametrize(
    ("costs", "edges", "message"),
    [
        ([{"int8": 1.0}, {}], [[], []], "Region 1 has no precision"),
        ([{"int8": 1.0}], [[(0, {})]], "Region 0 has an edge from region 0"),
        ([{"int8": 1.0}] * 2, [[(1, {})], []], "Region 0 has an edge from region 1"),
        ([{"int8": 1.0}] * 2, [[], [(-1, {})]], "Region 1 has an edge from region -1"),
        ([{"int8": 1.0}], [], "costs of 1 regions and edges of 0"),
        ([{"int8": math.inf}], [[]], "A cost of region 0"),
        ([{"int8": 1.0}] * 2, [[], [(0, {("int8", "int8"): math.nan})]], "A cost of region 1"),
        ([{"int8": 1.0}, {"float32": 1.0}], [[], [(0, {})]], r"\('int8', 'float32'\)"),
    ],
    ids=["empty", "itself", "later", "negative", "lengths", "infinite", "nan", "missing"],
)
def test_what_does_not_fit_is_refused(costs: Costs, edges: Edges, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        assign(costs, edges)


@given(data=st.data())
@settings(max_examples=40)
def test_the_knapsack_equals_brute_force(data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 6))
    numbers = st.integers(0, 40)
    costs = [{p: float(data.draw(numbers)) for p in ("int8", "float32")} for _ in range(count)]
    losses = [{"int8": float(data.draw(numbers)), "float32": 0.0} for _ in range(count)]
    price = {("int8", "float32"): 3.0, ("float32", "int8"): 5.0}
    edges: list[Any] = [[(i - 1, price)] if i else [] for i in range(count)]
    limit = float(data.draw(st.integers(0, 80)))

    def loss(chosen: Sequence[str]) -> float:
        return sum(one[p] for one, p in zip(losses, chosen, strict=True))

    policies = itertools.product(("int8", "float32"), repeat=count)
    best = min(total_us(costs, edges, p) for p in policies if loss(p) <= limit)
    found = assign_within(costs, edges, losses, limit)
    assert loss(found) <= limit
    assert total_us(costs, edges, found) == pytest.approx(best)


def test_a_limit_below_the_least_loss_is_refused() -> None:
    with pytest.raises(UsageError, match="No assignment loses at most 1"):
        assign_within([{"int8": 1.0}], [[]], [{"int8": 2.0}], 1.0)
