"""The CPU target hands on what it is given, and says which runtimes it can choose from."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from compress.errors import LoadError, UsageError
from compress.machine import this_machine
from compress.target import ManyRuntimes, Target, runtimes
from compress.testing import TargetContract
from targets.cpu import CPU
from targets.executorch import ExecuTorch
from targets.onnxruntime import OnnxRuntime
from targets.openvino import OpenVINO

WITHOUT_OPENVINO = """
import sys
sys.modules['executorch'] = None
{absence}
from targets.cpu import CPU
print([one.name for one in CPU().runtimes()])
for name, check in CPU().missing().items():
    print(name, check.reason, check.install)
"""
BLOCKED = "sys.modules['openvino'] = None"
FINDER = """
class Gone:
    def find_spec(self, name, path=None, target=None):
        if name.partition('.')[0] == 'openvino':
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Gone())
"""
WITHOUT_A_SPEC = """
import types
sys.modules['openvino'] = types.ModuleType('openvino')
"""


class TestCPU(TargetContract):
    """The reference runtime with one thread."""

    target = CPU(threads=1)


@pytest.mark.parametrize("kind", [CPU, OnnxRuntime, OpenVINO, ExecuTorch])
@pytest.mark.parametrize("threads", [0, -1, 10_000])
def test_impossible_thread_counts_are_refused(kind: type[Target], threads: int) -> None:
    with pytest.raises(UsageError, match=f"--threads {threads} .* {this_machine().cores} usable"):
        kind(threads=threads)


@pytest.mark.parametrize("kind", [CPU, OnnxRuntime, OpenVINO])
@pytest.mark.parametrize(("threads", "streams"), [(1, 2), (4, 5), (2, 0)])
def test_each_stream_needs_a_thread(kind: type[Target], threads: int, streams: int) -> None:
    with pytest.raises(UsageError, match=f"{streams} streams do not fit {threads} threads"):
        kind(threads=threads, streams=streams)


def test_the_reference_comes_first_and_every_runtime_gets_the_threads() -> None:
    pytest.importorskip("openvino")
    target = CPU(threads=4, streams=2)
    assert isinstance(target, ManyRuntimes)
    expected = (OnnxRuntime(threads=4, streams=2), OpenVINO(threads=4, streams=2))
    mobile = ExecuTorch(threads=4)
    there = mobile.check().available
    assert runtimes(target) == ((*expected, mobile) if there else expected)
    assert set(target.missing()) == (set() if there else {"executorch"})
    assert target.capabilities == OnnxRuntime(threads=4).capabilities


def test_one_runtime_chooses_from_itself() -> None:
    assert runtimes(OnnxRuntime(threads=1)) == (OnnxRuntime(threads=1),)
    assert runtimes(OpenVINO(threads=1)) == (OpenVINO(threads=1),)


@pytest.mark.parametrize(
    "absence", [BLOCKED, FINDER, WITHOUT_A_SPEC], ids=["blocked", "finder", "no spec"]
)
def test_a_runtime_that_is_not_installed_is_missing_with_the_way_to_get_it(absence: str) -> None:
    code = WITHOUT_OPENVINO.format(absence=absence)
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.splitlines() == [
        "['onnxruntime']",
        "openvino OpenVINO is not installed. pip install 'hwcompress[openvino]'",
        "executorch ExecuTorch is not installed. pip install 'hwcompress[executorch]'",
    ]


def test_the_files_say_which_runtime_an_artifact_is_for(tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    model = TestCPU().exported()
    for one in CPU(threads=1).runtimes():
        folder = tmp_path / one.name
        folder.mkdir()
        engine = one.build(model)
        engine.save(folder)
        again = CPU(threads=1).load(folder)
        assert type(again) is type(engine)
        inputs = model.example(2)
        np.testing.assert_array_equal(again(inputs)["linear"], engine(inputs)["linear"])


def test_an_empty_directory_is_no_artifact(tmp_path: Path) -> None:
    with pytest.raises(LoadError, match=r"none of model\.onnx, model\.xml and model\.pte"):
        CPU(threads=1).load(tmp_path)
