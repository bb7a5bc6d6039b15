from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from compress.candidates import (
    Built,
    Limits,
    Measured,
    int8_share,
    measure_finals,
    site_rows,
)
from compress.data import load_data
from compress.decision import choose
from compress.errors import EngineError, UsageError
from compress.graph import Site, graph_sites
from compress.lowering import lower
from compress.model import Arrays, Model
from compress.passes import Context
from compress.progress import silent
from compress.registry import create_pass
from compress.report import Candidate
from compress.search import Searched, search
from compress.target import Capabilities, Check, Engine, Kernel, KernelTime, Target
from compress.testing import tiny_exported
from compress.variants import Variant
from compress.workload import make_workload
from targets.onnxruntime import OnnxRuntime


class NoEngine:
    """Candidates are chosen by their numbers; nothing is run."""

    name = "none"
    inputs = ()
    outputs = ()

    def __call__(self, inputs: Mapping[str, np.ndarray]) -> Arrays:
        raise AssertionError("an engine was run")

    def save(self, directory: Path) -> list[Path]:
        raise AssertionError("an engine was run")

    def kernels(self) -> tuple[Kernel, ...]:
        raise AssertionError("an engine was run")

    def profile(self, inputs: Mapping[str, np.ndarray], runs: int = 20) -> tuple[KernelTime, ...]:
        raise AssertionError("an engine was run")


def candidate(name: str, value: float, verdict: str, allowed: bool = True, **rest: Any) -> Built:
    ratio = {"value": value, "low": value - 0.1, "high": value + 0.1, "verdict": verdict}
    speedup = ratio if name != "float32" else None
    return Built(
        Candidate(name=name, size_bytes=1, timing={}, speedup=speedup, allowed=allowed, **rest),
        NoEngine(),
        Variant(name, OnnxRuntime(threads=1), tiny_exported(21), "int8"),
    )


def measured(*candidates: Built) -> Measured:
    return Measured((candidate("float32", 1, ""), *candidates), {})


@pytest.mark.parametrize(
    ("value", "verdict", "allowed", "min_speedup", "chosen", "met"),
    [
        (2.0, "faster", True, None, "int8", True),
        (2.0, "faster", True, 1.5, "int8", True),
        (2.0, "faster", True, 1.9, "int8", True),  # the lower end of the interval is 1.9
        (2.0, "faster", True, 1.95, "int8", False),
        (2.0, "faster", True, 500, "int8", False),
        (2.0, "faster", False, None, "float32", False),
        (2.0, "faster", False, 1.5, "float32", False),
        (1.0, "cannot tell", True, None, "float32", False),
        (1.0, "cannot tell", False, None, "float32", False),
        (0.5, "slower", True, None, "float32", False),
        (0.5, "slower", False, 1.5, "float32", False),
    ],
)
def test_choose(
    value: float, verdict: str, allowed: bool, min_speedup: float | None, chosen: str, met: bool
) -> None:
    found = choose(measured(candidate("int8", value, verdict, allowed)), Limits(None, min_speedup))
    assert (found.chosen, found.met) == (chosen, met)
    assert found.sentences
    if chosen == "float32":
        assert "The artifact is the original float32 model" in found.sentences[-1]
    elif not met:
        assert f"--min-speedup {min_speedup:g} is not within reach" in found.sentences[-1]
        assert "2.00x (at least 1.90x)" in found.sentences[-1]


@pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=["fast first", "fast last"])
def test_the_fastest_of_several_is_chosen(order: tuple[int, int]) -> None:
    both = (candidate("int8", 3.0, "faster"), candidate("bfloat16", 2.0, "faster"))
    found = choose(measured(*(both[index] for index in order)), Limits(None, None))
    assert (found.chosen, found.met) == ("int8", True)
    assert len(found.sentences) == 2


def test_the_fastest_that_is_allowed_is_chosen() -> None:
    fast = candidate("int8", 3.0, "faster", allowed=False)
    found = choose(measured(fast, candidate("bfloat16", 2.0, "faster")), Limits(None, None))
    assert found.chosen == "bfloat16"


def test_for_another_device_the_smallest_that_is_allowed_is_chosen() -> None:
    def sized(name: str, size_bytes: int, allowed: bool = True) -> Built:
        one = candidate(name, 0.5, "slower", allowed, precision=name, buys="device")
        smaller = dataclasses.replace(one.candidate, size_bytes=size_bytes)
        return dataclasses.replace(one, candidate=smaller)

    original = sized("float32", 4_000_000)
    rewritten = sized("rewritten", 3_900_000)
    rewritten = dataclasses.replace(
        rewritten, candidate=dataclasses.replace(rewritten.candidate, precision="float32")
    )
    good = Measured((original, rewritten, sized("int8", 1_000_000)), {})
    found = choose(good, Limits(None, None))
    assert (found.chosen, found.met) == ("int8", True)
    assert "(0.50x [0.40, 0.60]) on this machine" in found.sentences[1]
    assert found.sentences[-1] == (
        "The artifact is int8, chosen without a measurement on the device: 1 MB instead of 4 MB, "
        "4.0 times smaller."
    )
    lossy = Measured((original, rewritten, sized("int8", 1_000_000, allowed=False)), {})
    found = choose(lossy, Limits(None, None))
    assert (found.chosen, found.met) == ("rewritten", False)
    assert "nothing in fewer bits is within --max-drop" in found.sentences[-1]


def test_the_sentence_says_what_was_lost() -> None:
    score = {"value": 0.9, "unit": "top-1", "n": 100}
    drop = {"points": 2.5, "low": 1, "high": 4, "agreement": 0.9}
    one = candidate("int8", 2.0, "faster", False, score=score, drop=drop)
    (sentence, _) = choose(measured(one), Limits.parse("1%", None, True)).sentences
    assert sentence == (
        "int8 is 2.00x [1.90, 2.10] as fast as the original and loses 2.50 points of top-1, more "
        "than --max-drop allows."
    )
    (unverified, *_) = choose(
        measured(candidate("int8", 2.0, "faster")), Limits(None, None)
    ).sentences
    assert "accuracy was not verified (no --eval)" in unverified
    two = candidate("bfloat16", 1.5, "faster", False)
    (_, unneeded, *_) = choose(measured(one, two), Limits.parse("3%", None, True)).sentences
    assert unneeded.endswith("accuracy was not verified (a faster one keeps the limit).")


@pytest.mark.parametrize(
    ("max_drop", "expected"),
    [(None, "1%"), ("0.5%", "0.5%"), ("0.5%rel", "0.5%rel"), (0.02, "2%"), (0, "0%"), ("0%", "0%")],
)
def test_the_limit_on_the_drop(max_drop: str | float | None, expected: str) -> None:
    assert Limits.parse(max_drop, None, True).to_dict() == {
        "max_drop": expected,
        "min_speedup": None,
    }


def test_without_evaluation_no_drop_can_be_limited() -> None:
    assert Limits.parse(None, 1.5, False).max_drop is None
    for given in ("1%", 0.0):
        with pytest.raises(UsageError, match="needs something to measure the drop with"):
            Limits.parse(given, None, False)


@pytest.mark.parametrize("factor", [0, -1, 1000, float("nan"), float("inf")])
def test_a_speedup_that_makes_no_sense(factor: float) -> None:
    with pytest.raises(UsageError, match="is no factor"):
        Limits.parse(None, factor, False)


def site(name: str, macs: int, op_type: str = "Conv") -> Site:
    return Site(name, op_type, (), (), None, macs, 0, 0)


SITES = (site("a", 300), site("b", 100), site("r", 0, "Relu"))


@pytest.mark.parametrize(
    ("kernels", "share"),
    [
        ([], 0.0),
        ([("a", "int8"), ("b", "float32")], 0.75),
        ([("a", "int8"), ("a", "convert"), ("b", "int8")], 1.0),
        ([("a", "int8"), ("a", "int8")], 0.75),
        ([("", "int8"), ("other", "int8")], 0.0),
    ],
    ids=["none", "one", "all", "two kernels of one site", "unknown"],
)
def test_int8_share(kernels: list[tuple[str, str]], share: float) -> None:
    made = [Kernel(site, "Op", precision, site) for site, precision in kernels]
    assert int8_share(made, SITES) == share


def test_a_model_without_macs_has_no_share() -> None:
    assert int8_share([], [site("r", 0)]) == 0.0


def test_rows_say_what_became_of_each_site() -> None:
    kernels = [
        Kernel("k1", "QLinearConv", "int8", "a"),
        Kernel("k2", "DequantizeLinear", "convert", "a"),
        Kernel("k3", "Conv", "float32", "b"),
    ]
    why = {"a": "old", "r": "absorbed"}
    rows = {row["name"]: row for row in site_rows(SITES, kernels, why, {})}
    assert rows["a"]["precision"] == "int8"
    assert rows["a"]["reason"] == ""
    assert rows["b"]["reason"] == "the runtime left it in float32 although Q/DQ surround it"
    assert (rows["r"]["precision"], rows["r"]["reason"]) == ("fused", "absorbed")


def test_a_merged_site_has_the_precision_of_the_layer_that_it_became_part_of() -> None:
    kernels = [Kernel("k1", "QLinearConv", "int8", "a")]
    rows = {row["name"]: row for row in site_rows(SITES, kernels, {}, {"b": "a"})}
    assert (rows["b"]["precision"], rows["b"]["reason"]) == ("int8", "merged into a")


@dataclass(frozen=True)
class _RefusesInt8:
    """ONNX Runtime, but a runtime that cannot load quantized models."""

    name: ClassVar[str] = "picky"
    runtime: ClassVar[OnnxRuntime] = OnnxRuntime(threads=1)

    @property
    def capabilities(self) -> Capabilities:
        return self.runtime.capabilities

    def check(self) -> Check:
        return self.runtime.check()

    def load(self, directory: Path) -> Engine:
        return self.runtime.load(directory)

    def build(self, model: Model) -> Engine:
        if any(node.op_type == "QuantizeLinear" for node in model.graph_model.graph):
            raise EngineError("This runtime has no QuantizeLinear.")
        return self.runtime.build(model)


def _search(target: Target, seconds: float = 0) -> tuple[Searched, Model]:
    exported = tiny_exported(target.capabilities.opset)
    data = load_data(exported.example(4), exported.inputs)
    context = Context(target=target, original=exported, calibration=data)
    lowered = lower(exported, [create_pass("quantize")], context)
    workload = make_workload(exported, data, batch=1, objective="latency", threads=1)
    found = search(exported, [lowered], workload, seconds=seconds, seed=0, progress=silent)
    return found, exported


def test_a_refused_candidate_costs_only_that_candidate() -> None:
    searched, exported = _search(_RefusesInt8())
    limits = Limits.parse(None, None, evaluated=False)
    measured = measure_finals(
        searched,
        graph_sites(exported.graph_model),
        data=None,
        evaluator=None,
        limits=limits,
        seconds=0.5,
        seed=0,
        known={},
        progress=silent,
    )
    decision = choose(measured, limits)
    assert [one.candidate.name for one in measured.all] == ["float32"]
    assert decision.chosen == "float32"
    assert not decision.met
    assert decision.sentences[0] == "picky int8 failed: This runtime has no QuantizeLinear."
    row = next(row for row in searched.screening.rows() if row["name"] == "picky int8")
    assert row["failure"]
    assert row["speedup"] is None
