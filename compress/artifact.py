"""The directory a run leaves behind: written as a whole or not at all, loaded and run again."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.errors import EngineError, LoadError, OutputError
from compress.registry import create_target, require_target
from compress.target import Engine, Shipped

if TYPE_CHECKING:
    from compress.model import TensorSpec

REPORT = "report.json"


def check_output(directory: Path, overwrite: bool, marker: str = REPORT) -> None:
    """Find out before any work whether the artifact can be written.

    Args:
        directory: where to.
        overwrite: whether one that is there may be replaced.
        marker: the file that tells a directory of this kind from any other.

    Raises:
        OutputError: it exists, or its parent cannot be written.
    """
    if directory.exists() and not overwrite:
        raise OutputError(
            f"{directory} exists already. Give another --out, or --force to replace it."
        )
    if directory.exists() and not (directory / marker).is_file():
        content = list(directory.iterdir()) if directory.is_dir() else [directory]
        if content:
            raise OutputError(
                f"{directory} exists and is no artifact of this tool (it has no {marker}), so "
                f"--force does not replace it. Give another --out."
            )
    try:
        with tempfile.TemporaryFile(dir=_existing(directory.parent)):
            pass
    except OSError as error:
        raise OutputError(_explain(directory, error)) from error


@contextmanager
def writing(directory: Path) -> Iterator[Path]:
    """A temporary sibling to write into; it becomes `directory` when the block ends well.

    An existing artifact stays whole until the new one is complete. When the block fails, or is
    interrupted, the temporary directory is removed.

    Raises:
        OutputError: the file system refuses (full, read-only, gone).
    """
    temporary = None
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{directory.name}-", dir=directory.parent))
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                _sync(file)
        temporary.chmod(0o755)
        _swap(temporary, directory)
    except OSError as error:
        if isinstance(error, OutputError):
            raise
        raise OutputError(_explain(directory, error)) from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def _swap(temporary: Path, directory: Path) -> None:
    if not directory.exists():
        temporary.rename(directory)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{directory.name}-old-", dir=directory.parent))
    directory.rename(old / "artifact")
    try:
        temporary.rename(directory)
    except OSError:
        (old / "artifact").rename(directory)
        raise
    finally:
        shutil.rmtree(old, ignore_errors=True)


def _sync(file: Path) -> None:
    with file.open("rb") as stream:
        os.fsync(stream.fileno())


def _explain(directory: Path, error: OSError) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        free = shutil.disk_usage(_existing(directory)).free
        return (
            f"The disk is full: {directory} could not be written ({free / 1e6:.0f} MB free). "
            f"Nothing was left behind; free some space or give another --out."
        )
    reason = error.strerror or str(error)
    if error.errno in (errno.ENOTDIR, errno.EEXIST):
        reason = f"{_existing(directory)} is a file and not a folder"
    return f"{directory} cannot be written: {reason}. Give another --out."


def _existing(path: Path) -> Path:
    while not path.exists():
        path = path.parent
    return path


def sha256_file(path: Path) -> str:
    """Hash of a file, read in pieces."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text."""
    path.write_text(text, encoding="utf-8")


def read_report(directory: Path) -> dict[str, Any]:
    """`report.json` of an artifact.

    Raises:
        LoadError: the directory is no artifact, or a newer one.
    """
    from compress.report import SCHEMA_VERSION

    path = directory / REPORT
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        version, _, _ = (report[key] for key in ("schema_version", "files", "target"))
    except OSError as error:
        raise LoadError(
            f"{directory} is no artifact: it has no readable {REPORT}. Give a directory that "
            f"`compress run` wrote."
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise LoadError(f"{path} is damaged: {error}. Run `compress run` again.") from error
    if version != SCHEMA_VERSION:
        raise LoadError(
            f"{path} has schema version {version} and this release reads {SCHEMA_VERSION}; "
            f"install the hwcompress release that wrote it."
        )
    return dict(report)


def check_files(directory: Path, hashes: Mapping[str, str], source: str = REPORT) -> None:
    """Refuse a directory whose files are not those that were written.

    Raises:
        LoadError: one is missing, was changed, or lies elsewhere.
    """
    for name, expected in hashes.items():
        path = directory / name
        if Path(name).name != name:
            raise LoadError(f"{directory / source} names {name!r}, which is no file beside it.")
        if not path.is_file():
            raise LoadError(f"{directory} is incomplete: {name} is missing. Copy it again.")
        if sha256_file(path) != expected:
            raise LoadError(
                f"{path} is not what was written: its sha256 differs from {source}. Copy the "
                f"artifact again, or run `compress run` again."
            )


def check_reproduces(loaded: Engine, expected: Engine, exact: bool = True) -> None:
    """Refuse an artifact whose engine, loaded again, does not give what the measured one gives.

    Without `exact` a thousandth of the largest output may differ: kernels of GPUs may add up in
    another order each time.

    Raises:
        EngineError: its outputs differ.
    """
    import numpy as np

    from compress.model import random_inputs
    from compress.reference import largest_difference, largest_magnitude

    inputs = random_inputs(expected.inputs, 1, np.random.default_rng(0))
    wanted, got = expected(inputs), loaded(inputs)
    for name, array in wanted.items():
        allowed = 0.0 if exact else 1e-3 * largest_magnitude(array)
        same = name in got and got[name].shape == array.shape
        if not same or not largest_difference(got[name], array) <= allowed:
            raise EngineError(
                f"The written artifact does not reproduce output {name} of the engine that was "
                f"measured. Nothing was kept; please report the model."
            )


def load(directory: Path | str, *, threads: int | None = None) -> Engine:
    """The engine of an artifact: call it with arrays by name, get arrays by name.

    Args:
        directory: what `compress run` wrote.
        threads: of one operator; None takes what the run was measured with.

    Raises:
        LoadError: the directory is no artifact, or a file was changed since.
        EngineError: it holds no engine yet (see `compress build`).
        UnsupportedError: its runtime is not installed.
    """
    return _loader(Path(directory), threads)()


def _loader(directory: Path, threads: int | None) -> Callable[[], Engine]:
    """A function that builds the engine of an artifact, whose files are checked once."""
    report = read_report(directory)
    if not report.get("built", True):
        name = report["target"]["name"]
        raise EngineError(
            f"{directory} holds no engine yet: it was prepared for {name} on a machine that cannot "
            f"build one. Run `compress build {directory}` on the machine that has the hardware."
        )
    check_files(directory, report["files"])
    destination = create_target(report["target"]["name"], **_settings(report, threads))
    require_target(destination)
    return lambda: destination.load(directory)


def size_of(engine: Engine) -> int:
    """Bytes of what the engine saves, or of what the device needs of it."""
    if isinstance(engine, Shipped):
        return engine.shipped_bytes
    with tempfile.TemporaryDirectory(prefix="hwcompress-") as folder:
        return sum(path.stat().st_size for path in engine.save(Path(folder)))


def _settings(report: Mapping[str, Any], threads: int | None) -> dict[str, Any]:
    settings = dict(report["target"]["options"])
    if threads is not None:
        settings["threads"] = threads
        if "streams" in settings:
            settings["streams"] = min(settings["streams"], threads)
    return settings


def runtime_settings(path: Path | str, *, threads: int | None = None) -> dict[str, Any]:
    """The settings that `open_engine` builds with: an artifact's own, or `threads` alone."""
    path = Path(path)
    return _settings(read_report(path), threads) if path.is_dir() else {"threads": threads}


def open_engine(path: Path | str, *, target: str = "cpu", threads: int | None = None) -> Engine:
    """An engine from an artifact directory or from any model file (then in float as it is)."""
    return engine_factory(path, target=target, threads=threads)()


def engine_factory(
    path: Path | str,
    *,
    target: str = "cpu",
    threads: int | None = None,
    inputs: Sequence[str | TensorSpec] = (),
) -> Callable[[], Engine]:
    """A function that builds a new engine each time, from what was read and checked once.

    Args:
        path: an artifact directory or a model file.
        target: for a model file.
        threads: of one operator; None takes what the artifact was measured with.
        inputs: shapes that a model file leaves open.
    """
    path = Path(path)
    if path.is_dir():
        return _loader(path, threads)
    from compress.loading import load as load_model

    built = create_target(target, threads=threads)
    model = load_model(path, inputs=inputs)
    if model.stage == "torch":  # export loads torch, which takes seconds and is not needed else
        from compress.export import to_onnx

        model = to_onnx(model, built.capabilities.opset)
    return lambda: built.build(model)
