"""Activations removed and their layers merged: what it costs in accuracy, what it buys in time.

    python -m benchmarks.activations --part accuracy   # half an hour on an idle core
    python -m benchmarks.activations --part latency    # a quiet machine; an hour with its training

Accuracy: ResNet-20 on CIFAR-10 with the activations of the 1, 2 and 3 least sensitive blocks made
linear and their layers merged, faster or not: right away, and after a short fine-tuning in which
their slopes go to one, with the original as teacher. Latency: the same networks in ONNX Runtime,
one thread, batch 1, interleaved with the original; then every run of layers that could be one,
alone, in ResNet-20 and MobileNetV2; what `remove_activations` itself does there at its defaults;
and what it does to a network of inverted bottlenecks (`benchmarks.reparam_networks`), which get
faster as one layer each and which is trained first.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.common import run_training_parts, shared_module
from benchmarks.reparam import trained
from compress.data import Data, load_data
from compress.export import to_onnx
from compress.graph import graph_sites
from compress.loading import load
from compress.metrics import Accuracy, paired_drop, top1
from compress.model import Model
from compress.passes import Context
from compress.progress import silent
from compress.registry import create_target
from compress.reparam import merge
from compress.reparam.activations import RemoveActivations
from compress.reparam.activations_graph import Segment, as_linear, as_merged, find_segments
from compress.reparam.activations_search import Changes, Tried, choose, judge, time_segments
from compress.reparam.activations_training import Annealed, Annealing, student_of
from compress.rewrites import FoldBatchNorm, with_constants
from compress.sessions import measure_sessions

TRAINED = "cifar10_resnet20"
TIMED = ("cifar10_resnet20", "imagenet_mobilenet_v2")
COUNTS = (1, 2, 3)
"""Activations that are removed."""
RUNTIME = "onnxruntime"
INVERTED, EPOCHS = "inverted", 8
"""Of `benchmarks.reparam_networks`, and how long `benchmarks.reparam` trains it."""
LONGER = 5
"""Times as many images and steps for this network, whose blocks lose more at once."""


@functools.cache
def network(name: str) -> Model:
    """At the ONNX stage, with BatchNorm folded."""
    module = shared_module("models/zoo.py").load(name)
    size = 32 if name.startswith("cifar10") else 224
    model = to_onnx(load(module.eval(), inputs=[f"1x3x{size}x{size}"]), 21)
    return FoldBatchNorm().apply(model, context(model))


def context(model: Model, training: Data | None = None) -> Context:
    target = create_target(RUNTIME, threads=1)
    return Context(target=target, original=model, training=training)


def data_of(name: str, part: str, count: int) -> Data:
    """Of the network's own task; MobileNetV2 has no labels here."""
    found = shared_module("data/load.py")
    if name.startswith("cifar10"):
        return load_data(found.cifar10(part, count), network(name).inputs)
    return load_data(np.asarray(found.imagenet250()[0])[:count], network(name).inputs)


@functools.cache
def picked(count: int) -> tuple[Segment, ...]:
    """Runs with one activation each, those that change the outputs least; faster or not."""
    model = network(TRAINED)
    pairs = [one for one in find_segments(model, True)[0] if len(one.activations) == 1]
    tried = [Tried(one, 1.0, 0.0, True) for one in pairs]
    judge(model, tried, Changes(model, data_of(TRAINED, "train", 64)), True)
    return tuple(one.segment for one in choose(tried, count, np.inf))


def merged(count: int, arrays: Mapping[str, np.ndarray] | None = None) -> Model:
    """The network with these activations gone and their layers merged."""
    linear = as_linear(network(TRAINED), picked(count), True)
    if arrays is not None:
        linear = dataclasses.replace(linear, program=with_constants(linear.graph_model, arrays))
    return as_merged(linear, picked(count))[0]


@functools.cache
def original_score(images: int) -> Accuracy:
    return score(network(TRAINED), images)


def score(model: Model, images: int) -> Accuracy:
    """Top-1 in ONNX Runtime."""
    test = data_of(TRAINED, "test", images)
    return top1(create_target(RUNTIME, threads=1).build(model), test)


def facts(model: Model, images: int) -> dict[str, Any]:
    found = score(model, images)
    drop = paired_drop(original_score(images), found)
    macs = sum(site.macs for site in graph_sites(model.graph_model))
    return {"macs": macs, "top1": found.to_dict(), "drop": dataclasses.asdict(drop)}


def accuracy(count: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Merged at once, and after a fine-tuning in which the activations go."""
    model, segments = network(TRAINED), picked(count)
    start = time.perf_counter()
    step = RemoveActivations(steps=arguments.steps, batch=arguments.batch, augment="flip")
    annealed = Annealed()
    arrays, training = step.taught(
        model,
        student_of(model, segments, annealed, True),
        model,
        data_of(TRAINED, "train", arguments.train_images),
        functools.partial(Annealing, annealed=annealed, until=step.anneal),
        progress=silent,
    )
    return {
        "segments": [dataclasses.asdict(one) for one in segments],
        "before": facts(merged(count), arguments.images),
        "after": facts(merged(count, arrays), arguments.images),
        "epochs": arguments.steps * arguments.batch / arguments.train_images,
        "training": training,
        "seconds": time.perf_counter() - start,
    }


def latency(arguments: argparse.Namespace) -> dict[str, Any]:
    """The network with 1, 2 and 3 activations less, interleaved with the original."""
    target = create_target(RUNTIME, threads=1)
    models = {"original": network(TRAINED)}
    models |= {f"{count} removed": merged(count) for count in COUNTS}
    inputs = network(TRAINED).example()

    def build() -> Mapping[str, Callable[[], object]]:
        engines = {label: target.build(one) for label, one in models.items()}
        return {label: functools.partial(one, inputs) for label, one in engines.items()}

    comparison = measure_sessions(build, seconds=arguments.seconds * len(models))
    macs = {n: sum(s.macs for s in graph_sites(m.graph_model)) for n, m in models.items()}
    return {"macs": macs, "latency": comparison.to_dict()}


def runs(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Every run of layers that could be one, timed alone."""
    model = network(name)
    segments, left = find_segments(model, True)
    seconds = arguments.seconds * max(len(segments), 1)
    tried = time_segments(model, segments, context(model), seconds, lambda _: None)
    judge(model, tried, Changes(model, data_of(name, "train", 64)), True)
    return {"segments": len(segments), "left": left, "tried": [one.row() for one in tried]}


def default(arguments: argparse.Namespace) -> dict[str, Any]:
    """The pass at its defaults but for the length of its training."""
    model = network(TRAINED)
    copy = dataclasses.replace(model, program=model.graph_model.clone())
    step = RemoveActivations(steps=arguments.steps, batch=arguments.batch, augment="flip")
    data = data_of(TRAINED, "train", arguments.train_images)
    start = time.perf_counter()
    done = step.apply(copy, context(model, data))
    details = {k: v for k, v in done.history[-1].details.items() if k != "statistics"}
    return {"details": details, "wall_seconds": time.perf_counter() - start}


def inverted(arguments: argparse.Namespace) -> dict[str, Any]:
    """The pass on a network of inverted bottlenecks, which get faster as one layer each."""
    module = trained(INVERTED, EPOCHS)
    model = merge(module, inputs=["1x3x32x32"])
    cifar10 = shared_module("data/load.py").cifar10
    learn = load_data(cifar10("train", LONGER * arguments.train_images), model.inputs)
    test = load_data(cifar10("test", arguments.images), model.inputs)
    target = create_target(RUNTIME, threads=1)
    step = RemoveActivations(steps=LONGER * arguments.steps, batch=arguments.batch, augment="flip")
    copy = dataclasses.replace(model, program=model.graph_model.clone())
    done = step.apply(copy, context(model, learn))
    scores = [top1(target.build(one), test) for one in (model, done)]
    return {
        "network": INVERTED,
        "macs": [sum(s.macs for s in graph_sites(m.graph_model)) for m in (model, done)],
        "details": {k: v for k, v in done.history[-1].details.items() if k != "statistics"},
        "top1": [score.to_dict() for score in scores],
        "drop": dataclasses.asdict(paired_drop(*scores)),
    }


def run_one(key: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """One entry by its name."""
    part, _, rest = key.partition("/")
    if part == "accuracy":
        return accuracy(int(rest), arguments)
    if part == "runs":
        return runs(rest, arguments)
    work = {"latency": latency, "remove_activations": default, "inverted": inverted}
    return work[part](arguments)


def keys(part: str) -> list[str]:
    """Names of the entries of a part."""
    found = [f"accuracy/{count}" for count in COUNTS]
    timed = ["latency", *(f"runs/{name}" for name in TIMED), "remove_activations", "inverted"]
    return {"accuracy": found, "latency": timed, "all": found + timed}[part]


def show(entries: Mapping[str, Any], order: Sequence[str], console: Console) -> None:
    """Tables of what is there."""
    for key in (key for key in order if key in entries):
        entry = entries[key]
        if "error" in entry:
            console.print(f"{key}: {entry['error']}", markup=False)
        elif "details" in entry:
            loss = f" Drop {shown_drop(entry['drop'])}." if "drop" in entry else ""
            console.print(f"{key}: {entry['details']['remark']}{loss}", markup=False)
        elif "tried" in entry:
            console.print(run_table(key, entry))
        elif "latency" in entry:
            console.print(latency_table(key, entry))
        else:
            rows = (f"{name} {shown_drop(entry[name]['drop'])}" for name in ("before", "after"))
            console.print(f"{key}: drop {', '.join(rows)} ({entry['epochs']:.2f} epochs)")


def shown_drop(drop: Mapping[str, float]) -> str:
    return f"{drop['points']:+.2f} ({drop['low']:+.2f} to {drop['high']:+.2f})"


def run_table(key: str, entry: Mapping[str, Any]) -> Table:
    table = Table(title=f"{key}: {entry['segments']} runs of layers")
    for header in ("layers", "removed", "MACs", "us before", "us after", "faster", "sensitivity"):
        table.add_column(header)
    for row in entry["tried"]:
        sensitivity = row["sensitivity"]
        table.add_row(
            f"{row['layers'][0]} to {row['layers'][-1]}",
            str(len(row["activations"])),
            f"{row['macs_after'] / row['macs_before']:.2f}",
            f"{row['before_us']:.1f}",
            f"{row['after_us']:.1f}",
            "yes" if row["faster"] else "no",
            f"{sensitivity:.3g}" if sensitivity is not None else "",
        )
    return table


def latency_table(key: str, entry: Mapping[str, Any]) -> Table:
    table = Table(title=f"{key}: {TRAINED} in {RUNTIME}")
    for header in ("", "MACs", "ms", "speed-up", ""):
        table.add_column(header)
    for label, timing in entry["latency"]["timings"].items():
        ratio = entry["latency"]["ratios"].get(label)
        table.add_row(
            label,
            f"{entry['macs'][label] / entry['macs']['original']:.2f}",
            f"{timing['p50_ms']:.3f}",
            f"{ratio['value']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f})" if ratio else "1",
            ratio["verdict"] if ratio else "",
        )
    return table


def main() -> None:
    """Run what is not in the results yet, then print all of it."""
    run_training_parts("activations", __doc__, 300, keys, run_one, show)


if __name__ == "__main__":
    main()
