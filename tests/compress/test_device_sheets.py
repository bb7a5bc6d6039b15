"""DeviceSheet sheets hold together, and the roofline is the bound that it claims to be."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compress.device_sheet import DeviceSheet, Fact, Kind, Precision
from compress.device_sheets import SHEETS, find_sheet
from compress.errors import UnsupportedError, UsageError
from compress.graph import Site
from compress.roofline import predict

PI5 = find_sheet("raspberry-pi-5")
PIXEL = find_sheet("pixel-8")
sheets = pytest.mark.parametrize("device", SHEETS, ids=lambda device: device.name)


def site(macs: int = 0, output: tuple[int, ...] = (1, 1000), name: str = "a", **rest: Any) -> Site:
    values: dict[str, Any] = {"op_type": "Conv", "inputs": (), "weight": None, "parameters": 0}
    return Site(name=name, output=output, macs=macs, live_bytes=0, **{**values, **rest})


def test_names_are_those_that_users_type() -> None:
    names = [device.name for device in SHEETS]
    assert len(set(names)) == len(names)
    assert all(name == name.lower() and " " not in name for name in names)
    wanted = (
        "cortex-a55 cortex-a76 cortex-a78 cortex-x1 raspberry-pi-4 raspberry-pi-5 pixel-6 pixel-8"
    )
    assert {*wanted.split(), "jetson-orin-nano-cpu", "jetson-orin-nano-gpu"} <= set(names)


@sheets
def test_every_fact_has_a_source_and_says_how_firm_it_is(device: DeviceSheet) -> None:
    for fact in device.facts().values():
        assert fact.value > 0
        assert len(fact.source) > 10
        assert fact.kind in get_args(Kind)


@sheets
def test_the_fastest_cluster_comes_first(device: DeviceSheet) -> None:
    rates = [c.core.float32.value * c.clock_ghz.value for c in device.clusters]
    assert rates == sorted(rates, reverse=True)


@sheets
def test_narrow_arithmetic_is_no_slower(device: DeviceSheet) -> None:
    float32, int8 = device.peak_gmacs("float32"), device.peak_gmacs("int8")
    assert float32 is not None
    assert int8 is not None
    assert int8 >= 2 * float32


@sheets
def test_a_sheet_is_plain_values(device: DeviceSheet) -> None:
    row = json.loads(json.dumps(device.to_dict()))
    assert row["name"] == device.name
    assert set(row["facts"]) == set(device.facts())


def test_peaks_are_lanes_times_pipes_times_clock_times_cores() -> None:
    # Cortex-A76: two 128-bit pipes; 4 float32 or 16 int8 products each; 2.4 GHz; 4 cores.
    assert PI5.peak_gmacs("float32") == pytest.approx(4 * 2 * 2.4 * 4)
    assert PI5.peak_gmacs("int8") == pytest.approx(16 * 2 * 2.4 * 4)
    assert PI5.peak_gmacs("float32", 1) == pytest.approx(4 * 2 * 2.4)
    assert PI5.peak_gmacs("float32", 64) == PI5.peak_gmacs("float32")
    gpu = find_sheet("jetson-orin-nano-gpu").to_dict()["peak_gops"]
    assert gpu["int8"] == pytest.approx(20e3, rel=0.03)  # dense TOPS of the data sheet
    assert gpu["float32"] == pytest.approx(1024 * 2 * 0.625)


@pytest.mark.parametrize("name", ["Pixel 8", "PIXEL_8", " pixel-8 "])
def test_spelling_does_not_matter(name: str) -> None:
    assert find_sheet(name) is PIXEL


@pytest.mark.parametrize(("name", "close"), [("pixle-8", "pixel-8"), ("cortexa76", "cortex-a76")])
def test_an_unknown_device_is_refused_with_the_closest(name: str, close: str) -> None:
    with pytest.raises(UsageError, match=rf"{name}.*Did you mean '{close}'\? Known: cortex-a55"):
        find_sheet(name)


def test_the_larger_of_arithmetic_and_memory_counts() -> None:
    busy = site(macs=76_800_000, output=(1, 1))
    starved = site(output=(1, 17_000_000), name="b")
    assert predict([busy], PI5).predicted_ms == pytest.approx(1.0, rel=1e-3)
    assert predict([starved], PI5).predicted_ms == pytest.approx(4.0)
    both = predict([busy, starved], PI5)
    assert both.predicted_ms == pytest.approx(5.0, rel=1e-3)
    assert both.memory_bound == pytest.approx(0.8, rel=1e-3)


def test_inputs_weights_and_output_are_moved_once() -> None:
    one = site(output=(1, 8), inputs=((1, 4), (1, 8)), parameters=80)
    expected = (8 + 4 + 8 + 80) * 4 / 17e9 * 1e3
    assert predict([one], PI5).predicted_ms == pytest.approx(expected)


def test_only_the_named_operators_are_narrow() -> None:
    sites = [site(output=(1, 1000), name="a"), site(output=(1, 1000), name="b")]
    wide, narrow = predict(sites, PI5), predict(sites, PI5, "int8")
    mixed = predict(sites, PI5, "int8", narrow={"a"})
    assert narrow.predicted_ms == pytest.approx(wide.predicted_ms / 4)
    assert mixed.predicted_ms == pytest.approx((wide.predicted_ms + narrow.predicted_ms) / 2)


def test_what_is_fused_costs_nothing_of_its_own() -> None:
    assert predict([site(op_type="Relu"), site(op_type="Reshape")], PI5).predicted_ms == 0


def test_a_missing_arithmetic_is_refused() -> None:
    with pytest.raises(UnsupportedError, match=r"Raspberry Pi 4.* no float16.*int8"):
        predict([site(macs=1)], find_sheet("raspberry-pi-4"), "float16")


SITES = st.lists(
    st.builds(
        lambda macs, size, weights: site(macs, (1, size), parameters=weights),
        st.integers(0, 10**9),
        st.integers(1, 10**6),
        st.integers(0, 10**6),
    ),
    max_size=6,
)


@given(SITES, st.sampled_from(SHEETS), st.sampled_from(["float32", "int8"]), st.integers(1, 8))
def test_no_prediction_beats_a_peak(
    sites: list[Site], device: DeviceSheet, precision: Precision, cores: int
) -> None:
    found = predict(sites, device, precision, cores=cores)
    peak = device.peak_gmacs(precision, cores)
    assert peak is not None
    moved = sum(one.output[1] + one.parameters for one in sites)
    size = {"float32": 4, "int8": 1}[precision]
    arithmetic = sum(one.macs for one in sites) / peak / 1e6
    memory = moved * size / device.bandwidth_gb_s.value / 1e6
    assert found.predicted_ms >= max(arithmetic, memory) * (1 - 1e-9)
    assert found.predicted_ms <= (arithmetic + memory) * (1 + 1e-9)
    assert 0 <= found.memory_bound <= 1 + 1e-9
    assert predict(sites, device, precision).predicted_ms <= found.predicted_ms * (1 + 1e-9)


def test_facts_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Fact(1.0, "nowhere").value = 2.0  # type: ignore[misc]


def test_the_command_lists_every_sheet(cli: Callable[..., Any]) -> None:
    shown = cli("targets", "--devices").out
    rows = json.loads(cli("targets", "--devices", "--json").out)
    assert [row["name"] for row in rows] == [device.name for device in SHEETS]
    assert all(device.name in shown for device in SHEETS)
