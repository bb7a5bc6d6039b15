"""DeviceSheet: what a phone or board can do at most, each fact with its source."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

Kind = Literal["stated", "derived", "unverified"]
"""How far a fact can be trusted:

stated      by its source, which was read
derived     computed from what the source states, as written there
unverified  from memory or from the trade press; or assumed, where no device is meant
"""
Precision = Literal["float32", "float16", "int8"]


@dataclass(frozen=True)
class Fact:
    """One number about a device.

    Attributes:
        value: in the unit that the field names.
        source: document or page, with the derivation where there is one.
        kind: see `Kind`.
    """

    value: float
    source: str
    kind: Kind = "stated"


@dataclass(frozen=True, kw_only=True)
class Core:
    """One kind of core, or one streaming multiprocessor of a GPU.

    Attributes:
        name: of the design.
        float32: multiply-accumulates in float32 that it starts in one cycle.
        float16: the same in float16; None where it has no such arithmetic.
        int8: the same of int8 products into int32.
        features: instruction set extensions: "dotprod", "i8mm", "fp16", "bf16".
    """

    name: str
    float32: Fact
    float16: Fact | None
    int8: Fact
    features: tuple[str, ...] = ()

    def rate(self, precision: Precision) -> Fact | None:
        """Multiply-accumulates in one cycle; None where it has no such arithmetic."""
        facts: dict[Precision, Fact | None] = {
            "float32": self.float32,
            "float16": self.float16,
            "int8": self.int8,
        }
        return facts[precision]


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Equal cores of a device.

    Attributes:
        core: their design.
        count: how many there are.
        clock_ghz: highest clock.
    """

    core: Core
    count: int
    clock_ghz: Fact


@dataclass(frozen=True, kw_only=True)
class DeviceSheet:
    """A phone, a board or a core design.

    Attributes:
        name: what `--device` takes.
        title: for people.
        clusters: the fastest first.
        bandwidth_gb_s: peak of the memory, in 10^9 bytes per second.
        memory_gb: of the usual model.
    """

    name: str
    title: str
    clusters: tuple[Cluster, ...]
    bandwidth_gb_s: Fact
    memory_gb: Fact

    def peak_gmacs(self, precision: Precision, cores: int | None = None) -> float | None:
        """Peak of the fastest cluster in 10^9 multiply-accumulates per second.

        Twice that are GFLOP/s or GOP/s. Clusters are not added up: an operator that is divided
        evenly waits for the slowest core.

        Args:
            precision: of the arithmetic.
            cores: of that cluster; all of them where None.
        """
        first = self.clusters[0]
        rate = first.core.rate(precision)
        if rate is None:
            return None
        used = min(cores or first.count, first.count)
        return rate.value * first.clock_ghz.value * used

    def facts(self) -> dict[str, Fact]:
        """Every fact by what it is about."""
        found = {"memory bandwidth, GB/s": self.bandwidth_gb_s, "memory, GB": self.memory_gb}
        for cluster in self.clusters:
            name = cluster.core.name
            found[f"{name} clock, GHz"] = cluster.clock_ghz
            for precision in ("float32", "float16", "int8"):
                rate = cluster.core.rate(precision)
                if rate is not None:
                    found[f"{name} {precision} MACs per cycle"] = rate
        return found

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON and tables: cores, peaks in GFLOP/s and GOP/s, facts."""
        peaks = {p: self.peak_gmacs(p) for p in ("float32", "float16", "int8")}
        return {
            "name": self.name,
            "title": self.title,
            "cores": [f"{c.count}x {c.core.name} {c.clock_ghz.value:g} GHz" for c in self.clusters],
            "features": list(self.clusters[0].core.features),
            "peak_gops": {p: 2 * peak if peak is not None else None for p, peak in peaks.items()},
            "bandwidth_gb_s": self.bandwidth_gb_s.value,
            "memory_gb": self.memory_gb.value,
            "facts": {
                about: {"value": fact.value, "kind": fact.kind, "source": fact.source}
                for about, fact in self.facts().items()
            },
        }
