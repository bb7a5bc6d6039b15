from __future__ import annotations

import gc
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from compress.data import load_data
from compress.errors import EngineError, UsageError
from compress.model import Arrays, Model
from compress.target import Engine, Kernel, KernelTime
from compress.testing import tiny_exported
from compress.workload import Workload, make_workload
from targets.onnxruntime import OnnxRuntime

FIXED = "g (float[2,3,8,8] x) => (float[2,3,8,8] y) { [r] y = Relu(x) }"


@dataclass
class Counted:
    """A real engine that notes which thread called it with what."""

    engine: Engine
    threads: list[str] = field(default_factory=list)
    seen: list[Mapping[str, np.ndarray]] = field(default_factory=list)
    barrier: threading.Barrier | None = None

    def __post_init__(self) -> None:
        self.name, self.inputs = self.engine.name, self.engine.inputs
        self.outputs = self.engine.outputs

    def __call__(self, inputs: Mapping[str, np.ndarray]) -> Arrays:
        self.threads.append(threading.current_thread().name)
        self.seen.append(inputs)
        if self.barrier is not None:
            self.barrier.wait(timeout=30)
        return self.engine(inputs)

    def save(self, directory: Path) -> list[Path]:
        return self.engine.save(directory)

    def kernels(self) -> tuple[Kernel, ...]:
        return self.engine.kernels()

    def profile(self, inputs: Mapping[str, np.ndarray], runs: int = 20) -> tuple[KernelTime, ...]:
        return self.engine.profile(inputs, runs)


def counted(model: Model, target: OnnxRuntime, barrier: int = 0) -> Counted:
    return Counted(target.build(model), barrier=threading.Barrier(barrier) if barrier else None)


@pytest.fixture(scope="module")
def model(onnx_model: Callable[..., Model]) -> Model:
    return onnx_model("g (float[batch,3,8,8] x) => (float[batch,3,8,8] y) { [r] y = Relu(x) }")


@pytest.fixture(scope="module")
def fixed(onnx_model: Callable[..., Model]) -> Model:
    return onnx_model(FIXED)


def test_an_objective_that_does_not_exist(model: Model) -> None:
    with pytest.raises(UsageError, match=r"--objective speed does not exist.*latency, throughput"):
        make_workload(model, None, batch=1, objective="speed", threads=1)


@pytest.mark.parametrize("batch", [0, -3])
def test_a_batch_that_makes_no_sense(model: Model, batch: int) -> None:
    with pytest.raises(UsageError, match="must be at least 1"):
        make_workload(model, None, batch=batch, objective="latency", threads=1)


def test_a_batch_beside_a_fixed_one(fixed: Model) -> None:
    with pytest.raises(UsageError, match=r"fixed batch \(x:2x3x8x8:float32\), so --batch 8"):
        make_workload(fixed, None, batch=8, objective="latency", threads=1)


def test_a_fixed_batch_is_the_models_own(fixed: Model) -> None:
    found = make_workload(fixed, None, batch=1, objective="latency", threads=1)
    assert found.batch == 2
    assert found.inputs["x"].shape == (2, 3, 8, 8)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_requests_follow_from_the_objective(model: Model, threads: int) -> None:
    one = make_workload(model, None, batch=4, objective="latency", threads=threads)
    many = make_workload(model, None, batch=4, objective="throughput", threads=threads)
    assert one.to_dict() == {"batch": 4, "objective": "latency", "requests": 1}
    assert many.to_dict() == {"batch": 4, "objective": "throughput", "requests": 2 * threads}
    assert one.inputs["x"].shape == (4, 3, 8, 8)


def test_real_samples_are_used_where_there_are_some(model: Model) -> None:
    samples = np.arange(5 * 192, dtype=np.float32).reshape(5, 3, 8, 8)
    data = load_data(samples, model.inputs)
    for batch in (1, 3, 5):
        found = make_workload(model, data, batch=batch, objective="latency", threads=1)
        np.testing.assert_array_equal(found.inputs["x"], samples[:batch])


def test_random_samples_where_there_are_too_few(model: Model) -> None:
    data = load_data(np.full((5, 3, 8, 8), 7, np.float32), model.inputs)
    found = make_workload(model, data, batch=6, objective="latency", threads=1)
    assert found.inputs["x"].shape == (6, 3, 8, 8)
    assert not np.any(found.inputs["x"] == 7)
    again = make_workload(model, None, batch=6, objective="latency", threads=1)
    np.testing.assert_array_equal(found.inputs["x"], again.inputs["x"])


@pytest.mark.parametrize("streams", [1, 2])
def test_a_call_for_latency_is_one_request(model: Model, streams: int) -> None:
    target = OnnxRuntime(threads=2, streams=streams)
    workload = make_workload(model, None, batch=1, objective="latency", threads=2)
    engine = counted(model, target)
    workload.call(engine, target)()
    assert engine.threads == [threading.current_thread().name]
    assert engine.seen[0] is workload.inputs


def test_one_stream_runs_its_requests_in_turn(model: Model) -> None:
    target = OnnxRuntime(threads=1)
    workload = make_workload(model, None, batch=1, objective="throughput", threads=3)
    engine = counted(model, target)
    workload.call(engine, target)()
    assert engine.threads == [threading.current_thread().name] * 6


def test_as_many_requests_are_in_flight_as_there_are_streams(model: Model) -> None:
    target = OnnxRuntime(threads=2, streams=2)
    workload = make_workload(model, None, batch=1, objective="throughput", threads=3)
    # Each request waits for a second one beside it, so this ends only if two are in flight.
    engine = counted(model, target, barrier=2)
    call = workload.call(engine, target)
    for _ in range(3):
        call()
    assert len(engine.seen) == 3 * 6
    assert set(Counter(engine.threads).values()) == {9}
    assert len(set(engine.threads)) == 2
    assert threading.current_thread().name not in engine.threads


def test_threads_end_with_the_call(model: Model) -> None:
    target = OnnxRuntime(threads=2, streams=2)
    workload = make_workload(model, None, batch=1, objective="throughput", threads=2)
    before = set(threading.enumerate())
    call = workload.call(counted(model, target, barrier=2), target)
    call()
    made = set(threading.enumerate()) - before
    assert len(made) == 2
    del call
    gc.collect()
    for thread in made:
        thread.join(timeout=30)
    assert not any(thread.is_alive() for thread in made)


@pytest.mark.parametrize("streams", [1, 2])
def test_a_request_that_fails_is_not_lost(model: Model, streams: int) -> None:
    target = OnnxRuntime(threads=2, streams=streams)
    wrong = Workload({"x": np.zeros((1, 3, 8), np.float32)}, 1, "throughput", 4)
    with pytest.raises(EngineError):
        wrong.call(target.build(model), target)()


def test_a_workload_of_an_exported_network() -> None:
    exported = tiny_exported(21)
    target = OnnxRuntime(threads=1)
    found = make_workload(exported, None, batch=1, objective="latency", threads=1)
    outputs = found.call(target.build(exported), target)()
    assert isinstance(outputs, dict)
    assert outputs["linear"].shape == (1, 10)
