"""`compress profile`: where the time goes, kernel by kernel."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from compress import artifact
from compress.export import to_onnx
from compress.graph import graph_sites
from compress.loading import load
from compress.model import TensorSpec, random_inputs
from compress.registry import create_target, require_target


@dataclass(frozen=True)
class ProfileReport:
    """Time per fused kernel of one model on one target.

    Attributes:
        model: its name.
        target: the target's name.
        threads: of one operator.
        rows: kernel, op_type, precision, site, p50_us, share (0..1), macs, gmacs_per_second.
    """

    model: str
    target: str
    threads: int | str
    rows: tuple[Mapping[str, Any], ...]

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
) -> ProfileReport:
    """Time per kernel after the runtime's own fusions, in order of execution.

    The runtime's profiler adds some time to every kernel, most visibly to small ones: read
    shares here, and latency from `compress bench`.
    """
    destination = create_target(target, threads=threads)
    require_target(destination)
    if isinstance(model, (str, Path)) and Path(model).is_dir():
        engine = artifact.load(model, threads=threads)
        graph_model = load(Path(model) / "model.onnx").graph_model
        name = Path(model).name
    else:
        loaded = load(model, factory=factory, inputs=tuple(inputs), trust_pickle=trust_pickle)
        exported = to_onnx(loaded, destination.capabilities.opset)
        engine, graph_model, name = destination.build(exported), exported.graph_model, loaded.name
    macs = {site.name: site.macs for site in graph_sites(graph_model)}
    example = random_inputs(engine.inputs, 1, np.random.default_rng(0))
    times = engine.profile(example, runs)
    total = sum(one.p50_us for one in times) or 1.0
    rows = []
    for one in times:
        count = macs.get(one.kernel.site, 0)
        rows.append(
            {
                "kernel": one.kernel.name,
                "op_type": one.kernel.op_type,
                "precision": one.kernel.precision,
                "site": one.kernel.site,
                "p50_us": one.p50_us,
                "share": one.p50_us / total,
                "macs": count,
                "gmacs_per_second": count / one.p50_us / 1e3 if one.p50_us else 0.0,
            }
        )
    return ProfileReport(name, destination.name, threads or "all", tuple(rows))
