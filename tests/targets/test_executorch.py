"""The ExecuTorch target keeps the contract; its files, threads and refusals."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import compress
from compress.candidates import int8_share
from compress.data import load_data
from compress.errors import EngineError, LoadError, OutputError
from compress.facts import delegation
from compress.graph import graph_sites
from compress.model import Model
from compress.passes import Context
from compress.reference import reference_session, run
from compress.registry import create_pass, create_target
from compress.target import Isolated
from compress.testing import TargetContract
from targets.cpu import CPU
from targets.executorch import ExecuTorch

ONE = ExecuTorch(threads=1)
installed = pytest.mark.skipif(not ONE.check().available, reason="executorch is not installed")
Build = Callable[..., Model]
NETWORK = """g (float[batch,3,12,12] x) => (float[batch,5] y) {
    [a] c1 = Conv<pads=[1,1,1,1]>(x, w1, b1) [ra] r1 = Clip(c1, zero, six)
    [b] c2 = Conv<pads=[1,1,1,1], group=8>(r1, w2, b2) [rb] r2 = Relu(c2)
    [c] c3 = Conv(r2, w3, b3) [add] s = Add(r1, c3) [rs] t = Relu(s)
    [n] n = AveragePool<kernel_shape=[2,2], strides=[2,2]>(c3) [d] c4 = Conv(n, w3, b3)
    [m] m = MaxPool<kernel_shape=[2,2], strides=[2,2]>(t) [cat] k = Concat<axis=1>(m, c4)
    [cut] z = Slice(k, start, end, axes, steps)
    [up] u = Resize<mode="nearest", coordinate_transformation_mode="asymmetric",
        nearest_mode="floor">(z, none, scales)
    [pool] p = GlobalAveragePool(u) [flat] f = Flatten(p) [fc] y = Gemm(f, g, h)}"""
WEIGHTS: dict[str, Any] = {
    "w1": (8, 3, 3, 3), "b1": (8,), "w2": (8, 1, 3, 3), "b2": (8,), "w3": (8, 8, 1, 1),
    "b3": (8,), "g": (16, 5), "h": (5,), "zero": np.float32(0), "six": np.float32(6),
    "start": np.array([0, 0]), "end": np.array([99, 99]), "axes": np.array([2, 3]),
    "steps": np.array([2, 2]), "none": np.zeros(0, np.float32),
    "scales": np.array([1, 1, 2, 2], np.float32),
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def _home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The cache belongs to the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(tmp_path_factory.mktemp("home")))
        yield


@installed
class TestExecuTorch(TargetContract):
    """One thread."""

    target = ONE


def images(count: int = 32) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((count, 3, 12, 12)).astype(np.float32)


@pytest.fixture(scope="module")
def floating(onnx_model: Build) -> Model:
    """Every kind of operator that XNNPACK has in int8, one in float, and one that it lacks."""
    return onnx_model(NETWORK, **WEIGHTS)


@pytest.fixture(scope="module")
def quantized(floating: Model) -> Model:
    data = load_data(images(), floating.inputs)
    context = Context(target=ONE, original=floating, calibration=data)
    return create_pass("quantize", samples=32).apply(floating, context)


@pytest.fixture(scope="module")
def engine(quantized: Model) -> Any:
    return ONE.build(quantized)


@installed
def test_int8_computes_what_onnx_runtime_computes(quantized: Model, engine: Any) -> None:
    (expected,) = run(reference_session(quantized.graph_model), {"x": images()}).values()
    (got,) = engine({"x": images()}).values()
    graph = quantized.graph_model.graph
    (step,) = (n.inputs[1] for n in graph if n.name == "y/q")
    scale = float(step.const_value.numpy())
    assert np.abs(got - expected).max() <= 1.01 * scale
    assert (got != expected).mean() < 0.05
    assert expected.std() > 10 * scale


@installed
def test_relu6_is_quantized_behind_the_activation(quantized: Model, engine: Any) -> None:
    """Its own quantizer spends the range on what ReLU6 throws away; 6 / 255 is all it takes."""
    (scale,) = (n.inputs[1] for n in quantized.graph_model.graph if n.name == "r1/q")
    assert float(scale.const_value.numpy()) <= 6 / 255 + 1e-6
    assert not [k for k in engine.kernels() if k.op_type in ("hardtanh", "relu", "clamp")]


@installed
def test_operators_say_where_they_run(quantized: Model, engine: Any) -> None:
    kernels = engine.kernels()
    sites = graph_sites(quantized.graph_model)
    by_site = {k.site: k for k in kernels if k.precision in ("int8", "float32")}
    int8 = {site for site, kernel in by_site.items() if kernel.precision == "int8"}
    assert int8 >= {"a", "b", "c", "add", "d", "m", "fc"}
    assert by_site["n"].precision == "float32"
    assert {k.backend for k in kernels if k.precision == "int8"} == {"XNNPACK"}
    left = [k for k in kernels if not k.backend]
    assert {(k.op_type, k.site) for k in left} == {("upsample_nearest2d", "up")}
    assert int8_share(kernels, sites) == 1.0
    (sentence,) = delegation(kernels, sites)
    assert sentence.startswith("XNNPACK executes 100 % of the multiply-accumulates and ")
    assert sentence.endswith("the runtime's own kernels execute upsample_nearest2d (up).")


def test_nothing_is_said_where_nothing_is_delegated() -> None:
    model = TestExecuTorch().exported()
    kernels = create_target("onnxruntime", threads=1).build(model).kernels()
    assert delegation(kernels, graph_sites(model.graph_model)) == []


@installed
def test_any_number_of_threads_gives_the_same(quantized: Model, engine: Any) -> None:
    """The pool is one for the process; a program goes on after another number was used."""
    two = ExecuTorch(threads=2).build(quantized)
    expected = engine({"x": images(4)})["y"]
    for _ in range(3):
        np.testing.assert_array_equal(two({"x": images(4)})["y"], expected)
        np.testing.assert_array_equal(engine({"x": images(4)})["y"], expected)


@installed
def test_engines_of_one_graph_share_its_program(quantized: Model, engine: Any) -> None:
    assert ONE.build(quantized)._program is engine._program


@installed
def test_a_saved_program_is_the_same(engine: Any, tmp_path: Path) -> None:
    assert [path.name for path in engine.save(tmp_path)] == ["model.pte", "model.json"]
    again = CPU(threads=1).load(tmp_path)
    assert (again.name, again.inputs, again.outputs) == (
        engine.name,
        engine.inputs,
        engine.outputs,
    )
    assert again.kernels() == engine.kernels()
    np.testing.assert_array_equal(again({"x": images(3)})["y"], engine({"x": images(3)})["y"])


@installed
@pytest.mark.parametrize("file", ["model.pte", "model.json"])
@pytest.mark.parametrize("damage", ["gone", "cut", "changed"])
def test_a_damaged_file_never_reaches_the_runtime(
    engine: Any, tmp_path: Path, file: str, damage: str
) -> None:
    engine.save(tmp_path)
    path = tmp_path / file
    data = bytearray(path.read_bytes())
    if damage == "gone":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(data[: len(data) // 2])
    else:
        data[len(data) // 2] ^= 255
        path.write_bytes(data)
    with pytest.raises(LoadError, match=r"model\.|no program"):
        ONE.load(tmp_path)


@installed
def test_a_description_of_another_release_is_refused(engine: Any, tmp_path: Path) -> None:
    engine.save(tmp_path)
    path = tmp_path / "model.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 0}))
    with pytest.raises(LoadError, match="another release"):
        ONE.load(tmp_path)


@installed
def test_a_folder_that_is_not_there_cannot_be_written(engine: Any, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="cannot be written to"):
        engine.save(tmp_path / "nowhere")


@installed
@pytest.mark.parametrize(
    "inputs",
    [
        {},
        {"z": images(1)},
        {"x": images(1)[:, :2]},
        {"x": images(1).astype(np.float64)},
        {"x": images(1)[0]},
        {"x": images(0)},
    ],
    ids=["nothing", "name", "shape", "dtype", "rank", "empty"],
)
def test_other_inputs_are_refused(engine: Any, inputs: dict[str, np.ndarray]) -> None:
    with pytest.raises(EngineError, match="failed while running the model: it takes"):
        engine(inputs)


@installed
def test_samples_without_a_row_each_run_alone(onnx_model: Build) -> None:
    model = onnx_model(
        "g (float[batch,4] x) => (float[batch,4] y, float[1] m) "
        "{ [r] y = Relu(x) [m] m = ReduceMax<keepdims=0>(y, axes) }",
        axes=np.array([1]),
        infer=False,
    )
    engine = ONE.build(model)
    one = np.array([[-1, 2, 3, -4]], np.float32)
    np.testing.assert_array_equal(engine({"x": one})["m"], [3])
    with pytest.raises(EngineError, match="m has no row for each sample"):
        engine({"x": np.concatenate([one, one])})


@installed
def test_a_fixed_batch_stays(onnx_model: Build) -> None:
    model = onnx_model("g (float[3,4] x) => (float[3,4] y) { [r] y = Relu(x) }")
    engine = ONE.build(model)
    x = np.random.default_rng(0).standard_normal((3, 4)).astype(np.float32)
    np.testing.assert_array_equal(engine({"x": x})["y"], np.maximum(x, 0))
    with pytest.raises(EngineError, match="it takes"):
        engine({"x": x[:1]})


@installed
def test_several_inputs_come_by_name(onnx_model: Build) -> None:
    model = onnx_model(
        "g (float[batch,4] first, float[4] then) => (float[batch,4] y)"
        "{ [r] r = Relu(first) [s] y = Sub(r, then) }"
    )
    engine = ONE.build(model)
    first, then = np.full((2, 4), 5, np.float32), np.arange(4, dtype=np.float32)
    np.testing.assert_array_equal(engine({"then": then, "first": first})["y"], first - then)


MANY = """g (float[batch,4,6] x, int64[batch,6] ids) => (float[batch,4,8] y, float[batch,2] z) {
    [embed] e = Gather(table, ids) [turn] t = Transpose<perm=[0,2,1]>(e)
    [sum] a = Add(x, t) [norm] n = LayerNormalization<axis=-1>(a, g, b)
    [swish] h = HardSwish(n) [gate] s = HardSigmoid<alpha=0.1666667, beta=0.5>(n)
    [leak] l = LeakyRelu<alpha=0.1>(n) [elu] u = Elu(n) [tanh] v = Tanh(n) [erf] f = Erf(n)
    [all] w = Sum(h, s, l, u, v, f) [soft] p = Softmax<axis=1>(w) [exp] q = Exp(p)
    [product] m = MatMul(q, matrix) [gelu] o = Gelu(m) [power] y = Pow(o, two)
    [grow] i = Unsqueeze(w, axes) [up] r = Resize<mode="linear">(i, none, scales)
    [mean] k = ReduceMean<keepdims=0>(r, all) [pad] j = Pad(k, pads)
    [part] z = Slice(j, zero, end, one)
}"""


@installed
@pytest.mark.slow
def test_operators_beyond_int8_are_computed_too(onnx_model: Build) -> None:
    """In XNNPACK's float kernels, or in those that ExecuTorch has for everything."""
    model = onnx_model(
        MANY, table=(9, 4), g=(6,), b=(6,), matrix=(6, 8), two=np.float32(2), axes=np.array([1]),
        none=np.zeros(0, np.float32), scales=np.array([1, 1, 2, 2], np.float32),
        all=np.array([2, 3]), pads=np.array([0, 1, 0, 2]), zero=np.array([0]), end=np.array([2]),
        one=np.array([1]), infer=False,
    )  # fmt: skip
    inputs = model.example(2, seed=1)
    engine = ONE.build(model)
    got, expected = engine(inputs), run(reference_session(model.graph_model), inputs)
    for name, array in expected.items():
        np.testing.assert_allclose(got[name], array, rtol=1e-4, atol=1e-5)
    assert {kernel.backend for kernel in engine.kernels()} == {"", "XNNPACK"}


@installed
def test_what_torch_lacks_is_an_engine_error(onnx_model: Build) -> None:
    model = onnx_model("g (float[batch,4] x) => (float[batch,4] y) { [n] y = Shrink(x) }")
    with pytest.raises(EngineError, match=r"ExecuTorch .* refuses the model: .* it has Shrink"):
        ONE.build(model)


@installed
@pytest.mark.slow
def test_a_run_leaves_a_program_and_says_what_is_delegated(
    cli: Callable[..., Any], tiny_onnx: Path, tiny_images: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    quick = ("--threads", 1, "--time", 0, "--seconds", 0.5, "--out", out)
    ran = cli("run", tiny_onnx, "--target", "executorch", "--calibration", tiny_images, *quick)
    assert ran.code in (0, 1), ran.err
    report = json.loads((out / "report.json").read_text())
    assert {"model.pte", "model.json"} <= set(report["files"])
    failures = {row["name"]: row["failure"] for row in report["tried"]}
    assert {"float32", "executorch int8"} <= set(failures)
    assert set(failures.values()) == {""}
    said = " ".join(report["headline"])
    assert "XNNPACK executes 100 % of the multiply-accumulates" in said
    assert "nothing is left to others." in said
    assert "not verified on a device" in said
    x = np.zeros((2, 3, 8, 8), np.float32)
    assert compress.load(out)({"x": x})["y"].shape == (2, 4)


QUIET = """
import logging, os
before = (list(logging.getLogger().handlers), logging.getLogger().level)
from compress.testing import tiny_exported
from targets.executorch import ExecuTorch
model = tiny_exported(21)
engine = ExecuTorch(threads=2).build(model)
engine(model.example())
after = (list(logging.getLogger().handlers), logging.getLogger().level)
set_by_executorch = "OPENVINO_LIB_PATH" in os.environ
print("same" if before == after and not set_by_executorch else "changed")
"""


@installed
@pytest.mark.slow
def test_nothing_reaches_the_terminal_or_the_process() -> None:
    ran = subprocess.run([sys.executable, "-c", QUIET], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert (ran.stdout, ran.stderr) == ("same\n", "")


def test_facts_name_their_source_and_follow_no_instruction_set() -> None:
    facts = ONE.capabilities
    assert facts.precisions == ("float32", "int8")
    assert not facts.reduced_weights
    assert not facts.profiler
    assert all(pattern.source for pattern in facts.patterns)
    assert len({pattern.op for pattern in facts.patterns}) == len(facts.patterns)
    assert isinstance(ONE, Isolated)


ABSENT = """
import sys
class Gone:
    def find_spec(self, name, path=None, target=None):
        if name.partition('.')[0] == 'executorch':
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Gone())
from compress.errors import UnsupportedError
from compress.registry import create_target, require_target
from targets.cpu import CPU
assert "executorch" not in [one.name for one in CPU().runtimes()]
print(CPU().missing()["executorch"].install)
try:
    require_target(create_target("executorch"))
except UnsupportedError as error:
    print(error)
"""


def test_without_the_package_the_rest_works() -> None:
    ran = subprocess.run(
        [sys.executable, "-c", ABSENT], capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    line = "pip install 'hwcompress[executorch]'"
    assert ran.stdout.splitlines() == [
        line,
        "Target executorch cannot be used here: ExecuTorch is not installed. "
        f"Install it with: {line}.",
    ]
