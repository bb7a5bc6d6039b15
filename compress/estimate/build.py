"""Build a predictor for this machine: sample networks, learn, look where it errs, sample there."""

from __future__ import annotations

import dataclasses
import gc
import math
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from compress.errors import CompressError, EngineError, UnsupportedError, UsageError
from compress.estimate.analytical import group
from compress.estimate.features import Described
from compress.estimate.fit import (
    FEWEST_NETWORKS,
    FOLDS,
    Labels,
    TypePredictor,
    check_enough,
    fit_types,
    label,
    predict_kernels,
)
from compress.estimate.graphs import quantized
from compress.estimate.networks import Window, networks_around, random_network
from compress.estimate.peaks import cached_peaks
from compress.estimate.place import place_of
from compress.estimate.predictor import Predictor
from compress.estimate.samples import (
    Sample,
    append_sample,
    describe_engine,
    read_samples,
    reference_call,
    take_sample,
)
from compress.estimate.trees import import_xgboost
from compress.machine import this_machine, versions
from compress.model import Model
from compress.progress import Progress, silent
from compress.target import Target

MINUTES = 10.0
_ROUNDS = 3
"""How often it looks where it errs."""
_RANDOM_SHARE = 0.6
"""Of the time, for random networks; the rest goes to what is predicted badly."""
_ERROR = 0.1
_FIT_SECONDS = 45.0
_WINDOWS = 4
"""Convolutions in one network that is made around one that is predicted badly."""


@dataclasses.dataclass
class _Building:
    """One build: what is given, and the samples so far."""

    target: Target
    path: Path
    seed: int
    samples: list[Sample]
    reference: Any
    started: float
    spent: float

    @property
    def seconds(self) -> float:
        """Spent so far, in earlier runs too."""
        return self.spent + time.perf_counter() - self.started

    def add(self, model: Model) -> None:
        """Sample a network, in int8 too where the target has it; what it refuses is left out."""
        opset = self.target.capabilities.precisions
        place = place_of(self.target)
        for wanted in ("float32", "int8"):
            if wanted not in opset:
                continue
            try:
                made = quantized(model, self.target) if wanted == "int8" else model
                sample = take_sample(self.target, made, self.reference)
            except CompressError:
                continue
            sample = dataclasses.replace(sample, spent_seconds=self.seconds)
            append_sample(self.path, place, sample)
            self.samples.append(sample)


def build_predictor(
    target: Target,
    *,
    minutes: float = MINUTES,
    models: Sequence[Model] = (),
    samples: Path | None = None,
    seed: int = 0,
    progress: Progress = silent,
) -> Predictor:
    """Learn the times of a runtime's kernels on this machine.

    Samples are appended to a file as they come; called again after it was stopped, it goes on from
    there with the time that was left.

    Args:
        target: one runtime that tells the times of its kernels.
        minutes: for all of it.
        models: at the ONNX stage; half of the samples are like their convolutions.
        samples: file that grows; by default in the cache folder of the place.
        seed: of the networks.
        progress: opens a tracker in seconds.

    Raises:
        UnsupportedError: the target tells no times.
        UsageError: it refuses nearly all networks, so that there is nothing to learn from.
        MissingExtraError: XGBoost is not installed.
    """
    import_xgboost()
    if not target.capabilities.profiler:
        raise UnsupportedError(
            f"Target {target.name} does not tell the time of each kernel, so no predictor can be "
            f"built for it. `compress bench` measures it."
        )
    if not (math.isfinite(minutes) and minutes > 0):
        raise UsageError(f"--minutes {minutes} must be a positive number.")
    place = place_of(target)
    path = samples or place.folder / "samples.jsonl"
    known = read_samples(path, place)
    peaks = cached_peaks(target, progress=progress)
    spent = max((one.spent_seconds for one in known), default=0.0)
    reference = reference_call(target)
    one = _Building(target, path, seed, known, reference, time.perf_counter(), spent)
    limit = minutes * 60 - min(_FIT_SECONDS, minutes * 12)
    windows = [w for model in models for w in _windows_of(target, model)]
    with _settled_heap(), progress(f"Sample networks on {target.name}", limit) as advance:
        at = 0.0
        for now in _sampling(one, limit, windows):
            advance(now - at, f"{len(one.samples)} samples")
            at = now
    check_enough(one.samples)
    with progress(f"Learn from {len(one.samples)} samples") as _:
        labels = label(one.samples)
        errors = held_out(one.samples, labels, seed)
        types = fit_types(one.samples, labels.times_us, seed=seed)
        types = errors.corrected(types)
    return Predictor(
        place,
        types,
        labels.call_us,
        labels.overhead_us,
        errors.ratios,
        peaks,
        {
            **errors.report(one.samples),
            "samples": len(one.samples),
            "networks": len({sample.network for sample in one.samples}),
            "kernels": sum(len(sample.kernels) for sample in one.samples),
            "seconds": one.seconds,
            "reference_ms": labels.reference_ms,
            "machine": this_machine().to_dict(),
            "versions": versions("hwcompress", "onnxruntime", "openvino", "xgboost", "xgboost-cpu"),
            "built": datetime.now(UTC).isoformat(timespec="seconds"),
        },
    )


@contextmanager
def _settled_heap() -> Iterator[None]:
    """Leave what is in memory now out of garbage collections, which `measure` begins with.

    With all libraries loaded each takes longer than timing a network does.
    """
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _sampling(one: _Building, limit: float, windows: Sequence[Window]) -> Iterator[float]:
    """Add samples until the time is over; yields the seconds spent."""
    opset = one.target.capabilities.opset
    index = len({sample.network for sample in one.samples})
    first = limit * _RANDOM_SHARE
    ends = [first + (limit - first) * (k + 1) / _ROUNDS for k in range(_ROUNDS)]
    bad: list[Window] = []
    looked = 0
    attempts = 0
    while one.seconds < limit or (index < FEWEST_NETWORKS and attempts < 4 * FEWEST_NETWORKS):
        attempts += 1
        rng = np.random.default_rng((one.seed, index))
        due = sum(one.seconds >= end for end in (first, *ends))
        if due > looked:
            bad, looked = _badly_predicted(one), due
        around = bad if bad and index % 2 else windows if windows and index % 2 == 0 else []
        if around:
            start = around[int(rng.integers(len(around)))]
            alike = [
                w for w in around if (w.size, w.channels_in) == (start.size, start.channels_in)
            ]
            picked = [alike[int(rng.integers(len(alike)))] for _ in range(_WINDOWS - 1)]
            model = networks_around([start, *picked], rng, f"around {index}", opset)
        else:
            model = random_network(rng, f"random {index}", opset)
        one.add(model)
        index += 1
        if attempts == 2 * FEWEST_NETWORKS and not one.samples:
            return  # it refuses all of them
        yield min(one.seconds, limit)


def _badly_predicted(one: _Building) -> list[Window]:
    """Convolutions that were held out and are more than 10 % off, as often as they take time."""
    if len({sample.network for sample in one.samples}) < 2 * FOLDS:
        return []
    labels = label(one.samples)
    found = held_out(one.samples, labels, one.seed, rounds=60)
    windows: list[Window] = []
    shares: list[float] = []
    for sample, predicted, taken in zip(
        one.samples, found.kernels_us, labels.times_us, strict=True
    ):
        for kernel, guess, true in zip(sample.kernels, predicted, taken, strict=True):
            window = window_of(kernel)
            if window is not None and not abs(guess / true - 1) <= _ERROR:
                windows.append(window)
                shares.append(float(true / taken.sum()))
    order = np.argsort(shares)[::-1][: max(20, len(windows) // 4)]
    return [windows[i] for i in order]


def window_of(kernel: Described) -> Window | None:
    """The convolution that a kernel computes, as sampling sees it; None for other kernels."""
    raw = kernel.raw
    if "Conv" not in kernel.type or raw["height"] < 2 or "grouped" in kernel.type:
        return None
    stride = int(raw["stride"])
    return Window(
        size=round(raw["height"]) * stride,
        channels_in=round(raw["channels_in"]),
        channels_out=round(raw["channels_out"]),
        kernel=max(1, round(math.sqrt(raw["kernel"]))),
        stride=stride,
        depthwise="depthwise" in kernel.type,
    )


def _windows_of(target: Target, model: Model) -> list[Window]:
    """The convolutions of a user's own network."""
    try:
        kernels = describe_engine(target.build(model), model)
    except EngineError as error:
        raise UnsupportedError(f"{target.name} does not run {model.name}: {error}") from error
    return [window for one in kernels if (window := window_of(one)) is not None]


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """What predictors made of networks that they had not seen (five-fold cross-validation).

    Attributes:
        totals_us: true totals (networks,).
        predicted_us: theirs (networks,).
        kernels_us: of each network's kernels.
        factors: by kernel type, true over predicted sums.
        ratios: true / predicted by `analytical.group`, factors applied.
    """

    totals_us: np.ndarray
    predicted_us: np.ndarray
    kernels_us: tuple[np.ndarray, ...]
    true_us: tuple[np.ndarray, ...]
    factors: Mapping[str, float]
    ratios: Mapping[str, list[float]]

    def corrected(self, types: Mapping[str, TypePredictor]) -> dict[str, TypePredictor]:
        """Predictors times their factors: what is learned as a logarithm is low in sums."""
        return {
            kind: dataclasses.replace(
                one, coefficients=one.coefficients * self.factors.get(kind, 1.0)
            )
            for kind, one in types.items()
        }

    def report(self, samples: Sequence[Sample]) -> dict[str, Any]:
        """Errors of networks and of kernels by type, for people."""
        groups = {}
        names = np.array([group(sample.kernels) for sample in samples])
        for name in sorted({str(name) for name in names}):
            chosen = names == name
            groups[name] = figures(self.predicted_us[chosen], self.totals_us[chosen])
        by_type: dict[str, list[tuple[float, float]]] = defaultdict(list)
        for sample, guessed, true in zip(samples, self.kernels_us, self.true_us, strict=True):
            for kernel, *pair in zip(sample.kernels, guessed, true, strict=True):
                by_type[kernel.type].append((pair[0], pair[1]))
        total = float(self.totals_us.sum())
        kernels = {}
        for kind, pairs in by_type.items():
            guessed, true = np.array(pairs).T
            known = ~np.isnan(guessed)
            kernels[kind] = {
                **figures(guessed[known], true[known]),
                "share_of_time": float(true.sum()) / total,
            }
        ordered = sorted(kernels.items(), key=lambda item: -float(item[1]["share_of_time"]))
        return {"networks_held_out": groups, "kernels_held_out": dict(ordered)}


def figures(estimated: np.ndarray, true: np.ndarray) -> dict[str, Any]:
    """Number, share within 5 % and 10 %, mean absolute error and rank correlation."""
    from scipy.stats import spearmanr

    if not len(true):
        return {"n": 0, "within_5": None, "within_10": None, "mape": None, "spearman": None}
    off = np.abs(estimated / true - 1)
    varies = len(true) > 2 and np.ptp(estimated) > 0 and np.ptp(true) > 0
    return {
        "n": len(true),
        "within_5": float((off <= 0.05).mean()),
        "within_10": float((off <= 0.1).mean()),
        "mape": float(off.mean()),
        "spearman": float(spearmanr(estimated, true).statistic) if varies else None,
    }


_TOWARDS_ONE = 30.0
"""Strength that keeps a type's factor at 1 where few networks speak for another."""


def held_out(
    samples: Sequence[Sample], labels: Labels, seed: int = 0, rounds: int = 200
) -> HeldOut:
    """Predict every network by predictors that saw no form of it."""
    networks = sorted({sample.network for sample in samples})
    order = np.random.default_rng(seed).permutation(len(networks))
    folds = {networks[i]: int(place % FOLDS) for place, i in enumerate(order)}
    kernels: list[np.ndarray] = [np.empty(0)] * len(samples)
    for fold in range(FOLDS):
        seen = [i for i, one in enumerate(samples) if folds[one.network] != fold]
        unseen = [i for i, one in enumerate(samples) if folds[one.network] == fold]
        types = fit_types(
            [samples[i] for i in seen], [labels.times_us[i] for i in seen], rounds=rounds, seed=seed
        )
        for i in unseen:
            kernels[i] = predict_kernels(samples[i].kernels, types)
    factors = _factors(samples, kernels, labels)
    scaled = [
        found * np.array([factors[kernel.type] for kernel in one.kernels])
        for one, found in zip(samples, kernels, strict=True)
    ]
    predicted = np.array([np.nansum(found) for found in scaled]) + labels.call_us
    ratios: dict[str, list[float]] = defaultdict(list)
    for one, ratio in zip(samples, labels.totals_us / predicted, strict=True):
        ratios[group(one.kernels)].append(float(ratio))
    return HeldOut(
        labels.totals_us, predicted, tuple(scaled), labels.times_us, factors, dict(ratios)
    )


def _factors(
    samples: Sequence[Sample], kernels: Sequence[np.ndarray], labels: Labels
) -> dict[str, float]:
    """A factor for each type that makes networks' sums right, by ridge regression towards 1."""
    names = sorted({kernel.type for one in samples for kernel in one.kernels})
    column = {name: index for index, name in enumerate(names)}
    sums = np.zeros((len(samples), len(names)))
    for row, (one, found) in enumerate(zip(samples, kernels, strict=True)):
        for kernel, guessed in zip(one.kernels, found, strict=True):
            sums[row, column[kernel.type]] += 0.0 if np.isnan(guessed) else guessed
    relative = sums / labels.totals_us[:, None]
    missing = 1 - labels.call_us / labels.totals_us - relative.sum(1)
    weights = np.ones(len(samples))
    change = np.zeros(len(names))
    for _ in range(5):  # towards least absolute deviations
        weighted = relative * weights[:, None]
        left = weighted.T @ relative + np.eye(len(names)) * _TOWARDS_ONE / 100
        change = np.linalg.solve(left, weighted.T @ missing)
        weights = 1 / np.maximum(np.abs(missing - relative @ change), 0.03) * 0.03
    return {name: float(np.clip(1 + change[i], 0.5, 2.0)) for name, i in column.items()}
