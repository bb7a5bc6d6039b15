"""What each kernel of an engine takes and moves, as rows for tables, plots and explanations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from compress.target import KernelTime

_NO_ARITHMETIC = ("move", "convert")


def kernel_rows(
    times: Sequence[KernelTime], macs: Mapping[str, int]
) -> tuple[Mapping[str, Any], ...]:
    """One row per kernel, in order of execution.

    Args:
        times: from `Engine.profile`.
        macs: of one run, by site. Of several kernels of a site the longest gets them.

    Returns:
        kernel, op_type, precision, site, backend, fused, p50_us, share (0..1 of the sum), macs,
        gmacs_per_second, bytes (moved once each; None where the runtime does not tell), and
        inputs, weights and outputs as lists of [shape, dtype].
    """
    total = sum(one.p50_us for one in times) or 1.0
    multiplying: dict[str, KernelTime] = {}
    for one in times:
        site = one.kernel.site
        if one.kernel.precision not in _NO_ARITHMETIC and macs.get(site):
            multiplying[site] = max(multiplying.get(site, one), one, key=lambda t: t.p50_us)
    return tuple(
        _row(one, total, macs.get(one.kernel.site, 0))
        if multiplying.get(one.kernel.site) is one
        else _row(one, total, 0)
        for one in times
    )


def _row(one: KernelTime, total_us: float, macs: int) -> Mapping[str, Any]:
    kernel, tensors = one.kernel, one.kernel.tensors
    return {
        "kernel": kernel.name,
        "op_type": kernel.op_type,
        "precision": kernel.precision,
        "site": kernel.site,
        "backend": kernel.backend,
        "fused": kernel.fused,
        "p50_us": one.p50_us,
        "share": one.p50_us / total_us,
        "macs": macs,
        "gmacs_per_second": macs / one.p50_us / 1e3 if one.p50_us else 0.0,
        "bytes": tensors.bytes if tensors is not None else None,
        **{
            name: [[list(t.shape), t.dtype] for t in getattr(tensors, name, ())]
            for name in ("inputs", "weights", "outputs")
        },
    }
