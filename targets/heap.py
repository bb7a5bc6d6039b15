"""Bytes that this process has from the C library: exact where resident memory is only a hint."""

from __future__ import annotations

import ctypes
import functools
from typing import Any

_FIELDS = (
    "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks",
    "keepcost",
)  # fmt: skip


class _Mallinfo2(ctypes.Structure):
    """struct mallinfo2 of <malloc.h>."""

    _fields_ = [(name, ctypes.c_size_t) for name in _FIELDS]


@functools.cache
def _mallinfo2() -> Any:
    try:
        function = ctypes.CDLL(None).mallinfo2
    except (OSError, AttributeError):
        return None
    function.restype = _Mallinfo2
    return function


def heap_in_use() -> int | None:
    """Bytes of malloc and its like that are not freed; None without glibc 2.33 or newer."""
    function = _mallinfo2()
    if function is None:
        return None
    found = function()
    return int(found.uordblks + found.hblkhd)
