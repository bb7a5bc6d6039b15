"""The runtimes' own tools, for devices without Python: command lines, and what they print.

Each call is one block in a session of its own; calls of several models alternate, so that the
ratio is taken within rounds as `compress.latency` does. The tools make their own inputs and keep
their outputs, so nothing is compared. Formats are those of the sources named below; they have
been tested on samples of real output, not on devices.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from compress.errors import DeviceError
from compress.latency import Blocks

ROUNDS = 8
FIRST_RUNS = 5
MOST_RUNS = 10_000
_NUMBER = r"([0-9.]+(?:e[-+]?[0-9]+)?)"


@dataclass(frozen=True)
class Times:
    """What one call of a tool printed.

    Attributes:
        p50_ms: median, or the mean where the tool tells nothing else.
        p90_ms: ninth decile; None where the tool does not tell.
        runs: inferences that were timed.
    """

    p50_ms: float
    p90_ms: float | None
    runs: int


@dataclass(frozen=True)
class Tool:
    """A program that loads one kind of model and times it.

    Attributes:
        program: its name, looked for in PATH and in the device's folder of tools.
        arguments: for a model's path, a number of runs and the runtime's settings.
        parse: what it printed, stdout and stderr together.
        source: where command line and format are documented.
    """

    program: str
    arguments: Callable[[str, int, Mapping[str, Any]], list[str]]
    parse: Callable[[str], Times]
    source: str


def perf_test_arguments(model: str, runs: int, settings: Mapping[str, Any]) -> list[str]:
    """`-I` makes the inputs, with 1 for free dimensions; `-s` prints percentiles."""
    threads = settings.get("threads")
    options = ["-x", str(threads)] if threads else []
    options += [] if settings.get("arena", True) else ["-A"]
    options += [] if settings.get("spinning", True) else ["-D"]
    return ["-I", "-s", "-m", "times", "-r", str(runs), "-e", "cpu", *options, model]


def parse_perf_test(text: str) -> Times:
    """Lines such as `P50 Latency: 0.00185674 s` and `Total inference requests: 100`."""
    return Times(
        p50_ms=_find(r"^P50 Latency: " + _NUMBER + " s", text) * 1e3,
        p90_ms=_find(r"^P90 Latency: " + _NUMBER + " s", text) * 1e3,
        runs=int(_find(r"^Total inference requests: " + _NUMBER, text)),
    )


def executor_runner_arguments(model: str, runs: int, settings: Mapping[str, Any]) -> list[str]:
    """Inputs are ones, as nothing else is given."""
    threads = settings.get("threads")
    options = [f"--cpu_threads={threads}"] if threads else []
    return [f"--model_path={model}", f"--num_executions={runs}", *options]


def parse_executor_runner(text: str) -> Times:
    """`Iteration 1 of 5: 2.9 ms` for each run where it prints them, else the sum over all runs."""
    runs = int(_find(r"Model executed successfully " + _NUMBER + r" time\(s\) in", text))
    each = [float(x) for x in re.findall(r"Iteration \d+ of \d+: " + _NUMBER + " ms", text)]
    if len(each) == runs > 0:
        return Times(float(np.median(each)), float(np.quantile(each, 0.9)), runs)
    total = _find(r"Model executed successfully \d+ time\(s\) in " + _NUMBER + " ms", text)
    return Times(total / max(runs, 1), None, runs)


def trtexec_arguments(model: str, runs: int, settings: Mapping[str, Any]) -> list[str]:
    """No transfers, as the time on the GPU is what is read; `--duration=0` leaves it to `runs`."""
    return [f"--loadEngine={model}", f"--iterations={runs}", "--duration=0", "--noDataTransfers"]


def parse_trtexec(text: str) -> Times:
    """`GPU Compute Time: min = ..., median = 2.83 ms, percentile(90%) = 2.84 ms, ...`."""
    found = r"GPU Compute Time: min = .* "  # all on one line
    p90 = re.search(found + r"percentile\(90%\) = " + _NUMBER + " ms", text)
    runs = re.search(r"Timing trace has (\d+) queries", text)
    return Times(
        p50_ms=_find(found + r"median = " + _NUMBER + " ms", text),
        p90_ms=float(p90.group(1)) if p90 else None,
        runs=int(runs.group(1)) if runs else 1,
    )


TOOLS = {
    ".onnx": Tool(
        "onnxruntime_perf_test",
        perf_test_arguments,
        parse_perf_test,
        "onnxruntime 1.23, test/perftest: command_args_parser.cc and performance_result.h",
    ),
    ".pte": Tool(
        "executor_runner",
        executor_runner_arguments,
        parse_executor_runner,
        "executorch 1.0, examples/portable/executor_runner/executor_runner.cpp",
    ),
    ".engine": Tool(
        "trtexec",
        trtexec_arguments,
        parse_trtexec,
        "TensorRT 10, samples/common/sampleReporting.cpp and sampleOptions.cpp",
    ),
}
TOOLS[".ort"], TOOLS[".plan"] = TOOLS[".onnx"], TOOLS[".engine"]
"""The tool of a model, by the suffix of its file."""


def time_in_turns(
    runs: Mapping[str, Callable[[int], Times]], firsts: Mapping[str, Times], seconds: float
) -> dict[str, Blocks]:
    """Blocks by name.

    Args:
        runs: by name; a call gets the number of inferences and makes one block.
        firsts: what the first call of each found; it says how many inferences fill a block.
        seconds: for all of them, what the tools need to start not counted.
    """
    share_ms = seconds * 1e3 / (len(runs) * ROUNDS)
    counts = {
        name: int(min(MOST_RUNS, max(FIRST_RUNS, share_ms / max(first.p50_ms, 1e-6))))
        for name, first in firsts.items()
    }
    found: dict[str, list[Times]] = {name: [] for name in runs}
    names = list(runs)
    for index in range(ROUNDS):
        for name in names if index % 2 == 0 else names[::-1]:
            found[name].append(runs[name](counts[name]))
    return {name: _blocks(times) for name, times in found.items()}


def _blocks(times: Sequence[Times]) -> Blocks:
    p50 = np.array([one.p50_ms for one in times])
    known = [one.p90_ms for one in times if one.p90_ms is not None]
    p90 = float(np.median(known)) if known else float(np.quantile(p50, 0.9))
    return Blocks(p50, p90, sum(one.runs for one in times), warm=True)


def _find(pattern: str, text: str) -> float:
    found = re.search(pattern, text, re.MULTILINE)
    if found is None:
        tail = " ".join(text.split())[-300:] or "nothing"
        raise DeviceError(f"It printed no time that can be read. It said: {tail}")
    return float(found.group(1))
