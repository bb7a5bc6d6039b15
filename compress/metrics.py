"""What was lost: accuracy on labelled data, or the score that a function of the user gives.

Everything runs on engines, so the figures are those of the artifact in its own runtime. Drops
are paired: the same samples before and after, because a standard error of two separate
accuracies would hide a difference that the samples themselves show (McNemar's situation).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from compress.data import Data, Layout, load_data
from compress.errors import CompressError, DataError
from compress.model import TensorSpec
from compress.progress import Progress, silent
from compress.running import BATCH, batch_size, class_scores, run
from compress.sources import import_function, is_function_name
from compress.target import Engine


@dataclass(frozen=True, eq=False)
class Accuracy:
    """Top-1 of one engine.

    Attributes:
        correct: (n,) bool, in the order of the data.
    """

    correct: np.ndarray

    @property
    def value(self) -> float:
        """Share of correct samples, 0..1."""
        return float(self.correct.mean())

    @property
    def n(self) -> int:
        """Number of samples."""
        return len(self.correct)

    @property
    def standard_error(self) -> float:
        """Binomial standard error of `value`."""
        return math.sqrt(self.value * (1 - self.value) / self.n)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for reports, without the single samples."""
        return {"value": self.value, "n": self.n, "standard_error": self.standard_error}

    def __str__(self) -> str:
        return f"{self.value:.2%} of {self.n}"


@dataclass(frozen=True)
class Drop:
    """Accuracy lost on the same samples, in percentage points; negative where it was gained.

    Attributes:
        points: accuracy before minus accuracy after.
        low: lower end of the 95 % bootstrap interval.
        high: upper end.
        agreement: share of samples that both get right or both get wrong.
    """

    points: float
    low: float
    high: float
    agreement: float

    def __str__(self) -> str:
        return f"{self.points:+.2f} points [{self.low:+.2f}, {self.high:+.2f}]"


@dataclass(frozen=True)
class Score:
    """What an evaluator found; higher is better.

    Attributes:
        value: 0..1 for top-1, anything for a function's score.
        unit: "top-1" or "score".
        accuracy: sample by sample, for top-1.
    """

    value: float
    unit: Literal["top-1", "score"]
    accuracy: Accuracy | None = None

    @property
    def n(self) -> int | None:
        """Number of samples, None where only the function knows."""
        return self.accuracy.n if self.accuracy else None


@dataclass(frozen=True)
class Evaluator:
    """Scores an engine: by top-1 on labelled data, or by a function of the user.

    Attributes:
        name: of the data or the function, for reports.
        source: labelled samples, or a function that takes an engine and returns a number.
    """

    name: str
    source: Data | Callable[[Engine], Any]

    @property
    def data(self) -> Data | None:
        """The labelled samples, None for a function."""
        return None if callable(self.source) else self.source

    def __call__(self, engine: Engine, progress: Progress = silent) -> Score:
        """The engine's score.

        Raises:
            DataError: the function failed or returned no finite number, or labels do not fit.
            EngineError: the engine failed.
        """
        if not callable(self.source):
            accuracy = top1(engine, self.source, progress=progress)
            return Score(accuracy.value, "top-1", accuracy)
        with progress(f"Evaluating {engine.name} with {self.name}", 1) as advance:
            value = self._number(self.source, engine)
            advance()
        return Score(value, "score")

    def _number(self, function: Callable[[Engine], Any], engine: Engine) -> float:
        try:
            returned = function(engine)
            value = math.nan if returned is None else float(returned)
        except CompressError:
            raise
        except Exception as error:
            raise DataError(
                f"The evaluation {self.name} failed on {engine.name} with "
                f"{type(error).__name__}: {error}. It must take an engine, which maps a dict of "
                f"arrays to a dict of arrays, and return one number, higher being better."
            ) from error
        if not math.isfinite(value) or isinstance(returned, (bool, str)):
            raise DataError(
                f"The evaluation {self.name} returned {returned!r} for {engine.name}. It must "
                f"return one finite number, higher being better."
            )
        return value


def resolve_evaluator(
    spec: Any,
    inputs: Sequence[TensorSpec],
    *,
    layout: Layout = "auto",
    mean: float | Sequence[float] | None = None,
    std: float | Sequence[float] | None = None,
    scale: float | None = None,
    limit: int | None = None,
) -> Evaluator:
    """The evaluator that an option names.

    `module:function`, or a callable that is no `Data`, is called with an engine and returns a
    number. Everything else is labelled data and gives top-1; the other arguments are those of
    `compress.data.load_data`.

    Raises:
        DataError: the data do not fit, or have no labels.
        UsageError: the function cannot be imported.
    """
    if isinstance(spec, Evaluator):
        return spec
    if isinstance(spec, str) and is_function_name(spec) and not Path(spec).exists():
        function = import_function(spec)
        if not callable(function):
            raise DataError(
                f"{spec} is of type {type(function).__name__}. It must be a function that takes an "
                f"engine and returns a number."
            )
        return Evaluator(spec, function)
    if callable(spec):
        return Evaluator(getattr(spec, "__name__", type(spec).__name__), spec)
    data = load_data(spec, inputs, layout=layout, mean=mean, std=std, scale=scale, limit=limit)
    _check_labelled(data)
    return Evaluator(data.name, data)


def top1(
    engine: Engine, data: Data, *, batch: int = BATCH, progress: Progress = silent
) -> Accuracy:
    """Share of samples whose largest output is their label.

    The first output of shape (N, classes) counts. A sample with NaN among its outputs is wrong.

    Args:
        engine: with a dynamic or a fixed batch.
        data: labelled.
        batch: samples per call where the engine's batch is dynamic.
        progress: opens a tracker in samples.

    Raises:
        DataError: no labels, labels that are no classes of the model, or no such output.
        EngineError: the engine failed.
    """
    _check_labelled(data)
    correct = []
    with progress(f"Accuracy of {engine.name}", len(data)) as advance:
        for samples in data.batches(batch_size(engine, batch)):
            scores = class_scores(run(engine, samples))
            if scores is None or samples.labels is None:
                raise DataError(
                    f"{engine.name} has no output of shape (N, classes), so there is no top-1. "
                    f"Give --eval module:function, a function that scores an engine."
                )
            _check_classes(samples.labels, scores.shape[1], data.name)
            right = (scores.argmax(1) == samples.labels) & ~np.isnan(scores).any(1)
            correct.append(right)
            advance(len(right))
    return Accuracy(np.concatenate(correct))


def paired_drop(before: Accuracy, after: Accuracy, seed: int = 0) -> Drop:
    """What was lost between two accuracies on the same samples, with its bootstrap interval.

    Every sample differs by -1, 0 or 1, so a bootstrap resample is one multinomial draw of the
    three counts: 10,000 resamples cost no more than one (Efron & Tibshirani, An Introduction to
    the Bootstrap, 1993, chapter 13).

    Raises:
        DataError: they were not measured on the same number of samples.
    """
    if before.n != after.n:
        raise DataError(
            f"Accuracies on {before.n} and on {after.n} samples cannot be paired. Measure both "
            f"on the same data."
        )
    lost = np.count_nonzero(before.correct & ~after.correct)
    gained = np.count_nonzero(~before.correct & after.correct)
    same = before.n - lost - gained
    shares = np.array([lost, gained, same]) / before.n
    draws = np.random.default_rng(seed).multinomial(before.n, shares, 10_000)
    low, high = np.quantile((draws[:, 0] - draws[:, 1]) * 100 / before.n, (0.025, 0.975))
    return Drop((lost - gained) * 100 / before.n, float(low), float(high), same / before.n)


def _check_labelled(data: Data) -> None:
    if not data.labelled:
        raise DataError(
            f"{data.name} has no labels, so there is no accuracy. Add them (y in an .npz file, one "
            f"sub-folder per class), or use it for --calibration."
        )


def _check_classes(labels: np.ndarray, classes: int, name: str) -> None:
    largest = int(labels.max())
    if largest < classes:
        return
    hint = " Its labels seem to begin at 1: subtract 1." if largest == classes else ""
    raise DataError(
        f"{name} has the label {largest}, and the model has {classes} classes, 0..{classes - 1}."
        f"{hint} Labels must number the model's own classes."
    )
