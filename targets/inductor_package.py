"""Inductor's ahead-of-time packages: compiled, written into an artifact, and found in one again.

A package (`.pt2` of torch._inductor.aoti_compile_and_package) is native code, and loading it runs
that. So only those are loaded that this process compiled, or that the artifact vouches for:
`engine.json` has the package's hash and the report has that of both. This protects against files
that were changed or added, and not against whoever made the artifact.
"""

from __future__ import annotations

import functools
import json
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch

from compress.artifact import REPORT, sha256_file
from compress.errors import EngineError, LoadError
from compress.graph import graph_sha256
from compress.model import TensorSpec
from compress.target import Kernel
from targets.inductor_program import make_program
from targets.inductor_settings import DESCRIPTION, PACKAGE, CompileSettings


@dataclass(frozen=True)
class Package:
    """A compiled model, and what has to be known to call it.

    Attributes:
        path: of the `.pt2`.
        batch: the size of dynamic axes that it was compiled for.
        inputs: of the model.
        outputs: names, in order.
        batched: whether axis 0 of every output is the batch.
        kernels: the operators that were compiled.
    """

    path: Path
    batch: int
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[str, ...]
    batched: bool
    kernels: tuple[Kernel, ...]


def write_package(package: Package, directory: Path) -> list[Path]:
    """The package, and `engine.json` with its hash and what it takes and gives."""
    path, description = directory / PACKAGE, directory / DESCRIPTION
    shutil.copyfile(package.path, path)
    facts = {
        "sha256": sha256_file(path),
        "batch": package.batch,
        "inputs": [[spec.name, spec.shape, spec.dtype] for spec in package.inputs],
        "outputs": list(package.outputs),
        "batched": package.batched,
        "kernels": [asdict(kernel) for kernel in package.kernels],
    }
    description.write_text(json.dumps(facts, indent=1), encoding="utf-8")
    return [path, description]


def read_package(directory: Path) -> Package:
    """What `write_package` wrote, checked against its hashes.

    Raises:
        LoadError: a file is missing, damaged, or not the one that the report names.
    """
    path, description = directory / PACKAGE, directory / DESCRIPTION
    again = "Copy the artifact again, or run `compress run` again."
    try:
        facts = json.loads(description.read_text(encoding="utf-8"))
        package = Package(
            path,
            int(facts["batch"]),
            tuple(_spec(*one) for one in facts["inputs"]),
            tuple(map(str, facts["outputs"])),
            bool(facts["batched"]),
            tuple(Kernel(**kernel) for kernel in facts["kernels"]),
        )
        expected = {PACKAGE: str(facts["sha256"]), DESCRIPTION: sha256_file(description)}
        # A directory without a report is one that this process has just written.
        report = directory / REPORT
        if report.exists():
            files = json.loads(report.read_text(encoding="utf-8"))["files"]
            expected = {name: str(files[name]) for name in expected}
        found = {name: sha256_file(directory / name) for name in expected}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise LoadError(
            f"{directory} holds no package that can be used: {error}. {again}"
        ) from error
    if found != expected or found[PACKAGE] != facts["sha256"]:
        raise LoadError(
            f"{path} is native code, and its sha256 or that of {DESCRIPTION} is not the one that "
            f"was written. It was not loaded. {again}"
        )
    return package


def _spec(name: str, shape: Sequence[int | str], dtype: str) -> TensorSpec:
    return TensorSpec(name, tuple(shape), dtype)


@contextmanager
def products(settings: CompileSettings) -> Iterator[None]:
    """Whether the GPU's libraries round float32 products to TF32, which a global tells them."""
    if settings.device != "cuda":
        yield
        return
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    with warnings.catch_warnings():
        # Inductor reads these names, and torch warns that they will be replaced.
        warnings.simplefilter("ignore")
        before = matmul.allow_tf32, cudnn.allow_tf32
        matmul.allow_tf32 = cudnn.allow_tf32 = settings.precision == "tf32"
        try:
            yield
        finally:
            matmul.allow_tf32, cudnn.allow_tf32 = before


_PACKAGES: dict[str, Package] = {}
"""What this process has compiled: the same model is built again for every session of a
measurement."""


@functools.cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="hwcompress-")


def compile_package(
    graph_model: ir.Model, inputs: tuple[TensorSpec, ...], batch: int, settings: CompileSettings
) -> Package:
    """Compile for one batch size, once in this process.

    Raises:
        EngineError: torch or Inductor refuses the model.
    """
    # CUDA graphs are recorded when a package is loaded.
    how = (batch, settings.precision, settings.device, settings.autotune, inputs)
    key = f"{graph_sha256(graph_model)} {how}"
    if key in _PACKAGES:
        return _PACKAGES[key]
    path = Path(_folder().name) / f"{len(_PACKAGES)}.pt2"
    options: dict[str, Any] = {}
    if settings.autotune:
        # What torch.compile's mode "max-autotune-no-cudagraphs" sets.
        options = {"max_autotune": True, "coordinate_descent_tuning": True}
    try:
        with warnings.catch_warnings(), products(settings):
            warnings.simplefilter("ignore")  # torch warns of what it uses itself
            program = make_program(graph_model, inputs, batch, settings.precision, settings.device)
            torch._inductor.aoti_compile_and_package(
                program.exported, package_path=str(path), inductor_configs=options
            )
    except EngineError:
        raise
    except Exception as error:
        raise EngineError(f"Inductor refuses the model: {one_line(error)}") from error
    results = graph_model.graph.outputs
    batched = all(r.shape and not isinstance(r.shape[0], int) for r in results)
    names = tuple(value.name or "" for value in results)
    found = Package(path, batch, inputs, names, batched, program.kernels)
    return _PACKAGES.setdefault(key, found)


def one_line(error: Exception) -> str:
    """The message of a library without its line breaks."""
    return " ".join(str(error).split())[:500]
