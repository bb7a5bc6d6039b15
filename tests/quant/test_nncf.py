from __future__ import annotations

import dataclasses
import logging
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch

import compress
from compress.data import load_data
from compress.errors import (
    DataError,
    EngineError,
    MissingExtraError,
    UnsupportedError,
    UsageError,
)
from compress.model import Model
from compress.passes import Compressing, Context, Placing
from compress.pipeline import RunResult
from compress.recipe import Recipe, default_passes
from compress.reference import reference_session, run
from compress.registry import create_pass
from compress.target import Target
from compress.testing import NullTarget, PassContract, tiny_exported, tiny_model
from quant.nncf_engine import compressed
from quant.nncf_passes import (
    NncfCompressWeights,
    NncfQuantize,
    NncfQuantizeWithAccuracyControl,
)
from targets.onnxruntime import OnnxRuntime

TARGET = OnnxRuntime(threads=1)
FAST: dict[str, Any] = {"target": "onnxruntime", "threads": 1, "search_seconds": 0, "seconds": 0.5}
MULTIPLIES = {"0", "4.depthwise", "4.pointwise", "8"}
THEIRS = NncfQuantize(subset_size=8)
OURS = default_passes(samples=8)
REWRITES = tuple(takewhile(lambda step: not isinstance(step, Placing), OURS))


@pytest.fixture
def nncf() -> Any:
    return pytest.importorskip("nncf", reason="pip install 'hwcompress[nncf]'")


needs_nncf = pytest.mark.usefixtures("nncf")


@pytest.fixture(scope="module", autouse=True)
def _home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The cache belongs to the test; optimising on one thread leaves the others to other tests."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(tmp_path_factory.mktemp("home")))
        yield
    torch.set_num_threads(threads)


def images(count: int = 16) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(count, 3, 16, 16)).astype(np.float32)


def context(model: Model, calibration: Any = None) -> Context:
    data = load_data(calibration, model.inputs) if calibration is not None else None
    return Context(target=TARGET, original=model, calibration=data)


def folded() -> Model:
    """The tiny network as NNCF gets it: after the free rewrites."""
    model = tiny_exported(21)
    for step in REWRITES:
        model = step.apply(model, context(model))
    return model


def graph_bytes(model: Model) -> bytes:
    return ir.to_proto(model.graph_model).SerializeToString(deterministic=True)


# The library at work.


@needs_nncf
class TestContract(PassContract):
    step = THEIRS
    target = TARGET

    def model(self) -> Model:
        return folded()

    def context(self, model: Model) -> Context:
        return context(model, images())


@needs_nncf
def test_it_quantizes_every_multiplication_and_keeps_all_names() -> None:
    model = folded()
    before = graph_bytes(model)
    made = THEIRS.apply(model, context(model, images()))
    graph = made.graph_model.graph
    assert [v.name for v in graph.inputs] == [v.name for v in model.graph_model.graph.inputs]
    assert [v.name for v in graph.outputs] == [v.name for v in model.graph_model.graph.outputs]
    assert {n.name for n in model.graph_model.graph} <= {n.name for n in graph}
    assert graph_bytes(model) == before
    step = made.history[-1]
    assert step.details["ranges_from"] == "calibration data"
    assert step.details["samples"] == step.options["subset_size"] == 8
    assert step.details["quantized_nodes"] == len(MULTIPLIES)
    assert step.details["reasons"] == {}
    assert step.details["nncf"].count(".") == 2
    weights = {node.name: node.inputs[1] for node in graph if node.name in MULTIPLIES}
    assert {value.producer().op_type for value in weights.values()} == {"DequantizeLinear"}
    expected, got = (
        TARGET.build(one)({"x": images()})["linear"] for one in (tiny_exported(21), made)
    )
    assert not np.array_equal(got, expected)
    np.testing.assert_allclose(got, expected, atol=0.15 * np.abs(expected).max())


TWO = """g (float[batch,3,16,16] x) => (float[batch,6,10,10] y) {
    [first] a = Conv(x, w, b) [relu] r = Relu(a) [second] y = Conv(r, u, c)
}"""


@needs_nncf
@pytest.mark.parametrize(
    "options",
    [{"preset": "mixed"}, {"fast_bias_correction": False}, {"subset_size": 2}],
    ids=lambda options: next(iter(options)),
)
def test_its_options_reach_it(onnx_model: Callable[..., Model], options: dict[str, Any]) -> None:
    model = onnx_model(TWO, w=(8, 3, 4, 4), b=(8,), u=(6, 8, 4, 4), c=(6,))
    data = context(model, images())
    plain, other = (
        step.apply(model, data) for step in (THEIRS, dataclasses.replace(THEIRS, **options))
    )
    assert graph_bytes(other) != graph_bytes(plain)
    assert other.history[-1].options.items() >= options.items()


@needs_nncf
def test_nothing_is_printed_and_the_log_is_as_before(
    capfd: pytest.CaptureFixture[str], nncf: Any
) -> None:
    logger = logging.getLogger("nncf")
    level, stdout = logger.level, sys.stdout
    model = folded()
    capfd.readouterr()
    THEIRS.apply(model, context(model, images()))
    assert capfd.readouterr() == ("", "")
    assert (logger.level, sys.stdout) == (level, stdout)


@needs_nncf
@pytest.mark.parametrize(("count", "used"), [(10, 8), (3, None)], ids=["enough", "too few"])
def test_a_fixed_batch_is_calibrated_in_whole_batches(
    onnx_model: Callable[..., Model], count: int, used: int | None
) -> None:
    text = "g (float[4,3,8,8] x) => (float[4,6,6,6] y) { [c] y = Conv(x, w) }"
    model = onnx_model(text, w=(6, 3, 3, 3))
    data = np.random.default_rng(0).normal(size=(count, 3, 8, 8)).astype(np.float32)
    if used is None:
        with pytest.raises(DataError, match="Give at least 4 samples"):
            THEIRS.apply(model, context(model, data))
    else:
        made = NncfQuantize().apply(model, context(model, data))
        assert made.history[-1].details["samples"] == used


@pytest.mark.parametrize("step", [NncfQuantize(), NncfQuantizeWithAccuracyControl()])
def test_without_data_it_says_what_to_give(step: Any) -> None:
    model = tiny_exported(21)
    with pytest.raises(UnsupportedError, match=f"Pass {step.name} .* Give --calibration DATA"):
        step.apply(model, context(model))


FRAGILE = """g (float[batch,8] x) => (float[batch,4] y) {
    [wide] a = Mul(x, s) [first] b = MatMul(a, w) [r] c = Relu(b)
    [second] d = MatMul(c, u) [t] e = Relu(d) [last] y = Gemm(e, v)
}"""


@pytest.fixture
def fragile(onnx_model: Callable[..., Model]) -> Model:
    """The first layer reads one channel that is 10,000 times as large as the others.

    One scale for all of them rounds those to zero, and they alone decide the class.
    """
    rng = np.random.default_rng(1)
    w, u, v = (rng.normal(size=s).astype(np.float32) for s in ((8, 16), (16, 16), (16, 4)))
    w[0] = 0
    return onnx_model(
        FRAGILE, s=np.where(np.arange(8) == 0, 1e4, 1).astype(np.float32), w=w, u=u, v=v
    )


@needs_nncf
@pytest.mark.parametrize("labelled", [False, True], ids=["agreement", "labels"])
def test_accuracy_control_gives_layers_back_until_the_drop_is_allowed(
    fragile: Model, labelled: bool
) -> None:
    x = np.random.default_rng(2).normal(size=(60, 8)).astype(np.float32)
    float_classes = run(reference_session(fragile.graph_model), {"x": x})["y"].argmax(1)
    labels = np.where(np.arange(60) < 50, float_classes, 3 - float_classes)
    data = context(fragile, (x, labels) if labelled else x)
    broken = NncfQuantize().apply(fragile, data)
    step = NncfQuantizeWithAccuracyControl(max_drop=0.05)
    made = step.apply(fragile, data)
    found, classes = (
        run(reference_session(one.graph_model), {"x": x})["y"].argmax(1) for one in (made, broken)
    )
    right = labels if labelled else float_classes
    details = made.history[-1].details
    assert details["before"] == pytest.approx(np.mean(float_classes == right))
    assert details["after"] == pytest.approx(np.mean(found == right))
    assert details["max_drop_kept"]
    assert (
        details["before"] - details["after"] <= 0.05 < details["before"] - np.mean(classes == right)
    )
    assert details["metric"].startswith("top-1 on the labels" if labelled else "agreement with")
    assert broken.history[-1].details["quantized_nodes"] == 3
    assert details["quantized_nodes"] == 2
    assert details["reasons"] == {"first": "NNCF left it in float"}


@needs_nncf
def test_accuracy_control_needs_classes(onnx_model: Callable[..., Model]) -> None:
    text = "g (float[batch,3,8,8] x) => (float[batch,6,6,6] y) { [c] y = Conv(x, w) }"
    model = onnx_model(text, w=(6, 3, 3, 3))
    data = context(model, np.zeros((4, 3, 8, 8), np.float32))
    with pytest.raises(UnsupportedError, match="compares classes"):
        NncfQuantizeWithAccuracyControl().apply(model, data)


LINEAR = """g (float[batch,6,64] x) => (float[batch,6,8] y) {
    [first] a = MatMul(x, w) [act] b = Relu(a) [second] c = MatMul(b, u) [last] y = MatMul(c, v)
}"""


@needs_nncf
@pytest.mark.parametrize(
    ("step", "types"),
    [
        (NncfCompressWeights(), {"UINT8"}),
        (NncfCompressWeights(mode="int8_sym"), {"INT8"}),
        (NncfCompressWeights(mode="int4_sym", group_size=32), {"INT4", "UINT8"}),
        (NncfCompressWeights(mode="int4_asym", group_size=32, all_layers=True), {"UINT4"}),
        (NncfCompressWeights(mode="int4_sym", group_size=32, ratio=0.1), {"UINT8"}),
    ],
    ids=["default", "int8", "int4", "all layers", "ratio"],
)
def test_weights_are_stored_in_few_bits(
    onnx_model: Callable[..., Model], step: NncfCompressWeights, types: set[str]
) -> None:
    model = onnx_model(LINEAR, w=(64, 64), u=(64, 64), v=(64, 8))
    made = step.apply(model, context(model))
    constants = [v.const_value for v in made.graph_model.graph.initializers.values()]
    stored = [c for c in constants if c is not None and c.dtype.name != "FLOAT"]
    assert {c.dtype.name for c in stored} == types
    details = made.history[-1].details
    assert details["quantized_nodes"] == 3
    assert set(details["reasons"].values()) == {
        "only its weight is quantized; it is computed with in float"
    }
    inputs = model.example(2)
    expected, got = (run(reference_session(m.graph_model), inputs)["y"] for m in (model, made))
    assert not np.array_equal(expected, got)
    np.testing.assert_allclose(got, expected, atol=0.3 * np.abs(expected).max())


@needs_nncf
def test_convolutions_keep_their_weights() -> None:
    model = folded()
    made = NncfCompressWeights().apply(model, context(model))
    reasons = made.history[-1].details["reasons"]
    assert {n for n, why in reasons.items() if why == "NNCF left it in float"} == MULTIPLIES - {"8"}
    assert TARGET.build(made)({"x": images(2)})["linear"].shape == (2, 10)


# What can go wrong.


@needs_nncf
def test_what_it_refuses_is_an_error_of_the_engine(onnx_model: Callable[..., Model]) -> None:
    model = onnx_model(LINEAR, w=(64, 64), u=(64, 64), v=(64, 8))
    step = NncfCompressWeights(mode="int4_sym", group_size=48, all_layers=True)
    with pytest.raises(EngineError, match=r"NNCF \d+\.\d+\.\d+ failed: \w+Error: .*group"):
        step.apply(model, context(model))


def _raises(library: Any, graph: onnx.ModelProto) -> onnx.ModelProto:
    raise ValueError("first line\nsecond line")


def _does_nothing(library: Any, graph: onnx.ModelProto) -> onnx.ModelProto:
    return graph


def _breaks(library: Any, graph: onnx.ModelProto) -> onnx.ModelProto:
    graph.graph.node[0].op_type = "NoSuchOperator"
    return graph


@needs_nncf
@pytest.mark.parametrize(
    ("work", "message"),
    [
        (_raises, r"failed: ValueError: first line$"),
        (_does_nothing, "failed: it left every multiplication in float"),
        (_breaks, "failed: its model does not run: .*NoSuchOperator"),
    ],
    ids=["exception", "nothing done", "broken model"],
)
def test_every_failure_is_one_sentence_about_nncf(work: Any, message: str) -> None:
    model = folded()
    with pytest.raises(EngineError, match=message):
        compressed(THEIRS, model, context(model), work, {})


@needs_nncf
def test_inputs_and_outputs_get_their_names_back(nncf: Any) -> None:
    model = folded()

    def rename(library: Any, graph: onnx.ModelProto) -> onnx.ModelProto:
        made = library.quantize(graph, library.Dataset([{"x": images(1)}]), subset_size=1)
        made.graph.output[0].name = made.graph.node[-1].output[0] = "another"
        return made

    made = compressed(THEIRS, model, context(model), rename, {})
    assert [value.name for value in made.graph_model.graph.outputs] == ["linear"]
    assert set(run(reference_session(made.graph_model), {"x": images(1)})) == {"linear"}


PASSES = [NncfQuantize(), NncfQuantizeWithAccuracyControl(), NncfCompressWeights()]


@pytest.mark.parametrize("step", PASSES, ids=lambda step: step.name)
def test_without_the_package_it_says_how_to_install_it(
    step: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "nncf", None)
    with pytest.raises(MissingExtraError, match=rf"{step.name} needs NNCF.*hwcompress\[nncf\]"):
        step.check(tiny_model(), TARGET)


@needs_nncf
@pytest.mark.parametrize("step", PASSES, ids=lambda step: step.name)
def test_a_target_without_int8_is_refused(step: Any) -> None:
    with pytest.raises(UnsupportedError, match="null cannot run int8; it runs float32"):
        step.check(tiny_model(), NullTarget())
    step.check(tiny_model(), TARGET)


@dataclass(frozen=True)
class _NoInt4(NullTarget):
    """Stores weights in 8 bits only."""

    @property
    def capabilities(self) -> Any:
        return dataclasses.replace(TARGET.capabilities, weight_only=())


@needs_nncf
def test_a_target_without_int4_is_refused() -> None:
    NncfCompressWeights().check(tiny_model(), _NoInt4())
    with pytest.raises(UnsupportedError, match="does not store weights in int4"):
        NncfCompressWeights(mode="int4_sym").check(tiny_model(), _NoInt4())


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (NncfQuantize, {"preset": "fast"}, "no preset 'fast'; choose from null, performance"),
        (NncfQuantize, {"model_type": "cnn"}, "choose from null, transformer"),
        (NncfQuantize, {"target_device": "TPU"}, "choose from ANY, CPU"),
        (NncfQuantize, {"subset_size": 0}, "must be at least 1"),
        (NncfQuantizeWithAccuracyControl, {"max_drop": 2}, "share of samples, 0 to 1"),
        (NncfQuantizeWithAccuracyControl, {"preset": "fast"}, "no preset 'fast'"),
        (NncfCompressWeights, {"mode": "nf4"}, "choose from int8_sym"),
        (NncfCompressWeights, {"ratio": 0.5, "group_size": 8}, "does not take ratio, group_size"),
        (NncfCompressWeights, {"mode": "int4_sym", "ratio": 0}, "ratio 0 is a share"),
        (NncfCompressWeights, {"mode": "int4_sym", "group_size": 0}, "at least 1, or -1"),
    ],
)
def test_options_that_make_no_sense(make: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make(**options)


@pytest.mark.parametrize("step", PASSES, ids=lambda step: step.name)
def test_it_is_found_by_name_and_compresses_as_a_whole(step: Any) -> None:
    assert create_pass(step.name) == step
    assert isinstance(step, Compressing)
    assert not isinstance(step, Placing)


# In a run.


@dataclass(frozen=True)
class Refuses:
    """A pass that always fails."""

    reason: str = "It never works."
    missing: str = ""

    name: ClassVar[str] = "refuses"
    stage: ClassVar[Literal["onnx"]] = "onnx"
    makes: ClassVar[str] = "int8"

    def check(self, model: Model, target: Target) -> None:
        if self.missing:
            raise MissingExtraError(f"It needs {self.missing}.")

    def apply(self, model: Model, context: Context) -> Model:
        raise EngineError(self.reason)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny network as an ONNX file."""
    path = tmp_path_factory.mktemp("model") / "tiny.onnx"
    ir.save(tiny_exported(21).graph_model, path)
    return path


def run_with(recipe: Recipe, file: Path, out: Path, **options: Any) -> RunResult:
    return compress.run(
        file, recipe=recipe, out=out, **{"calibration": images(), **FAST, **options}
    )


def tried(result: RunResult) -> dict[str, str]:
    """Why each variant failed, "" where it did not."""
    return {row["name"]: row["failure"] for row in result.report.tried}


def test_an_alternative_that_fails_costs_only_its_candidate(file: Path, tmp_path: Path) -> None:
    result = run_with(Recipe(OURS, {}, (Refuses(),)), file, tmp_path / "out")
    assert tried(result) == {
        "float32": "",
        "onnxruntime float32": "",
        "onnxruntime int8": "",
        "onnxruntime int8 refuses": "It never works.",
    }
    assert "onnxruntime int8 refuses failed: It never works." in result.report.headline
    assert {c.name for c in result.report.candidates} <= {
        name for name, failure in tried(result).items() if not failure
    }
    assert compress.load(result.directory)({"x": images(2)})["linear"].shape == (2, 10)


def test_a_recipe_whose_own_pass_fails_leaves_the_float_model(file: Path, tmp_path: Path) -> None:
    result = run_with(Recipe((*REWRITES, Refuses())), file, tmp_path / "out", calibration=None)
    failures = {"float32": "", "onnxruntime float32": ""}
    assert tried(result) == failures | {"onnxruntime int8 refuses": "It never works."}
    assert result.report.chosen in failures
    assert (result.directory / "model.onnx").is_file()


def test_alternatives_are_checked_before_any_work(file: Path, tmp_path: Path) -> None:
    recipe = Recipe(OURS, {}, (Refuses(missing="something"),))
    with pytest.raises(MissingExtraError, match="It needs something"):
        run_with(recipe, file, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_run_without_the_package_is_refused_before_any_work(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "nncf", None)
    for recipe in (Recipe(OURS, {}, (THEIRS,)), Recipe((*REWRITES, THEIRS))):
        with pytest.raises(MissingExtraError, match="nncf_quantize needs NNCF"):
            run_with(recipe, file, tmp_path / "out")
    assert not list(tmp_path.iterdir())


@needs_nncf
def test_a_recipe_compares_ours_with_theirs(file: Path, tmp_path: Path) -> None:
    refused = NncfCompressWeights(mode="int4_sym", group_size=48, all_layers=True)
    recipe = Recipe(OURS, {}, (THEIRS, refused))
    result = run_with(recipe, file, tmp_path / "out")
    rows = {row["name"]: row for row in result.report.tried}
    weights = "int4 weights nncf_compress_weights"
    assert list(rows) == [
        "float32",
        "onnxruntime float32",
        "onnxruntime int8",
        "onnxruntime int8 nncf_quantize",
        f"onnxruntime {weights}",
    ]
    failures = {name for name, row in rows.items() if row["failure"]}
    assert failures == {f"onnxruntime {weights}"}
    assert any(f"{weights} failed: NNCF" in text for text in result.report.headline)
    assert rows["onnxruntime int8 nncf_quantize"]["precision"] == "int8"
    assert rows["onnxruntime int8 nncf_quantize"]["speedup"]["value"] > 0
    assert "nncf" in result.report.versions
    again = Recipe.from_yaml(result.directory / "recipe.yaml")
    assert again.alternatives == recipe.alternatives
    assert again.passes[: len(OURS) - 1] == OURS[:-1]


@needs_nncf
def test_it_stands_in_a_recipe_without_quantize(file: Path, tmp_path: Path) -> None:
    result = run_with(Recipe((*REWRITES, THEIRS)), file, tmp_path / "out")
    name = "onnxruntime int8 nncf_quantize"
    assert tried(result) == {"float32": "", "onnxruntime float32": "", name: ""}
    assert result.report.calibration["ranges_from"] == "calibration data"
    assert result.report.calibration["samples"] == 8
    assert "alternatives" not in (result.directory / "recipe.yaml").read_text()
