from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import pytest

from compress.artifact import check_output, load, open_engine, read_report, sha256_file, writing
from compress.errors import LoadError, OutputError
from compress.report import SCHEMA_VERSION


def tree(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def old_artifact(directory: Path) -> Path:
    directory.mkdir()
    (directory / "report.json").write_text("{}")
    return directory


def test_a_directory_appears_as_a_whole(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with writing(target) as folder:
        (folder / "model.onnx").write_text("model")
        assert not target.exists()
        assert folder.parent == tmp_path
    assert tree(tmp_path) == {"out", "out/model.onnx"}
    assert target.stat().st_mode & 0o777 == 0o755


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_a_failure_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    def half_written() -> None:
        with writing(tmp_path / "out") as folder:
            (folder / "model.onnx").write_text("half")
            raise error

    with pytest.raises(error):
        half_written()
    assert tree(tmp_path) == set()


def test_an_artifact_is_replaced_as_a_whole(tmp_path: Path) -> None:
    target = old_artifact(tmp_path / "out")
    with writing(target) as folder:
        (folder / "new").write_text("")
        assert (target / "report.json").exists()
    assert tree(tmp_path) == {"out", "out/new"}


def test_an_artifact_stays_whole_when_its_successor_fails(tmp_path: Path) -> None:
    target = old_artifact(tmp_path / "out")
    with pytest.raises(KeyboardInterrupt), writing(target):
        raise KeyboardInterrupt
    assert tree(tmp_path) == {"out", "out/report.json"}


def test_a_full_disk_is_explained(tmp_path: Path) -> None:
    with (
        pytest.raises(OutputError, match=r"The disk is full: .*out could not be written"),
        writing(tmp_path / "out"),
    ):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert tree(tmp_path) == set()


def test_a_parent_that_became_a_file_is_explained(tmp_path: Path) -> None:
    (tmp_path / "gone").write_text("")
    with (
        pytest.raises(OutputError, match="out cannot be written: "),
        writing(tmp_path / "gone" / "out"),
    ):
        pass


def test_an_existing_directory_is_refused(tmp_path: Path) -> None:
    target = old_artifact(tmp_path / "out")
    with pytest.raises(OutputError, match="exists already"):
        check_output(target, overwrite=False)
    check_output(target, overwrite=True)


def test_what_is_no_artifact_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_text("")
    (tmp_path / "file").write_text("")
    for name in ("photos", "file"):
        with pytest.raises(OutputError, match="is no artifact of this tool"):
            check_output(tmp_path / name, overwrite=True)
    assert tree(tmp_path) == {"photos", "photos/cat.jpg", "file"}


def test_parents_are_made_with_the_artifact_and_not_before(tmp_path: Path) -> None:
    target = tmp_path / "a" / "b" / "out"
    check_output(target, overwrite=False)
    assert tree(tmp_path) == set()
    with writing(target):
        pass
    assert target.is_dir()


def test_a_parent_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be written"):
        check_output(tmp_path / "file" / "out", overwrite=False)


def test_sha256_is_that_of_the_content(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"abc")
    # FIPS 180-2, appendix B.1.
    expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert sha256_file(tmp_path / "f") == expected


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "is no artifact: it has no readable report.json"),
        ("", "is damaged"),
        ("[]", "is damaged"),
        ("{}", "is damaged"),
        (f'{{"schema_version": {SCHEMA_VERSION}}}', "is damaged"),
        ('{"schema_version": 99, "files": {}, "target": {}}', "has schema version 99"),
    ],
    ids=["absent", "empty", "list", "no version", "no files", "newer"],
)
def test_what_is_no_report_is_refused(tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / "report.json").write_text(content)
    with pytest.raises(LoadError, match=message):
        read_report(tmp_path)
    with pytest.raises(LoadError, match=message):
        load(tmp_path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    report: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "files": {"model.onnx": "0"},
        "target": {"name": "cpu", "options": {}},
    }
    (tmp_path / "report.json").write_text(json.dumps(report))
    with pytest.raises(LoadError, match=r"model\.onnx is missing"):
        load(tmp_path)


def test_any_model_file_opens_as_an_engine(tiny_onnx: Path) -> None:
    engine = open_engine(tiny_onnx, threads=1)
    assert engine.outputs == ("y",)
