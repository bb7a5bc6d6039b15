"""The plots of a report: what each is made of, and their files beside `report.md`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compress.kernel_peaks import read_peaks
from compress.plots.source import Source, draw_all
from compress.report import Candidate, Report
from compress.report.table import METRICS, sensitivities, sensitivity_metric

ENDING = ".png"


def add_plots(report: Report, folder: Path) -> Report:
    """Write every plot into `folder`; the report with their names, and what could not be drawn.

    Raises:
        OSError: a file cannot be written.
    """
    try:
        source = plot_source(report)
    except Exception as error:  # the run is worth more than its plots
        failures = {"all": f"The plots could not be drawn: {error}"}
        return dataclasses.replace(report, plots={}, unplotted={**report.unplotted, **failures})
    drawn = draw_all(source)
    for kind, data in drawn.files.items():
        (folder / f"{kind}{ENDING}").write_bytes(data)
    return dataclasses.replace(
        report,
        plots={kind: f"{kind}{ENDING}" for kind in drawn.files},
        unplotted={**report.unplotted, **drawn.failures},
    )


def plot_source(report: Report) -> Source:
    """What can be plotted of a report.

    Raises:
        KeyError, TypeError, ValueError: the report was changed by hand.
    """
    peaks = read_peaks(report.peaks)
    chosen = report.chosen
    plain = {_plain(name) for name in report.kernels}
    names = {n: _plain(n) if len(plain) == len(report.kernels) else n for n in report.kernels}
    source = Source(
        name=report.model["name"],
        tables={names[name]: table for name, table in report.kernels.items()},
        untimed=(_plain(chosen),) if report.kernels and chosen not in report.kernels else (),
        peaks=peaks,
    )
    if peaks and not report.devices:  # latencies of other devices have other peaks
        rows = gap_rows(report)
        units = {c.score["unit"] for c in report.candidates if c.score is not None}
        source = dataclasses.replace(source, gap=rows, unit=next(iter(units), "top-1"))
    if report.sensitivity:
        source = dataclasses.replace(source, **_sensitivity(report))
    return source


def gap_rows(report: Report, *, model: str | None = None) -> list[Mapping[str, Any]]:
    """Candidates whose accuracy and latency were measured here, as rows of the efficiency gap.

    Args:
        report: of a run.
        model: names it among several, whose families are candidates; by default the model is the
            family.
    """
    family = str(report.model["name"])
    sites = sum(row["macs"] for row in report.sites)
    timed = max(
        (sum(row["macs"] for row in table["rows"]) for table in report.kernels.values()), default=0
    )
    # Sites are counted for one sample, kernels as they ran; a kernel without a site may be missing.
    macs = sites * max(1, round(timed / sites)) if sites else 0
    return [
        {
            "family": _plain(one.name) if model is not None else family,
            "name": model if model is not None else one.name,
            "accuracy": one.score["value"],
            "latency_ms": one.timing["p50_ms"],
            "macs": _by_precision(one, macs),
        }
        for one in report.candidates
        if macs and one.timing and one.score is not None and not one.score.get("where")
    ]


def _plain(name: str) -> str:
    """Name of a candidate without settings of its runtime: `openvino int8, pinned=False`."""
    return name.partition(", ")[0]


def _by_precision(candidate: Candidate, macs: int) -> dict[str, float]:
    wide = "bfloat16" if candidate.precision == "bfloat16" else "float32"
    parts = {"int8": macs * candidate.int8_macs, wide: macs * (1 - candidate.int8_macs)}
    return {precision: count for precision, count in parts.items() if count}


def _sensitivity(report: Report) -> dict[str, Any]:
    """The format that costs most, operator by operator."""
    figures, metric = sensitivities(report), sensitivity_metric(report)
    sums: dict[str, float] = {}
    for values in figures.values():
        for name, value in values.items():
            sums[name] = sums.get(name, 0.0) + value
    worst = max(sums, key=lambda name: sums[name])
    rows = [(name, values[worst]) for name, values in figures.items() if worst in values]
    _, unit = METRICS.get(metric, (metric, ""))
    form = f"{worst} bits" if worst.isdigit() else worst
    return {"sensitivity": rows, "sensitivity_words": (form, metric, unit)}
