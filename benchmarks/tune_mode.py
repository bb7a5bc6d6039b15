"""Fine-tuning in Eval, Tune and Deploy mode: what is kept for the backward pass, time, losses.

    python -m benchmarks.tune_mode                     # everything, about 25 minutes
    python -m benchmarks.tune_mode --parts bytes curves

Both networks learn CIFAR-10 from the same start, in the same order of images, by SGD with momentum.
ResNet-56 is trained on it; MobileNetV2 is trained on ImageNet, gets a new last layer, sees images
of 64x64, and as its BatchNorm came folded, gets one that changes nothing, with the statistics of
the first batches.

- bytes: of the storages that autograd keeps after one forward pass, each counted once, without
  parameters and buffers; by the operation that keeps them; and the peak of what is allocated in
  one step, by torch's profiler.
- curves: the loss of every step. `eval again` is Eval with the images changed by one part in ten
  million: how far rounding alone leads curves apart. curves64: the same in float64, where
  rounding does not, with fewer and smaller batches.
- time: of a step, the modes in turn in one process.
- compiled: the same for torch.compile: of eval mode, with Inductor's own pass for this
  (`compile_tuned`), and of tune mode; bytes, time, and gradients beside those of eager eval mode.

It goes on where it was killed; the results are in `results/tune_mode.json`.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from rich.console import Console
from torch import Tensor, nn

from benchmarks.common import Results, shared_module
from compress import reparam
from compress.latency import measure

MOBILENET = "imagenet_mobilenet_v2"
NETWORKS = ("cifar10_resnet56", MOBILENET)
PARTS = ("bytes", "curves", "curves64", "time", "compiled")
MODES = ("eval", "tune", "deploy")
BATCH = {"cifar10_resnet56": 128, MOBILENET: 64}
SIZE = {"cifar10_resnet56": 32, MOBILENET: 64}
DOUBLE_STEPS, DOUBLE_BATCH = 20, 32
"""Of the curves in float64, at most."""
RATE = 1e-4
"""With frozen statistics 1e-3 is too much for trained networks: the losses rise at first."""
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
    net: nn.Module = shared_module("models/zoo.py").load(name)
    if name == MOBILENET:
        net.classifier = nn.Conv2d(1280, 10, 1)
        unfold(net, [x for x, _ in batches[:STATISTICS_BATCHES]])
    return net


@torch.no_grad()
def unfold(net: nn.Module, batches: list[Tensor]) -> None:
    """Give every convolution with a bias the BatchNorm that was folded into it, in place.

    The network computes what it did: each filter gets norm one, as weight decay leads to, and
    BatchNorm the rest, with the statistics of these images.
    """
    norms: list[tuple[nn.BatchNorm2d, Tensor]] = []
    for module in list(net.modules()):
        for name, conv in list(module.named_children()):
            if not isinstance(conv, nn.Conv2d) or conv is net.classifier or conv.bias is None:
                continue
            size = conv.weight.flatten(1).norm(dim=1).clamp_min(1e-6)
            norm = nn.BatchNorm2d(conv.out_channels)
            norm.weight.copy_(size * (1 + norm.eps) ** 0.5)
            norm.bias.copy_(conv.bias)
            conv.weight.div_(size.view(-1, 1, 1, 1))
            conv.bias = None
            setattr(module, name, nn.Sequential(conv, norm))
            norms.append((norm, size))

    def watch(norm: nn.Module, args: tuple[Tensor]) -> None:
        F.batch_norm(args[0], *seen[norm], training=True, momentum=share)

    seen = {n: (torch.zeros_like(n.bias), torch.zeros_like(n.bias)) for n, _ in norms}
    hooks = [norm.register_forward_pre_hook(watch) for norm, _ in norms]
    net.eval()
    for index, x in enumerate(batches):
        share = 1 / (index + 1)
        net(x)
    for hook in hooks:
        hook.remove()
    for norm, size in norms:
        mean, variance = seen[norm]
        norm.bias.add_(size * mean)
        norm.weight.copy_(size * (variance + norm.eps).sqrt())
        norm.running_mean.copy_(mean)
        norm.running_var.copy_(variance)


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


def curves(name: str, arguments: argparse.Namespace, double: bool = False) -> dict[str, Any]:
    """Losses of every step in every mode."""
    steps, batch = arguments.steps, arguments.batch or BATCH[name]
    if double:
        steps, batch = min(steps, DOUBLE_STEPS), min(batch, DOUBLE_BATCH)
    batches = images(name, batch, max(steps, STATISTICS_BATCHES))
    start = network(name, batches)
    if double:
        start = start.double()
        batches = [(x.double(), y) for x, y in batches]
    losses: dict[str, list[float]] = {}
    for label in (*MODES, "eval again"):
        print(f"   {label}", flush=True)
        net, _ = in_mode(start, label.removesuffix(" again"), batches[0][0])
        step = training_step(net, arguments.rate)
        factor = 1 + 1e-7 if label == "eval again" else 1.0
        losses[label] = [step(x * factor, y) for x, y in batches[:steps]]
    far = {
        label: np.abs(np.subtract(losses[label], losses["eval"]))
        for label in ("tune", "deploy", "eval again")
    }
    return {
        "steps": steps,
        "batch": batch,
        "rate": arguments.rate,
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


def gradients(net: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """Of the loss, by parameter."""
    net.zero_grad(set_to_none=True)
    F.cross_entropy(net(x), y).backward()
    return {n: p.grad.clone() for n, p in net.named_parameters() if p.grad is not None}


def compiled(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Inductor's pass beside tune mode, both compiled, and eval mode compiled and not."""
    from torch._dynamo.utils import counters

    batches = images(name, arguments.batch or BATCH[name], STATISTICS_BATCHES)
    start, (x, y) = network(name, batches), batches[0]
    plain = in_mode(start, "eval", x)[0]
    wanted = gradients(plain, x, y)
    calls = {"eval": partial(training_step(plain, 0.0), x, y)}
    calls["tune"] = partial(training_step(in_mode(start, "tune", x)[0], 0.0), x, y)
    modes: dict[str, Any] = {}
    for label in ("compiled eval", "inductor's pass", "compiled tune"):
        torch._dynamo.reset()
        if label == "inductor's pass":
            own = copy.deepcopy(start).train()
            net = reparam.compile_tuned(own)
        else:
            own, _ = in_mode(start, label.removeprefix("compiled "), x)
            net = torch.compile(own)
        counters["inductor"].clear()
        began = time.perf_counter()
        F.cross_entropy(net(x), y).backward()
        seconds = time.perf_counter() - began
        folded = counters["inductor"]["efficient_conv_bn_eval"]
        got = {n.removeprefix("_orig_mod."): g for n, g in gradients(net, x, y).items()}
        far = max(float((got[n] - g).abs().max() / g.abs().max()) for n, g in wanted.items())
        modes[label] = {
            "bytes": kept_bytes(net, x, y)["bytes"],
            "folded_by_inductor": folded,
            "compile_seconds": seconds,
            "largest_relative_difference_of_gradients": far,
        }
        calls[label] = partial(training_step(net, 0.0), x, y)
    latency = measure(calls, baseline="eval", seconds=arguments.seconds).to_dict()
    return {"compiled": modes, **latency}


def run_one(key: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """One part for one network."""
    name, part = key.split("/")
    work = {
        "bytes": measure_bytes,
        "curves": curves,
        "curves64": partial(curves, double=True),
        "time": step_time,
        "compiled": compiled,
    }
    return work[part](name, arguments)


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
        for mode, found in entry.get("compiled", {}).items():
            console.print(
                f"{key}: {mode}: {found['bytes'] / 1e6:.1f} MB kept, {found['folded_by_inductor']} "
                f"folded by Inductor, compiled in {found['compile_seconds']:.0f} s, gradients "
                f"within {found['largest_relative_difference_of_gradients']:.1g} of the largest",
                markup=False,
            )
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
    parser.add_argument("--rate", type=float, default=RATE, help="of the curves' SGD")
    parser.add_argument("--batch", type=int, default=0, help="images; 128 and 64 by default")
    parser.add_argument("--seconds", type=float, default=180.0, help="of each measurement of time")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--results", type=Path, default=None, help="folder for the JSON file")
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    torch.set_num_threads(arguments.threads)
    names = ("steps", "rate", "batch", "seconds", "threads")
    settings = {name: getattr(arguments, name) for name in names}
    results = Results("tune_mode", settings, arguments.results)
    keys = [f"{name}/{part}" for part in arguments.parts for name in arguments.only]
    results.run(keys, lambda key, folder: run_one(key, arguments))
    console = Console(width=160)
    for key, entry in results.document["entries"].items():
        print_entry(key, entry, console)


if __name__ == "__main__":
    main()
