"""Times and memory that have a stated limit.

    python -m benchmarks.limits                  # all four
    python -m benchmarks.limits --only help run

help         `compress --help`, wall time of a process, and whether torch was imported
plan         ResNet-18: from a stored plan to a ready int8 session, without a new export
calibration  ResNet-50: peak memory of a process that calibrates with 512 images of 224 px
run          ResNet-18: the complete `compress run` with 128 calibration images, on all cores
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import HERE, Results, smooth_images, torchvision_models

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CALIBRATION_IMAGES, RUN_IMAGES = 512, 128


def help_time(repeats: int) -> dict[str, Any]:
    """Seconds of `compress --help`, and whether torch was imported for it."""
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        subprocess.run([_console_script(), "--help"], check=True, capture_output=True)
        seconds.append(time.perf_counter() - start)
    listing = subprocess.run(
        [sys.executable, "-X", "importtime", _console_script(), "--help"],
        check=True,
        capture_output=True,
        text=True,
    ).stderr
    imported = {line.rsplit("|", 1)[-1].strip() for line in listing.splitlines()}
    return {
        **_figure(statistics.median(seconds), 0.5, "seconds"),
        "runs": seconds,
        "torch_imported": "torch" in imported,
        "reached": statistics.median(seconds) < 0.5 and "torch" not in imported,
    }


def plan_to_session(repeats: int) -> dict[str, Any]:
    """Seconds from the exported graph and a stored plan to a ready session."""
    parts = _child("plan", str(repeats))
    totals = [sum(run) for run in zip(*parts.values(), strict=True)]
    return {
        **_figure(statistics.median(totals), 0.5, "seconds"),
        "parts": {part: statistics.median(runs) for part, runs in parts.items()},
        "runs": totals,
    }


def plan_child(repeats: str) -> dict[str, Any]:
    """Seconds of reading the plan, of emitting the QDQ graph and of building the session."""
    from benchmarks.zoo import network
    from compress.data import load_data
    from compress.export import to_onnx
    from compress.loading import load
    from compress.passes import Context
    from compress.recipe import default_passes
    from quant.emit import emit_qdq
    from quant.plan import QuantPlan
    from targets.cpu import CPU

    target = CPU()
    module, images = network("resnet18")
    model = to_onnx(load(module, inputs=["1x3x224x224"]), target.capabilities.opset)
    data = load_data(images, model.inputs)
    context = Context(target=target, original=model, calibration=data)
    *free, quantize, _ = default_passes(samples=len(images))
    for step in free:
        model = step.apply(model, context)
    stored = json.dumps(quantize.apply(model, context).history[-1].details["plan"])
    parts: dict[str, list[float]] = {"read": [], "emit": [], "build": []}
    for _ in range(int(repeats)):
        times = [time.perf_counter()]
        plan = QuantPlan.from_dict(json.loads(stored))
        times.append(time.perf_counter())
        emitted = emit_qdq(model.graph_model, plan)
        times.append(time.perf_counter())
        target.build(model.evolve(emitted, model.history[-1]))
        times.append(time.perf_counter())
        for part, start, end in zip(parts, times[:-1], times[1:], strict=True):
            parts[part].append(end - start)
    return parts


def calibration_memory(repeats: int) -> dict[str, Any]:
    """Peak memory of calibrating ResNet-50 in a process of its own, from the ONNX file on."""
    with tempfile.TemporaryDirectory() as folder:
        _child("export", folder)
        _child("images", folder, str(CALIBRATION_IMAGES))
        runs = [_child("calibrate", folder) for _ in range(repeats)]
    last = max(runs, key=lambda run: run["peak_bytes"])
    return {**_figure(last["peak_bytes"] / 1e9, 2.0, "GB"), **last}


def export_child(folder: str) -> dict[str, Any]:
    """Write `model.onnx`; in its own process, so that torch does not count."""
    import onnx_ir as ir

    from benchmarks.zoo import network
    from compress.export import to_onnx
    from compress.loading import load
    from targets.cpu import CPU

    module, _ = network("resnet50")
    exported = to_onnx(load(module, inputs=["1x3x224x224"]), CPU().capabilities.opset)
    ir.save(exported.graph_model, Path(folder) / "model.onnx")
    return {}


def calibrate_child(folder: str) -> dict[str, Any]:
    """Calibrate `model.onnx` with `images.npz`, without the cache."""
    from compress.data import load_data
    from compress.loading import load
    from compress.passes import Context
    from compress.recipe import default_passes
    from targets.cpu import CPU

    peaks = {"imports": _peak_bytes()}
    model = load(Path(folder) / "model.onnx")
    peaks["load"] = _peak_bytes()
    data = load_data(Path(folder) / "images.npz", model.inputs, mean=MEAN, std=STD)
    peaks["data"] = _peak_bytes()
    context = Context(target=CPU(), original=model, calibration=data)
    *free, quantize, correct_bias = default_passes(samples=CALIBRATION_IMAGES)
    for step in free:
        model = step.apply(model, context)
        peaks[step.name] = _peak_bytes()
    seconds = {}

    def timed(label: str, step: Any, model: Any) -> Any:
        start = time.perf_counter()
        made = step.apply(model, context)
        seconds[label], peaks[label] = time.perf_counter() - start, _peak_bytes()
        return made

    quantized = timed("quantize", quantize, model)
    for step in quantize.other_ranges():  # type: ignore[attr-defined]
        timed(f"quantize by {step.method}", step, model)
    timed("correct_bias", correct_bias, quantized)
    return {"peak_bytes": _peak_bytes(), "peak_bytes_after": peaks, "seconds": seconds}


def whole_run(repeats: int) -> dict[str, Any]:
    """Seconds of the command without the search for placements; the calibration cache is empty."""
    seconds, reports, peaks = [], [], []
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as folder:
            _child("images", folder, str(RUN_IMAGES))
            command = [
                *(_console_script(), "run", "--model", "benchmarks.limits:resnet18"),
                *("--input", "1x3x224x224", "--calibration", f"{folder}/images.npz"),
                *("--calibration-samples", str(RUN_IMAGES), "--out", f"{folder}/artifact"),
                *("--mean", ",".join(map(str, MEAN)), "--std", ",".join(map(str, STD))),
                *("--time", "0"),
            ]
            start = time.perf_counter()
            with subprocess.Popen(
                command, cwd=HERE.parent, env={**os.environ, "HOME": folder}
            ) as process:
                _, status, usage = os.wait4(process.pid, 0)
                process.returncode = os.waitstatus_to_exitcode(status)
            seconds.append(time.perf_counter() - start)
            if process.returncode not in (0, 1):  # 1: no gain, and an artifact nevertheless
                sys.exit(f"compress run ended with {process.returncode}.")
            peaks.append(_bytes(usage))
            reports.append(json.loads((Path(folder) / "artifact" / "report.json").read_text()))
    return {
        **_figure(statistics.median(seconds), 60.0, "seconds"),
        "runs": seconds,
        "phases": reports[-1]["seconds"],
        "peak_bytes": max(peaks),
        "headline": reports[-1]["headline"],
        "cores": os.cpu_count(),
    }


def resnet18() -> Any:
    """The network of `run`."""
    return torchvision_models().resnet18(weights=None)


def images_child(folder: str, count: str) -> dict[str, Any]:
    """Write `images.npz`: uint8 (N, 224, 224, 3), as a user stores them."""
    images = [smooth_images(32, 224, seed) for seed in range(int(count) // 32)]
    pixels = np.clip(np.concatenate(images) * 50 + 118, 0, 255).astype(np.uint8)
    np.savez(Path(folder) / "images.npz", x=pixels.transpose(0, 2, 3, 1))
    return {}


def _console_script() -> str:
    beside = shutil.which("compress", path=str(Path(sys.executable).parent))
    found = beside or shutil.which("compress")
    return found or sys.exit("There is no console script `compress`: pip install -e .")


def _child(name: str, *arguments: str) -> dict[str, Any]:
    """What one of CHILDREN returns, run in a process of its own.

    Linux hands a process the peak memory of its parent, so the parent does no work itself.
    """
    command = [sys.executable, "-m", "benchmarks.limits", "--child", name, *arguments]
    ran = subprocess.run(command, cwd=HERE.parent, check=True, stdout=subprocess.PIPE, text=True)
    return dict(json.loads(ran.stdout.splitlines()[-1]))


def _peak_bytes() -> int:
    return _bytes(resource.getrusage(resource.RUSAGE_SELF))


def _bytes(usage: resource.struct_rusage) -> int:
    """Linux counts in KiB, macOS in bytes."""
    return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _figure(value: float, aim: float, unit: str) -> dict[str, Any]:
    return {"value": value, "aim": aim, "unit": unit, "reached": value < aim}


LIMITS: dict[str, tuple[Callable[[int], dict[str, Any]], int]] = {
    "help": (help_time, 5),
    "plan": (plan_to_session, 5),
    "calibration": (calibration_memory, 1),
    "run": (whole_run, 1),
}
CHILDREN: dict[str, Callable[..., dict[str, Any]]] = {
    "plan": plan_child,
    "export": export_child,
    "images": images_child,
    "calibrate": calibrate_child,
}


def main() -> None:
    """Measure what is not in the results yet."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="*", default=list(LIMITS), choices=list(LIMITS))
    parser.add_argument("--results", type=Path, default=None, help="folder for limits.json")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child is not None:
        name, *rest = arguments.child
        print(json.dumps(CHILDREN[name](*rest)))
        return
    results = Results("limits", {}, arguments.results)
    for name in arguments.only:
        if name not in results:
            measurement, repeats = LIMITS[name]
            results.add(name, measurement(repeats))
        print(summary(name, results.document["entries"][name]), flush=True)


def summary(name: str, entry: dict[str, Any]) -> str:
    """One line for the terminal."""
    reached = "reached" if entry["reached"] else "MISSED"
    return f"{name}: {entry['value']:.3g} {entry['unit']} (aim < {entry['aim']:g}) {reached}"


if __name__ == "__main__":
    main()
