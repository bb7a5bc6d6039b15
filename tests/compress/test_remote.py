"""Several devices at once, on devices that answer by themselves; real ones are in tests/targets."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Self

import numpy as np
import pytest

from compress.artifact import open_engine
from compress.errors import DeviceError, UsageError
from compress.latency import Blocks
from compress.model import Arrays
from compress.remote import Answer, Artifact, Job, check_devices, measure_on

INPUTS = {"x": np.random.default_rng(0).standard_normal((2, 3, 8, 8)).astype(np.float32)}


@dataclass(frozen=True)
class Board:
    """A device that computes nothing: it answers with given times, or does something else."""

    address: str
    act: Callable[[Job, threading.Event], Answer]
    name: ClassVar[str] = "board"

    @classmethod
    def parse(cls, text: str) -> Self:
        raise UsageError(f"--device {text}: boards have no addresses.")

    def check(self, stop: threading.Event) -> None:
        self.act(Job((), {}, 0.0), stop)

    def measure(self, job: Job, stop: threading.Event) -> Answer:
        return self.act(job, stop)


def times(*ms: float) -> Callable[[Job, threading.Event], Answer]:
    """Each artifact takes so long, by turns a little more or less."""

    def act(job: Job, stop: threading.Event) -> Answer:
        wobble = 1 + 0.001 * np.arange(10)
        blocks = {
            one.name: Blocks(each * wobble, each * 1.1, 100, warm=True)
            for one, each in zip(job.artifacts, ms, strict=False)
        }
        failures = {one.name: "no room" for one in job.artifacts[len(ms) :]}
        return Answer([blocks] * job.sessions, {}, failures, {"cpu": "board"}, 1.0)

    return act


def lost(job: Job, stop: threading.Event) -> Answer:
    raise DeviceError("the second board dropped out")


@pytest.fixture
def artifacts(tiny_onnx: Path) -> dict[str, Artifact]:
    one = Artifact(open_engine(tiny_onnx, threads=1), {"threads": 1, "odd": object()})
    return {"a": one, "b": one}


def test_ratios_are_those_of_the_blocks_that_came_back(artifacts: dict[str, Artifact]) -> None:
    (found,) = measure_on([Board("one", times(4.0, 2.0))], artifacts, INPUTS, sessions=3)
    assert found.comparison is not None
    assert found.comparison.timings["a"].p50_ms == pytest.approx(4 * 1.0045)
    assert found.comparison.timings["a"].p90_ms == pytest.approx(4.4)
    assert found.comparison.timings["a"].runs == 300
    assert found.comparison.ratios["b"].value == pytest.approx(2)
    assert found.comparison.ratios["b"].verdict == "faster"
    assert found.comparison.rounds == 30
    (found,) = measure_on([Board("one", times(4.0, 2.0))], artifacts, INPUTS, margin=1.5)
    assert found.comparison is not None
    assert found.comparison.ratios["b"].verdict == "cannot tell"


def test_a_device_that_drops_out_costs_itself(artifacts: dict[str, Artifact]) -> None:
    boards = [Board("one", times(1.0, 1.0)), Board("two", lost), Board("three", times(2.0, 1.0))]
    one, two, three = measure_on(boards, artifacts, INPUTS)
    assert one.comparison is not None
    assert three.comparison is not None
    assert (two.comparison, two.error) == (None, "the second board dropped out")
    with pytest.raises(DeviceError, match="second board"):
        check_devices(boards[1:2])


def test_what_fails_is_named_and_the_baseline_must_not(artifacts: dict[str, Artifact]) -> None:
    partly, nothing = measure_on(
        [Board("one", times(1.0)), Board("two", times())], artifacts, INPUTS
    )
    assert partly.failures == {"b": "no room"}
    assert nothing.comparison is None
    assert "two cannot run a: no room" in nothing.error


def test_outputs_are_compared_with_this_machine(artifacts: dict[str, Artifact]) -> None:
    expected = artifacts["a"].engine(INPUTS)
    off: Arrays = {"y": expected["y"] + np.float32(0.5)}

    def act(job: Job, stop: threading.Event) -> Answer:
        answer = times(1.0, 1.0)(job, stop)
        return Answer(answer.sessions, {"a": expected, "b": off}, {}, {}, 1.0)

    (found,) = measure_on([Board("one", act)], artifacts, INPUTS)
    assert found.closeness["a"].max_abs_difference == 0
    assert found.to_dict()["closeness"]["a"]["sqnr_db"] is None
    assert found.closeness["b"].max_abs_difference == pytest.approx(0.5, rel=1e-5)
    noise = found.closeness["b"].sqnr_db
    assert noise == pytest.approx(10 * np.log10(np.mean(expected["y"] ** 2) / 0.25), abs=1e-3)


def test_what_travels_is_what_the_runtime_needs(artifacts: dict[str, Artifact]) -> None:
    jobs: list[Job] = []

    def act(job: Job, stop: threading.Event) -> Answer:
        jobs.append(job)
        assert all(file.is_file() for one in job.artifacts for file in one.files)
        return times(1.0, 1.0)(job, stop)

    (found,) = measure_on([Board("one", act)], artifacts, INPUTS, seconds=7.0, seed=3)
    assert found.error == ""
    (job,) = jobs
    assert [one.name for one in job.artifacts] == ["a", "b"]
    assert job.artifacts[0].settings == {"threads": 1}
    assert (job.artifacts[0].inputs, job.artifacts[0].outputs) == (("x",), ("y",))
    assert job.artifacts[0].output_bytes == 2 * 4 * 4
    assert (job.seconds, job.seed) == (7.0, 3)
    assert not any(file.exists() for one in job.artifacts for file in one.files)


def test_a_defect_stops_the_other_devices(artifacts: dict[str, Artifact]) -> None:
    stopped: list[bool] = []

    def waits(job: Job, stop: threading.Event) -> Answer:
        stopped.append(stop.wait(30))
        raise DeviceError("stopped")

    def broken(job: Job, stop: threading.Event) -> Answer:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        measure_on([Board("one", broken), Board("two", waits)], artifacts, INPUTS)
    assert stopped == [True]


def test_nothing_to_measure_is_wrong_usage(artifacts: dict[str, Artifact]) -> None:
    board = Board("one", times(1.0))
    with pytest.raises(UsageError, match="at least one device"):
        measure_on([], artifacts, INPUTS)
    with pytest.raises(UsageError, match="at least one artifact"):
        measure_on([board], {}, INPUTS)
    with pytest.raises(UsageError, match="given twice"):
        measure_on([board, board], artifacts, INPUTS)
