"""Whether ONNX Runtime for aarch64 agrees on our ORT-format models.

    python -m benchmarks.aarch64 --folder ../aarch64

Under qemu-user, so this is about correctness and never about time. The folder holds three things,
which on Debian and x86-64 come from the registries like this:

    qemu/   qemu-user of Debian 13 (qemu 10; with 7.2 importing onnxruntime crashes), fetched with
            `apt-get download`, unpacked with `dpkg -x`
    root/   of Debian 12, the arm64 packages python3.11-minimal libpython3.11-minimal
            libpython3.11-stdlib libc6 libgcc-s1 libstdc++6 zlib1g libexpat1 libssl3 libffi8
            libbz2-1.0 liblzma5 libuuid1 libcrypt1, the same way
    site/   `pip download --no-deps --platform manylinux_2_28_aarch64 --python-version 3.11
            --only-binary=:all: onnxruntime numpy flatbuffers protobuf`, each wheel unpacked

Each network is made float and int8 for `ort-mobile`, run here and run there, on processors with
and without the int8 dot product. int8 outputs may differ by what one step of an activation makes,
where a rounding falls the other way.
"""

from __future__ import annotations

import argparse
import subprocess
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import Results, shared_module
from benchmarks.trained import samples
from compress import pipeline
from compress.export import to_onnx
from compress.loading import load
from compress.reference import largest_difference, largest_magnitude
from compress.target import Engine
from targets.ort_mobile import OrtMobile
from targets.ort_mobile_engine import PACKED

NETWORKS = ("kws_dscnn", "cifar10_resnet8", "cifar10_resnet20")
PROCESSORS = ("cortex-a57", "cortex-a76", "max")
"""Without the int8 dot product; with it; with everything that qemu has, such as i8mm and SVE."""
SECONDS = 300
RUNNER = """
import sys
import numpy as np
import onnxruntime as ort
model, inputs, outputs = sys.argv[1:]
options = ort.SessionOptions()
options.intra_op_num_threads = 1
options.log_severity_level = 4
session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
names = [output.name for output in session.get_outputs()]
np.savez(outputs, **dict(zip(names, session.run(names, dict(np.load(inputs))))))
print(ort.__version__)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True, help="with qemu, root and site")
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--only", nargs="*", default=list(NETWORKS), choices=NETWORKS)
    options = parser.parse_args()
    tools = options.folder.resolve()
    results = Results("aarch64", {"samples": options.samples, "processors": PROCESSORS})
    results.run(options.only, partial(agreement, tools=tools, count=options.samples))


def agreement(name: str, folder: Path, *, tools: Path, count: int) -> dict[str, Any]:
    """Both precisions of one network on every processor, beside this machine."""
    module, parts = shared_module("models/zoo.py").load(name), samples(name, count)
    shape = "x".join(map(str, (1, *parts["test"][0].shape[1:])))
    target = OrtMobile(threads=1)
    float32 = target.build(to_onnx(load(module, inputs=(shape,)), target.capabilities.opset))
    (folder / "float32").mkdir()
    float32.save(folder / "float32")
    pipeline.run(
        module,
        target="ort-mobile",
        inputs=[shape],
        calibration=parts["calibrate"],
        threads=1,
        search_seconds=0,
        seconds=0.5,
        out=folder / "int8",
    )
    batch = {float32.inputs[0].name: parts["test"][0][:count].astype(np.float32)}
    np.savez(folder / "inputs.npz", **batch)
    return {
        precision: {
            processor: compared(target.load(folder / precision), batch, folder, tools, processor)
            for processor in PROCESSORS
        }
        for precision in ("float32", "int8")
    }


def compared(
    engine: Engine, batch: dict[str, np.ndarray], folder: Path, tools: Path, processor: str
) -> dict[str, Any]:
    """How far the outputs under qemu are from those here; the first line of the error otherwise."""
    precision = "int8" if any(k.precision == "int8" for k in engine.kernels()) else "float32"
    outputs = folder / "outputs.npz"
    outputs.unlink(missing_ok=True)
    root = tools / "root"
    command = [tools / "qemu/usr/bin/qemu-aarch64-static", "-cpu", processor, "-L", root]
    variables = {"PYTHONHOME": root / "usr", "PYTHONPATH": tools / "site", "OMP_NUM_THREADS": 1}
    command += [word for k, v in variables.items() for word in ("-E", f"{k}={v}")]
    command += [root / "usr/bin/python3.11", "-c", RUNNER]
    command += [folder / precision / PACKED, folder / "inputs.npz", outputs]
    ran = subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, timeout=SECONDS
    )
    if ran.returncode:
        return {"error": (ran.stderr.strip().splitlines() or [f"code {ran.returncode}"])[-1]}
    here, there = engine(batch), dict(np.load(outputs))
    scores, emulated = (next(iter(arrays.values())) for arrays in (here, there))
    return {
        "onnxruntime": ran.stdout.strip(),
        "largest_difference": max(largest_difference(there[n], here[n]) for n in here),
        "largest_output": max(map(largest_magnitude, here.values())),
        "top1_agreement": float((scores.argmax(-1) == emulated.argmax(-1)).mean()),
    }


if __name__ == "__main__":
    main()
