"""Markdown for a pull-request comment or a step summary."""

from __future__ import annotations

import re

from compress.regression.result import COLUMNS, CheckResult, cells

_SPECIAL = re.compile(r"([\\`*_{}\[\]<>|#~&!])")


def markdown(result: CheckResult) -> str:
    """Headline, table, notes and how it was measured."""
    lines = [
        f"### Compression check: {result.verdict}",
        "",
        escape(result.headline),
        "",
        "| " + " | ".join(COLUMNS) + " |",
        "|" + "---|" * len(COLUMNS),
        *("| " + " | ".join(_bold(cell) for cell in cells(row)) + " |" for row in result.rows),
        "",
    ]
    lines += [f"- {escape(note)}" for note in result.notes]
    if result.notes:
        lines.append("")
    machine = result.machine
    place = f"{machine.get('cpu', '?')}, {machine.get('cores', '?')} cores"
    lines += [
        "<details><summary>How it was measured</summary>",
        "",
        escape(
            f"Pairs of sessions: {result.pairs}, looks: {result.looks}, {result.seconds:.1f} s on "
            f"{place} (fingerprint {machine.get('fingerprint', '?')}). {result.method}"
        ),
        "",
        "</details>",
        "",
    ]
    return "\n".join(lines)


def markdown_error(candidate: str, message: str) -> str:
    """What stands there if the check could not be run."""
    return f"### Compression check: error\n\n{escape(candidate)}: {escape(message)}\n"


def escape(text: str) -> str:
    """Text that Markdown shows as it is, in one line: a path may hold anything."""
    return _SPECIAL.sub(r"\\\1", " ".join(text.split()))


def _bold(cell: str) -> str:
    return f"**{cell}**" if cell in ("fail", "cannot tell") else escape(cell)
