"""A model's budget as a test of its own, on what `make demo` left behind.

    pytest examples/ci/test_budget.py

DEMO names the folder of the demo, and BASELINE what `compress baseline` wrote; without them the
tests are skipped.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

DEMO = Path(os.environ.get("DEMO", "demo"))
BASELINE = Path(os.environ.get("BASELINE", DEMO / "baseline"))

pytestmark = pytest.mark.skipif(
    not (BASELINE / "baseline.json").is_file(), reason=f"{BASELINE} is no baseline"
)


@pytest.mark.compress_budget(DEMO / "digits-int8", against=BASELINE, max_slowdown="10%")
def test_not_slower_than_the_baseline() -> None:
    """The marker alone is the test."""


def test_accurate_and_small(compress_check: Callable[..., Any]) -> None:
    result = compress_check(
        DEMO / "digits-int8",
        against=BASELINE,
        evaluate_on=DEMO / "digits_test.npz",
        budget={
            "latency_p50": {"max_slowdown": "50%"},
            "accuracy": {"max_drop": "1 points", "min": "95%"},
            "size": {"max": "1 MB"},
        },
    )
    assert result.ratio is not None


def test_fast_on_the_build_server(compress_check: Callable[..., Any]) -> None:
    """Skipped with the reason wherever the machine is another one."""
    limit = {"machine": "000000000000", "note": "the build server", "latency_p50": {"max": "1 ms"}}
    compress_check(DEMO / "digits-int8", budget=limit)
