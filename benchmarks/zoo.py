"""Every network of the zoo through `compress run`, beside ONNX Runtime's own quantizer.

    python -m benchmarks.zoo                 # all networks
    python -m benchmarks.zoo --only resnet18 face_rfb320

torchvision networks have random weights (their BatchNorm statistics re-estimated on the
calibration images, so that activations are alive); what is measured is placement and speed.
`quantize_static` gets the same float graph and calibration data, per-channel weights and unsigned
activations, after its own pre-processing. All three are timed interleaved in one process.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process

from benchmarks.common import SHARED, Results, smooth_images, torchvision_models
from compress import pipeline
from compress.candidates import int8_share
from compress.data import load_data
from compress.fidelity import fidelity
from compress.graph import graph_sites
from compress.latency import measure
from compress.loading import load
from compress.model import Model
from compress.progress import terminal
from targets.cpu import CPU

TORCHVISION = [
    "resnet18",
    "mobilenet_v2",
    "mobilenet_v3_small",
    "mobilenet_v3_large",
    "efficientnet_b0",
    "shufflenet_v2_x1_0",
    "squeezenet1_1",
    "regnet_y_400mf",
    "googlenet",
    "mnasnet1_0",
    "densenet121",
    "convnext_tiny",
    "vit_b_16",
    "swin_t",
]
ONNX = ("face_rfb320", "fastestdet", "silero_vad")


def network(name: str) -> tuple[torch.nn.Module, np.ndarray]:
    """A torchvision network with random weights and live statistics, and its images."""
    torch.manual_seed(0)
    options: dict[str, Any] = {"weights": None}
    if name == "googlenet":
        options |= {"aux_logits": False, "init_weights": True}
    module = torchvision_models().get_model(name, **options)
    images = smooth_images(32, 224)
    norms = [m for m in module.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = None
    with torch.no_grad():
        if norms:
            module.train()
            module(torch.from_numpy(images[:16]))
    return module.eval(), images


class _Reader(CalibrationDataReader):  # type: ignore[misc]
    def __init__(self, batches: list[dict[str, np.ndarray]]) -> None:
        self.batches = iter(batches)

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self.batches, None)


def quantize_with_onnxruntime(
    model: Model, batches: list[dict[str, np.ndarray]], folder: Path, exclude: Sequence[str] = ()
) -> Model:
    """What ONNX Runtime's own tool makes of the float model; nodes to exclude stay in float."""
    source, prepared, result = (str(folder / f"{n}.onnx") for n in ("float", "prepared", "int8"))
    ir.save(model.graph_model, source)
    with contextlib.redirect_stdout(None), contextlib.redirect_stderr(None):
        try:
            quant_pre_process(source, prepared, skip_symbolic_shape=True)
        except Exception:  # its optimizer refuses some networks; the tool then works without
            prepared = source
        quantize_static(
            prepared,
            result,
            _Reader(batches),
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            nodes_to_exclude=list(exclude),
        )
    return load(result)


def run_one(name: str, seconds: float, samples: int, folder: Path) -> dict[str, Any]:
    """Figures of one network."""
    source: Any
    if name in TORCHVISION:
        source, images = network(name)
        calibration: Any = images[:samples]
        inputs = ["1x3x224x224"]
    else:
        source, inputs = SHARED / "models" / f"{name}.onnx", []
        loaded = load(source, inputs=_pinned(name))
        inputs = _pinned(name)
        calibration = _onnx_data(name, loaded, samples)
    result = pipeline.run(
        source,
        inputs=inputs,
        calibration=calibration,
        threads=1,
        seconds=seconds,
        samples=samples,
        out=folder / "artifact",
        progress=terminal,
    )
    report = result.report
    target = CPU(threads=1)
    exported = _exported(source, inputs, target)
    data = load_data(calibration, exported.inputs)
    engines = {"float32": target.build(exported)}
    compressed = _int8_model(exported, data, target, samples)
    engines["ours"] = target.build(compressed)
    sites = graph_sites(exported.graph_model)
    entry: dict[str, Any] = {
        "artifact": report.chosen,
        "headline": list(report.headline),
        "int8_macs": {"ours": int8_share(engines["ours"].kernels(), sites)},
        "run_seconds": dict(report.seconds),
    }
    try:
        batches = [dict(batch.inputs) for batch in data.batches(1)]
        theirs = target.build(quantize_with_onnxruntime(exported, batches, folder))
        theirs(batches[0])
        engines["quantize_static"] = theirs
        entry["int8_macs"]["quantize_static"] = int8_share(theirs.kernels(), sites)
    except Exception as error:
        entry["quantize_static_error"] = str(error).splitlines()[0][:300]
    first = next(iter(data.batches(1))).inputs
    comparison = measure(
        {label: (lambda engine=engine: engine(first)) for label, engine in engines.items()},
        seconds=seconds,
    )
    entry["latency"] = comparison.to_dict()
    entry["fidelity"] = {
        label: fidelity(engines["float32"], engine, data).to_dict()
        for label, engine in engines.items()
        if label != "float32"
    }
    if "quantize_static" in engines:
        pair = measure(
            {
                "quantize_static": lambda: engines["quantize_static"](first),
                "ours": lambda: engines["ours"](first),
            },
            seconds=seconds,
        )
        entry["ours_over_quantize_static"] = pair.to_dict()["ratios"]["ours"]
    return entry


def _pinned(name: str) -> list[str]:
    return {"silero_vad": ["input:1x576", "state:2x1x128", "sr:scalar:int64"]}.get(name, [])


def _onnx_data(name: str, model: Model, samples: int) -> Any:
    if name == "silero_vad":
        rng = np.random.default_rng(0)
        audio = (rng.standard_normal((samples, 576)) * 0.05).astype(np.float32)
        state = np.zeros((2, 1, 128), np.float32)

        def batches() -> Any:
            for row in audio:
                yield {"input": row[None], "state": state, "sr": np.array(16000)}

        return batches
    _, channels, height, width = model.inputs[0].concrete()
    return smooth_images(samples, max(height, width))[:, :channels, :height, :width]


def _exported(source: Any, inputs: list[str], target: CPU) -> Model:
    from compress.export import to_onnx

    return to_onnx(load(source, inputs=inputs), target.capabilities.opset)


def _int8_model(exported: Model, data: Any, target: CPU, samples: int) -> Model:
    import dataclasses

    from compress.passes import Context
    from compress.recipe import default_passes

    context = Context(target=target, original=exported, calibration=data)
    model = dataclasses.replace(exported, program=exported.graph_model.clone())
    for step in default_passes(samples=samples):
        model = step.apply(model, context)
    return model


def main() -> None:
    """Run what is not in the results yet."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", default=[*TORCHVISION, *ONNX])
    parser.add_argument("--seconds", type=float, default=10.0, help="of each measurement")
    parser.add_argument("--samples", type=int, default=16, help="calibration images")
    parser.add_argument("--results", type=Path, default=None, help="folder for zoo.json")
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    settings = {"seconds": arguments.seconds, "samples": arguments.samples, "threads": 1}
    results = Results("zoo", settings, arguments.results)
    results.run(
        arguments.only,
        lambda name, folder: run_one(name, arguments.seconds, arguments.samples, folder),
    )
    for name in arguments.only:
        print(summary(name, results.document["entries"][name]))


def summary(name: str, entry: dict[str, Any]) -> str:
    """One line for the terminal."""
    if "error" in entry:
        return f"{name}: {entry['error']}"
    ratios = entry["latency"]["ratios"]
    speed = {label: f"{ratio['value']:.2f}" for label, ratio in ratios.items()}
    shares = {label: f"{share:.1%}" for label, share in entry["int8_macs"].items()}
    against = entry.get("ours_over_quantize_static", {}).get("value", float("nan"))
    return (
        f"{name}: artifact {entry['artifact']}, speed-up {speed}, int8 MACs {shares}, "
        f"ours/quantize_static {against:.2f}"
    )


if __name__ == "__main__":
    main()
