from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st

from compress.assignment import total_us
from compress.data import load_data
from compress.lowering import Lowered, lower
from compress.mixed import (
    INT8,
    Placement,
    _by_region,
    _Search,
    place_by_measurement,
    recall,
    remember,
)
from compress.model import Arrays, Model
from compress.passes import Context
from compress.regions import Region, cut_regions
from compress.registry import create_pass
from compress.target import Capabilities, Check, Engine, Kernel, KernelTime
from compress.trial import Trials
from compress.variants import BASELINE, Screening, Variant
from compress.workload import make_workload
from targets.onnxruntime import OnnxRuntime

TARGET = OnnxRuntime(threads=1)
FLOAT = "float32"
BLOCKS = 4
PAD = "<pads=[1,1,1,1]>"


def ignore(advance: float = 1, note: str = "") -> None:
    return None


@pytest.fixture(scope="module")
def model(onnx_model: Callable[..., Model]) -> Model:
    """Residual blocks of 16 channels on images of 32 x 32, a pool and a classifier."""
    body = f"[stem] s = Conv{PAD}(x, w) [stem_relu] t0 = Relu(s)"
    for index in range(1, BLOCKS + 1):
        n, before = f"b{index}", f"t{index - 1}"
        body += f""" [{n}_conv1] {n}a = Conv{PAD}({before}, v{index}) [{n}_relu1] {n}r = Relu({n}a)
        [{n}_conv2] {n}c = Conv{PAD}({n}r, u{index}) [{n}_add] {n}s = Add({n}c, {before})
        [{n}_relu2] t{index} = Relu({n}s)"""
    body += f" [pool] p = GlobalAveragePool(t{BLOCKS}) [flat] f = Flatten(p) [fc] y = Gemm(f, k)"
    text = f"blocks (float[batch,3,32,32] x) => (float[batch,10] y) {{{body}}}"
    weights: dict[str, tuple[int, ...]] = {"w": (16, 3, 3, 3), "k": (16, 10)}
    weights |= {f"{k}{i}": (16, 16, 3, 3) for k in "uv" for i in range(1, BLOCKS + 1)}
    return onnx_model(text, **weights)


@pytest.fixture(scope="module")
def lowered(model: Model) -> Lowered:
    data = load_data(model.example(4), model.inputs)
    context = Context(target=TARGET, original=model, calibration=data)
    return lower(model, [create_pass("quantize", samples=4)], context)


@pytest.fixture(scope="module")
def regions(lowered: Lowered) -> tuple[Region, ...]:
    return cut_regions(lowered.float_model.graph_model)


@dataclass
class Pair:
    """A screening with the two uniform variants in it."""

    screening: Screening
    wide: Variant
    narrow: Variant

    def place(
        self, lowered: Lowered, remembered: Sequence[str] | None = None, seconds: float = 0
    ) -> Placement | None:
        return place_by_measurement(
            lowered,
            self.wide,
            self.narrow,
            self.screening,
            deadline=time.monotonic() + seconds,
            remembered=remembered,
        )


@pytest.fixture
def pair(model: Model, lowered: Lowered) -> Iterator[Pair]:
    """Both variants, built and timed."""
    workload = make_workload(model, None, batch=1, objective="latency", threads=1)
    wide = Variant(BASELINE, TARGET, model, FLOAT)
    narrow = Variant("onnxruntime int8", TARGET, lowered.apply(), INT8)
    with Trials() as trials:
        screening = Screening(workload, wide, ignore, trials)
        screening.time([narrow], seconds=0.1)
        yield Pair(screening, wide, narrow)


def mixed_rows(screening: Screening) -> list[dict[str, Any]]:
    return [dict(row) for row in screening.rows() if row["precision"] == "mixed"]


def float_sites(regions: Sequence[Region], assignment: Sequence[str]) -> set[str]:
    pairs = zip(regions, assignment, strict=True)
    return {site for region, precision in pairs if precision == FLOAT for site in region.sites}


def check_placed_as(model: Model, kept: set[str]) -> None:
    """Inside the float regions there is no conversion, and every other product is int8."""
    for node in model.graph_model.graph:
        products = node.op_type in ("Conv", "Gemm")
        if node.name not in kept:
            assert not products or dequantized(node.inputs[1])
            continue
        for value in node.inputs:
            if dequantized(value):
                assert value is not None
                # What is dequantized for a float region was written outside of it.
                writer = origin(value)
                assert writer is not None, f"{node.name} reads a constant in int8"
                assert writer.name not in kept


def dequantized(value: ir.Value | None) -> bool:
    producer = value.producer() if value is not None else None
    return producer is not None and producer.op_type == "DequantizeLinear"


def origin(value: ir.Value) -> ir.Node | None:
    """What wrote the numbers that a QuantizeLinear and a DequantizeLinear lie behind."""
    source: ir.Value | None = value
    while source is not None and (node := source.producer()) is not None:
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear", "Clip"):
            return node
        source = node.inputs[0]
    return None


def test_the_network_has_enough_regions(regions: tuple[Region, ...]) -> None:
    assert len(regions) >= 3
    assert regions[1].inputs == (0,)


def test_a_search_gives_every_region_a_precision(
    pair: Pair, lowered: Lowered, regions: tuple[Region, ...]
) -> None:
    found = pair.place(lowered, seconds=3)
    assert found is not None
    assert (found.runtime, found.wide, found.regions) == ("onnxruntime", FLOAT, regions)
    assert len(found.chosen) == len(regions)
    assert set(found.chosen) <= {INT8, FLOAT}
    tried = mixed_rows(pair.screening)
    assert len(tried) == found.trials
    assert pair.screening.failures == {}
    # Only the best is kept; what was tried stays in the table.
    kept = [row["name"] for row in tried if row["name"] in pair.screening.engines]
    mixed = len(set(found.chosen)) > 1
    assert kept == (["onnxruntime mixed"] if mixed else [])
    for row in tried:
        variant = pair.screening.variants[row["name"]]
        assert 0 < row["float_sites"] < sum(len(region.sites) for region in regions)
        check_placed_as(variant.model, set(variant.kept_float))
    if mixed:
        best = pair.screening.variants["onnxruntime mixed"]
        assert set(best.kept_float) == float_sites(regions, found.chosen)


def test_profiles_are_scaled_to_the_latencies(pair: Pair, lowered: Lowered) -> None:
    found = pair.place(lowered, remembered=[INT8] * 5)
    assert found is not None
    for precision, name in ((INT8, pair.narrow.name), (FLOAT, BASELINE)):
        total_ms = sum(cost[precision] for cost in found.costs_us) / 1e3
        assert total_ms == pytest.approx(pair.screening.latency_ms[name])
    assert all(set(cost) == {INT8, FLOAT} for cost in found.costs_us)
    for region, entries in zip(found.regions, found.edges, strict=True):
        assert [source for source, _ in entries] == list(region.inputs)
        for _, price in entries:
            assert price[INT8, FLOAT] == price[FLOAT, INT8] > 0


@pytest.mark.parametrize("remembered", [(INT8, FLOAT), (FLOAT, INT8)], ids=["end", "start"])
def test_what_is_remembered_is_tried_and_nothing_else(
    pair: Pair, lowered: Lowered, regions: tuple[Region, ...], remembered: tuple[str, str]
) -> None:
    wanted = [remembered[index % 2] for index in range(len(regions))]
    before = set(pair.screening.variants)
    found = pair.place(lowered, remembered=wanted, seconds=600)
    assert found is not None
    assert found.trials == 1
    (name,) = set(pair.screening.variants) - before
    variant = pair.screening.variants[name]
    assert set(variant.kept_float) == float_sites(regions, wanted)
    assert found.chosen in (wanted, [INT8] * len(regions), [FLOAT] * len(regions))
    assert (name == "onnxruntime mixed") == (found.chosen == wanted)
    check_placed_as(variant.model, set(variant.kept_float))
    kernels = {k.site: k.precision for k in TARGET.build(variant.model).kernels()}
    for region, precision in zip(regions, wanted, strict=True):
        products = [s for s in region.sites if "conv" in s or s in ("stem", "fc")]
        assert {kernels[site] for site in products} == {precision}


@pytest.mark.parametrize("precision", [INT8, FLOAT])
def test_a_remembered_uniform_model_is_not_built_again(
    pair: Pair, lowered: Lowered, regions: tuple[Region, ...], precision: str
) -> None:
    found = pair.place(lowered, remembered=[precision] * len(regions), seconds=600)
    assert found is not None
    assert found.trials == 0
    assert set(pair.screening.variants) == {BASELINE, "onnxruntime int8"}


def test_what_is_not_int8_is_remembered_as_the_wide_precision_of_today(
    pair: Pair, lowered: Lowered, regions: tuple[Region, ...]
) -> None:
    found = pair.place(lowered, remembered=["bfloat16"] * len(regions))
    assert found is not None
    # It is the uniform float variant, and that was measured already.
    assert found.trials == 0
    assert all(row["precision"] in row["predicted_us"] for row in found.rows())


def test_a_memory_of_other_regions_is_not_used(pair: Pair, lowered: Lowered) -> None:
    found = pair.place(lowered, remembered=[FLOAT, INT8])
    assert found is not None
    assert math.isfinite(found.predicted_us)


def test_outputs_of_a_mixed_model_stay_close(
    lowered: Lowered, regions: tuple[Region, ...], model: Model
) -> None:
    inputs = model.example(4)
    expected = TARGET.build(model)(inputs)["y"]
    kept = tuple(site for region in regions[::2] for site in region.sites)
    got = TARGET.build(lowered.apply(kept))(inputs)["y"]
    assert 0 < np.abs(got - expected).max() < 0.1 * np.abs(expected).max()


def test_one_region_leaves_nothing_to_choose(pair: Pair, onnx_model: Callable[..., Model]) -> None:
    single = onnx_model("g (float[batch,8] x) => (float[batch,8] y) { y = Gemm(x, w) }", w=(8, 8))
    context = Context(target=TARGET, original=single)
    assert pair.place(lower(single, [create_pass("quantize")], context)) is None


@dataclass
class _Unprofiled:
    """An engine of a runtime without a profiler."""

    engine: Engine

    def __post_init__(self) -> None:
        self.name, self.inputs = self.engine.name, self.engine.inputs
        self.outputs = self.engine.outputs

    def __call__(self, inputs: Arrays) -> Arrays:
        return self.engine(inputs)

    def save(self, directory: Path) -> list[Path]:
        return self.engine.save(directory)

    def kernels(self) -> tuple[Kernel, ...]:
        return self.engine.kernels()

    def profile(self, inputs: Arrays, runs: int = 20) -> tuple[KernelTime, ...]:
        return ()


@dataclass(frozen=True)
class _NoProfiler:
    """ONNX Runtime, but it does not tell which kernel takes how long."""

    name: ClassVar[str] = "blind"

    @property
    def capabilities(self) -> Capabilities:
        return TARGET.capabilities

    def check(self) -> Check:
        return TARGET.check()

    def build(self, model: Model) -> Engine:
        return _Unprofiled(TARGET.build(model))

    def load(self, directory: Path) -> Engine:
        return TARGET.load(directory)


def test_a_runtime_without_profiler_is_not_placed(pair: Pair, lowered: Lowered) -> None:
    blind = dataclasses.replace(pair.narrow, name="blind int8", target=_NoProfiler())
    pair.screening.time([blind], seconds=0.05)
    pair.narrow = blind
    assert pair.place(lowered, seconds=600) is None


def test_an_engine_that_was_not_built_is_not_placed(pair: Pair, lowered: Lowered) -> None:
    pair.screening.forget(pair.narrow.name)
    assert pair.place(lowered, seconds=600) is None


# The search with numbers instead of measurements.


def placement(
    regions: tuple[Region, ...], costs: list[tuple[float, float]], us: float
) -> Placement:
    """Costs in int8 and in float, and of every conversion between neighbours."""
    prices = {(INT8, FLOAT): us, (FLOAT, INT8): us}
    return Placement(
        "onnxruntime",
        FLOAT,
        regions,
        [{INT8: narrow, FLOAT: wide} for narrow, wide in costs],
        [[(source, prices) for source in region.inputs] for region in regions],
    )


CHEAP_IN_FLOAT = [(10.0, 40.0), (10.0, 40.0), (30.0, 10.0), (10.0, 40.0), (10.0, 40.0)]


@pytest.fixture
def searching(pair: Pair, lowered: Lowered) -> Callable[[Placement], _Search]:
    def make(given: Placement) -> _Search:
        return _Search(lowered, pair.narrow, pair.wide, pair.screening, given)

    return make


@pytest.mark.parametrize(
    ("conversion_us", "queued", "predicted_us"),
    [
        # 20 us are gained, and twice the conversion is paid; doubted, it counts three times.
        (3.0, True, 50 + 2 * 3.0),
        (9.0, True, 50 + 2 * 9.0),
        # Not worth it as estimated, but tried as if conversions were free.
        (11.0, True, 70),
    ],
    ids=["clearly", "narrowly", "not"],
)
def test_float_where_it_is_cheaper_with_conversions(
    searching: Callable[[Placement], _Search],
    regions: tuple[Region, ...],
    conversion_us: float,
    queued: bool,
    predicted_us: float,
) -> None:
    assert len(regions) == len(CHEAP_IN_FLOAT)
    given = placement(regions, CHEAP_IN_FLOAT, conversion_us)
    search = searching(given)
    search.start()
    one_float = [INT8, INT8, FLOAT, INT8, INT8]
    assert (search.waiting == [one_float]) == queued
    assert given.predicted_us == pytest.approx(predicted_us)
    assert given.kept_float(one_float) == regions[2].sites


def test_what_is_best_as_a_whole_is_not_queued(
    searching: Callable[[Placement], _Search], regions: tuple[Region, ...]
) -> None:
    search = searching(placement(regions, [(10.0, 20.0)] * len(regions), 1.0))
    search.start()
    assert search.waiting == []
    assert search.flush() is False


@pytest.mark.parametrize(("best_ms", "hopeless"), [(0.030, True), (0.052, False), (1.0, False)])
def test_a_prediction_far_behind_another_runtime(
    pair: Pair,
    searching: Callable[[Placement], _Search],
    regions: tuple[Region, ...],
    best_ms: float,
    hopeless: bool,
) -> None:
    search = searching(placement(regions, CHEAP_IN_FLOAT, 3.0))  # 56 us
    search.start()
    pair.screening.latency_ms = {BASELINE: 2.0, pair.narrow.name: best_ms}
    assert search.hopeless() == hopeless


def test_neighbours_by_their_prediction(
    searching: Callable[[Placement], _Search], regions: tuple[Region, ...]
) -> None:
    costs = [(100.0, 101.0), (100.0, 500.0), (100.0, 90.0), (100.0, 500.0), (100.0, 110.0)]
    given = placement(regions, costs, 2.0)
    search = searching(given)
    search.best = [INT8] * len(regions)
    flips = [[index for index, p in enumerate(one) if p == FLOAT] for one in search.promising()]
    # The second and the fourth would cost more than a tenth of all.
    assert flips == [[2], [0], [4]]
    for one in search.promising():
        assert total_us(given.costs_us, given.edges, one) < 1.1 * 500
    search.names[tuple([INT8, INT8, FLOAT, INT8, INT8])] = "tried"
    assert len(list(search.promising())) == 2


def test_kept_float_and_rows_follow_the_assignment(regions: tuple[Region, ...]) -> None:
    given = placement(regions, CHEAP_IN_FLOAT, 1.0)
    given.chosen = [FLOAT, INT8, INT8, FLOAT, INT8]
    assert given.kept_float([INT8] * 5) == ()
    assert given.kept_float(given.chosen) == regions[0].sites + regions[3].sites
    rows = given.rows()
    assert [row["precision"] for row in rows] == given.chosen
    assert [row["name"] for row in rows] == [region.name for region in regions]
    assert json.loads(json.dumps(rows)) == rows
    assert {row["precision"] for row in given.rows("int8")} == {"int8"}


# Where the time goes.


def timed(site: str, p50_us: float) -> KernelTime:
    return KernelTime(Kernel(f"kernel of {site}", "Op", FLOAT, site), p50_us)


OWNERS = {"a": 0, "b": 1, "c": 1, "d": 2}


@pytest.mark.parametrize(
    ("kernels", "expected"),
    [
        ([("a", 1), ("b", 2), ("c", 3), ("d", 4)], {0: 1, 1: 5, 2: 4}),
        ([("", 1), ("a", 2), ("", 3), ("other", 4), ("b", 5)], {0: 3, 1: 12}),
        ([("a", 1), ("d", 2), ("", 3)], {0: 1, 2: 5}),
        ([("d", 1), ("a", 2), ("", 4)], {0: 6, 2: 1}),
        ([("", 1), ("", 2)], {0: 3}),
    ],
    ids=["all known", "before its reader", "after the last", "out of order", "none known"],
)
def test_a_kernel_without_site_belongs_to_the_next(
    kernels: list[tuple[str, float]], expected: dict[int, float]
) -> None:
    found = _by_region([timed(site, p50_us) for site, p50_us in kernels], OWNERS)
    assert {index: us for index, us in found.items() if us} == expected


@given(st.lists(st.tuples(st.sampled_from(["", "x", *OWNERS]), st.floats(0, 1e6))))
def test_no_time_is_lost(kernels: list[tuple[str, float]]) -> None:
    found = _by_region([timed(site, p50_us) for site, p50_us in kernels], OWNERS)
    assert sum(found.values()) == pytest.approx(sum(p50_us for _, p50_us in kernels))
    assert set(found) <= {0, 1, 2}


# Memory.


def test_what_was_remembered_is_recalled(regions: tuple[Region, ...], tmp_path: Path) -> None:
    file = tmp_path / "new folder" / "placement.json"
    one = placement(regions, CHEAP_IN_FLOAT, 1.0)
    other = dataclasses.replace(one, runtime="openvino", chosen=[INT8] * 5)
    one.chosen = [FLOAT, INT8, INT8, FLOAT, INT8]
    remember(file, [one, other])
    assert recall(file) == {"onnxruntime": one.chosen, "openvino": other.chosen}
    remember(file, [other])
    assert recall(file) == {"openvino": other.chosen}
    assert [path.name for path in file.parent.iterdir()] == [file.name]


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"3", b"null", b'{"onnxruntime": 3}', b"\xff\xfe", b'{"onnxruntime": nul'],
    ids=["empty", "cut", "list", "number", "null", "no list", "not text", "no json"],
)
def test_a_damaged_file_is_no_memory(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "placement.json"
    file.write_bytes(content)
    assert recall(file) == {}


def test_no_file_is_no_memory(tmp_path: Path) -> None:
    assert recall(tmp_path / "none.json") == {}
    assert recall(tmp_path) == {}


def test_a_memory_that_cannot_be_written_is_no_error(
    regions: tuple[Region, ...], tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    remember(tmp_path / "file" / "placement.json", [placement(regions, CHEAP_IN_FLOAT, 1.0)])
    assert recall(tmp_path / "file" / "placement.json") == {}
