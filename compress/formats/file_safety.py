"""Reading files of unknown origin: zip archives and pickles, without executing anything.

Two readers can see two different archives in one zip file: Python's `zipfile` takes the last of
two entries with one name and tolerates data in front, the reader inside torch does neither. So
what has been checked is copied into a new archive, and only the copy is given to torch.
"""

from __future__ import annotations

import io
import logging
import pickletools
import tempfile
import warnings
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from compress.errors import LoadError, UnsafeFileError

_ZIP_ERRORS = (
    zipfile.BadZipFile,
    zlib.error,
    EOFError,
    NotImplementedError,
    OSError,
    UnicodeDecodeError,
)
_ZIP_SLACK_BYTES = 256 * 1024 * 1024
_LARGEST_ZIP_RATIO = 20
_CHUNK_BYTES = 1024 * 1024
_LARGEST_PICKLE_BYTES = 512 * 1024 * 1024


@contextmanager
def open_archive(path: Path) -> Iterator[zipfile.ZipFile]:
    """A zip archive whose table of contents has been checked.

    Raises:
        UnsafeFileError: an entry would land outside of the archive, exists twice, or the
            whole would grow beyond measure.
        LoadError: the archive is damaged.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            _check_entries(path, archive.infolist())
            yield archive
    except _ZIP_ERRORS as error:
        raise LoadError(
            f"{path.name} is a zip archive that is truncated or damaged ({error}); copy or "
            "download it again."
        ) from error


def _check_entries(path: Path, entries: list[zipfile.ZipInfo]) -> None:
    seen: set[str] = set()
    for entry in entries:
        # zipfile cuts names at a NUL and turns backslashes around; judge what the file says.
        name = entry.orig_filename
        parts = name.replace("\\", "/").split("/")
        if ".." in parts or name.startswith(("/", "\\")) or ":" in name or "\0" in name:
            raise UnsafeFileError(
                f"{path.name} is refused: its entry {name!r} points outside of the archive."
            )
        if name.lower() in seen:
            raise UnsafeFileError(
                f"{path.name} is refused: it holds two entries called {name!r}, so that two "
                "readers would see two different files."
            )
        seen.add(name.lower())
        if entry.flag_bits & 1:
            raise LoadError(f"{path.name} is an encrypted zip archive; decrypt it first.")
    total = sum(entry.file_size for entry in entries)
    if total > _LARGEST_ZIP_RATIO * path.stat().st_size + _ZIP_SLACK_BYTES:
        raise UnsafeFileError(
            f"{path.name} is refused: its {path.stat().st_size:,} bytes would unpack to "
            f"{total:,} bytes."
        )


@contextmanager
def clean_copy(
    archive: zipfile.ZipFile, contents: Mapping[str, str | bytes]
) -> Iterator[IO[bytes]]:
    """A temporary archive of `contents`: new name -> old entry (str) or new bytes."""
    with tempfile.TemporaryFile(suffix=".pt2") as file:
        with zipfile.ZipFile(file, "w") as copy:
            for name, source in contents.items():
                if isinstance(source, bytes):
                    copy.writestr(name, source)
                    continue
                with archive.open(source) as old, copy.open(name, "w", force_zip64=True) as new:
                    while chunk := old.read(_CHUNK_BYTES):
                        new.write(chunk)
        file.seek(0)
        yield file


def pickled_names(path: Path) -> tuple[str, ...]:
    """Everything that the pickles in a file would import, as "module.name", without unpickling.

    The order is that of the file. Works on torch.save's zip layout and on plain pickles.
    """
    if not zipfile.is_zipfile(path):
        with path.open("rb") as file:
            return tuple(dict.fromkeys(_imports(file)))
    names: list[str] = []
    with open_archive(path) as archive:
        for entry in archive.infolist():
            if entry.filename.endswith(".pkl") and entry.file_size <= _LARGEST_PICKLE_BYTES:
                with archive.open(entry) as file:
                    names.extend(_imports(file))
    return tuple(dict.fromkeys(names))


def _imports(file: IO[bytes]) -> Iterator[str]:
    """Imports of the pickles that follow each other in a file; stops where they end."""
    try:
        while True:
            strings: list[str] = []
            memo: dict[Any, str] = {}
            for opcode, argument, _ in pickletools.genops(file):
                if opcode.name in ("GLOBAL", "INST"):
                    yield str(argument).replace(" ", ".")
                elif opcode.name == "STACK_GLOBAL":
                    yield ".".join(strings[-2:])
                elif opcode.name in ("MEMOIZE", "BINPUT", "LONG_BINPUT", "PUT") and strings:
                    memo[len(memo) if argument is None else argument] = strings[-1]
                elif opcode.name in ("BINGET", "LONG_BINGET", "GET") and argument in memo:
                    strings.append(memo[argument])
                elif isinstance(argument, str):
                    strings.append(argument)
    except (ValueError, EOFError, IndexError, UnicodeDecodeError, zipfile.BadZipFile):
        return


def load_weights_only(path: Path, *, data: bytes | None = None) -> Any:
    """Tensors, containers and modules made of torch.nn's own classes; nothing else.

    `data` are bytes to read in place of the file, which then only gives its name.

    Raises:
        UnsafeFileError: the pickle needs a class that is not allowed.
        LoadError: the file is damaged.
    """
    import pickle

    import torch

    try:
        with torch.serialization.safe_globals(_allowed()):
            loaded = _torch_load(io.BytesIO(data) if data is not None else path.open("rb"), True)
    except pickle.UnpicklingError as error:
        names = pickled_names(path) if data is None else ()
        culprit = next((name for name in names if name in str(error)), "")
        if not culprit:
            raise LoadError(_damaged(path, error)) from error
        raise UnsafeFileError(
            f"{path.name} is a pickle that needs {culprit}, and unpickling it would run that "
            "code. Save the model's state_dict() and give its architecture with --model "
            "module:factory, or, if you trust where the file comes from, repeat with "
            "--trust-pickle."
        ) from error
    except Exception as error:
        raise LoadError(_damaged(path, error)) from error
    if isinstance(loaded, torch.nn.Module):
        _check_modules(path, loaded)
    return loaded


def load_trusted(path: Path) -> Any:
    """Unpickle without any check: runs whatever code the file names.

    Raises:
        LoadError: the file is damaged, or a class that it needs cannot be imported.
    """
    try:
        return _torch_load(path.open("rb"), False)
    except Exception as error:
        raise LoadError(_damaged(path, error)) from error


def _torch_load(file: IO[bytes], weights_only: bool) -> Any:
    """`torch.load` of an open file: given a path, it would go by the extension."""
    import torch

    with file, quiet_readers():
        return torch.load(file, map_location="cpu", weights_only=weights_only)


@contextmanager
def quiet_readers() -> Iterator[None]:
    """Without warnings and log lines about a file: what matters becomes an error."""
    loggers = [logging.getLogger(name) for name in ("torch", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _damaged(path: Path, error: Exception) -> str:
    # torch puts a page of advice, to load the file unsafely, in front of the reason.
    reason = " ".join(str(error).partition("WeightsUnpickler error:")[2].split() or [str(error)])
    return (
        f"{path.name} is a torch.save file that cannot be read ({reason[:200]}): it is truncated, "
        "damaged or in an old layout. Copy it again, or save it again with a current torch."
    )


def _check_modules(path: Path, root: Any) -> None:
    """Refuse state that would replace a method, such as a pickled `forward`.

    Raises:
        UnsafeFileError: with the name of the module and of the attribute.
    """
    for name, module in root.named_modules():
        for key, value in vars(module).items():
            hook = "_hooks" in key and bool(value)
            if hook or callable(getattr(type(module), key, None)):
                raise UnsafeFileError(
                    f"{path.name} is refused: the state of its module {name or 'root'!r} "
                    f"replaces {key!r}. Save its state_dict() and use --model module:factory."
                )


# Inference layers and containers. Not here: what imports or calls what it is given (Lazy*,
# DataParallel, ParametrizationList) and everything that only a training loop needs.
# fmt: off
_MODULES = (
    "AdaptiveAvgPool1d", "AdaptiveAvgPool2d", "AdaptiveAvgPool3d", "AdaptiveMaxPool1d",
    "AdaptiveMaxPool2d", "AdaptiveMaxPool3d", "AlphaDropout", "AvgPool1d", "AvgPool2d",
    "AvgPool3d", "BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "Bilinear", "CELU",
    "ChannelShuffle", "CircularPad1d", "CircularPad2d", "CircularPad3d", "ConstantPad1d",
    "ConstantPad2d", "ConstantPad3d", "Conv1d", "Conv2d", "Conv3d", "ConvTranspose1d",
    "ConvTranspose2d", "ConvTranspose3d", "CosineSimilarity", "Dropout", "Dropout1d",
    "Dropout2d", "Dropout3d", "ELU", "Embedding", "EmbeddingBag", "FeatureAlphaDropout",
    "Flatten", "Fold", "GELU", "GLU", "GRU", "GRUCell", "GroupNorm", "Hardshrink",
    "Hardsigmoid", "Hardswish", "Hardtanh", "Identity", "InstanceNorm1d", "InstanceNorm2d",
    "InstanceNorm3d", "LPPool1d", "LPPool2d", "LPPool3d", "LSTM", "LSTMCell", "LayerNorm",
    "LeakyReLU", "Linear", "LocalResponseNorm", "LogSigmoid", "LogSoftmax", "MaxPool1d",
    "MaxPool2d", "MaxPool3d", "MaxUnpool1d", "MaxUnpool2d", "MaxUnpool3d", "Mish", "ModuleDict",
    "ModuleList", "MultiheadAttention", "PReLU", "PairwiseDistance", "ParameterDict",
    "ParameterList", "PixelShuffle", "PixelUnshuffle", "RMSNorm", "RNN", "RNNCell", "RReLU",
    "ReLU", "ReLU6", "ReflectionPad1d", "ReflectionPad2d", "ReflectionPad3d",
    "ReplicationPad1d", "ReplicationPad2d", "ReplicationPad3d", "SELU", "Sequential", "SiLU",
    "Sigmoid", "Softmax", "Softmax2d", "Softmin", "Softplus", "Softshrink", "Softsign", "Tanh",
    "Tanhshrink", "Threshold", "Transformer", "TransformerDecoder", "TransformerDecoderLayer",
    "TransformerEncoder", "TransformerEncoderLayer", "Unflatten", "Unfold", "Upsample",
    "UpsamplingBilinear2d", "UpsamplingNearest2d", "ZeroPad1d", "ZeroPad2d", "ZeroPad3d",
)
# fmt: on


def _allowed() -> list[Any]:
    from torch import nn
    from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

    modules = [getattr(nn, name) for name in _MODULES if hasattr(nn, name)]
    return [*modules, NonDynamicallyQuantizableLinear, nn.functional.relu, nn.functional.gelu]
