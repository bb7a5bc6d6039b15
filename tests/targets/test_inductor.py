"""Inductor's packages on this CPU: everything but the device."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from compress import artifact
from compress.candidates import int8_share
from compress.errors import EngineError, LoadError
from compress.export import to_onnx
from compress.graph import graph_sites
from compress.lowering import lower
from compress.model import Model, TensorSpec
from compress.passes import Context
from compress.progress import silent
from compress.recipe import default_passes
from compress.reference import reference_session, run
from compress.search import search
from compress.target import OnDevice
from compress.testing import TargetContract, tiny_exported
from compress.workload import make_workload
from targets import inductor_engine, inductor_package
from targets.inductor import Inductor
from targets.inductor_engine import InductorEngine
from targets.inductor_program import make_program
from targets.inductor_settings import DESCRIPTION, PACKAGE, CompileSettings

HERE = Inductor(device="cpu")
CHECK = HERE.check()
compiles = pytest.mark.skipif(not CHECK.available, reason=CHECK.reason)


@compiles
class TestInductorOnCpu(TargetContract):
    """A package that is compiled once for all of these."""

    target = HERE


class Attention(torch.nn.Module):
    """Patches, one layer of attention and a mean, as ViT has them: 20 tokens of width 32."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = torch.nn.Conv2d(3, 32, 4, 4)
        self.qkv, self.out = torch.nn.Linear(32, 96), torch.nn.Linear(32, 32)
        self.head = torch.nn.Linear(32, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        n, tokens, width = x.shape
        q, k, v = self.qkv(x).reshape(n, tokens, 3, 2, width // 2).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-2, -1) / 4).softmax(-1)
        x = x + self.out((weights @ v).transpose(1, 2).reshape(n, tokens, width))
        return self.head(x.mean(1))


@pytest.fixture(scope="module")
def attention() -> Model:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = Attention().eval()
    return to_onnx(Model(module, (TensorSpec("x", (1, 3, 16, 20)),), "attention"), 21)


def settings(**options: Any) -> CompileSettings:
    return CompileSettings(device="cpu", **options)


def reference(model: Model, inputs: dict[str, np.ndarray]) -> np.ndarray:
    (output,) = run(reference_session(model.graph_model), inputs).values()
    return output


def recorded(model: Model, batch: int, precision: Any) -> tuple[np.ndarray, Any]:
    """What the program gives before it is compiled."""
    inputs = model.example(batch)
    program = make_program(model.graph_model, model.inputs, batch, precision, "cpu")
    with torch.no_grad():
        (output,) = program.exported.module()(*map(torch.from_numpy, inputs.values()))
    assert output.dtype == torch.float32
    return output.numpy(), program


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(
    ("precision", "limit"), [("float32", 1e-5), ("bfloat16", 0.03), ("float16", 0.004)]
)
def test_the_program_computes_what_the_graph_says(
    batch: int, precision: str, limit: float, attention: Model
) -> None:
    for model in (attention, tiny_exported(21)):
        expected = reference(model, model.example(batch))
        output, program = recorded(model, batch, precision)
        error = np.abs(output - expected).max() / np.abs(expected).max()
        assert error < limit
        assert bool(error > 1e-5) is (precision != "float32")
        kinds = {k.precision for k in program.kernels if k.op_type in ("Conv", "Gemm", "MatMul")}
        assert kinds == {precision}


def test_weights_of_the_program_are_typed(attention: Model) -> None:
    _, program = recorded(attention, 1, "bfloat16")
    types = {t.dtype for t in program.exported.state_dict.values() if t.is_floating_point()}
    assert types == {torch.bfloat16}


def test_linear_layers_in_int8_are_the_ones_that_have_a_kernel(attention: Model) -> None:
    pytest.importorskip("torchao")
    expected = reference(attention, attention.example(1))
    output, program = recorded(attention, 1, "int8")
    error = np.abs(output - expected).max() / np.abs(expected).max()
    assert 1e-4 < error < 0.1
    narrow = {kernel.site for kernel in program.kernels if kernel.precision == "int8"}
    # The head reads one row, and has 10 outputs; products of two activations have no weight.
    assert len(narrow) == 2
    assert any("qkv" in name for name in narrow)
    assert any("out" in name for name in narrow)
    assert {k.precision for k in program.kernels if k.op_type == "Conv"} == {"bfloat16"}


def test_a_network_without_such_a_layer_is_refused() -> None:
    model = tiny_exported(21)
    with pytest.raises(EngineError, match="No linear layer can be computed in int8"):
        make_program(model.graph_model, model.inputs, 1, "int8", "cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="FP8 is refused where there is no GPU")
def test_fp8_needs_a_gpu(attention: Model) -> None:
    pytest.importorskip("torchao")
    with pytest.raises(EngineError, match="torchao cannot quantize to float8 here"):
        make_program(attention.graph_model, attention.inputs, 1, "float8", "cpu")


@pytest.mark.slow
@compiles
def test_a_package_in_int8(attention: Model, tmp_path: Path) -> None:
    pytest.importorskip("torchao")
    target = Inductor(device="cpu", precision="int8")
    inputs = attention.example(1)
    engine = target.build(attention)
    output = engine(inputs)
    program, _ = recorded(attention, 1, "int8")
    (name,) = engine.outputs
    np.testing.assert_allclose(output[name], program, atol=0.02 * np.abs(program).max())
    engine.save(tmp_path)
    again = target.load(tmp_path)
    np.testing.assert_array_equal(again(inputs)[name], output[name])
    assert again.kernels() == engine.kernels()
    assert {k.precision for k in again.kernels()} >= {"int8", "bfloat16"}


@pytest.mark.slow
@compiles
def test_its_precisions_are_candidates_of_a_search(attention: Model) -> None:
    pytest.importorskip("torchao")
    context = Context(target=HERE, original=attention)
    lowered = [lower(attention, default_passes(bits=8), context)]
    workload = make_workload(attention, None, batch=1, objective="latency", threads=1)
    found = search(attention, lowered, workload, seconds=0, seed=0, progress=silent)
    screening = found.screening
    names = ["float32", *(f"inductor {p}" for p in ("float32", "bfloat16", "int8"))]
    assert list(screening.variants) == names
    assert screening.failures == {}
    assert screening.speed("inductor int8") > 0
    assert screening.variants["inductor int8"].made_by == "inductor"
    shares = [
        int8_share(screening.engines[n].kernels(), graph_sites(attention.graph_model))
        for n in names
    ]
    assert shares[:3] == [0, 0, 0]
    assert 0 < shares[3] < 1


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package of the tiny network, as an artifact without its other files."""
    folder = tmp_path_factory.mktemp("saved")
    files = HERE.build(tiny_exported(21)).save(folder)
    report = {
        "schema_version": 1,
        "files": {path.name: artifact.sha256_file(path) for path in files},
        "target": {"name": "inductor", "options": dataclasses.asdict(HERE)},
    }
    (folder / artifact.REPORT).write_text(json.dumps(report))
    return folder


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "copy"))


@compiles
def test_batches_are_cut_and_filled_up(saved: Path) -> None:
    model, engine = tiny_exported(21), HERE.load(saved)
    (name,) = engine.outputs
    for batch in (4, 1, 2):
        inputs = model.example(batch, seed=batch)
        expected = reference(model, inputs)
        got = engine(inputs)[name]
        assert got.shape == expected.shape
        np.testing.assert_allclose(got, expected, atol=1e-4)


@compiles
def test_what_stays_on_the_device_is_computed(saved: Path) -> None:
    engine = HERE.load(saved)
    assert isinstance(engine, OnDevice)
    inputs = tiny_exported(21).example(1)
    engine.on_device(inputs)()
    with pytest.raises(EngineError, match="compiled for a batch of 1"):
        engine.on_device(tiny_exported(21).example(2))


@compiles
@pytest.mark.parametrize(
    "inputs",
    [
        {},
        {"y": np.zeros((1, 3, 16, 16), np.float32)},
        {"x": np.zeros((1, 3, 16, 15), np.float32)},
        {"x": np.zeros((0, 3, 16, 16), np.float32)},
    ],
    ids=["none", "name", "shape", "empty"],
)
def test_other_inputs_are_refused(inputs: dict[str, np.ndarray], saved: Path) -> None:
    with pytest.raises(EngineError, match="takes x:batchx3x16x16:float32"):
        HERE.load(saved)(inputs)


@compiles
def test_read_only_inputs_are_fine(saved: Path) -> None:
    engine, inputs = HERE.load(saved), tiny_exported(21).example(1)
    expected = engine(inputs)
    inputs["x"].setflags(write=False)
    np.testing.assert_equal(engine(inputs), expected)


def _append(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def _other_package(path: Path) -> None:
    """A package that somebody put there, with an engine.json that goes with it."""
    _append(path / PACKAGE)
    facts = json.loads((path / DESCRIPTION).read_text())
    facts["sha256"] = artifact.sha256_file(path / PACKAGE)
    (path / DESCRIPTION).write_text(json.dumps(facts))


@compiles
@pytest.mark.parametrize(
    "damage",
    [
        lambda path: _append(path / PACKAGE),
        _other_package,
        lambda path: (path / PACKAGE).unlink(),
        lambda path: (path / DESCRIPTION).write_text("{}"),
        lambda path: (path / DESCRIPTION).unlink(),
        lambda path: (path / artifact.REPORT).write_text('{"files": {}}'),
    ],
    ids=["changed", "planted", "missing", "empty", "undescribed", "not in the report"],
)
def test_no_other_code_than_the_reports_is_run(
    damage: Callable[[Path], object], copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    damage(copy)
    monkeypatch.setattr(torch._inductor, "aoti_load_package", _never)
    with pytest.raises(LoadError, match="Copy the artifact again"):
        HERE.load(copy)


def _never(*_: object, **__: object) -> None:
    raise AssertionError("native code was loaded")


@compiles
def test_a_changed_file_without_a_report_is_not_loaded(copy: Path) -> None:
    (copy / artifact.REPORT).unlink()
    assert HERE.load(copy).outputs
    _append(copy / PACKAGE)
    with pytest.raises(LoadError, match="native code"):
        HERE.load(copy)


def test_a_graph_that_torch_cannot_run_is_an_engine_error(onnx_model: Any) -> None:
    model = onnx_model("celu (float[1,4] x) => (float[1,4] y) { y = Celu(x) }")
    with pytest.raises(EngineError, match=r"Inductor refuses the model: .*Celu"):
        HERE.build(model)(model.example())


def test_a_model_is_compiled_once(attention: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sessions build it again; the key has everything that decides what is compiled."""
    made: list[tuple[Any, ...]] = []
    monkeypatch.setattr(inductor_package, "_PACKAGES", {})
    monkeypatch.setattr(
        torch._inductor, "aoti_compile_and_package", lambda *a, **k: made.append((a, k))
    )
    for options in ({}, {}, {"graphs": False}, {"precision": "bfloat16"}, {"autotune": True}):
        engine = InductorEngine.from_graph(
            "test", attention.graph_model, attention.inputs, settings(**options)
        )
        engine._compile_for(1)
    assert len(made) == 3
    assert made[-1][1]["inductor_configs"]["max_autotune"] is True


@given(st.integers(1, 40), st.integers(1, 9))
def test_parts_hold_every_sample_once(batch: int, size: int) -> None:
    specs = (TensorSpec("x", ("batch", 2)), TensorSpec("scale", ()))
    inputs = {"x": np.arange(2.0 * batch).reshape(batch, 2), "scale": np.array(3.0)}
    parts = list(inductor_engine._parts(inputs, specs, batch, size))
    assert all(part["x"].shape == (size, 2) and part["scale"] == 3 for part in parts)
    np.testing.assert_array_equal(np.concatenate([p["x"] for p in parts])[:batch], inputs["x"])
    assert (len(parts) - 1) * size < batch
