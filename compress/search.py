"""Which runtime, precision, placement and session settings are fastest: measured, within a time."""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from compress.errors import EngineError, UnsupportedError
from compress.latency import measure
from compress.lowering import Lowered
from compress.mixed import (
    Placement,
    place_by_measurement,
    profile_regions,
    recall,
    remember,
)
from compress.model import Model
from compress.progress import Progress
from compress.target import FLOATS, Adjustable, Elsewhere, Engine, Target
from compress.trial import Trials
from compress.variants import BASELINE, Screening, Variant, settings, uniform_variants
from compress.workload import Workload

FINALISTS = 3
FITTING = 2
"""Variants within a budget of another kind that are judged whatever their speed."""
MARGIN = 0.02
"""What screening must promise before a variant other than the best is worth a final."""
DEFAULT_SECONDS = 60.0


@dataclass(frozen=True)
class Searched:
    """What the search found.

    Attributes:
        finalists: the baseline, then the others, the fastest first.
        screening: everything that was tried.
        placements: by the name of their target.
        seconds: that it took.
        notes: sentences about what was not searched.
    """

    finalists: tuple[Variant, ...]
    screening: Screening
    placements: Mapping[str, Placement] = field(default_factory=dict)
    seconds: float = 0.0
    notes: tuple[str, ...] = ()


def search(
    original: Model,
    lowered: Sequence[Lowered],
    workload: Workload,
    *,
    seconds: float,
    seed: int,
    progress: Progress,
    memory: Path | None = None,
    fits: Callable[[Engine], bool] | None = None,
) -> Searched:
    """Try the uniform variants, then mixed placements, then settings of the fastest.

    Args:
        original: at the ONNX stage.
        lowered: the model for each runtime; the first is the reference.
        workload: what is timed.
        seconds: for placements and settings; 0 tries only the uniform variants.
        seed: of the order of measurements.
        progress: opens trackers.
        memory: file with the placements of an earlier search of the same model, data and machine.
        fits: whether a budget that is not about speed allows an engine; the fastest that it allows
            are judged whatever their speed.
    """
    start = time.monotonic()
    baseline, *variants = uniform_variants(original, lowered)
    # What is fastest here need not be fastest on another device.
    placing = seconds > 0 and not isinstance(baseline.target, Elsewhere)
    title = "Search for the fastest runtime and placement"
    with Trials() as trials, progress(title, total=seconds or None) as advance:
        screening = Screening(workload, _baseline(baseline, workload), advance, trials, seed)
        screening.time(variants)
        placements: dict[str, Placement] = {}
        if placing:
            placements = _place(lowered, screening, start + seconds, memory)
            _adjust(screening)
        finalists = _refined(_finalists(screening, fits), lowered, screening)
    spent = time.monotonic() - start
    notes = tuple(found.note for found in placements.values() if found.note)
    can_place = placing and any(map(_can_place, lowered))
    if can_place and not placements and spent > seconds:
        notes = (f"--time {seconds:g} was over before a mixed placement could be searched.",)
    return Searched(finalists, screening, placements, spent, notes)


def _refined(
    finalists: Sequence[Variant], lowered: Sequence[Lowered], screening: Screening
) -> tuple[Variant, ...]:
    """The finalists after every pass of the recipe; one whose refinement fails is out."""
    by_runtime = {one.context.target.name: one for one in lowered if one.refines}
    kept = []
    for variant in finalists:
        one = by_runtime.get(variant.target.name)
        placed = not variant.made_by and variant.precision not in FLOATS
        if one is None or not placed:
            kept.append(variant)
            continue
        try:
            model = one.apply(variant.kept_float)
            refined = dataclasses.replace(variant, model=model)
            screening.rebuild(refined)
        except (EngineError, UnsupportedError) as error:
            screening.failures[variant.name] = str(error)
            continue
        kept.append(refined)
    return tuple(kept)


def _place(
    lowered: Sequence[Lowered], screening: Screening, deadline: float, memory: Path | None
) -> dict[str, Placement]:
    """Mixed placements for each runtime, the fastest first."""
    placements: dict[str, Placement] = {}
    known = recall(memory) if memory is not None else {}
    order = [one for one in _by_speed(lowered, screening) if _can_place(one)]
    for one in order:
        name = one.context.target.name
        wide, narrow = _pair(name, screening, reference=one is lowered[0])
        late = time.monotonic() > deadline and not known
        if wide is None or narrow is None or late:
            continue
        found = place_by_measurement(
            one,
            wide,
            narrow,
            screening,
            deadline=_share(deadline, last=one is order[-1]),
            remembered=known.get(name),
        )
        if found is not None:
            placements[name] = found
    if memory is not None and not known and placements:
        remember(memory, placements.values())
    return placements


def _can_place(one: Lowered) -> bool:
    """Whether operators can be kept in float one by one, and the runtime tells what each costs."""
    return one.places and one.context.target.capabilities.profiler


def _share(deadline: float, last: bool) -> float:
    """The faster runtime gets two thirds of what is left, the last one everything."""
    now = time.monotonic()
    return deadline if last else now + (deadline - now) * 2 / 3


def _baseline(variant: Variant, workload: Workload) -> Variant:
    """The original under the number of streams that suits it best."""
    streams = getattr(variant.target, "streams", 1)
    if workload.requests == 1 or streams == 1:
        return variant
    one = dataclasses.replace(variant, target=_with_streams(variant.target, 1))
    engines = {"many": variant, "one": one}
    calls = {n: workload.call(v.target.build(v.model), v.target) for n, v in engines.items()}
    return one if measure(calls, seconds=2).ratios["one"].value > 1 + MARGIN else variant


def _with_streams(target: Target, streams: int) -> Target:
    return dataclasses.replace(target, streams=streams)  # type: ignore[type-var]


def _by_speed(lowered: Sequence[Lowered], screening: Screening) -> list[Lowered]:
    """The runtime with the fastest uniform variant first."""

    def speed(one: Lowered) -> float:
        names = [
            n for n, v in screening.variants.items() if v.target.name == one.context.target.name
        ]
        return max(screening.speed(name) for name in names) if names else 0.0

    return sorted(lowered, key=speed, reverse=True)


def _pair(
    runtime: str, screening: Screening, reference: bool
) -> tuple[Variant | None, Variant | None]:
    """The fastest without int8, and the int8 variant, of those that could be built."""
    found = [
        v
        for n, v in screening.variants.items()
        if v.target.name == runtime and n in screening.ratios and (n != BASELINE or reference)
    ]
    wide = [v for v in found if v.precision in FLOATS]
    narrow = next((v for v in found if v.precision == "int8" and not v.made_by), None)
    rewritten = [v for v in wide if v.name != BASELINE] or wide
    # Mixed models are made from the rewritten graph, so that is the one to profile.
    best = max(rewritten, key=lambda v: screening.speed(v.name), default=None)
    return best, narrow


def _adjust(screening: Screening) -> None:
    """Other settings of the fastest variant."""
    name = screening.fastest(list(screening.engines))
    best = screening.variants[name]
    if name == BASELINE or not isinstance(best.target, Adjustable):
        return
    before = settings(best.target)
    others = []
    for target in best.target.settings():
        changed = [f"{k}={v}" for k, v in settings(target).items() if before[k] != v]
        label = f"{name}, {', '.join(changed)}"
        others.append(dataclasses.replace(best, name=label, target=target))
    screening.time([best, *others])


def region_costs(one: Lowered, screening: Screening, reference: bool) -> Placement | None:
    """What the regions of a runtime cost at each precision, where no placement was searched."""
    wide, narrow = _pair(one.context.target.name, screening, reference)
    if wide is None or narrow is None:
        return None
    return profile_regions(one, wide, narrow, screening)


def _finalists(
    screening: Screening, fits: Callable[[Engine], bool] | None = None
) -> tuple[Variant, ...]:
    """The baseline, the fastest few, those that fit, and the fastest one without int8.

    Of each runtime, precision and pass one, and of other settings one beside it: what settings
    gain is often less than two sessions differ.
    """
    usual: dict[tuple[str, str], Target] = {}
    for variant in screening.variants.values():
        usual.setdefault((variant.target.name, variant.precision), variant.target)
    ranked = [n for n in screening.ratios if n != BASELINE and n in screening.engines]
    ranked.sort(key=screening.speed, reverse=True)
    chosen: list[str] = []
    seen: set[tuple[str, str, str, bool]] = set()
    for name in ranked:
        variant = screening.variants[name]
        runtime, precision = variant.target.name, variant.precision
        as_usual = variant.target == usual[runtime, precision]
        kind = (runtime, precision, variant.made_by, as_usual)
        worth = not chosen or screening.speed(name) > 1 + MARGIN
        if kind not in seen and worth and len(chosen) < FINALISTS:
            chosen.append(name)
            seen.add(kind)
    # What was asked for by its format is judged whatever its speed.
    chosen += [n for n in ranked if screening.variants[n].buys != "speed" and n not in chosen]
    if fits is not None:
        fitting = (n for n in ranked if fits(screening.engines[n]))
        chosen += [n for n in itertools.islice(fitting, FITTING) if n not in chosen]
    wide = [n for n in ranked if screening.variants[n].precision in FLOATS]
    if wide and wide[0] not in chosen and screening.speed(wide[0]) > 1 + MARGIN:
        chosen.append(wide[0])
    return tuple(screening.variants[name] for name in (BASELINE, *chosen))
