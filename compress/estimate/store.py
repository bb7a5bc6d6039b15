"""Small JSON files that are written whole or not at all, and read without trust."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

from compress.errors import LoadError, OutputError

MOST_BYTES = 256 << 20
"""Larger files are not what they claim to be."""


def read_json(path: Path) -> Any:
    """What a file holds.

    Raises:
        LoadError: it cannot be read, is too large or no JSON.
    """
    try:
        if path.stat().st_size > MOST_BYTES:
            raise LoadError(f"{path} has more than {MOST_BYTES >> 20} MiB; that is no such file.")
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise LoadError(f"{path} cannot be read: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise LoadError(f"{path} is damaged: {error}. Delete it and measure again.") from error


def write_json(path: Path, value: Any) -> None:
    """Write a file under its final name only when it is complete.

    Raises:
        OutputError: the folder cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                json.dump(value, file, allow_nan=False)
                file.write("\n")
            Path(temporary).replace(path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise OutputError(
            f"{path} cannot be written: {error.strerror}. Choose another place with --out."
        ) from error
