from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from compress.errors import LoadError, MissingExtraError, UsageError
from compress.estimate import latency
from compress.estimate.build import build_predictor, window_of
from compress.estimate.features import FEATURES, Described
from compress.estimate.graphs import Network, quantized
from compress.estimate.networks import networks_around, random_network, width
from compress.estimate.place import place_of
from compress.estimate.predictor import Predictor, default_path, load_predictor
from compress.estimate.samples import append_sample, describe_engine, read_samples
from compress.graph import graph_sites
from compress.model import Model
from compress.registry import create_target
from compress.target import Target


def chain(channels: int, name: str = "chain") -> Model:
    network = Network((1, channels, 28, 28), name=name)
    x = network.start
    for _ in range(4):
        x = network.relu(network.conv(x, channels))
    return network.model(x)


def test_four_times_the_channels_are_slower(predictor: Predictor, ort: Target) -> None:
    """Sixteen times the arithmetic; between them the small predictor may err by a lot."""
    times = []
    for model in (chain(16), chain(64)):
        for one in (model, quantized(model, ort)):
            found = predictor.predict(describe_engine(ort.build(one), one))
            assert 0 < found.low_ms <= found.median_ms <= found.high_ms
            assert all(kernel.us > 0 for kernel in found.kernels)
            times.append(found.median_ms)
    small_float, small_int8, large_float, large_int8 = times
    assert large_float > 2 * small_float
    assert large_int8 > 2 * small_int8


def test_what_was_never_sampled_is_said(predictor: Predictor, ort: Target) -> None:
    network = Network((1, 8, 16, 16))
    x = network.conv(network.start, 8)
    model = network.model(network.unary("Erf", x))
    found = predictor.predict(describe_engine(ort.build(model), model))
    assert any("Erf" in line and "never" not in line for line in found.outside)
    known = predictor.predict(describe_engine(ort.build(chain(32)), chain(32)))
    assert found.high_ms / found.low_ms > known.high_ms / known.low_ms
    network = Network((1, 6000, 4, 4))
    huge = network.model(network.conv(network.start, 8, 1))
    far = predictor.predict(describe_engine(ort.build(huge), huge))
    assert any("outside of the samples" in line for line in far.outside)
    assert far.high_ms >= 1.5 * far.median_ms


def test_the_report_tells_errors_of_what_was_held_out(predictor: Predictor) -> None:
    report = predictor.report
    assert report["samples"] >= 16
    assert set(report["networks_held_out"]) == {"float", "int8"}
    row = report["networks_held_out"]["int8"]
    assert row["n"] == report["samples"] / 2
    assert 0 <= row["within_5"] <= row["within_10"] <= 1
    assert row["mape"] > 0
    assert sum(one["share_of_time"] for one in report["kernels_held_out"].values()) <= 1.001
    assert report["machine"]["fingerprint"] == predictor.place.fingerprint
    assert "onnxruntime" in report["versions"]


def test_json_round_trip_predicts_the_same(
    predictor: Predictor, ort: Target, tmp_path: Path
) -> None:
    predictor.save(tmp_path / "p.json")
    again = load_predictor(tmp_path / "p.json", ort)
    kernels = describe_engine(ort.build(chain(24)), chain(24))
    assert again.predict(kernels).to_dict() == predictor.predict(kernels).to_dict()


def _first_type(values: dict[str, Any]) -> dict[str, Any]:
    return dict(next(one for one in values["types"].values() if one["trees"]))


@pytest.mark.parametrize(
    "change",
    [
        lambda v: v.clear(),
        lambda v: v.update(predictor=99),
        lambda v: v.update(features=["macs"]),
        lambda v: v.update(ratios={}),
        lambda v: v.update(ratios={"float": [-1.0]}),
        lambda v: v.update(call_us="x"),
        lambda v: v.update(types=[]),
        lambda v: v["place"].pop("fingerprint"),
        lambda v: v["peaks"].update(bandwidth_gb_s=0),
        lambda v: next(iter(v["types"].values())).update(coefficients=[1.0]),
        lambda v: next(iter(v["types"].values())).update(coefficients=[-1.0] * 6),
        lambda v: next(iter(v["types"].values())).update(ranges={}),
        lambda v: _first_type(v)["trees"]["left"].__setitem__(0, -5),
    ],
)
def test_broken_files_are_refused(predictor: Predictor, tmp_path: Path, change: Any) -> None:
    values = json.loads(json.dumps(predictor.to_dict()))
    change(values)
    path = tmp_path / "p.json"
    path.write_text(json.dumps(values))
    if change.__code__.co_consts and -5 in change.__code__.co_consts:
        load_predictor(path)  # a leaf is anything below zero
        return
    with pytest.raises(LoadError, match=r"p\.json"):
        load_predictor(path)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "[" * 100_000])
def test_files_that_are_no_predictor_are_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "p.json").write_text(text)
    with pytest.raises(LoadError, match=r"p\.json"):
        load_predictor(tmp_path / "p.json")


def test_a_predictor_of_another_place_is_refused(
    predictor: Predictor, ort: Target, tmp_path: Path
) -> None:
    other = dataclasses.replace(predictor.place, fingerprint="0" * 12)
    moved = dataclasses.replace(predictor, place=other)
    moved.save(tmp_path / "p.json")
    with pytest.raises(UsageError, match="0" * 12):
        load_predictor(tmp_path / "p.json", ort)
    with pytest.raises(UsageError, match="mean nothing"):
        latency(chain(8), ort, "predicted", predictor=moved)
    with pytest.raises(UsageError, match="threads"):
        latency(chain(8), create_target("onnxruntime", threads=2), "predicted", predictor=predictor)


def test_a_stopped_build_goes_on(
    built: tuple[Predictor, Path], ort: Target, tmp_path: Path
) -> None:
    _, samples = built
    place = place_of(ort)
    path = tmp_path / "samples.jsonl"
    text = samples.read_text()
    path.write_text(text[:-200])  # killed while it wrote
    before = read_samples(path, place)
    complete = len(text.splitlines()) - 1
    assert len(before) == complete - 1
    append_sample(path, place, before[0])
    assert len(read_samples(path, place)) == complete
    again = build_predictor(ort, minutes=0.05, samples=path)
    assert again.report["samples"] >= complete


def test_samples_of_another_place_are_refused(
    built: tuple[Predictor, Path], tmp_path: Path
) -> None:
    _, samples = built
    other = place_of(create_target("onnxruntime", threads=2))
    with pytest.raises(LoadError, match="never mixed"):
        read_samples(samples, other)
    (tmp_path / "s.jsonl").write_text("{}\n")
    with pytest.raises(LoadError, match="no samples"):
        read_samples(tmp_path / "s.jsonl", other)


def test_building_without_xgboost_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, ort: Target
) -> None:
    monkeypatch.setitem(sys.modules, "xgboost", None)
    with pytest.raises(MissingExtraError, match=r"hwcompress\[predictor\]"):
        build_predictor(ort, minutes=1)


def test_predicting_needs_no_xgboost(
    predictor: Predictor, ort: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "xgboost", None)
    predictor.save(default_path(ort))
    found = latency(chain(32), ort, "predicted")
    assert found.source.kind == "predicted"
    assert latency(chain(32), ort).source.kind in ("predicted", "measured")


def test_sampling_covers_odd_widths() -> None:
    rng = np.random.default_rng(0)
    widths = [width(rng, 4, 512) for _ in range(500)]
    odd = sum(one % 2 for one in widths)
    assert 50 < odd < 200
    assert sum(one % 8 == 0 for one in widths) > 150
    names = {"Conv", "Add", "Concat", "MaxPool", "Gemm", "GlobalAveragePool"}
    seen: set[str] = set()
    for index in range(30):
        model = random_network(np.random.default_rng(index), f"n{index}")
        seen |= {node.op_type for node in model.graph_model.graph}
    assert names <= seen


def test_random_networks_run_and_repeat(ort: Target) -> None:
    for index in range(5):
        one, two = (random_network(np.random.default_rng(index), "n") for _ in range(2))
        first, second = ort.build(one)(one.example()), ort.build(two)(two.example())
        np.testing.assert_array_equal(first["y"], second["y"])
        assert np.isfinite(first["y"]).all()


def test_samples_around_a_convolution_are_like_it(ort: Target) -> None:
    network = Network((1, 40, 14, 14))
    model = network.model(network.conv(network.start, 72, 3, 2))
    kernels = describe_engine(ort.build(model), model)
    (window,) = [found for one in kernels if (found := window_of(one)) is not None]
    assert (window.size, window.channels_in, window.channels_out) == (14, 40, 72)
    assert (window.kernel, window.stride, window.depthwise) == (3, 2, False)
    made = networks_around([window] * 3, np.random.default_rng(0), "n")
    sites = [s for s in graph_sites(made.graph_model) if s.strides == (2, 2)]
    assert len(sites) == 3
    assert all(0.3 * 72 <= site.output[1] <= 1.3 * 72 for site in sites)
    ort.build(made)(made.example())


def test_features_tell_stairs_groups_and_fusion(ort: Target) -> None:
    network = Network((1, 20, 8, 8))
    x = network.relu(network.conv(network.start, 20, 3, 1, 20))
    x = network.relu(network.conv(x, 33, 1))
    model = network.model(x)
    kernels = describe_engine(ort.build(model), model)
    found = {one.type.replace(" blocked", ""): one for one in kernels}
    deep, wide = found["Conv float32 depthwise"], found["Conv float32"]
    assert deep.macs == 20 * 64 * 9
    assert deep.raw["waste_in_8"] == pytest.approx(4 / 20)
    assert wide.raw["channels_out"] == pytest.approx(33)
    assert wide.raw["waste_out_16"] == pytest.approx(15 / 33)
    assert wide.raw["activated"] == 1
    assert isinstance(wide, Described)
    assert len(wide.values) == len(FEATURES)
