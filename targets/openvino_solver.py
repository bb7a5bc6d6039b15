"""How OpenVINO's CPU plug-in lays the tensors between operators into one block of memory.

Its solver (memory_solver.cpp of 2026.4) takes the largest first and gives each the lowest offset
where it fits. Which of several equal tensors comes first decides how much lies idle in between,
and that is left to std::sort, which is not stable: its steps are repeated here as the GNU C++
library takes them (introsort: median of three, insertion sort for 16 or fewer).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from compress.liveness import Storage

T = TypeVar("T")

_ALIGNMENT = 32
"""Bytes of a unit of the solver."""
_SMALL = 16
"""Ranges of so many elements are left to the insertion sort."""


def block_bytes(pieces: Sequence[Storage]) -> int:
    """Size of the block that the solver needs for tensors with their intervals."""
    boxes = list(pieces)
    unstable_sort(boxes, lambda a, b: (a.first, a.last) < (b.first, b.last))
    unstable_sort(boxes, lambda a, b: _units(a) > _units(b))
    placed: list[tuple[Storage, int]] = []
    total = 0
    for one in boxes:
        offset = 0
        beside = (
            (start, start + _units(other))
            for other, start in placed
            if other.first <= one.last and one.first <= other.last
        )
        for start, end in sorted(beside):
            if offset + _units(one) <= start:
                break
            offset = max(offset, end)
        placed.append((one, offset))
        total = max(total, offset + _units(one))
    return total * _ALIGNMENT


def _units(one: Storage) -> int:
    return -(-one.size // _ALIGNMENT)


def unstable_sort(values: list[T], less: Callable[[T, T], bool]) -> None:
    """Sort in place; equal values end up in the order in which std::sort leaves them."""
    ranges = [(0, len(values))]
    while ranges:
        first, end = ranges.pop()
        if end - first > _SMALL:
            cut = _partition(values, first, end, less)
            ranges += [(first, cut), (cut, end)]
    for index in range(1, len(values)):
        value, place = values[index], index
        while place and less(value, values[place - 1]):
            values[place] = values[place - 1]
            place -= 1
        values[place] = value


def _partition(values: list[T], first: int, end: int, less: Callable[[T, T], bool]) -> int:
    """Split a range around the median of its second, middle and last value, kept at `first`."""
    a, b, c = first + 1, first + (end - first) // 2, end - 1
    if less(values[a], values[b]):
        middle = b if less(values[b], values[c]) else c if less(values[a], values[c]) else a
    else:
        middle = a if less(values[a], values[c]) else c if less(values[b], values[c]) else b
    values[first], values[middle] = values[middle], values[first]
    pivot = values[first]
    low, high = first + 1, end
    while True:
        while less(values[low], pivot):
            low += 1
        high -= 1
        while less(pivot, values[high]):
            high -= 1
        if low >= high:
            return low
        values[low], values[high] = values[high], values[low]
        low += 1
