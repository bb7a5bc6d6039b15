from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import onnx_ir as ir
import pytest

from compress.data import load_data
from compress.errors import EngineError
from compress.graph import graph_sha256
from compress.lowering import Lowered, export, lower
from compress.model import Model, Step
from compress.passes import Context, Pass
from compress.registry import create_pass
from compress.target import Target
from compress.testing import tiny_exported, tiny_model
from targets.onnxruntime import OnnxRuntime

TARGET = OnnxRuntime(threads=1)
MULTIPLIES = ("0", "4.depthwise", "4.pointwise", "8")


def context(original: Model) -> Context:
    data = load_data(original.example(4), original.inputs)
    return Context(target=TARGET, original=original, calibration=data)


@pytest.fixture(scope="module")
def lowered() -> Lowered:
    exported = tiny_exported(21)
    return lower(exported, [create_pass("quantize", samples=4)], context(exported))


def text_of(model: Model) -> bytes:
    return ir.to_proto(model.graph_model).SerializeToString(deterministic=True)


def weights_in_int8(model: Model) -> set[str]:
    """Names of the multiply-accumulates that read their weight through a DequantizeLinear."""
    found = set()
    for node in model.graph_model.graph:
        if node.name in MULTIPLIES:
            weight = node.inputs[1]
            assert weight is not None
            producer = weight.producer()
            if producer is not None and producer.op_type == "DequantizeLinear":
                found.add(node.name)
    return found


@pytest.mark.parametrize(
    "kept",
    [(), ("4.depthwise",), ("0", "8"), MULTIPLIES],
    ids=["none", "one", "two", "all"],
)
def test_exactly_the_named_operators_stay_float(lowered: Lowered, kept: tuple[str, ...]) -> None:
    made = lowered.apply(kept)
    assert weights_in_int8(made) == set(MULTIPLIES) - set(kept)
    reasons = made.history[-1].details["reasons"]
    assert {n for n, why in reasons.items() if why == "kept in float on request"} == set(kept)
    kernels = TARGET.build(made).kernels()
    precisions = {k.site: k.precision for k in kernels if k.site in MULTIPLIES}
    assert precisions == {n: "float32" if n in kept else "int8" for n in MULTIPLIES}


def test_the_float_model_is_not_changed(lowered: Lowered) -> None:
    before = text_of(lowered.float_model)
    first, second = lowered.apply(("0",)), lowered.apply(("0",))
    assert text_of(first) == text_of(second) != before
    assert text_of(lowered.float_model) == before
    assert [step.name for step in lowered.float_model.history] == ["export"]
    assert [step.options for step in first.history] == [step.options for step in second.history]


def test_one_choice_leaves_no_trace_in_the_next(lowered: Lowered) -> None:
    before = graph_sha256(lowered.apply().graph_model)
    lowered.apply(MULTIPLIES)
    assert graph_sha256(lowered.apply().graph_model) == before


def test_names_that_the_graph_does_not_have_are_ignored(lowered: Lowered) -> None:
    plain = lowered.apply(("8",))
    assert text_of(lowered.apply(("8", "no such operator", "8"))) == text_of(plain)
    assert text_of(lowered.apply(("no such operator",))) == text_of(lowered.apply())


def test_the_pass_keeps_what_it_was_told_to_keep() -> None:
    exported = tiny_exported(21)
    step = create_pass("quantize", samples=4, keep_float=["0"])
    made = lower(exported, [step], context(exported)).apply(("8",))
    assert weights_in_int8(made) == {"4.depthwise", "4.pointwise"}
    assert made.history[-1].options["keep_float"] == ["0", "8"]


def test_only_what_comes_before_the_first_placing_pass_is_applied() -> None:
    exported = tiny_exported(21)
    names = ("remove_identity", "pool_spatial_mean", "quantize", "fold_pad")
    steps = [create_pass(name) for name in names]
    found = lower(exported, steps, context(exported))
    assert [step.name for step in found.float_model.history] == ["export", *names[:2]]
    assert [step.name for step in found.rest] == list(names[2:])
    assert found.places
    assert [step.name for step in exported.history] == ["export"]
    assert [step.name for step in found.apply().history] == ["export", *names]


def test_without_a_placing_pass_nothing_is_left_to_do() -> None:
    exported = tiny_exported(21)
    found = lower(exported, [create_pass("pool_spatial_mean")], context(exported))
    assert (found.rest, found.places) == ((), False)
    assert text_of(found.apply(("0",))) == text_of(found.float_model)


@dataclass(frozen=True)
class _Marks:
    """A pass that compresses the model as a whole, as far as its name tells."""

    name: ClassVar[str] = "marks"
    stage: ClassVar[Literal["onnx"]] = "onnx"
    makes: ClassVar[str] = "int8"

    def check(self, model: Model, target: Target) -> None:
        pass

    def apply(self, model: Model, context: Context) -> Model:
        model.graph_model.graph.name = "marked"
        return model.evolve(model.graph_model, Step(self.name))


def test_a_pass_that_compresses_as_a_whole_is_left_for_later() -> None:
    exported = tiny_exported(21)
    steps: list[Pass] = [create_pass("remove_identity"), _Marks(), create_pass("fold_pad")]
    found = lower(exported, steps, context(exported))
    assert [step.name for step in found.rest] == ["marks", "fold_pad"]
    assert not found.places
    assert found.float_model.graph_model.graph.name != "marked"
    assert found.apply(("0",)).graph_model.graph.name == "marked"
    assert [step.name for step in found.apply().history[-2:]] == ["marks", "fold_pad"]


def test_an_alternative_gets_the_float_model_alone() -> None:
    exported = tiny_exported(21)
    names = ("pool_spatial_mean", "quantize", "fold_pad")
    steps = [create_pass(name) for name in names]
    found = lower(exported, steps, context(exported), [_Marks(), _Renames()])
    before = text_of(found.float_model)
    assert [step.name for step in found.alternatives] == ["marks", "renames"]
    made = found.apply_alternative(found.alternatives[0])
    assert made.graph_model.graph.name == "marked"
    assert [step.name for step in made.history] == ["export", "pool_spatial_mean", "marks"]
    with pytest.raises(EngineError, match="Pass renames changed the outputs"):
        found.apply_alternative(found.alternatives[1])
    assert text_of(found.float_model) == before


@dataclass(frozen=True)
class _Renames:
    """Breaks the promise that outputs keep their names."""

    name: ClassVar[str] = "renames"
    stage: ClassVar[Literal["onnx"]] = "onnx"

    def check(self, model: Model, target: Target) -> None:
        pass

    def apply(self, model: Model, context: Context) -> Model:
        model.graph_model.graph.outputs[0].name = "another"
        return model.evolve(model.graph_model, Step(self.name))


@dataclass(frozen=True)
class _Forgets:
    """A placing pass that works in place: it takes the name from every operator but these."""

    keep_float: tuple[str, ...] = ()

    name: ClassVar[str] = "forgets"
    stage: ClassVar[Literal["onnx"]] = "onnx"

    def check(self, model: Model, target: Target) -> None:
        pass

    def apply(self, model: Model, context: Context) -> Model:
        for node in model.graph_model.graph:
            if node.name not in self.keep_float:
                node.name = ""
        return model.evolve(model.graph_model, Step(self.name))


def test_a_pass_may_work_in_place() -> None:
    exported = tiny_exported(21)
    found = lower(exported, [_Forgets()], context(exported))
    for kept in (("0",), ("8",), ("0", "8")):
        names = {node.name for node in found.apply(kept).graph_model.graph}
        assert names == {"", *kept}
    assert text_of(found.float_model) == text_of(exported)


@dataclass(frozen=True)
class _Doubles:
    """A torch pass: the last layer's weights and biases times two."""

    name: ClassVar[str] = "doubles"
    stage: ClassVar[Literal["torch"]] = "torch"

    def check(self, model: Model, target: Target) -> None:
        pass

    def apply(self, model: Model, context: Context) -> Model:
        for parameter in model.torch_module[-1].parameters():  # type: ignore[index]
            parameter.data *= 2
        return model.evolve(model.torch_module, Step(self.name))


def test_a_pass_that_renames_outputs_is_named() -> None:
    exported = tiny_exported(21)
    before = text_of(exported)
    with pytest.raises(EngineError, match="Pass renames changed the outputs"):
        lower(exported, [_Renames()], context(exported))
    assert text_of(exported) == before


@pytest.mark.parametrize("steps", [(), (_Doubles(),)], ids=["without", "with"])
def test_torch_passes_come_before_the_export(steps: tuple[Pass, ...]) -> None:
    original = tiny_model()
    exported, start = export(original, (*steps, create_pass("quantize")), context(original))
    inputs = exported.example(2)
    before, after = (TARGET.build(model)(inputs)["linear"] for model in (exported, start))
    assert (exported is start) == (not steps)
    assert [step.name for step in start.history] == [*(step.name for step in steps), "export"]
    np.testing.assert_allclose(after, before * 2 ** len(steps), rtol=1e-5)
