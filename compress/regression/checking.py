"""The check: both sides opened, every limit judged, latency measured until the verdict is sure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from time import perf_counter
from typing import Any, get_args

from compress.data import Layout
from compress.errors import UsageError
from compress.machine import Machine, fingerprint, this_machine, versions
from compress.max_drop import parse_max_drop
from compress.metrics import Evaluator, resolve_evaluator
from compress.model import TensorSpec
from compress.progress import Progress, silent
from compress.regression.budgets import Applied, Budget, load_budget
from compress.regression.fixed import NO_BASELINE, accuracy_rows, bytes_rows, evaluate
from compress.regression.limits import MAX_DROP, MAX_SLOWDOWN, Limit, percent, show
from compress.regression.lock import measuring_alone
from compress.regression.result import CheckResult, Policy, Row, overall
from compress.regression.sequential import ALPHA, Interval
from compress.regression.subject import Subject, fresh_sides, open_pair
from compress.regression.timing import BASELINE, CANDIDATE, Judged, judge, sessions_of, threshold
from compress.side_by_side import check_same_inputs

SECONDS = 60.0
PACKAGES = ("hwcompress", "onnxruntime", "openvino", "executorch", "torch", "numpy")
METHOD = (
    "Both sides are built anew for each pair and timed in turns; the pair is the unit. Signed-rank "
    "intervals of the pairs' log ratios (order statistics for absolute times), with an error of "
    f"at most {ALPHA:.1%} on each side of a limit over all looks together (alpha spending)."
)


def check(
    candidate: Path | str,
    against: Path | str | None = None,
    *,
    budget: Path | str | Budget | Mapping[str, Any] | Sequence[Any] | None = None,
    evaluate_on: Any = None,
    max_slowdown: str | float | None = None,
    max_drop: str | float | None = None,
    cannot_tell: Policy = "pass",
    seconds: float = SECONDS,
    threads: int | None = None,
    inputs: Sequence[str | TensorSpec] = (),
    layout: Layout = "auto",
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    seed: int = 0,
    progress: Progress = silent,
) -> CheckResult:
    """Run a candidate and a baseline in turns on this machine and judge every limit.

    Args:
        candidate: artifact directory or model file.
        against: baseline directory, artifact directory or model file; without one, only absolute
            limits can be judged.
        budget: a budgets.yaml, or one of its entries, or a list of them.
        evaluate_on: labelled data or a function, as `--eval` takes them.
        max_slowdown: largest rise of the median latency, "2.5%" or 0.025; goes before the budget.
        max_drop: largest loss of accuracy, as `compress run` takes it; goes before the budget.
        cannot_tell: whether a verdict "cannot tell" lets the candidate pass.
        seconds: longest time to measure latency.
        threads: of one operator; None takes what the sides were recorded with.
        inputs: shapes that a model file leaves open.
        layout: axes of the images in the data.
        mean: subtracted from the data.
        std: divides the data.
        seed: of everything random.
        progress: opens trackers.

    Raises:
        UsageError: options or budget are not allowed, or the sides take different inputs.
        LoadError: a side is missing, damaged or changed.
        UnsupportedError: a runtime is not installed.
        DataError: the evaluation data do not fit.
        EngineError: a side failed.
    """
    _check_options(against, budget, cannot_tell, seconds)
    given = load_budget(budget) if budget is not None else Budget(())
    overriding = _overriding(max_slowdown, max_drop)
    own, other, notes = open_pair(candidate, against, threads=threads, inputs=inputs)
    if other is not None:
        check_same_inputs((own.name, other.name), other.engine, own.engine)
    evaluator = None
    if evaluate_on is not None:
        evaluator = resolve_evaluator(
            evaluate_on, own.engine.inputs, layout=layout, mean=mean, std=std
        )
    return check_sides(
        own,
        other,
        budget=given,
        overriding=overriding,
        evaluator=evaluator,
        cannot_tell=cannot_tell,
        seconds=seconds,
        seed=seed,
        notes=notes,
        progress=progress,
    )


def check_sides(
    own: Subject,
    other: Subject | None,
    *,
    budget: Budget,
    overriding: Sequence[Limit] = (),
    evaluator: Evaluator | None = None,
    cannot_tell: Policy = "pass",
    seconds: float = SECONDS,
    seed: int = 0,
    notes: Sequence[str] = (),
    progress: Progress = silent,
) -> CheckResult:
    """The check of sides that are open.

    Args:
        own: the candidate.
        other: the baseline, which takes the same inputs.
        budget: limits by target and machine.
        overriding: limits that go before those of the budget.
        evaluator: scores both sides.
        cannot_tell: whether a verdict "cannot tell" lets the candidate pass.
        seconds: longest time to measure latency.
        seed: of everything random.
        notes: that the result begins with.
        progress: opens trackers.

    Raises:
        DataError: the evaluation data do not fit.
        EngineError: a side failed.
    """
    start, machine = perf_counter(), this_machine()
    applied = budget.applied(own.targets, fingerprint(machine))
    limits = _limits(applied, overriding, evaluator is not None, other is not None)
    scores = evaluate(own, other, evaluator, seed, progress)
    accuracy = accuracy_rows(scores, [one for one in limits if one.metric == "accuracy"], other)
    sizes = bytes_rows(own, other, limits)
    timed = [one for one in limits if one.latency and (one.absolute or other is not None)]
    sides = {CANDIDATE: own} if other is None else {BASELINE: other, CANDIDATE: own}
    with measuring_alone(progress) as waited:
        sessions = sessions_of(fresh_sides(sides, seed), seed)
        judged = judge(sessions, timed, seconds=seconds, progress=progress)
    latency = _latency_rows(judged, timed, limits, other)
    rows = (*latency, *accuracy, *sizes, *_elsewhere(applied))
    return CheckResult(
        candidate=own.name,
        baseline=other.name if other else "",
        verdict=overall(rows),
        cannot_tell=cannot_tell,
        rows=rows,
        notes=(*notes, *waited, *_notes(own, other, machine, budget, judged)),
        pairs=len(judged.pairs),
        looks=judged.looks,
        seconds=perf_counter() - start,
        method=METHOD,
        machine=machine.to_dict(),
        versions=versions(*PACKAGES),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def _check_options(against: object, budget: object, cannot_tell: object, seconds: float) -> None:
    if against is None and budget is None:
        raise UsageError(
            "There is nothing to check against. Give --against BASELINE, or a --budget with "
            "absolute limits."
        )
    if cannot_tell not in get_args(Policy):
        raise UsageError(f"--cannot-tell {cannot_tell} does not exist; choose pass or fail.")
    if not (math.isfinite(seconds) and 0.5 <= seconds <= 3600):
        raise UsageError(f"--time {seconds} is out of range: 0.5 to 3600 seconds.")


def _overriding(max_slowdown: object, max_drop: str | float | None) -> list[Limit]:
    """Limits that options give."""
    found = []
    if max_slowdown is not None:
        number = isinstance(max_slowdown, (int, float)) and not isinstance(max_slowdown, bool)
        try:
            value = float(max_slowdown) if number else percent(max_slowdown)  # type: ignore[arg-type]
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and 0 <= value <= 10):
            raise UsageError(
                f"--max-slowdown {max_slowdown} is no slow-down. Write a share of the baseline's "
                f"latency with its sign, for example 5%."
            )
        found.append(Limit("latency_p50", "max_slowdown", value))
    if max_drop is not None:
        drop = parse_max_drop(max_drop)
        found.append(Limit("accuracy", "max_drop", drop.fraction, drop.relative))
    return found


def _limits(
    applied: Applied, overriding: Sequence[Limit], evaluated: bool, compared: bool
) -> tuple[Limit, ...]:
    """Options before budget before defaults."""
    found = {(one.metric, one.kind): one for one in (*applied.limits, *overriding)}
    defaults = []
    if compared:
        defaults.append(Limit("latency_p50", "max_slowdown", MAX_SLOWDOWN))
        if evaluated:
            defaults.append(Limit("accuracy", "max_drop", MAX_DROP))
    for one in defaults:
        key = (one.metric, one.kind)
        if key not in applied.lifted:
            found.setdefault((one.metric, one.kind), one)
    return tuple(found.values())


def _latency_rows(
    judged: Judged, timed: Sequence[Limit], limits: Sequence[Limit], other: Subject | None
) -> list[Row]:
    rows = []
    for metric in ("latency_p50", "latency_p90"):
        mine = [one for one in timed if one.metric == metric]
        if not any(not one.absolute for one in mine):
            rows.append(_measured_row(judged, metric, other))
        rows += [_judged_row(judged, one, other) for one in mine]
        rows += [
            Row(metric=metric, limit=str(one), verdict="cannot tell", reason=NO_BASELINE)
            for one in limits
            if one.metric == metric and one not in timed
        ]
    return rows


def _sides(judged: Judged, metric: str, compared: bool) -> Row:
    """A row with the middle values of the sides."""
    quantile = metric.removeprefix("latency_")
    middle = {side: judged.pairs.middle_ms(side, quantile) for side in judged.pairs.sides}
    return Row(
        metric=metric,
        candidate=show("latency_p50", middle[CANDIDATE]),
        baseline=show("latency_p50", middle[BASELINE]) if compared else "",
    )


def _measured_row(judged: Judged, metric: str, other: Subject | None) -> Row:
    """What was measured where nothing limits the ratio."""
    row = _sides(judged, metric, other is not None)
    if other is None:
        return row
    ratio = judged.pairs.ratio(metric.removeprefix("latency_"), judged.alpha)
    return replace(row, unit="x", **_ends(ratio))


def _judged_row(judged: Judged, limit: Limit, other: Subject | None) -> Row:
    found = judged.pairs.interval(limit, judged.alpha)
    row = replace(
        _sides(judged, limit.metric, other is not None and not limit.absolute),
        limit=str(limit),
        unit="ms" if limit.absolute else "x",
        **_ends(found),
    )
    match found.standing(threshold(limit)):
        case "within":
            return replace(row, verdict="pass")
        case "beyond":
            return replace(row, verdict="fail")
        case _:
            return replace(row, verdict="cannot tell", reason=_why_open(judged))


def _why_open(judged: Judged) -> str:
    pairs = len(judged.pairs)
    if judged.looks == 0:
        needed = judged.seconds / pairs * judged.wanted
        return (
            f"Only {pairs} pairs of sessions fitted into the time, and {judged.wanted} are needed "
            f"at least. Give --time {math.ceil(needed * 1.3)} or more."
        )
    return (
        f"After {pairs} pairs of sessions the interval still holds the limit. Give more --time, a "
        f"quieter machine, or a limit farther from what is measured."
    )


def _ends(found: Interval) -> dict[str, Any]:
    """JSON has no infinity: an open end is none."""
    return {
        "value": found.value,
        "low": found.low if math.isfinite(found.low) and found.low > 0 else None,
        "high": found.high if math.isfinite(found.high) else None,
    }


def _elsewhere(applied: Applied) -> list[Row]:
    return [
        Row(metric=limit.metric, limit=str(limit), verdict="not judged here", reason=reason)
        for limit, reason in applied.elsewhere
    ]


def _notes(
    own: Subject, other: Subject | None, machine: Machine, budget: Budget, judged: Judged
) -> tuple[str, ...]:
    found = [*own.remarks(), *judged.pairs.notes]
    unknown = budget.targets - set(own.targets)
    if unknown and budget.targets and not budget.targets & set(own.targets):
        found.append(
            f"The budget has entries for {', '.join(sorted(unknown))} and none for the "
            f"candidate's target, {own.targets[0]}."
        )
    record = other.record if other else None
    if record is not None and record.machine["fingerprint"] != fingerprint(machine):
        found.append(
            f"The baseline was recorded on another machine ({record.machine.get('cpu', '?')}, "
            f"{record.machine['fingerprint']}); its recorded times were not used. Both sides were "
            f"measured here."
        )
    if record is not None:
        now = versions(*record.versions)
        changed = [
            f"{name} {before}, now {now.get(name, 'missing')}"
            for name, before in record.versions.items()
            if now.get(name) != before
        ]
        if changed:
            found.append(f"Since the baseline was recorded: {'; '.join(changed)}.")
    return tuple(found)
