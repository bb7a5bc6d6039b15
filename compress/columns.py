"""Samples as a user hands them over, taken apart into raw arrays by input name and labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from compress.errors import DataError
from compress.model import TensorSpec
from compress.preparation import Stored, check_labels


def columns_of(
    what: str, source: Any, inputs: Sequence[TensorSpec]
) -> tuple[dict[str, np.ndarray], np.ndarray | None]:
    """Raw arrays by input name, and checked labels (n,), out of x, (x, y) or a mapping.

    Raises:
        DataError: an input is missing, or something is no array of numbers.
    """
    if isinstance(source, Mapping):
        arrays = source
    elif isinstance(source, (tuple, list)) and len(source) in (1, 2):
        arrays = dict(source[0]) if isinstance(source[0], Mapping) else {"x": source[0]}
        if len(source) == 2:
            arrays["y"] = source[1]
    elif hasattr(source, "__array__"):
        arrays = {"x": source}
    else:
        raise DataError(
            f"{what} is a {type(source).__name__}. Give x, (x, y) or a dict of arrays by input "
            f"name."
        )
    names = [spec.name for spec in inputs]
    if len(names) == 1 and names[0] not in arrays and "x" in arrays:
        taken = {names[0]: "x"}
    else:
        taken = {name: name for name in names}
    missing = [key for key in taken.values() if key not in arrays]
    if missing:
        expected = (
            " or ".join(sorted({"'x'", repr(names[0])})) if len(names) == 1 else _named(inputs)
        )
        raise DataError(
            f"{what} holds {', '.join(map(repr, arrays)) or 'nothing'}, and the model needs "
            f"{expected}; labels are called 'y'. Missing: {', '.join(map(repr, missing))}."
        )
    columns = {name: _array(what, arrays[key]) for name, key in taken.items()}
    if "y" not in arrays or "y" in taken.values():
        return columns, None
    return columns, check_labels(_array(what, arrays["y"]), what)


def _array(what: str, value: Any) -> np.ndarray:
    if type(value).__module__ == "torch":
        value = value.detach().cpu()
        value = value.float() if str(value.dtype) == "torch.bfloat16" else value
        value = value.numpy()
    array = value if isinstance(value, np.ndarray) else np.asarray(value)
    if array.dtype.kind not in "fiub":
        raise DataError(
            f"{what} holds an array of type {array.dtype}. Give numbers: float32, uint8 or int64."
        )
    return array


def count_of(what: str, columns: Mapping[str, Stored], labels: np.ndarray | None) -> int:
    """Number of samples.

    Raises:
        DataError: the columns differ in it.
    """
    counts: dict[str, int] = {
        name: column.shape[0] for name, column in columns.items() if column.shape
    }
    if labels is not None:
        counts["y"] = len(labels)
    if len(set(counts.values())) != 1:
        listed = ", ".join(f"{count} of {name!r}" for name, count in counts.items())
        raise DataError(
            f"{what} must hold as many samples of each, and it holds {listed or 'single numbers'}."
        )
    return min(counts.values())


def whole_inputs(specs: Sequence[TensorSpec]) -> bool:
    """Whether axis 0 is not the batch: all shapes are fixed, and axis 0 differs between inputs.

    So it is with a recurrent state (2, 1, 128) beside audio (1, 576). A sample is then one dict of
    arrays in exactly these shapes.
    """
    sizes = {spec.shape[0] for spec in specs if spec.shape}
    return len(sizes) != 1 and all(isinstance(size, int) for size in sizes)


def check_whole(
    what: str,
    columns: Mapping[str, Stored],
    labels: np.ndarray | None,
    inputs: Sequence[TensorSpec],
) -> None:
    """Refuse a sample that does not have exactly the shapes of the model's inputs.

    Raises:
        DataError: another shape, or not one label.
    """
    for spec in inputs:
        if (shape := columns[spec.name].shape) != spec.shape:
            given = "x".join(map(str, shape)) or "scalar"
            raise DataError(
                f"{what}: the array for input {spec.name!r} has shape {given}. Axis 0 of this "
                f"model's inputs is not the batch, so yield one dict per sample with exactly "
                f"{', '.join(map(str, inputs))}."
            )
    if labels is not None and len(labels) != 1:
        raise DataError(f"{what} is one sample and has {len(labels)} labels; give one.")


def _named(inputs: Sequence[TensorSpec]) -> str:
    return ", ".join(repr(spec.name) for spec in inputs)
