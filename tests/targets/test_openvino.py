"""The OpenVINO target keeps the contract, and knows what the instruction set is good for."""

from __future__ import annotations

import numpy as np
import pytest

from compress.errors import EngineError
from compress.machine import Machine
from compress.model import Model
from compress.target import Adjustable
from compress.testing import TargetContract

pytest.importorskip("openvino")

from targets.openvino import OpenVINO, openvino_capabilities

ONE = OpenVINO(threads=1)
SITES = {"0", "4.depthwise", "4.pointwise", "8"}


class TestOpenVINO(TargetContract):
    """One thread."""

    target = ONE


def _machine(architecture: str, *features: str) -> Machine:
    return Machine(
        cpu="made up",
        architecture=architecture,
        cores=2,
        features=features,
        memory_bytes=0,
        governor="",
        os="Linux",
        python="3.11",
    )


MODERN = _machine("x86_64", "avx2", "avx512_bf16", "avx512_vnni")
WIDE = ("float32", "bfloat16", "int8")
NARROW = ("float32", "int8")


@pytest.mark.parametrize(
    ("max_isa", "precisions", "fast"),
    [
        ("", WIDE, True),
        ("AVX512_CORE_BF16", WIDE, True),
        ("AVX512_CORE_AMX", WIDE, True),
        ("AVX512_CORE_VNNI", NARROW, True),
        ("AVX2_VNNI", NARROW, True),
        ("avx512_core_vnni", NARROW, True),
        ("AVX512_CORE", NARROW, False),
        ("AVX2", NARROW, False),
        ("SSE41", NARROW, False),
    ],
    ids=lambda value: value or "default" if isinstance(value, str) else "",
)
def test_a_restricted_instruction_set_changes_the_facts(
    max_isa: str, precisions: tuple[str, ...], fast: bool
) -> None:
    facts = openvino_capabilities(MODERN, max_isa)
    assert facts.precisions == precisions
    assert facts.int8_dot_product is fast
    assert facts.reduced_weights is not fast


@pytest.mark.parametrize(
    ("machine", "precisions", "fast", "reduced"),
    [
        (_machine("x86_64", "avx2"), NARROW, False, True),
        (_machine("x86_64", "avx512_vnni"), NARROW, True, False),
        (_machine("x86_64", "amx_bf16", "amx_int8"), WIDE, True, False),
        (_machine("aarch64", "bf16", "dotprod"), WIDE, True, False),
        (_machine("aarch64"), NARROW, False, False),
    ],
    ids=["avx2", "vnni", "amx", "arm", "old arm"],
)
def test_the_facts_follow_the_machine(
    machine: Machine, precisions: tuple[str, ...], fast: bool, reduced: bool
) -> None:
    facts = openvino_capabilities(machine)
    assert facts.precisions == precisions
    assert facts.int8_dot_product is fast
    assert facts.reduced_weights is reduced
    assert bool(facts.notes) is not fast


def test_a_limit_allows_no_more_than_the_machine_has() -> None:
    facts = openvino_capabilities(_machine("x86_64", "avx2"), "AVX512_CORE_AMX")
    assert facts.precisions == NARROW
    assert not facts.int8_dot_product


def test_the_limit_is_read_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    facts = ONE.capabilities
    assert facts.precisions == NARROW
    assert not facts.int8_dot_product


def test_every_pattern_says_where_it_is_from() -> None:
    patterns = ONE.capabilities.patterns
    assert all(pattern.source for pattern in patterns)
    assert len({pattern.op for pattern in patterns}) == len(patterns)


def test_other_settings_of_itself() -> None:
    target = OpenVINO(threads=2, precision="bfloat16")
    assert isinstance(target, Adjustable)
    (other,) = target.settings()
    assert other == OpenVINO(threads=2, precision="bfloat16", pinned=False)
    assert other.settings() == (target,)
    assert OpenVINO(threads=2, streams=2).settings() == (
        OpenVINO(threads=2, streams=2, pinned=False),
        OpenVINO(threads=2, streams=1),
    )


def test_pinning_changes_no_result() -> None:
    model = TestOpenVINO().exported()
    inputs = model.example(3)
    (other,) = ONE.settings()
    expected = ONE.build(model)(inputs)["linear"]
    np.testing.assert_array_equal(other.build(model)(inputs)["linear"], expected)


def test_bfloat16_is_built_and_gives_slightly_other_outputs() -> None:
    model = TestOpenVINO().exported()
    exact, rounded = ONE.build(model), OpenVINO(threads=1, precision="bfloat16").build(model)
    assert (exact.name, rounded.name) == ("OpenVINO float32", "OpenVINO bfloat16")
    if {k.precision for k in rounded.kernels() if k.site in SITES} == {"float32"}:
        pytest.skip("OpenVINO computes no bfloat16 on this CPU")
    inputs = model.example(4)
    before, after = exact(inputs)["linear"], rounded(inputs)["linear"]
    assert after.dtype == np.float32
    assert 0 < np.abs(before - after).max() < 0.1 * np.abs(before).max()


def test_profile_covers_the_kernels() -> None:
    model = TestOpenVINO().exported()
    times = ONE.build(model).profile(model.example(), runs=5)
    assert {one.kernel.site for one in times} >= SITES
    assert sum(one.p50_us for one in times) > 0


def test_a_refused_model_is_an_engine_error() -> None:
    model = TestOpenVINO().exported()
    model.graph_model.graph[0].op_type = "NoSuchOperator"
    with pytest.raises(EngineError, match=r"OpenVINO .* refuses the model"):
        ONE.build(Model(model.program, model.inputs, "broken"))
