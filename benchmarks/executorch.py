"""ExecuTorch programs of trained networks: what is lost, what XNNPACK executes, how fast it is.

    taskset -c 0 python -m benchmarks.executorch
    python -m benchmarks.executorch --plain --images 500

Each network as `compress run --target executorch` makes it, beside the same graph in float32 and
ExecuTorch's own int8 recipe done by hand; losses are against float32 in ONNX Runtime, on samples
that neither calibration nor the choice of a candidate saw (see `benchmarks.trained`). One thread,
batch 1, all timed interleaved in one process. With `--plain` nothing is timed: int8 comes from the
default passes alone, without search and repair.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.common import Results
from benchmarks.peers import EXECUTORCH, ORT_FLOAT, executorch_int8
from benchmarks.trained import (
    NETWORKS,
    OURS,
    UNLABELLED,
    ExecuTorchEngine,
    Task,
    labelled,
    unlabelled,
)
from compress import pipeline
from compress.artifact import load as load_artifact
from compress.candidates import int8_share
from compress.data import load_data
from compress.errors import EngineError
from compress.export import to_onnx
from compress.facts import delegation
from compress.graph import graph_sites
from compress.loading import load
from compress.lowering import lower
from compress.model import Model
from compress.passes import Context
from compress.recipe import default_passes
from compress.sessions import measure_sessions
from targets.executorch import ExecuTorch
from targets.onnxruntime import OnnxRuntime

ET_FLOAT = "ExecuTorch float32"
TARGET = ExecuTorch(threads=1)


def run_one(name: str, arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Figures of one network; an error of ours is the entry, one of the recipe stands beside it."""
    task = unlabelled(name) if name in UNLABELLED else labelled(name, arguments.images)
    exported = to_onnx(load(task.source, inputs=task.inputs), 21)
    engines: dict[str, Any] = {ORT_FLOAT: OnnxRuntime(threads=1).build(exported)}
    facts: dict[str, Any] = {"artifact": "int8, default passes"}
    if arguments.plain:
        engines[OURS] = plain(task, exported)
    else:
        result = pipeline.run(
            task.source,
            target="executorch",
            inputs=task.inputs,
            calibration=task.calibration,
            evaluate=task.evaluate,
            max_drop=NETWORKS[name],
            threads=1,
            out=folder / "artifact",
        )
        engines[OURS] = load_artifact(folder / "artifact")
        facts = {"artifact": result.report.chosen, "headline": list(result.report.headline)}
    errors = rivals(engines, task, exported)
    sites, kernels = graph_sites(exported.graph_model), engines[OURS].kernels()
    facts |= {
        "delegation": delegation(kernels, sites),
        "int8_macs": int8_share(kernels, sites),
        "bytes": sum(path.stat().st_size for path in engines[OURS].save(folder)),
        **task.judge(engines),
        "errors": errors,
    }
    if arguments.plain:
        return facts
    sample = dict(next(iter(load_data(task.calibration, exported.inputs).batches(1))).inputs)
    comparison = measure_sessions(
        lambda: {label: partial(engine, sample) for label, engine in engines.items()},
        seconds=arguments.seconds,
    )
    over = {label: dataclasses.asdict(ratio) for label, ratio in comparison.ratios.items()}
    return {**facts, "speedup_over_onnxruntime": over, "latency": comparison.to_dict()}


def plain(task: Task, exported: Model) -> Any:
    """The int8 program of the default passes."""
    original = load(task.source, inputs=task.inputs)
    data = load_data(task.calibration, exported.inputs)
    context = Context(target=TARGET, original=original, calibration=data)
    return TARGET.build(lower(exported, default_passes(), context).apply())


def rivals(engines: dict[str, Any], task: Task, exported: Model) -> dict[str, str]:
    """Add float32 in ExecuTorch and its recipe by hand; why one of them is not there."""
    errors: dict[str, str] = {}
    try:
        engines[ET_FLOAT] = TARGET.build(exported)
    except EngineError as error:
        errors[ET_FLOAT] = str(error)
    if isinstance(task.source, Path):
        errors[EXECUTORCH] = "its recipe takes a torch module, and this network is an ONNX file"
        return errors
    spec = exported.inputs[0]
    try:
        shape = spec.concrete(1)
        call = executorch_int8(task.source, shape, task.calibration)
        output = exported.graph_model.graph.outputs[0].name or ""
        engines[EXECUTORCH] = ExecuTorchEngine(call, spec, output)
    except Exception as error:  # the recipe may fail in any way
        errors[EXECUTORCH] = f"{type(error).__name__}: {error}"[:300]
    return errors


def print_table(name: str, entry: Mapping[str, Any], console: Console) -> None:
    """One network."""
    if "error" in entry:
        console.print(f"{name}: {entry['error']}", markup=False)
        return
    caption = " ".join(entry["delegation"])
    title = f"{name}: {entry['artifact']}, {entry['bytes'] / 1e6:.3g} MB"
    table = Table("", "loss, points", "over ORT float32", title=title, caption=caption)
    for label, loss in entry.get("drop", entry.get("changed", {})).items():
        ratio = entry.get("speedup_over_onnxruntime", {}).get(label)
        table.add_row(
            label,
            f"{loss['points']:+.2f} [{loss['low']:+.2f}, {loss['high']:+.2f}]",
            f"{ratio['value']:.2f} [{ratio['low']:.2f}, {ratio['high']:.2f}]" if ratio else "",
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
    parser.add_argument("--plain", action="store_true", help="accuracy only, nothing is timed")
    parser.add_argument("--results", type=Path, default=None, help="folder for executorch.json")
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    name = "executorch_plain" if arguments.plain else "executorch"
    settings = {"images": arguments.images, "seconds": arguments.seconds}
    results = Results(name, settings, arguments.results)
    results.run(arguments.only, lambda one, folder: run_one(one, arguments, folder))
    console = Console(width=150)
    for one, entry in results.document["entries"].items():
        print_table(one, entry, console)


if __name__ == "__main__":
    main()
