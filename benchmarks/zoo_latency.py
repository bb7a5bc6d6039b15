"""`compress run --target cpu` on the torchvision zoo, beside the other tools, in one measurement.

    python -m benchmarks.zoo_latency                                   # one thread, batch 1
    python -m benchmarks.zoo_latency --throughput                      # two threads, batch 8
    ONEDNN_MAX_CPU_ISA=AVX2 python -m benchmarks.zoo_latency --name zoo_latency_avx2

Networks have random weights and live BatchNorm statistics, since what is measured is speed.
ratio = time of the peer / time of ours, so above 1 ours is faster; every engine is built anew in
each of three sessions, and all are timed interleaved in one process.
"""

from __future__ import annotations

import argparse
import logging
import math
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.common import Results
from benchmarks.peers import ORT_FLOAT, ORT_INT8, OV_INT8, OV_QDQ, OV_WIDE, peers
from benchmarks.zoo import TORCHVISION, network
from compress import pipeline
from compress.artifact import load as load_artifact
from compress.data import load_data
from compress.export import to_onnx
from compress.loading import load
from compress.progress import silent
from compress.registry import create_target
from compress.sessions import measure_sessions
from compress.workload import make_workload

OURS = "ours"
PEERS = (ORT_FLOAT, ORT_INT8, OV_WIDE, OV_INT8)
"""One documented call each; OpenVINO reading the file of ONNX Runtime's tool is shown beside."""
THROUGHPUT = (
    "resnet18",
    "mobilenet_v2",
    "mobilenet_v3_large",
    "efficientnet_b0",
    "regnet_y_400mf",
    "squeezenet1_1",
)
TRANSFORMERS = ("vit_b_16", "swin_t")
NOISE = 0.02


def run_one(name: str, arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Figures of one network."""
    module, images = network(name)
    threads, batch = (2, 8) if arguments.throughput else (1, 1)
    objective = "throughput" if arguments.throughput else "latency"
    shape = "batchx3x224x224" if arguments.throughput else "1x3x224x224"
    calibration = images[: arguments.samples]
    exported = to_onnx(load(module, inputs=[shape]), 21)
    start = time.perf_counter()
    result = pipeline.run(
        module,
        inputs=[shape],
        calibration=calibration,
        threads=threads,
        batch=batch,
        objective=objective,
        samples=arguments.samples,
        search_seconds=arguments.time,
        out=folder / "artifact",
    )
    report = result.report
    entry: dict[str, Any] = {
        "artifact": report.chosen,
        "settings": report.target["options"],
        "headline": list(report.headline),
        "wall_seconds": time.perf_counter() - start,
        "run_seconds": dict(report.seconds),
        "tried": list(report.tried),
        "regions": list(report.regions),
    }
    data = load_data(calibration, exported.inputs)
    batches = [dict(one.inputs) for one in data.batches(1)]
    streams = threads if arguments.throughput else 1
    builders, errors = peers(
        exported, batches, threads=threads, streams=streams, transformer=name in TRANSFORMERS
    )
    ours = create_target(report.target["name"], **report.target["options"])
    builders[OURS] = lambda: (load_artifact(folder / "artifact"), ours)
    workload = make_workload(exported, data, batch=batch, objective=objective, threads=threads)

    def build() -> dict[str, Any]:
        calls = {}
        for label in (OURS, *PEERS, OV_QDQ):
            if label in builders and label not in errors:
                try:
                    calls[label] = workload.call(*builders[label]())
                    calls[label]()
                except Exception as error:  # a peer that fails must not hide the others
                    calls.pop(label, None)
                    errors[label] = str(error)[:300]
        return calls

    comparison = measure_sessions(
        build, seconds=arguments.seconds, requests=workload.requests, progress=silent
    )
    entry["errors"] = errors
    entry["latency"] = comparison.to_dict()
    # The comparison's ratios are ours / peer; people ask for peer / ours.
    entry["peer_over_ours"] = {
        label: {"value": 1 / r.value, "low": 1 / r.high, "high": 1 / r.low}
        for label, r in comparison.ratios.items()
    }
    return entry


def summary(entries: dict[str, Any], console: Console) -> None:
    """The table, and whether the aims are reached."""
    table = Table()
    columns = (*PEERS, OV_QDQ)
    for header in ("network", "artifact", "ours, ms", *columns, "against the fastest", "wall, s"):
        table.add_column(header, justify="left" if header in ("network", "artifact") else "right")
    fastest: dict[str, float] = {}
    for name, entry in entries.items():
        if "error" in entry:
            table.add_row(name, entry["error"][:60])
            continue
        ratios = entry["peer_over_ours"]
        fastest[name] = min(ratios[peer]["value"] for peer in PEERS if peer in ratios)
        table.add_row(
            name,
            entry["artifact"],
            f"{entry['latency']['timings'][OURS]['p50_ms']:.2f}",
            *(f"{ratios[p]['value']:.2f}" if p in ratios else "failed" for p in columns),
            f"{fastest[name]:.2f}",
            f"{entry['wall_seconds']:.0f}",
        )
    console.print(table)
    for peer in columns:
        values = [
            e["peer_over_ours"][peer]["value"]
            for e in entries.values()
            if peer in e.get("peer_over_ours", {})
        ]
        if values:
            mean = math.exp(sum(map(math.log, values)) / len(values))
            console.print(f"{peer} / ours, geometric mean of {len(values)}: {mean:.2f}")
    behind = [name for name, value in fastest.items() if value < 1 - NOISE]
    ahead = [name for name, value in fastest.items() if value > 1.05]
    console.print(
        f"behind the fastest peer by more than {NOISE:.0%}: {', '.join(behind) or 'none'}"
    )
    console.print(f"5 % ahead of the fastest peer: {len(ahead)} of {len(fastest)}")


def main() -> None:
    """Run what is not in the results yet, then print all of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", default=None)
    parser.add_argument("--throughput", action="store_true", help="batch 8, two threads, six nets")
    parser.add_argument("--seconds", type=float, default=15.0, help="of the common measurement")
    parser.add_argument("--time", type=float, default=60.0, help="of the search for placements")
    parser.add_argument("--samples", type=int, default=16, help="calibration images")
    parser.add_argument("--name", default=None, help="of the results file")
    parser.add_argument("--results", type=Path, default=None, help="folder for the results")
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    settings = {
        "seconds": arguments.seconds,
        "samples": arguments.samples,
        "search_seconds": arguments.time,
        "objective": "throughput" if arguments.throughput else "latency",
    }
    default = "zoo_throughput" if arguments.throughput else "zoo_latency"
    results = Results(arguments.name or default, settings, arguments.results)
    names = arguments.only or (THROUGHPUT if arguments.throughput else TORCHVISION)
    results.run(names, lambda name, folder: run_one(name, arguments, folder))
    summary(results.document["entries"], Console(width=200))


if __name__ == "__main__":
    main()
