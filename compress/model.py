"""Model: a program, what goes into it, and what was done to it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from compress.errors import UsageError

if TYPE_CHECKING:
    import onnx_ir as ir
    import torch

Arrays = dict[str, np.ndarray]
"""Tensor name -> array."""

DTYPES = ("float32", "float16", "float64", "int64", "int32", "int16", "int8", "uint8", "bool")
BATCH = "batch"


@dataclass(frozen=True)
class TensorSpec:
    """One input of a model.

    Attributes:
        name: as in the exported graph.
        shape: sizes; a string is the name of a dynamic axis, which may only be the batch
            (axis 0) once a model is loaded.
        dtype: numpy's name of the element type.
        assumed: neither the file nor the user said the shape.
    """

    name: str
    shape: tuple[int | str, ...]
    dtype: str = "float32"
    assumed: bool = field(default=False, compare=False)

    @classmethod
    def parse(cls, text: str) -> TensorSpec:
        """Read `1x3x224x224`, `ids:1x128` or `ids:1x128:int64`.

        A size may be a name (`batchx3x224x224` makes axis 0 dynamic); without a name the
        input is called "" until the loader knows the model's own names.

        Raises:
            UsageError: the text has another form.
        """
        parts = text.strip().split(":")
        name = parts.pop(0) if len(parts) > 1 and not _is_shape(parts[0]) else ""
        shape_text = parts.pop(0) if parts else ""
        dtype = parts.pop(0) if parts else "float32"
        if not _is_shape(shape_text) or parts or dtype not in DTYPES:
            raise UsageError(
                f"--input {text!r} is not an input shape. Write SHAPE, NAME:SHAPE or "
                f"NAME:SHAPE:DTYPE, for example 1x3x224x224 or ids:1x128:int64; "
                f"dtypes: {', '.join(DTYPES)}."
            )
        if shape_text == "scalar":
            return cls(name, (), dtype)
        sizes = (BATCH if size == BATCH else int(size) for size in _sizes(shape_text))
        return cls(name, tuple(sizes), dtype)

    @property
    def dynamic_batch(self) -> bool:
        """Whether axis 0 may have any size."""
        return bool(self.shape) and isinstance(self.shape[0], str)

    def concrete(self, batch: int = 1) -> tuple[int, ...]:
        """The shape with every dynamic axis set to `batch`."""
        return tuple(batch if isinstance(size, str) else size for size in self.shape)

    def __str__(self) -> str:
        shape = "x".join(map(str, self.shape)) or "scalar"
        return f"{self.name}:{shape}:{self.dtype}"


def _sizes(text: str) -> list[str]:
    return re.findall(rf"{BATCH}|\d+", text)


def _is_shape(text: str) -> bool:
    if text == "scalar":
        return True
    size = rf"(?:{BATCH}|[1-9]\d{{0,8}})"
    return re.fullmatch(rf"{size}(?:x{size})*", text) is not None


def random_inputs(specs: Iterable[TensorSpec], batch: int, rng: np.random.Generator) -> Arrays:
    """Standard normal floats, and integers 0 or 1 (a legal index into any table of two)."""
    arrays: Arrays = {}
    for spec in specs:
        shape = spec.concrete(batch)
        floats = spec.dtype.startswith("float")
        values = rng.standard_normal(shape) if floats else rng.integers(0, 2, shape)
        arrays[spec.name] = np.asarray(values).astype(spec.dtype)
    return arrays


@dataclass(frozen=True)
class Step:
    """One entry of a model's history: what was applied, with which options, and what it found."""

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Model:
    """A program with its inputs and its history.

    Attributes:
        program: a `torch.nn.Module` in eval mode (the torch stage) or an `onnx_ir.Model`
            (the ONNX stage).
        inputs: in the order of the program's arguments.
        name: short name for tables and file names.
        source: one phrase that says what was loaded, for the report.
        sha256: hash of the file it came from, or "" where there is none.
        history: what was done to it, oldest first.
    """

    program: torch.nn.Module | ir.Model
    inputs: tuple[TensorSpec, ...]
    name: str
    source: str = ""
    sha256: str = ""
    history: tuple[Step, ...] = ()

    @property
    def stage(self) -> Literal["torch", "onnx"]:
        """Which kind of pass may be applied."""
        return "onnx" if type(self.program).__module__.startswith("onnx_ir") else "torch"

    @property
    def torch_module(self) -> torch.nn.Module:
        """The program, known to be a torch module."""
        import torch

        if not isinstance(self.program, torch.nn.Module):
            raise TypeError(f"{self.name} is at the ONNX stage; this needs a torch module.")
        return self.program

    @property
    def graph_model(self) -> ir.Model:
        """The program, known to be an ONNX model."""
        import onnx_ir

        if not isinstance(self.program, onnx_ir.Model):
            raise TypeError(f"{self.name} is at the torch stage; export it first.")
        return self.program

    @property
    def dynamic_batch(self) -> bool:
        """Whether every input with axes takes any batch size."""
        return any(spec.dynamic_batch for spec in self.inputs) and all(
            spec.dynamic_batch for spec in self.inputs if spec.shape
        )

    def example(self, batch: int | None = None, seed: int = 0) -> Arrays:
        """Random inputs for shapes, export checks and latency; never for calibration.

        A dynamic batch becomes `batch`, by default 1.
        """
        return random_inputs(self.inputs, batch or 1, np.random.default_rng(seed))

    def evolve(self, program: torch.nn.Module | ir.Model, step: Step) -> Model:
        """The same model with another program and one more step in its history."""
        return replace(self, program=program, history=(*self.history, step))
