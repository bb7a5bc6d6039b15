"""What a file is, from its first bytes and not from its name."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO, Literal

FileKind = Literal[
    "export",
    "torchscript",
    "torch",
    "torch_legacy",
    "onnx",
    "safetensors",
    "empty",
    "text",
    "html",
    "lfs_pointer",
    "openvino",
    "image",
    "tflite",
    "tensorflow",
    "hdf5",
    "keras",
    "npz",
    "zip",
    "broken_zip",
    "archive",
    "unknown",
]

DESCRIPTIONS: dict[FileKind, str] = {
    "export": "a torch.export archive",
    "torchscript": "a TorchScript archive",
    "torch": "a torch.save file",
    "torch_legacy": "a torch.save file in the layout before torch 1.6",
    "onnx": "an ONNX model",
    "safetensors": "a safetensors file",
    "empty": "an empty file",
    "text": "a text file",
    "html": "a web page (a download that went wrong?)",
    "lfs_pointer": "a Git LFS pointer and not the model itself; fetch it with `git lfs pull`",
    "openvino": "an OpenVINO IR description; convert the model it was made from",
    "image": "an image",
    "tflite": "a TensorFlow Lite model; convert it with tf2onnx --tflite",
    "tensorflow": "a TensorFlow graph; convert it with tf2onnx",
    "hdf5": "an HDF5 file, perhaps Keras weights; convert the model with tf2onnx",
    "keras": "a Keras archive; convert it with tf2onnx or keras.Model.export",
    "npz": "a numpy archive: data and not a model",
    "zip": "a zip archive, but none that torch wrote",
    "broken_zip": "a zip archive that is truncated or damaged; copy or download it again",
    "archive": "a compressed archive; unpack it first",
    "unknown": "in no format that is known here, or it is damaged",
}

_PREFIXES: tuple[tuple[bytes, FileKind], ...] = (
    (b"\x89HDF\r\n\x1a\n", "hdf5"),
    (b"\xff\xd8\xff", "image"),
    (b"\x89PNG", "image"),
    (b"GIF8", "image"),
    (b"BM", "image"),
    (b"RIFF", "image"),
    (b"\x1f\x8b", "archive"),
    (b"BZh", "archive"),
    (b"7z\xbc\xaf", "archive"),
    (b"\xfd7zXZ", "archive"),
    (b"version https://git-lfs", "lfs_pointer"),
)
_HEAD_BYTES = 4096
_LARGEST_SAFETENSORS_HEADER = 100 * 1024 * 1024


def file_kind(path: Path) -> FileKind:
    """The kind of a regular file, judged by content; nothing in it is executed.

    Raises:
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        head = file.read(_HEAD_BYTES)
        size = os.fstat(file.fileno()).st_size
        if not head:
            return "empty"
        if head.startswith(b"PK"):
            return _zip_kind(file)
        if head[4:8] == b"TFL3":
            return "tflite"
        for prefix, kind in _PREFIXES:
            if head.startswith(prefix):
                return kind
        if head[257:262] == b"ustar":
            return "archive"
        if _is_safetensors(head, size):
            return "safetensors"
        if head[0] == 0x80 and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
            return "torch_legacy"
        return _text_kind(head) or _protobuf_kind(file, size)


def _zip_kind(file: BinaryIO) -> FileKind:
    try:
        with zipfile.ZipFile(file) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        return "broken_zip"
    inner = {name.partition("/")[2] for name in names}
    if "archive_format" in inner or "serialized_exported_program.json" in names:
        return "export"
    if "constants.pkl" in inner and any(name.startswith("code/") for name in inner):
        return "torchscript"
    if "data.pkl" in inner:
        return "torch"
    if "model.weights.h5" in names:
        return "keras"
    return "npz" if names and all(name.endswith(".npy") for name in names) else "zip"


def _is_safetensors(head: bytes, size: int) -> bool:
    length = int.from_bytes(head[:8], "little")
    return head[8:9] == b"{" and length <= min(size - 8, _LARGEST_SAFETENSORS_HEADER)


def _text_kind(head: bytes) -> FileKind | None:
    printable = sum(byte >= 32 or byte in b"\t\r\n\f" for byte in head)
    if printable < len(head):
        return None
    start = head.lstrip()[:512].lower()
    if start.startswith((b"<!doctype html", b"<html")):
        return "html"
    return "openvino" if start.startswith(b"<?xml") and b"<net" in head else "text"


# Field numbers of onnx.ModelProto and their protobuf wire types (0 varint, 2 length-delimited),
# from onnx.proto. TensorFlow's SavedModel and GraphDef share the first ones but not `graph` (7).
_ONNX_FIELDS = {1: 0, 2: 2, 3: 2, 4: 2, 5: 0, 6: 2, 7: 2, 8: 2, 14: 2, 20: 2, 25: 2, 26: 2}
_GRAPH_FIELD = 7


def _protobuf_kind(file: BinaryIO, size: int) -> FileKind:
    seen: set[int] = set()
    for number, wire in _fields(file, size):
        if _ONNX_FIELDS.get(number) != wire:
            break
        seen.add(number)
        if number == _GRAPH_FIELD:
            return "onnx"
    # A GraphDef begins with its nodes (field 1, length-delimited); a SavedModel has 1 and 2 only.
    first = next(iter(_fields(file, size)), None)
    return "tensorflow" if first == (1, 2) or seen == {1, 2} else "unknown"


def _fields(file: BinaryIO, size: int) -> Iterable[tuple[int, int]]:
    """Number and wire type of the top-level fields, as far as the file has them."""
    file.seek(0)
    while file.tell() < size:
        tag = _varint(file)
        if tag is None or tag >> 3 == 0:
            return
        yield tag >> 3, tag & 7
        value = _varint(file)
        if value is None or tag & 7 not in (0, 2):
            return
        if tag & 7 == 2:
            file.seek(value, os.SEEK_CUR)


def _varint(file: BinaryIO) -> int | None:
    value = 0
    for shift in range(0, 63, 7):
        byte = file.read(1)
        if not byte:
            return None
        value |= (byte[0] & 0x7F) << shift
        if byte[0] < 0x80:
            return value
    return None
