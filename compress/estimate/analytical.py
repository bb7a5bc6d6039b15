"""The analytical estimate: a roofline over the kernels that the runtime made, from measured peaks.

    t = sum over kernels of max(MACs / peak, bytes / bandwidth)

is what no run can beat. How much longer networks take here is measured once, on a few networks
of random shapes; the median of that factor turns the bound into an estimate.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from compress.estimate.features import Described
from compress.estimate.peaks import Peaks
from compress.estimate.result import KernelEstimate, Latency, Source, ratio_interval
from compress.roofline import Bound, kernel_bound

FEWEST_RATIOS = 3


def bounds(kernels: Sequence[Described], peaks: Peaks) -> list[Bound]:
    """What each kernel needs at least, in order of execution."""
    bandwidth = peaks.bandwidth_gb_s * 1e9
    return [
        kernel_bound(one.macs, one.bytes, peaks.gmacs(one.precision) * 1e9, bandwidth)
        for one in kernels
    ]


def is_int8(kernels: Sequence[Described]) -> bool:
    """Whether any kernel computes in int8; errors are told apart by that."""
    return any(one.precision == "int8" for one in kernels)


def group(kernels: Sequence[Described]) -> str:
    """Name of the networks whose errors speak for this one."""
    return "int8" if is_int8(kernels) else "float"


def bound_ms(kernels: Sequence[Described], peaks: Peaks) -> float:
    """The bound on all kernels together."""
    return 1e3 * sum(one.seconds for one in bounds(kernels, peaks))


def analytical(
    kernels: Sequence[Described], peaks: Peaks, ratios: Mapping[str, Sequence[float]]
) -> Latency:
    """Estimate a network from its kernels.

    Args:
        kernels: of the engine.
        peaks: of its target.
        ratios: measured / bound of other networks, by `group`.
    """
    found = ratios.get(group(kernels), ())
    if len(found) < FEWEST_RATIOS:
        found = [ratio for values in ratios.values() for ratio in values]
    factor = float(np.median(found))
    low, high, coverage = ratio_interval(found)
    each = bounds(kernels, peaks)
    total = 1e3 * sum(one.seconds for one in each)
    return Latency(
        total * factor,
        total * low,
        total * high,
        Source("analytical", peaks.place),
        coverage,
        f"the roofline is a bound of {total:.4g} ms; {len(found)} other networks took "
        f"{low:.2f} to {high:.2f} times theirs",
        tuple(
            KernelEstimate(
                kernel.name, kernel.type, 1e6 * one.seconds * factor,
                "memory-bound" if one.memory_bound else "",
            )
            for kernel, one in zip(kernels, each, strict=True)
        ),
    )  # fmt: skip
