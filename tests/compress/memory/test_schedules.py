"""Schedules: the sweep, the best order and the arena, against brute force on random graphs."""

from __future__ import annotations

import itertools

from hypothesis import given, settings
from hypothesis import strategies as st

from compress.liveness import Program, Step, peak, storages, sweep
from compress.memory.order import best_order
from compress.memory.packing import arena


@st.composite
def programs(draw: st.DrawFn, most: int = 6) -> Program:
    """A random graph of steps with views, outputs, scratch and operators that work in place."""
    count = draw(st.integers(1, most))
    names = ["x0", "x1"]
    sizes = {name: draw(st.integers(0, 4)) for name in names}
    steps = []
    for index in range(count):
        reads = tuple(draw(st.lists(st.sampled_from(names), min_size=1, max_size=3, unique=True)))
        name, view = f"t{index}", draw(st.integers(0, 9)) == 0
        if not view:
            sizes[name] = draw(st.integers(0, 4))
        steps.append(
            Step(
                name=f"s{index}",
                op_type="op",
                reads=reads,
                writes=() if view else (name,),
                overwrites=reads if draw(st.booleans()) else (),
                views={name: reads[0]} if view else {},
                scratch=draw(st.integers(0, 2)),
            )
        )
        names.append(name)
    outputs = tuple(draw(st.lists(st.sampled_from(names), max_size=2, unique=True)))
    held = frozenset(draw(st.lists(st.sampled_from(["x0", "x1"]), max_size=2)))
    return Program(tuple(steps), sizes, ("x0", "x1"), outputs, held)


def brute_force(program: Program) -> list[int]:
    """Bytes in use in each step, tensor by tensor, without intervals."""
    root: dict[str, str] = {name: name for name in program.sizes}
    for step in program.steps:
        root |= {view: root[source] for view, source in step.views.items()}
    kept = {root[name] for name in program.outputs} | set(program.held)
    alive, found = set(program.inputs), []
    for index, step in enumerate(program.steps):
        later = {root[name] for one in program.steps[index + 1 :] for name in one.reads}
        dying = {n for n in map(root.get, step.reads) if n not in later | kept}
        in_use = sum(program.sizes[n] for n in alive | set(step.writes)) + step.scratch
        if step.writes and (size := program.sizes[step.writes[0]]):
            targets = [root[n] for n in step.overwrites]
            in_use -= size * any(n in dying and program.sizes[n] == size for n in targets)
        found.append(in_use)
        alive = {n for n in alive | set(step.writes) if n in later | kept}
    return found


def orders(program: Program) -> list[Program]:
    """The program in every order that keeps each step behind what it reads."""
    found = []
    for order in itertools.permutations(range(len(program.steps))):
        known = set(program.inputs)
        for index in order:
            step = program.steps[index]
            if not known.issuperset(step.reads):
                break
            known |= {*step.writes, *step.views}
        else:
            found.append(program.reordered(order))
    return found


@given(programs(most=9))
def test_the_sweep_counts_what_is_alive(program: Program) -> None:
    assert sweep(program) == brute_force(program)
    found = peak(program)
    assert found.bytes == max(sweep(program))
    assert sum(size for _, size in found.alive) + found.scratch == found.bytes


@settings(max_examples=60)
@given(programs())
def test_the_best_order_is_that_of_brute_force(program: Program) -> None:
    found = best_order(program)
    every = [peak(one).bytes for one in orders(program)]
    assert found.exact
    assert found.bytes == min(every) == peak(program.reordered(found.order)).bytes


@given(programs(most=9))
def test_beyond_its_limit_the_search_is_no_worse_than_the_own_order(program: Program) -> None:
    found = best_order(program, states=0)
    assert found.bytes == peak(program.reordered(found.order)).bytes
    assert min(peak(program).bytes, found.bytes) == found.bytes
    assert found.bytes >= best_order(program).bytes


@given(programs(most=9), st.sampled_from([1, 16]))
def test_an_arena_holds_the_peak_and_nothing_overlaps(program: Program, alignment: int) -> None:
    block = arena(program, alignment=alignment)
    assert block.bytes >= peak(program).bytes
    assert len(block.pieces) >= len(storages(program))
    for (one, at), (other, there) in itertools.combinations(block.pieces, 2):
        together = one.first <= other.last and other.first <= one.last
        assert not together or at + one.size <= there or there + other.size <= at
        assert at % alignment == there % alignment == 0


def test_the_best_order_finishes_a_branch_before_it_starts_the_next() -> None:
    # Two branches that blow up and shrink again: one after the other needs one large tensor less.
    def branch(name: str) -> tuple[Step, Step]:
        grow = Step(f"{name}.grow", "Conv", ("x",), (f"{name}.large",))
        return grow, Step(f"{name}.shrink", "Conv", (f"{name}.large",), (f"{name}.small",))

    (a, b), (c, d) = branch("left"), branch("right")
    add = Step("add", "Add", ("left.small", "right.small"), ("y",), ("left.small",))
    sizes = {"x": 4, "y": 2} | {f"{side}.large": 100 for side in ("left", "right")}
    sizes |= {f"{side}.small": 2 for side in ("left", "right")}
    together = Program((a, c, b, d, add), sizes, ("x",), ("y",))
    assert peak(together).bytes == 100 + 100 + 4
    assert best_order(together).bytes == 100 + 4 + 2
