"""GitHub's workflow commands and step summary.

The form of the commands and what has to be escaped in them: actions/toolkit, packages/core,
command.ts.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from compress.regression.files import append
from compress.regression.result import CheckResult


def active(environment: Mapping[str, str]) -> bool:
    """Whether this runs in a workflow."""
    return environment.get("GITHUB_ACTIONS", "") == "true"


def commands(result: CheckResult) -> list[str]:
    """One command for each row that fails or cannot be told, or for a check that judged nothing."""
    found = []
    for row in result.rows:
        if row.verdict not in ("fail", "cannot tell"):
            continue
        error = row.verdict == "fail" or result.cannot_tell == "fail"
        shown = f"{row.metric} {row.verdict}: {row.found} (limit: {row.limit}). {row.reason}"
        found.append(command("error" if error else "warning", shown.strip()))
    if not found and result.verdict != "pass":
        found.append(command("warning" if result.ok else "error", result.headline))
    return found


def command(kind: Literal["error", "warning"], message: str, title: str = "compress check") -> str:
    """`::error title=TITLE::MESSAGE`, escaped."""
    safe = _data(title).replace(":", "%3A").replace(",", "%2C")
    return f"::{kind} title={safe}::{_data(message)}"


def add_summary(text: str, environment: Mapping[str, str]) -> None:
    """Append to the step's summary, where the runner names a file for it.

    Raises:
        OutputError: the file cannot be written.
    """
    path = environment.get("GITHUB_STEP_SUMMARY", "")
    if path:
        append(Path(path), text + "\n")


def _data(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")
