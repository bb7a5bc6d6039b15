"""Rows that no repetition changes: accuracy, size and peak memory."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from compress.memory.engines import engine_peak
from compress.metrics import Drop, Evaluator, Score, paired_drop
from compress.progress import Progress
from compress.regression.limits import Limit, Metric, show
from compress.regression.result import Row, Verdict
from compress.regression.subject import Subject

NO_BASELINE = "There is no baseline to compare with. Give --against."
UNKNOWN_BASELINE = (
    "The accuracy of the baseline is not known. Give --eval, or record the baseline with --eval."
)
UNKNOWN_MEMORY = (
    "The runtime's form of the model cannot be analysed, so its peak memory is not known."
)


@dataclass(frozen=True)
class Scores:
    """What is known of accuracy.

    Attributes:
        candidate: value, unit, n, data and sha256, or None.
        baseline: the same.
        drop: paired, where both were evaluated here.
        recorded: whether they come from reports and not from an evaluation here.
        same: both sides are the same files, so that records differ by nothing.
    """

    candidate: Mapping[str, Any] | None = None
    baseline: Mapping[str, Any] | None = None
    drop: Drop | None = None
    recorded: bool = True
    same: bool = False


def evaluate(
    candidate: Subject,
    baseline: Subject | None,
    evaluator: Evaluator | None,
    seed: int,
    progress: Progress,
) -> Scores:
    """Score both sides here, or take what their reports say.

    Raises:
        DataError: the data do not fit.
        EngineError: an engine failed.
    """
    if evaluator is None:
        if baseline is None:
            return Scores(candidate.recorded_score)
        same = candidate.hashes == baseline.hashes != ()
        return Scores(candidate.recorded_score, baseline.recorded_score, same=same)
    first = evaluator(candidate.engine, progress)
    if baseline is None:
        return Scores(_facts(first, evaluator), recorded=False)
    second = evaluator(baseline.engine, progress)
    drop = None
    if first.accuracy is not None and second.accuracy is not None:
        drop = paired_drop(second.accuracy, first.accuracy, seed=seed)
    return Scores(_facts(first, evaluator), _facts(second, evaluator), drop, recorded=False)


def _facts(score: Score, evaluator: Evaluator) -> dict[str, Any]:
    data = evaluator.data
    digest = data.sha256 if data is not None else ""
    known = {"value": score.value, "unit": score.unit, "n": score.n}
    return {**known, "data": evaluator.name, "sha256": digest}


def accuracy_rows(scores: Scores, limits: Sequence[Limit], baseline: Subject | None) -> list[Row]:
    """One row per limit; without limits one that shows what is known, if anything is."""
    own, other = scores.candidate, scores.baseline
    row = Row(metric="accuracy", candidate=_score(own), baseline=_score(other))
    if own is None:
        reason = (
            "The accuracy of the candidate is not known: its report holds none that was found in "
            "its own runtime. Give --eval."
        )
        return [
            replace(row, limit=str(one), verdict="cannot tell", reason=reason) for one in limits
        ]
    if scores.recorded:
        row = replace(row, reason=f"Recorded on {own['data']} by the artifact's own report.")
    if not limits:
        drop = scores.drop
        return [row if drop is None else replace(row, unit="points", **_points(drop))]
    return [_accuracy_row(replace(row, limit=str(one)), one, scores, baseline) for one in limits]


def _accuracy_row(row: Row, limit: Limit, scores: Scores, baseline: Subject | None) -> Row:
    own, other = scores.candidate, scores.baseline
    if own is not None and limit.kind == "min":
        kept = own["value"] >= limit.value
        verdict: Verdict = "pass" if kept else "fail"
        return replace(row, baseline="", value=own["value"], verdict=verdict)
    if own is None or other is None:
        reason = UNKNOWN_BASELINE if baseline is not None else NO_BASELINE
        return replace(row, verdict="cannot tell", reason=reason)
    if scores.recorded and (own["sha256"], own["unit"]) != (other["sha256"], other["unit"]):
        reason = (
            f"The recorded accuracies are of different data ({own['data']} and {other['data']}). "
            f"Give --eval, which scores both here."
        )
        return replace(row, verdict="cannot tell", reason=reason)
    return _drop_row(row, limit, scores, own, other)


def _drop_row(
    row: Row, limit: Limit, scores: Scores, own: Mapping[str, Any], other: Mapping[str, Any]
) -> Row:
    """A drop under its limit: pass and fail need the whole interval on one side."""
    scale = 100 if own["unit"] == "top-1" else 1
    allowed = limit.value * (abs(other["value"]) if limit.relative else 1) * scale
    value, low, high = _ends(scores, own, other, scale)
    unit = "points" if scale == 100 else ""
    row = replace(row, value=value, low=low, high=high, unit=unit)
    if low > allowed:
        return replace(row, verdict="fail")
    if high <= allowed:
        return replace(row, verdict="pass")
    reason = "The interval of the drop holds the limit. Evaluate on more samples."
    if scores.recorded:
        reason = f"{row.reason} Samples of two records cannot be paired. Give --eval, which does."
    return replace(row, verdict="cannot tell", reason=reason)


def _points(drop: Drop) -> dict[str, Any]:
    return {"value": drop.points, "low": drop.low, "high": drop.high}


def _ends(
    scores: Scores, own: Mapping[str, Any], other: Mapping[str, Any], scale: int
) -> tuple[float, float, float]:
    """Drop with its interval: paired, else from two binomial errors; a score's is exact."""
    if scores.drop is not None:
        return scores.drop.points, scores.drop.low, scores.drop.high
    value = float(other["value"] - own["value"]) * scale
    if scores.same or own["unit"] != "top-1" or not own["n"] or not other["n"]:
        return value, value, value
    variance = sum(one["value"] * (1 - one["value"]) / one["n"] for one in (own, other))
    half = 1.96 * math.sqrt(variance) * scale
    return value, value - half, value + half


def bytes_rows(
    candidate: Subject,
    baseline: Subject | None,
    limits: Sequence[Limit],
    needed: Sequence[Metric] = ("size", "peak_memory"),
) -> list[Row]:
    """Rows of size and peak memory: exact numbers, so every verdict is plain."""
    rows = []
    for metric in needed:
        find = _size if metric == "size" else _peak
        own, other = find(candidate), find(baseline) if baseline else None
        mine = [one for one in limits if one.metric == metric]
        rows += [_bytes_row(metric, one, own, other, baseline) for one in mine or (None,)]
    return rows


def _bytes_row(
    metric: Metric, limit: Limit | None, own: int | None, other: int | None, side: Subject | None
) -> Row:
    row = Row(
        metric=metric,
        limit=str(limit) if limit else "",
        baseline=show(metric, other) if other is not None else "",
        candidate=show(metric, own) if own is not None else "",
    )
    relative = limit is None or not limit.absolute
    if own is None or (relative and not other):
        if limit is None:
            return row
        reason = NO_BASELINE if own is not None and side is None else UNKNOWN_MEMORY
        return replace(row, verdict="cannot tell", reason=reason)
    if relative and other:
        row = replace(row, value=own / other, unit="x")
    else:
        row = replace(row, value=float(own), unit="bytes", baseline="")
    if limit is None or row.value is None:
        return row
    kept = row.value <= (limit.value if limit.absolute else 1 + limit.value)
    return replace(row, verdict="pass" if kept else "fail")


def _size(side: Subject) -> int:
    return side.size_bytes


def _peak(side: Subject) -> int | None:
    found = engine_peak(side.engine)
    return found.bytes if found is not None else None


def _score(known: Mapping[str, Any] | None) -> str:
    if known is None:
        return ""
    value = f"{known['value']:.2%}" if known["unit"] == "top-1" else f"{known['value']:.4g}"
    return f"{value} of {known['n']}" if known["n"] else value
