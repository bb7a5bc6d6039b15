"""Fine-tuning in Eval, Tune and Deploy mode: what is kept for the backward pass, time, losses.

    python -m benchmarks.tune_mode                     # everything, about 25 minutes
    python -m benchmarks.tune_mode --parts bytes curves

Both networks learn CIFAR-10 from the same start, in the same order of images, by SGD with momentum.
ResNet-56 is trained; MobileNetV2 is torchvision's with random weights, sees images of 64x64, and
gets its running statistics from the first batches.

- bytes: of the storages that autograd keeps after one forward pass, each counted once, without
  parameters and buffers; by the operation that keeps them; and the peak of what is allocated in
  one step, by torch's profiler.
- curves: the loss of every step. `eval again` is Eval with the images changed by one part in ten
  million: how far rounding alone leads curves apart.
- time: of a step, the modes in turn in one process.

It goes on where it was killed; the results are in `results/tune_mode.json`.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from rich.console import Console
from torch import Tensor, nn

from benchmarks.common import Results, shared_module, torchvision_models
from compress import reparam
from compress.latency import measure

NETWORKS = ("cifar10_resnet56", "mobilenet_v2")
PARTS = ("bytes", "curves", "time")
MODES = ("eval", "tune", "deploy")
BATCH = {"cifar10_resnet56": 128, "mobilenet_v2": 64}
SIZE = {"cifar10_resnet56": 32, "mobilenet_v2": 64}
RATE = 1e-3
"""With frozen statistics 0.01 is too much for the trained network: its loss rises in all modes."""
STATISTICS_BATCHES = 10


def images(name: str, batch: int, steps: int) -> list[tuple[Tensor, Tensor]]:
    """The first batches of the training images, as the network takes them."""
    x, y = shared_module("data/load.py").cifar10("train", batch * steps)
    found = []
    for start in range(0, len(x), batch):
        part = torch.from_numpy(x[start : start + batch])
        if SIZE[name] != 32:
            part = F.interpolate(part, size=SIZE[name], mode="bilinear", antialias=True)
        found.append((part, torch.from_numpy(y[start : start + batch])))
    return found


def network(name: str, batches: list[tuple[Tensor, Tensor]]) -> nn.Module:
    """The start that every mode has."""
    torch.manual_seed(0)
    if name != "mobilenet_v2":
        trained: nn.Module = shared_module("models/zoo.py").load(name)
        return trained
    net: nn.Module = torchvision_models().mobilenet_v2(num_classes=10, dropout=0.0)
    norms = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = None  # the mean over all batches
    with torch.no_grad():
        for x, _ in batches[:STATISTICS_BATCHES]:
            net.train()(x)
    for norm in norms:
        norm.momentum = 0.1
    return net.eval()


def in_mode(start: nn.Module, mode: str, x: Tensor) -> tuple[nn.Module, int]:
    """A copy in that mode, and how many blocks were folded."""
    net = copy.deepcopy(start).train()
    report = reparam.set_mode(net, mode, x[:2])  # type: ignore[arg-type]
    if report.left:
        raise SystemExit(f"Not folded: {dict(report.left)}")
    return net, len(report.pairs)


def training_step(net: nn.Module, rate: float) -> Callable[[Tensor, Tensor], float]:
    """One update by SGD; returns the loss before it."""
    optimizer = torch.optim.SGD(net.parameters(), rate, momentum=0.9, weight_decay=1e-4)

    def step(x: Tensor, y: Tensor) -> float:
        loss = F.cross_entropy(net(x), y)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def kept_bytes(net: nn.Module, x: Tensor, y: Tensor) -> dict[str, Any]:
    """Storages kept for the backward pass, and the operations that keep them."""
    own = {t.untyped_storage().data_ptr() for t in (*net.parameters(), *net.buffers())}
    own.update((x.untyped_storage().data_ptr(), y.untyped_storage().data_ptr()))
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = F.cross_entropy(net(x), y)
    keepers: dict[int, set[str]] = {}
    # saved_tensors_hooks does not say who saves; a second forward pass without them does.
    loss = F.cross_entropy(net(x), y)
    sizes: dict[int, int] = {}
    for operation, storage in saved_by(loss):
        if storage.data_ptr() not in own:
            keepers.setdefault(storage.data_ptr(), set()).add(operation)
            sizes[storage.data_ptr()] = storage.nbytes()
    by: dict[str, int] = {}
    for pointer, names in keepers.items():
        key = " and ".join(sorted(names))
        by[key] = by.get(key, 0) + sizes[pointer]
    return {"bytes": sum(kept.values()), "storages": len(kept), "by": by}


def saved_by(loss: Tensor) -> list[tuple[str, torch.UntypedStorage]]:
    """Every tensor that a node of the graph behind `loss` keeps, with the node's operation."""
    found, seen, stack = [], set(), [loss.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        for attribute in dir(node):
            value = getattr(node, attribute) if attribute.startswith("_saved_") else None
            if isinstance(value, Tensor):
                name = node.name().removesuffix("0").removesuffix("Backward")
                found.append((name, value.untyped_storage()))
        stack.extend(parent for parent, _ in node.next_functions)
    return found


def peak_bytes(step: Callable[[], object]) -> int:
    """Most bytes that were allocated at once in a call, over what was before it."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    memory = [e for e in events if e.get("name") == "[memory]"]
    changes = [int(e["args"]["Bytes"]) for e in sorted(memory, key=lambda e: e["ts"])]
    return int(np.cumsum(changes).max()) if changes else 0


def measure_bytes(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """What each mode keeps."""
    batches = images(name, arguments.batch or BATCH[name], STATISTICS_BATCHES)
    start, (x, y) = network(name, batches), batches[0]
    modes: dict[str, Any] = {}
    for mode in ("train", *MODES):
        net, pairs = in_mode(start, mode, x)
        step = training_step(net, 0.0)
        step(x, y)  # gradients and momenta are there already in the step that is looked at
        modes[mode] = {**kept_bytes(net, x, y), "peak_bytes": peak_bytes(partial(step, x, y))}
    saved = 1 - modes["tune"]["bytes"] / modes["eval"]["bytes"]
    return {"batch": len(x), "pairs": pairs, "saved_share": saved, "modes": modes}


def curves(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Losses of every step in every mode."""
    batches = images(name, arguments.batch or BATCH[name], max(arguments.steps, STATISTICS_BATCHES))
    start = network(name, batches)
    losses: dict[str, list[float]] = {}
    for label in (*MODES, "eval again"):
        print(f"   {label}", flush=True)
        net, _ = in_mode(start, label.removesuffix(" again"), batches[0][0])
        step = training_step(net, RATE)
        factor = 1 + 1e-7 if label == "eval again" else 1.0
        losses[label] = [step(x * factor, y) for x, y in batches[: arguments.steps]]
    far = {
        label: np.abs(np.subtract(losses[label], losses["eval"]))
        for label in ("tune", "deploy", "eval again")
    }
    return {
        "steps": arguments.steps,
        "losses": losses,
        "largest_difference": {label: float(found.max()) for label, found in far.items()},
        "steps_within_1e-4": {
            label: int(np.argmax(found > 1e-4)) if (found > 1e-4).any() else len(found)
            for label, found in far.items()
        },
    }


def step_time(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """A training step in every mode, in turn; the learning rate is 0, so nothing drifts."""
    batches = images(name, arguments.batch or BATCH[name], STATISTICS_BATCHES)
    start, (x, y) = network(name, batches), batches[0]
    calls = {mode: partial(training_step(in_mode(start, mode, x)[0], 0.0), x, y) for mode in MODES}
    return measure(calls, baseline="eval", seconds=arguments.seconds).to_dict()


def run_one(key: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """One part for one network."""
    name, part = key.split("/")
    return {"bytes": measure_bytes, "curves": curves, "time": step_time}[part](name, arguments)


def print_entry(key: str, entry: dict[str, Any], console: Console) -> None:
    """What the aims are about."""
    if "error" in entry:
        console.print(f"{key}: {entry['error']}", markup=False)
    elif "modes" in entry:
        for mode, found in entry["modes"].items():
            by = ", ".join(
                f"{name} {size / 1e6:.1f}"
                for name, size in sorted(found["by"].items(), key=lambda item: -item[1])[:4]
            )
            console.print(
                f"{key}: {mode}: {found['bytes'] / 1e6:.1f} MB kept, "
                f"peak {found['peak_bytes'] / 1e6:.1f} MB ({by})",
                markup=False,
            )
        console.print(f"{key}: tune keeps {entry['saved_share']:.1%} less than eval")
    elif "losses" in entry:
        for label, far in entry["largest_difference"].items():
            within = entry["steps_within_1e-4"][label]
            console.print(
                f"{key}: {label}: largest difference from eval {far:.2g} in {entry['steps']} "
                f"steps, the first {within} within 1e-4"
            )
    else:
        for mode, found in entry["ratios"].items():
            console.print(
                f"{key}: {mode} runs {found['value']:.3f} [{found['low']:.3f}, "
                f"{found['high']:.3f}] times as fast as eval",
                markup=False,
            )


def main() -> None:
    """Run what is not in the results yet, then print all of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", default=list(NETWORKS), choices=list(NETWORKS))
    parser.add_argument("--parts", nargs="*", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--steps", type=int, default=60, help="of each curve")
    parser.add_argument("--batch", type=int, default=0, help="images; 128 and 64 by default")
    parser.add_argument("--seconds", type=float, default=180.0, help="of each measurement of time")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--results", type=Path, default=None, help="folder for the JSON file")
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    torch.set_num_threads(arguments.threads)
    names = ("steps", "batch", "seconds", "threads")
    settings = {name: getattr(arguments, name) for name in names}
    results = Results("tune_mode", settings, arguments.results)
    keys = [f"{name}/{part}" for part in arguments.parts for name in arguments.only]
    results.run(keys, lambda key, folder: run_one(key, arguments))
    console = Console(width=160)
    for key, entry in results.document["entries"].items():
        print_entry(key, entry, console)


if __name__ == "__main__":
    main()
