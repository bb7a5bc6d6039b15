"""The engines of a build: made or resumed one by one, and timed in turns."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from compress import artifact
from compress.build_sheet import BuildSheet, Entry
from compress.candidates import Limits
from compress.data import Data
from compress.errors import EngineError, LoadError
from compress.latency import Comparison, measure
from compress.metrics import Evaluator
from compress.model import Model
from compress.progress import Progress
from compress.sessions import MARGIN
from compress.target import BuiltElsewhere, DeviceTimed, Engine
from compress.variants import settings
from compress.workload import Workload

CACHE = Path("~/.cache/hwcompress/engines")
"""Engines of a build that was interrupted. They are executable content, so they are resumed from
the user's own folder and never from the artifact, which may have come from somebody else."""
_FACTS = "engine.json"


@dataclass
class Building:
    """One build: what is given, and what was found so far.

    Attributes:
        directory: of the artifact.
        sheet: its `build.json`.
        target: that builds.
        workload: what is timed.
        evaluator: judges, or None.
        limits: the budget.
        progress: opens trackers.
        models: by name, the original first.
        engines: by name.
        kept: folders of engines to resume from, which the finished artifact makes superfluous.
        failures: why a candidate is not among the engines.
    """

    directory: Path
    sheet: BuildSheet
    target: BuiltElsewhere
    evaluator: Evaluator | None
    limits: Limits
    progress: Progress
    models: dict[str, Model]
    workload: Workload
    engines: dict[str, Engine] = field(default_factory=dict)
    kept: list[Path] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)

    @property
    def data(self) -> Data | None:
        """The labelled samples; None without any."""
        return self.evaluator.data if self.evaluator is not None else None

    @property
    def baseline(self) -> str:
        """Name of the original."""
        return self.sheet.candidates[0].name


def build_engines(one: Building) -> None:
    """Build what is not in the cache; a failing candidate costs only itself.

    Raises:
        EngineError: the original fails.
    """
    total = len(one.sheet.candidates)
    with one.progress(f"Build {one.target.name} engines", total) as advance:
        for entry in one.sheet.candidates:
            try:
                engine = _engine(one, entry)
                engine(one.workload.inputs)
                one.engines[entry.name] = engine
            except EngineError as error:
                if entry.name == one.baseline:
                    raise
                one.failures[entry.name] = str(error)
            advance(1, entry.name)


def _engine(one: Building, entry: Entry) -> Engine:
    facts = [dict(entry.sha256), settings(one.target), dict(one.target.builder())]
    key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]
    folder = CACHE.expanduser() / key
    one.kept.append(folder)
    if (folder / _FACTS).is_file():
        try:
            hashes = json.loads((folder / _FACTS).read_text(encoding="utf-8"))
            artifact.check_files(folder, hashes, _FACTS)
            return one.target.load(folder)
        except (ValueError, LoadError, EngineError):
            shutil.rmtree(folder, ignore_errors=True)
    engine = one.target.build_in(one.models[entry.name], one.directory)
    with artifact.writing(folder) as made:
        hashes = {path.name: artifact.sha256_file(path) for path in engine.save(made)}
        artifact.write_text(made / _FACTS, json.dumps(hashes))
    return engine


def measure_engines(one: Building) -> Comparison:
    """Latency of all engines in turns, on the device's own clock where it has one."""
    inputs = one.workload.inputs
    clocked = {n: e for n, e in one.engines.items() if isinstance(e, DeviceTimed)}
    own = len(clocked) == len(one.engines)
    calls: dict[str, Callable[[], object]] = (
        {name: engine.timed(inputs) for name, engine in clocked.items()}
        if own
        else {name: partial(engine, inputs) for name, engine in one.engines.items()}
    )
    return measure(
        calls,
        baseline=one.baseline,
        seconds=one.sheet.seconds,
        margin=MARGIN,
        own_clock=own,
        seed=one.sheet.seed,
        progress=one.progress,
    )
