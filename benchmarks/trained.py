"""`compress run --target cpu` on trained networks: what is lost, and how fast it is beside others.

    taskset -c 0 python -m benchmarks.trained

Calibration, selection (`--eval` of the run) and test use different samples; the drop is that of the
finished artifact in its runtime on the test samples. One thread, batch 1, all candidates timed
interleaved in one process. ExecuTorch's row appears where the package is installed.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.common import Results, shared_module
from benchmarks.peers import ORT_FLOAT, executorch_int8, peers
from compress import pipeline
from compress.artifact import load as load_artifact
from compress.data import load_data
from compress.export import to_onnx
from compress.loading import load
from compress.metrics import paired_drop, top1
from compress.model import TensorSpec
from compress.sessions import measure_sessions

OURS, EXECUTORCH = "ours", "ExecuTorch int8"
NETWORKS = {
    "cifar10_resnet20": "0.3%",
    "cifar10_resnet56": "0.3%",
    "imagenet_mobilenet_v1_025": "1%",
    "imagenet_mobilenet_v2": "1%",
    "kws_dscnn": "1%",
}
"""Name, and the largest drop that the run may choose."""


class ExecuTorchEngine:
    """ExecuTorch's program behind the interface that `top1` calls."""

    name = EXECUTORCH

    def __init__(self, call: Any, spec: TensorSpec, output: str) -> None:
        self.call, self.inputs, self.outputs = call, (spec,), (output,)

    def __call__(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run once."""
        return {self.outputs[0]: self.call(inputs[self.inputs[0].name])}


def samples(name: str, images: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Inputs and labels to calibrate with, to select with, and to test on."""
    data = shared_module("data/load.py")
    if name.startswith("cifar10"):
        x, y = data.cifar10("train", 2512)
        test = data.cifar10("test", images)
        return {"calibrate": (x[:512], y[:512]), "select": (x[512:], y[512:]), "test": test}
    x, y = data.keywords() if name.startswith("kws") else data.imagenet250()
    first, second = (200, 400) if name.startswith("kws") else (50, 100)
    order = np.random.default_rng(0).permutation(len(x))
    x, y = x[order], y[order]
    return {
        "calibrate": (x[:first], y[:first]),
        "select": (x[first:second], y[first:second]),
        "test": (x[second:], y[second:]),
    }


def run_one(name: str, arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Figures of one network."""
    network = shared_module("models/zoo.py").load(name)
    parts = samples(name, arguments.images)
    shape = (1, *parts["test"][0].shape[1:])
    spec = "x".join(map(str, shape))
    exported = to_onnx(load(network, inputs=[spec]), 21)
    selection = folder / "select.npz"
    np.savez(selection, x=parts["select"][0], y=parts["select"][1])
    start = time.perf_counter()
    result = pipeline.run(
        network,
        inputs=[spec],
        calibration=parts["calibrate"][0],
        evaluate=selection,
        max_drop=NETWORKS[name],
        threads=1,
        search_seconds=arguments.time,
        out=folder / "artifact",
    )
    wall = time.perf_counter() - start
    data = load_data(parts["calibrate"][0], exported.inputs)
    test = load_data(parts["test"], exported.inputs)
    builders, errors = peers(exported, [dict(b.inputs) for b in data.batches(1)], threads=1)
    engines: dict[str, Any] = {OURS: load_artifact(folder / "artifact")}
    for label, build in builders.items():
        try:
            engines[label] = build()[0]
            engines[label](dict(next(iter(test.batches(1))).inputs))
        except Exception as error:  # a peer that fails must not hide the others
            engines.pop(label, None)
            errors[label] = str(error)[:300]
    try:
        call = executorch_int8(network, shape, parts["calibrate"][0])
        output = exported.graph_model.graph.outputs[0].name or ""
        engines[EXECUTORCH] = ExecuTorchEngine(call, exported.inputs[0], output)
    except Exception as error:  # not installed, or it refuses the network
        errors[EXECUTORCH] = f"{type(error).__name__}: {error}"[:300]
    scores = {label: top1(engine, test) for label, engine in engines.items()}
    first = dict(next(iter(test.batches(1))).inputs)
    comparison = measure_sessions(
        lambda: {label: partial(engines[label], first) for label in engines},
        seconds=arguments.seconds,
    )
    return {
        "artifact": result.report.chosen,
        "headline": list(result.report.headline),
        "wall_seconds": wall,
        "top1": {label: score.to_dict() for label, score in scores.items()},
        "drop": {
            label: dataclasses.asdict(paired_drop(scores[ORT_FLOAT], score))
            for label, score in scores.items()
        },
        "peer_over_ours": {
            label: {"value": 1 / r.value, "low": 1 / r.high, "high": 1 / r.low}
            for label, r in comparison.ratios.items()
        },
        "latency": comparison.to_dict(),
        "errors": errors,
    }


def print_table(name: str, entry: dict[str, Any], console: Console) -> None:
    """One network."""
    if "error" in entry:
        console.print(f"{name}: {entry['error']}")
        return
    table = Table(title=f"{name}: {entry['artifact']}, {entry['wall_seconds']:.0f} s")
    for header in ("", "top-1", "drop, points", "ms", "time / ours"):
        table.add_column(header)
    for label, drop in entry["drop"].items():
        ratio = entry["peer_over_ours"].get(label)
        table.add_row(
            label,
            f"{entry['top1'][label]['value']:.2%}",
            f"{drop['points']:+.2f} [{drop['low']:+.2f}, {drop['high']:+.2f}]",
            f"{entry['latency']['timings'][label]['p50_ms']:.3f}",
            f"{ratio['value']:.2f} [{ratio['low']:.2f}, {ratio['high']:.2f}]" if ratio else "1",
        )
    console.print(table)
    for label, error in entry["errors"].items():
        console.print(f"{label}: {error}", markup=False)


def main() -> None:
    """Run what is not in the results yet, then print all of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", default=list(NETWORKS), choices=list(NETWORKS))
    parser.add_argument("--images", type=int, default=10_000, help="CIFAR test images")
    parser.add_argument("--seconds", type=float, default=15.0, help="of the common measurement")
    parser.add_argument("--time", type=float, default=60.0, help="of the search for placements")
    parser.add_argument("--results", type=Path, default=None, help="folder for trained.json")
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    settings = {
        "images": arguments.images,
        "seconds": arguments.seconds,
        "search_seconds": arguments.time,
    }
    results = Results("trained", settings, arguments.results)
    results.run(arguments.only, lambda name, folder: run_one(name, arguments, folder))
    console = Console(width=150)
    for name, entry in results.document["entries"].items():
        print_table(name, entry, console)


if __name__ == "__main__":
    main()
