from __future__ import annotations

import subprocess
import sys
import time
import zipfile
from importlib.metadata import entry_points
from pathlib import Path

import pytest

import compress
from compress import registry
from compress.errors import CompressError, UsageError

ROOT = Path(__file__).parents[1]
PACKAGES = {"compress", "quant", "prune", "distill", "targets"}
HEAVY = ("torch", "numpy", "scipy", "onnx", "onnx_ir", "onnxscript", "onnxruntime")


def python(code: str) -> str:
    command = [sys.executable, "-c", code]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout.strip()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    pytest.importorskip("hatchling", reason="building the wheel needs the extra dev")
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (path,) = folder.glob("*.whl")
    return zipfile.ZipFile(path).namelist()


def test_wheel_holds_the_five_packages_and_nothing_else(wheel: list[str]) -> None:
    top = {name.split("/")[0] for name in wheel}
    assert top == PACKAGES | {f"hwcompress-{compress.__version__}.dist-info"}


def test_wheel_is_typed_and_licensed(wheel: list[str]) -> None:
    assert {f"{package}/py.typed" for package in PACKAGES} <= set(wheel)
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in wheel)
    assert not any("__pycache__" in name or "/test_" in name for name in wheel)


@pytest.mark.parametrize("group", ["compress.targets", "compress.passes", "compress.devices"])
def test_every_registered_name_resolves(group: registry.Group) -> None:
    found = registry.available(group)
    assert found
    for name, point in found.items():
        assert point.load().name == name


def test_console_script_is_registered() -> None:
    (script,) = entry_points(group="console_scripts", name="compress")
    assert script.value == "compress.cli:main"


def test_pytest_plugin_is_registered() -> None:
    (plugin,) = entry_points(group="pytest11", name="compress")
    assert plugin.value == "compress.pytest_plugin"


@pytest.mark.parametrize(
    "code",
    [
        "import compress, compress.cli",
        "import compress; compress.UsageError, compress.__version__, dir(compress)",
        "from compress.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass",
        "from compress.cli import main\ntry: main(['run', '--help'])\nexcept SystemExit: pass",
        "import compress.pytest_plugin",
    ],
    ids=["import", "light names", "help", "help of run", "pytest plugin"],
)
def test_nothing_heavy_is_imported_before_work_starts(code: str) -> None:
    found = python(f"{code}\nimport sys; print([m for m in {HEAVY} if m in sys.modules])")
    assert found.endswith("[]")


def test_help_is_instant() -> None:
    def seconds() -> float:
        start = time.perf_counter()
        python("from compress.cli import main; main(['--help'])")
        return time.perf_counter() - start

    assert min(seconds() for _ in range(5)) < 0.5


@pytest.mark.parametrize("name", compress.__all__)
def test_every_public_name_can_be_imported(name: str) -> None:
    assert getattr(compress, name) is not None
    assert name in dir(compress)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        compress.nonsense  # noqa: B018


def distribution(folder: Path, name: str, entries: str) -> Path:
    """A real installed distribution with entry points, as pip would leave it."""
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(entries)
    return folder


def test_a_third_party_target_is_found_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = distribution(tmp_path, "acme", "[compress.targets]\nnpu = acme_npu:NPU\n")
    (folder / "acme_npu.py").write_text("class NPU:\n    name = 'npu'\n")
    monkeypatch.syspath_prepend(folder)
    assert "npu" in registry.available("compress.targets")
    assert registry.create_target("npu").name == "npu"


def test_two_providers_of_one_name_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = distribution(tmp_path, "acme", "[compress.targets]\ncpu = acme_npu:NPU\n")
    monkeypatch.syspath_prepend(folder)
    with pytest.raises(CompressError, match="provided twice") as caught:
        registry.available("compress.targets")
    assert "acme" in str(caught.value)
    assert "hwcompress" in str(caught.value)


def test_a_misspelt_name_gets_a_suggestion() -> None:
    with pytest.raises(UsageError, match="Did you mean 'quantize'"):
        registry.create_pass("quantise")


def test_nncf_telemetry_is_its_stub() -> None:
    pytest.importorskip("nncf", reason="the extra nncf is not installed")
    # A process of its own: NNCF also switches itself off where it sees pytest.
    kind = python(
        "import compress, nncf.telemetry as t\n"
        "from nncf.telemetry.wrapper import NNCFTelemetry, NNCFTelemetryStub\n"
        "print(isinstance(t.telemetry, NNCFTelemetryStub), isinstance(t.telemetry, NNCFTelemetry))"
    )
    assert kind.splitlines()[-1] == "True False"


def test_openvino_converter_telemetry_is_its_stub() -> None:
    pytest.importorskip("openvino", reason="the extra openvino is not installed")
    home = python(
        "import compress\n"
        "from openvino.tools.ovc import convert_impl\n"
        "print(convert_impl.tm.__name__)"
    )
    assert home.splitlines()[-1] == "openvino.tools.ovc.telemetry_stub"


def blocks(language: str) -> list[str]:
    """The fenced blocks of CONTRIBUTING.md in one language."""
    parts = (ROOT / "CONTRIBUTING.md").read_text().split(f"```{language}\n")[1:]
    return [part.split("```")[0] for part in parts]


def test_the_examples_of_contributing_work(
    tmp_path: Path, tiny_onnx: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from compress.loading import load
    from compress.passes import Context

    for code in blocks("python"):
        (tmp_path / code.split("\n")[0].removeprefix("# ")).write_text(code)
    entries = "\n".join(blocks("toml")).replace('project.entry-points."', "").replace('"]', "]")
    distribution(tmp_path, "acme", entries.replace('"', ""))
    monkeypatch.syspath_prepend(tmp_path)

    model, target = load(tiny_onnx), registry.create_target("reference")
    step = registry.create_pass("zero_small_weights", share=0.5)
    step.check(model, target)
    changed = step.apply(model, Context(target=target, original=model))
    assert changed.history[-1].details["zeroed"] > 0
    outputs = target.build(changed)(changed.example(batch=2))
    assert outputs["y"].shape == (2, 4)
