"""Calibration and evaluation data: samples in a fixed order, made ready batch by batch.

Everything that a user can hand over (arrays, files, folders, functions) is checked here against
the model's inputs. Behind `load_data` there are two forms: a table whose rows can be picked, and
a stream that a function yields anew on every pass.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from compress.columns import check_whole, columns_of, count_of, whole_inputs
from compress.errors import CompressError, DataError, UsageError
from compress.model import Arrays, TensorSpec
from compress.preparation import Layout, Normalization, Preparation, preparations
from compress.sources import Images, import_function, is_function_name, read_file, read_folder

__all__ = ["Batch", "Data", "Layout", "load_data"]

_CHUNK = 256
"""Rows that are read at once for checking and hashing."""


@dataclass(frozen=True)
class Batch:
    """Some samples, ready for an engine.

    Attributes:
        inputs: by input name, (n, ...) in the model's types; scalar inputs have no axis.
        labels: (n,) int64, or None.
        whole: axis 0 of the inputs is not the batch (see `whole_inputs`), so this is one sample.
    """

    inputs: Arrays
    labels: np.ndarray | None = None
    whole: bool = False

    def __len__(self) -> int:
        if self.whole:
            return 1
        return next(len(array) for array in self.inputs.values() if array.ndim)

    def rows(self, start: int, stop: int | None) -> Batch:
        """Some of the samples, as views."""
        inputs = {k: v[start:stop] if v.ndim else v for k, v in self.inputs.items()}
        return Batch(inputs, None if self.labels is None else self.labels[start:stop])


class Data(Protocol):
    """Samples in a fixed order: two passes see the same."""

    @property
    def name(self) -> str:
        """Short, for reports."""

    @property
    def sha256(self) -> str:
        """Hash of the samples, the labels and how they are prepared; reads them all once."""

    @property
    def labelled(self) -> bool:
        """Whether batches carry labels."""

    def __len__(self) -> int:
        """Number of samples."""

    def batches(self, size: int) -> Iterator[Batch]:
        """All samples, `size` at a time; the last batch may be smaller."""

    def take(self, count: int) -> Data:
        """At most `count` samples that stand for all of them."""


def load_data(
    source: Any,
    inputs: Sequence[TensorSpec],
    *,
    layout: Layout = "auto",
    mean: float | Sequence[float] | None = None,
    std: float | Sequence[float] | None = None,
    scale: float | None = None,
    limit: int | None = None,
) -> Data:
    """Open data for a model's inputs and check that they fit.

    Args:
        source: a path (.npz with x and y or arrays named as the inputs, .npy, tensors saved by
            torch.save, or a folder of images); `module:function`, a callable or an iterable
            that yields batches x, (x, y) or dicts; an array or tensor (n, ...); a tuple (x, y);
            a dict of arrays; or `Data`, which is returned as it is. Where `whole_inputs` holds,
            only a function or an iterable of dicts, each one sample in the model's own shapes.
        inputs: of the model.
        layout: of the images in `source`; "auto" compares with the model's shape.
        mean: subtracted after scaling, one number or one per channel.
        std: divided by after that.
        scale: multiplies the raw values; 1/255 by default for uint8 that become floats, else 1.
        limit: use at most so many samples (see `Data.take`).

    Raises:
        DataError: the data do not fit the model, or cannot be read.
        UsageError: options that contradict each other, or a name that cannot be imported.
        MissingExtraError: images without Pillow.
    """
    if limit is not None and limit < 1:
        raise UsageError(f"A limit of {limit} samples leaves nothing; give at least 1.")
    if hasattr(source, "batches") and hasattr(source, "take"):
        data: Data = source
        return data if limit is None else data.take(limit)
    options = Normalization(layout, _numbers(mean), _numbers(std), scale)
    if isinstance(source, str) and is_function_name(source) and not Path(source).exists():
        return _stream(source, import_function(source), inputs, options, limit)
    if isinstance(source, (str, Path)):
        table = _table_from_path(Path(source), inputs, options)
    elif isinstance(source, (tuple, Mapping)) or hasattr(source, "__array__"):
        table = _table("array", *columns_of("The data", source, inputs), inputs, options)
    else:
        name = getattr(source, "__name__", type(source).__name__)
        return _stream(name, source, inputs, options, limit)
    table = table if limit is None else table.take(limit)
    table.check()
    return table


@dataclass(frozen=True)
class _Table:
    """Samples whose rows can be read in any order; `picked` are the ones in use."""

    name: str
    columns: Mapping[str, np.ndarray | Images]
    labels: np.ndarray | None
    preparations: Mapping[str, Preparation]
    picked: np.ndarray

    @property
    def labelled(self) -> bool:
        return self.labels is not None

    def __len__(self) -> int:
        return len(self.picked)

    def batches(self, size: int) -> Iterator[Batch]:
        for rows in self._chunks(size):
            inputs = {
                name: prepare(self._read(name, rows)) for name, prepare in self.preparations.items()
            }
            yield Batch(inputs, None if self.labels is None else self.labels[rows])

    def take(self, count: int) -> _Table:
        """One random row (fixed seed) out of each of `count` equal stretches, in order.

        So a table that is sorted by class keeps its proportions, and one whose classes
        alternate does not always meet the same class, as it would with every k-th row.
        """
        total = len(self.picked)
        if count >= total:
            return self
        edges = np.arange(count + 1) * total // count
        chosen = np.random.default_rng(0).integers(edges[:-1], edges[1:])
        return dataclasses.replace(self, picked=self.picked[chosen])

    @cached_property
    def sha256(self) -> str:
        digest = _Digest(*self.preparations.values())
        for rows in self._chunks(_CHUNK):
            for name, column in self.columns.items():
                if isinstance(column, Images):
                    for row in rows:
                        digest.add(name, column.encoded(row))
                else:
                    digest.add(name, self._read(name, rows).tobytes())
            if self.labels is not None:
                digest.add("", self.labels[rows].tobytes())
        return digest.text()

    def check(self) -> None:
        """Read the values in use once and refuse those that the model's type cannot hold."""
        arrays = [name for name, column in self.columns.items() if not isinstance(column, Images)]
        for name in arrays:
            for rows in self._chunks(_CHUNK):
                self.preparations[name].check_values(self._read(name, rows), rows)

    def _chunks(self, size: int) -> Iterator[np.ndarray]:
        for start in range(0, len(self), size):
            yield self.picked[start : start + size]

    def _read(self, name: str, rows: np.ndarray) -> np.ndarray:
        column = self.columns[name]
        return np.asarray(column[rows]) if column.shape else np.asarray(column)


@dataclass(frozen=True)
class _Stream:
    """Samples that a function yields; a first pass counts, checks and hashes them."""

    name: str
    items: Callable[[], Iterable[Any]]
    inputs: tuple[TensorSpec, ...]
    options: Normalization
    limit: int | None
    count: int = 0
    labelled: bool = False
    sha256: str = ""

    def __len__(self) -> int:
        return self.count

    def batches(self, size: int) -> Iterator[Batch]:
        held: Batch | None = None
        seen = 0
        for batch in self._read():
            seen += len(batch)
            if batch.whole:
                yield batch
                continue
            held = batch if held is None else _join(held, batch)
            full = len(held) // size * size
            for start in range(0, full, size):
                yield held.rows(start, start + size)
            held = held.rows(full, None)
        if held is not None and len(held):
            yield held
        if seen != self.count:
            raise DataError(
                f"{self.name} yielded {self.count} samples on the first pass and {seen} now. "
                f"Every pass must yield the same samples in the same order."
            )

    def take(self, count: int) -> _Stream:
        """The first `count` samples: a stream can only be read in its author's order."""
        return self if count >= self.count else dataclasses.replace(self, limit=count).opened()

    def opened(self) -> _Stream:
        """The same stream after its first pass.

        Raises:
            DataError: it yields nothing, or something that does not fit.
        """
        digest = _Digest(self.inputs, self.options)
        count, labelled = 0, set()
        for batch in self._read(digest):
            count += len(batch)
            labelled.add(batch.labels is not None)
        if not count:
            raise DataError(f"{self.name} yielded no samples; at least one is needed.")
        if len(labelled) > 1:
            raise DataError(
                f"{self.name} yields labels with some batches and not with others. Yield (x, y) "
                f"always or never."
            )
        return dataclasses.replace(
            self, count=count, labelled=labelled == {True}, sha256=digest.text()
        )

    def _read(self, digest: _Digest | None = None) -> Iterator[Batch]:
        """Prepared batches in the sizes in which they come."""
        start = 0
        prepare: dict[str, Preparation] = {}
        whole = whole_inputs(self.inputs)
        for item in self._items():
            what = f"{self.name}, the batch from sample {start} on"
            columns, labels = columns_of(what, item, self.inputs)
            if whole:
                check_whole(what, columns, labels, self.inputs)
            count = 1 if whole else count_of(what, columns, labels)
            prepare = prepare or preparations(self.inputs, columns, self.options)
            kept = count if self.limit is None else min(count, self.limit - start)
            inputs = {}
            for name, column in columns.items():
                raw = column[:kept] if column.shape and not whole else column
                rows = np.full(raw.shape[:1], start) if whole else np.arange(start, start + kept)
                prepare[name].check_type(raw.shape[1:], raw.dtype)
                prepare[name].check_values(raw, rows)
                inputs[name] = prepare[name](raw)
                if digest is not None:
                    digest.add(name, raw.tobytes())
            batch = Batch(inputs, None if labels is None else labels[:kept], whole)
            if digest is not None and batch.labels is not None:
                digest.add("", batch.labels.tobytes())
            yield batch
            start += kept
            if start == self.limit:
                return

    def _items(self) -> Iterator[Any]:
        try:
            yield from self.items()
        except CompressError:
            raise
        except Exception as error:
            raise DataError(f"{self.name} failed with {type(error).__name__}: {error}") from error


class _Digest:
    """A hash over several columns that does not depend on how they are cut into batches."""

    def __init__(self, *described: object) -> None:
        self._columns: dict[str, Any] = {}
        self._described = described

    def add(self, column: str, data: bytes) -> None:
        self._columns.setdefault(column, hashlib.sha256()).update(data)

    def text(self) -> str:
        parts = sorted((name, digest.hexdigest()) for name, digest in self._columns.items())
        return hashlib.sha256(f"{self._described} {parts}".encode()).hexdigest()


def _stream(
    name: str, source: Any, inputs: Sequence[TensorSpec], options: Normalization, limit: int | None
) -> _Stream:
    if isinstance(source, Iterator):
        raise DataError(
            f"{name} is an iterator, which can be read only once. Give the function that makes it."
        )
    if not (callable(source) or isinstance(source, Iterable)):
        raise DataError(
            f"{name} of type {type(source).__name__} is no data. Give a path, an array, (x, y), a "
            f"dict of arrays, or a function that yields batches."
        )
    items = source if callable(source) else source.__iter__
    return _Stream(name, items, tuple(inputs), options, limit).opened()


def _table_from_path(path: Path, inputs: Sequence[TensorSpec], options: Normalization) -> _Table:
    if path.is_dir():
        if len(inputs) != 1:
            raise DataError(
                f"{path} is a folder of images, and the model has {len(inputs)} inputs. Give an "
                f".npz file with arrays named {', '.join(repr(spec.name) for spec in inputs)}."
            )
        images, labels = read_folder(path, inputs[0])
        return _table(path.name, {inputs[0].name: images}, labels, inputs, options)
    if not path.exists():
        raise DataError(
            f"There is no file or folder {path}. Data are an .npz or .npy file, tensors saved by "
            f"torch.save, a folder of images, or module:function."
        )
    return _table(path.name, *columns_of(str(path), read_file(path), inputs), inputs, options)


def _table(
    name: str,
    columns: Mapping[str, np.ndarray | Images],
    labels: np.ndarray | None,
    inputs: Sequence[TensorSpec],
    options: Normalization,
) -> _Table:
    if whole_inputs(inputs):
        raise DataError(
            f"{name} would be cut into samples along axis 0, and the model's inputs "
            f"({', '.join(map(str, inputs))}) do not have the batch there. Give module:function, a "
            f"function that yields one dict of arrays in exactly these shapes per sample."
        )
    count = count_of(name, columns, labels)
    if not count:
        raise DataError(f"{name} holds no samples; at least one is needed.")
    return _Table(name, columns, labels, preparations(inputs, columns, options), np.arange(count))


def _join(first: Batch, second: Batch) -> Batch:
    inputs = {
        name: np.concatenate([array, second.inputs[name]]) if array.ndim else array
        for name, array in first.inputs.items()
    }
    if first.labels is None or second.labels is None:
        return Batch(inputs)
    return Batch(inputs, np.concatenate([first.labels, second.labels]))


def _numbers(value: float | Sequence[float] | None) -> tuple[float, ...] | None:
    if value is None:
        return None
    return (float(value),) if isinstance(value, (int, float)) else tuple(map(float, value))
