"""The device sheets: core designs, boards and phones.

Rates of cores are multiply-accumulates in one cycle: 128-bit pipes that start an FMLA (4 float32)
or a dot product (16 int8 products) each cycle, times the lanes. LLVM's scheduling models
(llvm/lib/Target/AArch64/AArch64Sched*.td) restate Arm's Software Optimization Guides; of a core
that has none, the sibling's is taken and the fact marked as derived.
"""

from __future__ import annotations

import difflib

from compress.device_sheet import Cluster, Core, DeviceSheet, Fact, Kind
from compress.errors import UsageError

ARMV82 = ("dotprod", "fp16")
ARMV9 = ("bf16", "dotprod", "fp16", "i8mm")

_A55 = (
    "LLVM AArch64SchedA55.td: two 64-bit floating-point pipes; a 128-bit instruction takes both, "
    "so one FMLA or SDOT of 128 bits a cycle"
)
_N1 = (
    "LLVM AArch64SchedNeoverseN1.td (the A76's server sibling): FMLA on either of two 128-bit "
    "pipes; Arm Cortex-A76 Software Optimization Guide (PJDOC-466751330-7215): SDOT too"
)
_V1 = (
    "LLVM AArch64SchedNeoverseV1.td (the X1's server sibling): FMLA, SDOT and SMMLA on any of "
    "four 128-bit pipes"
)


def _core(
    name: str,
    pipes: float,
    source: str,
    kind: Kind,
    features: tuple[str, ...],
    matrix: bool = False,
) -> Core:
    """A core with dot product and float16, by its 128-bit pipes; SMMLA doubles SDOT's rate."""
    lanes = 32 if matrix else 16
    instruction = "SMMLA, 32" if matrix else "SDOT, 16"
    return Core(
        name=name,
        float32=Fact(4 * pipes, f"{source}; FMLA, 4 lanes x {pipes:g}", kind),
        float16=Fact(8 * pipes, f"{source}; FMLA, 8 lanes x {pipes:g}", kind),
        int8=Fact(lanes * pipes, f"{source}; {instruction} products x {pipes:g}", kind),
        features=features,
    )


A55 = _core("Cortex-A55", 1, _A55, "derived", ARMV82)
A76 = _core("Cortex-A76", 2, _N1, "derived", ARMV82)
A78 = _core("Cortex-A78", 2, f"as Cortex-A76, two 128-bit pipes: {_N1}", "unverified", ARMV82)
A78AE = _core("Cortex-A78AE", 2, f"as Cortex-A78: {_N1}", "unverified", ARMV82)
X1 = _core("Cortex-X1", 4, _V1, "derived", ARMV82)
X3 = _core("Cortex-X3", 4, f"as Cortex-X1, with SMMLA: {_V1}", "unverified", ARMV9, matrix=True)
A715 = _core(
    "Cortex-A715", 2, "two 128-bit pipes, assumed as Cortex-A76's", "unverified", ARMV9, matrix=True
)
A510 = _core(
    "Cortex-A510",
    1,
    "one 128-bit FMLA or SDOT a cycle, assumed: two cores may share the vector unit",
    "unverified",
    ARMV9,
)
A72 = Core(
    name="Cortex-A72",
    float32=Fact(
        4,
        "wlog.flatlib.jp/2015/10/30/n1787 measures 15.9 GFLOP/s at 2.0 GHz with vfpbench: 8 FLOP "
        "a cycle, two 64-bit pipes",
        "derived",
    ),
    float16=None,
    int8=Fact(
        8, "no dot product: SMULL and SADALP, 8 products a cycle at most, assumed", "unverified"
    ),
)
AMPERE_SM = Core(
    name="Ampere SM",
    float32=Fact(128, "1024 CUDA cores in 8 SMs, one FMA each a cycle", "derived"),
    float16=Fact(1024, "tensor cores: half the dense int8 rate", "derived"),
    int8=Fact(
        2048,
        "Jetson Orin Nano data sheet: 20 dense int8 TOPS (40 sparse) at 625 MHz in 8 SMs, "
        "20e12 / (2 x 0.625e9 x 8) = 2000",
        "derived",
    ),
    features=("bf16", "fp16"),
)

_GENERIC = "assumed for a core without a device"
_PI4 = "raspberrypi.com documentation, processors, BCM2711"
_PI5 = "raspberrypi.com documentation, processors, BCM2712"
_ORIN = "NVIDIA Jetson Orin Nano series data sheet"
_TENSOR = "notebookcheck.net, Google Tensor SoC in Pixel 6 series (574028), from /proc/cpuinfo"
_TENSOR2 = "droidholic.com, Google Tensor G3 specifications, on the first two Tensor chips"
_TENSOR3 = "phonearena.com, Tensor G3 specs (151181), from the Device Info HW app"
_LPDDR5 = "64 bits of LPDDR5 at 6400 MT/s, 8 x 6.4; not stated by Google"
_RK3588 = "Rockchip RK3588 overview (blog.csdn.net/weixin_43199439/article/details/139720663)"


def _clusters(source: str, kind: Kind, *groups: tuple[int, Core, float]) -> tuple[Cluster, ...]:
    return tuple(
        Cluster(core=core, count=count, clock_ghz=Fact(clock, source, kind))
        for count, core, clock in groups
    )


def _generic(core: Core) -> DeviceSheet:
    name = core.name.lower()
    return DeviceSheet(
        name=name,
        title=f"one {core.name} at 2 GHz",
        clusters=_clusters(_GENERIC, "unverified", (1, core, 2.0)),
        bandwidth_gb_s=Fact(10, _GENERIC, "unverified"),
        memory_gb=Fact(4, _GENERIC, "unverified"),
    )


SHEETS = (
    *(_generic(core) for core in (A55, A72, A76, A78, X1)),
    DeviceSheet(
        name="raspberry-pi-4",
        title="Raspberry Pi 4 Model B",
        clusters=_clusters(_PI4, "stated", (4, A72, 1.5)),
        bandwidth_gb_s=Fact(
            8,
            "circuitdigest.com, The new Raspberry Pi 5: the Pi 4's memory runs at 2000 MT/s; 32 "
            "bits wide as the Pi 5's, 4 x 2.0",
            "derived",
        ),
        memory_gb=Fact(4, f"{_PI4}: up to 8 GB; 4 is the usual model"),
    ),
    DeviceSheet(
        name="raspberry-pi-5",
        title="Raspberry Pi 5",
        clusters=_clusters(_PI5, "stated", (4, A76, 2.4)),
        bandwidth_gb_s=Fact(17, f"{_PI5}: 32-bit LPDDR4X, up to 17GB/s"),
        memory_gb=Fact(8, "docs.zephyrproject.org, Raspberry Pi 5: 4 GB and 8 GB at launch"),
    ),
    DeviceSheet(
        name="jetson-orin-nano-cpu",
        title="Jetson Orin Nano 8GB, CPU",
        clusters=_clusters(_ORIN, "unverified", (6, A78AE, 1.5)),
        bandwidth_gb_s=Fact(68, f"{_ORIN}: 128-bit LPDDR5, 68 GB/s; 102 with Super", "unverified"),
        memory_gb=Fact(8, f"{_ORIN}: 8GB 128-bit LPDDR5"),
    ),
    DeviceSheet(
        name="jetson-orin-nano-gpu",
        title="Jetson Orin Nano 8GB, GPU at 625 MHz (before Super)",
        clusters=_clusters(f"{_ORIN}: 625 MHz", "stated", (8, AMPERE_SM, 0.625)),
        bandwidth_gb_s=Fact(68, f"{_ORIN}: 128-bit LPDDR5, 68 GB/s; 102 with Super", "unverified"),
        memory_gb=Fact(8, f"{_ORIN}: 8GB 128-bit LPDDR5, shared with the CPU"),
    ),
    DeviceSheet(
        name="rk3588",
        title="Rockchip RK3588 boards, CPU",
        clusters=_clusters(_RK3588, "unverified", (4, A76, 2.4), (4, A55, 1.8)),
        bandwidth_gb_s=Fact(34, _RK3588, "unverified"),
        memory_gb=Fact(8, "up to 32 GB by the board; 8 assumed", "unverified"),
    ),
    DeviceSheet(
        name="pixel-6",
        title="Pixel 6 (Google Tensor)",
        clusters=_clusters(_TENSOR, "unverified", (2, X1, 2.802), (2, A76, 2.253), (4, A55, 1.803)),
        bandwidth_gb_s=Fact(51.2, _LPDDR5, "unverified"),
        memory_gb=Fact(8, "of the smaller model", "unverified"),
    ),
    DeviceSheet(
        name="pixel-7",
        title="Pixel 7 (Google Tensor G2)",
        clusters=_clusters(_TENSOR2, "unverified", (2, X1, 2.85), (2, A78, 2.3), (4, A55, 1.8)),
        bandwidth_gb_s=Fact(51.2, _LPDDR5, "unverified"),
        memory_gb=Fact(8, "of the smaller model", "unverified"),
    ),
    DeviceSheet(
        name="pixel-8",
        title="Pixel 8 (Google Tensor G3)",
        clusters=_clusters(_TENSOR3, "unverified", (1, X3, 2.91), (4, A715, 2.37), (4, A510, 1.7)),
        bandwidth_gb_s=Fact(51.2, f"at least as Pixel 7: {_LPDDR5}", "unverified"),
        memory_gb=Fact(8, _TENSOR3, "unverified"),
    ),
)


def find_sheet(name: str) -> DeviceSheet:
    """The sheet of one device; upper case, blanks and underscores do not matter.

    Raises:
        UsageError: there is none of that name.
    """
    known = {device.name: device for device in SHEETS}
    asked = "-".join(name.lower().replace("_", " ").split())
    if asked not in known:
        close = difflib.get_close_matches(asked, known, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise UsageError(
            f"There is no device sheet called {name!r}.{hint} Known: {', '.join(known)}."
        )
    return known[asked]
