"""Predictor: times of kernels learned on one place, in a file that is plain JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from compress.errors import LoadError, UsageError
from compress.estimate.analytical import bounds, group
from compress.estimate.features import FEATURES, RANGED, Described
from compress.estimate.fit import TypePredictor, base_terms, predict_kernels
from compress.estimate.peaks import Peaks
from compress.estimate.place import Place, place_of
from compress.estimate.result import KernelEstimate, Latency, Source, ratio_interval
from compress.estimate.store import read_json, write_json
from compress.estimate.trees import Trees
from compress.target import Target

VERSION = 1
_BEYOND = 1.3
"""A feature that lies outside of the sampled range by less is still taken as like it."""
_BOUND_TO_TIME = 10.0
"""Kernels that nothing is known of take at most about so many times their roofline."""
_LAUNCH_US = 1.0


@dataclass(frozen=True, eq=False)
class Predictor:
    """Times of kernels on one place.

    Attributes:
        place: where they were sampled.
        types: predictors by kernel type.
        call_us: that a call takes besides its kernels.
        overhead_us: that the profiler added to each kernel, by `analytical.group`, which was taken
            out; negative where the runtime leaves a gap instead, which was put in.
        ratios: measured / predicted of networks that were held out, by `analytical.group`.
        peaks: of the place, for kernels that were never sampled.
        report: errors on what was held out, number of samples, machine and versions.
    """

    place: Place
    types: Mapping[str, TypePredictor]
    call_us: float
    overhead_us: Mapping[str, float]
    ratios: Mapping[str, Sequence[float]]
    peaks: Peaks
    report: Mapping[str, Any]

    def predict(self, kernels: Sequence[Described]) -> Latency:
        """The latency of a network from the kernels of its engine.

        Kernels whose type was never sampled, or with something fused or sizes that were not, are
        named in `outside`; the former are estimated by their roofline, and all of them widen the
        interval.
        """
        times = predict_kernels(kernels, dict(self.types))
        notes = [self._doubt(kernel) for kernel in kernels]
        floor = np.array([1e6 * one.seconds for one in bounds(kernels, self.peaks)]) + _LAUNCH_US
        known = ~np.isnan(times)
        middle = np.where(known, times, floor * np.sqrt(_BOUND_TO_TIME))
        doubtful = np.array([bool(note) for note in notes], bool)
        low, high, coverage = self._interval(kernels)
        inside = float(middle[~doubtful].sum()) + self.call_us
        total = inside + float(middle[doubtful].sum())
        least = np.minimum(np.where(known, middle / 2, floor), middle)
        most = np.where(known, middle * 2, floor * _BOUND_TO_TIME)
        return Latency(
            total / 1e3,
            min(inside * low + float(least[doubtful].sum()), total) / 1e3,
            max(inside * high + float(most[doubtful].sum()), total) / 1e3,
            Source("predicted", self.place),
            coverage,
            f"errors on {sum(map(len, self.ratios.values()))} networks that were held out",
            tuple(
                KernelEstimate(kernel.name, kernel.type, float(time), note)
                for kernel, time, note in zip(kernels, middle, notes, strict=True)
            ),
            tuple(
                f"{kernel.name}: {note}"
                for kernel, note in zip(kernels, notes, strict=True)
                if note
            ),
        )

    def _interval(self, kernels: Sequence[Described]) -> tuple[float, float, float]:
        found = self.ratios.get(group(kernels), ())
        if len(found) < 10:
            found = [ratio for values in self.ratios.values() for ratio in values]
        return ratio_interval(found)

    def _doubt(self, kernel: Described) -> str:
        """Why a kernel is unlike the samples, or ""."""
        known = self.types.get(kernel.type)
        if known is None:
            return f"no {kernel.type} was sampled; its roofline stands in"
        if kernel.fused not in known.fused:
            return f"no {kernel.type} with {kernel.fused or 'nothing'} fused was sampled"
        raw = kernel.raw
        for name, (least, most) in known.ranges.items():
            if not least / _BEYOND <= raw[name] <= most * _BEYOND:
                return (
                    f"{name} {raw[name]:g} lies outside of the samples of {kernel.type}, "
                    f"{least:g} to {most:g}"
                )
        return ""

    def save(self, path: Path) -> None:
        """Write it as JSON.

        Raises:
            OutputError: the file cannot be written.
        """
        write_json(path, self.to_dict())

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "predictor": VERSION,
            "place": self.place.to_dict(),
            "features": list(FEATURES),
            "call_us": self.call_us,
            "overhead_us": dict(self.overhead_us),
            "ratios": {name: list(values) for name, values in self.ratios.items()},
            "peaks": self.peaks.to_dict(),
            "report": dict(self.report),
            "types": {name: _type_dict(one) for name, one in self.types.items()},
        }

    @classmethod
    def from_dict(cls, values: Any, path: Path | str = "The predictor") -> Predictor:
        """Read back and check everything.

        Raises:
            LoadError: it is something else.
        """
        try:
            if values["predictor"] != VERSION or values["features"] != list(FEATURES):
                raise LoadError(
                    f"{path} was built by another release. Build it again with `compress profile "
                    f"--build-predictor`; its samples are not lost."
                )
            ratios = {str(k): [float(v) for v in found] for k, found in values["ratios"].items()}
            call = float(values["call_us"])
            overhead = {str(k): float(v) for k, v in values["overhead_us"].items()}
            every = [call, *overhead.values(), *(v for found in ratios.values() for v in found)]
            if not np.isfinite(every).all() or not any(ratios.values()):
                raise ValueError("an error of held-out networks is missing or not finite")
            if min(v for found in ratios.values() for v in found) <= 0:
                raise ValueError("a ratio is not positive")
            return cls(
                Place.from_dict(values["place"]),
                {str(k): _read_type(v) for k, v in values["types"].items()},
                call,
                overhead,
                ratios,
                Peaks.from_dict(values["peaks"]),
                dict(values["report"]),
            )
        except LoadError as error:
            raise LoadError(f"{path} cannot be used: {error}") from error
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            raise LoadError(
                f"{path} is no predictor, or damaged ({error!r}). Build it again with `compress "
                f"profile --build-predictor`."
            ) from error


def default_path(target: Target) -> Path:
    """Where the predictor of one runtime is kept."""
    return place_of(target).folder / "predictor.json"


def load_predictor(path: Path | str, target: Target | None = None) -> Predictor:
    """Read a predictor, and refuse one of another place than the target's.

    Raises:
        LoadError: it cannot be read, or is none.
        UsageError: it was built elsewhere: another machine, runtime, version or thread count.
    """
    found = Predictor.from_dict(read_json(Path(path)), path)
    if target is not None and found.place != place_of(target):
        raise UsageError(
            f"{path} was built for {found.place}, and this is {place_of(target)}. Its times mean "
            f"nothing here; build one with `compress profile --build-predictor`."
        )
    return found


def _type_dict(one: TypePredictor) -> dict[str, Any]:
    return {
        "coefficients": one.coefficients.tolist(),
        "trees": one.trees.to_dict() if one.trees is not None else None,
        "ranges": {name: list(pair) for name, pair in one.ranges.items()},
        "fused": list(one.fused),
        "samples": one.samples,
    }


def _read_type(values: Mapping[str, Any]) -> TypePredictor:
    coefficients = np.array(values["coefficients"], np.float64)
    terms = base_terms(np.zeros((1, len(FEATURES)), np.float32)).shape[1]
    if coefficients.shape != (terms,) or not np.isfinite(coefficients).all():
        raise ValueError("coefficients do not fit")
    if coefficients.min() < 0 or coefficients[0] <= 0:
        raise ValueError("a coefficient is negative")
    trees = values["trees"]
    ranges = {str(k): (float(a), float(b)) for k, (a, b) in values["ranges"].items()}
    if set(ranges) != set(RANGED):
        raise ValueError("ranges do not fit")
    return TypePredictor(
        coefficients,
        Trees.from_dict(trees, len(FEATURES)) if trees is not None else None,
        ranges,
        tuple(str(one) for one in values["fused"]),
        int(values["samples"]),
    )
