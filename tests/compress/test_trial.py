from __future__ import annotations

import importlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest

from compress.errors import EngineError
from compress.model import Model
from compress.registry import create_target
from compress.testing import NullTarget
from compress.trial import Trials

ACME = """
import ctypes, os, signal, subprocess, sys, tempfile, time
from dataclasses import dataclass
from typing import ClassVar
from pathlib import Path

@dataclass(frozen=True)
class Acme:
    does: str = ""
    where: str | None = None
    sizes: tuple[int, ...] = (1, 2)
    name: ClassVar[str] = "acme"

    def build(self, model):
        return getattr(self, self.does)

    def crash(self, inputs):
        tempfile.mkdtemp()
        print("acme: invalid kernel", file=sys.stderr, flush=True)
        ctypes.string_at(0)

    def run_out_of_memory(self, inputs):
        os.kill(os.getpid(), signal.SIGKILL)

    def leave(self, inputs):
        os._exit(3)

    def hang(self, inputs):
        child = subprocess.Popen(["sleep", "600"])
        Path(self.where).write_text(f"{os.getpid()} {child.pid}")
        time.sleep(600)

    def chatter(self, inputs):
        print('{"ok": false, "error": "not an answer"}', flush=True)
        os.write(1, b"from native code\\n")

    def say_who(self, inputs):
        Path(self.where).write_text(f"{os.getpid()} {tempfile.gettempdir()} {os.getsid(0)}")

    def fail(self, inputs):
        raise KeyError("no such\\nkernel")

    def check_inputs(self, inputs):
        assert {name: array.shape for name, array in inputs.items()} == {"x": (2, 3, 16, 16)}
"""


@pytest.fixture(scope="module")
def acme(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A third party's target, installed as pip would, that does what it is told."""
    folder = tmp_path_factory.mktemp("acme")
    info = folder / "acme-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: acme\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[compress.targets]\nacme = acme_target:Acme\n")
    (folder / "acme_target.py").write_text(ACME)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield importlib.import_module("acme_target").Acme
    del sys.modules["acme_target"]


@pytest.fixture(scope="module")
def trials(acme: Any) -> Iterator[Trials]:
    with Trials() as trials:
        yield trials


def identity(trials: Trials, acme: Any, model: Model, tmp_path: Path) -> tuple[int, Path, int]:
    """Process, temporary folder and session of the worker."""
    where = tmp_path / "who"
    trials.survives(acme("say_who", str(where)), model, model.example())
    pid, folder, session = where.read_text().split()
    return int(pid), Path(folder), int(session)


def running(pid: int) -> bool:
    """Whether a process lives; one that only waits to be reaped does not.

    The first thread is a zombie while others still end, and cannot be waited for until then.
    """
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        return state != "Z" or len(os.listdir(f"/proc/{pid}/task")) > 1
    except (FileNotFoundError, ProcessLookupError):
        return False


def ended(pid: int) -> bool:
    """Whether a process is gone within five seconds."""
    for _ in range(500):
        if not running(pid):
            return True
        time.sleep(0.01)
    return False


def waiting_for(path: Path) -> list[int]:
    for _ in range(2000):
        if path.exists() and (numbers := path.read_text().split()):
            return list(map(int, numbers))
        time.sleep(0.01)
    raise AssertionError(f"{path} was not written")


@pytest.mark.parametrize("name", ["onnxruntime", "openvino", "cpu"])
def test_a_good_model_survives(trials: Trials, exported: Model, name: str) -> None:
    if name == "openvino":
        pytest.importorskip("openvino")
    trials.survives(create_target(name, threads=1), exported, exported.example())


@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_a_refusal_comes_back_in_the_runtimes_words(
    trials: Trials, exported: Model, name: str
) -> None:
    if name == "openvino":
        pytest.importorskip("openvino")
    exported.graph_model.graph[0].op_type = "Convolve"
    exported.graph_model.graph[0].domain = "acme"
    exported.graph_model.graph.opset_imports["acme"] = 1
    target = create_target(name, threads=1)
    with pytest.raises(EngineError, match=r"refuses the model: .*Convolve") as here:
        target.build(exported)
    with pytest.raises(EngineError) as there:
        trials.survives(target, exported, exported.example())
    assert str(there.value).partition(":")[0] == str(here.value).partition(":")[0]
    assert "Convolve" in str(there.value)


def test_wrong_inputs_fail_as_they_would_here(trials: Trials, exported: Model) -> None:
    with pytest.raises(EngineError, match="ONNX Runtime failed while running the model"):
        trials.survives(create_target("onnxruntime", threads=1), exported, {})


@pytest.mark.parametrize(
    ("does", "message"),
    [
        ("crash", r"acme crashed .* with SIGSEGV\. The last that it wrote: acme: invalid kernel"),
        ("run_out_of_memory", "acme crashed .* with SIGKILL, as happens where memory runs out"),
        ("leave", r"acme crashed .* with code 3\."),
    ],
)
def test_a_crash_is_an_error_and_the_next_trial_works(
    trials: Trials, acme: Any, exported: Model, tmp_path: Path, does: str, message: str
) -> None:
    before = identity(trials, acme, exported, tmp_path)
    with pytest.raises(EngineError, match=message):
        trials.survives(acme(does), exported, exported.example())
    after = identity(trials, acme, exported, tmp_path)
    assert after[0] != before[0]
    assert not before[1].exists()  # with what the crash left there


def test_a_worker_that_died_between_trials_is_started_again(
    trials: Trials, acme: Any, exported: Model, tmp_path: Path
) -> None:
    pid, _, _ = identity(trials, acme, exported, tmp_path)
    os.kill(pid, signal.SIGKILL)
    assert ended(pid)
    assert identity(trials, acme, exported, tmp_path)[0] != pid


def test_no_answer_in_time_is_an_error(exported: Model) -> None:
    with Trials(timeout_seconds=0.01) as trials:
        with pytest.raises(EngineError, match=r"onnxruntime did not build .* within 0\.01 s"):
            trials.survives(create_target("onnxruntime"), exported, exported.example())
        trials.timeout_seconds = 60
        trials.survives(create_target("onnxruntime"), exported, exported.example())


def test_a_hanging_runtime_is_ended_with_its_children(
    acme: Any, exported: Model, tmp_path: Path
) -> None:
    where = tmp_path / "who"
    with Trials() as trials:
        identity(trials, acme, exported, tmp_path)
        trials.timeout_seconds = 2
        with pytest.raises(EngineError, match="acme did not build and run the model within 2 s"):
            trials.survives(acme("hang", str(where)), exported, exported.example())
    assert all(map(ended, waiting_for(where)))


def test_later_trials_use_the_same_worker(
    trials: Trials, acme: Any, exported: Model, tmp_path: Path
) -> None:
    first = identity(trials, acme, exported, tmp_path)
    with pytest.raises(EngineError, match="acme refuses the model: KeyError: 'no such"):
        trials.survives(acme("fail"), exported, exported.example())
    trials.survives(acme("chatter"), exported, exported.example())
    trials.survives(acme("check_inputs"), exported, exported.example(2))
    assert identity(trials, acme, exported, tmp_path) == first


def test_the_worker_has_its_own_session_and_folder(
    acme: Any, exported: Model, tmp_path: Path
) -> None:
    with Trials() as trials:
        pid, folder, session = identity(trials, acme, exported, tmp_path)
        assert session == pid != os.getpid()
        assert folder.parent == Path(tempfile.gettempdir())
        # ONNX Runtime writes a file of its own when it is imported.
        assert {path.name for path in folder.iterdir()} - {".ses"} == {"stderr.txt"}
    assert ended(pid)
    assert not folder.exists()


def test_close_twice_or_unused_does_nothing() -> None:
    trials = Trials()
    trials.close()
    trials.close()


@pytest.mark.parametrize("which", ["unregistered", "same name", "not a dataclass", "no JSON"])
def test_a_target_that_cannot_be_made_again_is_not_tried(
    acme: Any, exported: Model, which: str
) -> None:
    @dataclass(frozen=True)
    class Other(NullTarget):
        name: ClassVar[str] = "onnxruntime"

    class Plain:
        name: ClassVar[str] = "acme"

    found: dict[str, Any] = {
        "unregistered": NullTarget(),
        "same name": Other(),
        "not a dataclass": Plain(),
        "no JSON": acme("crash", sizes=object()),
    }
    with Trials() as trials:
        trials.survives(found[which], exported, exported.example())
        assert trials._process is None


SCRIPT = """
import sys
from pathlib import Path
from acme_target import Acme
from compress.loading import load
from compress.trial import Trials

if __name__ == "__main__":
    model = load(Path(sys.argv[1]))
    with Trials() as trials:
        trials.survives(Acme("hang", sys.argv[2]), model, model.example())
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_the_worker_ends_with_its_parent(
    acme: Any, tiny_onnx: Path, tmp_path: Path, number: signal.Signals
) -> None:
    script, where, temporary = tmp_path / "script.py", tmp_path / "who", tmp_path / "temporary"
    script.write_text(SCRIPT)
    temporary.mkdir()
    paths = [str(Path(sys.modules[acme.__module__].__file__ or "").parent), *filter(None, sys.path)]
    parent = subprocess.Popen(
        [sys.executable, script, tiny_onnx, where],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "TMPDIR": str(temporary)},
        stderr=subprocess.PIPE,
        text=True,
    )
    worker, child = waiting_for(where)
    parent.send_signal(number)
    _, stderr = parent.communicate(timeout=120)
    try:
        assert ended(worker)
        assert parent.returncode == -number
        # Nobody can tidy up after a process that had no time to.
        if number is signal.SIGINT:
            assert stderr.count("KeyboardInterrupt") == 1
            assert ended(child)
            assert list(temporary.glob("hwcompress-*")) == []
    finally:
        if running(child):
            os.kill(child, signal.SIGKILL)
