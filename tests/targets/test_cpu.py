"""The CPU target keeps the contract, and its engine tells what ONNX Runtime did."""

from __future__ import annotations

import pytest

from compress.errors import EngineError, UsageError
from compress.machine import Machine, this_machine
from compress.model import Model
from compress.testing import TargetContract
from targets.cpu import CPU, cpu_capabilities


class TestCPU(TargetContract):
    """ONNX Runtime with one thread."""

    target = CPU(threads=1)


def _machine(architecture: str, features: tuple[str, ...]) -> Machine:
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


@pytest.mark.parametrize(
    ("architecture", "features", "reduced", "fast"),
    [
        pytest.param("x86_64", ("avx2", "avx512_vnni"), False, True, id="x86-vnni"),
        pytest.param("x86_64", ("avx2",), True, False, id="x86-without-vnni"),
        pytest.param("aarch64", ("dotprod",), False, True, id="arm-dotprod"),
        pytest.param("aarch64", (), False, False, id="arm-without-dotprod"),
    ],
)
def test_the_scheme_follows_the_instruction_set(
    architecture: str, features: tuple[str, ...], reduced: bool, fast: bool
) -> None:
    facts = cpu_capabilities(_machine(architecture, features))
    assert facts.reduced_weights is reduced
    assert facts.int8_dot_product is fast
    assert facts.activation == "uint8"
    assert bool(facts.notes) is not fast
    if not fast:
        assert "no int8 dot product" in facts.notes[0]


@pytest.mark.parametrize("threads", [0, -1, 10_000])
def test_impossible_thread_counts_are_refused(threads: int) -> None:
    with pytest.raises(UsageError, match=f"--threads {threads} .* {this_machine().cores} usable"):
        CPU(threads=threads)


def test_profile_covers_the_kernels() -> None:
    contract = TestCPU()
    model = contract.exported()
    engine = contract.target.build(model)
    times = engine.profile(model.example(), runs=5)
    assert {"0", "4.depthwise", "4.pointwise", "8"} <= {one.kernel.site for one in times}
    assert all(one.p50_us >= 0 for one in times)
    assert sum(one.p50_us for one in times) > 0


def test_a_refused_model_is_an_engine_error() -> None:
    model = TestCPU().exported()
    model.graph_model.graph[0].op_type = "NoSuchOperator"
    with pytest.raises(EngineError, match=r"ONNX Runtime .* refuses the model"):
        CPU(threads=1).build(Model(model.program, model.inputs, "broken"))


def test_wrong_input_is_an_engine_error() -> None:
    model = TestCPU().exported()
    engine = CPU(threads=1).build(model)
    with pytest.raises(EngineError, match="failed while running"):
        engine({"x": model.example()["x"][:, :1]})
