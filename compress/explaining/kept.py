"""Sentences about what stayed in float, what became faster, and what no kernel takes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

from compress.explaining import Finding, Line
from compress.explaining.case import Case, joined, layout
from compress.explaining.costs import said
from compress.explaining.lines import NOISE, NOISE_US, main_row
from compress.explaining.words import names, number, time, verb


def kept_float(case: Case) -> Iterator[Finding]:
    """Sites in float on both sides, by reason and operator."""
    gain = _gain(case)
    groups: dict[tuple[str, str], list[Line]] = defaultdict(list)
    for line in case.of("float"):
        groups[_why_float(case, line), case.what(line)].append(line)
    for (reason, kind), lines in groups.items():
        before, after = (
            sum(line.before_us for line in lines), sum(line.after_us for line in lines)
        )  # fmt: skip
        change = after - before
        multiplies = any(line.macs for line in lines)
        possible = after - after / gain if multiplies and gain > 1 else 0.0
        sentence = (
            f"{number(len(lines), f'{kind} site')} stayed in float and {verb(len(lines), 'take')} "
            f"{time(after)} ({case.part(after)} of {case.after.name})"
        )
        sentence += f", because {said(reason, len(lines))}: " if reason else ": "
        sentence += f"{names([line.site for line in lines])}."
        if abs(change) > max(NOISE * before, NOISE_US):
            sentence += f" The original takes {time(before)} there."
            sentence += layout(lines)
        if possible > 0:
            sentence += (
                f" At the {gain:.1f}x that int8 gained in the other layers they would take "
                f"{time(after / gain)}."
            )
        yield Finding(
            "float",
            sentence,
            max(abs(change), possible),
            tuple(line.site for line in lines),
            "",
            {"before_us": before, "after_us": after, "reason": reason, "gain": gain},
        )


def _why_float(case: Case, line: Line) -> str:
    """The reason that was given, or what the runtime lacks."""
    if line.reason:
        return line.reason
    dressing = case.facts.dressing
    op = dressing.types.get(line.site, "") if dressing else ""
    if op and case.facts.capabilities.patterns and case.facts.capabilities.pattern(op) is None:
        return f"{op} has no int8 kernel in {case.facts.runtime}"
    return "there is no Q/DQ around" if dressing is not None and line.macs else ""


def _gain(case: Case) -> float:
    """How much faster the layers with multiply-accumulates became in fewer bits."""
    lines = [line for line in case.lines if line.kind in ("narrow", "slower") and line.macs]
    after = sum(line.after_us for line in lines)
    return sum(line.before_us for line in lines) / after if after else 1.0


def faster(case: Case) -> Iterator[Finding]:
    """Where the gain comes from, and what of it still takes longest."""
    lines = sorted(case.of("narrow"), key=lambda line: line.change_us)
    before, after = (sum(ln.before_us for ln in lines), sum(ln.after_us for ln in lines))
    if not lines or after >= before:
        return
    precision = joined(main_row(line.after)["precision"] for line in lines)
    sentence = (
        f"{number(len(lines), 'site')} {verb(len(lines), 'run')} in {precision} and "
        f"{verb(len(lines), 'take')} {time(after)} instead of {time(before)}, which saves "
        f"{time(before - after)}, most at {', '.join(line.site for line in lines[:3])}."
    )
    rest = sorted(lines, key=lambda line: -line.after_us)[:3]
    longest = ", ".join(f"{line.site} ({time(line.after_us)})" for line in rest)
    sentence += f" What remains is longest at {longest}."
    yield Finding(
        "faster",
        sentence,
        before - after,
        tuple(line.site for line in lines),
        "",
        {"before_us": before, "after_us": after},
    )


def outside(case: Case) -> Iterator[Finding]:
    """What of the latency no kernel takes."""
    first, second = (
        max(side.latency_us - total, 0.0)
        for side, total in (
            (case.before, sum(line.before_us for line in case.lines)),
            (case.after, sum(line.after_us for line in case.lines)),
        )
    )
    if second > 0.05 * case.after.latency_us:
        yield Finding(
            "outside",
            f"{time(second)} of {time(case.after.latency_us)} "
            f"({case.part(second)}) lie outside of kernels: "
            + (
                "the call, memory, what runs between kernels."
                if case.facts.steady
                else "the machine was too noisy to tell what they are."
            )
            + f" In the original it is {time(first)}.",
            max(abs(second - first), NOISE_US),
            (),
            "",
            {"before_us": first, "after_us": second},
        )
