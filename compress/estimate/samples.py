"""Samples: networks with the time of the whole and of each kernel, in a file that only grows."""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from compress.errors import LoadError, OutputError
from compress.estimate.features import FEATURES, Described, describe
from compress.estimate.graphs import Network
from compress.estimate.place import Place
from compress.graph import graph_sites
from compress.latency import measure
from compress.model import Model
from compress.target import Engine, Target

VERSION = 1
RUNS = 25
SECONDS = 0.2
"""To time one network: its clock is the reference's, which is timed in between."""
_BLOCKS = 6
_TRIES = 3
_AGREEMENT = 0.06
"""Relative difference of two times of one network that needs no second try."""


@dataclass(frozen=True)
class Sample:
    """One network as it ran on the target.

    Attributes:
        network: its name.
        total_ms: of one call, without the profiler.
        reference_ms: of the reference kernel, timed in between: says how fast the clock was.
        kernels: in order of execution.
        times_us: of each under the runtime's profiler.
        spent_seconds: that the build had taken when it was done, for those that go on.
    """

    network: str
    total_ms: float
    reference_ms: float
    kernels: tuple[Described, ...]
    times_us: tuple[float, ...]
    spent_seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """Plain values for one line of JSON."""
        return {
            "network": self.network,
            "total_ms": self.total_ms,
            "reference_ms": self.reference_ms,
            "spent_seconds": self.spent_seconds,
            "kernels": [
                [k.type, k.fused, k.macs, k.bytes, k.name, k.site, k.precision, t, *k.values]
                for k, t in zip(self.kernels, self.times_us, strict=True)
            ],
        }

    @classmethod
    def from_dict(cls, values: Any) -> Sample:
        """Read back.

        Raises:
            KeyError, TypeError, ValueError: it is something else.
        """
        kernels, times = [], []
        for kind, fused, macs, moved, name, site, precision, time, *numbers in values["kernels"]:
            floats = tuple(float(number) for number in numbers)
            if len(floats) != len(FEATURES) or not np.isfinite([*floats, time]).all():
                raise ValueError("a kernel has other features")
            kernels.append(
                Described(
                    str(kind), str(fused), int(macs), int(moved), floats,
                    str(name), str(site), str(precision),
                )
            )  # fmt: skip
            times.append(float(time))
        total, reference = float(values["total_ms"]), float(values["reference_ms"])
        if not (0 < total < 1e9 and 0 < reference < 1e9):
            raise ValueError("a time is not positive")
        spent = max(0.0, float(values.get("spent_seconds", 0.0)))
        return cls(str(values["network"]), total, reference, tuple(kernels), tuple(times), spent)


def reference_call(target: Target) -> Callable[[], object]:
    """One run of a short network of fixed size on the target: the clock that drift is seen by."""
    network = Network((1, 64, 28, 28), target.capabilities.opset, "reference")
    x = network.start
    for _ in range(4):
        x = network.relu(network.conv(x, 64))
    model = network.model(x)
    engine, inputs = target.build(model), model.example()
    return lambda: engine(inputs)


def take_sample(target: Target, model: Model, reference: Callable[[], object]) -> Sample:
    """Build a network, time it in turns with the reference, and profile its kernels.

    It is timed before and after the profiler ran; where the two disagree, somebody else used the
    machine, and all of it is repeated. Of several tries the one that agrees best counts.

    Raises:
        EngineError: the runtime refuses the model.
    """
    sites = {site.name: site for site in graph_sites(model.graph_model)}
    best: tuple[float, Sample] | None = None
    for _ in range(_TRIES):
        engine = target.build(model)
        inputs = model.example()
        calls = {"network": lambda: engine(inputs), "reference": reference}  # noqa: B023
        before = measure(calls, seconds=SECONDS / 2, min_blocks=_BLOCKS)
        times = engine.profile(inputs, RUNS)
        after = measure(calls, seconds=SECONDS / 2, min_blocks=_BLOCKS)
        total, clock = (
            [found.timings[name].p50_ms for found in (before, after)]
            for name in ("network", "reference")
        )
        sample = Sample(
            model.name,
            statistics.fmean(total),
            statistics.fmean(clock),
            tuple(describe([one.kernel for one in times], sites)),
            tuple(one.p50_us for one in times),
        )
        apart = max(max(pair) / min(pair) - 1 for pair in (total, clock))
        if best is None or apart < best[0]:
            best = apart, sample
        if best[0] <= _AGREEMENT:
            break
    return best[1]  # type: ignore[index]  # there is at least one try


def describe_engine(engine: Engine, model: Model) -> list[Described]:
    """The kernels of an engine that was built from a model at the ONNX stage."""
    sites = {site.name: site for site in graph_sites(model.graph_model)}
    return describe(engine.kernels(), sites)


def read_samples(path: Path, place: Place) -> list[Sample]:
    """What a file holds so far; the line that a kill has cut is left out.

    Raises:
        LoadError: it is no such file, or its samples are of another place.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        raise LoadError(f"{path} cannot be read: {error}.") from error
    if not lines:
        return []
    header = _header(path, lines[0])
    if header["features"] != list(FEATURES) or header["version"] != VERSION:
        raise LoadError(
            f"{path} was written by another release, whose samples are different. Delete it, or "
            f"name another file with --out."
        )
    if Place.from_dict(header["place"]) != place:
        raise LoadError(
            f"{path} holds samples of {Place.from_dict(header['place'])}, and this is {place}. "
            f"Times of two places are never mixed: name another file with --out."
        )
    return list(_parsed(path, lines[1:]))


def append_sample(path: Path, place: Place, sample: Sample) -> None:
    """Add one line, after the header where the file is new.

    Raises:
        OutputError: the file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab+") as file:
            file.seek(0, os.SEEK_END)
            text = ""
            if file.tell() == 0:
                header = {"version": VERSION, "features": list(FEATURES), "place": place.to_dict()}
                text = json.dumps(header) + "\n"
            else:
                file.seek(-1, os.SEEK_END)
                # A line that was cut by a kill ends here, so that only it is lost.
                text = "" if file.read(1) == b"\n" else "\n"
            file.write((text + json.dumps(sample.to_dict()) + "\n").encode())
    except OSError as error:
        raise OutputError(
            f"{path} cannot be written: {error.strerror}. The samples so far are kept; name "
            f"another file with --out, or make room and start again."
        ) from error


def _header(path: Path, line: str) -> dict[str, Any]:
    try:
        header = json.loads(line)
        _ = header["version"], header["features"], Place.from_dict(header["place"])
        return dict(header)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise LoadError(
            f"{path} holds no samples of a predictor: {error!r}. Delete it, or name another file "
            f"with --out."
        ) from error


def _parsed(path: Path, lines: list[str]) -> Iterator[Sample]:
    for line in lines:
        try:
            yield Sample.from_dict(json.loads(line))
        except (ValueError, KeyError, TypeError, RecursionError):
            continue  # cut by a kill
