"""The rungs of the repair ladder, from what costs nothing at run time to what gives up speed."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from compress.assignment import assign_within
from compress.errors import UnsupportedError
from compress.ladder import Ladder, Rung, State
from compress.mixed import INT8
from compress.passes import Repairable
from compress.registry import create_pass
from compress.target import Target

SITE_LIMITS = (0.5, 0.25, 0.1, 0.04, 0.01)
"""Shares of the whole sensitivity that int8 may keep, tried in this order."""


def _ranges(ladder: Ladder) -> Iterator[tuple[State, tuple[str, ...]]]:
    """Other range methods: the one whose outputs come closest."""
    state = ladder.state
    placing = state.placing
    if not isinstance(placing, Repairable):
        raise UnsupportedError(f"Pass {placing.name} knows one way to choose ranges.")
    others = [state.replace(step) for step in placing.other_ranges()]

    def closeness(other: State) -> float:
        return ladder.closeness(state.target.build(other.lowered.apply(other.kept_float)))

    if others:
        yield max(others, key=closeness), (placing.name,)


def _before(name: str, **options: Any) -> Rung:
    def rung(ladder: Ladder) -> Iterator[tuple[State, tuple[str, ...]]]:
        yield ladder.state.before(create_pass(name, **options)), (name,)

    return rung


def _behind(name: str, **options: Any) -> Rung:
    def rung(ladder: Ladder) -> Iterator[tuple[State, tuple[str, ...]]]:
        step = create_pass(name, **options)
        if step in ladder.state.passes:
            raise UnsupportedError("it is in the recipe already")
        if hasattr(step, "seconds"):
            step = dataclasses.replace(step, seconds=ladder.seconds_left)  # type: ignore[type-var]
        yield ladder.state.behind(step), (name,)

    return rung


def _train(ladder: Ladder) -> Iterator[tuple[State, tuple[str, ...]]]:
    if not ladder.training:
        raise UnsupportedError("There are no training data; give --train DATA.")
    yield from _behind("qat")(ladder)


def _sensitive_sites(ladder: Ladder) -> Iterator[tuple[State, tuple[str, ...]]]:
    """The fastest placements whose int8 operators have less and less sensitivity together.

    A knapsack over the regions of the network: the time that each takes at each precision, as
    profiled, with the conversions between them, against the sum of the sensitivities of what is
    int8.
    """
    state, placement = ladder.state, ladder.placement
    placing = state.placing
    if not isinstance(placing, Repairable):
        raise UnsupportedError(f"Pass {placing.name} does not tell how much each operator matters.")
    if placement is None:
        raise UnsupportedError("The runtime does not tell what each operator costs.")
    found = placing.sensitivity(state.lowered.float_model, state.lowered.context)
    already = set(state.kept_float)
    losses = [
        {
            p: sum(found.get(s, 0.0) for s in region.sites if s not in already) if p == INT8 else 0
            for p in costs
        }
        for region, costs in zip(placement.regions, placement.costs_us, strict=True)
    ]
    total = sum(loss[INT8] for loss in losses)
    placements: dict[tuple[str, ...], None] = {}
    for share in SITE_LIMITS:
        chosen = assign_within(placement.costs_us, placement.edges, losses, share * total)
        if INT8 in chosen:
            kept = dict.fromkeys((*state.kept_float, *placement.kept_float(chosen)))
            placements[tuple(kept)] = None
    placements.pop(state.kept_float, None)
    for target in _remainders(state.target):
        for kept_float in placements:
            other = dataclasses.replace(state, kept_float=kept_float, target=target)
            yield other, (placing.name,)


def _remainders(target: Target) -> list[Target]:
    """The runtime as it is, and with what is not int8 in float32 instead of bfloat16."""
    if getattr(target, "precision", "") != "bfloat16":
        return [target]
    return [target, dataclasses.replace(target, precision="float32")]  # type: ignore[type-var]


RUNGS: Sequence[tuple[str, Rung]] = (
    ("better ranges", _ranges),
    ("cross-layer equalisation", _before("equalize", relu6="bounded")),
    ("bias correction", _behind("correct_bias")),
    ("SmoothQuant", _before("smooth")),
    ("BatchNorm re-estimation", _behind("reestimate_batchnorm")),
    ("AdaRound", _behind("reconstruct")),
    ("BRECQ", _behind("reconstruct", granularity="block")),
    ("sensitive operators in higher precision", _sensitive_sites),
    ("quantization-aware training", _train),
)
"""In the order in which they are tried: the cheap ones that keep all kernels first."""
