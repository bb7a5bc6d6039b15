"""int8 on the CIFAR-10 ResNet-20 and ResNet-56, beside ONNX Runtime's quantizer and NNCF.

    python -m benchmarks.cifar_ptq                        # both networks, 10,000 test images
    python -m benchmarks.cifar_ptq --images 500 --seconds 2

Every method gets the same 512 training images and the same float graph. Accuracy is measured in
the runtime that is timed, at one thread; all latencies of one network are measured interleaved
in one process, at batch 1. `quantize_static` and NNCF's ONNX backend get the graph after ONNX
Runtime's own pre-processing, which folds BatchNorm as they need it. OpenVINO's models have a
static batch of 1, its fastest form. The rows "OpenVINO" are references for speed; "default" may
compute in bfloat16 where the CPU has it.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import logging
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from onnxruntime.quantization.shape_inference import quant_pre_process
from rich.console import Console
from rich.table import Table

from benchmarks.common import Results, shared_module
from benchmarks.peers import nncf_openvino
from benchmarks.zoo import quantize_with_onnxruntime
from compress.data import Data, load_data
from compress.export import to_onnx
from compress.latency import measure
from compress.loading import load
from compress.metrics import Accuracy, paired_drop, top1
from compress.model import Model, TensorSpec
from compress.passes import Context
from compress.recipe import default_passes
from compress.target import Engine
from targets.cpu import CPU
from targets.openvino import OpenVINO
from targets.openvino_engine import CompileSettings, OpenVinoEngine

NETWORKS = ("cifar10_resnet20", "cifar10_resnet56")
METHODS = ("minmax", "percentile", "mse", "entropy")
DEFAULT_METHOD = "mse"
CALIBRATION_IMAGES = 512
FLOAT = "ORT float32"
OURS = f"ours int8 {DEFAULT_METHOD} (default)"
LARGEST_DROP_POINTS, SMALLEST_SPEEDUP = 0.3, 1.9


@dataclass(frozen=True)
class Row:
    """One way to run the network: `quantize` is timed, `build` makes an engine of its result."""

    quantize: Callable[[], Any]
    build: Callable[[Any], Any]


def openvino_engine(model: Any, inputs: tuple[TensorSpec, ...], precision: Any) -> Engine:
    """OpenVINO's model compiled for latency on one thread."""
    settings = CompileSettings(threads=1, precision=precision)
    return OpenVinoEngine(f"OpenVINO {precision}", model, inputs, settings)


def rows(exported: Model, data: Data, folder: Path) -> dict[str, Row]:
    """Every row of the table, the baseline first."""
    build = CPU(threads=1).build
    batches = [dict(batch.inputs) for batch in data.batches(1)]
    source = folder / "exported.onnx"
    ir.save(exported.graph_model, source)
    table = {FLOAT: Row(lambda: exported, build)}
    for method in METHODS:
        label = OURS if method == DEFAULT_METHOD else f"ours int8 {method}"
        table[label] = Row(partial(ours, exported, data, method), build)
    theirs = partial(quantize_with_onnxruntime, exported, batches, folder)
    table["ORT quantize_static"] = Row(theirs, build)
    table["NNCF ONNX"] = Row(partial(nncf_onnx, source, batches), build)
    compiled = partial(openvino_engine, inputs=exported.inputs, precision="float32")
    wide = "bfloat16" if "bfloat16" in OpenVINO().capabilities.precisions else "float32"
    table["NNCF OpenVINO"] = Row(partial(nncf_openvino, exported, batches, False), compiled)
    read = partial(read_openvino, source)
    table["OpenVINO default"] = Row(read, partial(compiled, precision=wide))
    table["OpenVINO float32"] = Row(read, compiled)
    return table


def ours(exported: Model, data: Data, method: str) -> Model:
    """What `compress run` makes of the exported model."""
    context = Context(target=CPU(threads=1), original=exported, calibration=data)
    model = dataclasses.replace(exported, program=exported.graph_model.clone())
    for step in default_passes(method=method, samples=CALIBRATION_IMAGES):
        model = step.apply(model, context)
    return model


def nncf_onnx(source: Path, batches: list[dict[str, np.ndarray]]) -> Model:
    """NNCF's defaults on the ONNX graph."""
    import nncf

    prepared, result = source.with_name("nncf_prepared.onnx"), source.with_name("nncf.onnx")
    quant_pre_process(str(source), str(prepared), skip_symbolic_shape=True)
    quantized = nncf.quantize(
        onnx.load(prepared), nncf.Dataset(batches), subset_size=CALIBRATION_IMAGES
    )
    onnx.save(quantized, result)
    return load(result)


def read_openvino(source: Path) -> Any:
    """OpenVINO's graph of an ONNX file."""
    import openvino as ov

    return ov.Core().read_model(source)


def run_one(name: str, images: int, seconds: float, folder: Path) -> dict[str, Any]:
    """Figures of one network."""
    cifar10 = shared_module("data/load.py").cifar10
    network = shared_module("models/zoo.py").load(name)
    target = CPU(threads=1)
    original = load(network, inputs=["1x3x32x32"])
    exported = to_onnx(original, target.capabilities.opset)
    data = load_data(cifar10("train", CALIBRATION_IMAGES)[0], exported.inputs)
    test = load_data(cifar10("test", images), exported.inputs)
    entry: dict[str, Any] = {"rows": {}}
    engines: dict[str, Any] = {}
    before: Accuracy | None = None
    for label, row in rows(exported, data, folder).items():
        print(f"   {label}", flush=True)
        figures: dict[str, Any] = {}
        entry["rows"][label] = figures
        try:
            with contextlib.redirect_stdout(None):
                start = time.perf_counter()
                made = row.quantize()
                figures["quantize_seconds"] = time.perf_counter() - start
                engine = row.build(made)
            accuracy = top1(engine, test)
            figures["size_bytes"] = _size(engine)
        except Exception as error:  # one method that fails must not hide the others
            traceback.print_exc()
            entry["rows"][label] = {"error": f"{type(error).__name__}: {error}"[:500]}
            continue
        before = before or accuracy
        engines[label] = engine
        figures["top1"] = accuracy.to_dict()
        figures["drop"] = dataclasses.asdict(paired_drop(before, accuracy))
        if isinstance(engine, OpenVinoEngine):
            figures["precision"] = engine.settings.precision
    first = dict(next(iter(test.batches(1))).inputs)
    comparison = measure(
        {label: partial(engine, first) for label, engine in engines.items()}, seconds=seconds
    )
    entry["latency"] = comparison.to_dict()
    return entry


def _size(engine: Any) -> int:
    with tempfile.TemporaryDirectory() as folder:
        return sum(path.stat().st_size for path in engine.save(Path(folder)))


def print_table(name: str, entry: dict[str, Any], console: Console) -> None:
    """The rows of one network and whether ours reach the aims."""
    table = Table(title=name)
    table.add_column(no_wrap=True)
    for header in ("top-1", "drop, points", "size", "latency, ms", "speed-up", "made in"):
        table.add_column(header, justify="right", no_wrap=True)
    latency = entry["latency"]
    for label, row in entry["rows"].items():
        if "error" in row:
            table.add_row(label, "failed")
            continue
        drop, timing = row["drop"], latency["timings"][label]
        ratio = latency["ratios"].get(label)
        table.add_row(
            f"{label} ({row['precision']})" if "precision" in row else label,
            f"{row['top1']['value']:.2%}",
            f"{drop['points']:+.2f} [{drop['low']:+.2f}, {drop['high']:+.2f}]",
            f"{row['size_bytes'] / 1e6:.2f} MB",
            f"{timing['p50_ms']:.3f} [{timing['low_ms']:.3f}, {timing['high_ms']:.3f}]",
            f"{ratio['value']:.2f} [{ratio['low']:.2f}, {ratio['high']:.2f}]" if ratio else "",
            f"{row['quantize_seconds']:.1f} s",
        )
    console.print(table)
    for label, row in entry["rows"].items():
        if "error" in row:
            console.print(f"{label}: {row['error']}")
    for note in latency["notes"]:
        console.print(note)
    console.print(verdict(entry))


def verdict(entry: dict[str, Any]) -> str:
    """Whether the default reaches both aims."""
    row = entry["rows"][OURS]
    if "error" in row:
        return f"{OURS} failed: {row['error']}"
    drop, speedup = row["drop"]["points"], entry["latency"]["ratios"][OURS]["value"]
    return (
        f"{OURS}: drop {drop:+.2f} points (aim at most {LARGEST_DROP_POINTS}: "
        f"{_reached(drop <= LARGEST_DROP_POINTS)}), speed-up {speedup:.2f} (aim at least "
        f"{SMALLEST_SPEEDUP}: {_reached(speedup >= SMALLEST_SPEEDUP)})"
    )


def _reached(yes: bool) -> str:
    return "reached" if yes else "missed"


def main() -> None:
    """Run what is not in the results yet, then print all of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", default=NETWORKS, choices=NETWORKS)
    parser.add_argument("--images", type=int, default=10_000, help="test images")
    parser.add_argument("--seconds", type=float, default=20.0, help="of the latency measurement")
    parser.add_argument("--results", type=Path, default=None, help="folder for cifar_ptq.json")
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    settings = {
        "images": arguments.images,
        "calibration_images": CALIBRATION_IMAGES,
        "seconds": arguments.seconds,
        "threads": 1,
    }
    results = Results("cifar_ptq", settings, arguments.results)
    for name in arguments.only:
        if name in results:
            continue
        print(f"== {name}", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            results.add(name, run_one(name, arguments.images, arguments.seconds, Path(folder)))
    console = Console(width=150)
    for name in arguments.only:
        print_table(name, results.document["entries"][name], console)


if __name__ == "__main__":
    main()
