"""A cache of its own for every test, and a small predictor of this machine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from compress.estimate import networks, place, samples
from compress.estimate.build import build_predictor
from compress.estimate.peaks import Peaks, measure_peaks
from compress.estimate.predictor import Predictor
from compress.estimate.store import write_json
from compress.registry import create_target
from compress.target import Target


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path_factory.mktemp("latency")
    monkeypatch.setattr(place, "CACHE", folder)
    return folder


@pytest.fixture(scope="session")
def ort() -> Target:
    return create_target("onnxruntime", threads=1)


@pytest.fixture(scope="session")
def measured_peaks(ort: Target) -> Peaks:
    """Peaks, hastily measured."""
    return measure_peaks(ort, seconds=0.3)


@pytest.fixture
def known_peaks(measured_peaks: Peaks, cache: Path) -> Peaks:
    """The same in the test's cache, where `cached_peaks` finds them."""
    write_json(measured_peaks.place.folder / "peaks.json", measured_peaks.to_dict())
    return measured_peaks


@pytest.fixture(scope="session")
def built(
    ort: Target, measured_peaks: Peaks, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Predictor, Path]]:
    """A predictor of few samples of small networks, and their file."""
    folder = tmp_path_factory.mktemp("built")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(place, "CACHE", folder)
        patch.setattr(networks, "MOST_MACS", 2e7)
        patch.setattr(samples, "SECONDS", 0.04)
        patch.setattr(samples, "_TRIES", 1)
        write_json(measured_peaks.place.folder / "peaks.json", measured_peaks.to_dict())
        path = folder / "samples.jsonl"
        yield build_predictor(ort, minutes=0.05, samples=path), path


@pytest.fixture
def predictor(built: tuple[Predictor, Path]) -> Predictor:
    return built[0]
