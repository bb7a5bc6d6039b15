"""Low-rank factorisation: what it costs in accuracy, and what it really buys in time.

    python -m benchmarks.lowrank --part accuracy     # an hour on an idle core; goes on after a kill
    python -m benchmarks.lowrank --part latency      # a quarter of an hour; a quiet machine

Accuracy: ResNet-56 on CIFAR-10, every 3x3 convolution but the first factorised at 1/4, 1/2 and 3/4
of the full rank (of CP, of the number of channels), before and after a short fine-tuning with the
original as teacher; the row `original` is the original fine-tuned as long, for it has room to
gain. Latency: the same chains in ONNX Runtime and OpenVINO, one thread, batch 1, all of them
interleaved with the original in one process, beside their multiply-accumulates; then networks with
wide layers, with random weights where only time is of interest. Last, what `low_rank` itself picks
at its defaults.

`pruned` stays empty: it is the place for channel pruning to the same latency, which the project
does not have yet.
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

from benchmarks.common import run_training_parts, shared_module, torchvision_models
from compress.data import load_data
from compress.export import to_onnx
from compress.graph import graph_sites
from compress.loading import load
from compress.metrics import Accuracy, paired_drop, top1
from compress.model import Model
from compress.passes import Context
from compress.registry import create_target
from compress.reparam import low_rank, recover
from compress.reparam.lowrank_decompose import decompose
from compress.reparam.lowrank_factors import METHODS, Method, Ranks, full_ranks
from compress.reparam.lowrank_factors import random_links as random_chain
from compress.reparam.lowrank_graph import Layer, find_layers, replace_layer
from compress.rewrites import FoldBatchNorm, remove_unused
from compress.sessions import measure_sessions
from compress.target import Engine

RATIOS = (0.5, 0.75, 0.25)
TRAINED = "cifar10_resnet56"
RUNTIMES = ("onnxruntime", "openvino")
WIDE = {
    "cifar10_resnet56": ("channel_svd", "spatial_svd", "tucker", "cp"),
    "resnet18": ("channel_svd", "spatial_svd", "tucker"),
    "alexnet": ("channel_svd", "spatial_svd", "tucker"),
    "imagenet_mobilenet_v2": ("channel_svd",),
}
"""Networks to time, and what is tried; torchvision's have random weights."""
PICKED = ("cifar10_resnet56", "imagenet_mobilenet_v2")
"""Networks with trained weights, for `low_rank` at its defaults."""
SMALLEST_CHANNELS = 16
"""A layer with fewer input channels is left as it is: the first of a network."""


@functools.cache
def network(name: str) -> Model:
    """At the ONNX stage, with BatchNorm folded."""
    if name in ("resnet18", "alexnet"):
        import torch

        torch.manual_seed(0)
        module, size = getattr(torchvision_models(), name)(weights=None), 224
    else:
        module = shared_module("models/zoo.py").load(name)
        size = 32 if name.startswith("cifar10") else 224
    model = to_onnx(load(module.eval(), inputs=[f"1x3x{size}x{size}"]), 21)
    context = Context(target=create_target("onnxruntime", threads=1), original=model)
    return FoldBatchNorm().apply(model, context)


def ranks_of(layer: Layer, method: Method, ratio: float) -> Ranks:
    """A share of the full rank."""
    full = full_ranks(layer.weight.shape, layer.groups, method)
    if method == "cp":
        full = (max(len(layer.weight), layer.weight.shape[1]),)
    return tuple(max(1, round(ratio * most)) for most in full)


def chosen_layers(model: Model, method: Method) -> list[Layer]:
    """Convolutions with a window, and for channel_svd wide layers without one."""
    layers = []
    for layer in find_layers(model):
        window = layer.weight.ndim == 4 and max(layer.weight.shape[2:]) > 1
        wide = method == "channel_svd" and min(layer.weight.shape[:2]) >= 96
        if layer.groups == 1 and layer.weight.shape[1] >= SMALLEST_CHANNELS and (window or wide):
            layers.append(layer)
    return layers


def factorised(name: str, method: Method, ratio: float, exact: bool = True) -> Model:
    """The network with all such layers as chains; random ones where only time matters."""
    model = network(name)
    changed = dataclasses.replace(model, program=model.graph_model.clone())
    rng = np.random.default_rng(0)
    for layer in chosen_layers(model, method):
        shape, ranks = layer.weight.shape, ranks_of(layer, method, ratio)
        if exact:
            links = decompose(layer.weight, layer.groups, method)(ranks)
        else:
            links = random_chain(shape, layer.groups, method, ranks, rng)
        replace_layer(changed.graph_model.graph, layer, links)
    remove_unused(changed.graph_model)
    return changed


def sizes(model: Model) -> dict[str, int]:
    """Multiply-accumulates and parameters."""
    sites = graph_sites(model.graph_model)
    return {"macs": sum(s.macs for s in sites), "parameters": sum(s.parameters for s in sites)}


def setting_model(setting: str) -> Model:
    """ResNet-56 as one row of the table has it."""
    if setting == "original":
        return network(TRAINED)
    method, ratio = setting.split()
    return factorised(TRAINED, method, float(ratio))  # type: ignore[arg-type]


@functools.cache
def original_score(images: int) -> Accuracy:
    return score(network(TRAINED), images)


def score(model: Model, images: int) -> Accuracy:
    """Top-1 in ONNX Runtime."""
    test = load_data(shared_module("data/load.py").cifar10("test", images), model.inputs)
    return top1(create_target("onnxruntime", threads=1).build(model), test)


def loss_facts(model: Model, images: int) -> dict[str, Any]:
    found = score(model, images)
    drop = paired_drop(original_score(images), found)
    return {**sizes(model), "top1": found.to_dict(), "drop": dataclasses.asdict(drop)}


def accuracy(setting: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """What the factors alone lose."""
    return loss_facts(setting_model(setting), arguments.images)


def tuned(setting: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """What is left of that after a short fine-tuning."""
    return fine_tuned(setting_model(setting), arguments)


def fine_tuned(model: Model, arguments: argparse.Namespace) -> dict[str, Any]:
    """Towards ResNet-56 as it was."""
    start = time.perf_counter()
    model = recover(
        model,
        shared_module("data/load.py").cifar10("train", arguments.train_images),
        teacher=network(TRAINED),
        steps=arguments.steps,
        batch=arguments.batch,
        augment="flip",
    )
    seconds = time.perf_counter() - start
    images = arguments.steps * arguments.batch
    return {
        **loss_facts(model, arguments.images),
        "images": images,
        "epochs": images / arguments.train_images,
        "seconds": seconds,
        "training": dict(model.history[-1].details),
    }


def latency(name: str, runtime: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """All settings of one network in one runtime, interleaved."""
    target = create_target(runtime, threads=1)
    models = {"original": network(name)}
    for method in WIDE[name]:
        for ratio in sorted(RATIOS):
            models[f"{method} {ratio}"] = factorised(name, method, ratio, exact=False)  # type: ignore[arg-type]
    inputs = network(name).example()

    def build() -> Mapping[str, Callable[[], object]]:
        engines: dict[str, Engine] = {label: target.build(one) for label, one in models.items()}
        return {label: functools.partial(one, inputs) for label, one in engines.items()}

    comparison = measure_sessions(build, seconds=arguments.seconds * len(models))
    return {
        "sizes": {label: sizes(one) for label, one in models.items()},
        "latency": comparison.to_dict(),
        "pruned": None,
    }


def picked(name: str, runtime: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """What `low_rank` does at its defaults; what that loses, where there are images enough."""
    data = shared_module("data/load.py")
    x, _ = data.cifar10("train", 64) if name.startswith("cifar10") else data.imagenet250()
    target = create_target(runtime, threads=1)
    start = time.perf_counter()
    done = low_rank(network(name), target, data=np.asarray(x)[:64])
    details = dict(done.history[-1].details)
    seconds = time.perf_counter() - start
    lost: dict[str, Any] = {}
    if name == TRAINED:
        lost = {"alone": loss_facts(done, arguments.images), "tuned": fine_tuned(done, arguments)}
    return {"details": details, "wall_seconds": seconds, **sizes(done), **lost}


def run_one(key: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """One entry by its name."""
    part, *rest = key.split("/")
    if part in ("accuracy", "tuned"):
        return (accuracy if part == "accuracy" else tuned)(rest[0], arguments)
    return (latency if part == "latency" else picked)(*rest, arguments)


def keys(part: str) -> list[str]:
    """Names of the entries of a part."""
    settings = [f"{method} {ratio}" for ratio in RATIOS for method in METHODS if method != "cp"]
    settings += [f"cp {ratio}" for ratio in RATIOS]
    found = [f"accuracy/{one}" for one in settings]
    found += [f"tuned/{one}" for one in ("original", *settings)]
    timed = [f"latency/{name}/{runtime}" for name in WIDE for runtime in RUNTIMES]
    timed += [f"low_rank/{name}/{runtime}" for name in PICKED for runtime in RUNTIMES]
    return {"accuracy": found, "latency": timed, "all": found + timed}[part]


def print_accuracy(entries: Mapping[str, Any], console: Console) -> None:
    table = Table(title=f"{TRAINED}: drop in points of top-1")
    for header in ("", "MACs", "parameters", "factors alone", "fine-tuned", "epochs"):
        table.add_column(header)
    for setting in dict.fromkeys(key.split("/")[1] for key in entries):
        alone, trained = (entries.get(f"{part}/{setting}", {}) for part in ("accuracy", "tuned"))
        one = alone if "macs" in alone else trained
        table.add_row(
            setting,
            f"{one['macs'] / 1e6:.1f} M" if "macs" in one else one.get("error", ""),
            f"{one['parameters']:,}" if "macs" in one else "",
            shown_drop(alone),
            shown_drop(trained),
            f"{trained['epochs']:.2f}" if "epochs" in trained else "",
        )
    console.print(table)


def shown_drop(entry: Mapping[str, Any]) -> str:
    if "drop" not in entry:
        return entry.get("error", "")
    drop = entry["drop"]
    return f"{drop['points']:+.2f} [{drop['low']:+.2f}, {drop['high']:+.2f}]"


def print_latency(key: str, entry: Mapping[str, Any], console: Console) -> None:
    if "error" in entry:
        console.print(f"{key}: {entry['error']}", markup=False)
        return
    if "details" in entry:
        seconds = entry["wall_seconds"]
        console.print(f"{key} ({seconds:.0f} s): {entry['details']['remark']}", markup=False)
        return
    table = Table(title=key)
    for header in ("", "MACs", "ms", "speed-up", ""):
        table.add_column(header)
    whole = entry["sizes"]["original"]["macs"]
    for label, timing in entry["latency"]["timings"].items():
        ratio = entry["latency"]["ratios"].get(label)
        table.add_row(
            label,
            f"{entry['sizes'][label]['macs'] / whole:.2f}",
            f"{timing['p50_ms']:.3f}",
            f"{ratio['value']:.2f} [{ratio['low']:.2f}, {ratio['high']:.2f}]" if ratio else "1",
            ratio["verdict"] if ratio else "",
        )
    console.print(table)


def show(entries: Mapping[str, Any], order: Sequence[str], console: Console) -> None:
    found = {k: entries[k] for k in order if k in entries}
    accuracies = {k: v for k, v in found.items() if k.startswith(("accuracy/", "tuned/"))}
    if accuracies:
        print_accuracy(accuracies, console)
    for key, entry in found.items():
        if key not in accuracies:
            print_latency(key, entry, console)


def main() -> None:
    """Run what is not in the results yet, then print all of it."""
    run_training_parts("lowrank", __doc__, 200, keys, run_one, show)


if __name__ == "__main__":
    main()
