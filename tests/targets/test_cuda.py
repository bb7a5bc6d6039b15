"""What the CUDA target says without a GPU, and the data that it is made of."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from compress.errors import LoadError, UnsupportedError, UsageError
from compress.lowering import lower
from compress.passes import Context
from compress.recipe import default_passes
from compress.registry import create_target
from compress.settings import capable
from compress.target import FLOATS, Adjustable, ManyRuntimes, OnDevice, Target
from compress.testing import TargetContract, tiny_exported
from compress.variants import uniform_variants
from targets.cuda import CUDA
from targets.gpu import FEATURES, Gpu, features, find_gpu
from targets.inductor import Inductor, inductor_capabilities, torch_build
from targets.onnxruntime_cuda import (
    OnnxRuntimeCuda,
    has_provider,
    onnxruntime_cuda_capabilities,
    provider_options,
)

ROOT = Path(__file__).parents[2]
CHECK = CUDA().check()
RUNTIMES = (OnnxRuntimeCuda(), Inductor())
without_gpu = pytest.mark.skipif(CHECK.available, reason="this machine can run the CUDA target")
on_gpu = pytest.mark.skipif(not CHECK.available, reason=CHECK.reason)


def gpu(major: int, minor: int) -> Gpu:
    return Gpu("made up", (major, minor))


@pytest.mark.parametrize("name", ["cuda", "inductor", "onnxruntime_cuda"])
def test_the_names_are_registered(name: str) -> None:
    target = create_target(name)
    assert target.name == name
    assert isinstance(target, Target)


@pytest.mark.parametrize("target", [CUDA(), *RUNTIMES], ids=lambda target: target.name)
def test_what_is_missing_is_named_with_what_to_install(target: Target) -> None:
    check = target.check()
    assert check.available or (check.reason.endswith(".") and check.install)


@without_gpu
def test_the_reason_names_everything_that_is_missing() -> None:
    found = find_gpu()
    assert isinstance(found, Gpu) or found in CHECK.reason
    assert ("torch is built without CUDA" in CHECK.reason) is (torch_build() is None)
    assert ("no CUDA execution provider" in CHECK.reason) is (not has_provider())
    assert ("pip install" in CHECK.install) is (torch_build() is None or not has_provider())


@without_gpu
@pytest.mark.parametrize("bits", ["8", "16"])
def test_the_command_line_refuses_before_any_work(
    bits: str, cli: Callable[..., Any], tiny_onnx: Path, tmp_path: Path
) -> None:
    out = tmp_path / "artifact"
    found = cli("run", tiny_onnx, "--target", "cuda", "--bits", bits, "--out", out)
    assert found.code != 0
    said = " ".join(found.err.split())
    assert "Target cuda cannot be used here" in said
    assert CHECK.reason in said
    assert CHECK.install in said
    assert not out.exists()


@without_gpu
def test_nothing_is_built_without_a_runtime() -> None:
    with pytest.raises(UnsupportedError, match="Target cuda cannot be used here"):
        CUDA().build(tiny_exported(21))


@without_gpu
def test_the_benchmark_prints_a_line_and_measures_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.gpu", "--results", str(tmp_path)]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert ran.stdout.startswith("skipped: ")
    assert not list(tmp_path.iterdir())


def test_every_runtime_is_there_or_says_why_not() -> None:
    target = CUDA()
    assert isinstance(target, ManyRuntimes)
    names = {one.name for one in target.runtimes()} | set(target.missing())
    assert names == {one.name for one in RUNTIMES}


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LoadError, match=r"neither model\.onnx nor engine\.json"):
        CUDA().load(tmp_path)


@pytest.mark.parametrize(
    ("capability", "names"),
    [
        ((6, 1), set()),
        ((7, 0), {"float16"}),
        ((7, 5), {"float16", "int8"}),
        ((8, 0), {"float16", "int8", "tf32", "bfloat16", "2:4"}),
        ((8, 6), {"float16", "int8", "tf32", "bfloat16", "2:4"}),
        ((8, 9), {"float16", "int8", "tf32", "bfloat16", "2:4", "float8"}),
        ((12, 0), {"float16", "int8", "tf32", "bfloat16", "2:4", "float8"}),
    ],
    ids=lambda value: "{}.{}".format(*value) if isinstance(value, tuple) else "",
)
def test_formats_follow_the_compute_capability(
    capability: tuple[int, int], names: set[str]
) -> None:
    assert set(features(gpu(*capability))) == names


CAPABILITIES = st.tuples(st.integers(5, 13), st.integers(0, 9))


@given(CAPABILITIES, CAPABILITIES)
def test_newer_gpus_lack_nothing_of_older_ones(
    first: tuple[int, int], second: tuple[int, int]
) -> None:
    old, new = gpu(*min(first, second)), gpu(*max(first, second))
    assert features(old).keys() <= features(new).keys()
    for facts in (onnxruntime_cuda_capabilities, lambda one: inductor_capabilities(one, True)):
        assert set(facts(old).precisions) <= set(facts(new).precisions)
        assert set(facts(old).own_precisions or ()) <= set(facts(new).own_precisions or ())


def test_every_fact_has_its_source() -> None:
    assert all(one.source for one in FEATURES)
    assert len({one.name for one in FEATURES}) == len(FEATURES)
    # Tensor Cores read 16 bytes at a time.
    sizes = {"float16": 2, "int8": 1, "tf32": 4, "bfloat16": 2, "float8": 1}
    assert {one.name: 16 // one.multiple for one in FEATURES if one.multiple > 1} == sizes


@pytest.mark.parametrize(
    ("capability", "floats", "own"),
    [
        ((7, 0), ("float32", "float16"), ()),
        ((7, 5), ("float32", "float16"), ()),
        ((8, 6), ("float32", "tf32", "float16", "bfloat16"), ("int8",)),
        ((9, 0), ("float32", "tf32", "float16", "bfloat16"), ("int8", "float8")),
    ],
    ids=["volta", "turing", "ampere", "hopper"],
)
def test_what_inductor_offers(
    capability: tuple[int, int], floats: tuple[str, ...], own: tuple[str, ...]
) -> None:
    facts = inductor_capabilities(gpu(*capability), torchao=True)
    assert (facts.precisions, facts.own_precisions) == (floats, own)
    assert inductor_capabilities(gpu(*capability), torchao=False).own_precisions == ()


def test_channels_come_in_the_multiple_of_the_narrowest_format() -> None:
    volta, ampere, hopper = gpu(7, 0), gpu(8, 0), gpu(9, 0)
    assert onnxruntime_cuda_capabilities(None).channel_multiple == 1
    assert [onnxruntime_cuda_capabilities(one).channel_multiple for one in (volta, hopper)] == [
        8,
        8,
    ]
    assert inductor_capabilities(volta, torchao=True).channel_multiple == 8
    assert inductor_capabilities(ampere, torchao=True).channel_multiple == 16
    assert inductor_capabilities(ampere, torchao=False).channel_multiple == 8


def test_onnxruntime_offers_no_int8_and_says_so() -> None:
    facts = onnxruntime_cuda_capabilities(gpu(9, 0))
    assert facts.precisions == ("float32", "tf32", "float16")
    assert facts.own_precisions == ()
    assert any("QLinearConv" in note for note in facts.notes)


DOCUMENTED = {
    "device_id", "gpu_mem_limit", "arena_extend_strategy", "gpu_external_alloc",
    "gpu_external_free", "gpu_external_empty_cache", "cudnn_conv_algo_search",
    "do_copy_in_default_stream", "cudnn_conv_use_max_workspace", "cudnn_conv1d_pad_to_nc1d",
    "enable_cuda_graph", "enable_skip_layer_norm_strict_mode", "use_tf32", "prefer_nhwc",
    "user_compute_stream", "has_user_compute_stream", "use_ep_level_unified_stream",
    "tunable_op_enable", "tunable_op_tuning_enable", "tunable_op_max_tuning_duration_ms",
}  # fmt: skip
"""The page of ONNX Runtime's documentation about the CUDA execution provider."""


@pytest.mark.parametrize("precision", ["float32", "tf32", "float16"])
@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_provider_options_have_their_documented_names_and_values(
    precision: Any, graphs: bool, layout: Any
) -> None:
    target = OnnxRuntimeCuda(precision=precision, graphs=graphs, layout=layout)
    options = provider_options(target)
    assert options.keys() <= DOCUMENTED
    assert options["arena_extend_strategy"] in ("kNextPowerOfTwo", "kSameAsRequested")
    assert options["cudnn_conv_algo_search"] in ("EXHAUSTIVE", "HEURISTIC", "DEFAULT")
    assert options["use_tf32"] == ("1" if precision == "tf32" else "0")
    assert options["enable_cuda_graph"] == ("1" if graphs else "0")
    assert options["prefer_nhwc"] == ("1" if layout == "nhwc" else "0")


@pytest.mark.parametrize(
    ("build", "named"),
    [
        (lambda: Inductor(precision="int4"), "int4"),  # type: ignore[arg-type]
        (lambda: Inductor(device="tpu"), "tpu"),  # type: ignore[arg-type]
        (lambda: OnnxRuntimeCuda(precision="int8"), "int8"),  # type: ignore[arg-type]
        (lambda: OnnxRuntimeCuda(layout="nhcw"), "nhcw"),  # type: ignore[arg-type]
    ],
    ids=["precision", "device", "no int8", "layout"],
)
def test_options_that_do_not_exist_are_refused(build: Callable[[], Target], named: str) -> None:
    with pytest.raises(UsageError, match=f"'{named}'; choose from"):
        build()


@pytest.mark.parametrize("target", RUNTIMES, ids=lambda target: target.name)
def test_other_settings_change_one_thing_and_can_be_undone(target: Any) -> None:
    assert isinstance(target, Adjustable)
    others = target.settings()
    assert len({*others, target}) == len(others) + 1
    assert all(target in one.settings() for one in others)  # type: ignore[attr-defined]


class Hopper(Inductor):
    """Inductor with the facts of a GPU that is not here."""

    @property
    def capabilities(self) -> Any:
        return inductor_capabilities(gpu(9, 0), torchao=True)


class Ampere(OnnxRuntimeCuda):
    """ONNX Runtime with the facts of a GPU that is not here."""

    @property
    def capabilities(self) -> Any:
        return onnxruntime_cuda_capabilities(gpu(8, 0))


def test_candidates_are_the_runtimes_own_precisions_in_place_of_the_plan() -> None:
    original = tiny_exported(21)
    names = []
    for passes in (default_passes(bits=8), default_passes(bits=16)):
        lowered = [
            lower(original, passes, Context(target=target, original=original))
            for target in (Ampere(), Hopper())
        ]
        assert all(not one.rest and not one.places for one in lowered)
        variants = uniform_variants(original, lowered)
        assert all(v.target.precision == v.precision for v in variants)  # type: ignore[attr-defined]
        names.append([variant.name for variant in variants])
    floats = [
        "float32",
        *(f"onnxruntime_cuda {p}" for p in ("float32", "tf32", "float16")),
        *(f"inductor {p}" for p in FLOATS),
    ]
    assert names == [[*floats, "inductor int8", "inductor float8"], floats]


@pytest.mark.parametrize(
    ("targets", "options", "refused"),
    [
        ((Ampere(), Hopper()), {"bits": 8}, ""),
        (
            (Hopper(),),
            {"bits": 4},
            "Nothing in inductor computes int4 weights; .* Use --bits 16 or --bits 8",
        ),
        ((Ampere(),), {"bits": 8}, "Nothing in onnxruntime_cuda computes int8; there is float32"),
        ((Hopper(),), {"bits": 6, "simulate": True}, "Nothing in inductor computes simulated int6"),
        ((Ampere(),), {"bits": 16}, ""),
    ],
    ids=["int8", "int4", "int8 in ONNX Runtime alone", "simulated", "halves"],
)
def test_formats_that_nothing_computes_are_refused(
    targets: tuple[Target, ...], options: dict[str, Any], refused: str
) -> None:
    passes, model = default_passes(**options), tiny_exported(21)
    if not refused:
        assert capable(passes, model, targets) == (targets, ())
        return
    with pytest.raises(UnsupportedError, match=refused):
        capable(passes, model, targets)


def test_candidates_of_the_benchmark_are_timed_in_turns() -> None:
    gpu_benchmark = pytest.importorskip("benchmarks.gpu", reason="needs the checkout")

    def clock(call: Callable[[], object], times: int) -> float:
        start = time.perf_counter()
        for _ in range(times):
            call()
        return (time.perf_counter() - start) * 1e3

    calls = {"short": lambda: time.sleep(1e-3), "long": lambda: time.sleep(4e-3)}
    blocks = gpu_benchmark.interleaved(calls, seconds=0.1, clock=clock)
    rows = gpu_benchmark.figures(blocks, "long")
    assert {name: row["rounds"] >= 10 for name, row in rows.items()} == dict.fromkeys(calls, True)
    assert rows["short"]["low_ms"] <= rows["short"]["p50_ms"] <= rows["short"]["high_ms"]
    assert rows["long"]["ratio"]["value"] == 1
    assert rows["short"]["ratio"]["verdict"] == "faster"
    signal = np.array([3.0, 4.0])
    assert gpu_benchmark.sqnr_db(signal, np.array([3.5, 4.0])) == pytest.approx(20)
    assert gpu_benchmark.sqnr_db(signal, signal) is None


@pytest.mark.gpu
@on_gpu
class TestOnnxRuntimeCuda(TargetContract):
    """On a GPU, in exact float32."""

    target = OnnxRuntimeCuda()

    def test_runs_on_what_stays_on_the_device(self) -> None:
        """Without copies."""
        runs_on_the_device(self.target, self.exported())


@pytest.mark.gpu
@on_gpu
class TestInductor(TargetContract):
    """On a GPU, in exact float32."""

    target = Inductor()

    def test_runs_on_what_stays_on_the_device(self) -> None:
        """Without copies."""
        runs_on_the_device(self.target, self.exported())


def runs_on_the_device(target: Target, model: Any) -> None:
    engine = target.build(model)
    assert isinstance(engine, OnDevice)
    engine.on_device(model.example())()


@pytest.mark.gpu
@on_gpu
def test_the_command_line_on_a_gpu(
    cli: Callable[..., Any], tiny_onnx: Path, tiny_images: Path, tmp_path: Path
) -> None:
    out = tmp_path / "artifact"
    found = cli(
        "run", tiny_onnx, "--target", "cuda", "--bits", "16", "--calibration", tiny_images,
        "--out", out, "--seconds", "2", "--time", "0",
    )  # fmt: skip
    assert found.code == 0, found.err
    assert (out / "report.json").is_file()
