"""pytest plugin: latency, accuracy and size budgets in your own tests.

    def test_not_slower(compress_check):
        compress_check("model-cpu", against="baseline")

    @pytest.mark.compress_budget("model-cpu", against="baseline", budget="budgets.yaml")
    def test_budget():
        ...

pytest loads this module in every run, so it imports nothing but the standard library and pytest.
Under pytest-xdist a lock lets only one test of this user measure at a time; tests that do not
measure still run beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from compress.regression import CheckResult

MARKER = "compress_budget"
SECTION = "compress check"
_PROPERTY = "compress_check"


def pytest_addoption(parser: pytest.Parser) -> None:
    """The options of the plugin."""
    group = parser.getgroup("compress", "latency and accuracy budgets (hwcompress)")
    group.addoption(
        "--compress-time",
        type=float,
        metavar="S",
        help="Longest time to measure in one check. [default: what the test says, or 60]",
    )
    group.addoption(
        "--compress-cannot-tell",
        choices=("pass", "fail", "skip"),
        default="pass",
        help="What becomes of a check that stays open when the time is up. It is always reported. "
        "[default: pass]",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Register the marker."""
    config.addinivalue_line(
        "markers",
        f"{MARKER}(candidate, against=None, budget=None, ...): check the model's budget before the "
        "body of the test runs; arguments as for compress.check.",
    )


@pytest.fixture
def compress_check(request: pytest.FixtureRequest) -> Callable[..., CheckResult]:
    """A function with the arguments of `compress.check` that fails the test if a limit is broken.

    It skips the test where all limits are absolute ones of another machine.
    """
    node = request.node

    def check(*args: Any, **kwargs: Any) -> CheckResult:
        __tracebackhide__ = True
        return _check(node, args, kwargs)

    return check


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call(item: pytest.Item) -> None:
    """Check the budgets that a test is marked with, before its body."""
    __tracebackhide__ = True
    for marker in item.iter_markers(MARKER):
        _check(item, marker.args, marker.kwargs)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Tables of checks that could not be told: a pass must not hide them."""
    reports = [one for kind in terminalreporter.stats.values() for one in kind]
    for report in reports:
        if getattr(report, "when", "") != "call":
            continue
        for name, text in getattr(report, "user_properties", ()):
            if name == _PROPERTY:
                terminalreporter.section(f"{SECTION}: cannot tell")
                terminalreporter.line(f"{report.nodeid}\n{text}")


def _check(item: pytest.Item, args: Sequence[Any], kwargs: Mapping[str, Any]) -> CheckResult:
    """Run one check and turn its verdict into pytest's outcome."""
    __tracebackhide__ = True
    from compress.errors import CompressError
    from compress.regression import check
    from compress.regression.result import text_table

    seconds = item.config.getoption("compress_time")
    policy = item.config.getoption("compress_cannot_tell")
    if seconds is not None:
        kwargs = {**kwargs, "seconds": seconds}
    kwargs = {**kwargs, "cannot_tell": "pass" if policy == "skip" else policy}
    problem = ""
    try:
        result = check(*args, **kwargs)
    except CompressError as error:
        problem = f"The check could not be run. {error}"
    if problem:
        pytest.fail(problem, pytrace=False)
    table = "\n".join([result.headline, text_table(result.rows), *result.notes])
    if result.verdict == "fail":
        pytest.fail(table, pytrace=False)
    judged = [row for row in result.rows if row.verdict in ("pass", "cannot tell")]
    foreign = [row.reason for row in result.rows if row.verdict == "not judged here"]
    if foreign and not judged:
        pytest.skip(foreign[0])
    if result.verdict == "cannot tell":
        item.user_properties.append((_PROPERTY, table))
        if policy == "skip":
            pytest.skip(f"compress check cannot tell\n{table}")
        if not result.ok:
            pytest.fail(table, pytrace=False)
    item.add_report_section("call", SECTION, table)
    return result
