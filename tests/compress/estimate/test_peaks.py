from __future__ import annotations

from pathlib import Path

import pytest

from compress.errors import UnsupportedError
from compress.estimate import peaks
from compress.estimate.peaks import Peaks, cached_peaks
from compress.estimate.place import Place, place_of
from compress.registry import create_target

TARGET = create_target("onnxruntime", threads=1)


@pytest.fixture
def found(measured_peaks: Peaks) -> Peaks:
    return measured_peaks


def test_peaks_name_precisions_and_their_source(found: Peaks) -> None:
    assert set(found.gmacs_per_second) == {"float32", "int8"}
    assert found.gmacs("bfloat16") == found.gmacs("float32") > 0.5
    assert found.bandwidth_gb_s > 0.1
    assert found.threads == 1
    assert "measured" in found.source
    assert found.place.fingerprint in found.source


def test_peaks_survive_json(found: Peaks) -> None:
    assert Peaks.from_dict(found.to_dict()) == found


def test_peaks_are_measured_once(
    found: Peaks, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    calls = []

    def measure(*arguments: object, **options: object) -> Peaks:
        calls.append(arguments)
        return found

    monkeypatch.setattr(peaks, "measure_peaks", measure)
    assert cached_peaks(TARGET) == cached_peaks(TARGET) == found
    assert len(calls) == 1
    (file,) = cache.glob("*/peaks.json")
    file.write_text('{"gmacs_per_second": {"float32": -1}}')
    assert cached_peaks(TARGET) == found
    assert len(calls) == 2


def test_peaks_must_be_positive(found: Peaks) -> None:
    values = {**found.to_dict(), "bandwidth_gb_s": 0.0}
    with pytest.raises(ValueError, match="positive"):
        Peaks.from_dict(values)


def test_places_differ_by_threads_and_options() -> None:
    one, two = place_of(TARGET), place_of(create_target("onnxruntime", threads=2))
    plain = place_of(create_target("onnxruntime", threads=1, layout="plain"))
    assert len({one.folder, two.folder, plain.folder}) == 3
    assert Place.from_dict(one.to_dict()) == one
    assert "onnxruntime 1." in str(one)


def test_another_device_has_no_place_here() -> None:
    with pytest.raises(UnsupportedError, match="another device"):
        place_of(create_target("ort-mobile"))
