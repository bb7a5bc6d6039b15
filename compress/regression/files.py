"""Files of results: written as a whole or not at all."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from compress.errors import OutputError


def write(path: Path, text: str) -> None:
    """Write UTF-8 text; what was there before stays until the new file is complete.

    Raises:
        OutputError: the file system refuses.
    """
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
        temporary = Path(name)
        with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
            stream.write(text)
        temporary.chmod(0o644)
        temporary.replace(path)
    except OSError as error:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
        raise OutputError(
            f"{str(path)!r} cannot be written: {error.strerror or error}. Choose another file."
        ) from error


def append(path: Path, text: str) -> None:
    """Add UTF-8 text to a file that others write to as well.

    Raises:
        OutputError: the file system refuses.
    """
    try:
        with path.open("a", encoding="utf-8") as stream:
            stream.write(text)
    except OSError as error:
        raise OutputError(f"{str(path)!r} cannot be written: {error.strerror or error}.") from error
