"""`build.json`: what `compress build` has to know, written where the engine could not be built."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compress import artifact
from compress.candidates import Limits
from compress.errors import CompressError, LoadError

NAME = "build.json"
VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One candidate of the build.

    Attributes:
        name: as in the report.
        precision: as in the report.
        file: the ONNX file.
        sha256: of that file and of the weights beside it, by file name.
        notes: what the builder should know of it.
    """

    name: str
    precision: str
    file: str
    sha256: Mapping[str, str]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class BuildSheet:
    """The content of `build.json`.

    Attributes:
        target: name of the target.
        options: its fields; these decide.
        candidates: the original first.
        max_drop: largest loss of the evaluation, as `--max-drop` takes it; None without a limit.
        min_speedup: smallest speed-up over the original; None asks only for faster.
        batch: samples in one timed request.
        seconds: time for the measurement.
        seed: of everything random.
        evaluation: name and hash of the data that the simulation was judged on.
        how: what the options mean for the builder, for people and other tools; not read back.
    """

    target: str
    options: Mapping[str, Any]
    candidates: tuple[Entry, ...]
    max_drop: str | None
    min_speedup: float | None
    batch: int
    seconds: float
    seed: int
    evaluation: Mapping[str, Any]
    how: Mapping[str, Any]

    def to_text(self) -> str:
        """The file's text."""
        return json.dumps({"version": VERSION, **dataclasses.asdict(self)}, indent=1)


def read(directory: Path) -> BuildSheet:
    """The sheet of a prepared artifact, with every file that it names unchanged.

    Raises:
        LoadError: there is none, it is damaged or newer, or a file is missing or was changed.
    """
    path = directory / NAME
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        version = values.pop("version")
    except OSError as error:
        raise LoadError(
            f"{directory} has no readable {NAME}, so there is nothing to build. Give a directory "
            f"that `compress run` wrote for a target that is built on another machine."
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(path, error) from error
    if version != VERSION:
        raise LoadError(
            f"{path} has version {version} and this release reads {VERSION}; install the "
            f"hwcompress release that wrote it."
        )
    try:
        sheet = _sheet(values)
    except (ValueError, KeyError, TypeError, AttributeError, CompressError) as error:
        raise _damaged(path, error) from error
    for entry in sheet.candidates:
        artifact.check_files(directory, entry.sha256, NAME)
    return sheet


def _sheet(values: dict[str, Any]) -> BuildSheet:
    entries = tuple(
        Entry(**{**one, "notes": tuple(one["notes"]), "sha256": dict(one["sha256"])})
        for one in values.pop("candidates")
    )
    sheet = BuildSheet(**values, candidates=entries)
    plain = isinstance(sheet.options, dict) and all(
        isinstance(one, str) for entry in entries for one in (entry.name, entry.precision)
    )
    counts = all(type(one) is int and one >= 0 for one in (sheet.batch, sheet.seed))
    if not entries or not plain or not counts or not 0 < float(sheet.seconds) <= 3600:
        raise ValueError("a value is not what it must be")
    if any(entry.file not in entry.sha256 for entry in entries):
        raise ValueError("a candidate has no hash")
    Limits.parse(sheet.max_drop, sheet.min_speedup, evaluated=True)
    return sheet


def _damaged(path: Path, error: Exception) -> LoadError:
    return LoadError(
        f"{path} is damaged: {type(error).__name__}: {error}. Copy the directory again, or run "
        f"`compress run` again."
    )
