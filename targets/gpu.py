"""The NVIDIA GPU of this machine, and what GPUs of each generation are good for, as data.

The driver is asked through its C interface (libcuda), which is there wherever a GPU can be used:
that costs milliseconds and needs neither torch nor the CUDA toolkit.
"""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

LIBRARY: Final = "libcuda.so.1"
DRIVER: Final = "the NVIDIA driver (https://www.nvidia.com/drivers)"
_MAJOR, _MINOR = 75, 76
"""CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR of the CUDA driver API."""
_SUCCESS, _NO_DEVICE = 0, 100
"""CUDA_SUCCESS and CUDA_ERROR_NO_DEVICE of the CUDA driver API."""
_LONGEST_NAME = 256


@dataclass(frozen=True)
class Gpu:
    """An NVIDIA GPU.

    Attributes:
        name: as the driver gives it.
        compute_capability: (major, minor).
    """

    name: str
    compute_capability: tuple[int, int]

    def __str__(self) -> str:
        return "{} (compute capability {}.{})".format(self.name, *self.compute_capability)


@dataclass(frozen=True)
class Feature:
    """What multiplies faster than float32 does, since one generation of GPUs.

    Attributes:
        name: of the number format; "2:4" is structured sparsity.
        since: the first compute capability that has it.
        multiple: of channels (or rows and columns of a matrix) that uses it fully; 1 where none is
            named.
        source: where the fact is from.
    """

    name: str
    since: tuple[int, int]
    multiple: int
    source: str


_TABLE = "CUDA Programming Guide 13, 5.1 Compute Capabilities, table 33 (Tensor Core data types)"
_MULTIPLES = (
    "NVIDIA Deep Learning Performance, Matrix Multiplication Background User's Guide, requirements "
    "to use Tensor Cores (16 bytes)"
)

FEATURES: Final = (
    # Table 33 begins with 7.5; Volta is in the guides of CUDA 12 and before.
    Feature("float16", (7, 0), 8, f"NVIDIA Tesla V100 architecture whitepaper; {_MULTIPLES}"),
    Feature("int8", (7, 5), 16, f"{_TABLE}; {_MULTIPLES}"),
    Feature("tf32", (8, 0), 4, f"{_TABLE}; {_MULTIPLES}"),
    Feature("bfloat16", (8, 0), 8, f"{_TABLE}; {_MULTIPLES}"),
    Feature("2:4", (8, 0), 1, "NVIDIA cuSPARSELt documentation, supported GPUs: SM 8.0 and newer"),
    Feature("float8", (8, 9), 16, f"{_TABLE}; {_MULTIPLES}"),
)
"""Formats of Tensor Cores. Before 7.5 int8 has a dot product alone (DP4A, since 6.1)."""


def features(gpu: Gpu) -> dict[str, Feature]:
    """What a GPU has, by name."""
    return {one.name: one for one in FEATURES if gpu.compute_capability >= one.since}


def channel_multiple(gpu: Gpu, precisions: Iterable[str]) -> int:
    """The multiple of channels that uses the GPU fully in all of these precisions."""
    has = features(gpu)
    return math.lcm(*(has[name].multiple for name in precisions if name in has))


@functools.cache
def find_gpu(index: int = 0) -> Gpu | str:
    """The GPU of this index among those that CUDA_VISIBLE_DEVICES leaves, or why there is none."""
    try:
        driver = ctypes.CDLL(LIBRARY)
    except OSError:
        return f"There is no NVIDIA driver ({LIBRARY} cannot be loaded)."
    code = driver.cuInit(0)
    if code == _NO_DEVICE:
        return "The NVIDIA driver finds no GPU."
    device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    name = ctypes.create_string_buffer(_LONGEST_NAME)
    code = (
        code
        or driver.cuDeviceGet(ctypes.byref(device), index)
        or driver.cuDeviceGetName(name, _LONGEST_NAME, device)
        or driver.cuDeviceGetAttribute(ctypes.byref(major), _MAJOR, device)
        or driver.cuDeviceGetAttribute(ctypes.byref(minor), _MINOR, device)
    )
    if code != _SUCCESS:
        return f"The NVIDIA driver does not give GPU {index} (CUDA error {code})."
    return Gpu(name.value.decode(errors="replace"), (major.value, minor.value))
