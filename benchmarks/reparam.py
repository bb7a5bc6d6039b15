"""Trained branches merged into single layers: found, equal, faster, and what int8 makes of them.

    python -m benchmarks.reparam                       # everything, at most half an hour
    python -m benchmarks.reparam --parts structure accuracy --only repvgg
    python -m benchmarks.reparam --parts latency       # needs a quiet machine

Networks of ours (`benchmarks.reparam_networks`) and timm's, in the form they are trained in.
structure: groups of branches that were merged, beside those that the network has or that its own
`reparameterize` merges; outputs of the merged graph against torch; MACs, parameters, operators.
accuracy: the two that are trained on CIFAR-10, in float and in int8, before and after merging, with
and without `equalize`, with a scale for each output channel and with one for each weight tensor;
the first once more with its channels rescaled, which leaves its function and not its ranges.
latency: ONNX Runtime on one thread, batch 1, BatchNorm folded in both, timed in turns in three
sessions.
worth: pairs of branches whose merging adds multiply-accumulates and saves tensors, in ONNX Runtime
and OpenVINO: how many for each element that is no longer written are still faster, which is what
`compress.reparam.offers.KERNEL_WORTH` assumes.
layernorm: timm's transformers with random weights, their LayerNorm replaced by BatchNorm and folded
after a training that is too short to mean anything: what is found, and what it saves.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.common import HERE, Results, shared_module, smooth_images, torchvision_models
from benchmarks.reparam_networks import OURS, TRAINED, Branches, randomise, rescale, train
from compress.data import Data, load_data
from compress.export import run_torch, to_onnx
from compress.graph import graph_sites
from compress.loading import load
from compress.metrics import paired_drop, top1
from compress.model import Model
from compress.passes import Context, Pass
from compress.recipe import default_passes
from compress.reference import reference_session, run
from compress.registry import create_pass, create_target
from compress.sessions import measure_sessions
from targets.cpu import CPU

TIMM = {"repvgg_a0": "1x3x224x224", "mobileone_s0": "1x3x224x224", "fastvit_t8": "1x3x256x256"}
PARTS = ("structure", "accuracy", "latency", "worth", "layernorm")
TRANSFORMERS = ("vit_tiny_patch16_224", "swin_tiny_patch4_window7_224")
PAIRS = {
    "depthwise 3x3 and 3x3": ((3, 3, 1), (3, 3, 1)),
    "depthwise 3x3 and 3x3 dilated 2": ((3, 3, 1), (3, 3, 2)),
    "depthwise 1x5 and 5x1": ((1, 5, 1), (5, 1, 1)),
    "depthwise 3x3 and 3x3 dilated 3": ((3, 3, 1), (3, 3, 3)),
    "depthwise 1x7 and 7x1": ((1, 7, 1), (7, 1, 1)),
    "depthwise 1x9 and 9x1": ((1, 9, 1), (9, 1, 1)),
    "depthwise 3x3 and 3x3 dilated 4": ((3, 3, 1), (3, 3, 4)),
    "depthwise 1x11 and 11x1": ((1, 11, 1), (11, 1, 1)),
}
"""Height, width and dilation of two branches of a depthwise convolution."""
MAPS = ((32, 56), (128, 14))
"""Channels, and height and width."""
TRAINING_IMAGES, CALIBRATION_IMAGES = 25_000, 512
FOLDING = ("remove_identity", "fold_pad", "fold_batchnorm")


def network(name: str) -> tuple[torch.nn.Module, str]:
    """With random weights and BatchNorm statistics, and the shape of its input."""
    torch.manual_seed(0)
    if name in OURS:
        build, shape, _ = OURS[name]
        return randomise(build()), shape
    torchvision_models()
    import timm

    return randomise(timm.create_model(name, pretrained=False)), TIMM[name]


def expected_merges(name: str, module: torch.nn.Module) -> int:
    """Groups of branches: as built, or layers that timm makes of its blocks."""
    if name in OURS:
        return OURS[name][2]
    from timm.utils.model import reparameterize_model

    def convolutions(net: torch.nn.Module) -> set[str]:
        return {n for n, m in net.named_modules() if isinstance(m, torch.nn.Conv2d)}

    return len(convolutions(reparameterize_model(module)) - convolutions(module))


def steps(model: Model, passes: list[Pass], context: Context) -> Model:
    """A copy of the model after these passes."""
    done = dataclasses.replace(model, program=model.graph_model.clone())
    for step in passes:
        done = step.apply(done, context)
    return done


def folded_and_merged(
    module: torch.nn.Module, shape: str, profit: str = "auto"
) -> tuple[Model, Model, float]:
    """BatchNorm folded, that with its branches merged, and the seconds that merging took."""
    target = CPU(threads=1)
    original = load(module, inputs=[shape])
    context = Context(target=target, original=original)
    exported = to_onnx(original, target.capabilities.opset)
    folded = steps(exported, [create_pass(name) for name in FOLDING], context)
    start = time.perf_counter()
    merged = steps(folded, [create_pass("merge_branches", profit=profit, seconds=0)], context)
    return folded, merged, time.perf_counter() - start


def structure(name: str) -> dict[str, Any]:
    """What is found, and how equal it is."""
    module, shape = network(name)
    folded, merged, seconds = folded_and_merged(module, shape)
    inputs = merged.example(1, seed=1)
    outputs = run(reference_session(merged.graph_model), inputs)
    errors = [
        float(np.abs(got - want).max() / np.abs(want).max())
        for got, want in zip(outputs.values(), run_torch(module, inputs), strict=True)
    ]
    sites = [graph_sites(one.graph_model) for one in (folded, merged)]
    details = merged.history[-1].details
    return {
        "merged": len(details["merged"]),
        "expected": expected_merges(name, module),
        "left": dict(details["left"]),
        "max_relative_error": max(errors),
        "macs": [sum(site.macs for site in one) for one in sites],
        "parameters": [sum(site.parameters for site in one) for one in sites],
        "operators": [len(one) for one in sites],
        "convolutions": [Counter(site.op_type for site in one)["Conv"] for one in sites],
        "seconds": seconds,
    }


def latency(name: str, seconds: float) -> dict[str, Any]:
    """Merged against unmerged."""
    module, shape = network(name)
    folded, merged, _ = folded_and_merged(module, shape)
    return timed(folded, merged, "onnxruntime", seconds)


def timed(folded: Model, merged: Model, runtime: str, seconds: float) -> dict[str, Any]:
    """Both in several sessions."""
    target, inputs = create_target(runtime, threads=1), folded.example()

    def build() -> dict[str, Callable[[], object]]:
        engines = {"branches": target.build(folded), "merged": target.build(merged)}
        return {label: partial(engine, inputs) for label, engine in engines.items()}

    return measure_sessions(build, seconds=seconds, margin=0.0).to_dict()


def worth(name: str, seconds: float) -> dict[str, Any]:
    """One pair of branches on every size of input, in both runtimes."""
    found: dict[str, Any] = {}
    for channels, size in MAPS:
        torch.manual_seed(0)
        branches: list[torch.nn.Module] = [
            torch.nn.Conv2d(
                channels,
                channels,
                (high, wide),
                padding=(dilation * (high - 1) // 2, dilation * (wide - 1) // 2),
                dilation=dilation,
                groups=channels,
            )
            for high, wide, dilation in PAIRS[name]
        ]
        shape = f"1x{channels}x{size}x{size}"
        folded, merged, _ = folded_and_merged(Branches(branches).eval(), shape, "all")
        macs = [sum(s.macs for s in graph_sites(m.graph_model)) for m in (folded, merged)]
        saved = 2 * channels * size**2  # what both branches write; the sum is written by either
        entry: dict[str, Any] = {
            "macs": macs,
            "added_for_each_element": (macs[1] - macs[0]) / saved,
        }
        for runtime in ("onnxruntime", "openvino"):
            entry[runtime] = timed(folded, merged, runtime, seconds / 2)
        found[shape] = entry
    return {"inputs": found}


def layernorm(name: str, seconds: float) -> dict[str, Any]:
    """What `layernorm_to_batchnorm` finds, and the time of both networks."""
    torchvision_models()
    import timm

    torch.manual_seed(0)
    net = timm.create_model(name, pretrained=False, num_classes=10).eval()
    target = CPU(threads=1)
    original = to_onnx(load(net, inputs=["1x3x224x224"]), target.capabilities.opset)
    data = load_data(smooth_images(24, 224), original.inputs)
    runtime = create_target("onnxruntime", threads=1)
    context = Context(target=runtime, original=original, training=data)
    step = create_pass("layernorm_to_batchnorm", steps=2, batch=8)
    done = steps(original, [step], context)
    details = done.history[-1].details
    return {
        **{k: details[k] for k in ("applied", "folded", "left", "remark")},
        **timed(original, done, "onnxruntime", seconds),
    }


def rows(exported: Model, context: Context, per_channel: bool) -> dict[str, Model]:
    """int8 before and after merging, without and with shared scales."""
    made = {}
    for label, reparam, equalize in (
        ("branches", "off", False),
        ("merged", "auto", False),
        ("merged, equalize", "auto", True),
    ):
        passes = list(
            default_passes(reparam=reparam, samples=CALIBRATION_IMAGES, per_channel=per_channel)
        )
        at = next(i for i, step in enumerate(passes) if step.name == "quantize")
        passes[at:at] = [create_pass("equalize")] if equalize else []
        plain = create_pass("merge_branches", equalize=False, seconds=0)
        passes = [plain if step.name == plain.name else step for step in passes]
        made[label] = steps(exported, passes, context)
    return made


def trained(name: str, epochs: int) -> torch.nn.Module:
    """One of our networks, trained on images that are not used for calibration."""
    x, y = shared_module("data/load.py").cifar10("train", CALIBRATION_IMAGES + TRAINING_IMAGES)
    learn = slice(CALIBRATION_IMAGES, None)
    return train(name, x[learn], y[learn], epochs, HERE / "checkpoints")


def accuracy(name: str, epochs: int, images: int) -> dict[str, Any]:
    """Top-1 on the test images of every row, and what the range check says."""
    cifar10 = shared_module("data/load.py").cifar10
    name, _, rescaled = name.partition(" ")
    module = trained(name, epochs)
    if rescaled:
        module = rescale(module)
    target = CPU(threads=1)
    original = load(module, inputs=[OURS[name][1]])
    exported = to_onnx(original, target.capabilities.opset)
    images_of_training, _ = cifar10("train", CALIBRATION_IMAGES)
    calibration: Data = load_data(images_of_training, exported.inputs)
    context = Context(target=target, original=original, calibration=calibration)
    test = load_data(cifar10("test", images), exported.inputs)
    before = top1(target.build(exported), test)
    merged = steps(
        exported,
        [*map(create_pass, FOLDING), create_pass("merge_branches", equalize=False, seconds=0)],
        context,
    )
    details = merged.history[-1].details
    entry: dict[str, Any] = {
        "float": before.to_dict(),
        "float merged": top1(target.build(merged), test).to_dict(),
        "suspicious": details["suspicious"],
        "weight_spread": {k: v["weight_spread"] for k, v in details["merged"].items()},
        "activation_spread": {k: v.get("activation_spread") for k, v in details["merged"].items()},
        "int8": {},
    }
    for per_channel in (True, False):
        for label, model in rows(exported, context, per_channel).items():
            score = top1(target.build(model), test)
            drop = dataclasses.asdict(paired_drop(before, score))
            scales = "per channel" if per_channel else "per tensor"
            entry["int8"][f"{label}, {scales}"] = {"top1": score.to_dict(), "drop": drop}
    return entry


def main() -> None:
    """Run what is not in the results yet."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--parts", nargs="*", default=list(PARTS), choices=PARTS)
    parser.add_argument("--only", nargs="*", default=[*OURS, *TIMM])
    parser.add_argument("--seconds", type=float, default=10.0, help="of each measurement")
    parser.add_argument("--epochs", type=int, default=8, help="of training on 25,000 images")
    parser.add_argument("--images", type=int, default=10_000, help="test images")
    parser.add_argument("--results", type=Path, default=None, help="folder for reparam.json")
    given = parser.parse_args()
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    settings = {"seconds": given.seconds, "epochs": given.epochs, "images": given.images}
    results = Results("reparam", settings, given.results)
    work = {
        "structure": structure,
        "accuracy": partial(accuracy, epochs=given.epochs, images=given.images),
        "latency": partial(latency, seconds=given.seconds),
        "worth": partial(worth, seconds=given.seconds),
        "layernorm": partial(layernorm, seconds=given.seconds),
    }
    names = [
        f"{part}: {name}"
        for part in given.parts
        for name in {"worth": PAIRS, "layernorm": TRANSFORMERS}.get(part, given.only)
        if part != "accuracy" or name in TRAINED
    ]
    if "accuracy" in given.parts and "repvgg" in given.only:
        names.append("accuracy: repvgg rescaled")

    def one(key: str, folder: Path) -> dict[str, Any]:
        part, name = key.split(": ")
        return work[part](name)

    results.run(names, one)
    for key in names:
        print(summary(key, results.document["entries"][key]))


def summary(key: str, entry: dict[str, Any]) -> str:
    """One line for the terminal."""
    if "error" in entry:
        return f"{key}: {entry['error']}"
    if key.startswith("structure"):
        was, now = entry["macs"]
        return (
            f"{key}: {entry['merged']} of {entry['expected']} merged, error "
            f"{entry['max_relative_error']:.1e}, MACs {now / was:.2f}x, operators "
            f"{entry['operators'][0]} -> {entry['operators'][1]}"
        )
    if key.startswith("layernorm"):
        ratio = entry["ratios"]["merged"]["value"]
        return f"{key}: {entry['applied']} replaced, {entry['folded']}, {ratio:.2f} times as fast"
    if key.startswith("latency"):
        return f"{key}: {entry['ratios']['merged']['value']:.2f} times as fast"
    if key.startswith("worth"):
        ratios = (
            f"{shape}: {one['added_for_each_element']:.3g} added, "
            + ", ".join(
                f"{runtime} {one[runtime]['ratios']['merged']['value']:.2f}x"
                for runtime in ("onnxruntime", "openvino")
            )
            for shape, one in entry["inputs"].items()
        )
        return f"{key}: {'; '.join(ratios)}"
    drops = {label: f"{row['drop']['points']:.2f}" for label, row in entry["int8"].items()}
    return f"{key}: top-1 {entry['float']['value']:.4f}, points lost {drops}"


if __name__ == "__main__":
    main()
