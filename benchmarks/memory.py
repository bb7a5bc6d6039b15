"""Peak memory of activations: estimates against the runtimes' own figures, and patches.

    python -m benchmarks.memory                      # all networks of the zoo
    python -m benchmarks.memory --only resnet18      # some
    python -m benchmarks.memory --only patches_160   # MobileNetV2's first stage in patches

For each network in float32, and in int8 where that is quick: the ideal of the graph (what an
interpreter with an arena needs), the estimate from each runtime's graph, and what the runtime
itself says. Weights are random and nothing is timed.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import SHARED, Results
from benchmarks.zoo import ONNX, TORCHVISION, _int8_model, _pinned, network
from compress.data import load_data
from compress.export import to_onnx
from compress.liveness import peak
from compress.loading import load
from compress.memory.engines import engine_peak
from compress.memory.execution import Patched
from compress.memory.inspection import model_memory
from compress.memory.packing import arena
from compress.memory.proof import prove
from compress.memory.splitting import table_of
from compress.memory.tracing import measured_stage, stage_program
from compress.model import Model, TensorSpec
from compress.target import MemoryMeasured, Scheduled, Target
from targets.cpu import CPU
from targets.executorch import ExecuTorch
from targets.onnxruntime import OnnxRuntime
from targets.openvino import OpenVINO

INT8 = ("mobilenet_v2", "resnet18", "mobilenet_v3_small", "shufflenet_v2_x1_0", "squeezenet1_1")
"""Networks that are quantized too; calibration of the others takes minutes."""
EXECUTORCH = ("mobilenet_v2", "resnet18", "squeezenet1_1")
PATCHES = ("patches_160", "patches_224")
GOAL = 0.1
"""Relative difference between estimate and account that is aimed at."""


def run_one(name: str, folder: Path) -> dict[str, Any]:
    """Figures of one network, or of the patches of one image size."""
    if name in PATCHES:
        return _patches(int(name.rpartition("_")[2]))
    exported, images = _exported(name)
    entry: dict[str, Any] = {"ideal": {}, "float32": {}}
    for label, reading in (("float32", "as written"), ("int8", "int8")):
        entry["ideal"][label] = model_memory(exported.graph_model, reading).to_dict()  # type: ignore[arg-type]
    targets: list[Target] = [OnnxRuntime(threads=1), OpenVINO(threads=1)]
    if name in EXECUTORCH:
        targets.append(ExecuTorch(threads=1))
    for target in targets:
        entry["float32"][target.name] = _compare(target, exported, exported)
    if name in INT8:
        entry["int8"] = {}
        for target in (OnnxRuntime(threads=1), OpenVINO(threads=1)):
            data = load_data(images[:2], exported.inputs)
            narrow = _int8_model(exported, data, target, 2)  # type: ignore[arg-type]
            entry["int8"][target.name] = _compare(target, narrow, exported)
    return entry


def _exported(name: str) -> tuple[Model, Any]:
    opset = CPU(threads=1).capabilities.opset
    if name in TORCHVISION:
        module, images = network(name)
        spec = TensorSpec("x", ("batch", 3, 224, 224))
        return to_onnx(Model(module, (spec,), name), opset), images
    path = SHARED / "models" / f"{name}.onnx"
    return to_onnx(load(path, inputs=_pinned(name)), opset), None


def _cause(alive: int, packed: int, account: int) -> str:
    """Why a runtime takes another amount than is alive at once."""
    if abs(packed / account - 1) <= GOAL:
        return (
            f"{alive} bytes are alive at once; laid out in one block, the largest tensors first, "
            f"they need {packed}, which the runtime takes too: the rest lies idle between them."
        )
    return f"{alive} bytes are alive at once by the graph; the rest has not been explained."


def _compare(target: Target, model: Model, exported: Model) -> dict[str, Any]:
    """Estimate and account of one runtime, in bytes."""
    try:
        engine = target.build(model)
        program = engine.schedule() if isinstance(engine, Scheduled) else None
        found = engine_peak(engine)
        account = None
        if isinstance(engine, MemoryMeasured):
            account = engine.memory_in_use(exported.example(1))
    except Exception as error:
        return {"error": str(error)[:300]}
    entry: dict[str, Any] = {"runtime_bytes": account}
    if found is not None and program is not None:
        entry |= {
            "estimated_bytes": found.bytes,
            "arena_bytes": arena(program).bytes,
            "operator": found.step,
            "op_type": found.op_type,
            "tensors": [list(one) for one in found.alive[:4]],
        }
        if account:
            entry["estimate_over_runtime"] = found.bytes / account
            entry["within_goal"] = abs(found.bytes / account - 1) <= GOAL
            if not entry["within_goal"]:
                entry["cause"] = _cause(found.bytes, entry["arena_bytes"], account)
    return entry


def _patches(size: int) -> dict[str, Any]:
    """MobileNetV2's first stage: peaks, cost, and the proof in torch."""
    module, images = network("mobilenet_v2")
    spec = TensorSpec("x", (1, 3, size, size))
    graph_model = to_onnx(Model(module, (spec,), "mobilenet_v2"), 21).graph_model
    table = table_of(graph_model)
    entry: dict[str, Any] = {"table": table.to_dict(), "splits": {}}
    image = torch.from_numpy(images[:1, :, :size, :size].copy())
    for row in table.rows:
        patched = Patched(graph_model, row.split, row.tensor)
        proof = prove(patched, image)
        entry["splits"][str(row.split)] = {
            "identical_on_whole_numbers": proof.identical,
            "largest_sum": proof.largest_sum,
            "float32_difference": proof.float32,
            "float64_difference": proof.float64,
            "stage_bytes_in_torch": measured_stage(patched, image),
            "stage_bytes_expected": peak(stage_program(patched)).bytes,
        }
    return entry


def main() -> None:
    """Run what is not in the results yet."""
    names = [*TORCHVISION, *ONNX, *PATCHES]
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", default=names)
    parser.add_argument("--results", type=Path, default=None, help="folder for memory.json")
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    results = Results("memory", {"batch": 1, "threads": 1, "goal": GOAL}, arguments.results)
    results.run(arguments.only, run_one)
    for name in arguments.only:
        print(summary(name, results.document["entries"][name]))


def summary(name: str, entry: dict[str, Any]) -> str:
    """One line for the terminal."""
    if "error" in entry:
        return f"{name}: {entry['error']}"
    if "table" in entry:
        rows = [
            f"{r['split']}: {r['int8']['bytes']}, +{r['overhead']:.1%}"
            for r in entry["table"]["rows"]
        ]
        return f"{name}: int8 {entry['table']['int8']['bytes']} whole; patches {'; '.join(rows)}"
    cells = [
        f"{runtime} {precision} {found.get('estimate_over_runtime', float('nan')):.3f}"
        for precision in ("float32", "int8")
        for runtime, found in entry.get(precision, {}).items()
    ]
    return f"{name}: estimate / runtime: {', '.join(cells)}"


if __name__ == "__main__":
    main()
