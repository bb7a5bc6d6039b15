"""`compress plot`: the plots of artifacts, profiles and tables of rows, drawn again."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from compress import artifact
from compress.errors import CompressError, LoadError, OutputError, UsageError
from compress.kernel_peaks import read_peaks
from compress.plots.source import KINDS, Source, draw_all
from compress.report import Report
from compress.report.plots import ENDING, gap_rows, plot_source
from compress.waterline import Peaks

_MOST_BYTES = 256 << 20
_WHAT = (
    "Give an artifact directory, what `compress profile --out` wrote, or JSON with `rows` of "
    "predictions (name, measured_ms, predicted_ms, source) or of an efficiency gap (family, name, "
    "accuracy, macs, latency_ms) and `peaks`."
)
_PROFILE = frozenset({"runtime", "kernel", "op_type", "precision", "site", "p50_us", "macs"})
_PREDICTION = frozenset({"name", "measured_ms", "predicted_ms", "source"})
_GAP = frozenset({"family", "name", "accuracy", "macs", "latency_ms"})


def plot(
    sources: Sequence[Path | str], *, kinds: Sequence[str] = (), out: Path | str | None = None
) -> list[Path]:
    """Draw what there is and write it; the files.

    Args:
        sources: an artifact, or JSON (see `read_source`); several artifacts for one plot of the
            efficiency gap, with a curve for each candidate.
        kinds: of `compress.plots.source.KINDS`; all that there is something for.
        out: folder; by default that of an artifact, or the one beside a file.

    Raises:
        UsageError: a kind does not exist, or there is nothing for it.
        LoadError: a source is neither.
        OutputError: a file cannot be written.
    """
    paths = [Path(source) for source in sources]
    for kind in kinds:
        if kind not in KINDS:
            raise UsageError(f"--kind {kind} does not exist; choose from {', '.join(KINDS)}.")
    if len(paths) > 1:
        if tuple(kinds) != ("gap",):
            raise UsageError(
                "Several sources make one plot only of the efficiency gap: give --kind gap, or "
                "one source at a time."
            )
        source = _several(paths)
    else:
        source = read_source(paths[0])
    wanted = tuple(dict.fromkeys(kinds)) or source.kinds()
    missing = [kind for kind in wanted if kind not in source.kinds()]
    if missing or not wanted:
        raise UsageError(_nothing(paths[0], source, missing))
    drawn = draw_all(source, wanted)
    if drawn.failures:
        raise UsageError(" ".join(drawn.failures.values()))
    only = paths[0] if len(paths) == 1 else None
    if out is not None:
        folder = Path(out)
    elif only is not None:
        folder = only if only.is_dir() else only.parent
    else:
        folder = Path()
    prefix = f"{only.stem}-" if only is not None and not only.is_dir() else ""
    return [_write(folder / f"{prefix}{kind}{ENDING}", data) for kind, data in drawn.files.items()]


def read_source(path: Path) -> Source:
    """What can be plotted of an artifact, a profile or a table of rows.

    Raises:
        LoadError: it is none of them, or damaged.
    """
    if path.is_dir():
        report = _report(path)
        try:
            return plot_source(report)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise LoadError(
                f"{path / artifact.REPORT} is damaged: {error}. Run `compress run` again."
            ) from error
    values = _json(path)
    try:
        return _of_rows(values)
    except CompressError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise LoadError(f"{path} holds nothing that can be plotted: {error}. {_WHAT}") from error


def _of_rows(values: Any) -> Source:
    """A profile, predictions or an efficiency gap, told apart by the fields of their rows."""
    if not isinstance(values, dict) or not isinstance(values.get("rows"), list):
        raise ValueError("it has no list `rows`")
    rows = values["rows"]
    fields = set.intersection(*(set(row) for row in rows)) if rows else set()
    peaks = read_peaks(values.get("peaks") or {})
    if fields >= _PROFILE:
        tables: dict[str, Any] = {}
        for row in rows:
            runtime = row["runtime"]
            tables.setdefault(runtime, {"runtime": runtime, "rows": []})["rows"].append(
                {"bytes": None, **row}
            )
        return Source(name=str(values.get("model", "")), tables=tables, peaks=peaks)
    if fields >= _PREDICTION:
        return Source(predictions=rows)
    if fields >= _GAP:
        return Source(gap=rows, peaks=peaks, unit=str(values.get("unit", "top-1")))
    raise ValueError("its rows are of no known kind" if rows else "it has no rows")


def _several(paths: Sequence[Path]) -> Source:
    """The efficiency gap of several artifacts of one machine."""
    reports = [_report(path) for path in paths]
    machines = {str(report.machine.get("fingerprint")) for report in reports}
    if len(machines) > 1:
        raise UsageError(
            f"These artifacts were measured on {len(machines)} machines, whose latencies and "
            f"peaks do not belong into one plot. Plot those of one machine."
        )
    peaks: dict[str, Peaks] = {}
    rows: list[Any] = []
    for path, report in zip(paths, reports, strict=True):
        source = read_source(path)
        peaks |= source.peaks
        rows += gap_rows(report, model=path.resolve().name) if source.gap else []
    units = {c.score["unit"] for r in reports for c in r.candidates if c.score is not None}
    return Source(gap=rows, peaks=peaks, unit=units.pop() if len(units) == 1 else "score")


def _report(path: Path) -> Report:
    if not path.is_dir():
        raise LoadError(f"{path} is no artifact directory. {_WHAT}")
    values = artifact.read_report(path)
    try:
        return Report.from_dict(values)
    except (KeyError, TypeError, AttributeError) as error:
        raise LoadError(
            f"{path / artifact.REPORT} is damaged or of another release: {error}. Run `compress "
            f"run` again."
        ) from error


def _json(path: Path) -> Any:
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise LoadError(f"{path} has more than {_MOST_BYTES >> 20} MiB. {_WHAT}")
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise LoadError(f"{path} cannot be read: {error.strerror}. {_WHAT}") from error
    except (ValueError, RecursionError) as error:
        raise LoadError(f"{path} is no JSON: {error}. {_WHAT}") from error


def _nothing(path: Path, source: Source, missing: Sequence[str]) -> str:
    """Why there is nothing to plot, and what to do about it."""
    what = f"no plot of {', '.join(missing)}" if missing else "nothing to plot"
    there = source.kinds()
    rest = f" There is something for --kind {' and '.join(there)}." if there else ""
    if not missing or set(missing) & {"kernels", "roofline", "waterline"}:
        if not source.tables:
            why = (
                "it has no times of kernels, because its runtime tells none or an older release "
                "wrote it. `compress profile MODEL --out profile.json` measures them where the "
                "runtime can."
            )
        elif not source.peaks:
            why = (
                "it has no peak rates of the machine. `compress profile DIR --out profile.json` "
                "measures them with the kernels."
            )
        else:
            why = "none of its kernels has multiply-accumulates and known bytes."
    elif "gap" in missing:
        why = (
            "it has no candidate with accuracy (`compress run --eval`), latency of this machine "
            "and peak rates."
        )
    elif "sensitivity" in missing:
        why = "sensitivities are measured by `compress run --sensitivity`."
    else:
        why = "predictions are rows with name, measured_ms, predicted_ms and source."
    return f"{path} gives {what}: {why}{rest}"


def _write(path: Path, data: bytes) -> Path:
    """A file that is there whole or not at all."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
            Path(temporary).chmod(0o644)
            Path(temporary).replace(path)
        except BaseException:
            with contextlib.suppress(OSError):
                Path(temporary).unlink()
            raise
    except OSError as error:
        raise OutputError(
            f"{path} cannot be written: {error.strerror}. Choose another --out."
        ) from error
    return path
