"""Where samples come from: files, image folders and functions, opened without executing content.

A file is recognised by what it holds, not by its suffix. Arrays stay in the type they were
stored in, and on disk where the format allows: they are turned into the model's type batch by
batch (`compress.data`).
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import math
import os
import re
import sys
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from compress.errors import CompressError, DataError, MissingExtraError, UsageError
from compress.model import TensorSpec

IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
CROP_FRACTION = 0.875
"""Share of the shorter side that the centre crop keeps: 224 of 256, as torchvision's ImageNet
evaluation has it."""

_NPY, _ZIP, _PICKLE = b"\x93NUMPY", b"PK\x03\x04", b"\x80"
_ACCEPTED = (
    "Give an .npz file (x and y), an .npy file, a file of tensors saved by torch.save, a folder "
    "of images, or module:function"
)


class Images:
    """Image files that behave like an array (N, H, W, C) of uint8 and are decoded on access.

    An image of the model's own size is taken as it is. Any other is resized, keeping its
    proportions, and cropped at the centre, as ImageNet classifiers are evaluated.
    """

    dtype = np.dtype(np.uint8)

    def __init__(self, files: Sequence[Path], height: int, width: int, channels: int) -> None:
        self.files = files
        self.shape = (len(files), height, width, channels)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        images = np.empty((len(rows), *self.shape[1:]), np.uint8)
        for image, row in zip(images, rows, strict=True):
            image[:] = self._decode(self.files[row])
        return images

    def encoded(self, row: int) -> bytes:
        """The bytes of one file, for hashing."""
        return self.files[row].read_bytes()

    def _decode(self, path: Path) -> np.ndarray:
        from PIL import Image

        _, height, width, channels = self.shape
        try:
            with Image.open(path) as opened:
                image = opened.convert("RGB" if channels == 3 else "L")
                if image.size != (width, height):
                    image = _resize_and_crop(image, height, width)
                return np.asarray(image).reshape(self.shape[1:])
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise DataError(
                f"{path} cannot be decoded as an image: {error}. Remove or replace it."
            ) from error


def _resize_and_crop(image: Any, height: int, width: int) -> Any:
    from PIL import Image

    factor = max(width / image.width, height / image.height) / CROP_FRACTION
    size = (
        max(width, round(image.width * factor)),
        max(height, round(image.height * factor)),
    )
    left, top = (size[0] - width) // 2, (size[1] - height) // 2
    resized = image.resize(size, Image.Resampling.BILINEAR)
    return resized.crop((left, top, left + width, top + height))


class NpzArrays(Mapping[str, np.ndarray]):
    """The arrays of an .npz file by name, each read when asked for; uncompressed ones stay on disk.

    Raises:
        DataError: on access, if the array needs unpickling or the file is damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with zipfile.ZipFile(path) as archive:
            members = [info for info in archive.infolist() if info.filename.endswith(".npy")]
        self._members = {info.filename.removesuffix(".npy"): info for info in members}

    def __iter__(self) -> Iterator[str]:
        return iter(self._members)

    def __len__(self) -> int:
        return len(self._members)

    def __getitem__(self, name: str) -> np.ndarray:
        info = self._members[name]
        try:
            with zipfile.ZipFile(self.path) as archive, archive.open(info) as member:
                shape, fortran, dtype, header_bytes = _npy_header(member)
                _refuse_objects(dtype, f"{name!r} in {self.path}")
                if info.compress_type != zipfile.ZIP_STORED or not math.prod(shape):
                    member.seek(0)
                    return np.asarray(np.lib.format.read_array(member, allow_pickle=False))
            offset = self._data_offset(info) + header_bytes
            order: Literal["C", "F"] = "F" if fortran else "C"
            return np.memmap(self.path, dtype, "r", offset, shape, order)
        except CompressError:
            raise
        except Exception as error:  # zipfile, zlib and numpy each have kinds of their own
            raise DataError(
                f"The array {name!r} in {self.path} cannot be read: {error}. Save it again with "
                f"numpy.savez."
            ) from error

    def _data_offset(self, info: zipfile.ZipInfo) -> int:
        """Where a stored member begins: its local header has 30 bytes, a name and extra fields."""
        with self.path.open("rb") as file:
            file.seek(info.header_offset + 26)
            name_bytes, extra_bytes = (int.from_bytes(file.read(2), "little") for _ in range(2))
        return info.header_offset + 30 + name_bytes + extra_bytes


def _npy_header(file: Any) -> tuple[tuple[int, ...], bool, np.dtype[Any], int]:
    version = np.lib.format.read_magic(file)
    read = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }.get(version)
    if read is None:
        raise ValueError(f"its .npy version {version} is for arrays with named fields")
    shape, fortran, dtype = read(file)
    return shape, fortran, dtype, file.tell()


def _refuse_objects(dtype: np.dtype[Any], what: str) -> None:
    if dtype.hasobject:
        raise DataError(
            f"{what} is an array of Python objects. Reading it would execute code from the file, "
            f"so it is refused. Save it as numbers, for example x.astype('float32')."
        )


def read_file(path: Path) -> Mapping[str, Any]:
    """The arrays of a data file by name; samples are "x" and labels "y" where it has no names.

    Raises:
        DataError: the file is not a data file, is damaged, or would have to be unpickled.
    """
    try:
        with path.open("rb") as file:
            head = file.read(8)
        if not head:
            raise DataError(f"{path} is empty. {_ACCEPTED}.")
        if head.startswith(_NPY):
            return {"x": _read_npy(path)}
        if head.startswith(_ZIP):
            with zipfile.ZipFile(path) as archive:
                names = archive.namelist()
            if any(name.endswith(".npy") for name in names):
                return NpzArrays(path)
            if any(name.endswith("data.pkl") for name in names):
                return _read_tensors(path, on_disk=True)
        if head.startswith(_PICKLE):
            return _read_tensors(path, on_disk=False)
    except CompressError:
        raise
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise DataError(f"{path} cannot be read: {error}. {_ACCEPTED}.") from error
    raise DataError(f"{path} is not a data file (it begins with {head!r}). {_ACCEPTED}.")


def _read_npy(path: Path) -> np.ndarray:
    with path.open("rb") as file:
        shape, _, dtype, _ = _npy_header(file)
    _refuse_objects(dtype, str(path))
    if not math.prod(shape):
        return np.empty(shape, dtype)
    loaded: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
    return loaded


def _read_tensors(path: Path, on_disk: bool) -> Mapping[str, Any]:
    import torch

    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=on_disk)
    except Exception as error:  # torch raises many kinds, and none of its own
        reason = str(error).strip().split("\n")[0]
        raise DataError(
            f"{path} cannot be read as tensors without executing code: {reason}. Save a tensor, "
            f"(x, y) or a dict of tensors with torch.save."
        ) from error
    if isinstance(loaded, torch.Tensor):
        return {"x": loaded}
    if isinstance(loaded, (tuple, list)) and len(loaded) == 2:
        return {"x": loaded[0], "y": loaded[1]}
    if isinstance(loaded, dict) and all(isinstance(key, str) for key in loaded):
        return loaded
    raise DataError(
        f"{path} holds a {type(loaded).__name__}. Save a tensor, (x, y) or a dict of tensors."
    )


def read_folder(path: Path, spec: TensorSpec) -> tuple[Images, np.ndarray | None]:
    """The images of a folder, and their labels (N,) if they lie in one sub-folder per class.

    Classes are numbered in the alphabetical order of the sub-folders, an empty one included.

    Raises:
        DataError: no images, images on both levels, or a model that takes no images.
        MissingExtraError: Pillow is not installed.
    """
    if importlib.util.find_spec("PIL") is None:
        raise MissingExtraError(
            f"{path} is a folder of images; decoding them needs Pillow: pip install pillow."
        )
    height, width, channels = _image_shape(path, spec)
    flat = _images_in(path)
    folders = sorted(f for f in path.iterdir() if f.is_dir() and not f.name.startswith("."))
    classes = [_images_in(folder) for folder in folders]
    files = [file for members in classes for file in members]
    if flat and files:
        raise DataError(
            f"{path} holds images itself and in its sub-folders, e.g. {flat[0].name} and "
            f"{files[0].relative_to(path)}. Use one sub-folder per class, or none at all."
        )
    if not flat and not files:
        raise DataError(
            f"{path} holds no images ({' '.join(IMAGE_SUFFIXES)}), and neither do its sub-folders."
        )
    if flat:
        return Images(flat, height, width, channels), None
    labels = np.repeat(np.arange(len(classes)), [len(members) for members in classes])
    return Images(files, height, width, channels), labels


def _images_in(folder: Path) -> list[Path]:
    files = (f for f in folder.iterdir() if f.suffix.lower() in IMAGE_SUFFIXES)
    return sorted(f for f in files if not f.name.startswith("."))


def _image_shape(path: Path, spec: TensorSpec) -> tuple[int, int, int]:
    shape = [size for size in spec.shape[1:] if isinstance(size, int)]
    if len(shape) == 3 and shape[0] in (1, 3):
        return shape[1], shape[2], shape[0]
    if len(shape) == 3 and shape[2] in (1, 3):
        return shape[0], shape[1], shape[2]
    raise DataError(
        f"{path} is a folder of images, and the model's input {spec} is no image with 1 or 3 "
        f"channels. Give an .npz file with the arrays, or module:function."
    )


def is_function_name(text: str) -> bool:
    """Whether a text has the form `module:function`."""
    return re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", text) is not None


def import_function(text: str) -> Any:
    """The object that `module:function` names; modules of the working directory are found too.

    Raises:
        UsageError: the module cannot be imported, or has no such name.
    """
    module_name, _, name = text.partition(":")
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.insert(0, os.getcwd())  # a console script does not search where the user stands
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise UsageError(
            f"{text}: importing {module_name} failed with {type(error).__name__}: {error}. It is "
            f"looked for in the working directory and among the installed packages."
        ) from error
    if not hasattr(module, name):
        close = difflib.get_close_matches(name, dir(module), n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise UsageError(f"{text}: the module {module_name} has no {name!r}.{hint}")
    return getattr(module, name)
