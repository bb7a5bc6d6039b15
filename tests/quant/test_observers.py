"""Observers stream, and ranges chosen from them are as good as they claim."""

from __future__ import annotations

import json
import math
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from compress.errors import DataError, UsageError
from quant.observers import HistogramObserver, RangeMethod, find_range
from quant.quantizer import fake_quantize, qparams_from_range
from quant.spec import QuantSpec

METHODS = get_args(RangeMethod)
UNSIGNED = QuantSpec("uint8", symmetric=False)
SIGNED = QuantSpec("int8", symmetric=True)
FOUR_BITS = [QuantSpec("int4"), QuantSpec("uint4", symmetric=False)]
OTHERS = [
    QuantSpec("int2"),
    QuantSpec("int4", restricted=True),
    QuantSpec("uint3", symmetric=False),
    QuantSpec("int16"),
    QuantSpec("uint8", symmetric=False, power_of_two=True),
    QuantSpec("int4", power_of_two=True),
    QuantSpec("float4_e2m1"),
    QuantSpec("float8_e4m3fn"),
    QuantSpec("float8_e5m2"),
    QuantSpec("bfloat16"),
]
each_method = pytest.mark.parametrize("method", METHODS)
each_spec = pytest.mark.parametrize("spec", [UNSIGNED, SIGNED], ids=["asymmetric", "symmetric"])
each_other_spec = pytest.mark.parametrize(
    "spec", OTHERS, ids=lambda s: s.dtype + "-power_of_two" * s.power_of_two
)

# Beyond a ratio of 2**126 float32 underflows while it is divided by the width of a bin.
values = st.one_of(st.just(0.0), *(st.floats(a, b, width=32) for a, b in [(2**-40, 2**40)] * 2))
signed_values = st.tuples(values, st.sampled_from([-1, 1])).map(math.prod)
data = hnp.arrays(np.float32, st.integers(1, 60), elements=signed_values)


def observe(*parts: np.ndarray, bins: int = 2048) -> HistogramObserver:
    observer = HistogramObserver("x", bins)
    for part in parts:
        observer.update(part)
    return observer


def without_averages(observer: HistogramObserver) -> dict[str, Any]:
    """What does not depend on how the data are cut into batches."""
    return {k: v for k, v in observer.to_dict().items() if not k.startswith("average")}


def mean_squared_error(x: np.ndarray, found: tuple[float, float], spec: QuantSpec) -> float:
    error = x - fake_quantize(x, qparams_from_range(*found, spec))
    return float(np.mean(error**2, dtype=np.float64))


def shapes_of_data() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    normal = rng.standard_normal(50_000)
    wide = 3 * normal
    arrays = {
        "normal": normal,
        "laplace": rng.laplace(size=50_000),
        "relu": np.maximum(normal, 0),
        "relu6": np.clip(wide, 0, 6),
        "hardswish": wide * np.clip(wide + 3, 0, 6) / 6,
        "negative": -np.abs(normal),
        "far-from-zero": normal + 20,
        "outlier": np.append(normal, 30.0),
        "mostly-zero": normal * (rng.random(50_000) < 0.01),
        "two-values": np.where(normal > 0, 1.0, -1.0),
        "one-value": np.full(10, 3.0),
        "image": rng.integers(0, 256, 50_000) / 255,
    }
    return {name: array.astype(np.float32) for name, array in arrays.items()}


DATA = shapes_of_data()
each_data = pytest.mark.parametrize("x", DATA.values(), ids=DATA.keys())


@given(x=data, bins=st.integers(2, 64))
@settings(max_examples=100)
def test_bins_hold_exactly_the_values_in_them(x: np.ndarray, bins: int) -> None:
    observer = observe(x, bins=bins)
    assert (observer.low, observer.high) == (x.min(), x.max())
    assert observer.count == x.size == observer.counts.sum()
    assert observer.zeros == np.count_nonzero(x == 0)
    assert observer.counts.size <= bins
    edges = (observer.first + np.arange(observer.counts.size + 1)) * 2.0**observer.exponent
    inside = (x[:, None] >= edges[:-1]) & (x[:, None] < edges[1:])
    np.testing.assert_array_equal(inside.sum(axis=0), observer.counts)


@given(x=data, cuts=st.lists(st.integers(0, 60), max_size=5), bins=st.sampled_from([2, 16, 2048]))
@settings(max_examples=100)
def test_any_split_and_any_merge_give_the_same_observer(
    x: np.ndarray, cuts: list[int], bins: int
) -> None:
    parts = np.split(x, sorted(cuts))
    whole = without_averages(observe(x, bins=bins))
    assert without_averages(observe(*parts, bins=bins)) == whole
    assert without_averages(observe(*reversed(parts), bins=bins)) == whole
    merged = observe(bins=bins)
    for part in parts:
        merged.merge(observe(part, bins=bins))
    assert without_averages(merged) == whole


@given(x=data)
@settings(max_examples=30)
def test_an_observer_survives_json(x: np.ndarray) -> None:
    observer = observe(x, x / 2)
    restored = HistogramObserver.from_dict(json.loads(json.dumps(observer.to_dict())))
    assert restored.to_dict() == observer.to_dict()
    restored.update(x)
    assert restored.count == 3 * x.size


@pytest.mark.parametrize("change", [{"count": 7}, {"more": 1}], ids=["count", "field"])
def test_a_damaged_cache_is_refused(change: dict[str, int]) -> None:
    with pytest.raises(DataError, match="Calibrate again"):
        HistogramObserver.from_dict({**observe(np.ones(3)).to_dict(), **change})


def test_memory_and_time_do_not_grow_with_the_data() -> None:
    observer = HistogramObserver("x")
    rng = np.random.default_rng(0)
    for power in range(30):
        observer.update(rng.standard_normal(1000) * 1.7**power)
    assert 1024 <= observer.counts.size <= 2048
    assert observer.counts.sum() == observer.count == 30_000


def test_blocks_have_no_seams() -> None:
    x = np.random.default_rng(0).standard_normal(200_001).astype(np.float32)
    whole = without_averages(observe(x))
    assert without_averages(observe(*np.array_split(x, 1000))) == whole


def test_extreme_ratios_keep_the_count() -> None:
    x = np.array([-3e38, -1e-45, 0, 1e-45, 3e38], np.float32)
    for part in (x, x[:2], x[3:], x[1:2], x[1:4]):
        observer = observe(part)
        assert observer.counts.sum() == part.size
        observer.merge(observe(x))
        assert observer.counts.sum() == part.size + 5


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf], ids=str)
@pytest.mark.parametrize("bins", [0, 2048])
def test_bad_values_name_the_tensor(bad: float, bins: int) -> None:
    with pytest.raises(DataError, match="'conv1/output'"):
        HistogramObserver("conv1/output", bins).update(np.array([1.0, bad, 2.0], np.float32))


def test_an_observer_without_bins_keeps_the_range_only() -> None:
    observer = observe(np.array([-1.0, 0.0]), np.array([5.0]), bins=0)
    assert (observer.low, observer.high, observer.count) == (-1, 5, 3)
    assert find_range(observer, "minmax", UNSIGNED) == (-1, 5)
    with pytest.raises(UsageError, match="histogram"):
        find_range(observer, "mse", UNSIGNED)
    with pytest.raises(UsageError, match="cannot be merged"):
        observer.merge(observe(np.ones(1)))


@pytest.mark.parametrize("bins", [-1, 1])
def test_too_few_bins_are_refused(bins: int) -> None:
    with pytest.raises(UsageError, match=f"{bins} bins"):
        HistogramObserver("x", bins)


def test_a_tensor_that_was_never_reached_is_an_error() -> None:
    observer = observe(np.zeros((0, 3)))
    with pytest.raises(DataError, match="'x'"):
        find_range(observer, "minmax", UNSIGNED)


@pytest.mark.parametrize(("method", "percentile"), [("max", 99), ("percentile", 0)], ids=str)
def test_unknown_methods_are_refused(method: str, percentile: float) -> None:
    with pytest.raises(UsageError, match="minmax, percentile, mse, entropy, moving_average"):
        find_range(observe(np.ones(3)), method, UNSIGNED, percentile)  # type: ignore[arg-type]


@each_method
@each_spec
@each_data
def test_every_range_holds_zero_and_stays_inside(
    method: RangeMethod, spec: QuantSpec, x: np.ndarray
) -> None:
    low, high = find_range(observe(x), method, spec)
    assert min(float(x.min()), 0) <= low <= 0 <= high <= max(float(x.max()), 0)
    assert high > low
    assert math.copysign(1, high) == 1
    if method == "minmax":
        assert (low, high) == (min(float(x.min()), 0), max(float(x.max()), 0))


@each_method
@each_spec
@given(x=data)
@settings(max_examples=25)
def test_every_range_of_anything_is_a_range(
    method: RangeMethod, spec: QuantSpec, x: np.ndarray
) -> None:
    low, high = find_range(observe(x, bins=256), method, spec)
    assert min(float(x.min()), 0) <= low <= 0 <= high <= max(float(x.max()), 0)
    assert high > low or not x.any()


@each_spec
@each_data
def test_mse_is_near_the_best_of_many_ranges(spec: QuantSpec, x: np.ndarray) -> None:
    """Against brute force over both ends with the real quantizer on the real data."""
    low, high = find_range(observe(x), "minmax", spec)
    fractions = np.linspace(0.1, 1, 19)
    best = min(
        mean_squared_error(x, (low * a, high * b), spec)
        for a in (fractions if low else [1.0])
        for b in (fractions if high else [1.0])
    )
    found = mean_squared_error(x, find_range(observe(x), "mse", spec), spec)
    assert found <= 1.1 * best + 1e-12


@pytest.mark.parametrize("name", ["normal", "laplace", "relu", "outlier"])
def test_clipping_pays_at_four_bits(name: str) -> None:
    x = DATA[name]
    for spec in FOUR_BITS:
        whole = find_range(observe(x), "minmax", spec)
        for method in ("mse", "entropy"):
            found = find_range(observe(x), method, spec)  # type: ignore[arg-type]
            assert found[1] < 0.95 * whole[1]
            assert mean_squared_error(x, found, spec) < 0.9 * mean_squared_error(x, whole, spec)


@pytest.mark.parametrize("name", ["normal", "laplace", "outlier"])
def test_mse_clips_for_a_float_of_four_bits_and_entropy_follows_it(name: str) -> None:
    spec = QuantSpec("float4_e2m1")
    observer = observe(DATA[name])
    whole, found = (find_range(observer, m, spec) for m in ("minmax", "mse"))
    assert found[1] < 0.95 * whole[1]
    errors = [mean_squared_error(DATA[name], ends, spec) for ends in (whole, found)]
    assert errors[1] < 0.9 * errors[0]
    assert find_range(observer, "entropy", spec) == found


def test_mse_leaves_a_wide_float_its_whole_range() -> None:
    for dtype in ("float16", "bfloat16"):
        found = find_range(observe(DATA["outlier"]), "mse", QuantSpec(dtype))
        assert found[1] == DATA["outlier"].max()


@each_other_spec
@pytest.mark.parametrize("name", ["normal", "laplace", "relu", "hardswish", "outlier"])
def test_mse_is_near_the_best_range_for_every_format(spec: QuantSpec, name: str) -> None:
    x = DATA[name][::5]
    low, high = find_range(observe(x), "minmax", spec)
    fractions = np.linspace(0.05, 1, 39)
    ends = [(low * a, high * a) for a in fractions]
    if not spec.symmetric and low:
        ends += [(low * a, high * b) for a in fractions[::3] for b in fractions[::3]]
    best = min(mean_squared_error(x, end, spec) for end in ends)
    found = mean_squared_error(x, find_range(observe(x), "mse", spec), spec)
    assert found <= 1.1 * best + 1e-12


@each_method
@each_other_spec
@given(x=data)
@settings(max_examples=5)
def test_every_format_gets_a_range_of_anything(
    method: RangeMethod, spec: QuantSpec, x: np.ndarray
) -> None:
    low, high = find_range(observe(x, bins=64), method, spec)
    assert min(float(x.min()), 0) <= low <= 0 <= high <= max(float(x.max()), 0)
    assert high > low or not x.any()


batches = st.lists(data, min_size=1, max_size=6)


@given(parts=batches)
@settings(max_examples=50)
def test_the_moving_average_follows_its_formula(parts: list[np.ndarray]) -> None:
    low, high = float(parts[0].min()), float(parts[0].max())
    for part in parts[1:]:
        low = 0.9 * low + 0.1 * float(part.min())
        high = 0.9 * high + 0.1 * float(part.max())
    observer = observe(*parts, np.zeros((0, 3)), bins=0)
    scale = max(abs(observer.low), abs(observer.high))
    assert observer.average_low == pytest.approx(low, abs=1e-9 * scale)
    assert observer.average_high == pytest.approx(high, abs=1e-9 * scale)
    assert observer.low <= observer.average_low <= observer.average_high <= observer.high
    found = find_range(observer, "moving_average", SIGNED)
    if observer.average_low < 0 < observer.average_high:
        assert found == (observer.average_low, observer.average_high)


def test_the_moving_average_forgets_an_outlier_and_depends_on_the_order() -> None:
    ones, outlier = [np.array([-1.0, 1.0])] * 20, np.array([-1.0, 1000.0])
    early, late = observe(outlier, *ones), observe(*ones, outlier)
    assert find_range(late, "moving_average", SIGNED) == pytest.approx((-1, 100.9))
    assert find_range(early, "moving_average", SIGNED) == pytest.approx((-1, 1 + 999 * 0.9**20))
    assert find_range(early, "minmax", SIGNED) == find_range(late, "minmax", SIGNED) == (-1, 1000)


def test_merged_moving_averages_are_the_wider_of_both() -> None:
    merged = observe(bins=0)
    for part in (np.array([-3.0, 2.0]), np.array([-1.0, 5.0]), np.zeros(0)):
        merged.merge(observe(part, bins=0))
    assert find_range(merged, "moving_average", SIGNED) == (-3, 5)


def test_an_observer_of_everything_does_not_grow_with_the_data() -> None:
    observer, rng = HistogramObserver("x", 64), np.random.default_rng(0)
    for batch in range(200):
        observer.update(rng.standard_normal(500) * (1 + batch))
    held = vars(observer)
    arrays = [value for value in held.values() if isinstance(value, np.ndarray)]
    assert sum(array.nbytes for array in arrays) <= 64 * 8
    assert all(isinstance(value, str | int | float | np.ndarray) for value in held.values())
    for method in METHODS:
        assert find_range(observer, method, SIGNED)[1] > 0


def test_entropy_keeps_the_mass_of_outliers() -> None:
    """A tenth of the values far out is no outlier: dropping it would look like a perfect match."""
    rng = np.random.default_rng(0)
    x = np.append(rng.standard_normal(45_000), 40 + rng.standard_normal(5_000))
    assert find_range(observe(x), "entropy", UNSIGNED)[1] > 39


@each_spec
@pytest.mark.parametrize("method", ["percentile", "mse", "entropy"])
def test_exact_zeros_change_nothing(method: RangeMethod, spec: QuantSpec) -> None:
    x = DATA["laplace"]
    with_zeros = observe(x, np.zeros(10 * x.size))
    assert find_range(with_zeros, method, spec) == find_range(observe(x), method, spec)


@each_method
def test_all_zeros_and_single_values(method: RangeMethod) -> None:
    assert find_range(observe(np.zeros(5)), method, UNSIGNED) == (0, 0)
    assert find_range(observe(np.full(5, -2.5)), method, UNSIGNED)[0] == -2.5


@pytest.mark.parametrize("percentile", [50.0, 90.0, 99.0, 99.99, 100.0])
def test_percentiles_of_each_side(percentile: float) -> None:
    x = DATA["hardswish"]
    observer = observe(x)
    width = 2.0**observer.exponent

    def check(sizes: np.ndarray, end: float) -> None:
        outside = (1 - percentile / 100) * sizes.size
        assert np.count_nonzero(sizes > end + width) <= outside + 1
        assert np.count_nonzero(sizes > end - width) >= outside - 1

    low, high = find_range(observer, "percentile", UNSIGNED, percentile)
    check(x[x > 0], high)
    check(-x[x < 0], -low)
    low, high = find_range(observer, "percentile", SIGNED, percentile)
    check(abs(x[x != 0]), max(-low, high))
    if percentile == 100:
        assert high == x.max()
