"""Fidelity: how close the outputs of one engine are to another's, with or without labels."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from compress.columns import whole_inputs
from compress.data import Batch, Data
from compress.errors import EngineError
from compress.model import Arrays, TensorSpec, random_inputs
from compress.progress import Progress, silent
from compress.running import BATCH, batch_size, class_scores, run
from compress.target import Engine


@dataclass(frozen=True)
class OutputFidelity:
    """One output, over all samples.

    Attributes:
        cosine: of the two flattened outputs, -1..1; 1 where both are zero.
        sqnr_db: 10 log10 of signal power over power of the difference; infinite where equal.
        max_abs_difference: largest single difference; infinite where only one is finite.
    """

    cosine: float
    sqnr_db: float
    max_abs_difference: float


@dataclass(frozen=True)
class Fidelity:
    """A candidate against a reference. The three figures are those of the worst output.

    Attributes:
        samples: number of samples compared.
        source: "calibration data", "evaluation data" or "random inputs".
        top1_agreement: share of samples with the same largest class; None without classes.
        cosine: see `OutputFidelity`.
        sqnr_db: see `OutputFidelity`.
        max_abs_difference: see `OutputFidelity`.
        per_output: by output name.
    """

    samples: int
    source: str
    top1_agreement: float | None
    cosine: float
    sqnr_db: float
    max_abs_difference: float
    per_output: Mapping[str, OutputFidelity]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for reports; what is infinite becomes None, `identical` tells which."""
        values = dataclasses.asdict(self)
        values["per_output"] = {k: _finite(v) for k, v in values["per_output"].items()}
        return {**_finite(values), "identical": self.max_abs_difference == 0}


@dataclass
class _Sums:
    """Streaming sums in float64 over one output."""

    signal: float = 0.0
    candidate: float = 0.0
    product: float = 0.0
    noise: float = 0.0
    largest: float = 0.0

    def add(self, reference: np.ndarray, candidate: np.ndarray) -> None:
        a, b = reference.astype(np.float64).ravel(), candidate.astype(np.float64).ravel()
        # Masks are often -inf in both; only a difference in what is finite counts against it.
        finite = np.isfinite(a) & np.isfinite(b)
        if not np.array_equal(a[~finite], b[~finite], equal_nan=True):
            self.noise = self.largest = math.inf
        a, b = a[finite], b[finite]
        self.signal += float(a @ a)
        self.candidate += float(b @ b)
        self.product += float(a @ b)
        difference = a - b
        self.noise += float(difference @ difference)
        self.largest = max(self.largest, float(np.abs(difference).max(initial=0)))

    def result(self) -> OutputFidelity:
        return OutputFidelity(self._cosine(), self._sqnr_db(), self.largest)

    def _cosine(self) -> float:
        if self.noise == 0:
            return 1.0
        norm = math.sqrt(self.signal) * math.sqrt(self.candidate)
        if not norm or not math.isfinite(self.noise):
            return 0.0
        return max(-1.0, min(1.0, self.product / norm))

    def _sqnr_db(self) -> float:
        if self.noise == 0:
            return math.inf
        if self.signal == 0 or not math.isfinite(self.noise):
            return -math.inf
        return 10 * (math.log10(self.signal) - math.log10(self.noise))


@dataclass
class _Agreement:
    """Counts samples whose largest class is the same."""

    same: int = 0
    total: int = 0
    classified: bool = True

    def add(self, reference: Arrays, candidate: Arrays) -> None:
        a, b = class_scores(reference), class_scores(candidate)
        if a is None or b is None:
            self.classified = False
            return
        self.same += int(np.count_nonzero(a.argmax(1) == b.argmax(1)))
        self.total += len(a)

    def share(self) -> float | None:
        return self.same / self.total if self.classified and self.total else None


def fidelity(
    reference: Engine,
    candidate: Engine,
    data: Data | None = None,
    *,
    source: str = "calibration data",
    samples: int = 256,
    batch: int = BATCH,
    seed: int = 0,
    progress: Progress = silent,
) -> Fidelity:
    """Compare the outputs of two engines on the same inputs, with memory for one batch.

    Args:
        reference: the original.
        candidate: what became of it; its outputs are matched by name, else by position.
        data: labelled or not; None for random inputs, which the result says.
        source: what `data` are.
        samples: compare at most so many.
        batch: samples per call where batches are dynamic.
        seed: of the random inputs.
        progress: opens a tracker in samples.

    Raises:
        EngineError: an engine failed, or their outputs differ in number or shape.
    """
    size = min(batch_size(engine, batch) for engine in (reference, candidate))
    chosen = data.take(samples) if data is not None else None
    batches = chosen.batches(size) if chosen else _random(reference.inputs, samples, size, seed)
    total = len(chosen) if chosen else samples
    compared = 0
    sums: dict[str, _Sums] = {}
    agreement = _Agreement()
    with progress(f"Comparing {candidate.name} with {reference.name}", total) as advance:
        for some in batches:
            expected = run(reference, some)
            got = _matched(expected, run(candidate, some), candidate.name)
            for name, array in expected.items():
                sums.setdefault(name, _Sums()).add(array, got[name])
            agreement.add(expected, got)
            compared += len(some)
            advance(len(some))
    per_output = {name: total_sums.result() for name, total_sums in sums.items()}
    return Fidelity(
        samples=compared,
        source=source if chosen else "random inputs",
        top1_agreement=agreement.share(),
        cosine=min(found.cosine for found in per_output.values()),
        sqnr_db=min(found.sqnr_db for found in per_output.values()),
        max_abs_difference=max(found.max_abs_difference for found in per_output.values()),
        per_output=per_output,
    )


def closeness(reference: Arrays, candidate: Arrays, name: str) -> OutputFidelity:
    """How close the outputs of one call are to another's: the figures of the worst output.

    Raises:
        EngineError: the outputs of `name` differ from the reference's in number or shape.
    """
    got = _matched(reference, candidate, name)
    sums = {key: _Sums() for key in reference}
    for key, array in reference.items():
        sums[key].add(array, got[key])
    found = [one.result() for one in sums.values()]
    return OutputFidelity(
        cosine=min(one.cosine for one in found),
        sqnr_db=min(one.sqnr_db for one in found),
        max_abs_difference=max(one.max_abs_difference for one in found),
    )


def _matched(expected: Arrays, got: Arrays, name: str) -> Arrays:
    """The candidate's outputs under the reference's names."""
    if set(expected) != set(got) and len(expected) == len(got):
        got = dict(zip(expected, got.values(), strict=True))
    shapes = {key: array.shape for key, array in expected.items()}
    other = {key: array.shape for key, array in got.items()}
    if shapes != other:
        raise EngineError(
            f"{name} has outputs {other}, and the original has {shapes}. They cannot be compared; "
            f"a pass has changed what the model returns."
        )
    return got


def _random(inputs: Sequence[TensorSpec], samples: int, size: int, seed: int) -> Iterator[Batch]:
    rng = np.random.default_rng(seed)
    for start in range(0, samples, size):
        arrays = random_inputs(inputs, min(size, samples - start), rng)
        yield Batch(arrays, whole=whole_inputs(inputs))


def _finite(values: dict[str, Any]) -> dict[str, Any]:
    infinite = (k for k, v in values.items() if isinstance(v, float) and not math.isfinite(v))
    return {**values, **dict.fromkeys(infinite)}
