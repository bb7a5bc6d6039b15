"""Sentences about a table of lines: what costs time, what saves it, what is left to gain.

Every sentence is made from lines and facts that are handed in; nothing is measured here.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from compress.explaining.dressing import Dressing
from compress.explaining.explanation import Finding, Line, Part, Row, Side
from compress.explaining.lines import NOISE, NOISE_US, Table, main_row
from compress.explaining.words import names, number, share, time, verb
from compress.target import FLOATS, Capabilities

SMALL = 0.01
"""What moves less than this part of the longer latency gets no sentence of its own."""
DEFAULT_US_PER_ELEMENT = 3e-4
"""Of a conversion where no kernel of the tables tells: 4 bytes at 13 GB/s."""
_ORT = "onnxruntime"


@dataclass(frozen=True)
class Facts:
    """What is known about the runtime and the machine that ran both models.

    Attributes:
        runtime: name of the target.
        capabilities: of it.
        cpu: the processor's name.
        x86: whether it has that instruction set.
        dressing: the Q/DQ of the compressed model; None where its graph is not at hand.
        groups: of convolutions, by site of the original.
    """

    runtime: str
    capabilities: Capabilities
    cpu: str = ""
    x86: bool = True
    dressing: Dressing | None = None
    groups: Mapping[str, int] = field(default_factory=dict)


def find(before: Side, after: Side, table: Table, facts: Facts) -> list[Finding]:
    """Every sentence that the tables support, by microseconds at stake."""
    if not before.rows or not after.rows:
        return []
    least = max(SMALL * max(before.latency_us, after.latency_us), NOISE_US / 2)
    steps: tuple[Callable[[_Case], Iterator[Finding]], ...] = (
        _unfused, _slower, _conversions, _moves, _own, _float, _narrow, _outside
    )  # fmt: skip
    case = _Case(before, after, table, facts)
    found = [finding for step in steps for finding in step(case)]
    return sorted((f for f in found if f.us >= least), key=lambda f: -f.us)


def headline(before: Side, after: Side, parts: Sequence[Part], interval: str = "") -> str:
    """The answer in two sentences."""
    ratio = before.latency_us / after.latency_us
    change = after.latency_us - before.latency_us
    if abs(ratio - 1) < 0.02:
        verdict = "as fast as it"
    else:
        verdict = f"{ratio:.2f}x as fast" if ratio > 1 else f"{1 / ratio:.2f}x slower"
    text = (
        f"{after.name} takes {time(after.latency_us)} in {after.runtime} and {before.name} "
        f"{time(before.latency_us)}: {verdict}{interval}."
    )
    largest = max(
        (p for p in parts if p.change_us * change > 0), key=lambda p: abs(p.change_us), default=None
    )
    if largest is None or abs(ratio - 1) < 0.02:
        return text
    direction = "more" if change > 0 else "less"
    return (
        f"{text} Of the {time(abs(change))} {direction}, most lies in: {largest.label} "
        f"({time(abs(largest.change_us))} {direction})."
    )


def nothing(before: Side, after: Side, table: Table) -> list[Finding]:
    """One sentence where both models do the same in the same time."""
    changed = [line for line in table.lines if line.kind not in ("float", "move")]
    moved = [part for part in table.parts if abs(part.change_us) > NOISE * before.latency_us]
    if not before.rows or not after.rows or changed or moved:
        return []
    return [
        Finding(
            "nothing",
            f"There is nothing to explain: both run the same {number(len(after.rows), 'kernel')} "
            f"in the same precisions, and no group of them differs by more than {NOISE:.0%} of "
            f"the latency.",
            0.0,
        )
    ]


class _Case:
    """The two models, and sums that several sentences need."""

    def __init__(self, before: Side, after: Side, table: Table, facts: Facts) -> None:
        self.before, self.after, self.facts = before, after, facts
        self.lines = table.lines
        self.rate = _conversion_rate(table.lines)

    def of(self, kind: str) -> list[Line]:
        return [line for line in self.lines if line.kind == kind]

    def share(self, us: float) -> str:
        return share(us, self.after.latency_us)

    def what(self, line: Line) -> str:
        """What a site is called in groups: a convolution with one input per output is its own."""
        groups = self.facts.groups.get(line.site, 1)
        kind = self.facts.dressing.types.get(line.site, "") if self.facts.dressing else ""
        op = {"QLinearConv": "Conv", "QGemm": "Gemm", "FusedConv": "Conv"}.get(line.op_type)
        op = op or kind or line.op_type.removeprefix("QLinear")
        return f"depthwise {op}" if groups > 1 and op.startswith("Conv") else op


def _unfused(case: _Case) -> Iterator[Finding]:
    obstacles = case.facts.dressing.obstacles if case.facts.dressing else {}
    groups: dict[str, list[Line]] = defaultdict(list)
    owners = {line.site: line for line in case.of("unfused") if line.site == line.owner}
    for line in case.of("unfused"):
        groups[owners[line.owner].reason if line.owner in owners else ""].append(line)
    for reason, lines in groups.items():
        sites = [line.site for line in lines if line.site == line.owner]
        own = [owners[site] for site in sites]
        others = [line for line in lines if line.site != line.owner]
        constants = [line for line in others if _widens_constant(line)]
        change = sum(line.change_us for line in lines)
        kinds = "/".join(sorted({case.what(line) for line in own})) or "operator"
        sentence = (
            f"{number(len(own), 'site')} ({kinds}) {verb(len(own), 'run')} in float between "
            f"DequantizeLinear and QuantizeLinear and {verb(len(own), 'take')} "
            f"{time(sum(line.after_us for line in own))} where the original takes "
            f"{time(sum(line.before_us for line in own))}"
        )
        sentence += f", because {_each(reason, len(own))}: " if reason else ": "
        sentence += f"{names(sites)}."
        if others:
            spent = sum(line.after_us for line in others)
            sentence += (
                f" {number(len(others), 'kernel')} around {verb(len(own), 'them')} "
                f"{verb(len(others), 'take')} another {time(spent)}."
            ).replace("thems", "it")
        if constants:
            sentence += (
                f" {number(len(constants), 'weight')} {verb(len(constants), 'are')} dequantized "
                f"at every call, so the runtime cannot lay out what it multiplies with ahead."
            )
        found = next((obstacles[name] for name in sites if name in obstacles), None)
        advice = f"{found.advice[0].upper()}{found.advice[1:]}." if found and found.advice else ""
        yield Finding(
            "unfused",
            sentence,
            abs(change),
            tuple(sites),
            advice or f"Leave {names(sites)} in float, without Q/DQ around.",
            {
                "before_us": sum(line.before_us for line in lines),
                "after_us": sum(line.after_us for line in lines),
                "own_before_us": sum(line.before_us for line in own),
                "own_after_us": sum(line.after_us for line in own),
                "weights_dequantized": len(constants),
                "obstacle": found.kind if found else "",
                "reason": reason,
            },
        )


def _each(reason: str, count: int) -> str:
    """A reason about one operator, said of several."""
    return reason if count == 1 else f"of each of them holds that {reason}"


def _widens_constant(line: Line) -> bool:
    rows = line.after
    return bool(rows) and rows[0]["precision"] == "convert" and not rows[0]["inputs"]


def _slower(case: _Case) -> Iterator[Finding]:
    groups: dict[str, list[Line]] = defaultdict(list)
    for line in case.of("slower"):
        groups[case.what(line)].append(line)
    for kind, lines in groups.items():
        lines = sorted(lines, key=lambda line: -line.change_us)
        change = sum(line.change_us for line in lines)
        precision = _joined(main_row(line.after)["precision"] for line in lines)
        wide = _joined(main_row(line.before)["precision"] for line in lines)
        worst = lines[0]
        sentence = (
            f"{number(len(lines), f'{kind} kernel')} {verb(len(lines), 'are')} slower in "
            f"{precision} than in {wide}, together by {time(change)} "
            f"({time(sum(line.before_us for line in lines))} became "
            f"{time(sum(line.after_us for line in lines))}): {names([one.site for one in lines])}."
        )
        if len(lines) > 1:
            sentence += (
                f" The worst, {worst.site}, went from {time(worst.before_us)} to "
                f"{time(worst.after_us)}."
            )
        reason, cure = _slow_reason(case, lines)
        alone = [(line, line.change_us - _price(case, line)) for line in lines]
        gaining = [(line, gain) for line, gain in alone if gain > NOISE_US]
        back = sum(gain for _, gain in gaining)
        advice = cure
        if not cure and back > 0:
            advice = (
                f"Leave {names([line.site for line, _ in gaining])} in float: about "
                f"{time(back)} would come back after the conversions that each would need alone "
                f"(predicted)."
            )
        elif not cure:
            advice = (
                "Leaving one of them alone in float would cost as much in conversions as it saves; "
                "only a whole region of them can gain."
            )
        yield Finding(
            "slower",
            sentence + reason,
            change,
            tuple(line.site for line in lines),
            advice,
            {
                "before_us": sum(line.before_us for line in lines),
                "after_us": sum(line.after_us for line in lines),
                "predicted_gain_us": back,
                "gaining": [line.site for line, _ in gaining],
                "conversion_us_per_element": case.rate,
            },
        )


def _slow_reason(case: _Case, lines: Sequence[Line]) -> tuple[str, str]:
    """What the machine or the form has to do with it, and the cure of that."""
    facts = case.facts
    int8 = all(main_row(line.after)["precision"] == "int8" for line in lines)
    multiplies = any(line.macs for line in lines)
    if not int8 or not multiplies:
        return "", ""
    if not facts.capabilities.int8_dot_product:
        instruction = "VNNI" if facts.x86 else "the dot-product extension"
        return (
            f" This CPU ({facts.cpu}) has no int8 dot product ({instruction}): int8 needs more "
            f"instructions for a multiply-accumulate than float.",
            "On such a CPU int8 saves memory and not time: keep the float model, or prune it.",
        )
    read = {tensor[1] for line in lines for tensor in main_row(line.after)["inputs"][:1]}
    if read == {"int8"} and facts.capabilities.activation == "uint8":
        return (
            " They read int8 activations, and the fast kernels of this CPU multiply uint8 by int8.",
            "Quantize activations as uint8 (quantize_static: activation_type=QuantType.QUInt8).",
        )
    return "", ""


def _price(case: _Case, line: Line) -> float:
    """What one site alone in float costs: its input back to float, its output to integers."""
    row = main_row(line.after)
    return case.rate * sum(_elements(shape) for shape, _ in (*row["inputs"], *row["outputs"]))


def _elements(shape: Sequence[int]) -> int:
    total = 1
    for size in shape:
        total *= abs(size)
    return total


def _conversion_rate(lines: Sequence[Line]) -> float:
    """Microseconds for each number that is converted in the compressed model."""
    us = elements = 0.0
    for line in lines:
        for row in line.after if line.after and line.after[0]["precision"] == "convert" else ():
            if row["inputs"]:
                us += line.after_us
                elements += _elements(row["inputs"][0][0])
    return us / elements if us and elements else DEFAULT_US_PER_ELEMENT


def _conversions(case: _Case) -> Iterator[Finding]:
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
            f"({case.share(after)} of {case.after.name}), {where}.",
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


def _conversion_advice(case: _Case, cause: tuple[str, ...]) -> str:
    if not cause or cause[0] in ("model input", "model output"):
        return ""
    op = cause[0]
    if case.facts.capabilities.pattern(op) is not None:
        return (
            f"{op} has an int8 form in {case.facts.runtime}: quantize what it reads and writes "
            f"(`compress run` does)."
        )
    return (
        f"{op} has no int8 kernel in {case.facts.runtime}: replace it by an operator that has, or "
        f"leave its short neighbours in float with it."
    )


def _moves(case: _Case) -> Iterator[Finding]:
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


def _own(case: _Case) -> Iterator[Finding]:
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
            f"{origin}: {names([line.name for line in lines])}.",
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


def _float(case: _Case) -> Iterator[Finding]:
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
            f"{time(after)} ({case.share(after)} of {case.after.name})"
        )
        sentence += f", because {reason}: " if reason else ": "
        sentence += f"{names([line.site for line in lines])}."
        if abs(change) > max(NOISE * before, NOISE_US):
            sentence += f" In the original they take {time(before)}."
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


def _why_float(case: _Case, line: Line) -> str:
    """The reason that was given, or what the runtime lacks."""
    if line.reason:
        return line.reason
    dressing = case.facts.dressing
    op = dressing.types.get(line.site, "") if dressing else ""
    if op and case.facts.capabilities.patterns and case.facts.capabilities.pattern(op) is None:
        return f"{op} has no int8 kernel in {case.facts.runtime}"
    return "there is no Q/DQ around" if dressing is not None and line.macs else ""


def _gain(case: _Case) -> float:
    """How much faster the layers with multiply-accumulates became in fewer bits."""
    lines = [line for line in case.lines if line.kind in ("narrow", "slower") and line.macs]
    after = sum(line.after_us for line in lines)
    return sum(line.before_us for line in lines) / after if after else 1.0


def _narrow(case: _Case) -> Iterator[Finding]:
    lines = sorted(case.of("narrow"), key=lambda line: line.change_us)
    before, after = (sum(ln.before_us for ln in lines), sum(ln.after_us for ln in lines))
    if not lines or after >= before:
        return
    precision = _joined(main_row(line.after)["precision"] for line in lines)
    sentence = (
        f"{number(len(lines), 'site')} {verb(len(lines), 'run')} in {precision} and "
        f"{verb(len(lines), 'take')} {time(after)} instead of {time(before)}, which saves "
        f"{time(before - after)}, most at {names([line.site for line in lines], 3)}."
    )
    rest = sorted(lines, key=lambda line: -line.after_us)[:3]
    sentence += f" What remains is longest at {names([ln.site for ln in rest], 3)}"
    sentence += f" ({time(sum(line.after_us for line in rest))})."
    yield Finding(
        "faster",
        sentence,
        before - after,
        tuple(line.site for line in lines),
        "",
        {"before_us": before, "after_us": after},
    )


def _outside(case: _Case) -> Iterator[Finding]:
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
            f"({case.share(second)}) lie outside of kernels: the call, memory, what runs between "
            f"kernels. In the original it is {time(first)}.",
            max(abs(second - first), NOISE_US),
            (),
            "",
            {"before_us": first, "after_us": second},
        )


def _joined(precisions: Iterator[str]) -> str:
    found = sorted(set(precisions), key=lambda p: (p in FLOATS, p))
    return " and ".join(found)


def bytes_of(rows: Sequence[Row]) -> int | None:
    """Bytes that kernels move, each once; None where the runtime does not tell."""
    found = [row["bytes"] for row in rows]
    return None if not found or any(size is None for size in found) else int(sum(found))
