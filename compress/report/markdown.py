"""`report.md`: the report for people and for pull requests."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from compress.report import Candidate, Report
from compress.report.steps import step_lines
from compress.report.table import (
    COLUMNS,
    DEVICES,
    LADDER,
    PREDICTED,
    TRIED,
    WATERLINE,
    WATERLINES,
    candidate_row,
    device_rows,
    fidelity,
    float_sites,
    gap,
    ladder_row,
    memory_sentence,
    predicted_row,
    predicted_sentence,
    region_table,
    sensitivity_sentence,
    sensitivity_table,
    tried_row,
    waterline_row,
)

_REGIONS = (
    "Predicted from profiles of the uniform engines, scaled to their latencies; the placement was "
    "chosen by measuring whole models."
)


def markdown(report: Report) -> str:
    """The whole report as Markdown."""
    model, target = report.model, report.target
    lines = [f"# {model['name']} on {target['name']}: {report.chosen or 'not built'}", ""]
    lines += [f"- {sentence}" for sentence in report.headline]
    lines += ["", "## Candidates", ""]
    rows = [candidate_row(c, c.name == report.chosen) for c in report.candidates]
    lines += table(COLUMNS, rows)
    for candidate in report.candidates:
        if candidate.fidelity is not None:
            lines += ["", f"{candidate.name} against the original: {fidelity(candidate.fidelity)}."]
    peaks = [memory_sentence(c.name, c.memory) for c in report.candidates if c.memory]
    lines += ["", *(f"- {sentence}" for sentence in peaks)] if peaks else []
    lines += _image(report, "gap")
    if report.gap:
        lines += ["", gap(report.gap)]
    if report.ladder:
        lines += ["", "## Repair of the accuracy", ""]
        lines += table(LADDER, [ladder_row(row) for row in report.ladder])
    if report.devices:
        lines += ["", "## Devices", "", *table(DEVICES, device_rows(report))]
    lines += ["", _latency(report)]
    if report.tried:
        lines += ["", "## What was tried", ""]
        lines += table(TRIED, [tried_row(row) for row in report.tried])
    if report.prepared:
        lines += ["", "## Before the build", "", *_prepared(report.prepared)]
    if report.predicted:
        lines += ["", f"## Predicted on {report.predicted['device']['name']}", ""]
        lines += [predicted_sentence(report.predicted), ""]
        lines += [*table(PREDICTED, map(predicted_row, report.predicted["rows"])), ""]
        facts = report.predicted["device"]["facts"].items()
        lines += [f"- {name}: {f['value']:g} ({f['kind']}: {f['source']})" for name, f in facts]
    if report.regions:
        columns, cells = region_table(report)
        lines += ["", f"## Regions ({report.target['name']})", ""]
        lines += [_REGIONS, "", *table(columns, cells)]
    lines += _kernels(report)
    if report.sensitivity:
        columns, cells = sensitivity_table(report)
        lines += ["", "## Sensitivity", "", sensitivity_sentence(report), ""]
        lines += [*table(columns, cells), *_image(report, "sensitivity")]
    lines += ["", "## Sites", ""]
    lines += _sites(report)
    lines += ["", "## Steps", ""]
    for step in report.steps:
        lines += step_lines(step)
    lines += ["", "## Where and how", ""]
    machine = report.machine
    facts = {
        "model": f"{model['source']} (sha256 {model['sha256'][:16] or 'none'})",
        "machine": f"{machine['cpu']}, {machine['cores']} cores, {', '.join(machine['features'])}",
        "fingerprint": machine["fingerprint"],
        "versions": ", ".join(f"{k} {v}" for k, v in report.versions.items()),
        "command": f"`{report.command}`" if report.command else "Python API",
        "created": report.created,
    }
    lines += [f"- {key}: {value}" for key, value in facts.items()]
    lines += [f"- file `{name}`: sha256 {digest}" for name, digest in report.files.items()]
    return "\n".join(lines) + "\n"


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """A Markdown table."""
    body = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns), *body]


def _prepared(prepared: Mapping[str, Any]) -> list[str]:
    """What `compress run` found on the machine that could not build."""
    lines = [f"- {sentence}" for sentence in prepared["headline"]]
    rows = [candidate_row(Candidate(**one), chosen=False) for one in prepared["candidates"]]
    return [
        *lines,
        f"- on {prepared['machine']['cpu']}, {prepared['created']}",
        "",
        *table(COLUMNS, rows),
    ]


def _kernels(report: Report) -> list[str]:
    """Where the time goes: waterlines as a table, and the plots."""
    lines: list[str] = []
    if report.waterlines:
        rows = [waterline_row(name, one) for name, one in report.waterlines.items()]
        lines += ["", WATERLINES, "", *table(WATERLINE, rows)]
    for kind in ("kernels", "roofline", "waterline"):
        lines += _image(report, kind)
    lines += [line for text in report.unplotted.values() for line in ("", text)]
    return ["", "## Where the time goes", *lines] if lines else []


def _image(report: Report, kind: str) -> list[str]:
    return ["", f"![{kind}]({report.plots[kind]})"] if kind in report.plots else []


def _latency(report: Report) -> str:
    latency = report.latency
    if not report.built:
        return "Latency: not measured, since no engine is built."
    notes = " ".join(latency["notes"])
    device = f" on {latency['device']}" if report.devices else ""
    return (
        f"{_objective(latency)}{device}: batch {latency['batch']}, {latency['threads']} threads, "
        f"{latency['rounds']} interleaved rounds in {latency['sessions']} sessions and "
        f"{latency['seconds']:.1f} s; the intervals span the sessions' 95 % bootstrap intervals. "
        f"{notes}"
    ).rstrip()


def _objective(latency: Mapping[str, Any]) -> str:
    if latency["objective"] == "latency":
        return "Latency"
    return f"Time per request with {latency['requests']} requests in each call (throughput)"


def _sites(report: Report) -> list[str]:
    total = sum(row["macs"] for row in report.sites)
    left = float_sites(report)
    verb = "run" if report.built else "are to run"
    if not total:
        return ["The model has no multiply-accumulates."]
    if not left:
        return [f"All {total / 1e6:.1f} M multiply-accumulates {verb} in int8."]
    negated = "do not run" if report.built else "are not to run"
    lines = [f"Multiply-accumulates that {negated} in int8, and why:", ""]
    rows = [(r["name"], r["op_type"], f"{r['macs'] / total:.2%}", r["reason"]) for r in left]
    return lines + table(("site", "operator", "share of MACs", "reason"), rows)
