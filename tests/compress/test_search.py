from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest

from compress.data import load_data
from compress.errors import EngineError
from compress.graph import graph_sha256
from compress.latency import Ratio
from compress.lowering import Lowered, lower
from compress.mixed import INT8
from compress.model import Model
from compress.passes import Context
from compress.progress import Progress, Tracker, silent
from compress.regions import cut_regions
from compress.registry import create_pass
from compress.search import (
    FINALISTS,
    Searched,
    _adjust,
    _by_speed,
    _finalists,
    _pair,
    _share,
    search,
)
from compress.target import Capabilities, Check, Engine, Target
from compress.testing import tiny_exported
from compress.trial import Trials
from compress.variants import BASELINE, Screening, Variant
from compress.workload import Workload, make_workload
from targets.onnxruntime import OnnxRuntime

TARGET = OnnxRuntime(threads=1)
FLOAT = "float32"


def ignore(advance: float = 1, note: str = "") -> None:
    return None


@dataclass(frozen=True)
class Picky:
    """ONNX Runtime, but without QuantizeLinear where `refuses` allows none."""

    refuses: str = "int8"

    name: ClassVar[str] = "picky"

    @property
    def capabilities(self) -> Capabilities:
        return TARGET.capabilities

    def check(self) -> Check:
        return TARGET.check()

    def load(self, directory: Path) -> Engine:
        return TARGET.load(directory)

    def build(self, model: Model) -> Engine:
        nodes = list(model.graph_model.graph)
        integers = {node.op_type for node in nodes} & {"QuantizeLinear"}
        wide = any(node.op_type == "Conv" and _is_float(node) for node in nodes)
        kind = ("mixed" if wide else "int8") if integers else FLOAT
        if kind == self.refuses:
            raise EngineError(f"This runtime cannot run {kind} models.")
        return TARGET.build(model)


@dataclass(frozen=True)
class Timeless(Picky):
    """It runs everything, and tells the time of no kernel."""

    refuses: str = ""

    name: ClassVar[str] = "timeless"

    @property
    def capabilities(self) -> Capabilities:
        return dataclasses.replace(TARGET.capabilities, profiler=False)


def _is_float(node: object) -> bool:
    weight = node.inputs[1]  # type: ignore[attr-defined]
    return weight is not None and weight.producer() is None


@pytest.fixture(scope="module")
def original() -> Model:
    return tiny_exported(21)


@pytest.fixture(scope="module")
def workload(original: Model) -> Workload:
    return make_workload(original, None, batch=1, objective="latency", threads=1)


def lowered(original: Model, target: Target, *names: str) -> Lowered:
    data = load_data(original.example(4), original.inputs)
    context = Context(target=target, original=original, calibration=data)
    return lower(original, [create_pass(name) for name in names or ("quantize",)], context)


def searched(
    original: Model,
    ways: list[Lowered],
    workload: Workload,
    *,
    seconds: float = 0,
    memory: Path | None = None,
    progress: Progress = silent,
) -> Searched:
    found = search(
        original, ways, workload, seconds=seconds, seed=0, progress=progress, memory=memory
    )
    check_finalists(found)
    return found


def check_finalists(found: Searched) -> None:
    """What holds for every search."""
    first, *others = found.finalists
    names = [variant.name for variant in found.finalists]
    assert (first.name, first.precision) == (BASELINE, FLOAT)
    assert len(set(names)) == len(names)
    assert set(names) <= set(found.screening.engines)
    speeds = [found.screening.speed(v.name) for v in others[:FINALISTS]]
    assert speeds == sorted(speeds, reverse=True)
    assert not set(found.screening.failures) & set(found.screening.engines)
    assert found.seconds > 0


def test_without_time_only_whole_models_are_tried(
    original: Model, workload: Workload, tmp_path: Path
) -> None:
    memory = tmp_path / "placement.json"
    found = searched(original, [lowered(original, TARGET)], workload, memory=memory)
    assert [row["name"] for row in found.screening.rows()] == [BASELINE, "onnxruntime int8"]
    assert found.placements == {}
    assert not memory.exists()


def test_a_time_that_is_too_short_is_said(original: Model, workload: Workload) -> None:
    found = searched(original, [lowered(original, TARGET)], workload, seconds=0.01)
    assert found.placements == {}
    assert found.notes == ("--time 0.01 was over before a mixed placement could be searched.",)
    assert searched(original, [lowered(original, TARGET)], workload).notes == ()


def test_several_runtimes_without_time(original: Model, workload: Workload) -> None:
    ways = [lowered(original, TARGET), lowered(original, Picky(refuses=""))]
    found = searched(original, ways, workload)
    assert list(found.screening.engines) == [
        BASELINE, "onnxruntime int8", "picky float32", "picky int8"
    ]  # fmt: skip


def test_what_was_found_is_written_and_built_again(
    original: Model, workload: Workload, tmp_path: Path
) -> None:
    memory = tmp_path / "placement.json"
    one = lowered(original, TARGET)
    first = searched(original, [one], workload, seconds=600, memory=memory)
    chosen = first.placements["onnxruntime"].chosen
    assert json.loads(memory.read_text()) == {"onnxruntime": chosen}
    text = memory.read_bytes()
    second = searched(original, [one], workload, seconds=600, memory=memory)
    tried = [v for v in second.screening.variants.values() if v.precision == "mixed"]
    mixed = len(set(chosen)) > 1
    # Settings of the winner may be tried on it, so there can be several names.
    assert {v.kept_float for v in tried if "," not in v.name} == (
        {second.placements["onnxruntime"].kept_float(chosen)} if mixed else set()
    )
    assert memory.read_bytes() == text


def test_a_placement_in_the_memory_is_the_only_one_tried(
    original: Model, workload: Workload, tmp_path: Path
) -> None:
    memory = tmp_path / "placement.json"
    one = lowered(original, TARGET)
    regions = cut_regions(original.graph_model)
    wanted = [FLOAT, *[INT8] * (len(regions) - 1)]
    assert len(regions) > 1
    memory.write_text(json.dumps({"onnxruntime": wanted, "of another target": [INT8]}))
    hashes = set()
    for _ in range(2):
        found = searched(original, [one], workload, seconds=600, memory=memory)
        assert found.placements["onnxruntime"].trials == 1
        variants = found.screening.variants.values()
        mixed = [v for v in variants if v.precision == "mixed" and "," not in v.name]
        assert [set(v.kept_float) for v in mixed] == [set(regions[0].sites)]
        hashes.add(graph_sha256(mixed[0].model.graph_model))
    assert len(hashes) == 1


def test_a_damaged_memory_is_written_anew(
    original: Model, workload: Workload, tmp_path: Path
) -> None:
    memory = tmp_path / "placement.json"
    memory.write_text("{")
    found = searched(original, [lowered(original, TARGET)], workload, seconds=600, memory=memory)
    assert json.loads(memory.read_text()) == {"onnxruntime": found.placements["onnxruntime"].chosen}


def test_a_runtime_that_refuses_int8_costs_only_that(original: Model, workload: Workload) -> None:
    ways = [lowered(original, TARGET), lowered(original, Picky())]
    found = searched(original, ways, workload, seconds=600)
    assert list(found.screening.failures) == ["picky int8"]
    assert list(found.placements) == ["onnxruntime"]
    assert "picky float32" in found.screening.ratios


def test_a_placement_that_is_refused_costs_only_that(
    original: Model, workload: Workload, tmp_path: Path
) -> None:
    memory = tmp_path / "placement.json"
    count = len(cut_regions(original.graph_model))
    memory.write_text(json.dumps({"picky": [FLOAT, *[INT8] * (count - 1)]}))
    one = lowered(original, Picky(refuses="mixed"))
    found = searched(original, [one], workload, seconds=600, memory=memory)
    assert found.screening.failures == {"picky mixed 1": "This runtime cannot run mixed models."}
    assert len(set(found.placements["picky"].chosen)) == 1
    assert all(v.precision != "mixed" for v in found.finalists)


def test_passes_that_place_nothing_leave_nothing_to_place(
    original: Model, workload: Workload, tmp_path: Path
) -> None:
    memory = tmp_path / "placement.json"
    one = lowered(original, TARGET, "pool_spatial_mean")
    found = searched(original, [one], workload, seconds=600, memory=memory)
    assert found.placements == {}
    assert not memory.exists()
    assert {v.precision for v in found.screening.variants.values()} == {FLOAT}
    assert {"float32", "onnxruntime float32"} <= set(found.screening.variants)


def test_no_pass_at_all(original: Model, workload: Workload) -> None:
    context = Context(target=TARGET, original=original)
    found = searched(original, [lower(original, [], context)], workload, seconds=600)
    assert [variant.name for variant in found.finalists] == [BASELINE]
    assert list(found.screening.variants) == [BASELINE]


def test_throughput_of_one_or_several_streams(original: Model) -> None:
    many = make_workload(original, None, batch=2, objective="throughput", threads=2)
    target = OnnxRuntime(threads=2, streams=2)
    found = searched(original, [lowered(original, target)], many)
    baseline, int8 = (found.screening.variants[n] for n in (BASELINE, "onnxruntime int8"))
    assert baseline.target in (target, dataclasses.replace(target, streams=1))
    assert int8.target == target


def test_progress_is_told_the_seconds(original: Model, workload: Workload) -> None:
    titles: list[tuple[str, float | None]] = []
    told: list[float] = []
    notes: list[str] = []

    def tracker(advance: float = 1, note: str = "") -> None:
        told.append(advance)
        notes.append(note)

    @contextmanager
    def open_tracker(title: str, total: float | None) -> Iterator[Tracker]:
        titles.append((title, total))
        yield tracker

    def progress(title: str, total: float | None = None) -> AbstractContextManager[Tracker]:
        return open_tracker(title, total)

    found = searched(original, [lowered(original, TARGET)], workload, progress=progress)
    assert [total for _, total in titles] == [None]
    assert 0 < sum(told) <= found.seconds
    assert all(note.split("x")[0] for note in notes)


# The rules, with numbers instead of measurements.


@pytest.fixture
def screening(original: Model, workload: Workload) -> Iterator[Screening]:
    baseline = Variant(BASELINE, TARGET, original, FLOAT)
    with Trials() as trials:
        yield Screening(workload, baseline, ignore, trials)


OTHERS: dict[str, Target] = {"onnxruntime": TARGET, "picky": Picky(refuses="")}


def note(screening: Screening, name: str, speed: float | None, runtime: str = "") -> None:
    """A variant called "runtime precision pass" that was so fast; None where it failed."""
    runtime, precision, *made_by = [*runtime.split(), *name.split()] if runtime else name.split()
    target = OTHERS[runtime]
    if "," in name:  # settings, whichever they are
        target = dataclasses.replace(TARGET, arena=False)
    variant = dataclasses.replace(
        screening.baseline,
        name=name,
        target=target,
        precision=precision.rstrip(","),
        made_by="" if "," in name else " ".join(made_by),
    )
    screening.variants[name] = variant
    if speed is not None:
        screening.engines[name] = screening.engines[BASELINE]
        screening.ratios[name] = Ratio(speed, speed, speed, "faster")
        screening.latency_ms[name] = 1 / speed


@pytest.mark.parametrize(
    ("speeds", "expected"),
    [
        ({}, []),
        ({"onnxruntime int8": 2.0}, ["onnxruntime int8"]),
        # The best other is always in the final, however slow.
        ({"onnxruntime int8": 0.5, "picky int8": 0.4}, ["onnxruntime int8"]),
        ({"onnxruntime int8": None, "picky int8": 1.5}, ["picky int8"]),
        ({"onnxruntime int8": 2.0, "picky int8": 3.0}, ["picky int8", "onnxruntime int8"]),
        # One of each runtime and precision, and of its other settings the fastest.
        (
            {
                "onnxruntime int8": 2.0,
                "onnxruntime int8, layout=plain": 2.4,
                "onnxruntime int8, arena=False": 2.5,
            },
            ["onnxruntime int8, arena=False", "onnxruntime int8"],
        ),
        # An alternative is a kind of its own.
        (
            {"onnxruntime int8": 2.0, "onnxruntime int8 other": 2.4, "picky int8 other": 1.5},
            ["onnxruntime int8 other", "onnxruntime int8", "picky int8 other"],
        ),
        # A gain of 1 % is not worth a final.
        ({"onnxruntime int8": 2.0, "picky int8": 1.01}, ["onnxruntime int8"]),
        # Three, and the fastest without int8 beside them.
        (
            {
                "onnxruntime int8": 3.0,
                "onnxruntime mixed": 4.0,
                "picky int8": 2.0,
                "picky mixed": 1.9,
                "picky bfloat16": 1.5,
                "picky float32": 1.4,
            },
            ["onnxruntime mixed", "onnxruntime int8", "picky int8", "picky bfloat16"],
        ),
    ],
    ids=[
        "none", "one", "slow", "failed", "by speed", "settings", "alternatives", "no gain", "many",
    ],
)  # fmt: skip
def test_who_is_in_the_final(
    screening: Screening, speeds: dict[str, float | None], expected: list[str]
) -> None:
    for name, speed in speeds.items():
        note(screening, name, speed)
    assert [variant.name for variant in _finalists(screening)] == [BASELINE, *expected]


def test_the_fastest_runtime_comes_first(original: Model, screening: Screening) -> None:
    ways = [lowered(original, TARGET), lowered(original, Picky(refuses=""))]
    note(screening, "onnxruntime int8", 1.5)
    assert _by_speed(ways, screening) == ways
    note(screening, "picky float32", 0.7)
    note(screening, "picky int8", 1.6)
    assert _by_speed(ways, screening) == ways[::-1]


def test_the_pair_to_place_between(screening: Screening) -> None:
    note(screening, "onnxruntime int8", 1.5)
    note(screening, "picky float32", 0.7)
    note(screening, "picky bfloat16", 0.9)
    note(screening, "picky int8", None)

    def names(runtime: str, reference: bool) -> list[str | None]:
        return [v.name if v else None for v in _pair(runtime, screening, reference)]

    assert names("onnxruntime", True) == [BASELINE, "onnxruntime int8"]
    # Only of the reference the original is a variant.
    assert names("onnxruntime", False) == [None, "onnxruntime int8"]
    assert names("picky", False) == ["picky bfloat16", None]
    note(screening, "picky int8 other", 2.0)
    assert names("picky", False) == ["picky bfloat16", None]
    note(screening, "onnxruntime float32", 0.8)
    # Mixed models are made from the rewritten graph, even if the original is faster.
    assert names("onnxruntime", True) == ["onnxruntime float32", "onnxruntime int8"]


def test_how_time_is_shared() -> None:
    far = 1e9
    assert _share(far, last=True) == far
    assert _share(far, last=False) == pytest.approx(far * 2 / 3, rel=1e-2)


def test_a_runtime_without_a_profiler_runs_whole_models_and_takes_no_time_from_others(
    original: Model, workload: Workload
) -> None:
    ways = [lowered(original, TARGET), lowered(original, Timeless())]
    found = searched(original, ways, workload, seconds=600)
    tried = {v.precision for v in found.screening.variants.values() if v.target == Timeless()}
    assert tried == {FLOAT, INT8}
    assert set(found.placements) == {"onnxruntime"}


def test_settings_of_the_fastest_are_tried(original: Model, screening: Screening) -> None:
    int8 = Variant("onnxruntime int8", TARGET, lowered(original, TARGET).apply(), INT8)
    screening.time([int8], seconds=0.05)
    screening.ratios[int8.name] = Ratio(9.0, 9.0, 9.0, "faster")
    _adjust(screening)
    made = {
        name: variant for name, variant in screening.variants.items() if name.startswith(int8.name)
    }
    assert list(made) == [int8.name, f"{int8.name}, layout=plain", f"{int8.name}, arena=False"]
    assert [v.target for v in made.values()] == [TARGET, *TARGET.settings()]
    assert all(v.model is int8.model for v in made.values())
    assert set(made) <= set(screening.ratios)


@pytest.mark.parametrize("fastest", [BASELINE, "picky int8"], ids=["original", "no settings"])
def test_where_there_is_nothing_to_adjust(screening: Screening, fastest: str) -> None:
    note(screening, "picky int8", 2.0 if fastest != BASELINE else 0.5)
    before = list(screening.variants)
    _adjust(screening)
    assert list(screening.variants) == before
