"""Quantization where it hurts: depthwise networks and low bits, rung by rung, beside other tools.

    python -m benchmarks.quant_fragile                      # everything, about an hour
    python -m benchmarks.quant_fragile --only kws_dscnn --parts grid default
    python -m benchmarks.quant_fragile --images 10000       # all CIFAR test images

Parts, for each network:

- grid: weights per tensor and per channel, 8, 6 and 4 bits, every rung of the ladder alone. 8 bits
  run in ONNX Runtime in int8; 6 bits (weights and activations) and 4 bits (weights; activations 8,
  and both 4) are simulated. Drops are paired, on the test samples.
- ladder: the command itself at these widths, in ONNX Runtime, which climbs until the limit holds.
- default: `compress run --eval` without any other option, judged on the test samples.
- peers: one documented call of each other tool.
- mixed: regions in float by measured sensitivity and measured cost, against as many random ones.
- qat: 4-bit weights and activations after a short training with distillation (ResNet-20 only).

Rungs and placements see the calibration and selection samples; figures are of the test samples.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.common import Results, shared_module
from benchmarks.peers import EXECUTORCH, executorch_int8, peers
from benchmarks.trained import ExecuTorchEngine, samples
from compress import pipeline
from compress.artifact import load as load_artifact
from compress.assignment import assign_within
from compress.data import Data, load_data
from compress.errors import CompressError
from compress.export import to_onnx
from compress.fidelity import fidelity
from compress.latency import measure
from compress.loading import load
from compress.lowering import lower
from compress.metrics import Accuracy, paired_drop, top1
from compress.mixed import INT8
from compress.model import Model
from compress.passes import Context, Pass
from compress.progress import silent, terminal
from compress.recipe import Recipe, default_passes
from compress.registry import create_pass
from compress.search import search
from compress.workload import make_workload
from targets.onnxruntime import OnnxRuntime

NETWORKS = ("imagenet_mobilenet_v1_025", "kws_dscnn", "cifar10_resnet8", "cifar10_resnet20")
PARTS = ("grid", "ladder", "default", "peers", "mixed", "qat")
LIMIT = "0.3%"
LIMITS = {"imagenet_mobilenet_v1_025": "1%", "kws_dscnn": "1%"}
WIDTHS: Mapping[str, dict[str, Any]] = {
    "W8A8": {"bits": 8},
    "W6A6 simulated": {"bits": 6, "simulate": True},
    "W4A8 simulated": {"bits": 4, "activation_bits": 8, "simulate": True},
    "W4A4 simulated": {"bits": 4, "simulate": True},
}
BEFORE: Mapping[str, tuple[str, dict[str, Any]]] = {
    "equalize": ("equalize", {"relu6": "bounded"}),
}
BEHIND: Mapping[str, tuple[str, dict[str, Any]]] = {
    "correct_bias": ("correct_bias", {}),
    "reestimate_batchnorm": ("reestimate_batchnorm", {}),
    "AdaRound": ("reconstruct", {}),
    "BRECQ": ("reconstruct", {"granularity": "block"}),
}
RANDOM_CHOICES = 20
INT8_SHARE = 0.25
"""Of the whole sensitivity, that may stay in int8 in `mixed`."""


@dataclasses.dataclass
class Setting:
    """A network, its data, and its float model in the reference runtime."""

    name: str
    shape: str
    module: Any
    exported: Model
    parts: dict[str, tuple[np.ndarray, np.ndarray]]
    target: OnnxRuntime
    test: Data
    before: Accuracy

    def context(self) -> Context:
        """A fresh one, calibration data included."""
        data = load_data(self.parts["calibrate"][0], self.exported.inputs)
        return Context(target=self.target, original=self.exported, calibration=data)

    def folded(self, context: Context) -> Model:
        """After every pass before `quantize`."""
        model = dataclasses.replace(self.exported, program=self.exported.graph_model.clone())
        for step in default_passes():
            if step.name == "quantize":
                break
            model = step.apply(model, context)
        return model

    def drop(self, engine: Any) -> dict[str, Any]:
        """Paired, on the test samples."""
        found = top1(engine, self.test)
        return {"top1": found.value, **dataclasses.asdict(paired_drop(self.before, found))}


def prepare(name: str, images: int) -> Setting:
    """Load a network and measure it in float."""
    parts = samples(name, images)
    module = shared_module("models/zoo.py").load(name)
    spec = "x".join(map(str, (1, *parts["test"][0].shape[1:])))
    target = OnnxRuntime(threads=2)
    exported = to_onnx(load(module, inputs=[spec]), target.capabilities.opset)
    test = load_data(parts["test"], exported.inputs)
    before = top1(target.build(exported), test)
    return Setting(name, spec, module, exported, parts, target, test, before)


def grid(setting: Setting, _: argparse.Namespace) -> dict[str, Any]:
    """Every rung alone, for each width and granularity."""
    cells: dict[str, Any] = {}
    for width, options in WIDTHS.items():
        for per_channel in (False, True):
            quantize = create_pass("quantize", **options, per_channel=per_channel)
            key = f"{width}, {'per channel' if per_channel else 'per tensor'}"
            cells[key] = {}
            for rung, make in rungs(setting, quantize).items():
                print(f"   {key}: {rung}", flush=True)
                start = time.perf_counter()
                try:
                    figures = setting.drop(setting.target.build(make()))
                except CompressError as error:
                    figures = {"error": str(error)[:200]}
                cells[key][rung] = {**figures, "seconds": time.perf_counter() - start}
    return {"top1_float": setting.before.value, "cells": cells}


def rungs(setting: Setting, quantize: Any) -> dict[str, Callable[[], Model]]:
    """What each rung alone makes of the network."""

    def made(passes: list[Pass]) -> Model:
        context = setting.context()
        model = setting.folded(context)
        for step in passes:
            model = step.apply(model, context)
        return model

    found: dict[str, Callable[[], Model]] = {"none": partial(made, [quantize])}
    for method in ("minmax", "percentile"):
        other = dataclasses.replace(quantize, method=method)
        found[f"ranges: {method}"] = partial(made, [other])
    for label, (name, options) in BEFORE.items():
        found[label] = partial(made, [create_pass(name, **options), quantize])
    for label, (name, options) in BEHIND.items():
        # It takes minutes, and only low bits need it.
        low = quantize.bits == 4 and quantize.per_channel and setting.name == "cifar10_resnet20"
        if label != "BRECQ" or low:
            found[label] = partial(made, [quantize, create_pass(name, **options)])
    every = [quantize, create_pass("correct_bias"), create_pass("reconstruct")]
    found["correct_bias and AdaRound"] = partial(made, every)
    return found


def ladder(setting: Setting, arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The command with each width and granularity; the rung that it ends on."""
    cells: dict[str, Any] = {}
    for width, options in WIDTHS.items():
        for per_channel in (False, True):
            key = f"{width}, {'per channel' if per_channel else 'per tensor'}"
            print(f"   {key}", flush=True)
            out = folder / f"{width}_{per_channel}".replace(" ", "_")
            start = time.perf_counter()
            result = pipeline.run(
                setting.module,
                target="onnxruntime",
                inputs=[setting.shape],
                calibration=setting.parts["calibrate"][0],
                evaluate=setting.parts["select"],
                max_drop=LIMITS.get(setting.name, LIMIT),
                threads=2,
                recipe=Recipe(default_passes(**options, per_channel=per_channel)),
                search_seconds=0,
                seconds=1,
                repair_seconds=arguments.repair_time,
                out=out,
            )
            cells[key] = {
                "artifact": result.report.chosen,
                "met": result.met,
                "seconds": time.perf_counter() - start,
                "ladder": [dict(row) for row in result.report.ladder],
                **setting.drop(load_artifact(out)),
            }
    return {"cells": cells}


def default(setting: Setting, arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """`compress run` with calibration and evaluation data and nothing else."""
    start = time.perf_counter()
    result = pipeline.run(
        setting.module,
        inputs=[setting.shape],
        calibration=setting.parts["calibrate"][0],
        evaluate=setting.parts["select"],
        max_drop=LIMITS.get(setting.name, LIMIT),
        threads=1,
        search_seconds=arguments.time,
        out=folder / "artifact",
        progress=terminal,
    )
    wall = time.perf_counter() - start
    found = top1(load_artifact(folder / "artifact"), setting.test)
    chosen = result.report.candidate(result.report.chosen)
    return {
        "artifact": result.report.chosen,
        "met": result.met,
        "wall_seconds": wall,
        "top1": found.value,
        "drop": dataclasses.asdict(paired_drop(setting.before, found)),
        "speedup": chosen.speedup,
        "headline": list(result.report.headline),
        "ladder": [dict(row) for row in result.report.ladder],
        "gap": dict(result.report.gap),
    }


def rivals(setting: Setting, _: argparse.Namespace) -> dict[str, Any]:
    """One documented call of each tool."""
    data = load_data(setting.parts["calibrate"][0], setting.exported.inputs)
    batches = [dict(batch.inputs) for batch in data.batches(1)]
    builders, errors = peers(setting.exported, batches, threads=1)
    engines: dict[str, Any] = {}
    for label, build in builders.items():
        try:
            engines[label] = build()[0]
        except Exception as error:  # a peer that fails must not hide the others
            errors[label] = str(error)[:300]
    spec = setting.exported.inputs[0]
    try:
        images = setting.parts["calibrate"][0]
        call = executorch_int8(setting.module, (1, *images.shape[1:]), images)
        output = setting.exported.graph_model.graph.outputs[0].name or ""
        engines[EXECUTORCH] = ExecuTorchEngine(call, spec, output)
    except Exception as error:  # not installed, or it refuses the network
        errors[EXECUTORCH] = f"{type(error).__name__}: {error}"[:300]
    try:
        engines["NNCF with accuracy control"] = accuracy_control(setting)
    except Exception as error:  # as above
        errors["NNCF with accuracy control"] = f"{type(error).__name__}: {error}"[:300]
    drops: dict[str, Any] = {}
    for label, engine in engines.items():
        try:
            drops[label] = setting.drop(engine)
        except Exception as error:  # as above
            errors[label] = str(error)[:300]
    return {"drops": drops, "errors": errors}


def accuracy_control(setting: Setting) -> Any:
    """NNCF's accuracy control through our pass, judged on the selection samples."""
    labelled = load_data(setting.parts["select"], setting.exported.inputs)
    context = dataclasses.replace(setting.context(), calibration=labelled)
    step = create_pass("nncf_quantize_with_accuracy_control", max_drop=0.003)
    return setting.target.build(step.apply(setting.folded(context), context))


def mixed(setting: Setting, arguments: argparse.Namespace) -> dict[str, Any]:
    """Sensitive regions in float against random ones, as many of them, in int8."""
    found = {}
    for per_channel in (False, True):
        key = "per channel" if per_channel else "per tensor"
        print(f"   {key}", flush=True)
        found[key] = placements(setting, per_channel, arguments)
    return {"granularities": found}


def placements(
    setting: Setting, per_channel: bool, arguments: argparse.Namespace
) -> dict[str, Any]:
    """The knapsack of the ladder over measured costs, and random choices of as many regions."""
    context = setting.context()
    context = dataclasses.replace(context, target=dataclasses.replace(setting.target, threads=1))
    passes = [step for step in default_passes(per_channel=per_channel) if step.stage == "onnx"]
    lowered = lower(setting.exported, passes[:-1], context)  # without the correction of biases
    workload = make_workload(
        setting.exported, context.calibration, batch=1, objective="latency", threads=1
    )
    searched = search(
        setting.exported, [lowered], workload, seconds=arguments.time, seed=0, progress=silent
    )
    placement = searched.placements[setting.target.name]
    placing: Any = lowered.placing
    sensitivity = placing.sensitivity(lowered.float_model, context)
    regions = placement.regions
    losses = [
        {p: sum(sensitivity.get(s, 0.0) for s in region.sites) if p == INT8 else 0.0 for p in costs}
        for region, costs in zip(regions, placement.costs_us, strict=True)
    ]
    limit = INT8_SHARE * sum(loss[INT8] for loss in losses)
    chosen = assign_within(placement.costs_us, placement.edges, losses, limit)
    floats = [p != INT8 for p in chosen]
    rng = np.random.default_rng(0)
    choices = {"all int8": [False] * len(regions), "by sensitivity": floats}
    for index in range(RANDOM_CHOICES):
        choices[f"random {index + 1}"] = rng.permutation(floats).tolist()
    reference = context.target.build(setting.exported)
    engines, rows = {}, {}
    for label, choice in choices.items():
        kept = tuple(s for r, wide in zip(regions, choice, strict=True) if wide for s in r.sites)
        engines[label] = context.target.build(lowered.apply(kept))
        close = fidelity(reference, engines[label], context.calibration)
        rows[label] = {
            **setting.drop(engines[label]),
            "sqnr_db": close.sqnr_db,
            "float_regions": sum(choice),
        }
    inputs = setting.exported.example()
    calls = {label: partial(engine, inputs) for label, engine in engines.items()}
    for label, timing in measure(calls, seconds=arguments.seconds).timings.items():
        rows[label]["p50_ms"] = timing.p50_ms
    return {"regions": len(regions), "rows": rows}


def qat(setting: Setting, arguments: argparse.Namespace) -> dict[str, Any]:
    """W4A4 by training, beside W4A4 without."""
    x, y = shared_module("data/load.py").cifar10("train", arguments.train)
    context = dataclasses.replace(
        setting.context(), training=load_data((x, y), setting.exported.inputs), progress=terminal
    )
    quantize = create_pass("quantize", bits=4, simulate=True)
    model = quantize.apply(setting.folded(context), context)
    untrained = setting.drop(setting.target.build(model))
    start = time.perf_counter()
    trained = create_pass("qat", epochs=arguments.epochs).apply(model, context)
    details = {k: v for k, v in trained.history[-1].details.items() if _plain(v)}
    return {
        "images": len(x),
        "epochs": arguments.epochs,
        "seconds": time.perf_counter() - start,
        "untrained": untrained,
        "trained": setting.drop(setting.target.build(trained)),
        "details": details,
    }


def _plain(value: object) -> bool:
    return isinstance(value, (str, int, float, bool))


def run_one(key: str, arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """One part for one network."""
    name, _, part = key.partition("/")
    setting = prepare(name, arguments.images)
    if part in ("default", "ladder"):
        return {"default": default, "ladder": ladder}[part](setting, arguments, folder)
    parts = {"grid": grid, "peers": rivals, "mixed": mixed, "qat": qat}
    return parts[part](setting, arguments)


def print_entry(key: str, entry: dict[str, Any], console: Console) -> None:
    """Drops in points, with their intervals."""
    if "error" in entry:
        console.print(f"{key}: {entry['error']}", markup=False)
    elif "cells" in entry and "top1_float" not in entry:
        for width, cell in entry["cells"].items():
            console.print(f"{key}: {width}: {cell['artifact']}, {cell['points']:+.2f} points")
    elif "cells" in entry:
        table = Table("rung", *entry["cells"], title=f"{key}: drop in points")
        for rung in dict.fromkeys(r for column in entry["cells"].values() for r in column):
            cells = [column.get(rung, {}) for column in entry["cells"].values()]
            table.add_row(rung, *(f"{c['points']:.2f}" if "points" in c else "-" for c in cells))
        console.print(table)
    elif "granularities" in entry:
        for granularity, found in entry["granularities"].items():
            print_choices(f"{key}, {granularity}", found["rows"], console)
    elif "drops" in entry:
        for label, found in entry["drops"].items():
            console.print(f"{key}: {label}: {found['points']:+.2f} points", markup=False)
    elif "trained" in entry:
        for label in ("untrained", "trained"):
            console.print(f"{key}: {label}: {entry[label]['points']:+.2f} points")
    else:
        loss, speed = entry["drop"], entry["speedup"]
        times = f"{speed['value']:.2f}x" if speed else "1x"
        console.print(f"{key}: {entry['artifact']}: {loss['points']:+.2f} points, {times}")


def print_choices(key: str, rows: dict[str, Any], console: Console) -> None:
    """The chosen placement, and the range of the random ones."""
    others = [row for label, row in rows.items() if label.startswith("random")]
    for label in ("all int8", "by sensitivity"):
        row = rows[label]
        console.print(
            f"{key}: {label}: {row['points']:+.2f} points, {row['sqnr_db']:.1f} dB, "
            f"{row['p50_ms']:.3f} ms"
        )
    points, close, times = (
        sorted(row[name] for row in others) for name in ("points", "sqnr_db", "p50_ms")
    )
    console.print(
        f"{key}: {len(others)} random choices: {points[0]:+.2f} to {points[-1]:+.2f} points, "
        f"median {np.median(points):+.2f}; {close[0]:.1f} to {close[-1]:.1f} dB; "
        f"{times[0]:.3f} to {times[-1]:.3f} ms"
    )


def main() -> None:
    """Run what is not in the results yet, then print all of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", default=list(NETWORKS), choices=list(NETWORKS))
    parser.add_argument("--parts", nargs="*", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--images", type=int, default=2000, help="CIFAR test images")
    parser.add_argument("--seconds", type=float, default=20.0, help="of the measurement in `mixed`")
    parser.add_argument("--time", type=float, default=30.0, help="of the search in `default`")
    parser.add_argument("--repair-time", type=float, default=60.0, help="of each climb in `ladder`")
    parser.add_argument("--train", type=int, default=20_000, help="CIFAR images of `qat`")
    parser.add_argument("--epochs", type=float, default=3.0, help="of `qat`")
    parser.add_argument("--results", type=Path, default=None, help="folder for the JSON file")
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    names = ("images", "seconds", "time", "repair_time", "train", "epochs")
    settings = {name: getattr(arguments, name) for name in names}
    results = Results("quant_fragile", settings, arguments.results)
    keys = [
        f"{name}/{part}"
        for part in arguments.parts
        for name in arguments.only
        if part != "qat" or name == "cifar10_resnet20"
    ]
    results.run(keys, lambda key, folder: run_one(key, arguments, folder))
    console = Console(width=180)
    for key, entry in results.document["entries"].items():
        print_entry(key, entry, console)


if __name__ == "__main__":
    main()
