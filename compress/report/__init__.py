"""Report: what was gained and what was lost, as data; `markdown` and `terminal` draw it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

SCHEMA_VERSION = 2


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One model that was built and measured on the target.

    Attributes:
        name: "float32" for the original, else runtime and precision.
        runtime: name of the target that it was built for.
        precision: "float32", "bfloat16", "int8" or "mixed".
        settings: of that target.
        size_bytes: of the model files.
        timing: fields of `compress.latency.Timing`; empty where nothing was measured.
        speedup: fields of `compress.latency.Ratio` against the original; None for itself.
        score: evaluation in the target's runtime, None without `evaluate`; `where` says so if it
            was somewhere else.
        drop: fields of `compress.metrics.Drop` in points, where the score is a top-1.
        fidelity: agreement with the original on the same inputs; None for itself.
        int8_macs: share of multiply-accumulates that the runtime executes in int8, 0..1.
        buys: what it is made for: "speed", "size", "device" (speed elsewhere, which is not
            measured) or "numbers" (simulated formats).
        memory: peak of its activations for one request, see `compress.memory.limit.memory_facts`;
            empty where nobody asked.
        allowed: whether it keeps the budget's limits on the drop and on memory.
    """

    name: str
    size_bytes: int
    runtime: str = ""
    precision: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    timing: Mapping[str, Any]
    speedup: Mapping[str, Any] | None = None
    score: Mapping[str, Any] | None = None
    drop: Mapping[str, Any] | None = None
    fidelity: Mapping[str, Any] | None = None
    int8_macs: float = 0.0
    buys: str = "speed"
    memory: Mapping[str, Any] = field(default_factory=dict)
    allowed: bool = True


@dataclass(frozen=True, kw_only=True)
class Report:
    """Everything about one run. `to_dict` is what `report.json` holds.

    Attributes:
        headline: sentences that a reader must see first.
        met: whether the budget was met.
        chosen: name of the candidate that became the artifact.
        budget: limits that were given or assumed.
        candidates: the original first.
        sites: one row per operator: name, op_type, macs, parameters, precision, reason.
        steps: history of the compressed model, without the plan.
        tried: every variant that was screened: name, runtime, precision, settings, speedup,
            p50_ms, float_sites, failure.
        regions: where the runtime of the artifact was searched for mixed placements: one row per
            region with its precision and the predicted time at each.
        ladder: where accuracy was repaired: fields of `compress.ladder.Attempt`, in order.
        gap: how the artifact in its runtime compares with the simulation of its plan: samples,
            top1_agreement, sqnr_db; empty where there is none.
        sensitivity: what quantizing one operator alone costs: one row per operator and format, with
            name, format and metrics by name, the one that decides first.
        predicted: where a device sheet was named: the sheet, and rows of
            `compress.roofline.Prediction`; nothing of it is measured.
        devices: where candidates were measured on other machines: this one first, then one row
            per device, fields of `compress.remote.OnDevice.to_dict`. `candidates` then hold the
            latencies of the device that `latency` names.
        kernels: of the original and of the artifact (where that is the original, of the fastest
            other), by candidate: `runtime`, and `rows` as `compress.kernel_rows` makes them;
            profiled on this machine.
        peaks: by runtime of those kernels, fields of `compress.estimate.peaks.Peaks`.
        waterlines: by candidate, fields of `compress.waterline.Waterline`.
        plots: by kind, the file beside `report.md`.
        unplotted: by kind or runtime, a sentence about what could not be drawn or measured for it.
        latency: how the timing was made.
        calibration: where ranges come from, and the hash of the data.
        evaluation: what was scored, and the hash of the data.
        model: name, source, hash, inputs.
        target: name, options, facts with their source.
        machine: hardware and fingerprint.
        versions: of the packages that matter.
        files: sha256 of what was written.
        command: how to repeat it.
        created: UTC, ISO 8601.
        seconds: duration of each phase.
        built: whether there is an engine. If not, nothing is chosen and `compress build` does that.
        prepared: where the engine was built by `compress build`: headline, candidates, machine,
            versions, command and date of the `compress run` before it.
    """

    headline: tuple[str, ...]
    met: bool
    chosen: str
    budget: Mapping[str, Any]
    candidates: tuple[Candidate, ...]
    sites: tuple[Mapping[str, Any], ...]
    steps: tuple[Mapping[str, Any], ...]
    latency: Mapping[str, Any]
    calibration: Mapping[str, Any]
    evaluation: Mapping[str, Any]
    model: Mapping[str, Any]
    target: Mapping[str, Any]
    machine: Mapping[str, Any]
    versions: Mapping[str, str]
    created: str
    command: str = ""
    files: Mapping[str, str] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)
    tried: tuple[Mapping[str, Any], ...] = ()
    regions: tuple[Mapping[str, Any], ...] = ()
    ladder: tuple[Mapping[str, Any], ...] = ()
    gap: Mapping[str, Any] = field(default_factory=dict)
    sensitivity: tuple[Mapping[str, Any], ...] = ()
    built: bool = True
    prepared: Mapping[str, Any] = field(default_factory=dict)
    predicted: Mapping[str, Any] = field(default_factory=dict)
    devices: tuple[Mapping[str, Any], ...] = ()
    kernels: Mapping[str, Any] = field(default_factory=dict)
    peaks: Mapping[str, Any] = field(default_factory=dict)
    waterlines: Mapping[str, Any] = field(default_factory=dict)
    plots: Mapping[str, str] = field(default_factory=dict)
    unplotted: Mapping[str, str] = field(default_factory=dict)
    schema_version: int = SCHEMA_VERSION

    def candidate(self, name: str) -> Candidate:
        """The candidate of that name."""
        return next(candidate for candidate in self.candidates if candidate.name == name)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Report:
        """What `to_dict` gave, read back from JSON.

        Raises:
            TypeError: a field is missing, or there are others.
        """
        candidates = tuple(Candidate(**one) for one in values["candidates"])
        return cls(**{**values, "candidates": candidates})

    def markdown(self) -> str:
        """The text of `report.md`."""
        from compress.report.markdown import markdown

        return markdown(self)
