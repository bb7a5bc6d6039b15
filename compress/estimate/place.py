"""Place: the machine, target, threads and versions that a time belongs to, and its cache folder."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from compress.errors import UnsupportedError
from compress.machine import fingerprint, this_machine, versions
from compress.target import Elsewhere, Target
from compress.variants import settings

CACHE = Path("~/.cache/hwcompress/latency")
_RUNTIMES = {
    "onnxruntime": ("onnxruntime",),
    "cpu": ("onnxruntime",),
    "openvino": ("openvino",),
    "executorch": ("executorch",),
    "inductor": ("torch",),
    "onnxruntime_cuda": ("onnxruntime-gpu",),
    "tensorrt": ("tensorrt", "tensorrt-cu12"),
}
"""Distributions whose version changes what a target's kernels take."""
_VARIABLES = ("ONEDNN_MAX_CPU_ISA",)
"""Variables that take instructions away from kernels."""


@dataclass(frozen=True)
class Place:
    """Where a time was taken; times of different places are never mixed.

    Attributes:
        fingerprint: of the machine (`compress.machine.fingerprint`).
        cpu: the processor's name, for people.
        target: the target's name.
        options: of the target, as text that decides equality; threads among them.
        threads: that the target uses.
        versions: of what executes the kernels, and variables that change them.
    """

    fingerprint: str
    cpu: str
    target: str
    options: str
    threads: int
    versions: tuple[tuple[str, str], ...]

    def __str__(self) -> str:
        numbers = ", ".join(f"{name} {version}" for name, version in self.versions)
        plural = "" if self.threads == 1 else "s"
        what = f"{self.target}, {self.threads} thread{plural}, {self.cpu} ({self.fingerprint})"
        return f"{what}, {numbers}" if numbers else what

    @property
    def folder(self) -> Path:
        """Of everything that is kept for this place."""
        key = hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()[:16]
        return CACHE.expanduser() / f"{self.target}-{self.threads}-{key}"

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {**asdict(self), "versions": dict(self.versions)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Place:
        """Read back.

        Raises:
            KeyError, TypeError, ValueError: it is something else.
        """
        numbers = {str(k): str(v) for k, v in dict(values["versions"]).items()}
        return cls(
            str(values["fingerprint"]),
            str(values["cpu"]),
            str(values["target"]),
            str(values["options"]),
            int(values["threads"]),
            tuple(sorted(numbers.items())),
        )


def place_of(target: Target) -> Place:
    """The place that times of a target on this machine belong to.

    Raises:
        UnsupportedError: the target runs on another device.
    """
    if isinstance(target, Elsewhere) and target.elsewhere:
        raise UnsupportedError(
            f"Target {target.name} runs on another device, so nothing can be timed for it here. "
            f"Use `--device ssh://...` of `compress bench`, or the device sheets of `compress run`."
        )
    machine = this_machine()
    found = versions(*_RUNTIMES.get(target.name, ()))
    found |= {name: os.environ[name] for name in _VARIABLES if os.environ.get(name)}
    given = dict(settings(target))
    threads = int(given.pop("threads", None) or machine.cores)
    return Place(
        fingerprint(machine),
        machine.cpu,
        target.name,
        json.dumps(given, sort_keys=True, default=str),
        threads,
        tuple(sorted(found.items())),
    )
