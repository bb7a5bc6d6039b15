"""Kernels and peaks that plots are made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest

Row = dict[str, Any]


@dataclass(frozen=True)
class Machine:
    """Peaks: 100 GMAC/s in float32, 400 in int8, 10 GB/s."""

    rates: Mapping[str, float] = field(default_factory=lambda: {"float32": 100.0, "int8": 400.0})
    bandwidth_gb_s: float = 10.0

    def gmacs(self, precision: str) -> float:
        """As `compress.estimate.peaks.Peaks` does."""
        return self.rates.get(precision) or self.rates["float32"]


@pytest.fixture(scope="session")
def machine() -> Machine:
    """The peaks of a machine."""
    return Machine()


@pytest.fixture(scope="session")
def kernel() -> Callable[..., Row]:
    """A row as `compress.kernel_rows` makes it."""

    def make(site: str, us: float, precision: str = "float32", **changes: Any) -> Row:
        tensor = [[1, 8, 4, 4], "float32"]
        return {
            "kernel": site or "inserted",
            "op_type": "Conv",
            "precision": precision,
            "site": site,
            "backend": "",
            "fused": "",
            "p50_us": us,
            "share": 0.0,
            "macs": 1_000_000,
            "gmacs_per_second": 0.0,
            "bytes": 20_000,
            "inputs": [tensor],
            "weights": [],
            "outputs": [tensor],
            **changes,
        }

    return make


@pytest.fixture(scope="session")
def tables(kernel: Callable[..., Row]) -> dict[str, dict[str, Any]]:
    """Two variants: float32, and int8 with what a runtime inserts."""
    nothing = {"macs": 0}
    first = [
        kernel("stem", 40.0),
        kernel("body", 100.0, macs=5_000_000, bytes=100_000),
        kernel("act", 5.0, op_type="Relu", **nothing),
        kernel("", 3.0, "move", op_type="Reorder", **nothing),
        kernel("head", 20.0, bytes=4_000_000),
    ]
    second = [
        kernel("stem/q", 2.0, "convert", op_type="QuantizeLinear", **nothing),
        kernel("stem", 15.0, "int8"),
        kernel("stem", 1.0, "convert", op_type="DequantizeLinear", **nothing),
        kernel("body", 30.0, "int8", macs=5_000_000, bytes=30_000),
        kernel("late", 4.0, op_type="Add", **nothing),
        kernel("", 6.0, "float32", op_type="LSTM", bytes=None, **nothing),
        kernel("head", 18.0, bytes=None),
    ]
    return {
        "float32": {"runtime": "onnxruntime", "rows": first},
        "onnxruntime int8": {"runtime": "onnxruntime", "rows": second},
    }


@pytest.fixture(scope="session")
def many(kernel: Callable[..., Row]) -> dict[str, dict[str, Any]]:
    """500 kernels with long names that differ in the middle."""
    rows = [
        kernel(f"network/stages.{index % 20}/blocks.{index}/depthwise/conv/Conv", 1.0 + index)
        for index in range(500)
    ]
    return {"float32": {"runtime": "onnxruntime", "rows": rows}}


@pytest.fixture(params=["one", "zero times", "unknown bytes", "no MACs", "strange names", "many"])
def edge(
    request: pytest.FixtureRequest,
    kernel: Callable[..., Row],
    many: dict[str, dict[str, Any]],
) -> dict[str, dict[str, Any]]:
    """Tables that are hard to draw."""
    names = ("卷积/$x_1^{2}$", "<b>&amp;</b>", "_hidden", "[red]a[/red]", "a\x00\nb", "%s{0}\\frac")
    cases = {
        "one": [kernel("only", 7.0)],
        "zero times": [kernel("a", 0.0), kernel("b", 0.0)],
        "unknown bytes": [kernel("a", 3.0, bytes=None), kernel("b", 4.0, bytes=None)],
        "no MACs": [kernel("a", 3.0, macs=0), kernel("b", 4.0, "move", macs=0)],
        "strange names": [kernel(name, 2.0 + i) for i, name in enumerate(names)],
        "many": many["float32"]["rows"],
    }
    return {"float32": {"runtime": "onnxruntime", "rows": cases[request.param]}}
