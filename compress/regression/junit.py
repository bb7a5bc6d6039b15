"""JUnit XML: one test case per row, as GitLab, Jenkins and GitHub reporters read it."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

from compress.regression.files import write
from compress.regression.result import CheckResult, Row, text_table

SUITE = "compress check"
# Characters that XML 1.0 cannot hold in any form (section 2.2, "Char").
_ILLEGAL = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def write_junit(result: CheckResult, path: Path) -> None:
    """Write the rows with a verdict; those without a limit are in the output of the suite.

    Raises:
        OutputError: the file cannot be written.
    """
    rows = [row for row in result.rows if row.verdict != "no limit"]
    suite = _suite(result.seconds, result.created)
    counts = {"tests": len(rows), "errors": 0, "failures": 0, "skipped": 0}
    for row in rows:
        kind = _element(row, result)
        case = ElementTree.SubElement(
            suite,
            "testcase",
            classname=_clean(f"{SUITE}.{result.candidate}"),
            name=_clean(f"{row.metric} {row.limit}"),
            time=f"{result.seconds / max(1, len(rows)):.3f}",
        )
        if kind is not None:
            element, counter = kind
            counts[counter] += 1
            text = _clean(f"{row.verdict}: {row.found} {row.reason}".strip())
            ElementTree.SubElement(case, element, message=text).text = text
    for name, number in counts.items():
        suite.set(name, str(number))
    output = "\n".join([result.headline, text_table(result.rows), *result.notes])
    ElementTree.SubElement(suite, "system-out").text = _clean(output)
    _write(suite, path)


def write_junit_error(candidate: str, message: str, path: Path) -> None:
    """Write a suite whose only case could not be run.

    Raises:
        OutputError: the file cannot be written.
    """
    suite = _suite(0.0, "")
    for name, number in {"tests": 1, "errors": 1, "failures": 0, "skipped": 0}.items():
        suite.set(name, str(number))
    case = ElementTree.SubElement(
        suite, "testcase", classname=_clean(f"{SUITE}.{candidate}"), name="check", time="0"
    )
    ElementTree.SubElement(case, "error", message=_clean(message)).text = _clean(message)
    _write(suite, path)


def _element(row: Row, result: CheckResult) -> tuple[str, str] | None:
    match row.verdict:
        case "fail":
            return "failure", "failures"
        case "cannot tell":
            return ("failure", "failures") if result.cannot_tell == "fail" else _SKIPPED
        case "not judged here":
            return _SKIPPED
        case _:
            return None


_SKIPPED = ("skipped", "skipped")


def _suite(seconds: float, created: str) -> ElementTree.Element:
    suite = ElementTree.Element("testsuite", name=SUITE, time=f"{seconds:.3f}")
    if created:
        suite.set("timestamp", created)
    return suite


def _clean(text: str) -> str:
    return _ILLEGAL.sub("?", text)


def _write(suite: ElementTree.Element, path: Path) -> None:
    suites = ElementTree.Element("testsuites")
    suites.append(suite)
    ElementTree.indent(suites)
    write(path, ElementTree.tostring(suites, encoding="unicode", xml_declaration=False) + "\n")
