"""`compress profile`: where the time goes, kernel by kernel and runtime by runtime."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from compress import artifact
from compress.errors import UnsupportedError
from compress.export import to_onnx
from compress.graph import graph_sites
from compress.kernel_peaks import kernel_peaks
from compress.kernel_rows import kernel_rows
from compress.loading import load
from compress.model import TensorSpec, random_inputs
from compress.progress import Progress, silent
from compress.registry import create_target, require_target
from compress.target import Engine, KernelTime, Target, runtimes


@dataclass(frozen=True)
class ProfileReport:
    """Time per fused kernel of one model on one target.

    Attributes:
        model: its name.
        target: the target's name.
        threads: of one operator.
        rows: runtime, and what `compress.kernel_rows.kernel_rows` gives for it.
        layers: where there are several runtimes, one row per site: site, op_type, macs, and by
            runtime `p50_us` and `precision`; what no site executes is called "".
        peaks: by runtime, fields of `compress.estimate.peaks.Peaks`, where they could be measured;
            `compress plot` draws roofs with them.
    """

    model: str
    target: str
    threads: int | str
    rows: tuple[Mapping[str, Any], ...]
    layers: tuple[Mapping[str, Any], ...] = ()
    peaks: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return dataclasses.asdict(self)


def profile(
    model: Any,
    *,
    target: str = "cpu",
    threads: int | None = None,
    factory: str | None = None,
    inputs: Sequence[str | TensorSpec] = (),
    runs: int = 20,
    trust_pickle: bool = False,
    progress: Progress = silent,
) -> ProfileReport:
    """Time per kernel after the runtime's own fusions, in order of execution.

    A target that several runtimes serve is profiled in each; an artifact in its own. The runtime's
    profiler adds some time to every kernel, most visibly to small ones: read shares here, and
    latency from `compress bench`. Runtimes that tell no times are left out.

    Raises:
        UnsupportedError: no runtime tells the times of its kernels.
    """
    destination = create_target(target, threads=threads)
    require_target(destination)
    engines: dict[str, Engine]
    if isinstance(model, (str, Path)) and Path(model).is_dir():
        name = Path(model).name
        report = artifact.read_report(Path(model))
        _profilers(create_target(report["target"]["name"]))
        engines = {report["target"]["name"]: artifact.load(model, threads=threads)}
        macs = {row["name"]: row["macs"] for row in report["sites"]}
        types = {row["name"]: row["op_type"] for row in report["sites"]}
    else:
        loaded = load(model, factory=factory, inputs=tuple(inputs), trust_pickle=trust_pickle)
        name = loaded.name
        exported = to_onnx(loaded, destination.capabilities.opset)
        engines = {one.name: one.build(exported) for one in _profilers(destination)}
        sites = graph_sites(exported.graph_model)
        macs = {site.name: site.macs for site in sites}
        types = {site.name: site.op_type for site in sites}
    times = {
        runtime: engine.profile(random_inputs(engine.inputs, 1, np.random.default_rng(0)), runs)
        for runtime, engine in engines.items()
    }
    rows = [
        {"runtime": runtime, **row}
        for runtime, found in times.items()
        for row in kernel_rows(found, macs)
    ]
    layers = _layers(times, types, macs) if len(times) > 1 else ()
    peaks, _ = kernel_peaks(times, threads, progress)
    return ProfileReport(
        name,
        destination.name,
        threads or "all",
        tuple(rows),
        layers,
        {runtime: one.to_dict() for runtime, one in peaks.items()},
    )


def _profilers(target: Target) -> list[Target]:
    """The runtimes of a target that tell the time of each kernel."""
    found = [one for one in runtimes(target) if one.capabilities.profiler]
    if not found:
        raise UnsupportedError(
            f"Target {target.name} does not tell the time of each kernel; `compress bench` "
            f"measures the latency of the whole."
        )
    return found


def _layers(
    times: Mapping[str, Sequence[KernelTime]], types: Mapping[str, str], macs: Mapping[str, int]
) -> tuple[Mapping[str, Any], ...]:
    """Sites in the graph's order with their time in each runtime; what has none comes last."""
    spent: dict[str, dict[str, float]] = defaultdict(dict)
    precisions: dict[str, dict[str, str]] = defaultdict(dict)
    for runtime, found in times.items():
        for one in found:
            site = one.kernel.site if one.kernel.site in types else ""
            spent[site][runtime] = spent[site].get(runtime, 0.0) + one.p50_us
            precisions[site].setdefault(runtime, one.kernel.precision if site else "")
    order = [site for site in (*types, "") if site in spent]
    return tuple(
        {
            "site": site,
            "op_type": types.get(site, "not of the model"),
            "macs": macs.get(site, 0),
            "p50_us": spent[site],
            "precision": precisions[site],
        }
        for site in order
    )
