"""What a target can do at most here: multiply-accumulates per second and bytes per second.

The peaks of a roofline (Williams, Waterman & Patterson, Roofline, CACM 52(4), 2009), as "On the
Efficiency of CNNs" (arXiv 2404.03617) wants them: the arithmetic peak of each precision from the
largest compute-bound kernels of the target's own runtime, the bandwidth from streams through
arrays that no cache holds (McCalpin, STREAM, 1995: scale, written and read bytes counted once).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from time import perf_counter
from typing import Any

import numpy as np

from compress.errors import CompressError, UnsupportedError
from compress.estimate.graphs import Network, quantized
from compress.estimate.place import Place, place_of
from compress.estimate.store import read_json, write_json
from compress.graph import graph_sites
from compress.machine import this_machine
from compress.model import Model
from compress.progress import Progress, silent
from compress.target import DeviceTimed, Engine, OnDevice, Target, runtimes

SECONDS = 6.0
_STREAM_BYTES = 192 << 20
"""Of each of two arrays; several times the last cache of a server's socket that a process sees."""
_MEMORY_SHARE = 8
"""Both arrays together take at most this part of the memory."""


@dataclass(frozen=True, kw_only=True)
class Peaks:
    """Highest rates that were measured on one target.

    Attributes:
        gmacs_per_second: 10^9 multiply-accumulates per second by kernel precision, "float32",
            "bfloat16" or "int8", as far as the target executes it.
        bandwidth_gb_s: 10^9 bytes per second to and from memory.
        threads: of the target.
        source: how and where they were measured.
        place: the same for programs.
    """

    gmacs_per_second: Mapping[str, float]
    bandwidth_gb_s: float
    threads: int
    source: str
    place: Place

    def __post_init__(self) -> None:
        rates = (*self.gmacs_per_second.values(), self.bandwidth_gb_s)
        if not self.gmacs_per_second or not all(math.isfinite(r) and r > 0 for r in rates):
            raise ValueError(f"Peaks must be positive numbers, and these are {rates}.")

    def gmacs(self, precision: str) -> float:
        """The peak of a precision; that of float32 where it has none of its own."""
        rates = self.gmacs_per_second
        return rates.get(precision) or rates.get("float32") or max(rates.values())

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "gmacs_per_second": dict(self.gmacs_per_second),
            "bandwidth_gb_s": self.bandwidth_gb_s,
            "threads": self.threads,
            "source": self.source,
            "place": self.place.to_dict(),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Peaks:
        """Read back.

        Raises:
            KeyError, TypeError, ValueError: it is something else.
        """
        return cls(
            gmacs_per_second={str(k): float(v) for k, v in values["gmacs_per_second"].items()},
            bandwidth_gb_s=float(values["bandwidth_gb_s"]),
            threads=int(values["threads"]),
            source=str(values["source"]),
            place=Place.from_dict(values["place"]),
        )


def measure_peaks(
    target: Target, *, seconds: float = SECONDS, progress: Progress = silent
) -> Peaks:
    """Measure the peaks of a target on this machine; of several runtimes, those of the first.

    Args:
        target: whose engine runs the kernels, with its threads.
        seconds: of timing, about; building the kernels is not among them.
        progress: opens a tracker.

    Raises:
        UnsupportedError: the target runs elsewhere, or none of the kernels runs on it.
    """
    target = runtimes(target)[0]
    place = place_of(target)
    models = _models(target)
    share = seconds / (len(models) + 1)
    rates: dict[str, float] = {}
    on_device = False
    with progress(f"Measure the peaks of {target.name}", len(models) + 1) as advance:
        for which, model, macs in models:
            try:
                engine = which.build(model)
                on_device |= isinstance(engine, DeviceTimed)
                precision = _precision(engine)
                rate = macs / _fastest(_call(engine, model), share) / 1e9
                rates[precision] = max(rate, rates.get(precision, 0.0))
            except CompressError:  # a precision that the runtime lacks for this kernel
                continue
            finally:
                advance(1, model.name)
        if not rates:
            raise UnsupportedError(
                f"Target {target.name} runs none of the kernels that its peaks are measured with."
            )
        bandwidth = _bandwidth(target, on_device, place.threads, share)
        advance(1, "memory")
    return Peaks(
        gmacs_per_second=dict(sorted(rates.items())),
        bandwidth_gb_s=bandwidth,
        threads=place.threads,
        source=f"measured with large convolutions and products and with streams on {place}",
        place=place,
    )


def cached_peaks(target: Target, *, seconds: float = SECONDS, progress: Progress = silent) -> Peaks:
    """The peaks of a target, measured when they are first asked for.

    They are kept for the machine, the target with its options and threads, and its versions.

    Raises:
        UnsupportedError: as `measure_peaks`.
    """
    place = place_of(runtimes(target)[0])
    path = place.folder / "peaks.json"
    try:
        found = Peaks.from_dict(read_json(path))
        if found.place == place:
            return found
    except (CompressError, KeyError, TypeError, ValueError, AttributeError):
        pass  # none yet, or damaged: measured again
    peaks = measure_peaks(target, seconds=seconds, progress=progress)
    write_json(path, peaks.to_dict())
    return peaks


def _models(target: Target) -> list[tuple[Target, Model, int]]:
    """Compute-bound networks for each precision, with the target that runs them."""
    opset = target.capabilities.opset
    floats = [_conv(opset, 3, 128, 28), _conv(opset, 1, 512, 28), _linear(opset)]
    found = [(target, model, _macs(model)) for model in floats]
    precisions = target.capabilities.precisions
    if "bfloat16" in precisions and _has_option(target, "precision"):
        wide: Target = dataclasses.replace(target, precision="bfloat16")  # type: ignore[type-var]
        found += [(wide, model, _macs(model)) for model in floats]
    if "int8" in precisions:
        found += [(target, quantized(model, target), _macs(model)) for model in floats]
    return found


def _has_option(target: Target, name: str) -> bool:
    return dataclasses.is_dataclass(target) and name in {f.name for f in dataclasses.fields(target)}


def _conv(opset: int, kernel: int, channels: int, size: int) -> Model:
    """Four convolutions in a row, so that what happens at the ends weighs little."""
    network = Network((1, channels, size, size), opset, f"{kernel}x{kernel} convolution")
    x = network.start
    for _ in range(4):
        x = network.conv(x, channels, kernel)
    return network.model(x)


def _linear(opset: int) -> Model:
    network = Network((256, 1024), opset, "product")
    return network.model(network.linear(network.linear(network.start, 1024), 1024))


def _macs(model: Model) -> int:
    return sum(site.macs for site in graph_sites(model.graph_model))


def _precision(engine: Engine) -> str:
    """That of the kernels which multiply; what a runtime made of a model may differ from the plan.

    A runtime that tells nothing of its kernels is believed by the engine's name.
    """
    kernels = [k for k in engine.kernels() if k.precision not in ("move", "convert")]
    multiplying = [k for k in kernels if any(w in k.op_type for w in ("Conv", "Gemm", "MatMul"))]
    found = [k.precision for k in multiplying or kernels]
    return max(set(found), key=found.count) if found else engine.name.rpartition(" ")[2]


def _call(engine: Engine, model: Model) -> Callable[[], float]:
    """Seconds of one run; on the device's own clock where it has one.

    Raises:
        UnsupportedError: it has a memory of its own and no clock, so that copies would be timed.
    """
    inputs = model.example()
    if isinstance(engine, DeviceTimed):
        return engine.timed(inputs)
    if isinstance(engine, OnDevice):
        raise UnsupportedError(f"{engine.name} has no clock that leaves copies out of a time.")

    def timed() -> float:
        start = perf_counter()
        engine(inputs)
        return perf_counter() - start

    return timed


def _fastest(call: Callable[[], float], seconds: float) -> float:
    """Seconds of the fastest call after two that warm up: of a peak, the best counts."""
    end = perf_counter() + seconds
    call(), call()
    best = min(call(), call())
    while perf_counter() < end:
        best = min(best, call())
    return best


def _bandwidth(target: Target, on_device: bool, threads: int, seconds: float) -> float:
    """GB/s: of the device's memory where it has one of its own, else of this machine's."""
    size = _STREAM_BYTES
    if memory := this_machine().memory_bytes:
        size = min(size, memory // _MEMORY_SHARE // 2)
    if not on_device:
        return stream_gb_s(threads, seconds, size)
    network = Network((1, 1, 4096, size // 4 // 4096), target.capabilities.opset, "stream")
    model = network.model(network.unary("Neg", network.start))
    return 2 * size / _fastest(_call(target.build(model), model), seconds) / 1e9


def stream_gb_s(threads: int, seconds: float, size: int = _STREAM_BYTES) -> float:
    """10^9 bytes per second that b = 3 a reads and writes, divided among threads.

    Args:
        threads: that share the arrays.
        seconds: to measure for.
        size: bytes of each array.
    """
    elements = size // 4
    source, result = np.ones(elements, np.float32), np.zeros(elements, np.float32)
    bounds = np.linspace(0, elements, threads + 1).astype(int)
    parts = [slice(a, b) for a, b in pairwise(bounds)]

    def scale(part: slice) -> None:
        np.multiply(source[part], np.float32(3), out=result[part])

    with ThreadPoolExecutor(threads) as pool:

        def timed() -> float:
            start = perf_counter()
            if threads == 1:
                scale(parts[0])
            else:
                list(pool.map(scale, parts))
            return perf_counter() - start

        best = _fastest(timed, seconds)
    return 2 * size / best / 1e9
