from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from compress.errors import LoadError, UsageError
from compress.estimate import held, latency
from compress.estimate.analytical import analytical
from compress.estimate.features import FEATURES, Described
from compress.estimate.graphs import Network, quantized
from compress.estimate.peaks import Peaks
from compress.estimate.place import place_of
from compress.estimate.predictor import Predictor, default_path
from compress.estimate.result import Latency, Source, ratio_interval
from compress.estimate.table import Table, configuration, cut_site
from compress.graph import infer_shapes
from compress.model import Model
from compress.roofline import kernel_bound, waterline
from compress.target import Target


@pytest.fixture
def few_networks(monkeypatch: pytest.MonkeyPatch, known_peaks: Peaks) -> None:
    """Two held-out networks instead of ten, and peaks that are known."""
    monkeypatch.setattr(held, "held_models", lambda target: _held(target))
    monkeypatch.setattr(held, "SECONDS", 0.05)


def _held(target: Target) -> list[Model]:
    floats = [residual(width) for width in (8, 12)]
    return floats + [quantized(one, target) for one in floats]


def residual(channels: int = 8) -> Model:
    network = Network((1, 3, 16, 16), name=f"residual {channels}")
    x = network.relu(network.conv(network.start, channels))
    y = network.conv(network.relu(network.conv(x, channels)), channels)
    x = network.relu(network.binary("Add", y, x))
    x = network.pool(x)
    return network.model(network.linear(network.flatten(network.global_pool(x)), 10))


@given(
    kernels=st.lists(st.tuples(st.floats(1, 1e9), st.floats(1, 1e9)), min_size=1, max_size=20),
    peak=st.floats(1e6, 1e12),
    bandwidth=st.floats(1e6, 1e12),
)
def test_the_waterline_is_below_the_peak(
    kernels: list[tuple[float, float]], peak: float, bandwidth: float
) -> None:
    bounds = [kernel_bound(macs, moved, peak, bandwidth) for macs, moved in kernels]
    assert waterline(bounds) <= peak * (1 + 1e-9)
    resident = [kernel_bound(macs, 0.0, peak, bandwidth) for macs, _ in kernels]
    assert waterline(resident) == pytest.approx(peak)
    assert not any(one.memory_bound for one in resident)
    fused = [kernel_bound(macs, moved / 2, peak, bandwidth) for macs, moved in kernels]
    assert sum(one.seconds for one in fused) <= sum(one.seconds for one in bounds)


def test_no_arithmetic_has_no_waterline() -> None:
    assert waterline([]) == 0.0
    assert waterline([kernel_bound(0, 100, 1e9, 1e9)]) == 0.0


@given(st.lists(st.floats(0.1, 10), min_size=1, max_size=200))
def test_the_interval_of_ratios_is_their_range_or_less(ratios: list[float]) -> None:
    low, high, coverage = ratio_interval(ratios)
    assert min(ratios) <= low <= high <= max(ratios)
    assert 0 <= coverage < 1
    if len(ratios) < 19:
        assert coverage == pytest.approx(1 - 2 / (len(ratios) + 1))
    else:
        assert coverage >= 0.9 - 1e-9


def test_the_interval_holds_what_comes_next() -> None:
    rng = np.random.default_rng(0)
    inside = 0
    for _ in range(400):
        drawn = rng.lognormal(0, 0.3, 31)
        low, high, coverage = ratio_interval(drawn[:-1])
        inside += low <= drawn[-1] <= high
    assert inside / 400 == pytest.approx(coverage, abs=0.05)


def test_a_latency_never_goes_without_its_source(ort: Target) -> None:
    source = Source("predicted", place_of(ort))
    found = Latency(1.0, 0.9, 1.2, source, 0.9, "errors")
    assert str(found) == "1.00 ms [0.90, 1.20] predicted"
    values = json.loads(json.dumps(found.to_dict()))
    assert values["kind"] == "predicted"
    assert place_of(ort).fingerprint in values["source"]
    assert "1 thread" in values["source"]
    assert "onnxruntime 1." in values["source"]
    for wrong in (None, "predicted", ""):
        with pytest.raises(TypeError, match="source"):
            Latency(1.0, 0.9, 1.2, wrong, 0.9, "errors")  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        Latency(1.0, 0.9, 1.2)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="measured"):
        Source("guessed", place_of(ort))  # type: ignore[arg-type]
    for numbers in ((0.0, 0.0, 1.0), (1.0, 1.1, 1.2), (1.0, 0.9, float("inf"))):
        with pytest.raises(ValueError, match="in order"):
            Latency(*numbers, source, 0.9, "errors")


def test_the_analytical_estimate_is_the_roofline_times_what_others_took(ort: Target) -> None:
    place = place_of(ort)
    peaks = Peaks(
        gmacs_per_second={"float32": 100.0, "int8": 400.0},
        bandwidth_gb_s=10.0,
        threads=1,
        source="made up",
        place=place,
    )
    values = (0.0,) * len(FEATURES)
    kernels = [
        Described("Conv int8", "", 400_000_000, 10, values, "a", "a", "int8"),
        Described("Add float32", "", 0, 10_000_000, values, "b", "b", "float32"),
    ]
    found = analytical(kernels, peaks, {"int8": [1.5, 2.0, 4.0], "float": [9.0]})
    assert found.median_ms == pytest.approx(2 * (1.0 + 1.0))
    assert (found.low_ms, found.high_ms) == (pytest.approx(3.0), pytest.approx(8.0))
    assert found.coverage == pytest.approx(0.5)
    assert [one.note for one in found.kernels] == ["", "memory-bound"]
    assert "bound of 2 ms" in found.evidence


def test_every_site_can_be_cut_out_and_runs(ort: Target) -> None:
    for model in (residual(), quantized(residual(), ort)):
        shapes = infer_shapes(model.graph_model)
        own = {kernel.site for kernel in ort.build(model).kernels()}
        for node in model.graph_model.graph:
            if node.name in own:
                cut = cut_site(model, node, shapes).model
                assert ort.build(cut)(cut.example())


def test_a_site_takes_its_activation_and_its_scales_along(ort: Target) -> None:
    model = residual()
    nodes = {node.name: node for node in model.graph_model.graph}
    cut = cut_site(model, nodes["Conv_0"], infer_shapes(model.graph_model))
    assert [node.op_type for node in cut.model.graph_model.graph] == ["Conv", "Relu"]
    small = quantized(model, ort)
    nodes = {node.name: node for node in small.graph_model.graph}
    cut = cut_site(small, nodes["Conv_0"], infer_shapes(small.graph_model))
    kinds = [node.op_type for node in cut.model.graph_model.graph]
    assert kinds.count("Conv") == 1
    assert kinds[-1] == "QuantizeLinear"
    assert cut.model.inputs[0].dtype == "uint8"
    assert "int8" in {kernel.precision for kernel in ort.build(cut.model).kernels()}


def test_the_table_is_additive_and_measures_each_configuration_once(ort: Target) -> None:
    table = Table.open(ort)
    model = residual()
    total, rows, failed = table.sum(model, ort.build(model))
    assert not failed
    assert total == pytest.approx(sum(time for _, _, time in rows) + table.call_us())
    names = [name for name, _, _ in rows]
    assert "Add_5" not in names  # inside the convolution before it
    assert {"Conv_0", "Conv_2", "Conv_4"} <= set(names)
    measured = table.measured
    again = Table.open(ort)
    assert again.times_us == table.times_us
    assert again.sum(model, ort.build(model))[0] == pytest.approx(total)
    assert again.measured == 0 < measured
    again.path.write_text("{}")
    assert not Table.open(ort).times_us


def test_equal_sites_share_a_configuration() -> None:
    keys = []
    for channels, stride, name in ((8, 1, "a"), (8, 1, "b"), (9, 1, "a"), (8, 2, "a")):
        network = Network((1, 4, 8, 8), name=name)
        x = network.relu(network.conv(network.start, 8, 1))
        model = network.model(network.relu(network.conv(x, channels, 3, stride)))
        node = next(one for one in model.graph_model.graph if one.name == "Conv_2")
        keys.append(configuration(cut_site(model, node, infer_shapes(model.graph_model)).model))
    assert keys[0] == keys[1]
    assert len(set(keys)) == 3


@pytest.mark.usefixtures("few_networks")
@pytest.mark.parametrize("source", ["table", "analytical", "measured", "auto"])
def test_one_function_for_all_sources(source: str, ort: Target) -> None:
    found = latency(residual(), ort, source, sessions=2, seconds=0.2)
    assert found.source.kind == ("measured" if source == "auto" else source)
    assert found.source.place == place_of(ort)
    assert 0 < found.low_ms <= found.median_ms <= found.high_ms
    assert found.evidence
    assert bool(found.kernels) == (source in ("table", "analytical"))


def test_wrong_questions_are_refused(ort: Target, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="measured"):
        latency(residual(), ort, "guessed")
    with pytest.raises(UsageError, match="--build-predictor"):
        latency(residual(), ort, "predicted")
    with pytest.raises(LoadError, match=r"model\.onnx"):
        latency(tmp_path, ort, "analytical")


@pytest.mark.usefixtures("known_peaks")
def test_cli_builds_and_predicts(
    cli: Callable[..., Any], tiny_onnx: Path, tmp_path: Path, built: tuple[Predictor, Path]
) -> None:
    """It goes on from samples that are there: those of a build that was stopped."""
    (tmp_path / "p.samples.jsonl").write_bytes(built[1].read_bytes())
    given = ("--target", "onnxruntime", "--threads", 1)
    out = tmp_path / "p.json"
    built = cli("profile", "--build-predictor", tiny_onnx, *given, "--minutes", 0.05, "--out", out)
    assert built.code == 0, built.err
    assert "held out" in built.out
    assert "within 10%" in built.out
    assert out.is_file()
    asked = ("--source", "predicted", "--predictor", out)
    found = cli("profile", tiny_onnx, *given, *asked)
    assert found.code == 0, found.err
    assert "predicted for onnxruntime, 1 thread" in found.out
    assert "Nothing of this was measured" in found.out
    values = json.loads(cli("profile", tiny_onnx, *given, *asked, "--json").out)
    (one,) = values["estimates"]
    assert one["kind"] == "predicted"
    assert one["kernels"]


def test_cli_predicts_from_the_cache(
    cli: Callable[..., Any], tiny_onnx: Path, predictor: Predictor, ort: Target
) -> None:
    predictor.save(default_path(ort))
    given = ("--target", "onnxruntime", "--threads", 1, "--source", "predicted", "--json")
    result = cli("profile", tiny_onnx, *given)
    assert json.loads(result.out)["estimates"][0]["place"] == predictor.place.to_dict()
    moved = dataclasses.replace(predictor.place, cpu="another")
    dataclasses.replace(predictor, place=moved).save(default_path(ort))
    refused = cli("profile", tiny_onnx, *given)
    assert refused.code == 2
    assert "another" in refused.err


def test_cli_refuses_what_excludes_each_other(cli: Callable[..., Any], tiny_onnx: Path) -> None:
    both = cli("profile", tiny_onnx, "--build-predictor", "--source", "table")
    assert both.code == 2
    assert "exclude" in both.err
    two = cli("profile", tiny_onnx, tiny_onnx)
    assert two.code == 2
    assert "one model" in two.err
    none = cli("profile", tiny_onnx, "--source", "predicted", "--target", "onnxruntime")
    assert none.code == 2
    assert "--build-predictor" in none.err
