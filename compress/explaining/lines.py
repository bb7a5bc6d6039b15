"""Two tables of kernels become one: aligned by site, each line with what became of it.

A pure function of the tables; nothing is measured here.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from typing import Any, get_args

from compress.explaining import Kind, Line, Part, Row, Side
from compress.explaining.dressing import Dressing
from compress.graph import Site
from compress.target import FLOATS

_MOVES = frozenset([
    "Concat", "DepthToSpace", "Expand", "Flatten", "Gather", "Identity", "Pad", "Reshape", "Resize",
    "Shape", "Slice", "SpaceToDepth", "Split", "Squeeze", "Transpose", "Unsqueeze",
])  # fmt: skip
NOISE = 0.05
"""Kernels whose times differ by less are as fast as each other."""
NOISE_US = 1.0
"""The same for short ones: ONNX Runtime's profiler counts whole microseconds."""
LABELS = {
    "narrow": "kernels in fewer bits, as fast or faster",
    "slower": "kernels in fewer bits, slower than the original's",
    "unfused": "Q/DQ that the runtime did not fuse, with what they dress",
    "float": "sites in float on both sides",
    "own": "kernels that the original computes inside others, or does not have",
    "absorbed": "kernels of the original alone",
    "convert": "conversions between float and integers",
    "move": "moves: transposes, reorders, shapes",
    "outside": "outside of kernels",
}


@dataclass(frozen=True)
class Known:
    """What is known about the two models besides their kernels.

    Attributes:
        types: operator type of each site of the original, by name.
        reasons: why sites stay in float, by name.
        dressing: the Q/DQ of the compressed model's graph; None where that is not at hand.
        names: sites of the compressed model that have another name in the original.
    """

    types: Mapping[str, str]
    reasons: Mapping[str, str] = field(default_factory=dict)
    dressing: Dressing | None = None
    names: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Table:
    """What the two tables say together.

    Attributes:
        lines: in order of execution.
        parts: shares of both latencies, by kind; what no kernel takes comes last.
        settled: how the times of both sides were made to fit their latencies.
    """

    lines: tuple[Line, ...]
    parts: tuple[Part, ...]
    settled: tuple[Settled, Settled]


def tabulate(before: Side, after: Side, known: Known) -> Table:
    """Align the kernels of two models and say where the difference of their latencies lies.

    The sums of `parts` are the latencies, so their changes add up to the difference.
    """
    first, second = (
        settle([row["p50_us"] for row in side.rows], side.latency_us) for side in (before, after)
    )
    lines = _lines(
        _sorted(before.rows, first.times_us, known, {}),
        _sorted(after.rows, second.times_us, known, known.names),
    )
    lines = [_judged(line, lines, known) for line in lines]
    parts = _parts(lines)
    parts.append(Part("outside", LABELS["outside"], first.rest_us, second.rest_us))
    return Table(tuple(lines), tuple(parts), (first, second))


@dataclass(frozen=True)
class Settled:
    """Times of kernels that fit a latency.

    Attributes:
        times_us: of the kernels, in their order.
        rest_us: of the latency, which no kernel takes.
        profiler_us: what was taken from each kernel, 0 where they fitted.
        scaled: no constant explains them, so all were scaled alike.
    """

    times_us: tuple[float, ...]
    rest_us: float
    profiler_us: float = 0.0
    scaled: bool = False


def settle(times_us: Sequence[float], latency_us: float) -> Settled:
    """Times that fit a latency.

    A profiler adds about the same to every kernel, which shows most in small ones. Where the
    times exceed the latency, the constant is taken from each (from none more than it has) that
    makes them fit. If that left nothing of most of them, they are scaled instead.
    """
    rest = latency_us - sum(times_us)
    if rest >= 0:
        return Settled(tuple(times_us), rest)
    ordered = sorted(times_us, reverse=True)
    total = each = 0.0
    for count, (time_us, smaller) in enumerate(zip(ordered, [*ordered[1:], 0.0], strict=True), 1):
        total += time_us
        each = (total - latency_us) / count
        if each >= smaller:
            break
    settled = tuple(max(time_us - each, 0.0) for time_us in times_us)
    if 2 * sum(time_us == 0 for time_us in settled) <= len(settled):
        return Settled(settled, latency_us - sum(settled), each)
    scale = latency_us / sum(times_us)
    scaled = tuple(time_us * scale for time_us in times_us)
    return Settled(scaled, latency_us - sum(scaled), scaled=True)


def other_names(before: Sequence[Site], after: Sequence[Site]) -> dict[str, str]:
    """Sites with multiply-accumulates that lost their names, by name: what they were called.

    Matched in order by operator and multiply-accumulates, among those whose names differ.
    """
    shared = {site.name for site in before} & {site.name for site in after}
    first, second = (
        [site for site in sites if site.macs and site.name not in shared]
        for sites in (before, after)
    )
    was, now = ([(site.op_type, site.macs) for site in sites] for sites in (first, second))
    blocks = SequenceMatcher(None, was, now, autojunk=False).get_matching_blocks()
    return {
        second[block.b + i].name: first[block.a + i].name
        for block in blocks
        for i in range(block.size)
    }


@dataclass(frozen=True)
class _Timed:
    """A kernel of one side: its place in the order 0..1, its site or "", its settled time."""

    place: float
    site: str
    row: Row
    us: float
    near: tuple[str, str]


def _sorted(
    rows: Sequence[Row], times: Sequence[float], known: Known, names: Mapping[str, str]
) -> list[_Timed]:
    sites = [_site(row, known.types, names) for row in rows]
    behind, ahead, last = [], [], ""
    for site in sites:
        behind.append(last)
        last = site or last
    last = ""
    for site in reversed(sites):
        ahead.append(last)
        last = site or last
    return [
        _Timed(index / len(rows), site, row, us, near)
        for index, (site, row, us, near) in enumerate(
            zip(sites, rows, times, zip(behind, reversed(ahead), strict=True), strict=True)
        )
    ]


def _site(row: Row, types: Mapping[str, str], names: Mapping[str, str]) -> str:
    """The site that a kernel executes; "" for a conversion or a move beside it."""
    site = names.get(row["site"], row["site"])
    moves = row["precision"] == "move" and types.get(site) not in _MOVES
    return "" if row["precision"] == "convert" or moves or site not in types else site


def _lines(before: Sequence[_Timed], after: Sequence[_Timed]) -> list[Line]:
    """Sites of both sides in one line each, and one line for each inserted kernel."""
    sites: dict[str, tuple[list[_Timed], list[_Timed]]] = defaultdict(lambda: ([], []))
    placed: list[tuple[float, Line]] = []
    for which, side in enumerate((before, after)):
        for one in side:
            if one.site:
                sites[one.site][which].append(one)
                continue
            op_type, only = one.row["op_type"], (one.row,)
            if which == 0:
                line = Line("own", "", op_type, one.us, 0.0, only, (), near=one.near)
            else:
                line = Line("own", "", op_type, 0.0, one.us, (), only, near=one.near)
            placed.append((one.place, line))
    for site, (first, second) in sites.items():
        shown = second or first
        line = Line(
            "own",
            site,
            max(shown, key=lambda one: one.us).row["op_type"],
            sum(one.us for one in first),
            sum(one.us for one in second),
            tuple(one.row for one in first),
            tuple(one.row for one in second),
            near=shown[0].near,
        )
        placed.append((shown[0].place, line))
    placed.sort(key=lambda pair: pair[0])
    return [line for _, line in placed]


def _judged(line: Line, lines: Sequence[Line], known: Known) -> Line:
    """The line with its kind, its owner and its reason."""
    if line.site:
        return _site_line(line, lines, known)
    side = line.after or line.before
    precision = side[0]["precision"]
    if not line.after:
        kind: Kind = precision if precision in ("convert", "move") else "absorbed"
        return _replace(line, kind)
    if precision == "convert":
        return _conversion(line, lines, known)
    if precision == "move":
        return _replace(line, "move")
    return _owned(line, side[0]["site"], lines, known)


def _site_line(line: Line, lines: Sequence[Line], known: Known) -> Line:
    reason = known.reasons.get(line.site, "")
    if not line.after:
        return _replace(line, "absorbed")
    main = main_row(line.after)
    if main["precision"] == "move":
        return _replace(line, "move")
    if not line.before:
        return _owned(line, line.site, lines, known)
    if main["precision"] not in FLOATS or main["precision"] != main_row(line.before)["precision"]:
        return _replace(line, "slower" if is_slower(line) else "narrow")
    if _unfused(line.site, line, known):
        found = known.dressing.obstacles.get(_own_name(line)) if known.dressing else None
        return _replace(line, "unfused", owner=line.site, reason=found.text if found else reason)
    return _replace(line, "float", reason=reason)


def _owned(line: Line, name: str, lines: Sequence[Line], known: Known) -> Line:
    """A kernel that only the compressed model has: part of an unfused operator, or its own."""
    start = known.dressing.chains.get(name, "") if known.dressing else ""
    owner = known.names.get(start, start)
    if owner and owner in _unfused_sites(lines, known):
        return _replace(line, "unfused", owner=owner)
    return _replace(line, "own")


def _conversion(line: Line, lines: Sequence[Line], known: Known) -> Line:
    """A conversion: of an unfused operator, or between regions."""
    ends = _ends(line, known)
    if ends is None:
        floats = _in_float(lines)
        found = (known.types.get(name, name) for name in line.near if name in floats)
        return _replace(line, "convert", around=tuple(dict.fromkeys(found)))
    sources, readers = ends
    unfused = _unfused_sites(lines, known)
    for name in (*readers, *sources):
        start = known.dressing.chains.get(name, name) if known.dressing else name
        if known.names.get(start, start) in unfused:
            return _replace(line, "unfused", owner=known.names.get(start, start))
    widens = "Dequantize" in line.op_type
    types = known.dressing.types if known.dressing else {}
    side = readers if widens else sources
    edge = "model output" if widens else "model input"
    narrow = {line.site for line in lines if line.site and _narrowed(line)}
    around = tuple(
        dict.fromkeys(
            types.get(name, name) if name else edge
            for name in side
            if known.names.get(name, name) not in narrow
        )
    )
    between = (next(iter(sources), ""), next(iter(readers), ""))
    return _replace(line, "convert", around=around, near=between)


def _ends(line: Line, known: Known) -> tuple[tuple[str, ...], tuple[str, ...]] | None:
    """What the graph says lies before and behind a conversion; None where it does not know it."""
    if known.dressing is None:
        return None
    row = line.after[0]
    name = str(row["kernel"]).removesuffix("/duplicated")
    for candidate in (name, row["site"]):
        if candidate in known.dressing.ends:
            return known.dressing.ends[candidate]
    return None


def _unfused_sites(lines: Iterable[Line], known: Known) -> set[str]:
    return {line.site for line in lines if line.site and _unfused(line.site, line, known)}


def _unfused(site: str, line: Line, known: Known) -> bool:
    """Whether a site runs in float although Q/DQ dress it."""
    if known.dressing is None or not line.after:
        return False
    dressed = _own_name(line) in known.dressing.dressed
    return dressed and main_row(line.after)["precision"] in FLOATS


def _own_name(line: Line) -> str:
    """The name of a site in the compressed model."""
    return str(main_row(line.after)["site"]) if line.after else line.site


def _in_float(lines: Iterable[Line]) -> set[str]:
    return {
        line.site
        for line in lines
        if line.site and line.after and main_row(line.after)["precision"] in FLOATS
    }


def _narrowed(line: Line) -> bool:
    return bool(line.after) and main_row(line.after)["precision"] not in (*FLOATS, "move")


def main_row(rows: Sequence[Row]) -> Row:
    """The kernel that computes: the longest that is no conversion and no move, or of all."""
    computing = [row for row in rows if row["precision"] not in ("convert", "move")]
    found: Row = max(computing or rows, key=lambda row: row["p50_us"])
    return found


def is_slower(line: Line) -> bool:
    """Whether a line takes longer than in the original by more than noise."""
    return line.change_us > max(NOISE_US, NOISE * line.before_us)


def _replace(line: Line, kind: Kind, **changes: Any) -> Line:
    return dataclasses.replace(line, kind=kind, **changes)


def _parts(lines: Sequence[Line]) -> list[Part]:
    parts = []
    for kind in get_args(Kind):
        found = [line for line in lines if line.kind == kind]
        if found:
            spent = (sum(line.before_us for line in found), sum(line.after_us for line in found))
            parts.append(Part(kind, LABELS[kind], *spent, len(found)))
    return parts
