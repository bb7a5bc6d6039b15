"""Where results go: JUnit, Markdown, GitHub, and the outputs of the Action."""

from __future__ import annotations

import json
import stat
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path

import pytest

from compress.errors import OutputError
from compress.regression import CheckResult, Row
from compress.regression.files import write
from compress.regression.github import command, commands
from compress.regression.markdown import markdown
from compress.regression.outputs import outputs
from compress.regression.publish import publish, publish_error
from compress.regression.result import COLUMNS, overall, text_table

FAILED = Row(
    metric="latency_p50",
    limit="at most +2.5 %",
    value=1.1,
    low=1.05,
    high=1.15,
    unit="x",
    verdict="fail",
)
OPEN = Row(metric="accuracy", limit="<&>", verdict="cannot tell", reason="line one\nline: 50%, |a|")
AWAY = Row(metric="latency_p90", limit="at most 1 ms", verdict="not judged here", reason="a phone")
KEPT = Row(metric="size", limit="at most 1 MB", value=3e5, unit="bytes", verdict="pass")
SHOWN = Row(metric="peak_memory", candidate="3 kB")
ROWS = (FAILED, OPEN, AWAY, KEPT, SHOWN)


def result(*rows: Row, cannot_tell: str = "pass", candidate: str = "model\x1b_[x]") -> CheckResult:
    return CheckResult(
        candidate=candidate,
        baseline="base",
        verdict=overall(rows),
        cannot_tell=cannot_tell,  # type: ignore[arg-type]
        rows=rows,
        notes=("note <b>",),
        seconds=2.0,
        machine={"cpu": "A|B", "cores": 2, "fingerprint": "f"},
        created="2026-01-01T00:00:00+00:00",
    )


@pytest.mark.parametrize(
    ("rows", "verdict"),
    [
        ((FAILED, OPEN, KEPT), "fail"),
        ((OPEN, KEPT), "cannot tell"),
        ((KEPT, AWAY, SHOWN), "pass"),
        ((AWAY, SHOWN), "cannot tell"),
        ((), "cannot tell"),
    ],
    ids=["one fails", "one is open", "the rest passes", "nothing is judged", "nothing"],
)
def test_the_verdict_of_all_rows(rows: tuple[Row, ...], verdict: str) -> None:
    assert overall(rows) == verdict
    assert result(*rows).ok == (verdict != "fail")
    assert result(*rows, cannot_tell="fail").ok == (verdict == "pass")


def test_a_headline_says_what_an_open_verdict_becomes() -> None:
    assert "lets it pass" in result(OPEN).headline
    assert "fails the check" in result(OPEN, cannot_tell="fail").headline
    assert "nothing could be judged" in result(AWAY).headline
    assert "latency_p50" in result(*ROWS).headline


@pytest.mark.parametrize("policy", ["pass", "fail"])
def test_junit_has_a_case_for_each_limit(tmp_path: Path, policy: str) -> None:
    path = tmp_path / "new" / "check.xml"
    publish(result(*ROWS, cannot_tell=policy), {}, junit=path)
    (suite,) = ElementTree.parse(path).getroot()
    failed = 2 if policy == "fail" else 1
    counts = {name: int(suite.get(name, "-1")) for name in ("tests", "failures", "skipped")}
    assert counts == {"tests": 4, "failures": failed, "skipped": 3 - failed}
    cases = suite.findall("testcase")
    assert [case.get("name", "").split()[0] for case in cases] == [row.metric for row in ROWS[:4]]
    assert [len(list(case)) for case in cases] == [1, 1, 1, 0]
    assert cases[0][0].tag == "failure"
    assert "1.100 [1.050, 1.150]" in cases[0][0].get("message", "")
    assert "50%, |a|" in (cases[1][0].text or "")
    assert "?" in cases[0].get("classname", "")  # the escape sign, which XML cannot hold
    assert "peak_memory" in (suite.findtext("system-out") or "")


def test_an_error_is_a_case_too(tmp_path: Path) -> None:
    junit, comment = tmp_path / "check.xml", tmp_path / "check.md"
    assert publish_error("model", "It <is> broken.\x00", {}, junit=junit, comment=comment) == []
    (suite,) = ElementTree.parse(junit).getroot()
    assert suite.get("errors") == "1"
    assert suite.findtext("testcase/error") == "It <is> broken.?"
    assert "It \\<is\\> broken" in comment.read_text()


def test_markdown_keeps_its_table_whatever_the_names_hold() -> None:
    text = markdown(result(*ROWS))
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert len(table) == 2 + len(ROWS)
    unescaped = [line.replace("\\|", "").count("|") for line in table]
    assert set(unescaped) == {len(COLUMNS) + 1}
    assert "**fail**" in text
    assert "\\[x\\]" in text
    assert "\\<b\\>" in text


def test_workflow_commands_are_one_line_and_escaped() -> None:
    found = commands(result(*ROWS))
    assert [one.split(" ")[0] for one in found] == ["::error", "::warning"]
    assert all("\n" not in one for one in found)
    assert "line one%0Aline: 50%25, |a|" in found[1]
    assert command("error", "a\r\nb", "x:y,z%") == "::error title=x%3Ay%2Cz%25::a%0D%0Ab"
    strict = commands(result(OPEN, cannot_tell="fail"))
    assert strict[0].startswith("::error ")


def test_a_check_that_judged_nothing_warns() -> None:
    (only,) = commands(result(AWAY))
    assert only.startswith("::warning ")
    assert commands(result(KEPT)) == []


def test_github_gets_commands_and_a_summary_that_is_appended(tmp_path: Path) -> None:
    summary = tmp_path / "summary.md"
    summary.write_text("before\n")
    environment = {"GITHUB_ACTIONS": "true", "GITHUB_STEP_SUMMARY": str(summary)}
    assert len(publish(result(*ROWS), environment)) == 2
    assert publish_error("model", "broken", environment) == ["::error title=compress check::broken"]
    text = summary.read_text()
    assert text.startswith("before\n### Compression check: fail")
    assert "### Compression check: error" in text
    assert publish(result(*ROWS), {"GITHUB_STEP_SUMMARY": str(summary)}) == []


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        (json.dumps(result(*ROWS).to_dict()), "verdict=fail\nratio=1.1000\n"),
        (json.dumps(result(AWAY).to_dict()), "verdict=cannot tell\nratio=\n"),
        ("", "verdict=error\nratio=\n"),
        ("[]", "verdict=error\nratio=\n"),
    ],
    ids=["ratio", "no ratio", "empty", "no result"],
)
def test_outputs_of_the_action(tmp_path: Path, text: str, lines: str) -> None:
    path = tmp_path / "check.json"
    path.write_text(text)
    assert outputs(path) == lines
    assert outputs(tmp_path / "missing.json") == "verdict=error\nratio=\n"


def test_a_file_that_cannot_be_written_is_named_and_nothing_is_left(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(OutputError, match="folder"):
        write(tmp_path / "folder", "text")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]
    write(tmp_path / "file", "text")
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o644


def test_the_text_table_has_reasons_below() -> None:
    lines = text_table(ROWS).splitlines()
    assert lines[0].split() == list(COLUMNS[:-1])
    assert "latency_p90 (not judged here): a phone" in lines
    assert replace(OPEN, value=2.0, low=None).found == "2"
