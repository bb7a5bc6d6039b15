from __future__ import annotations

import dataclasses
import json
import os
import platform

import pytest

from compress.machine import (
    clock_mhz,
    cpu_features,
    cpu_name,
    cpuinfo_clocks_mhz,
    fingerprint,
    quota_cores,
    sysctl_features,
    sysctl_value,
    this_machine,
    versions,
)

X86 = """\
processor\t: 0
vendor_id\t: GenuineIntel
model name\t: Intel(R) Xeon(R) Platinum 8480+
cpu MHz\t\t: 2000.250
flags\t\t: fpu sse2 avx avx2 avx512f avx512_bf16 avx512_vnni avx_vnni amx_bf16 amx_tile amx_int8
bugs\t\t: spectre_v1

processor\t: 1
vendor_id\t: GenuineIntel
model name\t: Intel(R) Xeon(R) Platinum 8480+
cpu MHz\t\t: 3100.000
flags\t\t: fpu sse2 avx avx2 avx512f avx512_bf16 avx512_vnni avx_vnni amx_bf16 amx_tile amx_int8
"""
OLD_X86 = """\
model name\t: Intel(R) Core(TM) i5-6200U CPU @ 2.30GHz
flags\t\t: fpu sse2 avx avx2 fma
"""
GRAVITON = """\
processor\t: 0
BogoMIPS\t: 2100.00
Features\t: fp asimd evtstrm aes atomics fphp asimdhp asimddp sve asimdfhm i8mm bf16
CPU implementer\t: 0x41
CPU part\t: 0xd40
"""
BIG_LITTLE = """\
processor\t: 0
Features\t: fp asimd fphp asimdhp asimddp
processor\t: 4
Features\t: fp asimd fphp asimdhp asimddp i8mm
Hardware\t: Qualcomm Technologies, Inc SM8550
"""
PI = """\
processor\t: 0
Features\t: fp asimd evtstrm crc32 cpuid
Model\t\t: Raspberry Pi 4 Model B Rev 1.4
"""
APPLE = """\
machdep.cpu.brand_string: Apple M2
hw.optional.arm.FEAT_DotProd: 1
hw.optional.arm.FEAT_I8MM: 1
hw.optional.arm.FEAT_BF16: 1
hw.optional.arm.FEAT_FP16: 1
hw.optional.arm.FEAT_SME: 0
hw.memsize: 17179869184
"""
INTEL_MAC = """\
machdep.cpu.brand_string: Intel(R) Core(TM) i7
machdep.cpu.features: FPU SSE2 AVX1.0
machdep.cpu.leaf7_features: AVX2 AVX512F AVX512VNNI
"""


@pytest.mark.parametrize(
    ("text", "name", "features"),
    [
        pytest.param(
            X86,
            "Intel(R) Xeon(R) Platinum 8480+",
            "amx_bf16 amx_int8 avx2 avx512_bf16 avx512_vnni avx512f avx_vnni",
            id="x86 with AMX",
        ),
        pytest.param(OLD_X86, "Intel(R) Core(TM) i5-6200U CPU @ 2.30GHz", "avx2", id="old x86"),
        pytest.param(
            GRAVITON,
            "Arm implementer 0x41 part 0xd40",
            "bf16 dotprod i8mm neon_fp16 sve",
            id="server Arm",
        ),
        pytest.param(
            BIG_LITTLE,
            "Qualcomm Technologies, Inc SM8550",
            "dotprod neon_fp16",
            id="only what all cores have",
        ),
        pytest.param(PI, "Raspberry Pi 4 Model B Rev 1.4", "", id="Raspberry Pi 4"),
        pytest.param("", "", "", id="nothing"),
    ],
)
def test_cpuinfo(text, name, features):
    assert cpu_name(text) == name
    assert cpu_features(text) == tuple(features.split())


@pytest.mark.parametrize(
    ("text", "int8", "bfloat16"),
    [
        pytest.param(X86, True, True, id="x86 with AMX"),
        pytest.param(OLD_X86, False, False, id="old x86"),
        pytest.param(GRAVITON, True, True, id="server Arm"),
        pytest.param(BIG_LITTLE, True, False, id="phone"),
        pytest.param(PI, False, False, id="Raspberry Pi 4"),
    ],
)
def test_what_the_features_mean(text, int8, bfloat16):
    machine = dataclasses.replace(this_machine(), features=cpu_features(text))
    assert (machine.int8_dot_product, machine.bfloat16) == (int8, bfloat16)


@pytest.mark.parametrize(
    ("text", "features"),
    [
        pytest.param(APPLE, ("bf16", "dotprod", "i8mm", "neon_fp16"), id="Apple"),
        pytest.param(INTEL_MAC, ("avx2", "avx512_vnni", "avx512f"), id="Intel"),
        pytest.param("", (), id="nothing"),
    ],
)
def test_sysctl(text, features):
    assert sysctl_features(text) == features


def test_sysctl_values():
    assert sysctl_value(APPLE, "machdep.cpu.brand_string") == "Apple M2"
    assert sysctl_value(APPLE, "hw.memsize") == "17179869184"
    assert sysctl_value(APPLE, "hw.absent") == ""


@pytest.mark.parametrize(
    ("text", "cores"),
    [
        ("max 100000", None),
        ("200000 100000", 2),
        ("150000 100000", 1),
        ("50000 100000", 1),
        ("-1 100000", None),
        ("", None),
    ],
)
def test_container_quota(text, cores):
    assert quota_cores(text) == cores


def test_clocks():
    assert cpuinfo_clocks_mhz(X86) == [2000.25, 3100.0]
    assert cpuinfo_clocks_mhz(GRAVITON) == []
    assert clock_mhz() is None or clock_mhz() > 100


def test_this_machine_is_plausible():
    machine = this_machine()
    assert machine.cpu
    assert 1 <= machine.cores <= os.cpu_count()
    assert machine.python == platform.python_version()
    assert json.loads(json.dumps(machine.to_dict()))["fingerprint"] == fingerprint(machine)
    if platform.system() == "Linux":
        assert machine.memory_bytes > 2**27


@pytest.mark.parametrize(
    ("changes", "same"),
    [
        pytest.param({}, True, id="again"),
        pytest.param({"memory_bytes": 1, "python": "4", "os": "x", "governor": "x"}, True, id="os"),
        pytest.param({"cpu": "another"}, False, id="cpu"),
        pytest.param({"cores": 999}, False, id="cores"),
        pytest.param({"features": ("avx2", "none")}, False, id="features"),
    ],
)
def test_fingerprint_changes_with_what_changes_latency(changes, same):
    machine = this_machine()
    other = dataclasses.replace(machine, **changes)
    assert (fingerprint(machine) == fingerprint(other)) is same
    assert len(fingerprint(machine)) == 12


def test_versions_leave_out_what_is_missing():
    found = versions("numpy", "no-such-distribution")
    assert list(found) == ["numpy"]
    assert found["numpy"][0].isdigit()
