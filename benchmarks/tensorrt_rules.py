"""What TensorRT would be given for the torchvision networks of the zoo, against its rules.

    python -m benchmarks.tensorrt_rules                 # all networks
    python -m benchmarks.tensorrt_rules --only resnet18

Each network is written in int8, float16, bfloat16 and int8 with either, as for a GPU of compute
capability 8.0, and checked for TensorRT 10 and 11 without TensorRT. Nothing is timed. The outputs
of what ONNX Runtime runs are compared with float32: the ratio of signal to noise in dB, on random
weights with live BatchNorm statistics.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from benchmarks.common import Results
from benchmarks.zoo import TORCHVISION, network
from compress.data import load_data
from compress.export import to_onnx
from compress.graph import graph_sites
from compress.half import to_half
from compress.half_limits import float_operators
from compress.loading import load
from compress.lowering import lower
from compress.model import Arrays, Model
from compress.passes import Context
from compress.recipe import default_passes
from compress.reference import reference_session, run
from compress.rewrites import output_statistics
from compress.target import Capabilities
from compress.testing import NullTarget
from targets.tensorrt_capabilities import OPSET, tensorrt_capabilities
from targets.tensorrt_rules import RULES, check, summary

VERSIONS = ("10", "11")


class Described(NullTarget):
    """TensorRT's capabilities, and nothing that runs."""

    @property
    def capabilities(self) -> Capabilities:
        """As without a GPU."""
        return tensorrt_capabilities()


def run_one(name: str, samples: int, folder: Path) -> dict[str, Any]:
    """What was written for one network, and what the rules say of it."""
    module, images = network(name)
    exported = to_onnx(load(module, inputs=["batchx3x224x224"]), OPSET)
    data = load_data(images[:samples], exported.inputs)
    context = Context(target=Described(), original=exported, calibration=data)
    lowered = lower(exported, default_passes(samples=samples), context)
    int8 = lowered.apply()
    wide = lowered.float_model
    statistics = output_statistics(wide)
    models = {"float32": wide.graph_model, "int8": int8.graph_model}
    for dtype in ("float16", "bfloat16"):
        models[dtype] = to_half(wide.graph_model, dtype, statistics=statistics)
        models[f"int8 and {dtype}"] = to_half(int8.graph_model, dtype, statistics=statistics)
    inputs = {exported.inputs[0].name: images[-1:]}
    expected = run(reference_session(exported.graph_model, optimize=True), inputs)
    return {
        "int8_macs": int8_macs(wide, int8),
        "kept_in_float32": len(float_operators(wide.graph_model.graph, statistics=statistics)),
        "models": {
            kind: {"nodes": len(model.graph), **facts(model), **agreement(model, inputs, expected)}
            for kind, model in models.items()
        },
    }


def facts(model: ir.Model) -> dict[str, Any]:
    """Violations by version: how many of each severity, and each that is more than a note."""
    found: dict[str, Any] = {}
    for version in VERSIONS:
        violations = check(model, version=version)
        found[f"tensorrt {version}"] = {
            **summary(violations),
            "violations": [dataclasses.asdict(v) for v in violations if v.severity != "note"],
            "notes": sorted({v.rule for v in violations if v.severity == "note"}),
        }
    return found


def agreement(model: ir.Model, inputs: Arrays, expected: Arrays) -> dict[str, float]:
    """Signal over noise of the worst output, as far as there is a signal.

    Nothing where ONNX Runtime's CPU lacks the type, or where the network's random weights end in
    zeros (ViT's head).
    """
    silent = any(not np.any(array) for array in expected.values())
    if silent or model.opset_imports[""] != OPSET:  # a higher opset is bfloat16's
        return {}
    # As written: optimized, ONNX Runtime 1.31 loses 9 dB of ResNet-18 with Q/DQ in float16.
    got = run(reference_session(model), inputs)
    noise = [
        np.square(array, dtype=np.float64).sum()
        / max(np.square(array - got[name], dtype=np.float64).sum(), 1e-30)
        for name, array in expected.items()
    ]
    return {"sqnr_db": round(float(10 * np.log10(min(noise))), 1)}


def int8_macs(wide: Model, int8: Model) -> float:
    """The share of multiply-accumulates that run in int8."""
    roles = int8.history[-1].details["plan"]["roles"]
    sites = graph_sites(wide.graph_model)
    total = sum(site.macs for site in sites)
    return round(sum(s.macs for s in sites if roles.get(s.name) == "matmul") / total, 4)


def main() -> None:
    """Run what is not in the results yet."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", default=TORCHVISION)
    parser.add_argument("--samples", type=int, default=8, help="calibration images")
    parser.add_argument("--results", type=Path, default=None, help="folder for the JSON file")
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    settings = {
        "samples": arguments.samples,
        "rules": [rule.id for rule in RULES],
        "versions": list(VERSIONS),
    }
    results = Results("tensorrt_rules", settings, arguments.results)
    results.run(arguments.only, lambda name, folder: run_one(name, arguments.samples, folder))
    for name in arguments.only:
        print(line(name, results.document["entries"][name]))


def line(name: str, entry: dict[str, Any]) -> str:
    """One line for the terminal."""
    if "error" in entry:
        return f"{name}: {entry['error']}"
    counts = {
        kind: [sum(one[f"tensorrt {v}"][s] for v in VERSIONS) for s in ("error", "performance")]
        for kind, one in entry["models"].items()
    }
    return f"{name}: int8 MACs {entry['int8_macs']:.1%}, errors and slow places {counts}"


if __name__ == "__main__":
    main()
