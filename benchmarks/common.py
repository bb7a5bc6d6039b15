"""What the benchmarks share: where data and networks are, results that survive a kill."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import logging
import os
import shlex
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from rich.console import Console

from compress.machine import fingerprint, this_machine, versions

HERE = Path(__file__).parent
SHARED = Path(os.environ.get("HWCOMPRESS_SHARED", HERE.parent.parent / "shared"))
"""Folder with `models/` and `data/`; HWCOMPRESS_SHARED names another one."""

VARIABLES = ("ONEDNN_MAX_CPU_ISA",)
PACKAGES = (
    "hwcompress",
    "torch",
    "torchvision",
    "onnx",
    "onnxruntime",
    "onnxruntime-gpu",
    "torchao",
    "openvino",
    "executorch",
    "nncf",
    "numpy",
)


class Results:
    """A JSON file that is complete after every entry, so that a killed run goes on."""

    def __init__(self, name: str, settings: dict[str, Any], folder: Path | None = None) -> None:
        self.path = (folder or HERE / "results") / f"{name}.json"
        machine = this_machine()
        self.document: dict[str, Any] = {
            "benchmark": name,
            "command": _command(),
            "settings": settings,
            "machine": {**dataclasses.asdict(machine), "fingerprint": fingerprint(machine)},
            "versions": versions(*PACKAGES),
            "entries": {},
        }
        if self.path.exists():
            before = json.loads(self.path.read_text())
            same_machine = before["machine"]["fingerprint"] == fingerprint(machine)
            if same_machine and before["settings"] == json.loads(json.dumps(settings)):
                self.document["entries"] = before["entries"]

    def __contains__(self, key: str) -> bool:
        return key in self.document["entries"]

    def run(self, names: Iterable[str], run_one: Callable[[str, Path], dict[str, Any]]) -> None:
        """Add what is missing; a network that fails gets an entry with its error."""
        for name in names:
            if name in self:
                continue
            print(f"== {name}", flush=True)
            with tempfile.TemporaryDirectory() as folder:
                try:
                    entry = run_one(name, Path(folder))
                except Exception as error:
                    traceback.print_exc()
                    entry = {"error": str(error)}
            self.add(name, entry)

    def add(self, key: str, entry: dict[str, Any]) -> None:
        """Store one entry and write the file."""
        self.document["entries"][key] = entry
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(json.dumps(self.document, indent=1) + "\n")
        temporary.replace(self.path)


def run_training_parts(
    name: str,
    about: str | None,
    steps: int,
    keys: Callable[[str], list[str]],
    run_one: Callable[[str, argparse.Namespace], dict[str, Any]],
    show: Callable[[Mapping[str, Any], Sequence[str], Console], None],
) -> None:
    """The command of a benchmark with a part that trains and one that is timed.

    Args:
        name: of the results.
        about: its help.
        steps: of fine-tuning, where nothing else is asked for.
        keys: names of the entries of "accuracy", "latency" or "all".
        run_one: makes one entry.
        show: prints those that are there, in this order.
    """
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--part", default="all", choices=("accuracy", "latency", "all"))
    parser.add_argument("--only", nargs="*", help="names of entries")
    parser.add_argument("--images", type=int, default=2000, help="CIFAR test images")
    parser.add_argument("--train-images", type=int, default=5000, help="for fine-tuning")
    parser.add_argument("--steps", type=int, default=steps, help="of fine-tuning")
    parser.add_argument("--batch", type=int, default=64, help="images of one step")
    parser.add_argument("--seconds", type=float, default=3.0, help="for each timed network")
    parser.add_argument("--results", type=Path, default=None, help="folder for the JSON file")
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    names = ("images", "train_images", "steps", "batch", "seconds")
    results = Results(name, {n: getattr(arguments, n) for n in names}, arguments.results)
    wanted = arguments.only or keys(arguments.part)
    results.run(wanted, lambda key, _: run_one(key, arguments))
    show(results.document["entries"], keys("all"), Console(width=150))


def _command() -> str:
    """What was typed, with the variables that change what runs."""
    module = getattr(sys.modules["__main__"].__spec__, "name", "")
    variables = [f"{name}={os.environ[name]}" for name in VARIABLES if name in os.environ]
    return shlex.join([*variables, "python", "-m", module, *sys.argv[1:]])


def shared_module(name: str) -> ModuleType:
    """`models/zoo.py` or `data/load.py` of the shared folder.

    Raises:
        SystemExit: the folder is not there.
    """
    path = SHARED / name
    if not path.exists():
        sys.exit(f"{path} is not there. Set HWCOMPRESS_SHARED to the folder that holds it.")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        sys.exit(f"{path} cannot be imported.")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def torchvision_models() -> ModuleType:
    """torchvision.models, also beside a torch build without torchvision's own operators."""
    import torch
    from torch import library as operators

    for name in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, name):
            operators.define(f"torchvision::{name}", "(Tensor a, Tensor b, float c) -> Tensor")
    import torchvision.models

    return torchvision.models


def smooth_images(count: int, size: int, seed: int = 0) -> np.ndarray:
    """Normalised random images (N, 3, size, size) with the 1/f spectrum of photographs."""
    rng = np.random.default_rng(seed)
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(size), np.fft.rfftfreq(size), indexing="ij"))
    spectrum = 1 / np.maximum(frequency, 1 / size)
    noise = np.fft.rfft2(rng.standard_normal((count, 3, size, size))) * spectrum
    images = np.fft.irfft2(noise, s=(size, size))
    images -= images.mean((1, 2, 3), keepdims=True)
    return (images / images.std((1, 2, 3), keepdims=True)).astype(np.float32)
