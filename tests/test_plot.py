"""`compress plot` on artifacts, profiles and rows of one's own."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

Cli = Callable[..., Any]
QUICK = ("--time", 0, "--seconds", 0.5, "--threads", 1, "--target", "onnxruntime")
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module", autouse=True)
def _home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The cache belongs to the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(tmp_path_factory.mktemp("home")))
        yield


@pytest.fixture
def artifact(cli: Cli, tiny_onnx: Path, tmp_path: Path) -> Path:
    """What `compress run` wrote."""
    out = tmp_path / "tiny-cpu"
    assert cli("run", tiny_onnx, *QUICK, "--out", out).code in (0, 1)
    return out


def rows(path: Path, content: Any) -> Path:
    path.write_text(json.dumps(content))
    return path


def prediction(**changes: Any) -> dict[str, Any]:
    return {"name": "a", "measured_ms": 1.0, "predicted_ms": 1.1, "source": "table", **changes}


def test_an_artifact_is_plotted_again(cli: Cli, artifact: Path, tmp_path: Path) -> None:
    before = {path.name: path.read_bytes() for path in artifact.glob("*.png")}
    assert set(before) == {"kernels.png", "roofline.png", "waterline.png"}
    for name in before:
        (artifact / name).unlink()
    result = cli("plot", artifact)
    assert result.code == 0
    assert {path.name: path.read_bytes() for path in artifact.glob("*.png")} == before
    assert f"Written to {artifact / 'kernels.png'}" in result.out
    result = cli("plot", artifact, "--kind", "roofline", "--out", tmp_path / "new", "--json")
    assert json.loads(result.out) == {"files": [str(tmp_path / "new" / "roofline.png")]}
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["roofline.png"]


def test_a_profile_is_plotted_beside_it(cli: Cli, tiny_onnx: Path, tmp_path: Path) -> None:
    out = tmp_path / "profile.json"
    assert cli("profile", tiny_onnx, "--threads", 1, "--runs", 2, "--out", out).code == 0
    assert cli("plot", out).code == 0
    names = {path.name for path in tmp_path.glob("*.png")}
    assert names == {f"profile-{kind}.png" for kind in ("kernels", "roofline", "waterline")}
    values = json.loads(out.read_text())
    values.pop("peaks")
    old = rows(tmp_path / "old.json", values)
    result = cli("plot", old, "--kind", "waterline")
    assert result.code == 2
    assert "no peak rates of the machine" in result.err
    assert "There is something for --kind kernels." in result.err


def test_rows_of_ones_own(cli: Cli, artifact: Path, tmp_path: Path) -> None:
    path = rows(tmp_path / "mine.json", {"rows": [prediction(), prediction(source="roofline")]})
    assert cli("plot", path, "--out", tmp_path).code == 0
    assert (tmp_path / "mine-predictions.png").read_bytes().startswith(PNG)
    one = {"family": "f", "name": "a", "accuracy": 0.9, "macs": 1e6, "latency_ms": 1.0}
    peaks = json.loads((artifact / "report.json").read_text())["peaks"]
    path = rows(tmp_path / "gap.json", {"rows": [one], "peaks": peaks})
    assert cli("plot", path, "--kind", "gap").code == 0
    assert (tmp_path / "gap-gap.png").read_bytes().startswith(PNG)


def test_several_artifacts_make_one_efficiency_gap(
    cli: Cli, tiny_onnx: Path, tiny_images: Path, tmp_path: Path
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    evaluated = ("--calibration", tiny_images, "--eval", tiny_images, "--max-drop", "100%")
    assert cli("run", tiny_onnx, *QUICK, *evaluated, "--out", first).code in (0, 1)
    shutil.copytree(first, second)
    out = tmp_path / "plots"
    assert cli("plot", first, second, "--kind", "gap", "--out", out).code == 0
    assert (out / "gap.png").read_bytes().startswith(PNG)
    assert "only of the efficiency gap" in cli("plot", first, second).err
    report = json.loads((second / "report.json").read_text())
    report["machine"]["fingerprint"] = "another"
    rows(second / "report.json", report)
    assert "measured on 2 machines" in cli("plot", first, second, "--kind", "gap").err


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ([1, 2], "it has no list `rows`"),
        ({"rows": []}, "it has no rows"),
        ({"rows": [{"a": 1}]}, "its rows are of no known kind"),
        ({"rows": [3]}, "holds nothing that can be plotted"),
        ({"rows": [prediction(measured_ms="fast")]}, "measured_ms of a is 'fast'"),
        ({"rows": [prediction(measured_ms=float("nan"))]}, "measured_ms of a is nan"),
        ({"rows": [prediction()], "peaks": {"x": {}}}, "holds nothing that can be plotted"),
    ],
    ids=["list", "empty", "foreign", "numbers", "text", "nan", "peaks"],
)
def test_foreign_files_are_refused(cli: Cli, tmp_path: Path, content: Any, part: str) -> None:
    result = cli("plot", rows(tmp_path / "rows.json", content))
    assert result.code == 2
    assert part in result.err
    assert not list(tmp_path.glob("*.png"))


def test_what_is_no_file_of_ours_is_refused(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "text.json").write_text("{")
    assert "is no JSON" in cli("plot", tmp_path / "text.json").err
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    assert "is no JSON" in cli("plot", tmp_path / "binary.json").err
    assert "cannot be read" in cli("plot", tmp_path / "missing.json").err
    assert "is no artifact" in cli("plot", tmp_path).err
    path = rows(tmp_path / "rows.json", {"rows": [prediction()]})
    assert "choose from kernels, roofline" in cli("plot", path, "--kind", "pie").err
    assert "cannot be written" in cli("plot", path, "--out", path).err


def test_an_older_report_tells_what_is_missing(cli: Cli, artifact: Path) -> None:
    path = artifact / "report.json"
    report = json.loads(path.read_text())
    for name in ("kernels", "peaks", "waterlines", "plots", "unplotted"):
        report.pop(name)
    rows(path, report)
    result = cli("plot", artifact)
    assert result.code == 2
    assert "its runtime tells none or an older release wrote it" in result.err
    assert "compress profile" in result.err
    assert "--sensitivity" in cli("plot", artifact, "--kind", "sensitivity").err
    assert "--eval" in cli("plot", artifact, "--kind", "gap").err
    rows(path, {**report, "surprise": 1})
    assert "of another release" in cli("plot", artifact).err
