"""A side of a check: an artifact, a model file or a recorded baseline, opened and described."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from compress.artifact import REPORT, engine_factory, read_report, size_of
from compress.errors import CompressError, LoadError
from compress.model import TensorSpec
from compress.registry import create_target
from compress.regression.record import RECORD, Record, read_record
from compress.side_by_side import request
from compress.target import Elsewhere, Engine, runtimes

DEFAULT_TARGET = "cpu"


@dataclass(frozen=True)
class Subject:
    """One side.

    Attributes:
        name: its path as given.
        path: of the artifact or model file that runs.
        build: makes a new engine each time.
        engine: the first one.
        targets: names that its target goes by.
        report: of an artifact, else None.
        record: of a baseline, else None.
    """

    name: str
    path: Path
    build: Callable[[], Engine]
    engine: Engine
    targets: tuple[str, ...]
    report: Mapping[str, Any] | None = None
    record: Record | None = None

    @property
    def size_bytes(self) -> int:
        """Shipped bytes as the report counts them: what its engine saves, or a device needs."""
        if self.report is not None:
            return int(_chosen(self.report)["size_bytes"])
        return size_of(self.engine)

    @property
    def batch(self) -> int:
        """Samples in the request that its report timed; 1 for a model file."""
        workload = self.report["latency"] if self.report else {}
        return int(workload.get("batch", 1))

    @property
    def hashes(self) -> tuple[str, ...]:
        """Of the model's files, where a report or a record has them."""
        known = self.report["files"] if self.report else self.record.files if self.record else {}
        return tuple(sorted(known.values()))

    def remarks(self) -> tuple[str, ...]:
        """What a reader should know of a time that is measured here."""
        if self.report is None:
            return ()
        found = []
        if self.report["latency"].get("objective") == "throughput":
            found.append(
                f"{self.name} was made for throughput; single requests were measured here."
            )
        if isinstance(create_target(self.targets[0]), Elsewhere):
            found.append(
                f"{self.name} is for another device ({self.targets[0]}): its speed here says "
                f"little of its speed there."
            )
        return tuple(found)

    @property
    def recorded_score(self) -> Mapping[str, Any] | None:
        """Accuracy that is known of exactly these files: value, unit, n, data, sha256.

        That of a baseline record, else of the artifact's report, whose files were found unchanged.
        A score that was found elsewhere than in the artifact's own runtime is none.
        """
        if self.record is not None and self.record.accuracy:
            return self.record.accuracy
        return report_score(self.report) if self.report else None


def report_score(report: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The score of the candidate that became the artifact, with the data that it was found on."""
    score, evaluation = _chosen(report)["score"], report["evaluation"]
    if not score or score.get("where") or not evaluation.get("sha256"):
        return None
    facts = {"data": evaluation["data"], "sha256": evaluation["sha256"]}
    return {"n": None, **score, **facts}


def _chosen(report: Mapping[str, Any]) -> Mapping[str, Any]:
    """The candidate that became the artifact."""
    found: Mapping[str, Any] = next(
        one for one in report["candidates"] if one["name"] == report["chosen"]
    )
    return found


def open_subject(
    given: Path | str, *, threads: int | None = None, inputs: Sequence[str | TensorSpec] = ()
) -> Subject:
    """Open a side and build its first engine.

    Args:
        given: an artifact directory, a model file or a baseline directory.
        threads: of one operator; None takes what an artifact was measured with.
        inputs: shapes that a model file leaves open.

    Raises:
        LoadError: it is none of them, damaged, or not what was written.
        UnsupportedError: its runtime is not installed.
        EngineError: its runtime refuses it.
    """
    path, record = Path(given), None
    if path.is_dir() and (path / RECORD).is_file():
        record = read_record(path)
        path = record.model_path(path)
        inputs = inputs or record.inputs
        threads = threads if threads is not None else record.threads
    elif path.is_dir() and not (path / REPORT).is_file():
        raise LoadError(
            f"{path} is neither an artifact (it has no {REPORT}) nor a baseline (it has no "
            f"{RECORD}). Give what `compress run` or `compress baseline` wrote, or a model file."
        )
    build = engine_factory(
        path, target=DEFAULT_TARGET, threads=threads, inputs=() if path.is_dir() else inputs
    )
    engine = build()
    if path.is_dir():
        report = read_report(path)
        targets = (report["target"]["name"], report["target"].get("asked", ""))
        return Subject(str(given), path, build, engine, _names(targets), report, record)
    target = create_target(DEFAULT_TARGET)
    names = (target.name, *(one.name for one in runtimes(target)[:1]))
    return Subject(str(given), path, build, engine, _names(names), None, record)


def open_pair(
    candidate: Path | str,
    baseline: Path | str | None,
    *,
    threads: int | None = None,
    inputs: Sequence[str | TensorSpec] = (),
) -> tuple[Subject, Subject | None, tuple[str, ...]]:
    """Both sides, and notes about what was settled between them.

    A model file says nothing of threads; beside an artifact it gets the artifact's, so that the
    ratio shows the models and not the settings.
    """
    if baseline is None:
        return open_subject(candidate, threads=threads, inputs=inputs), None, ()
    settings = [threads if threads is not None else _threads(one) for one in (candidate, baseline)]
    notes = []
    for own, other, name in ((0, 1, candidate), (1, 0, baseline)):
        if settings[own] is None and settings[other] is not None and Path(name).is_file():
            settings[own] = settings[other]
            notes.append(f"{name} runs with --threads {settings[own]}, as the other side does.")
    if settings[0] != settings[1]:
        shown = ["all" if one is None else str(one) for one in settings]
        notes.append(
            f"Threads differ: {shown[0]} for {candidate} and {shown[1]} for {baseline}. Give "
            f"--threads to compare the models alone."
        )
    sides = [
        open_subject(one, threads=number, inputs=inputs)
        for one, number in zip((candidate, baseline), settings, strict=True)
    ]
    return sides[0], sides[1], tuple(notes)


def _threads(given: Path | str) -> int | None:
    """Threads that a directory was measured with, None where nothing says so."""
    path = Path(given)
    try:
        if (path / RECORD).is_file():
            record = read_record(path)
            if record.threads is not None:
                return record.threads
            path = record.model_path(path)
        if not path.is_dir():
            return None
        threads = read_report(path)["target"]["options"].get("threads")
    except CompressError:  # it is opened later, which says what is wrong with it
        return None
    return int(threads) if threads is not None else None


def _names(found: Sequence[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for name in found if name))


def fresh_sides(
    sides: Mapping[str, Subject], seed: int
) -> Callable[[], Mapping[str, Callable[[], object]]]:
    """A function that builds every side anew, in an order drawn each time.

    The order is drawn because memory is given out in it, and it shows in the latency.
    """
    rng = np.random.default_rng(seed)
    specs = [spec for side in sides.values() for spec in side.engine.inputs if spec.shape]
    dynamic = all(spec.dynamic_batch for spec in specs)
    batch = max(side.batch for side in sides.values()) if dynamic else 1

    def build() -> Mapping[str, Callable[[], object]]:
        calls = {}
        for index in rng.permutation(len(sides)):
            name = list(sides)[index]
            calls[name] = request(sides[name].name, sides[name].build(), batch, seed)
        return {name: calls[name] for name in sides}

    return build
