"""The pytest plugin, in test runs of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = ("torch", "numpy", "onnx", "onnxruntime", "compress.regression")
TESTS = """
import pytest

TINY, SLOW, BASELINE = {tiny!r}, {slow!r}, {baseline!r}

@pytest.mark.compress_budget(TINY, against=BASELINE, max_slowdown="100%", threads=1)
def test_marked():
    pass

@pytest.mark.compress_budget(SLOW, against=BASELINE, threads=1)
def test_slow():
    raise SystemError("the body does not run")

def test_open(compress_check):
    result = compress_check(TINY, TINY, seconds=0.5, threads=1)
    assert result.verdict == "cannot tell"

def test_elsewhere(compress_check):
    limit = {{"machine": "0", "note": "the build server", "latency_p50": {{"max": "1 ms"}}}}
    compress_check(TINY, budget=limit, seconds=0.5, threads=1)

def test_missing(compress_check):
    compress_check("no_such.onnx", TINY)
"""


@pytest.fixture
def written(pytester: pytest.Pytester, tiny_onnx: Path, slow_onnx: Path, recorded: Path) -> Path:
    text = TESTS.format(tiny=str(tiny_onnx), slow=str(slow_onnx), baseline=str(recorded))
    pytester.makeini("[pytest]\nfilterwarnings = error\naddopts = --strict-markers")
    return pytester.makepyfile(text)


def names(result: pytest.RunResult, start: str) -> list[str]:
    return [line for line in result.outlines if line.startswith(start)]


def test_verdicts_become_outcomes_also_beside_other_workers(
    pytester: pytest.Pytester, written: Path
) -> None:
    pytest.importorskip("xdist", reason="pytest-xdist is not installed")
    result = pytester.runpytest_subprocess("-n", "2", "-rs")
    result.assert_outcomes(passed=2, failed=2, skipped=1)
    result.stdout.fnmatch_lines_random(
        [
            "FAIL: *slow.onnx against *baseline: latency_p50.",
            "metric * limit * baseline * candidate * found * verdict",
            "latency_p50 *at most +2.5 %* fail",
            "*The check could not be run. There is no file no_such.onnx*",
            "SKIPPED *The limit is for machine 0 (the build server); this one is *",
            "*= compress check: cannot tell =*",
            "CANNOT TELL: *--cannot-tell pass lets it pass.",
        ]
    )
    assert "SystemError" not in result.stdout.str()


@pytest.mark.parametrize(("policy", "outcome"), [("fail", "failed"), ("skip", "skipped")])
def test_an_open_verdict_does_what_it_is_told(
    pytester: pytest.Pytester, written: Path, policy: str, outcome: str
) -> None:
    given = ("-k", "test_open", "--compress-cannot-tell", policy, "--compress-time", "0.5")
    result = pytester.runpytest_subprocess(*given)
    counts = result.parseoutcomes()
    assert counts[outcome] == 1
    assert "passed" not in counts
    assert names(result, "CANNOT TELL")


def test_the_plugin_is_registered_described_and_light(pytester: pytest.Pytester) -> None:
    pytester.makeini("[pytest]\nfilterwarnings = error\naddopts = --strict-markers")
    pytester.makepyfile(
        f"""
        import sys

        def test_light():
            assert [name for name in {HEAVY!r} if name in sys.modules] == []
            assert "compress.pytest_plugin" in sys.modules
        """
    )
    result = pytester.runpytest_subprocess("-W", "error")
    result.assert_outcomes(passed=1)
    text = pytester.runpytest_subprocess("--help").stdout.str()
    assert "--compress-time=S" in text
    assert "--compress-cannot-tell={pass,fail,skip}" in text


def test_importing_it_costs_nothing() -> None:
    code = (
        "import pytest, sys; before = set(sys.modules); import compress.pytest_plugin; "
        "print(sorted(set(sys.modules) - before))"
    )
    command = [sys.executable, "-c", code]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    assert len(ran.stdout.split(",")) < 10
