"""What `compress explain` says of models of three tools, and whether it is right.

    taskset -c 0 python -m benchmarks.explain

mobilenet_v3_small  by onnxruntime's quantize_static after its own pre-processing
kws_dscnn           by NNCF's ONNX backend, called on the exported file
cifar10_resnet20    by `compress run --target onnxruntime`

Each is explained against its float original in ONNX Runtime (ours in the artifact's own runtime).
Then the explanation is checked by means that it does not use: the optimized graph that ONNX
Runtime writes is counted, the advice is taken, and the result is timed beside the model that was
explained, in several sessions: what came back stands beside what was predicted. Weights of
mobilenet_v3_small are random, its BatchNorm statistics live; only its speed matters here.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import tempfile
from collections import Counter
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
from onnxruntime.quantization.shape_inference import quant_pre_process

import compress.estimate.place
from benchmarks.common import Results, shared_module
from benchmarks.trained import samples
from benchmarks.zoo import network, quantize_with_onnxruntime
from compress import pipeline
from compress.explaining import Explanation
from compress.explaining.explain import explain
from compress.export import to_onnx
from compress.loading import load
from compress.model import Model
from compress.progress import terminal
from compress.sessions import measure_sessions
from targets.onnxruntime import OPSET, OnnxRuntime

SCALES = "scale per channel"


def mobilenet(folder: Path, seconds: float) -> dict[str, Any]:
    """Onnxruntime's quantizer on MobileNetV3."""
    module, images = network("mobilenet_v3_small")
    exported = to_onnx(load(module, inputs=["1x3x224x224"]), OPSET)
    batches = [{exported.inputs[0].name: image[None]} for image in images[:16]]
    original = save(exported, folder / "float.onnx")
    theirs = save(quantize_with_onnxruntime(exported, batches, folder), folder / "theirs.onnx")
    found = told(theirs, original, seconds)
    nodes = optimized(theirs)
    checks: dict[str, Any] = {
        "optimized graph": dict(nodes),
        "conversions in the graph": nodes["QuantizeLinear"] + nodes["DequantizeLinear"],
        "conversions in the lines": sum(line.kind == "convert" for line in found.lines),
        "float HardSigmoid in the graph": nodes["HardSigmoid"],
        "float HardSigmoid in the lines": count_float(found, "HardSigmoid"),
    }
    slower = [one for one in found.findings if one.kind == "slower"]
    for finding in slower:
        sites = finding.numbers["gaining"]
        if not sites:
            continue
        advised = quantize_with_onnxruntime(exported, batches, folder, sites)
        path = save(advised, folder / "advised.onnx")
        checks[f"{len(sites)} sites in float: {', '.join(sites)}"] = {
            "predicted_us": finding.numbers["predicted_gain_us"],
            **came_back(theirs, path, seconds),
        }
    ours = save(our_int8(exported, batches), folder / "ours.onnx")
    idle = [one.us for one in found.findings if one.kind in ("conversions", "idle conversion")]
    own = [one.us for one in found.findings if one.kind == "own kernels"]
    checks["`compress run`'s int8 form, without those conversions and gates"] = {
        "predicted_us": sum(idle) + sum(own),
        "conversions in its graph": optimized(ours)["QuantizeLinear"]
        + optimized(ours)["DequantizeLinear"],
        **came_back(theirs, ours, seconds),
    }
    return {"explanation": summary(found), "checks": checks}


def keywords(folder: Path, seconds: float) -> dict[str, Any]:
    """NNCF's ONNX backend on DS-CNN."""
    module = shared_module("models/zoo.py").load("kws_dscnn")
    images, _ = samples("kws_dscnn", 10)["calibrate"]
    shape = "x".join(map(str, (1, *images.shape[1:])))
    exported = to_onnx(load(module, inputs=[shape]), OPSET)
    batches = [{exported.inputs[0].name: image[None]} for image in images]
    original = save(exported, folder / "float.onnx")
    theirs = nncf_onnx(original, batches, folder / "theirs.onnx")
    found = told(theirs, original, seconds)
    unfused = [one for one in found.findings if one.kind == "unfused"]
    dressed = sum(len(one.sites) for one in unfused)
    nodes = optimized(theirs)
    checks: dict[str, Any] = {
        "optimized graph": dict(nodes),
        "float convolutions in the graph": nodes["Conv"] + nodes["FusedConv"],
        "unfused convolutions in the sentences": sum(
            line.kind == "unfused" and line.site == line.owner and "Conv" in line.op_type
            for line in found.lines
        ),
        "unfused sites in the sentences": dressed,
    }
    prepared = folder / "prepared.onnx"
    quant_pre_process(str(original), str(prepared), skip_symbolic_shape=True)
    steps = {
        "BatchNormalization folded first": nncf_onnx(prepared, batches, folder / "folded.onnx"),
        "and one scale per tensor": nncf_onnx(
            prepared, batches, folder / "fused.onnx", per_tensor=True
        ),
    }
    predicted = {
        "BatchNormalization folded first": sum(
            one.us for one in unfused if SCALES not in one.numbers["obstacle"]
        ),
        "and one scale per tensor": sum(one.us for one in unfused),
    }
    for name, path in steps.items():
        found_nodes = optimized(path)
        checks[name] = {
            "predicted_us": predicted[name],
            "int8 convolutions in its graph": found_nodes["QLinearConv"],
            **came_back(theirs, path, seconds),
        }
    return {"explanation": summary(found), "checks": checks}


def resnet(folder: Path, seconds: float) -> dict[str, Any]:
    """Our own artifact of a trained ResNet-20."""
    module = shared_module("models/zoo.py").load("cifar10_resnet20")
    parts = samples("cifar10_resnet20", 10)
    done = pipeline.run(
        module,
        target="onnxruntime",  # the fastest, ExecuTorch, tells no times of kernels
        inputs=["1x3x32x32"],
        calibration=parts["calibrate"][0],
        threads=1,
        seconds=seconds,
        out=folder / "artifact",
        progress=terminal,
    )
    original = save(to_onnx(load(module, inputs=["1x3x32x32"]), OPSET), folder / "float.onnx")
    found = explain(folder / "artifact", against=original, seconds=seconds, progress=terminal)
    alone = explain(folder / "artifact")
    chosen = done.report.candidate(done.report.chosen)
    rows = {row["name"]: row["precision"] for row in done.report.sites if row["macs"]}
    narrow = {line.site for line in found.lines if line.macs and line.kind in ("narrow", "slower")}
    return {
        "explanation": summary(found),
        "from the report alone": summary(alone),
        "checks": {
            "chosen": done.report.chosen,
            "speed-up of the run, over ONNX Runtime's float32": chosen.speedup,
            "speed-up of the explanation, in the artifact's runtime": dict(found.speedup),
            "sites in int8 by the report": sorted(n for n, p in rows.items() if p == "int8"),
            "sites in fewer bits by the explanation": sorted(narrow),
        },
    }


def told(theirs: Path, original: Path, seconds: float) -> Explanation:
    """The explanation, on one thread."""
    return explain(theirs, against=original, threads=1, seconds=seconds, progress=terminal)


def summary(found: Explanation) -> dict[str, Any]:
    """What it says and the numbers behind it, without the rows of kernels."""
    plain = found.to_dict()
    for side in ("before", "after"):
        plain[side] = {k: v for k, v in plain[side].items() if k != "rows"}
    changes = sum(part["change_us"] for part in plain["parts"])
    difference = found.after.latency_us - found.before.latency_us
    return {**plain, "sum_of_changes_us": changes, "difference_us": difference}


def save(model: Model, path: Path) -> Path:
    ir.save(model.graph_model, path)
    return path


def nncf_onnx(
    source: Path, batches: list[dict[str, np.ndarray]], path: Path, per_tensor: bool = False
) -> Path:
    """NNCF's defaults on an ONNX file, or with one scale for each tensor of activations."""
    import nncf
    from nncf.quantization.advanced_parameters import (
        AdvancedQuantizationParameters,
        QuantizationParameters,
    )

    options: dict[str, Any] = {}
    if per_tensor:
        single = QuantizationParameters(per_channel=False)
        advanced = AdvancedQuantizationParameters(activations_quantization_params=single)
        options["advanced_parameters"] = advanced
    with contextlib.redirect_stdout(None), contextlib.redirect_stderr(None):
        made = nncf.quantize(
            onnx.load(source), nncf.Dataset(batches), subset_size=len(batches), **options
        )
    onnx.save(made, path)
    return path


def our_int8(exported: Model, batches: list[dict[str, np.ndarray]]) -> Model:
    """Int8 by the default passes, for ONNX Runtime."""
    from compress.data import load_data
    from compress.lowering import lower
    from compress.passes import Context
    from compress.recipe import default_passes

    images = np.concatenate([next(iter(batch.values())) for batch in batches])
    context = Context(
        target=OnnxRuntime(threads=1),
        original=exported,
        calibration=load_data(images, exported.inputs),
    )
    return lower(exported, default_passes(samples=len(batches)), context).apply(refine=False)


def optimized(path: Path) -> Counter[str]:
    """Operators of the graph that ONNX Runtime makes of a file, counted."""
    with tempfile.TemporaryDirectory() as folder:
        written = Path(folder) / "optimized.onnx"
        options = ort.SessionOptions()
        options.optimized_model_filepath = str(written)
        options.log_severity_level = 3
        ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        return Counter(node.op_type for node in onnx.load(written).graph.node)


def count_float(found: Explanation, op_type: str) -> int:
    """Kernels of an operator in the compressed model that compute in float."""
    rows = [row for line in found.lines for row in line.after]
    return sum(row["op_type"] == op_type and row["precision"] == "float32" for row in rows)


def came_back(theirs: Path, advised: Path, seconds: float) -> dict[str, Any]:
    """Microseconds that the advice gave back, timed in turns over several sessions."""
    models = {"as made": load(theirs), "as advised": load(advised)}
    inputs = models["as made"].example()
    target = OnnxRuntime(threads=1)

    def build() -> Mapping[str, Any]:
        return {name: partial(target.build(one), inputs) for name, one in models.items()}

    found = measure_sessions(build, seconds=seconds, margin=0.0, progress=terminal)
    timings = found.timings
    before, after = (timings[name].p50_ms * 1e3 for name in ("as made", "as advised"))
    return {
        "came_back_us": before - after,
        "as_made_us": before,
        "as_advised_us": after,
        "ratio": found.to_dict()["ratios"]["as advised"],
    }


NETWORKS = {"mobilenet_v3_small": mobilenet, "kws_dscnn": keywords, "cifar10_resnet20": resnet}


def main() -> None:
    """Run what is not in the results yet."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", default=list(NETWORKS), choices=list(NETWORKS))
    parser.add_argument("--seconds", type=float, default=10.0, help="of each measurement")
    parser.add_argument("--results", type=Path, default=None, help="folder for explain.json")
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    results = Results("explain", {"seconds": arguments.seconds, "threads": 1}, arguments.results)
    with tempfile.TemporaryDirectory() as cache:
        # Peaks of an hour ago may have been measured beside other work.
        compress.estimate.place.CACHE = Path(cache)
        results.run(arguments.only, lambda name, folder: NETWORKS[name](folder, arguments.seconds))
    for name in arguments.only:
        entry = results.document["entries"][name]
        print(f"\n== {name}")
        if "error" in entry:
            print(entry["error"])
            continue
        print(entry["explanation"]["headline"])
        for finding in entry["explanation"]["findings"]:
            print(f"- {finding['us']:.1f} µs: {finding['sentence']} {finding['advice']}")
        for check, value in entry["checks"].items():
            print(f"  {check}: {value}")


if __name__ == "__main__":
    main()
