"""What sentences are made from: two models line by line, and facts about where they ran."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from compress.explaining import Line, Row, Side
from compress.explaining.dressing import Dressing
from compress.explaining.lines import Table, main_row
from compress.explaining.words import share
from compress.target import FLOATS, Capabilities

DEFAULT_US_PER_ELEMENT = 3e-4
"""Of a conversion where no kernel of the tables tells: 4 bytes at 13 GB/s."""


@dataclass(frozen=True)
class Facts:
    """What is known about the runtime and the machine that ran both models.

    Attributes:
        runtime: name of the target.
        capabilities: of it.
        cpu: the processor's name.
        x86: whether it has that instruction set.
        dressing: the Q/DQ of the compressed model; None where its graph is not at hand.
        depthwise: sites of the original with one input for each output.
        steady: whether the latencies were taken on a quiet machine.
    """

    runtime: str
    capabilities: Capabilities
    cpu: str = ""
    x86: bool = True
    dressing: Dressing | None = None
    depthwise: frozenset[str] = frozenset()
    steady: bool = True


class Case:
    """The two models, and sums that several sentences need."""

    def __init__(self, before: Side, after: Side, table: Table, facts: Facts) -> None:
        self.before, self.after, self.facts = before, after, facts
        self.lines = table.lines
        inserted = [line for line in self.lines if not line.site]
        new = [(line.after[0], line.after_us) for line in inserted if line.after]
        old = [(line.before[0], line.before_us) for line in inserted if line.before]
        self.rate = _rate(
            ((row, us) for row, us in new if row["precision"] == "convert"), DEFAULT_US_PER_ELEMENT
        )
        # Float kernels may lay activations out in another way, as the original's own moves show.
        self.moving = sum(
            _rate((row, us) for row, us in side if row["precision"] == "move")
            for side in (new, old)
        )

    def of(self, kind: str) -> list[Line]:
        """The lines of a kind."""
        return [line for line in self.lines if line.kind == kind]

    def part(self, us: float) -> str:
        """Percent of the compressed model's latency."""
        return share(us, self.after.latency_us)

    def what(self, line: Line) -> str:
        """What a site is called: its operator, and whether that is depthwise."""
        kind = self.facts.dressing.types.get(line.site, "") if self.facts.dressing else ""
        op = {"QLinearConv": "Conv", "QGemm": "Gemm", "FusedConv": "Conv"}.get(line.op_type)
        op = op or kind or line.op_type.removeprefix("QLinear")
        return f"depthwise {op}" if line.site in self.facts.depthwise else op


def _rate(pairs: Iterator[tuple[Row, float]], default: float = 0.0) -> float:
    """Microseconds for each number that some kernels read."""
    us = count = 0.0
    for row, spent in pairs:
        if row["inputs"]:
            us += spent
            count += elements(row["inputs"][0][0])
    return us / count if us and count else default


def elements(shape: Sequence[int]) -> int:
    """Numbers in a tensor; unknown sizes count as 1."""
    return math.prod(map(abs, shape))


def layout(lines: Sequence[Line]) -> str:
    """A sentence where kernels read the same tensor with its axes in another order."""
    for line in lines:
        first, second = (
            [tuple(tensor[0]) for tensor in main_row(rows)["inputs"]]
            for rows in (line.before, line.after)
        )
        for was, now in zip(first, second, strict=False):
            if was != now and len(was) > 2 and sorted(was) == sorted(now):
                shapes = ("x".join(map(str, shape)) for shape in (now, was))
                return " The axes it reads lie in another order, such as {} instead of {}.".format(
                    *shapes
                )
    return ""


def joined(precisions: Iterable[str]) -> str:
    """Precisions in words, integers first."""
    found = sorted(set(precisions), key=lambda p: (p in FLOATS, p))
    return " and ".join(found)
