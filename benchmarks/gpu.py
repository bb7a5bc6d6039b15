"""The runtimes of `--target cuda` on this machine's NVIDIA GPU, beside torch.compile.

    python -m benchmarks.gpu
    python -m benchmarks.gpu --only resnet50 --seconds 30

ResNet-50, MobileNetV2 and ViT-B/16 at 224 px with random weights, batch 1 and 32, in every
precision that the GPU and the runtime have; torch.compile in max-autotune, channels-last. What is
timed is the GPU alone: inputs and outputs stay there, CUDA events stand around blocks of calls, and
the blocks of all candidates alternate. ratio = time of torch.compile in float32 (exact, without
TF32) over the time of the candidate; `sqnr_db` is the distance of its outputs from that one's.
Results go to `benchmarks/results/<gpu>.json`. Without a GPU it prints why, and does nothing.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import math
import re
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.common import Results
from benchmarks.zoo import network
from compress.export import to_onnx
from compress.latency import median_interval, ratio
from compress.loading import load
from compress.lowering import lower
from compress.model import Model
from compress.passes import Context
from compress.recipe import default_passes
from compress.target import FLOATS, Target
from targets.cuda import CUDA
from targets.gpu import Gpu, find_gpu
from targets.inductor import Inductor

NETWORKS = ("resnet50", "mobilenet_v2", "vit_b_16")
BATCHES = (1, 32)
BASELINE = "torch.compile float32"
PEERS = {"float32": torch.float32, "tf32": torch.float32, "float16": torch.float16,
         "bfloat16": torch.bfloat16}  # fmt: skip
BLOCK_MS = 5.0
"""Shortest block: long beside the half microsecond that CUDA events resolve."""
WARM_UP_SECONDS = 1.0
ROUNDS = 200


class Clock(Protocol):
    """Milliseconds that a number of calls take."""

    def __call__(self, call: Callable[[], object], times: int) -> float:
        """Time `times` calls."""


def event_ms(call: Callable[[], object], times: int) -> float:
    """By CUDA events on the current stream, around calls that need not wait for the GPU."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(times):
        call()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end))


def interleaved(
    calls: Mapping[str, Callable[[], object]], seconds: float, clock: Clock, seed: int = 0
) -> dict[str, np.ndarray]:
    """Milliseconds of one call in each round, by name: one block of each candidate a round."""
    rng = np.random.default_rng(seed)
    counts = {}
    for name, call in calls.items():
        end = time.perf_counter() + WARM_UP_SECONDS
        while time.perf_counter() < end:
            once = clock(call, 1)
        counts[name] = max(1, math.ceil(BLOCK_MS / once))
    found: dict[str, list[float]] = {name: [] for name in calls}
    end = time.perf_counter() + seconds
    for index in range(ROUNDS):
        if index >= 10 and time.perf_counter() > end:
            break
        for name in rng.permutation(list(calls)):
            found[name].append(clock(calls[name], counts[name]) / counts[name])
    return {name: np.array(values) for name, values in found.items()}


def figures(blocks: Mapping[str, np.ndarray], baseline: str) -> dict[str, dict[str, Any]]:
    """Median, interval and ratio over the baseline, by name."""
    rows: dict[str, dict[str, Any]] = {}
    for name, values in blocks.items():
        low, high = median_interval(values, np.random.default_rng(0))
        rows[name] = {"p50_ms": statistics.median(values), "low_ms": low, "high_ms": high}
        rows[name]["rounds"] = len(values)
        if baseline in blocks:
            rows[name]["ratio"] = dataclasses.asdict(ratio(blocks[baseline] / values))
    return rows


def run_one(name: str, batch: int, seconds: float) -> dict[str, Any]:
    """Figures of one network at one batch size."""
    module, images = network(name)
    images = images[:batch]
    exported = to_onnx(load(module, inputs=["1x3x224x224"]), 21)
    calls: dict[str, Callable[[], object]] = {}
    outputs: dict[str, np.ndarray] = {}
    errors: dict[str, str] = {}

    def add(label: str, build: Callable[[], tuple[Callable[[], object], np.ndarray]]) -> None:
        print(f"   {label}", flush=True)
        try:
            calls[label], outputs[label] = build()
        except Exception as error:  # one that fails must not hide the others
            errors[label] = f"{type(error).__name__}: {error}"[:300]

    for precision in PEERS:
        add(f"torch.compile {precision}", lambda p=precision: _compiled(module, images, p))  # type: ignore[misc]
    for runtime in CUDA().runtimes():
        passes = default_passes(bits=16)
        model = lower(exported, passes, Context(target=runtime, original=exported)).float_model
        if isinstance(runtime, Inductor):
            runtime = dataclasses.replace(runtime, autotune=True)  # as torch.compile here
        facts = runtime.capabilities
        own = facts.own_precisions or ()
        for precision in (*(p for p in FLOATS if p in facts.precisions), *own):
            target = dataclasses.replace(runtime, precision=precision)  # type: ignore[type-var]
            add(f"{runtime.name} {precision}", lambda t=target, m=model: _ours(t, m, images))  # type: ignore[misc]
    rows = figures(interleaved(calls, seconds, event_ms), BASELINE)
    for label, output in outputs.items():
        if BASELINE in outputs and label != BASELINE:
            rows[label]["sqnr_db"] = sqnr_db(outputs[BASELINE], output)
    return {"batch": batch, "candidates": rows, "errors": errors}


def sqnr_db(signal: np.ndarray, other: np.ndarray) -> float | None:
    """10 log10 of signal power over power of the difference; None where equal."""
    noise = float(np.square(signal - other, dtype=np.float64).sum())
    return (
        10 * math.log10(float(np.square(signal, dtype=np.float64).sum()) / noise) if noise else None
    )


def _ours(
    target: Target, model: Model, images: np.ndarray
) -> tuple[Callable[[], object], np.ndarray]:
    engine: Any = target.build(model)
    inputs = {model.inputs[0].name: images}
    output = next(iter(engine(inputs).values()))
    return engine.on_device(inputs), output.astype(np.float32)


def _compiled(
    module: torch.nn.Module, images: np.ndarray, precision: str
) -> tuple[Callable[[], object], np.ndarray]:
    """What torch's documentation says for inference: half, channels-last, max-autotune."""
    import copy

    tf32 = precision == "tf32"
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
    dtype = PEERS[precision]
    ready = copy.deepcopy(module).to("cuda", dtype).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    x = torch.from_numpy(images).to("cuda", dtype).contiguous(memory_format=torch.channels_last)
    compiled = torch.compile(ready, mode="max-autotune")

    def call() -> Any:
        with torch.inference_mode():
            return compiled(x)

    # Compiled, and its CUDA graph recorded, while TF32 is on or off as it should be.
    for _ in range(3):
        output = call().float().cpu().numpy()
    return call, output


def summary(entries: Mapping[str, Any], console: Console) -> None:
    """The table."""
    table = Table()
    for header in ("network", "candidate", "p50, ms", f"over {BASELINE}", "SQNR, dB"):
        table.add_column(header, justify="left" if header in ("network", "candidate") else "right")
    for name, entry in entries.items():
        for label, row in entry.get("candidates", {}).items():
            factor = row["ratio"]["value"] if "ratio" in row else math.nan
            sqnr = row.get("sqnr_db")
            shown = f"{sqnr:.1f}" if sqnr is not None else ""
            table.add_row(name, label, f"{row['p50_ms']:.3f}", f"{factor:.2f}", shown)
        for label, error in {**entry.get("errors", {}), "": entry.get("error", "")}.items():
            if error:
                table.add_row(name, label, "failed", error[:60], "")
    console.print(table)


def skip_reason() -> str:
    """Why nothing can be measured here, or ""."""
    found = find_gpu()
    if not isinstance(found, Gpu):
        return found
    check = CUDA().check()
    if not check.available:
        return check.reason
    return "" if torch.cuda.is_available() else "The installed torch cannot use the GPU."


def main() -> None:
    """Run what is not in the results yet, then print all of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", default=NETWORKS, choices=NETWORKS)
    parser.add_argument("--seconds", type=float, default=20.0, help="of each measurement")
    parser.add_argument("--results", type=Path, default=None, help="folder for the results")
    arguments = parser.parse_args()
    if reason := skip_reason():
        print(f"skipped: {reason}")
        return
    logging.disable(logging.WARNING)
    gpu = find_gpu()
    settings = {
        "seconds": arguments.seconds,
        "gpu": dataclasses.asdict(gpu),  # type: ignore[call-overload]
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
    }
    results = Results(_slug(gpu.name), settings, arguments.results)  # type: ignore[union-attr]
    keys = {f"{name}, batch {batch}": (name, batch) for name in arguments.only for batch in BATCHES}
    results.run(keys, lambda key, _: run_one(*keys[key], arguments.seconds))
    summary(results.document["entries"], Console(width=160))


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")


if __name__ == "__main__":
    main()
