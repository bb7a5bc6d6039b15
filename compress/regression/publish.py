"""Where a result goes besides the terminal: files, and GitHub where this runs there."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from compress.regression import github
from compress.regression.files import write
from compress.regression.junit import write_junit, write_junit_error
from compress.regression.markdown import markdown, markdown_error
from compress.regression.result import CheckResult


def publish(
    result: CheckResult,
    environment: Mapping[str, str],
    *,
    junit: Path | None = None,
    comment: Path | None = None,
) -> list[str]:
    """Write what was asked for.

    Args:
        result: of the check.
        environment: variables of the process; GitHub's runner sets some.
        junit: JUnit XML.
        comment: Markdown.

    Returns:
        Workflow commands to print; none outside of GitHub.

    Raises:
        OutputError: a file cannot be written.
    """
    text = markdown(result)
    if junit is not None:
        write_junit(result, junit)
    if comment is not None:
        write(comment, text)
    github.add_summary(text, environment)
    return github.commands(result) if github.active(environment) else []


def publish_error(
    candidate: str,
    message: str,
    environment: Mapping[str, str],
    *,
    junit: Path | None = None,
    comment: Path | None = None,
) -> list[str]:
    """The same for a check that could not be run: an error is a result as well.

    Raises:
        OutputError: a file cannot be written.
    """
    text = markdown_error(candidate, message)
    if junit is not None:
        write_junit_error(candidate, message, junit)
    if comment is not None:
        write(comment, text)
    github.add_summary(text, environment)
    return [github.command("error", message)] if github.active(environment) else []
