from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compress.errors import UsageError
from compress.regression.budgets import load_budget
from compress.regression.limits import KINDS, Limit, read_limit

ROOT = Path(__file__).parents[3]
HERE, THERE = "163700a654c3", "0123456789ab"


def write(folder: Path, text: str) -> Path:
    path = folder / "budgets.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("metric", "kind", "text", "value"),
    [
        ("latency_p50", "max", "80 us", 0.08),
        ("latency_p50", "max", "80 µs", 0.08),
        ("latency_p90", "max", "1.5 ms", 1.5),
        ("latency_p50", "max", "2s", 2000),
        ("latency_p50", "max_slowdown", "3%", 0.03),
        ("size", "max", "500 kB", 500_000),
        ("size", "max", "2 KiB", 2048),
        ("size", "max", "1.5 MB", 1_500_000),
        ("peak_memory", "max", "2 MiB", 2 << 20),
        ("peak_memory", "max_growth", "10 %", 0.1),
        ("accuracy", "min", "98.5%", 0.985),
        ("accuracy", "min", 31.2, 31.2),
        ("accuracy", "max_drop", "0.5 points", 0.005),
        ("accuracy", "max_drop", "1 point", 0.01),
        ("accuracy", "max_drop", "0.5%", 0.005),
    ],
)
def test_units(metric: str, kind: str, text: object, value: float) -> None:
    limit = read_limit(metric, kind, text, "here")
    assert limit.value == pytest.approx(value)
    assert not limit.relative


def test_a_drop_may_be_relative() -> None:
    assert read_limit("accuracy", "max_drop", "0.5%rel", "here").relative


@pytest.mark.parametrize(
    ("metric", "kind", "given", "example"),
    [
        ("latency_p50", "max", 5, "1.5 ms"),
        ("latency_p50", "max", "5", "1.5 ms"),
        ("latency_p50", "max", "5 m", "1.5 ms"),
        ("latency_p50", "max", "-5 ms", "1.5 ms"),
        ("latency_p50", "max", "1e999 ms", "1.5 ms"),
        ("latency_p50", "max_slowdown", 0.03, "3%"),
        ("latency_p50", "max_slowdown", "3", "3%"),
        ("size", "max", 5000, "512 KiB"),
        ("size", "max", "5 Mb", "512 KiB"),
        ("size", "max_growth", True, "5%"),
        ("accuracy", "min", "nan", "98.5%"),
        ("accuracy", "min", float("nan"), "98.5%"),
        ("accuracy", "min", True, "98.5%"),
        ("accuracy", "max_drop", 0.5, "0.5 points"),
        ("accuracy", "max_drop", "101%", "0.5 points"),
        ("accuracy", "max_drop", ["1%"], "0.5 points"),
    ],
)
def test_what_is_no_limit_names_key_value_and_form(
    metric: str, kind: str, given: Any, example: str
) -> None:
    with pytest.raises(UsageError) as caught:
        read_limit(metric, kind, given, "Budget b.yaml: limits[0]")
    text = str(caught.value)
    assert text.startswith(f"Budget b.yaml: limits[0]: {metric}.{kind} is {given!r}")
    assert example in text


@given(st.sampled_from(sorted(KINDS)), st.floats(0.001, 9999))
def test_a_limit_reads_back_what_it_shows(metric: str, number: float) -> None:
    """What a table shows of a limit on time or bytes can be put into a budget again."""
    unit = "ms" if metric.startswith("latency") else "kB"
    if metric == "accuracy":
        return
    limit = read_limit(metric, "max", f"{number:.6f} {unit}", "here")
    again = read_limit(metric, "max", str(limit).removeprefix("at most "), "here")
    assert again.value == pytest.approx(limit.value, rel=0.01, abs=60)


def test_entries_apply_by_target_and_machine_and_the_later_holds() -> None:
    budget = load_budget(
        [
            {"latency_p50": {"max_slowdown": "5%"}, "size": {"max": "1 MB"}},
            {"target": "onnxruntime", "size": {"max": "2 MB"}},
            {"target": "openvino", "size": {"max": "3 MB"}},
            {"machine": HERE, "latency_p50": {"max": "1 ms"}},
            {"machine": THERE, "note": "a phone", "latency_p90": {"max": "2 ms"}},
            {"machine": THERE, "latency_p50": {"max": "3 ms"}},
        ]
    )
    applied = budget.applied(("onnxruntime", "cpu"), HERE)
    assert {(one.metric, one.kind): one.value for one in applied.limits} == {
        ("latency_p50", "max_slowdown"): 0.05,
        ("size", "max"): 2e6,
        ("latency_p50", "max"): 1.0,
    }
    # The phone's median is not missed: this machine has a limit of its own for it.
    ((limit, reason),) = applied.elsewhere
    assert limit == Limit("latency_p90", "max", 2.0)
    assert "a phone" in reason
    assert HERE in reason


def test_null_takes_a_limit_back() -> None:
    budget = load_budget(
        [{"latency_p50": {"max_slowdown": "5%"}}, {"latency_p50": {"max_slowdown": None}}]
    )
    applied = budget.applied(("cpu",), HERE)
    assert applied.limits == ()
    assert applied.lifted == {("latency_p50", "max_slowdown")}


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("", ["NoneType", "`budget: 1`"]),
        ("- a", ["list"]),
        ("limits: []", ["budget is None"]),
        ("budget: 2\nlimits: [{}]", ["budget is 2", "reads 1"]),
        ("budget: true\nlimits: [{}]", ["budget is True"]),
        ("budget: 1\nlimits: {}", ["limits is {}", "list"]),
        ("budget: 1\nlimit: []", ["'limit' is no key", "Did you mean 'limits'"]),
        ("budget: 1\nlimits: [3]", ["limits[0] is 3"]),
        ("budget: 1\nlimits: [{latency: {max: 1 ms}}]", ["'latency'", "latency_p50"]),
        ("budget: 1\nlimits: [{size: 3}]", ["size is 3", "max or max_growth"]),
        ("budget: 1\nlimits: [{size: {maximum: 3 kB}}]", ["'maximum'", "max_growth"]),
        ("budget: 1\nlimits: [{}, {size: {max: 3}}]", ["limits[1]", "size.max is 3"]),
        ("budget: 1\nlimits: [{latency_p50: {max: 3 ms}}]", ["absolute latency", "machine:"]),
        ("budget: 1\nlimits: [{machine: 123456789012}]", ["machine is 123456789012", "quotes"]),
        ("budget: 1\nlimits: [{target: ''}]", ["target is ''"]),
        ("budget: !!python/object/apply:os.system ['true']", ["not plain YAML"]),
        ("a: [", ["not plain YAML"]),
    ],
)
def test_errors_name_the_file_and_the_key(tmp_path: Path, text: str, parts: list[str]) -> None:
    path = write(tmp_path, text)
    with pytest.raises(UsageError) as caught:
        load_budget(path)
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    for part in parts:
        assert part in message


@pytest.mark.parametrize("name", ["missing.yaml", "."])
def test_a_file_that_cannot_be_read(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match="compress baseline"):
        load_budget(tmp_path / name)


def test_the_example_is_a_budget_that_uses_every_metric() -> None:
    budget = load_budget(ROOT / "examples" / "ci" / "budgets.yaml")
    metrics = {metric for entry in budget.entries for metric, _ in entry.limits}
    assert metrics == set(KINDS)
    assert budget.targets == {"openvino"}
    applied = budget.applied(("onnxruntime", "cpu"), THERE)
    assert {limit.metric for limit, _ in applied.elsewhere} == {"latency_p50", "latency_p90"}
