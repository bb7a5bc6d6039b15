"""From stored samples to what a model takes: layout, scale, mean and deviation, and the checks."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, get_args

import numpy as np

from compress.errors import DataError, UsageError
from compress.model import TensorSpec

Layout = Literal["auto", "nchw", "nhwc"]

_TO_FIRST, _TO_LAST = (2, 0, 1), (1, 2, 0)
"""Orders of axes that bring the channels of one image to the front, or to the back."""


class Stored(Protocol):
    """Samples as they are stored: an array, or something that is decoded into one."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(n, ...), or () for a single value."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type before preparation."""


@dataclass(frozen=True)
class Normalization:
    """How floats are made: (raw * scale - mean) / std, and how stored images are laid out.

    Attributes:
        layout: of stored images; "auto" compares with the model's shape.
        mean: one number or one per channel, in units after scaling.
        std: the same.
        scale: None for 1/255 on uint8 and 1 on floats.
    """

    layout: Layout = "auto"
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    scale: float | None = None

    def __post_init__(self) -> None:
        if self.layout not in get_args(Layout):
            raise UsageError(
                f"There is no layout {self.layout!r}; it is one of {', '.join(get_args(Layout))}."
            )
        numbers = [*(self.mean or ()), *(self.std or ()), self.scale or 1.0]
        if not all(map(math.isfinite, numbers)):
            raise UsageError("mean, std and scale must be finite numbers.")
        if self.scale == 0:
            raise UsageError("A scale of 0 makes every value 0. Leave it out for the usual one.")
        if any(deviation <= 0 for deviation in self.std or ()):
            raise UsageError(
                f"std is {_listed(self.std)}, and the data are divided by it. Give positive "
                f"numbers, one for all channels or one for each."
            )

    @property
    def given(self) -> bool:
        """Whether any number was set."""
        return not (self.mean is None and self.std is None and self.scale is None)


@dataclass(frozen=True)
class Preparation:
    """Turns stored samples (n, ...) of one input into what the model takes.

    Attributes:
        spec: the input.
        sample: shape of one stored sample.
        dtype: numpy's name of the stored type.
        axes: order of a stored sample's axes that gives the model's, or None to keep it.
        scale: factor on the stored values.
        mean: subtracted, in a shape that broadcasts over a sample; or None.
        std: divided by, likewise.
    """

    spec: TensorSpec
    sample: tuple[int, ...]
    dtype: str
    axes: tuple[int, ...] | None = None
    scale: float = 1.0
    mean: np.ndarray | None = None
    std: np.ndarray | None = None

    def __call__(self, raw: np.ndarray) -> np.ndarray:
        """Samples (n, ...) in the model's layout and type; a scalar input stays one value."""
        if not self.spec.shape:
            return raw.reshape(()).astype(self.spec.dtype)
        if self.axes is not None:
            raw = raw.transpose(0, *(axis + 1 for axis in self.axes))
        array = raw.reshape(len(raw), *self.spec.shape[1:]).astype(self.spec.dtype, order="C")
        if self.scale != 1.0:
            array *= array.dtype.type(self.scale)
        if self.mean is not None:
            array -= self.mean.astype(array.dtype)
        if self.std is not None:
            array /= self.std.astype(array.dtype)
        return array

    def check_type(self, sample: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        """Refuse samples of another shape or type than this was made for.

        Raises:
            DataError: they differ.
        """
        if (sample, dtype.name) != (self.sample, self.dtype):
            raise DataError(
                f"The samples for input {self.spec.name!r} change from {_text(self.sample)} "
                f"{self.dtype} to {_text(sample)} {dtype.name}; all must have one shape and type."
            )

    def check_values(self, raw: np.ndarray, rows: np.ndarray) -> None:
        """Refuse values that the model's type cannot hold; `rows` are the samples' numbers.

        Raises:
            DataError: NaN, infinite, or outside of an integer type.
        """
        if raw.dtype.kind == "f":
            with np.errstate(over="ignore"):
                bad = ~np.isfinite(raw.astype(self.spec.dtype))
            problem = "are NaN or infinite"
        elif raw.dtype.kind in "iu" and self.spec.dtype != raw.dtype and not self._floats:
            limits = np.iinfo(self.spec.dtype)
            bad = (raw < limits.min) | (raw > limits.max)
            problem = f"do not fit into {self.spec.dtype}"
        else:
            return
        if bad.any():
            first = rows[np.argwhere(bad)[0][0]] if bad.ndim else 0
            raise DataError(
                f"{int(bad.sum())} values for input {self.spec.name!r} {problem}, the first in "
                f"sample {first}. Repair or remove these samples."
            )

    @property
    def _floats(self) -> bool:
        return self.spec.dtype.startswith("float")


def preparations(
    inputs: Sequence[TensorSpec],
    columns: Mapping[str, Stored],
    options: Normalization,
) -> dict[str, Preparation]:
    """How the columns become the inputs, by name.

    Raises:
        DataError: a shape or type does not fit.
        UsageError: the options do not fit.
    """
    floats = [spec.name for spec in inputs if spec.dtype.startswith("float")]
    if options.given and len(floats) > 1:
        raise UsageError(
            f"mean, std and scale cannot tell the float inputs {', '.join(floats)} apart. Give "
            f"data that are normalized already."
        )
    plain = dataclasses.replace(options, mean=None, std=None, scale=None)
    return {
        spec.name: _preparation(
            spec,
            columns[spec.name].shape[1:],
            columns[spec.name].dtype,
            options if spec.name in floats or not floats else plain,
        )
        for spec in inputs
    }


def _preparation(
    spec: TensorSpec, sample: tuple[int, ...], dtype: np.dtype[Any], options: Normalization
) -> Preparation:
    _check_kind(spec, dtype, options)
    axes = _axes(spec, sample, options.layout)
    if not spec.dtype.startswith("float"):
        return Preparation(spec, sample, dtype.name, axes)
    scale = options.scale
    if scale is None:
        scale = 1 / 255 if dtype == np.uint8 else 1.0
        if scale != 1.0 and max(map(abs, options.mean or (0,))) > 1:
            raise UsageError(
                f"The mean {_listed(options.mean)} is meant for values 0..255, and uint8 is "
                f"scaled to 0..1 first. Divide mean and std by 255, or give scale 1."
            )
    mean, std = (
        _per_channel(numbers, spec, name)
        for numbers, name in ((options.mean, "mean"), (options.std, "std"))
    )
    return Preparation(spec, sample, dtype.name, axes, scale, mean, std)


def check_labels(labels: np.ndarray, what: str) -> np.ndarray:
    """Class numbers (n,) as int64.

    Raises:
        DataError: another shape, another type, or negative.
    """
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise DataError(
            f"{what}: the labels have shape {_text(labels.shape)} and type {labels.dtype}. They "
            f"must be one class number per sample: integers of shape (n,). From one-hot rows, "
            f"take y.argmax(1)."
        )
    if len(labels) and labels.min() < 0:
        first = int(np.argmax(labels < 0))
        raise DataError(
            f"{what}: label {labels[first]} of sample {first} is negative. Classes are numbered "
            f"from 0."
        )
    return labels.astype(np.int64)


def _check_kind(spec: TensorSpec, dtype: np.dtype[Any], options: Normalization) -> None:
    """Refuse stored types that cannot mean what the model takes."""
    stored, floats = dtype.kind, spec.dtype.startswith("float")
    if not floats and options.given:
        raise UsageError(
            f"mean, std and scale are for float inputs; {spec.name!r} takes {spec.dtype}."
        )
    if floats:
        fits = stored == "f" or dtype == np.uint8 or (stored in "iu" and options.scale is not None)
        advice = "Store floats or uint8 images, or give a scale"
    elif spec.dtype == "bool":
        fits, advice = stored == "b", "Store booleans"
    else:
        fits, advice = stored in "iu", f"Store {spec.dtype}"
    if not fits:
        raise DataError(
            f"The samples for input {spec.name!r} are {dtype.name}, and it takes {spec.dtype}. "
            f"{advice}."
        )


def _axes(spec: TensorSpec, sample: tuple[int, ...], layout: Layout) -> tuple[int, ...] | None:
    """Order of a sample's axes that gives the model's; None where they agree already."""
    wanted = spec.shape[1:]
    options: list[tuple[int, ...] | None] = []
    if sample == wanted or (len(wanted) == 3 and 1 in wanted and sample == _grey(wanted)):
        options.append(None)
    if len(sample) == 3 and len(wanted) == 3:
        moved = [order for order in (_TO_FIRST, _TO_LAST) if _reordered(sample, order) == wanted]
        options.extend(moved)
    if not options and spec.assumed:
        raise DataError(
            f"One sample for input {spec.name!r} has shape {_text(sample)}; the model does not say "
            f"what it takes, and {_text(wanted)} was assumed. Give --input with the right shape."
        )
    if not options:
        raise DataError(
            f"One sample for input {spec.name!r} has shape {_text(sample)}, and the model takes "
            f"{_text(wanted)}. Give data of this shape; images may have their channels last."
        )
    if len(options) == 1:
        return options[0]
    if layout == "auto":
        raise DataError(
            f"Samples of shape {_text(sample)} may have their channels first or last. Say which "
            f"with --layout nchw or --layout nhwc."
        )
    # All three sizes are equal, so the model's own layout is unknown too: torch's is assumed.
    return None if layout == "nchw" else _TO_FIRST


def _grey(wanted: tuple[int | str, ...]) -> tuple[int | str, ...]:
    """The shape of one image without its single channel."""
    return wanted[1:] if wanted[0] == 1 else wanted[:-1] if wanted[-1] == 1 else wanted


def _reordered(sample: Sequence[int], order: Sequence[int]) -> tuple[int, ...]:
    return tuple(sample[axis] for axis in order)


def _per_channel(
    numbers: tuple[float, ...] | None, spec: TensorSpec, name: str
) -> np.ndarray | None:
    """The numbers in a shape that broadcasts over samples of `spec`."""
    if numbers is None:
        return None
    wanted = [size for size in spec.shape[1:] if isinstance(size, int)]
    array = np.array(numbers, np.float64)
    if len(numbers) == 1 or (wanted and wanted[-1] == len(numbers) != wanted[0]):
        return array
    if wanted and wanted[0] == len(numbers):
        return array.reshape(-1, *[1] * (len(wanted) - 1))
    raise UsageError(
        f"{name} has {len(numbers)} numbers ({_listed(numbers)}), and one sample of input "
        f"{spec.name!r} has shape {_text(wanted)}. Give one number, or one per channel."
    )


def _text(shape: Sequence[int | str]) -> str:
    return "x".join(map(str, shape)) or "scalar"


def _listed(numbers: Sequence[float] | None) -> str:
    return ", ".join(f"{number:g}" for number in numbers or ())
