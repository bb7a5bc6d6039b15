from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compress.errors import UsageError
from compress.target import TensorType
from compress.waterline import bars, fused_bytes, waterline


@dataclass(frozen=True)
class Machine:
    rates: dict[str, float] = field(default_factory=lambda: {"float32": 100.0, "int8": 400.0})
    bandwidth_gb_s: float = 10.0

    def gmacs(self, precision: str) -> float:
        return self.rates[precision]


def row(macs: int, moved: int | None, us: float, precision: str = "float32") -> dict[str, Any]:
    return {
        "kernel": "k", "site": "s", "precision": precision, "macs": macs, "bytes": moved,
        "p50_us": us,
    }  # fmt: skip


ROWS = st.lists(
    st.builds(
        row,
        st.integers(0, 10**9),
        st.none() | st.integers(0, 10**8),
        st.floats(0.5, 1e5),
        st.sampled_from(["float32", "int8"]),
    ),
    min_size=1,
    max_size=8,
)


def test_by_hand() -> None:
    # 2 M MACs at 100 GMAC/s are 20 µs; 0.6 MB at 10 GB/s are 60 µs.
    rows = [row(2_000_000, 100_000, 40.0), row(2_000_000, 600_000, 80.0), row(0, 200_000, 20.0)]
    first, second, third = bars(rows, Machine())
    assert (first.attainable_us, second.attainable_us, third.attainable_us) == (20.0, 60.0, 20.0)
    assert (first.attainable_gmacs, first.actual_gmacs) == (100.0, 50.0)
    assert (third.attainable_gmacs, third.actual_gmacs) == (0.0, 0.0)
    found = waterline(rows, Machine())
    assert found.macs == 4_000_000
    assert found.peak_gmacs == pytest.approx(100)
    assert found.waterline_gmacs == pytest.approx(4e6 / 100e-6 / 1e9)
    assert found.actual_gmacs == pytest.approx(4e6 / 140e-6 / 1e9)
    assert found.efficiency == pytest.approx(40 / 140)
    assert found.memory_bound == pytest.approx(0.8)
    assert found.without_macs == pytest.approx(0.2)


def test_precisions_have_their_own_peaks() -> None:
    found = waterline([row(10**6, 0, 10.0), row(10**6, 0, 5.0, "int8")], Machine())
    assert found.peak_gmacs == pytest.approx(2 / (1 / 100 + 1 / 400))  # weighted harmonic mean
    assert found.waterline_gmacs == pytest.approx(found.peak_gmacs)


@given(ROWS)
def test_the_waterline_is_at_most_the_peak_and_any_height_above_it(
    rows: list[dict[str, Any]],
) -> None:
    found = waterline(rows, Machine())
    assert found.waterline_gmacs <= found.peak_gmacs * (1 + 1e-9)
    assert found.peak_gmacs <= 400 * (1 + 1e-9)
    heights = [bar.attainable_gmacs for bar in bars(rows, Machine()) if bar.macs]
    assert found.waterline_gmacs <= max(heights, default=0.0) * (1 + 1e-9)
    assert 0 <= found.memory_bound <= 1 + 1e-9
    assert 0 <= found.without_macs <= 1 + 1e-9


@given(ROWS)
def test_without_bytes_it_is_the_peak(rows: list[dict[str, Any]]) -> None:
    bound = [{**one, "bytes": None if index % 2 else 0} for index, one in enumerate(rows)]
    found = waterline(bound, Machine())
    assert found.waterline_gmacs == pytest.approx(found.peak_gmacs)
    assert found.memory_bound == 0
    assert found.unknown_bytes == len(rows) // 2


@given(ROWS)
def test_it_is_the_weighted_harmonic_mean_where_all_kernels_multiply(
    rows: list[dict[str, Any]],
) -> None:
    multiplying = [one for one in rows if one["macs"]]
    found = bars(multiplying, Machine())
    mean = sum(b.macs for b in found) / (sum(b.macs / b.attainable_gmacs for b in found) or 1)
    assert waterline(multiplying, Machine()).waterline_gmacs == pytest.approx(mean)


TENSORS = st.tuples(
    st.lists(st.integers(1, 8), max_size=3), st.sampled_from(["float32", "int8", "int4"])
)
KERNELS = st.lists(
    st.fixed_dictionaries(
        {name: st.lists(TENSORS, max_size=3) for name in ("inputs", "weights", "outputs")}
    ),
    max_size=5,
)


def moved(kernel: dict[str, Any]) -> int:
    tensors = (tensor for group in kernel.values() for tensor in group)
    return sum(TensorType(tuple(shape), dtype).bytes for shape, dtype in tensors)


@given(KERNELS)
def test_fusion_never_moves_more(kernels: list[dict[str, Any]]) -> None:
    assert 0 <= fused_bytes(kernels) <= sum(map(moved, kernels))


def test_fusion_keeps_what_lies_between_inside() -> None:
    wide, narrow = ([1, 8, 4, 4], "float32"), ([1, 2, 4, 4], "float32")
    first = {"inputs": [narrow], "weights": [([8, 2], "float32")], "outputs": [wide]}
    second = {"inputs": [wide], "weights": [([2, 8], "float32")], "outputs": [narrow]}
    assert fused_bytes([first]) == moved(first)
    assert fused_bytes([first, second]) == 2 * 64 + 2 * 128
    assert fused_bytes([first, first]) == 2 * moved(first) - 0


@pytest.mark.parametrize("field_", ["p50_us", "macs", "bytes"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -1, "7"], ids=str)
def test_what_is_no_number_is_refused(field_: str, value: object) -> None:
    with pytest.raises(UsageError, match=f"{field_} of kernel s is"):
        waterline([{**row(1, 1, 1.0), field_: value}], Machine())
