"""What `compress profile` does besides profiling: build predictors, and estimate a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compress.errors import UnsupportedError
from compress.estimate.build import MINUTES, build_predictor
from compress.estimate.estimate import SECONDS, latency
from compress.estimate.predictor import Predictor, default_path
from compress.estimate.result import Latency
from compress.export import to_onnx
from compress.model import Model
from compress.progress import Progress, silent
from compress.registry import create_target, require_target
from compress.target import Target, runtimes


@dataclass(frozen=True)
class Built:
    """A predictor and where it was written."""

    runtime: str
    predictor: Predictor
    path: Path

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "runtime": self.runtime,
            "path": str(self.path),
            "place": self.predictor.place.to_dict(),
            **self.predictor.report,
        }


def profilers(target: str, threads: int | None) -> list[Target]:
    """The runtimes of a target that tell the time of each kernel.

    Raises:
        UnsupportedError: none of them does, or the target cannot be used here.
    """
    destination = create_target(target, threads=threads)
    require_target(destination)
    found = [one for one in runtimes(destination) if one.capabilities.profiler]
    if not found:
        raise UnsupportedError(
            f"Target {target} does not tell the time of each kernel, so nothing can be learned "
            f"from it; `compress bench` measures the latency of the whole."
        )
    return found


def build_predictors(
    target: str,
    *,
    threads: int | None = None,
    minutes: float = MINUTES,
    models: Sequence[Model] = (),
    out: Path | None = None,
    progress: Progress = silent,
) -> list[Built]:
    """Build a predictor for every runtime of a target, one after the other, in `minutes` together.

    Args:
        target: its name.
        threads: of the runtimes.
        minutes: for all of them.
        models: whose convolutions are sampled above all.
        out: file of the predictor, with the runtime's name added where there are several; the
            samples go beside it. By default both go into the cache, where `latency` finds them.
        progress: opens trackers.
    """
    found = profilers(target, threads)
    built = []
    for one in found:
        path, samples = default_path(one), None
        if out is not None:
            path = out if len(found) == 1 else out.with_stem(f"{out.stem}-{one.name}")
            samples = path.with_suffix(".samples.jsonl")
        exported = [to_onnx(model, one.capabilities.opset) for model in models]
        predictor = build_predictor(
            one, minutes=minutes / len(found), models=exported, samples=samples, progress=progress
        )
        predictor.save(path)
        built.append(Built(one.name, predictor, path))
    return built


def estimate(
    model: Model,
    target: str,
    source: str,
    *,
    threads: int | None = None,
    predictor: Path | None = None,
    seconds: float = SECONDS,
    progress: Progress = silent,
) -> list[Latency]:
    """The latency of a model in every runtime of a target, from one source."""
    found = profilers(target, threads) if source != "measured" else None
    if found is None:
        destination = create_target(target, threads=threads)
        require_target(destination)
        found = list(runtimes(destination))
    if predictor is not None and len(found) > 1:
        from compress.estimate.predictor import load_predictor

        # A file holds the predictor of one runtime, which is thereby chosen.
        name = load_predictor(predictor).place.target
        found = [one for one in found if one.name == name] or found[:1]
    return [
        latency(model, one, source, predictor=predictor, seconds=seconds, progress=progress)
        for one in found
    ]
