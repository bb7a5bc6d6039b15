"""The record of a baseline: what was measured of it, and the copy of it that can run again."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from compress.artifact import check_files
from compress.errors import LoadError

RECORD = "baseline.json"
MODEL = "model"
"""Folder of the copy: an artifact's own files, or one model file."""
SCHEMA_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Record:
    """What `baseline.json` holds.

    Attributes:
        name: of the model, for people.
        source: path that it was recorded from.
        file: name of the model file in the folder `model`; "" if that folder is an artifact.
        files: sha256 by name, of all files in the folder.
        inputs: shapes that a model file was opened with, as `--input` takes them.
        threads: that were asked for, None for the artifact's own or all.
        targets: names that its target goes by.
        latency: p50 and p90 in milliseconds, each with value, low and high over sessions.
        accuracy: value, unit, n, data and sha256 of the data; None where it is unknown.
        size_bytes: as the report counts it.
        peak_memory_bytes: of activations, None where it is unknown.
        machine: facts and fingerprint of where the latency was measured.
        versions: of the packages that matter.
        created: UTC, ISO 8601.
        command: how to repeat it.
    """

    name: str
    source: str
    files: Mapping[str, str]
    latency: Mapping[str, Any]
    size_bytes: int
    machine: Mapping[str, Any]
    versions: Mapping[str, str]
    created: str
    file: str = ""
    inputs: tuple[str, ...] = ()
    threads: int | None = None
    targets: tuple[str, ...] = ()
    accuracy: Mapping[str, Any] | None = None
    peak_memory_bytes: int | None = None
    command: str = ""
    schema_version: int = field(default=SCHEMA_VERSION)

    def model_path(self, directory: Path) -> Path:
        """The artifact directory or model file that runs."""
        return directory / MODEL / self.file if self.file else directory / MODEL

    def to_json(self) -> str:
        """The file's text."""
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"


def read_record(directory: Path) -> Record:
    """The record of a baseline whose files are those that were written.

    Raises:
        LoadError: it is damaged, changed, incomplete, or of another release.
    """
    path = directory / RECORD
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        version = values["schema_version"]
    except OSError as error:
        raise LoadError(f"{path} cannot be read: {error.strerror}.") from error
    except (ValueError, KeyError, TypeError) as error:
        raise LoadError(f"{path} is damaged: {error}. Record the baseline again.") from error
    if version != SCHEMA_VERSION:
        raise LoadError(
            f"{path} has schema version {version} and this release reads {SCHEMA_VERSION}; record "
            f"the baseline again, or install the hwcompress release that wrote it."
        )
    try:
        lists = {key: tuple(map(str, values[key])) for key in ("inputs", "targets")}
        record = Record(**{**values, **lists})
        names = dict(record.files)
        valid = isinstance(record.file, str) and record.machine["fingerprint"]
    except (KeyError, TypeError, ValueError) as error:
        raise LoadError(f"{path} is damaged: {error}. Record the baseline again.") from error
    if not valid or Path(record.file).name != record.file or not names:
        raise LoadError(f"{path} is damaged. Record the baseline again.")
    check_files(directory / MODEL, names, f"../{RECORD}")
    return record
