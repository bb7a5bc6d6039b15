"""Times models on the device that it was copied to; `targets.remote` copies it and reads its line.

    python3 remote_runner.py FOLDER

FOLDER/job.json says what to do. The last line on stdout is MARK and a JSON object. It needs
numpy, the runtime of the models and Python 3.8, and nothing of this project. The rules are those
of `compress.latency`: short blocks in turns, after a warm-up, each when other threads are quiet.

When stdin ends before the work does, whoever asked is gone: the folder is removed, and the
process ends. So a cut connection leaves nothing behind that runs or takes space.
"""

from __future__ import annotations

import gc
import json
import math
import os
import platform
import shutil
import sys
import threading
import time
from importlib import metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # Python 3.8 cannot compute this
    from collections.abc import Callable

    Call = Callable[[], list[Any]]

MARK = "hwcompress-result "
BLOCK_SECONDS = 0.005
MAX_BLOCK_CALLS = 1000
MAX_QUIET_SECONDS = 0.5
MAX_LEAVE_SECONDS = 10.0
STEADY = 0.05
FEWEST_ROUNDS = 6
TASKS = "/proc/self/task"


class Timed:
    """A callable and the blocks timed so far, in milliseconds."""

    def __init__(self, call: Call) -> None:
        self.call, self.warm = call, False
        self.forget()
        self.run()  # the first call: lazy initialization
        duration = min(self.run(), self.run())
        calls = math.ceil(BLOCK_SECONDS / max(duration, 1e-9))
        self.calls_per_block = min(calls, MAX_BLOCK_CALLS)

    def run(self) -> float:
        """Seconds that one call took."""
        start = time.perf_counter()
        self.call()
        return time.perf_counter() - start

    def block(self) -> None:
        """Time one block."""
        wait_until_quiet()
        if self.calls_per_block > 1:
            self.run()  # untimed: fills the caches that the one before it took
        times = sorted(self.run() * 1e3 for _ in range(self.calls_per_block))
        self.times += times
        self.medians.append((times[(len(times) - 1) // 2] + times[len(times) // 2]) / 2)

    def forget(self) -> None:
        """Start anew, as after the warm-up."""
        self.times: list[float] = []
        self.medians: list[float] = []

    def to_dict(self) -> dict[str, Any]:
        """Plain values of what `compress.latency.Blocks` holds."""
        times = sorted(self.times)
        return {
            "medians_ms": self.medians,
            "p90_ms": times[math.ceil(0.9 * len(times)) - 1],
            "runs": len(times),
            "warm": self.warm,
        }


def measure(calls: dict[str, Call], seconds: float, rng: Any) -> dict[str, Any]:
    """Blocks by name after a warm-up of at most a quarter of the time."""
    start = time.perf_counter()
    timed = {name: Timed(call) for name, call in calls.items()}
    names = list(timed)
    gc.collect()
    gc.disable()
    while not all(one.warm for one in timed.values()):
        if time.perf_counter() > start + seconds / 4:
            break
        for index in rng.permutation(len(names)):
            one = timed[names[index]]
            one.block()
            recent = one.medians[-3:]
            one.warm = len(recent) == 3 and max(recent) <= (1 + STEADY) * min(recent)
    for one in timed.values():
        one.forget()
    rounds = 0
    while rounds < FEWEST_ROUNDS or time.perf_counter() < start + seconds:
        for index in rng.permutation(len(names)):
            timed[names[index]].block()
        rounds += 1
    gc.enable()
    return {name: one.to_dict() for name, one in timed.items()}


def wait_until_quiet() -> None:
    """Wait until the threads of the runtime that ran before have gone to sleep."""
    end = time.perf_counter() + MAX_QUIET_SECONDS
    while others_run() and time.perf_counter() < end:
        time.sleep(0.001)


def others_run() -> bool:
    """Whether another thread of this process is on a CPU or wants to be; Linux alone tells."""
    own = str(threading.get_native_id())
    for task in os.listdir(TASKS) if os.path.isdir(TASKS) else ():
        try:
            with open(os.path.join(TASKS, task, "stat")) as stream:
                running = task != own and stream.read().rpartition(")")[2][1] == "R"
        except (OSError, IndexError):  # it has ended
            continue
        if running:
            return True
    return False


def cores() -> int:
    """Cores that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def onnxruntime(path: str, entry: dict[str, Any], inputs: dict[str, Any]) -> Call:
    """A callable of an ONNX file."""
    import onnxruntime as ort

    settings = entry["settings"]
    options = ort.SessionOptions()
    options.log_severity_level = 4
    streams = settings.get("streams") or 1
    options.intra_op_num_threads = max(1, (settings.get("threads") or cores()) // streams)
    level = ort.GraphOptimizationLevel
    plain = settings.get("layout") == "plain"
    options.graph_optimization_level = level.ORT_ENABLE_EXTENDED if plain else level.ORT_ENABLE_ALL
    options.enable_cpu_mem_arena = settings.get("arena", True)
    spinning = str(int(settings.get("spinning", True)))
    options.add_session_config_entry("session.intra_op.allow_spinning", spinning)
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda: session.run(entry["outputs"], inputs)


def openvino(path: str, entry: dict[str, Any], inputs: dict[str, Any]) -> Call:
    """A callable of an OpenVINO model."""
    import openvino as ov

    settings = entry["settings"]
    streams = settings.get("streams") or 1
    precision = settings.get("precision") or "float32"
    options = {
        "INFERENCE_NUM_THREADS": settings.get("threads") or cores(),
        "NUM_STREAMS": streams,
        "PERFORMANCE_HINT": "LATENCY" if streams == 1 else "THROUGHPUT",
        "INFERENCE_PRECISION_HINT": {"float32": "f32", "bfloat16": "bf16"}[precision],
        "ENABLE_CPU_PINNING": settings.get("pinned", True),
    }
    core = ov.Core()
    model = core.read_model(path)
    model.reshape({name: list(array.shape) for name, array in inputs.items()})
    request = core.compile_model(model, "CPU", options).create_infer_request()

    def call() -> list[Any]:
        found = request.infer(inputs, share_inputs=True, share_outputs=False)
        return [found[index] for index in range(len(entry["outputs"]))]

    return call


def executorch(path: str, entry: dict[str, Any], inputs: dict[str, Any]) -> Call:
    """A callable of an ExecuTorch program; its runtime takes and gives torch tensors."""
    import torch
    from executorch.runtime import Runtime

    program = Runtime.get().load_program(path)
    method = program.load_method("forward")
    arguments = [torch.from_numpy(inputs[name]) for name in entry["inputs"]]

    def call(program: Any = program) -> list[Any]:  # a method reads its program's memory
        return [tensor.numpy() for tensor in method.execute(arguments)]

    return call


RUNTIMES = {".onnx": onnxruntime, ".ort": onnxruntime, ".xml": openvino, ".pte": executorch}


def work(folder: str, job: dict[str, Any]) -> dict[str, Any]:
    """Everything that is asked for, as plain values."""
    import numpy as np

    def in_folder(name: str) -> str:
        return os.path.join(folder, name)

    inputs = {k: np.load(in_folder(v), allow_pickle=False) for k, v in job["inputs"].items()}
    rng = np.random.default_rng(job["seed"])
    sessions: list[Any] = []
    failures: dict[str, str] = {}
    outputs: dict[str, Any] = {}
    start = time.perf_counter()
    for session in range(job["sessions"]):
        calls = {}
        for entry in job["artifacts"]:
            name, file = entry["name"], entry["file"]
            if name in failures:
                continue
            try:
                load = RUNTIMES[os.path.splitext(file)[1]]
                call = load(in_folder(file), entry, inputs)
                results = call()
            except Exception as error:
                failures[name] = f"{type(error).__name__}: {error}"
                continue
            calls[name] = call
            if session == 0:
                stem = os.path.dirname(file)
                outputs[name] = []
                for index, array in enumerate(results):
                    output = f"{stem}/output-{index}.npy"
                    np.save(in_folder(output), np.ascontiguousarray(array), allow_pickle=False)
                    outputs[name].append([output, os.path.getsize(in_folder(output))])
        if job["artifacts"][0]["name"] not in calls:
            break
        sessions.append(measure(calls, job["seconds"] / job["sessions"], rng))
    return {
        "sessions": sessions,
        "failures": failures,
        "outputs": outputs,
        "machine": machine(),
        "seconds": time.perf_counter() - start,
    }


def machine() -> dict[str, Any]:
    """Facts that explain a latency."""
    return {
        "cpu": cpu(),
        "architecture": platform.machine(),
        "cores": cores(),
        "load": os.getloadavg()[0],
        "os": platform.system() + " " + platform.release(),
        "python": platform.python_version(),
        "versions": {
            name: metadata.version(name)
            for name in ("numpy", "onnxruntime", "openvino", "executorch", "torch")
            if name in sys.modules
        },
    }


def cpu() -> str:
    """The board's or the processor's own name."""
    try:
        with open("/proc/device-tree/model") as stream:
            return stream.read().strip("\0\n ")
    except OSError:
        pass
    try:
        with open("/proc/cpuinfo") as stream:
            lines = [line.partition(":") for line in stream]
    except OSError:
        lines = []
    names = [value.strip() for key, _, value in lines if key.strip() in ("model name", "Hardware")]
    return (names or [platform.processor() or platform.machine()])[0]


def main(folder: str) -> None:
    """Do the work, print the result."""
    result = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not come between

    ending = threading.Lock()  # whoever has it ends the process; the other one waits for that

    def leave() -> None:
        with ending:
            end = time.monotonic() + MAX_LEAVE_SECONDS
            while os.path.isdir(folder) and time.monotonic() < end:
                shutil.rmtree(folder, ignore_errors=True)  # work may still be writing into it
            os._exit(1)

    def watch() -> None:
        while os.read(0, 4096):
            pass
        leave()

    with open(os.path.join(folder, "job.json")) as stream:
        job = json.load(stream)
    threading.Thread(target=watch, daemon=True).start()
    deadline = threading.Timer(job["deadline_seconds"], leave)
    deadline.daemon = True
    deadline.start()
    try:
        found = work(folder, job)
    except Exception as error:
        found = {"error": f"{type(error).__name__}: {error}"}
    try:
        with ending:
            result.write(MARK + json.dumps(found) + "\n")
            result.flush()
            os._exit(0)  # a runtime's threads must not hold the end up
    except OSError:  # nobody reads it
        leave()


if __name__ == "__main__":
    main(sys.argv[1])
