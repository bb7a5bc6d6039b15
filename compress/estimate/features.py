"""What a kernel's time depends on, as numbers: sizes, arithmetic, bytes, and unused lanes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from compress.graph import Site
from compress.kernel_rows import kernel_rows
from compress.target import Kernel, KernelTime

FEATURES = (
    "macs",
    "bytes_read",
    "bytes_weights",
    "bytes_written",
    "channels_in",
    "channels_out",
    "height",
    "width",
    "kernel",
    "stride",
    "group",
    "intensity",
    "filled",
    "waste_in_4",
    "waste_in_8",
    "waste_in_16",
    "waste_out_8",
    "waste_out_16",
    "waste_out_64",
    "added",
    "activated",
    "constants",
    "network",
)
"""The columns of a kernel's features, in the order of `Described.values`. The first eight are
counts, of which logarithms to base 2 of 1 + n are taken; "filled" is by how much the runtime made
the weight larger, and "waste" the share by which channels grow when they are filled up to a
multiple (the staircase); "added" and "activated" say what is
fused; "constants" counts them, as integer kernels with a scale for each channel have more;
"network" is the logarithm of the bytes of all weights of the network and of the largest kernel's
activations: whether they stay in a cache from one call to the next."""
COUNTS = FEATURES[:8]
_SIZES = ("macs", "bytes_read", "bytes_weights", "bytes_written")
RANGED = (*_SIZES, "channels_in", "channels_out", "kernel", "stride")
"""Features whose range in the samples says whether a kernel is like them."""
_ALIASES = {"FusedConv": "Conv"}
"""One kernel under two names: ONNX Runtime's convolution with and without an activation."""
_BLOCKED = "_nchwc"
"""End of the names of ONNX Runtime's kernels whose channels lie in blocks; others are slower."""
_MULTIPLYING = ("Conv", "Gemm", "MatMul", "FullyConnected", "Deconvolution")


@dataclass(frozen=True)
class Described:
    """A kernel as predictors see it.

    Attributes:
        type: operator, precision, and "depthwise" or "grouped" and "blocked" where it is: each
            has a predictor.
        fused: what is computed inside it.
        macs: multiply-accumulates.
        bytes: moved once each.
        values: by `FEATURES`.
        name: for people.
        site: that it executes, or "".
        precision: of the kernel.
    """

    type: str
    fused: str
    macs: int
    bytes: int
    values: tuple[float, ...]
    name: str
    site: str
    precision: str

    @property
    def raw(self) -> dict[str, float]:
        """The features by name, counts as counts."""
        return {
            name: float(2**value - 1) if name in COUNTS else value
            for name, value in zip(FEATURES, self.values, strict=True)
        }


def describe(kernels: Sequence[Kernel], sites: Mapping[str, Site]) -> list[Described]:
    """The kernels of an engine in order of execution.

    Args:
        kernels: from `Engine.kernels`.
        sites: of the graph that was built, by name.
    """
    macs = {name: site.macs for name, site in sites.items()}
    # Of several kernels of a site one has its arithmetic; without times, the one that multiplies.
    times = [KernelTime(k, 1.0 + any(w in k.op_type for w in _MULTIPLYING)) for k in kernels]
    rows = kernel_rows(times, macs)
    held = math.log2(1 + _working_set(kernels))
    return [
        _described(kernel, sites.get(kernel.site), int(row["macs"]), held)
        for kernel, row in zip(kernels, rows, strict=True)
    ]


def _working_set(kernels: Sequence[Kernel]) -> int:
    """Bytes of all weights, and of the activations that the largest kernel reads and writes."""
    told = [kernel.tensors for kernel in kernels if kernel.tensors is not None]
    weights = sum(one.bytes for tensors in told for one in tensors.weights)
    moved = (sum(one.bytes for one in (*t.inputs, *t.outputs)) for t in told)
    return weights + max(moved, default=0)


def _described(kernel: Kernel, site: Site | None, macs: int, held: float) -> Described:
    tensors = kernel.tensors
    read, written, weight = _shapes(kernel, site)
    group = _group(weight, read)
    counts = {
        "macs": macs,
        "bytes_read": sum(t.bytes for t in tensors.inputs) if tensors else 4 * math.prod(read),
        "bytes_weights": sum(t.bytes for t in tensors.weights) if tensors else 0,
        "bytes_written": sum(t.bytes for t in tensors.outputs)
        if tensors
        else 4 * math.prod(written),
        "channels_in": _channels(read),
        "channels_out": _channels(written),
        "height": written[2] if len(written) > 2 else 1,
        "width": math.prod(written[3:]),
    }
    moved = counts["bytes_read"] + counts["bytes_weights"] + counts["bytes_written"]
    others = {
        "filled": _filled(kernel, read, written, group),
        "waste_in_4": _waste(counts["channels_in"], 4),
        "kernel": math.prod(weight[-2:]) if len(weight) > 3 else 1,
        "stride": site.strides[0] if site is not None and site.strides else 1,
        "group": group,
        "intensity": math.log2(1 + macs / max(moved, 1)),
        "waste_in_8": _waste(counts["channels_in"], 8),
        "waste_in_16": _waste(counts["channels_in"], 16),
        "waste_out_8": _waste(counts["channels_out"], 8),
        "waste_out_16": _waste(counts["channels_out"], 16),
        "waste_out_64": _waste(counts["channels_out"], 64),
        "added": "Add" in kernel.fused,
        "activated": any(word not in ("", "Add") for word in kernel.fused.split("+")),
        "constants": len(tensors.weights) if tensors else 0,
        "network": held,
    }
    values = [math.log2(1 + counts[name]) for name in COUNTS]
    values += [float(others[name]) for name in FEATURES[len(COUNTS) :]]
    shape = ""
    if group != 1:
        shape = " depthwise" if group == 0 else " grouped"
    blocked = " blocked" if kernel.name.endswith(_BLOCKED) else ""
    return Described(
        f"{_ALIASES.get(kernel.op_type, kernel.op_type)} {kernel.precision}{shape}{blocked}",
        kernel.fused,
        macs,
        moved,
        tuple(values),
        kernel.site or kernel.name,
        kernel.site,
        kernel.precision,
    )


def _shapes(
    kernel: Kernel, site: Site | None
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """First activation, output and weight. The site's shapes have channels on axis 1."""
    tensors = kernel.tensors
    read: tuple[int, ...] = ()
    written: tuple[int, ...] = ()
    weight: tuple[int, ...] = ()
    if tensors is not None:
        read = max((t.shape for t in tensors.inputs), key=math.prod, default=())
        written = max((t.shape for t in tensors.outputs), key=math.prod, default=())
        weight = max((t.shape for t in tensors.weights), key=len, default=())
    if site is not None:
        read, written = (site.inputs[0] if site.inputs else read), site.output or written
        weight = weight if len(weight) > 1 else site.weight or weight
    return _known(read), _known(written), _known(weight)


def _known(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(abs(size) for size in shape)


def _channels(shape: tuple[int, ...]) -> int:
    return shape[1] if len(shape) in (2, 4, 5) else shape[-1] if shape else 1


def _group(weight: tuple[int, ...], read: tuple[int, ...]) -> int:
    """0 where each channel is by itself, 2 where there are groups, 1 elsewhere."""
    if len(weight) == 5:  # groups are an axis of their own
        weight = (weight[0] * weight[1], *weight[2:])
    if len(weight) != 4 or len(read) != 4 or weight[1] >= read[1]:
        return 1
    return 0 if weight[1] == 1 else 2


def _filled(kernel: Kernel, read: tuple[int, ...], written: tuple[int, ...], group: int) -> float:
    """Weights that the kernel holds over those that the model has; 1 where that is unknown."""
    weight = (
        max((t.shape for t in kernel.tensors.weights), key=len, default=())
        if kernel.tensors
        else ()
    )
    if len(weight) != 4 or len(read) != 4 or len(written) != 4 or group == 2:
        return 1.0
    return math.prod(weight[:2]) / (written[1] * (read[1] if group else 1))


def _waste(channels: int, multiple: int) -> float:
    return -channels % multiple / max(channels, 1)


def matrix(kernels: Sequence[Described]) -> np.ndarray:
    """Features (kernels, features) in float32."""
    return np.array([one.values for one in kernels], np.float32).reshape(-1, len(FEATURES))
