"""`compress explain`: why a model is as fast as it is beside the one that it was made from."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from compress import artifact
from compress.errors import CompressError, UsageError
from compress.explaining import Explanation, Finding, Side
from compress.explaining.bounds import memory
from compress.explaining.case import Facts
from compress.explaining.dressing import Dressing, dressing
from compress.explaining.findings import find, headline, nothing
from compress.explaining.lines import Known, Table, other_names, tabulate
from compress.explaining.pair import (
    Opened,
    Pair,
    find_original,
    measure_pair,
    open_model,
    peaks_of,
    sides_of_report,
)
from compress.explaining.scaling import batch_findings, delegate_findings, thread_findings
from compress.explaining.widths import width_findings
from compress.machine import this_machine
from compress.progress import Progress, silent
from compress.registry import create_target
from compress.sessions import SESSIONS
from compress.target import Capabilities

DEFAULT_SECONDS = 6.0
_PROBE_SECONDS = 1.0
_SHARE_OF_PROFILER = 0.1
"""Of the latency; a profiler that adds more is worth a note."""


def explain(
    compressed: Any,
    *,
    against: Any = None,
    target: str = "cpu",
    threads: int | None = None,
    batch: int | None = None,
    inputs: Sequence[str] = (),
    seconds: float = DEFAULT_SECONDS,
    quick: bool = False,
    seed: int = 0,
    progress: Progress = silent,
) -> Explanation:
    """Say where the time of a compressed model goes, beside the original.

    Both are profiled and timed in turns on this machine, in the artifact's own runtime. Where an
    artifact's original is not at hand, what its report keeps is explained, measured then.

    Args:
        compressed: an artifact's directory, or a model that any tool made, as `compress.run`
            takes models.
        against: the original, a model or an artifact. An artifact finds its own by the command
            that its report keeps and the hash of the file.
        target: that runs two model files; of several runtimes, the first.
        threads: of one operator; None takes the artifact's own, or all cores.
        batch: of one run; None takes the artifact's own, or 1.
        inputs: shapes that a model file does not say, as `--input` takes them.
        seconds: for the latencies of both together.
        quick: one session, and without what is measured beside the two models: peaks of the
            machine, widths of layers, other numbers of threads, a batch.
        seed: of inputs and order.
        progress: opens a tracker for each step.

    Raises:
        UsageError: there is nothing to compare with, or the models take different inputs.
        LoadError: a model or an artifact cannot be read.
        EngineError: one of them does not run.
    """
    report: Mapping[str, Any] = {}
    if isinstance(compressed, str | Path) and Path(compressed).is_dir():
        report = artifact.read_report(Path(compressed))
    elif against is None:
        raise UsageError(
            f"{compressed} is no artifact, so nothing says what it was made from. Give the "
            f"original: compress explain {compressed} --against MODEL."
        )
    if against is None and report.get("chosen") == _original(report):
        return _from_report(Path(compressed), report)
    after = open_model(compressed, target=target, threads=threads, inputs=inputs)
    before = _opened_original(against, after, Path(compressed) if report else None, inputs)
    if before is None:
        return _from_report(Path(compressed), report)
    size = batch or int(report.get("latency", {}).get("batch", 1))
    pair = measure_pair(
        before,
        after,
        batch=size,
        seconds=seconds,
        sessions=1 if quick else SESSIONS,
        seed=seed,
        progress=progress,
    )
    known, facts = _known(before, after, report)
    facts = dataclasses.replace(facts, steady=pair.steady)
    table = tabulate(pair.before, pair.after, known)
    findings = find(pair.before, pair.after, table, facts)
    findings += nothing(pair.before, pair.after, table)
    findings += delegate_findings(pair.kernels)
    if not quick:
        findings += _probed(before, after, pair, table, seed=seed, progress=progress)
    ratio = pair.ratio
    interval = (ratio.low, ratio.high)
    machine = this_machine()
    return Explanation(
        pair.before,
        pair.after,
        dataclasses.asdict(ratio),
        headline(pair.before, pair.after, table.parts, interval),
        tuple(sorted(findings, key=lambda f: -f.us)),
        table.parts,
        table.lines,
        f"measured now ({_today()}) on {machine.cpu}, {_threads(after)}, batch {size}",
        (*pair.notes, *_notes(pair.before, pair.after, table)),
    )


def _opened_original(
    against: Any, after: Opened, directory: Path | None, inputs: Sequence[str]
) -> Opened | None:
    """The original: as given, or as the artifact's report tells; None where that leads nowhere."""
    threads = getattr(after.target, "threads", None)
    if against is not None or directory is None:
        return open_model(against, threads=threads, like=after, inputs=inputs)
    found = find_original(directory, after.report)
    if found is None:
        return None
    shapes = inputs or tuple(after.report["model"].get("inputs", ()))
    try:
        return open_model(found, threads=threads, like=after, inputs=shapes)
    except CompressError:  # such as weights alone, whose network the report cannot build
        return None


def _original(report: Mapping[str, Any]) -> str:
    candidates = report.get("candidates") or [{"name": ""}]
    return str(candidates[0]["name"])


def _known(before: Opened, after: Opened, report: Mapping[str, Any]) -> tuple[Known, Facts]:
    capabilities = after.target.capabilities
    dressed = None
    if after.model is not None and after.target.name.startswith("onnxruntime"):
        dressed = dressing(after.model.graph_model, capabilities)
    known = Known(
        {site.name: site.op_type for site in before.sites},
        {row["name"]: row["reason"] for row in report.get("sites", ()) if row["reason"]},
        dressed,
        other_names(before.sites, after.sites),
    )
    depthwise = frozenset(
        site.name
        for site in before.sites
        if site.groups > 1 and site.weight is not None and site.weight[1] == 1
    )
    return known, _facts(after.target.name, capabilities, dressed, depthwise)


def _facts(
    runtime: str,
    capabilities: Capabilities,
    dressed: Dressing | None,
    depthwise: frozenset[str],
) -> Facts:
    machine = this_machine()
    return Facts(runtime, capabilities, machine.cpu, machine.is_x86, dressed, depthwise)


def _probed(
    before: Opened, after: Opened, pair: Pair, table: Table, *, seed: int, progress: Progress
) -> list[Finding]:
    """What further measurements tell."""
    if not pair.after.rows:
        return []
    found: list[Finding] = []
    peaks = peaks_of(before.target, progress)
    if peaks is not None:
        found += memory(table.lines, peaks, pair.after.latency_us)
    shaped = {site.name: site for site in before.sites}
    pruned = {site.name: site for site in after.sites if site.weight is not None}
    found += width_findings(
        table.lines,
        [*{**shaped, **pruned}.values()],
        after.target,
        pair.after.latency_us,
        seconds=_PROBE_SECONDS,
        progress=progress,
    )
    with progress("Measuring threads and batch", total=2) as advance:
        found += thread_findings(after, seconds=_PROBE_SECONDS, seed=seed)
        advance(1, "threads")
        found += batch_findings(after, seconds=_PROBE_SECONDS, seed=seed)
        advance(1, "batch")
    return found


def _from_report(directory: Path, report: Mapping[str, Any]) -> Explanation:
    """What the report of an artifact tells, measured when it was written."""
    before, after = sides_of_report(directory, report)
    types = {row["name"]: row["op_type"] for row in report["sites"]}
    stays = {row["name"]: row["reason"] for row in report["sites"] if row["reason"]}
    table = tabulate(before, after, Known(types, stays))
    facts = _facts(after.runtime, create_target(after.runtime).capabilities, None, frozenset())
    machine = report["machine"]
    facts = dataclasses.replace(facts, cpu=machine["cpu"])
    findings = find(before, after, table, facts) + nothing(before, after, table)
    candidate = next(c for c in report["candidates"] if c["name"] == after.name)
    speedup = dict(candidate["speedup"] or {"value": before.latency_us / after.latency_us})
    notes = list(_notes(before, after, table))
    if report["chosen"] == before.name:
        notes.insert(
            0,
            f"The artifact is the original as it came in: nothing that was allowed is faster. "
            f"This explains {after.name}, the best of the others.",
        )
    if before.runtime != after.runtime:
        notes.append(
            f"The original was measured in {before.runtime} and {after.name} in {after.runtime}: "
            f"what the runtime alone changes is among the differences. With --against MODEL both "
            f"run in {after.runtime}."
        )
    return Explanation(
        before,
        after,
        speedup,
        headline(before, after, table.parts),
        tuple(sorted(findings, key=lambda f: -f.us)),
        table.parts,
        table.lines,
        f"measured then ({report['created']}) on {machine['cpu']}, from {directory}/"
        f"{artifact.REPORT}: the original is not at hand",
        tuple(notes),
    )


def _notes(before: Side, after: Side, table: Table) -> tuple[str, ...]:
    """What a reader must know about the times of kernels."""
    notes = []
    for side in (before, after):
        if not side.rows:
            notes.append(
                f"{side.runtime} tells no times of kernels: only the latencies are explained."
            )
    for side, settled in zip((before, after), table.settled, strict=True):
        spent = sum(row["p50_us"] for row in side.rows)
        if settled.scaled:
            notes.append(
                f"Under the profiler {side.name} takes {spent:.0f} µs and {side.latency_us:.0f} µs "
                f"without, and nothing that is the same for each kernel explains that: its "
                f"kernels are told in proportion, and what is said of single ones is uncertain."
            )
        elif settled.profiler_us * len(side.rows) > _SHARE_OF_PROFILER * side.latency_us:
            notes.append(
                f"Under the profiler the {len(side.rows)} kernels of {side.name} take "
                f"{spent - side.latency_us:.0f} µs more than the whole model does without: "
                f"{settled.profiler_us:.1f} µs of each are taken for the profiler's own."
            )
    return tuple(dict.fromkeys(notes))


def _threads(opened: Opened) -> str:
    threads = getattr(opened.target, "threads", None) or this_machine().cores
    return f"{threads} thread" + ("s" if threads != 1 else "")


def _today() -> str:
    return datetime.now(UTC).isoformat(timespec="minutes")
