"""How well latency is estimated: four classes of estimates on networks that none of them has seen.

    python -m benchmarks.predictor                        # ONNX Runtime, one thread, ~45 minutes
    python -m benchmarks.predictor --target openvino --name predictor_openvino

Thirty ResNet-56 (CIFAR-10, 32x32) and MobileNetV2 (96x96 pixels), every layer of a random width,
random weights, each in float32 and int8: 60 unseen networks. The predictor learns from random
networks of its own for 15 minutes; it is given none of these. What is true is the median of three
measurements, each in a session of its own: before the predictor is built, half way, and after, so
that a clock which sinks hurts both alike; all networks take turns in each.

Beside the four classes stand a line through MACs and one through activations (the outputs of
all convolutions; arXiv 2103.06877), fitted to the networks themselves with one left out at a time,
so they know more of the task than any of the classes does.
"""

from __future__ import annotations

import argparse
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table as RichTable

from benchmarks.common import Results
from compress.estimate import build_predictor, cached_peaks, latency, place
from compress.estimate.build import figures
from compress.estimate.graphs import Network, Tensor, quantized
from compress.estimate.held import roofline_ratios, table_ratios
from compress.estimate.predictor import default_path, load_predictor
from compress.estimate.table import Table
from compress.graph import graph_sites
from compress.latency import measure
from compress.model import Model
from compress.progress import terminal
from compress.registry import create_target
from compress.target import Target

CLASSES = ("table", "predicted", "analytical")
ROUNDS = 3
SEED = 7_000_000
"""Far from the seeds of the random networks that the predictor learns from."""


def resnet56(rng: np.random.Generator, name: str, opset: int) -> Model:
    """ResNet-56 of He et al. 2016 for CIFAR; every convolution keeps 25 % to 100 % of its width."""
    network = Network((1, 3, 32, 32), opset, name)
    stages = [_width(rng, base, 0.25) for base in (16, 32, 64)]
    x = network.relu(network.conv(network.start, stages[0]))
    for stage, out in enumerate(stages):
        for block in range(9):
            stride = 2 if stage and not block else 1
            inner = _width(rng, (16, 32, 64)[stage], 0.25)
            y = network.conv(network.relu(network.conv(x, inner, 3, stride)), out)
            if x.shape != y.shape:
                x = network.conv(x, out, 1, stride)
            x = network.relu(network.binary("Add", y, x))
    return _classifier(network, x, 10)


def mobilenet_v2(rng: np.random.Generator, name: str, opset: int) -> Model:
    """MobileNetV2 of Sandler et al. 2018 at 96x96; 35 % to 100 % wide, expansions of 2 to 6."""
    network = Network((1, 3, 96, 96), opset, name)
    x = network.relu6(network.conv(network.start, _width(rng, 32, 0.35), 3, 2))
    for expands, base, blocks, first in (
        (False, 16, 1, 1),
        (True, 24, 2, 2),
        (True, 32, 3, 2),
        (True, 64, 4, 2),
        (True, 96, 3, 1),
        (True, 160, 3, 2),
        (True, 320, 1, 1),
    ):
        out = _width(rng, base, 0.35)
        for block in range(blocks):
            y = x
            if expands:
                inner = max(8, round(x.shape[1] * float(rng.uniform(2, 6))))
                y = network.relu6(network.conv(x, inner, 1))
            stride = first if not block else 1
            y = network.relu6(network.conv(y, y.shape[1], 3, stride, y.shape[1]))
            y = network.conv(y, out, 1)
            x = network.binary("Add", y, x) if x.shape == y.shape else y
    x = network.relu6(network.conv(x, _width(rng, 1280, 0.35), 1))
    return _classifier(network, x, 100)


def _width(rng: np.random.Generator, base: int, least: float) -> int:
    return max(4, round(base * float(rng.uniform(least, 1.0))))


def _classifier(network: Network, x: Tensor, classes: int) -> Model:
    return network.model(network.linear(network.flatten(network.global_pool(x)), classes))


def unseen(target: Target, count: int) -> dict[str, Model]:
    """`count` of each family in float32 and in int8, by name."""
    found = {}
    for family in (resnet56, mobilenet_v2):
        for index in range(count):
            name = f"{family.__name__} {index}"
            rng = np.random.default_rng(SEED + index)
            model = family(rng, name, target.capabilities.opset)
            found[f"{name} float32"] = model
            found[f"{name} int8"] = quantized(model, target)
    return found


def measure_all(target: Target, models: dict[str, Model], seconds: float) -> dict[str, float]:
    """Median milliseconds of every network, all of them in turns in this session."""
    calls: dict[str, Callable[[], object]] = {}
    for name, model in models.items():
        engine, inputs = target.build(model), model.example()
        calls[name] = lambda engine=engine, inputs=inputs: engine(inputs)
    found = measure(calls, seconds=seconds, min_blocks=10, progress=terminal)
    return {name: timing.p50_ms for name, timing in found.timings.items()}


def estimate_all(target: Target, models: dict[str, Model], source: str) -> dict[str, Any]:
    """Estimates by network, and what they cost."""
    found: dict[str, Any] = {}
    predictor = load_predictor(default_path(target), target) if source == "predicted" else None
    for name, model in models.items():
        start = time.perf_counter()
        one = latency(model, target, source, predictor=predictor)
        found[name] = {
            "ms": one.median_ms,
            "low_ms": one.low_ms,
            "high_ms": one.high_ms,
            "coverage": one.coverage,
            "seconds": time.perf_counter() - start,
            "outside": list(one.outside),
            "source": str(one.source),
        }
    return found


def proxies(models: dict[str, Model]) -> dict[str, dict[str, float]]:
    """MACs and activations (elements that convolutions write) of each network."""
    found = {}
    for name, model in models.items():
        sites = graph_sites(model.graph_model)
        convolutions = [site for site in sites if site.op_type == "Conv"]
        found[name] = {
            "macs": float(sum(site.macs for site in sites)),
            "activations": float(sum(np.prod(site.output) for site in convolutions)),
        }
    return found


def fitted_line(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Predictions of y = a x + b, each from all other points; relative errors are minimised."""
    found = np.empty(len(x))
    for i in range(len(x)):
        kept = np.arange(len(x)) != i
        terms = np.stack([x[kept], np.ones(kept.sum())], 1) / y[kept, None]
        a, b = np.linalg.lstsq(terms, np.ones(kept.sum()), rcond=None)[0]
        found[i] = max(a * x[i] + b, 1e-6)
    return found


def summarise(results: Results) -> dict[str, Any]:
    """Errors of every class on all networks, by family and precision, with costs."""
    entries = results.document["entries"]
    rounds = [entries[f"measured {k}"]["ms"] for k in range(ROUNDS)]
    names = list(rounds[0])
    each = np.array([[one[name] for name in names] for one in rounds])
    true = np.median(each, 0)
    estimates = {
        kind: np.array([entries[kind]["networks"][name]["ms"] for name in names])
        for kind in CLASSES
    }
    # One session against the median of the others: what measuring once is worth.
    estimates["measured"] = each[0]
    others = {"measured": np.median(each[1:], 0)}
    int8 = np.array(["int8" in name for name in names])
    for proxy in ("macs", "activations"):
        x = np.array([entries["proxies"][name][proxy] for name in names])
        line = np.empty(len(names))
        for chosen in (int8, ~int8):
            line[chosen] = fitted_line(x[chosen], true[chosen])
        estimates[f"{proxy}, fitted line"] = line
    groups = {"all": np.ones(len(names), bool)}
    for family in ("resnet56", "mobilenet_v2"):
        for precision in ("float32", "int8"):
            groups[f"{family} {precision}"] = np.array(
                [name.startswith(family) and name.endswith(precision) for name in names]
            )
    summary: dict[str, Any] = {
        kind: {
            group: figures(found[chosen], others.get(kind, true)[chosen])
            for group, chosen in groups.items()
        }
        for kind, found in estimates.items()
    }
    for kind in CLASSES:
        rows = [entries[kind]["networks"][name] for name in names]
        inside = [r["low_ms"] <= t <= r["high_ms"] for r, t in zip(rows, true, strict=True)]
        summary[kind] |= {
            "inside_the_interval": float(np.mean(inside)),
            "promised": float(np.mean([row["coverage"] for row in rows])),
            "setup_seconds": entries[kind]["setup_seconds"],
            "query_seconds": float(np.median([row["seconds"] for row in rows])),
            "with_kernels_outside": sum(bool(row["outside"]) for row in rows),
        }
    summary["measured"]["query_seconds"] = entries["measured 0"]["seconds"] / len(names)
    summary["sessions_differ_by"] = float(np.median(each.max(0) / each.min(0) - 1))
    summary["rounds_differ_by"] = [float(np.median(one / true - 1)) for one in each]
    return summary


def show(summary: dict[str, Any], console: Console) -> None:
    """The table."""
    table = RichTable()
    for header in ("estimate", "networks", "within 5%", "within 10%", "MAPE", "Spearman"):
        table.add_column(header, justify="left" if header in ("estimate", "networks") else "right")
    for kind, groups in summary.items():
        if not isinstance(groups, dict):
            continue
        for name, row in groups.items():
            if isinstance(row, dict):
                table.add_row(
                    kind,
                    f"{name} ({row['n']})",
                    f"{row['within_5']:.0%}",
                    f"{row['within_10']:.0%}",
                    f"{row['mape']:.1%}",
                    f"{row['spearman']:.3f}" if row["spearman"] is not None else "",
                )
    console.print(table)
    for kind in CLASSES:
        one = summary[kind]
        console.print(
            f"{kind}: {one['setup_seconds']:.0f} s before the first query, "
            f"{one['query_seconds'] * 1e3:.0f} ms each; {one['inside_the_interval']:.0%} of the "
            f"networks inside the interval (promised {one['promised']:.0%}).",
            highlight=False,
        )
    console.print(f"Sessions of one network differ by {summary['sessions_differ_by']:.1%}.")


def timed(make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What it makes, with the seconds that it took."""
    start = time.perf_counter()
    made = make()
    return {**made, "seconds": time.perf_counter() - start}


def run(arguments: argparse.Namespace) -> None:
    settings = {
        "target": arguments.target,
        "threads": 1,
        "networks": arguments.networks,
        "minutes": arguments.minutes,
        "seconds": arguments.seconds,
    }
    results = Results(arguments.name, settings, arguments.folder)
    # A cache of its own, and empty at first: nothing that was measured before is counted as free.
    place.CACHE = Path(f"~/.cache/hwcompress/benchmarks/{arguments.name}").expanduser()
    if not results.document["entries"]:
        shutil.rmtree(place.CACHE, ignore_errors=True)
    target = create_target(arguments.target, threads=1)
    models = unseen(target, arguments.networks)

    def step(key: str, make: Callable[[], dict[str, Any]]) -> None:
        if key not in results:
            print(f"== {key}", flush=True)
            results.add(key, make())

    def measured() -> dict[str, Any]:
        return timed(lambda: {"ms": measure_all(target, models, arguments.seconds)})

    def build(minutes: float) -> dict[str, Any]:
        predictor = build_predictor(target, minutes=minutes, progress=terminal)
        predictor.save(default_path(target))
        return {"report": dict(predictor.report)}

    step("proxies", lambda: dict(proxies(models)))
    step("measured 0", measured)
    step("peaks", lambda: timed(lambda: cached_peaks(target, progress=terminal).to_dict()))
    step("half built", lambda: build(arguments.minutes / 2))
    step("measured 1", measured)
    step("built", lambda: build(arguments.minutes))
    step("predicted", lambda: _class(target, models, "predicted", results))
    step("analytical", lambda: _class(target, models, "analytical", results))
    step("measured 2", measured)
    step("table", lambda: _class(target, models, "table", results))
    results.add("summary", summarise(results))
    show(results.document["entries"]["summary"], Console())


def _class(
    target: Target, models: dict[str, Model], source: str, results: Results
) -> dict[str, Any]:
    """Estimates of one class, with what had to be done before."""
    start = time.perf_counter()
    if source == "analytical":
        roofline_ratios(target, cached_peaks(target), terminal)
    elif source == "table":
        table_ratios(target, Table.open(target), terminal)
    setup = time.perf_counter() - start
    entries = results.document["entries"]
    if source == "analytical":
        setup += entries["peaks"]["seconds"]
    elif source == "predicted":
        setup = float(entries["built"]["report"]["seconds"])
    return {"networks": estimate_all(target, models, source), "setup_seconds": setup}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--target", default="onnxruntime")
    parser.add_argument("--name", default="predictor")
    parser.add_argument("--networks", type=int, default=15, help="of each family")
    parser.add_argument("--minutes", type=float, default=15.0, help="to build the predictor")
    parser.add_argument(
        "--seconds", type=float, default=120.0, help="of each of three measurements"
    )
    parser.add_argument("--folder", type=Path, default=None, help="of the results")
    run(parser.parse_args(arguments))


if __name__ == "__main__":
    main()
