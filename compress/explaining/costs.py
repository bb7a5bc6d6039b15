"""Sentences about operators that cost more than in the original: not fused, or slower."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

from compress.explaining import Finding, Line
from compress.explaining.case import Case, elements, joined, layout
from compress.explaining.lines import NOISE_US, main_row
from compress.explaining.words import names, number, of_several, time, verb


def unfused(case: Case) -> Iterator[Finding]:
    """Operators in float between Q/DQ that were not fused, by what stands in the way."""
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
        sentence += f", because {said(reason, len(own))}: " if reason else ": "
        sentence += f"{names(sites)}."
        if others:
            spent = sum(line.after_us for line in others)
            sentence += (
                f" {number(len(others), 'kernel')} around {'them' if len(own) > 1 else 'it'} "
                f"{verb(len(others), 'take')} another {time(spent)}."
            )
        if constants:
            sentence += (
                f" {number(len(constants), 'weight')} {verb(len(constants), 'are')} dequantized "
                f"at every call, so that no kernel can be chosen for "
                f"{'them' if len(constants) > 1 else 'it'} ahead."
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


def said(reason: str, count: int) -> str:
    """A reason, said of one or of several."""
    return reason if count == 1 else of_several(reason)


def _widens_constant(line: Line) -> bool:
    rows = line.after
    return bool(rows) and rows[0]["precision"] == "convert" and not rows[0]["inputs"]


def slower(case: Case) -> Iterator[Finding]:
    """Kernels in fewer bits that take longer than in float, by operator."""
    groups: dict[str, list[Line]] = defaultdict(list)
    for line in case.of("slower"):
        groups[case.what(line)].append(line)
    for kind, lines in groups.items():
        lines = sorted(lines, key=lambda line: -line.change_us)
        change = sum(line.change_us for line in lines)
        precision = joined(main_row(line.after)["precision"] for line in lines)
        wide = joined(main_row(line.before)["precision"] for line in lines)
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
        if not any(line.macs for line in lines):
            sentence += layout(lines)
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


def _slow_reason(case: Case, lines: Sequence[Line]) -> tuple[str, str]:
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


def _price(case: Case, line: Line) -> float:
    """What one site alone in float costs, in conversions and moves at its two borders.

    A conversion that serves this site alone goes away with it, and with the one from float before
    it the border.
    """
    row = main_row(line.after)
    name = str(row["site"])
    read, written = (sum(elements(shape) for shape, _ in row[key]) for key in ("inputs", "outputs"))
    price = (case.rate + case.moving) * written
    ends = case.facts.dressing.ends if case.facts.dressing else {}
    narrowing = [one for one in case.of("convert") if "Dequantize" not in one.op_type]
    ahead = [one for one in narrowing if name in _ends(one, ends)[1]]
    price += 0.0 if ahead else (case.rate + case.moving) * read
    narrow = {str(main_row(one.after)["site"]) for one in case.lines if one.after and one.site}
    for one in ahead:
        others = [reader for reader in _ends(one, ends)[1] if reader in narrow and reader != name]
        price -= one.after_us if not others else 0.0
    behind = [one for one in case.of("convert") if "Dequantize" in one.op_type]
    price -= sum(one.after_us for one in behind if _ends(one, ends)[0] == (name,))
    return price


def _ends(
    line: Line, ends: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    row = (line.after or line.before)[0]
    return ends.get(str(row["kernel"]), ends.get(str(row["site"]), ((), ())))
