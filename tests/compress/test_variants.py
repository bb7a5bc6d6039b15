from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import pytest

from compress.data import load_data
from compress.errors import EngineError, UnsupportedError, UsageError
from compress.latency import Ratio
from compress.lowering import Lowered, lower
from compress.model import Model, Step
from compress.passes import Context, Pass
from compress.registry import create_pass
from compress.target import Capabilities, Check, Engine, Target
from compress.testing import tiny_exported
from compress.trial import Trials
from compress.variants import BASELINE, Screening, Variant, settings, uniform_variants
from compress.workload import make_workload
from targets.onnxruntime import OnnxRuntime

TARGET = OnnxRuntime(threads=1)
FREE, INT8 = create_pass("pool_spatial_mean"), create_pass("quantize", samples=4)


@dataclass(frozen=True)
class Second:
    """ONNX Runtime under another name."""

    name: ClassVar[str] = "second"

    @property
    def capabilities(self) -> Capabilities:
        return TARGET.capabilities

    def check(self) -> Check:
        return TARGET.check()

    def build(self, model: Model) -> Engine:
        return TARGET.build(model)

    def load(self, directory: Path) -> Engine:
        return TARGET.load(directory)


@dataclass(frozen=True)
class Wide(Second):
    """The same, with a second float type to choose."""

    precision: Literal["float32", "bfloat16"] = "float32"

    name: ClassVar[str] = "wide"

    @property
    def capabilities(self) -> Capabilities:
        precisions = ("float32", "bfloat16", "int8")
        return dataclasses.replace(TARGET.capabilities, precisions=precisions)


@dataclass(frozen=True)
class Picky(Second):
    """The same, without QuantizeLinear."""

    name: ClassVar[str] = "picky"

    def build(self, model: Model) -> Engine:
        if any(node.op_type == "QuantizeLinear" for node in model.graph_model.graph):
            raise EngineError("This runtime has no QuantizeLinear.")
        return TARGET.build(model)


@pytest.fixture(scope="module")
def original() -> Model:
    return tiny_exported(21)


def lowered(original: Model, target: Target, *names: str) -> Lowered:
    passes = {"free": FREE, "int8": INT8}
    data = load_data(original.example(4), original.inputs)
    context = Context(target=target, original=original, calibration=data)
    return lower(original, [passes[name] for name in names], context)


@pytest.mark.parametrize(
    ("targets", "names", "expected"),
    [
        ([TARGET], [], ["float32"]),
        ([TARGET], ["int8"], ["float32", "onnxruntime int8"]),
        ([TARGET], ["free"], ["float32", "onnxruntime float32"]),
        ([TARGET], ["free", "int8"], ["float32", "onnxruntime float32", "onnxruntime int8"]),
        (
            [TARGET, Second()],
            ["int8"],
            ["float32", "onnxruntime int8", "second float32", "second int8"],
        ),
        (
            [TARGET, Wide()],
            ["int8"],
            ["float32", "onnxruntime int8", "wide float32", "wide bfloat16", "wide int8"],
        ),
        ([Wide()], ["int8"], ["float32", "wide bfloat16", "wide int8"]),
    ],
    ids=["nothing", "int8", "rewritten", "both", "two runtimes", "bfloat16", "bfloat16 alone"],
)
def test_one_variant_for_each_runtime_and_precision(
    original: Model, targets: list[Target], names: list[str], expected: list[str]
) -> None:
    ways = [lowered(original, target, *names) for target in targets]
    found = uniform_variants(original, ways)
    assert [variant.name for variant in found] == expected
    baseline, *others = found
    assert (baseline.model, baseline.target, baseline.precision) == (original, targets[0], BASELINE)
    assert [v.precision for v in others] == [name.split()[1] for name in expected[1:]]
    assert [v.target.name for v in others] == [name.split()[0] for name in expected[1:]]
    assert all(v.kept_float == () for v in found)


def test_what_int8_leaves_in_float_is_bfloat16_too(original: Model) -> None:
    found = {v.name: v for v in uniform_variants(original, [lowered(original, Wide(), "int8")])}
    precisions = {name: settings(v.target)["precision"] for name, v in found.items()}
    assert precisions == {
        "float32": "float32", "wide bfloat16": "bfloat16", "wide int8": "bfloat16"
    }  # fmt: skip


def test_only_the_int8_variant_has_integers(original: Model) -> None:
    for variant in uniform_variants(original, [lowered(original, TARGET, "free", "int8")]):
        types = {node.op_type for node in variant.model.graph_model.graph}
        assert ("QuantizeLinear" in types) == (variant.precision == "int8")


@dataclass(frozen=True)
class Whole:
    """A pass that compresses the model as a whole, or fails."""

    error: type[Exception] | None = None
    makes: str = "int8"
    buys: str = "speed"

    name: ClassVar[str] = "whole"
    stage: ClassVar[Literal["onnx"]] = "onnx"

    def check(self, model: Model, target: Target) -> None:
        return None

    def apply(self, model: Model, context: Context) -> Model:
        if self.error is not None:
            raise self.error(f"not on {context.target.name}")
        return model.evolve(model.graph_model, Step(self.name))


def ways(original: Model, passes: list[Pass], *alternatives: Pass) -> list[Lowered]:
    """ONNX Runtime and another runtime."""
    data = load_data(original.example(4), original.inputs)
    return [
        lower(
            original, passes, Context(target=t, original=original, calibration=data), alternatives
        )
        for t in (TARGET, Second())
    ]


def test_alternatives_follow_the_recipes_own_result(original: Model) -> None:
    minmax = create_pass("quantize", samples=4, method="minmax")
    found = uniform_variants(original, ways(original, [INT8], Whole(), minmax, Whole()))
    names = [variant.name for variant in found[1:5]]
    assert names == [f"onnxruntime int8{n}" for n in ("", " whole", " quantize", " whole 2")]
    assert [variant.made_by for variant in found[1:5]] == ["", "whole", "quantize", "whole"]
    second = [v.name.replace("second", "onnxruntime") for v in found if v.target.name == "second"]
    assert second == ["onnxruntime float32", *names]
    own, whole, other = found[1:4]
    assert whole.model.history[-1].name == "whole"
    assert other.model.history[-1].options["method"] == "minmax" != own.model.history[-1].options
    assert all(variant.failure == "" for variant in found)


def test_a_pass_that_compresses_as_a_whole_makes_a_variant_of_its_own(original: Model) -> None:
    stores = Whole(makes="int4 weights", buys="size")
    found = uniform_variants(original, ways(original, [FREE, stores]))
    assert [(v.name, v.precision, v.buys) for v in found] == [
        ("float32", "float32", "speed"),
        ("onnxruntime float32", "float32", "speed"),
        ("onnxruntime int4 weights whole", "int4 weights", "size"),
        ("second float32", "float32", "speed"),
        ("second int4 weights whole", "int4 weights", "size"),
    ]
    # Beside an own result that is made for speed, an alternative is one, too.
    beside = uniform_variants(original, ways(original, [INT8], stores))
    assert {variant.buys for variant in beside} == {"speed"}


@pytest.mark.parametrize("error", [EngineError, UnsupportedError])
def test_a_model_that_cannot_be_made_costs_only_its_variant(
    original: Model, screening: Screening, error: type[Exception]
) -> None:
    own = uniform_variants(original, ways(original, [FREE, Whole(error)]))
    beside = uniform_variants(original, ways(original, [INT8], Whole(error)))
    for found in (own, beside):
        failed = {v.name: v.failure for v in found if v.failure}
        assert failed == {
            f"{name} int8 whole": f"not on {name}" for name in ("onnxruntime", "second")
        }
    screening.time([v for v in beside[1:] if v.target is TARGET], seconds=0.05)
    assert screening.failures == {"onnxruntime int8 whole": "not on onnxruntime"}
    assert list(screening.engines) == [BASELINE, "onnxruntime int8"]
    rows = {row["name"]: row["failure"] for row in screening.rows()}
    assert rows == {BASELINE: "", "onnxruntime int8": "", **screening.failures}


def test_an_error_of_the_user_ends_the_run(original: Model) -> None:
    with pytest.raises(UsageError, match="not on onnxruntime"):
        uniform_variants(original, ways(original, [INT8], Whole(UsageError)))


@dataclass
class Told:
    """Remembers what a tracker was told."""

    seconds: list[float]
    notes: list[str]

    def __call__(self, advance: float = 1, note: str = "") -> None:
        self.seconds.append(advance)
        self.notes.append(note)


@pytest.fixture
def told() -> Told:
    return Told([], [])


@pytest.fixture
def screening(original: Model, told: Told) -> Iterator[Screening]:
    workload = make_workload(original, None, batch=1, objective="latency", threads=1)
    with Trials() as trials:
        yield Screening(workload, Variant(BASELINE, TARGET, original, BASELINE), told, trials)


def test_a_new_screening_holds_the_baseline(screening: Screening) -> None:
    assert list(screening.variants) == list(screening.engines) == [BASELINE]
    assert screening.speed(BASELINE) == 1
    assert screening.speed("something else") == 0
    assert screening.failures == {}


def test_what_fails_costs_only_itself(original: Model, screening: Screening, told: Told) -> None:
    int8 = lowered(original, TARGET, "int8").apply()
    screening.time(
        [
            Variant("refused", Picky(), int8, "int8"),
            Variant("good", TARGET, int8, "int8"),
        ],
        seconds=0.05,
    )
    assert screening.failures == {"refused": "This runtime has no QuantizeLinear."}
    assert list(screening.variants) == [BASELINE, "refused", "good"]
    assert list(screening.engines) == [BASELINE, "good"]
    assert screening.speed("good") > 0 == screening.speed("refused")
    assert screening.latency_ms["good"] > 0
    assert "refused" not in screening.latency_ms
    assert screening.fastest(["refused", "good"]) == "good"
    assert sum(told.seconds) > 0
    assert told.notes[-1].split(" ")[0] in screening.engines


def test_an_engine_that_fails_when_it_runs(original: Model, screening: Screening) -> None:
    other = dataclasses.replace(original, program=original.graph_model.clone())
    other.graph_model.graph.inputs[0].name = "not what the workload gives"
    screening.time([Variant("fails", TARGET, other, "float32")], seconds=0.05)
    assert list(screening.failures) == ["fails"]
    assert list(screening.engines) == [BASELINE]
    assert list(screening.ratios) == [BASELINE]


def test_nothing_that_works_is_nothing_to_time(original: Model, screening: Screening) -> None:
    int8 = lowered(original, TARGET, "int8").apply()
    screening.time([Variant("refused", Picky(), int8, "int8")], seconds=60)
    assert screening.latency_ms == {}
    assert screening.fastest(list(screening.engines)) == BASELINE


def made_up(screening: Screening, *names: str) -> None:
    """Variants with numbers instead of measurements."""
    for index, name in enumerate(names, 2):
        variant = dataclasses.replace(screening.baseline, name=name, kept_float=("0",))
        screening.variants[name] = variant
        screening.engines[name] = screening.engines[BASELINE]
        screening.ratios[name] = Ratio(float(index), index - 0.1, index + 0.1, "faster")
        screening.latency_ms[name] = 1 / index


def test_a_new_name_keeps_place_and_content(screening: Screening) -> None:
    made_up(screening, "a", "b", "c")
    tables = (screening.variants, screening.engines, screening.ratios, screening.latency_ms)
    before = [list(table.values()) for table in tables]
    screening.rename("b", "best")
    for table, values in zip(tables, before, strict=True):
        assert [n for n in table if n != BASELINE] == ["a", "best", "c"]
        if table is not screening.variants:
            assert list(table.values()) == values
    assert screening.variants["best"] == dataclasses.replace(screening.variants["a"], name="best")
    assert screening.fastest(["a", "best"]) == "best"


def test_the_first_of_equals_is_the_fastest(screening: Screening) -> None:
    made_up(screening, "a", "b")
    screening.ratios["a"] = screening.ratios["b"]
    assert screening.fastest(["a", "b"]) == "a"
    assert screening.fastest(["b", "a"]) == "b"


def test_what_is_forgotten_still_has_a_row(screening: Screening) -> None:
    made_up(screening, "a")
    screening.forget("a")
    screening.forget("was never there")
    assert list(screening.engines) == [BASELINE]
    assert [row["name"] for row in screening.rows()] == [BASELINE, "a"]


def test_rows_are_plain_values(screening: Screening) -> None:
    made_up(screening, "a")
    screening.variants["b"] = dataclasses.replace(screening.baseline, name="b")
    screening.failures["b"] = "It has no QuantizeLinear."
    rows = screening.rows()
    assert json.loads(json.dumps(rows, allow_nan=False)) == rows
    measured, failed = rows[1:]
    assert measured["speedup"] == {"value": 2.0, "low": 1.9, "high": 2.1, "verdict": "faster"}
    assert (measured["p50_ms"], measured["float_sites"], measured["failure"]) == (0.5, 1, "")
    assert measured["settings"]["threads"] == 1
    assert (failed["speedup"], failed["p50_ms"], failed["float_sites"]) == (None, None, 0)
    assert failed["failure"] == "It has no QuantizeLinear."


def test_settings_are_the_options_of_a_target() -> None:
    assert settings(Wide(precision="bfloat16")) == {"precision": "bfloat16"}
    assert settings(TARGET)["layout"] == "blocked"
    assert settings(Second()) == {}
