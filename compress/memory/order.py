"""The order of operators that needs least memory: exact for small graphs, else better if it can."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeAlias

from compress.liveness import Program, Step, overwritten, peak

STATES = 50_000
"""Sets of finished operators that the exact search looks at before it gives up."""


@dataclass(frozen=True)
class Order:
    """An order of the steps of a program.

    Attributes:
        order: their indices.
        bytes: the peak in this order.
        exact: no order has a lower peak; else this is the better of the graph's own and a greedy
            one.
    """

    order: tuple[int, ...]
    bytes: int
    exact: bool


def best_order(program: Program, *, states: int = STATES) -> Order:
    """The order with the lowest peak.

    A search over sets of finished operators, the lowest peak so far first, so that the first
    complete one is optimal. A step that neither raises the peak nor leaves more memory in use is
    taken at once, as doing it early never hurts. What is alive depends on the set and not on the
    order within, so every set is looked at once.

    Args:
        program: steps may go in any order that keeps each behind what it reads.
        states: sets to look at before the greedy answer is taken.
    """
    search = _Search(program)
    found = search.exact(states)
    if found is not None:
        return found
    own = Order(tuple(range(len(program.steps))), peak(program).bytes, exact=False)
    return min(own, search.greedy(), key=lambda one: one.bytes)


class _Search:
    """What an order does to memory, by sets of finished steps as bit masks."""

    def __init__(self, program: Program) -> None:
        self.count = len(program.steps)
        writer = {
            name: index
            for index, step in enumerate(program.steps)
            for name in (*step.writes, *step.views)
        }
        self.before = [
            sum({1 << writer[n] for n in (*s.reads, *s.views.values()) if n in writer})
            for s in program.steps
        ]
        whole = program.resolved()
        self.steps: tuple[Step, ...] = whole.steps
        self.sizes = whole.sizes
        self.kept = frozenset(whole.outputs) | whole.held
        self.readers: dict[str, int] = {}
        for index, step in enumerate(self.steps):
            for name in step.reads:
                self.readers[name] = self.readers.get(name, 0) | 1 << index
        # An input that nobody reads is there while the first step runs, and no longer.
        idle = [n for n in whole.inputs if n not in self.readers and n not in self.kept]
        self.idle = sum(self.sizes[name] for name in idle)
        self.start = sum(self.sizes[name] for name in whole.inputs)

    def ready(self, done: int) -> Iterator[int]:
        for index, before in enumerate(self.before):
            if not done >> index & 1 and before & done == before:
                yield index

    def take(self, index: int, done: int, alive: int) -> tuple[int, int]:
        """Bytes in use while a step runs, and behind it."""
        step = self.steps[index]
        now = done | 1 << index
        dying = {
            name
            for name in step.reads
            if self.readers[name] & now == self.readers[name] and name not in self.kept
        }
        written = sum(self.sizes[name] for name in step.writes)
        taken = overwritten(step, self.sizes, dying)
        during = alive + written - (self.sizes[taken] if taken is not None else 0) + step.scratch
        unread = [n for n in step.writes if n not in self.readers and n not in self.kept]
        freed = sum(self.sizes[name] for name in (*dying, *unread))
        return during, alive + written - freed - (self.idle if not done else 0)

    def exact(self, states: int) -> Order | None:
        goal = (1 << self.count) - 1
        ticket = itertools.count()
        heap: list[tuple[int, int, int, int, _Path]] = [(0, 0, 0, self.start, None)]
        seen: set[int] = set()
        while heap:
            most, _, done, alive, path = heapq.heappop(heap)
            if done in seen:
                continue
            seen.add(done)
            if done == goal:
                return Order(_indices(path), most, exact=True)
            if len(seen) > states:
                return None
            moves = [(index, *self.take(index, done, alive)) for index in self.ready(done)]
            free = next((m for m in moves if done and m[1] <= most and m[2] <= alive), None)
            for index, during, after in [free] if free is not None else moves:
                entry = (max(most, during), -next(ticket), done | 1 << index, after, (path, index))
                heapq.heappush(heap, entry)
        return Order((), 0, exact=True)

    def greedy(self) -> Order:
        """Always the step that leaves least in use; of equals the one that needs least."""
        done, alive, most = 0, self.start, 0
        order: list[int] = []
        while len(order) < self.count:
            moves = [(index, *self.take(index, done, alive)) for index in self.ready(done)]
            index, during, alive = min(moves, key=lambda move: (move[2], move[1]))
            most, done = max(most, during), done | 1 << index
            order.append(index)
        return Order(tuple(order), most, exact=False)


_Path: TypeAlias = "tuple[_Path, int] | None"


def _indices(path: _Path) -> tuple[int, ...]:
    found = []
    while path is not None:
        path, index = path
        found.append(index)
    return tuple(reversed(found))
