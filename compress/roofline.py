"""What a device needs for a model at least, by its peak rates: a roofline over all operators.

    t = sum over operators of max(MACs / peak, bytes / bandwidth)

the waterline of "On the Efficiency of CNNs" (arXiv 2404.03617). No kernel reaches its peak, so a
device takes longer: compare predictions with each other, not with a clock.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from compress.device_sheet import DeviceSheet, Precision
from compress.errors import UnsupportedError
from compress.graph import Site

FUSED = frozenset(
    [
        "Relu", "Clip", "BatchNormalization", "Identity", "Dropout", "Reshape", "Flatten",
        "Squeeze", "Unsqueeze", "Shape", "Cast",
    ]
)  # fmt: skip
"""Computed inside the operator before, or only another view of its output."""
_BYTES = {"float32": 4, "float16": 2, "int8": 1}


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """A lower bound on the latency of one run at batch 1; nothing was measured.

    Attributes:
        precision: of the operators in `narrow`; all others are float32.
        cores: of the device's fastest cluster.
        predicted_ms: the sum.
        memory_bound: share of that time in which memory, not arithmetic, is the limit.
    """

    precision: Precision
    cores: int
    predicted_ms: float
    memory_bound: float

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Bound:
    """What one kernel needs at least.

    Attributes:
        macs: multiply-accumulates.
        seconds: the larger of arithmetic and memory.
        memory_bound: memory is the larger.
    """

    macs: float
    seconds: float
    memory_bound: bool


def kernel_bound(macs: float, moved: float, peak: float, bandwidth: float) -> Bound:
    """The roofline of one kernel (Williams, Waterman & Patterson 2009).

    Args:
        macs: multiply-accumulates.
        moved: bytes to and from memory.
        peak: multiply-accumulates per second.
        bandwidth: bytes per second.
    """
    arithmetic, memory = macs / peak, moved / bandwidth
    return Bound(macs, max(arithmetic, memory), memory > arithmetic)


def waterline(bounds: Sequence[Bound]) -> float:
    """Multiply-accumulates per second that a sequence of kernels can attain: sum n / sum t.

    That is the mean of the kernels' attainable rates n / t, harmonic and weighted by their n
    (arXiv 2404.03617); 0 for no arithmetic.
    """
    seconds = sum(one.seconds for one in bounds)
    return sum(one.macs for one in bounds) / seconds if seconds else 0.0


def predict(
    sites: Sequence[Site],
    device: DeviceSheet,
    precision: Precision = "float32",
    *,
    cores: int | None = None,
    narrow: Collection[str] | None = None,
) -> Prediction:
    """The latency that a device cannot beat.

    Args:
        sites: of the model; sizes that are unknown count as 1.
        device: with its peaks.
        precision: of arithmetic and tensors.
        cores: of its fastest cluster; all of them where None.
        narrow: names of the sites at that precision; all where None.

    Raises:
        UnsupportedError: the device has no arithmetic at that precision.
    """
    bandwidth = device.bandwidth_gb_s.value * 1e9
    bounds = []
    for site in sites:
        if site.op_type in FUSED:
            continue
        at = precision if narrow is None or site.name in narrow else "float32"
        peak = _peak(device, at, cores)
        bounds.append(kernel_bound(site.macs, _elements(site) * _BYTES[at], peak, bandwidth))
    total = sum(one.seconds for one in bounds)
    starved = sum(one.seconds for one in bounds if one.memory_bound)
    first = device.clusters[0].count
    return Prediction(
        precision=precision,
        cores=min(cores or first, first),
        predicted_ms=total * 1e3,
        memory_bound=starved / total if total else 0.0,
    )


def _peak(device: DeviceSheet, precision: Precision, cores: int | None) -> float:
    peak = device.peak_gmacs(precision, cores)
    if peak is None:
        raise UnsupportedError(
            f"{device.title} has no {precision} arithmetic; predict float32 or int8 instead."
        )
    return peak * 1e9


def _elements(site: Site) -> int:
    """Numbers that the operator reads and writes once: inputs, weights, output."""
    shapes = (*site.inputs, site.output)
    return sum(math.prod(map(abs, shape)) for shape in shapes if shape) + site.parameters
