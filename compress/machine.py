"""The machine that numbers were measured on: processor, usable cores, features, versions.

Latency means nothing without it, and the choice of an integer scheme depends on it. Linux is
read from /proc and /sys, macOS through `sysctl`; elsewhere the features stay empty, which means
"unknown". The parsers take text, so each can be tested on any machine.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import platform
import re
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

FEATURES = {
    "avx2": "avx2",
    "avx512f": "avx512f",
    "avx512_vnni": "avx512_vnni",
    "avx512vnni": "avx512_vnni",
    "avx_vnni": "avx_vnni",
    "avx512_bf16": "avx512_bf16",
    "amx_int8": "amx_int8",
    "amx_bf16": "amx_bf16",
    "asimddp": "dotprod",
    "feat_dotprod": "dotprod",
    "i8mm": "i8mm",
    "feat_i8mm": "i8mm",
    "bf16": "bf16",
    "feat_bf16": "bf16",
    "sve": "sve",
    "asimdhp": "neon_fp16",
    "feat_fp16": "neon_fp16",
}
"""Name in /proc/cpuinfo or sysctl, in lower case -> the name used here. The kernel's names:
arch/x86/include/asm/cpufeatures.h and Documentation/arch/arm64/elf_hwcaps.rst of Linux."""

_INT8 = {"avx512_vnni", "avx_vnni", "amx_int8", "dotprod", "i8mm"}
_BFLOAT16 = {"avx512_bf16", "amx_bf16", "bf16"}
_CPUFREQ = "/sys/devices/system/cpu/cpu{}/cpufreq/{}"


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Facts about a machine that explain a latency.

    Attributes:
        cpu: the processor's own name.
        architecture: "x86_64", "aarch64", "arm64", ...
        cores: logical cores that this process may use (affinity and container quota).
        features: the values of `FEATURES` that it has, sorted; empty where unknown.
        memory_bytes: memory that this process may use, 0 where unknown.
        governor: frequency governor, "" where there is none.
        os: name and release.
        python: version of the interpreter.
    """

    cpu: str
    architecture: str
    cores: int
    features: tuple[str, ...]
    memory_bytes: int
    governor: str
    os: str
    python: str

    @property
    def is_x86(self) -> bool:
        """Whether it is a 64-bit x86 processor, under either of its names."""
        return self.architecture in ("x86_64", "AMD64")

    @property
    def int8_dot_product(self) -> bool:
        """Whether it has an instruction that multiplies and adds groups of int8."""
        return not _INT8.isdisjoint(self.features)

    @property
    def bfloat16(self) -> bool:
        """Whether it has bfloat16 dot products."""
        return not _BFLOAT16.isdisjoint(self.features)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for reports, the fingerprint among them."""
        return {**dataclasses.asdict(self), "fingerprint": fingerprint(self)}


def this_machine() -> Machine:
    """Facts about the machine that this process runs on."""
    system = platform.system()
    if system == "Linux":
        text = _read("/proc/cpuinfo")
        cpu, features = cpu_name(text), cpu_features(text)
        memory = _linux_memory_bytes()
    elif system == "Darwin":
        text = _sysctl()
        cpu, features = sysctl_value(text, "machdep.cpu.brand_string"), sysctl_features(text)
        memory = int(sysctl_value(text, "hw.memsize") or 0)
    else:
        cpu, features, memory = "", (), 0
    return Machine(
        cpu=cpu or platform.processor() or platform.machine(),
        architecture=platform.machine(),
        cores=_usable_cores(),
        features=features,
        memory_bytes=memory,
        governor=_read(_CPUFREQ.format(_usable_cpus()[0], "scaling_governor")).strip(),
        os=f"{system} {platform.release()}",
        python=platform.python_version(),
    )


def fingerprint(machine: Machine) -> str:
    """Twelve hexadecimal digits that agree where latencies may be compared.

    They cover the processor, its features and the usable cores; not the memory, the operating
    system or the governor, which are recorded beside them.
    """
    facts = [machine.cpu, machine.architecture, machine.cores, sorted(machine.features)]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:12]


def versions(*packages: str) -> dict[str, str]:
    """Installed versions by distribution name, without importing; the missing are left out."""
    found = {}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def clock_mhz() -> float | None:
    """The present clock of the fastest usable core, or None where nobody tells."""
    texts = (_read(_CPUFREQ.format(cpu, "scaling_cur_freq")) for cpu in _usable_cpus())
    clocks = [int(text) / 1e3 for text in texts if text.strip().isdigit()]
    if not clocks and platform.system() == "Linux":
        clocks = cpuinfo_clocks_mhz(_read("/proc/cpuinfo"))
    return max(clocks, default=None)


def cpu_name(cpuinfo: str) -> str:
    """The processor's name in the text of /proc/cpuinfo, "" where it has none."""
    name = _field(cpuinfo, "model name") or _field(cpuinfo, "Model") or _field(cpuinfo, "Hardware")
    implementer, part = _field(cpuinfo, "CPU implementer"), _field(cpuinfo, "CPU part")
    if not name and implementer:
        # Server Arm kernels give only numbers; they still tell two processors apart.
        name = f"Arm implementer {implementer} part {part}"
    return name


def cpu_features(cpuinfo: str) -> tuple[str, ...]:
    """The features in the text of /proc/cpuinfo that every listed core has."""
    lines = re.findall(r"^(?:flags|Features)\s*:(.*)$", cpuinfo, re.MULTILINE)
    cores = [_known(line.split()) for line in lines]
    # Cores of different kinds (big.LITTLE) may differ; code runs on any of them.
    return tuple(sorted(set.intersection(*cores))) if cores else ()


def cpuinfo_clocks_mhz(cpuinfo: str) -> list[float]:
    """The clock of each core in the text of /proc/cpuinfo; empty on Arm."""
    return [float(mhz) for mhz in re.findall(r"^cpu MHz\s*:\s*([\d.]+)", cpuinfo, re.MULTILINE)]


def sysctl_value(text: str, key: str) -> str:
    """The value of one key in the output of `sysctl`, "" where it is absent."""
    return _field(text, re.escape(key))


def sysctl_features(text: str) -> tuple[str, ...]:
    """The features in the output of `sysctl`, on Intel and on Apple processors."""
    keys = ("machdep.cpu.features", "machdep.cpu.leaf7_features")
    intel = " ".join(sysctl_value(text, key) for key in keys).split()
    arm = re.findall(r"^hw\.optional\.arm\.(FEAT_\w+): 1$", text, re.MULTILINE)
    return tuple(sorted(_known([*intel, *arm])))


def quota_cores(cpu_max: str) -> int | None:
    """Whole cores in the text of a cgroup's cpu.max ("quota period"), None without a limit."""
    match = re.fullmatch(r"(\d+) (\d+)", cpu_max.strip())
    return max(1, int(match[1]) // int(match[2])) if match else None


def _known(names: Iterable[str]) -> set[str]:
    return {FEATURES[name.lower()] for name in names if name.lower() in FEATURES}


def _field(text: str, key: str) -> str:
    match = re.search(rf"^{key}\s*:\s*(.*?)\s*$", text, re.MULTILINE)
    return match[1] if match else ""


def _usable_cpus() -> list[int]:
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def _usable_cores() -> int:
    quota = quota_cores(_read("/sys/fs/cgroup/cpu.max"))
    if quota is None:
        old = "/sys/fs/cgroup/cpu/cpu.cfs_{}_us"  # first version of control groups
        quota = quota_cores(" ".join(_read(old.format(it)).strip() for it in ("quota", "period")))
    return min(len(_usable_cpus()), quota or len(_usable_cpus()))


def _linux_memory_bytes() -> int:
    total = int((_field(_read("/proc/meminfo"), "MemTotal") or "0").split()[0]) * 1024
    limit = _read("/sys/fs/cgroup/memory.max").strip()
    return min(total, int(limit)) if limit.isdigit() and total else total


def _read(path: str) -> str:
    try:
        return Path(path).read_text(errors="replace")
    except OSError:
        return ""


def _sysctl() -> str:
    try:
        names = ["machdep.cpu", "hw.optional", "hw.memsize"]
        ran = subprocess.run(["sysctl", *names], capture_output=True, text=True, timeout=5)
    except (OSError, subprocess.SubprocessError):
        return ""
    return ran.stdout
