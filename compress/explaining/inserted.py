"""Sentences about what was put between: conversions, moves, kernels of their own."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator

from compress.explaining import Finding, Line
from compress.explaining.case import Case
from compress.explaining.words import names, number, time, verb

_OTHER_FORMS = {"ReduceMean": "GlobalAveragePool"}
"""Operators without an int8 kernel, and what the default passes write in their place."""


def conversions(case: Case) -> Iterator[Finding]:
    """Conversions, by the operator in float that needs them."""
    shapes = case.facts.dressing.shape_only if case.facts.dressing else frozenset()
    groups: dict[tuple[str, ...], list[Line]] = defaultdict(list)
    for line in case.of("convert"):
        row = (line.after or line.before)[0]
        idle = {row["site"], row["kernel"]} & shapes or line.around == ("Shape",)
        groups[("Shape",) if idle else _main_cause(line)].append(line)
    for cause, lines in groups.items():
        lines = sorted(lines, key=lambda line: -line.after_us)
        change = sum(line.change_us for line in lines)
        after = sum(line.after_us for line in lines)
        if change <= 0:
            continue
        where = f"the largest between {_between(lines[0])} ({time(lines[0].after_us)})"
        count = f"{number(len(lines), 'conversion')} between float and integers"
        numbers = {
            "count": len(lines),
            "after_us": after,
            "around": list(cause),
            "kernels": [line.name for line in lines],
        }
        if cause == ("Shape",):
            yield Finding(
                "idle conversion",
                f"{lines[0].name} converts a whole tensor for {time(after)} although only its "
                f"shape is read.",
                change,
                (),
                "Export with a fixed batch, or read the shape from the tensor before its "
                "QuantizeLinear.",
                numbers,
            )
            continue
        around = f" around {' and '.join(cause)}" if cause else ""
        yield Finding(
            "conversions",
            f"{count}{around} {verb(len(lines), 'take')} {time(after)} "
            f"({case.part(after)} of {case.after.name}), {where}.",
            change,
            tuple(dict.fromkeys(n for line in lines for n in line.near if n)),
            _conversion_advice(case, cause),
            numbers,
        )


def _main_cause(line: Line) -> tuple[str, ...]:
    """The operators in float that a conversion serves; a product beside a gate is not the cause."""
    kept = tuple(op for op in line.around if op not in ("Mul", "Add")) or line.around
    return kept[:1]


def _between(line: Line) -> str:
    before, behind = line.near
    return f"{before or 'the input'} and {behind or 'the output'}"


def _conversion_advice(case: Case, cause: tuple[str, ...]) -> str:
    if not cause or cause[0] in ("model input", "model output"):
        return ""
    op = cause[0]
    if case.facts.capabilities.pattern(op) is not None:
        return f"`compress run` has an integer form of {op} for {case.facts.runtime}."
    other = _OTHER_FORMS.get(op, "")
    if other and case.facts.capabilities.pattern(other) is not None:
        return (
            f"{op} has no int8 kernel in {case.facts.runtime}: over height and width write it as "
            f"{other}, which has one (`compress run` does)."
        )
    return (
        f"{op} has no int8 kernel in {case.facts.runtime}: replace it by an operator that has, or "
        f"leave its short neighbours in float with it."
    )


def moves(case: Case) -> Iterator[Finding]:
    """Transposes, reorders and the like: what was added, and what is gone."""
    lines = case.of("move")
    added = sorted((line for line in lines if line.change_us > 0), key=lambda ln: -ln.change_us)
    saved = [line for line in lines if line.change_us < 0]
    if added:
        change = sum(line.change_us for line in added)
        inserted = [line for line in added if not line.site]
        what = "/".join(dict.fromkeys(line.op_type for line in added))
        yield Finding(
            "moves",
            f"{number(len(added), 'kernel')} that only {verb(len(added), 'move')} values ({what}) "
            f"{verb(len(added), 'take')} {time(change)} more than in the original; "
            f"{len(inserted)} of them were inserted. The longest lies between "
            f"{_between(added[0])} ({time(added[0].after_us)}).",
            change,
            tuple(dict.fromkeys(n for line in added for n in line.near if n)),
            "",
            {"count": len(added), "inserted": len(inserted), "kernels": [ln.name for ln in added]},
        )
    if saved:
        change = -sum(line.change_us for line in saved)
        yield Finding(
            "fewer moves",
            f"{number(len(saved), 'kernel')} of the original that only move values are gone or "
            f"shorter, which saves {time(change)}.",
            change,
            tuple(line.site for line in saved if line.site),
            "",
            {"count": len(saved)},
        )


def own_kernels(case: Case) -> Iterator[Finding]:
    """Kernels of one side alone: what was split off, and what was taken in."""
    groups: dict[tuple[str, bool], list[Line]] = defaultdict(list)
    for line in case.of("own"):
        groups[case.what(line), bool(line.site)].append(line)
    for (kind, known), lines in groups.items():
        spent = sum(line.after_us for line in lines)
        origin = (
            "which the original computes inside other kernels"
            if known
            else "which the original does not have under these names"
        )
        yield Finding(
            "own kernels",
            f"{number(len(lines), f'{kind} kernel')} {verb(len(lines), 'take')} {time(spent)}, "
            f"{origin}: {names([line.name for line in lines])}." + ("" if known else _inside(case)),
            spent,
            tuple(line.site for line in lines if line.site),
            "",
            {"count": len(lines), "after_us": spent},
        )
    gone = case.of("absorbed")
    spent = sum(line.before_us for line in gone)
    if gone:
        yield Finding(
            "absorbed",
            f"{number(len(gone), 'kernel')} of the original {verb(len(gone), 'are')} computed "
            f"inside others or not at all, which saves {time(spent)}: "
            f"{names([line.name for line in gone])}.",
            spent,
            tuple(line.site for line in gone if line.site),
            "",
            {"count": len(gone), "before_us": spent},
        )


def _inside(case: Case) -> str:
    """What the original computes inside its kernels and no kernel of the other one has."""
    fused = Counter(
        part for line in case.lines for row in line.before for part in row["fused"].split("+")
    )
    left = {part for line in case.lines for row in line.after for part in row["fused"].split("+")}
    own = {row["op_type"].removeprefix("QLinear") for ln in case.lines for row in ln.after}
    lost = {op: n for op, n in fused.items() if op and op not in left and op not in own}
    saturating = ("Relu", "Clip")  # free where integers saturate as they do
    told = [f"{op} ({count} times)" for op, count in lost.items() if op not in saturating]
    return f" The original computes {', '.join(told)} inside other kernels." if told else ""
