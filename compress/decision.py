"""Which candidate becomes the artifact, and why: never worse than what came in."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from compress.candidates import FLOAT, Limits, Measured
from compress.memory.limit import show_memory
from compress.report import Candidate


@dataclass(frozen=True)
class Decision:
    """Which candidate becomes the artifact, whether the budget is met, and why in words."""

    chosen: str
    met: bool
    sentences: tuple[str, ...]

    def after(self, sentence: str, repaired: bool) -> Decision:
        """The same after a repair, which a reader must know about first."""
        return Decision(self.chosen, self.met and repaired, (sentence, *self.sentences))

    def explained(self, sentence: str) -> Decision:
        """The same with a sentence behind the first."""
        first, *others = self.sentences
        return dataclasses.replace(self, sentences=(first, sentence, *others))


def choose(measured: Measured, limits: Limits) -> Decision:
    """The fastest allowed candidate; the original where none is faster with confidence.

    Where the original needs more memory than is allowed, the fastest that does not.
    """
    if not measured.all[0].candidate.allowed:
        return _within_memory(measured, limits)
    best, fastest = FLOAT, 1.0
    sentences = [f"{name} failed: {reason}" for name, reason in measured.failures.items()]
    for one in measured.all[1:]:
        candidate, ratio = one.candidate, one.candidate.speedup
        faster = ratio is not None and ratio["verdict"] == "faster"
        sentences.append(_sentence(candidate, faster, limits))
        if ratio is not None and faster and candidate.allowed and ratio["value"] > fastest:
            best, fastest = candidate.name, ratio["value"]
    asked = _asked_for(measured)
    if asked is not None:
        return dataclasses.replace(asked, sentences=(*sentences, *asked.sentences))
    chosen = measured.built(best).candidate
    speed = float(chosen.speedup["low"]) if chosen.speedup else 1.0
    met = best != FLOAT and speed >= (limits.min_speedup or 0)
    if best == FLOAT:
        sentences.append("The artifact is the original float32 model: no candidate is better.")
    elif not met:
        sentences.append(
            f"Budget not met: --min-speedup {limits.min_speedup:g} is not within reach with "
            f"confidence; the best measured is {chosen.speedup['value']:.2f}x "  # type: ignore[index]
            f"(at least {speed:.2f}x). The artifact is that best."
        )
    return Decision(best, met, tuple(sentences))


def _asked_for(measured: Measured) -> Decision | None:
    """The fastest allowed candidate of those made for size or numbers, if that was asked for."""
    asked = [one.candidate for one in measured.all if one.candidate.buys != "speed"]
    allowed = [one for one in asked if one.allowed]
    if not allowed:
        if not asked:
            return None
        sentence = (
            f"Budget not met: {asked[0].precision} loses more than --max-drop allows. The artifact "
            f"is the original float32 model."
        )
        return Decision(FLOAT, False, (sentence,))
    if allowed[0].buys == "device":
        return _for_device(measured, allowed)
    best = max(allowed, key=lambda one: one.speedup["value"] if one.speedup else 0.0)
    if best.buys == "numbers":
        sentence = (
            f"Simulated: {best.name} computes in float32 the numbers that the format would give. "
            f"Its size and latency say nothing about a device that has the format."
        )
    else:
        sentence = (
            f"On this target {best.precision} buy size and no speed: {_saved(measured, best)}."
        )
    return Decision(best.name, True, (sentence,))


def _within_memory(measured: Measured, limits: Limits) -> Decision:
    """The fastest candidate that fits, whether or not it is faster than the original."""
    sentences = [f"{name} failed: {reason}" for name, reason in measured.failures.items()]
    for one in measured.all[1:]:
        ratio = one.candidate.speedup
        faster = ratio is not None and ratio["verdict"] == "faster"
        sentences.append(_sentence(one.candidate, faster, limits))
    limit = show_memory(limits.max_memory or 0)
    allowed = [one.candidate for one in measured.all if one.candidate.allowed]
    if allowed:
        best = max(allowed, key=lambda one: one.speedup["value"] if one.speedup else 0.0)
        speed = float(best.speedup["low"]) if best.speedup else 0.0
        sentence = (
            f"The artifact is {best.name}: it is the fastest whose activations fit into {limit} "
            f"({show_memory(best.memory['bytes'])}); the original needs "
            f"{_needed(measured.all[0].candidate)}."
        )
        return Decision(best.name, speed >= (limits.min_speedup or 0), (sentence, *sentences))
    known = [one.candidate for one in measured.all if one.candidate.memory.get("bytes")]
    if not known:
        why = measured.all[0].candidate.memory["how"]
        sentence = f"Budget not met: whether anything fits into {limit} is {why}."
        return Decision(FLOAT, False, (sentence, *sentences))
    least = min(known, key=lambda one: int(one.memory["bytes"]))
    fits = "and loses more than --max-drop allows" if least.memory["fits"] else "the least"
    sentence = (
        f"Budget not met: nothing that is allowed fits into --max-memory {limit}. {least.name} "
        f"needs {_needed(least)}, {fits}. The artifact is the original float32 model."
    )
    return Decision(FLOAT, False, (sentence, *sentences))


def _needed(candidate: Candidate) -> str:
    """Peak memory with the operator where it occurs."""
    facts = candidate.memory
    if facts.get("bytes") is None:
        return "an amount that is not known"
    where = f" at {facts['operator']} ({facts['op_type']})" if facts.get("operator") else ""
    return f"{show_memory(facts['bytes'])}{where}"


def _for_device(measured: Measured, allowed: Sequence[Candidate]) -> Decision:
    """The smallest: fewer bytes to move, and the device's int8 instructions where it has them."""
    best = min(allowed, key=lambda one: one.size_bytes)
    if best.precision == "float32":
        sentence = "The artifact is float32: nothing in fewer bits is within --max-drop."
        return Decision(best.name, False, (sentence,))
    sentence = (
        f"The artifact is {best.precision}, chosen without a measurement on the device: "
        f"{_saved(measured, best)}."
    )
    return Decision(best.name, True, (sentence,))


def _saved(measured: Measured, best: Candidate) -> str:
    whole = measured.all[0].candidate.size_bytes
    return (
        f"{best.size_bytes / 1e6:.3g} MB instead of {whole / 1e6:.3g} MB, "
        f"{whole / best.size_bytes:.1f} times smaller"
    )


def _sentence(candidate: Candidate, faster: bool, limits: Limits) -> str:
    if candidate.buys == "numbers":
        return _loss_sentence(candidate)
    ratio = candidate.speedup or {"value": 1.0, "low": 1.0, "high": 1.0, "verdict": "cannot tell"}
    interval = f"{ratio['value']:.2f}x [{ratio['low']:.2f}, {ratio['high']:.2f}]"
    speed = {
        "faster": f"is {interval} as fast as the original",
        "slower": f"is slower than the original ({interval})",
        "cannot tell": f"cannot be told from the original in speed ({interval})",
    }[str(ratio["verdict"])]
    if candidate.buys == "device":
        speed += " on this machine"
    if candidate.score is None:
        reason = "no --eval" if limits.max_drop is None else "a faster one keeps the limit"
        return f"{candidate.name} {speed}; accuracy was not verified ({reason})."
    loss = ""
    if candidate.drop is not None:
        points = candidate.drop["points"]
        loss = f" and {'gains' if points < 0 else 'loses'} {abs(points):.2f} points of top-1"
    limit = _broken(candidate)
    joint = loss if faster or not loss else loss.replace(" and", ", and")
    return f"{candidate.name} {speed}{joint}{limit}."


def _broken(candidate: Candidate) -> str:
    """The limit that a candidate does not keep, for the end of a sentence."""
    if candidate.memory.get("fits") is False:
        return ", and needs more than --max-memory allows"
    return "" if candidate.allowed else ", more than --max-drop allows"


def _loss_sentence(candidate: Candidate) -> str:
    if candidate.drop is None:
        return f"{candidate.name} was not judged by top-1."
    limit = _broken(candidate)
    return f"{candidate.name} loses {candidate.drop['points']:.2f} points of top-1{limit}."
