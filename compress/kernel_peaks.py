"""Peaks of the runtimes whose kernels were timed, and the waterlines they give."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from compress.errors import OutputError
from compress.estimate.peaks import Peaks, cached_peaks, measure_peaks
from compress.progress import Progress, silent
from compress.registry import create_target
from compress.waterline import waterline

SECONDS = 2.0
"""Of timing for each runtime, once per machine; building the kernels takes about as long again."""


def kernel_peaks(
    runtimes: Iterable[str], threads: int | None, progress: Progress = silent
) -> tuple[dict[str, Peaks], dict[str, str]]:
    """Peaks by runtime, measured once per machine, and why others have none.

    They are those of the runtime with its default options, since roofs belong to the machine.

    Args:
        runtimes: names of targets.
        threads: of one operator; None for all cores.
        progress: opens a tracker where something is measured.
    """
    found: dict[str, Peaks] = {}
    failures: dict[str, str] = {}
    for name in dict.fromkeys(runtimes):
        try:
            target = create_target(name, threads=threads)
            try:
                found[name] = cached_peaks(target, seconds=SECONDS, progress=progress)
            except OutputError:  # no place for a cache
                found[name] = measure_peaks(target, seconds=SECONDS, progress=progress)
        except Exception as error:  # kernels were timed, and that is worth more than their roofs
            failures[name] = f"The peaks of {name} could not be measured: {error}"
    return found, failures


def waterlines(
    tables: Mapping[str, Mapping[str, Any]], peaks: Mapping[str, Peaks]
) -> dict[str, dict[str, Any]]:
    """Fields of `compress.waterline.Waterline` by variant, where its runtime's peaks are known."""
    return {
        variant: waterline(table["rows"], peaks[table["runtime"]]).to_dict()
        for variant, table in tables.items()
        if table["runtime"] in peaks and _multiplies(table["rows"])
    }


def read_peaks(values: Mapping[str, Any]) -> dict[str, Peaks]:
    """Peaks by runtime from the plain values in a report.

    Raises:
        KeyError, TypeError, ValueError: they are something else.
    """
    return {name: Peaks.from_dict(one) for name, one in values.items()}


def _multiplies(rows: Sequence[Mapping[str, Any]]) -> bool:
    return any(row["macs"] for row in rows)
