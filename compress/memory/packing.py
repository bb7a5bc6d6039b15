"""Where tensors lie in one block of memory: offsets, greedily, the largest first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from compress.liveness import Program, Storage, storages


@dataclass(frozen=True)
class Arena:
    """One block that holds every tensor of a schedule.

    Attributes:
        bytes: size of the block; never below the peak of the schedule.
        pieces: what lies in it, and at which offset.
    """

    bytes: int
    pieces: tuple[tuple[Storage, int], ...]


def arena(program: Program, *, alignment: int = 16) -> Arena:
    """Place the tensors of a schedule in one block; scratch memory of operators lies there too.

    Greedy by size (Pisarchyk and Lee, "Efficient Memory Management for Deep Neural Net
    Inference", 2020, section 5.2): from the largest tensor on, each goes into the smallest gap
    that fits between those that are alive at the same time, else behind them. The interpreters of
    microcontrollers plan in this way. Optimal packing is NP-hard, so the block may be larger than
    the peak.

    Args:
        program: the schedule.
        alignment: bytes that every offset and size is a multiple of.
    """
    scratch = (
        Storage((f"{step.name} (scratch)",), step.scratch, index, index)
        for index, step in enumerate(program.steps)
        if step.scratch
    )
    return pack([*storages(program), *scratch], alignment)


def pack(pieces: Sequence[Storage], alignment: int = 1) -> Arena:
    """Offsets of pieces of memory so that no two overlap in time and place."""
    placed: list[tuple[Storage, int]] = []
    total = 0
    for one in sorted(pieces, key=lambda piece: (-piece.size, piece.first)):
        size = _aligned(one.size, alignment)
        beside = sorted(
            (offset, offset + _aligned(other.size, alignment))
            for other, offset in placed
            if other.first <= one.last and one.first <= other.last
        )
        offset = _gap(beside, size)
        placed.append((one, offset))
        total = max(total, offset + size)
    return Arena(total, tuple(placed))


def _gap(taken: Sequence[tuple[int, int]], size: int) -> int:
    """Start of the smallest gap that fits, else the end of everything."""
    best, least, end = -1, 0, 0
    for start, stop in taken:
        room = start - end
        if room >= size and (best < 0 or room < least):
            best, least = end, room
        end = max(end, stop)
    return best if best >= 0 else end


def _aligned(size: int, alignment: int) -> int:
    return -(-size // alignment) * alignment
