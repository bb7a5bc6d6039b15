"""`compress run --target cpu` on trained networks: what is lost, and how fast it is beside others.

    taskset -c 0 python -m benchmarks.trained

Calibration, selection (`--eval` of the run) and test use different samples; the loss is that of the
finished artifact in its runtime on the test samples: a drop of top-1 where there are labels, else
the share of decisions that differ from float32's (see `benchmarks.decisions`). One thread, batch
1, all candidates timed interleaved in one process. ExecuTorch's row appears for torch modules
where the package is installed.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.common import Results, shared_module
from benchmarks.decisions import changed, decisions
from benchmarks.peers import EXECUTORCH, ORT_FLOAT, executorch_int8, peers
from compress import pipeline
from compress.artifact import load as load_artifact
from compress.data import load_data
from compress.export import to_onnx
from compress.loading import load
from compress.metrics import paired_drop, top1
from compress.model import Model, TensorSpec
from compress.sessions import measure_sessions

OURS = "ours"
NETWORKS = {
    "cifar10_resnet8": "0.3%",
    "cifar10_resnet20": "0.3%",
    "cifar10_resnet56": "0.3%",
    "imagenet_mobilenet_v1_025": "1%",
    "imagenet_mobilenet_v2": "1%",
    "kws_dscnn": "1%",
    "silero_vad": "1%",
    "face_rfb320": "1%",
    "fastestdet": "1%",
}
"""Name, and the largest loss that the run may choose: of top-1, or of equal decisions."""
UNLABELLED = ("silero_vad", "face_rfb320", "fastestdet")


@dataclass(frozen=True)
class Task:
    """A network, its data and how engines are judged.

    Attributes:
        source: a torch module or an ONNX file.
        inputs: shapes that the source leaves open.
        calibration: as `pipeline.run` takes it.
        evaluate: as `pipeline.run` takes it, for the choice of a candidate.
        judge: what engines lose on the test samples, as parts of the entry; one is ORT's float32.
    """

    source: torch.nn.Module | Path
    inputs: list[str]
    calibration: Any
    evaluate: Any
    judge: Callable[[Mapping[str, Any]], dict[str, Any]]


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
        normalise = name != "cifar10_resnet8"
        x, y = data.cifar10("train", 2512, normalise)
        test = data.cifar10("test", images, normalise)
        return {"calibrate": (x[:512], y[:512]), "select": (x[512:], y[512:]), "test": test}
    x, y = data.keywords() if name.startswith("kws") else data.imagenet250()
    if name == "imagenet_mobilenet_v2":
        y = y + 1  # its class 0 is the background
    first, second = (200, 400) if name.startswith("kws") else (50, 150)
    order = np.random.default_rng(0).permutation(len(x))
    x, y = x[order], y[order]
    return {
        "calibrate": (x[:first], y[:first]),
        "select": (x[first:second], y[first:second]),
        "test": (x[second:], y[second:]),
    }


def labelled(name: str, images: int) -> Task:
    """A network of the zoo, judged by top-1."""
    parts = samples(name, images)
    spec = "x".join(map(str, (1, *parts["test"][0].shape[1:])))

    def judge(engines: Mapping[str, Any]) -> dict[str, Any]:
        test = load_data(parts["test"], engines[ORT_FLOAT].inputs)
        scores = {label: top1(engine, test) for label, engine in engines.items()}
        drops = {label: paired_drop(scores[ORT_FLOAT], score) for label, score in scores.items()}
        return {
            "top1": {label: score.to_dict() for label, score in scores.items()},
            "drop": {label: dataclasses.asdict(drop) for label, drop in drops.items()},
        }

    module = shared_module("models/zoo.py").load(name)
    return Task(module, [spec], parts["calibrate"][0], parts["select"], judge)


def unlabelled(name: str) -> Task:
    """An ONNX file, judged by its decisions."""
    found = decisions(name)

    def judge(engines: Mapping[str, Any]) -> dict[str, Any]:
        made = {label: found.test(engine) for label, engine in engines.items()}
        return {
            "decision": found.meaning,
            "changed": {
                label: dataclasses.asdict(changed(made[ORT_FLOAT], theirs))
                for label, theirs in made.items()
            },
        }

    return Task(found.source, found.inputs, found.calibration, found.agreement, judge)


def run_one(name: str, arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Figures of one network."""
    task = unlabelled(name) if name in UNLABELLED else labelled(name, arguments.images)
    exported = to_onnx(load(task.source, inputs=task.inputs), 21)
    start = time.perf_counter()
    result = pipeline.run(
        task.source,
        inputs=task.inputs,
        calibration=task.calibration,
        evaluate=task.evaluate,
        max_drop=NETWORKS[name],
        threads=1,
        search_seconds=arguments.time,
        out=folder / "artifact",
    )
    wall = time.perf_counter() - start
    batches = [dict(b.inputs) for b in load_data(task.calibration, exported.inputs).batches(1)]
    engines, errors = rivals(task, exported, batches)
    engines = {OURS: load_artifact(folder / "artifact"), **engines}
    comparison = measure_sessions(
        lambda: {label: partial(engine, batches[0]) for label, engine in engines.items()},
        seconds=arguments.seconds,
    )
    return {
        "artifact": result.report.chosen,
        "headline": list(result.report.headline),
        "wall_seconds": wall,
        **task.judge(engines),
        "peer_over_ours": {
            label: {"value": 1 / r.value, "low": 1 / r.high, "high": 1 / r.low}
            for label, r in comparison.ratios.items()
        },
        "latency": comparison.to_dict(),
        "errors": errors,
    }


def rivals(
    task: Task, exported: Model, batches: list[dict[str, np.ndarray]]
) -> tuple[dict[str, Any], dict[str, str]]:
    """What others make of the network, and why some of them do not."""
    builders, errors = peers(exported, batches, threads=1)
    engines: dict[str, Any] = {}
    for label, build in builders.items():
        try:
            engine = build()[0]
            engine(batches[0])
            engines[label] = engine
        except Exception as error:  # a peer that fails must not hide the others
            errors[label] = str(error)[:300]
    if isinstance(task.source, Path):
        errors[EXECUTORCH] = "its recipe takes a torch module, and this network is an ONNX file"
        return engines, errors
    spec = exported.inputs[0]
    try:
        call = executorch_int8(task.source, batches[0][spec.name].shape, task.calibration)
        output = exported.graph_model.graph.outputs[0].name or ""
        engines[EXECUTORCH] = ExecuTorchEngine(call, spec, output)
    except Exception as error:  # not installed, or it refuses the network
        errors[EXECUTORCH] = f"{type(error).__name__}: {error}"[:300]
    return engines, errors


def print_table(name: str, entry: dict[str, Any], console: Console) -> None:
    """One network."""
    if "error" in entry:
        console.print(f"{name}: {entry['error']}")
        return
    title = f"{name}: {entry['artifact']}, {entry['wall_seconds']:.0f} s"
    if "drop" in entry:
        headers, losses = ("top-1", "drop, points"), entry["drop"]
        shown = {label: f"{one['value']:.2%}" for label, one in entry["top1"].items()}
        table = Table(title=title)
    else:
        headers, losses = ("changed (in images or frames)", "changed, points"), entry["changed"]
        shown = {k: f"{c['count']} of {c['n']} ({c['rows']})" for k, c in losses.items()}
        table = Table(title=title, caption=f"A decision: {entry['decision']}.")
    for header in ("", *headers, "ms", "time / ours"):
        table.add_column(header)
    for label, loss in losses.items():
        ratio = entry["peer_over_ours"].get(label)
        table.add_row(
            label,
            shown[label],
            f"{loss['points']:+.2f} [{loss['low']:+.2f}, {loss['high']:+.2f}]",
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
