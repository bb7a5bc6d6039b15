"""What a user sees who gives something wrong: one paragraph, code 2, and nothing left behind.

Set BAD_INPUTS_TABLE to a file name to have the list of inputs and messages written as Markdown.
"""

from __future__ import annotations

import os
import pickle
import shlex
import signal
import subprocess
import sys
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from compress.exits import STOPPED, USAGE

FUNCTIONS = """
import torch

not_callable = 3

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 4, 3)
        self.fc = torch.nn.Linear(4, 4)

    def forward(self, x):
        return self.fc(self.conv(x).mean((2, 3)))

def fails():
    raise RuntimeError("no licence")

def makes_text():
    return "a network"

def eval_fails(engine):
    raise KeyError("labels")

def eval_nothing(engine):
    pass

def eval_nan(engine):
    return float("nan")

def no_batches():
    return iter(())
"""


class Bomb:
    """Would create a file if it were unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.path}",)


@dataclass(frozen=True)
class Place:
    """Where a case puts its files."""

    folder: Path
    model: Path
    images: Path

    @property
    def out(self) -> Path:
        return self.folder / "artifact"

    @property
    def fuse(self) -> Path:
        return self.folder / "exploded"

    def file(self, name: str, content: bytes | str) -> Path:
        path = self.folder / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    def half(self, source: Path, name: str) -> Path:
        content = source.read_bytes()
        return self.file(name, content[: len(content) // 2])

    def arrays(self, **arrays: np.ndarray) -> Path:
        path = self.folder / "data.npz"
        np.savez(path, **arrays)
        return path

    def with_data(self, **arrays: np.ndarray) -> list[object]:
        return [self.model, "--calibration", self.arrays(**arrays)]

    def with_eval(self, **arrays: np.ndarray) -> list[object]:
        return [self.model, "--calibration", self.images, "--eval", self.arrays(**arrays)]

    def calibrated(self, *options: object) -> list[object]:
        return [self.model, "--calibration", self.images, *options]

    def scored(self, function: str) -> list[object]:
        return self.calibrated("--eval", f"bad_functions:{function}")

    def recipe(self, text: str) -> list[object]:
        return self.calibrated("--recipe", self.file("recipe.yaml", text))


X = np.random.default_rng(0).standard_normal((16, 3, 8, 8)).astype(np.float32)
Y = np.arange(16) % 4
NAN = np.where(np.arange(16)[:, None, None, None] == 5, np.nan, X).astype(np.float32)
NET = ("--model", "bad_functions:Net")
IMAGE = ("--input", "1x3x8x8")
COMPRESS = [sys.executable, "-m", "compress.cli", "run"]
QUIET: dict[str, Any] = {"capture_output": True, "text": True}


def misspelt(place: Place) -> list[object]:
    place.file("resnet.onnx", place.model.read_bytes())
    return [place.folder / "resent.onnx"]


def truncated_program(place: Place) -> list[object]:
    class Small(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.relu(x)

    whole = place.folder / "whole.pt2"
    torch.export.save(torch.export.export(Small(), (torch.zeros(1, 3),)), whole)
    return [place.half(whole, "model.pt2")]


def truncated_script(place: Place) -> list[object]:
    whole = place.folder / "whole.pt"
    with zipfile.ZipFile(whole, "w") as archive:
        archive.writestr("whole/constants.pkl", b"\x80\x02}.")
        archive.writestr("whole/code/__torch__.py", "class Net(Module):\n" * 50)
    return [place.half(whole, "model.pt")]


def other_zip(place: Place) -> list[object]:
    with zipfile.ZipFile(place.folder / "model.pt", "w") as archive:
        archive.writestr("holiday.txt", "sea")
    return [place.folder / "model.pt"]


def photograph(place: Place) -> list[object]:
    Image.new("RGB", (8, 8)).save(place.folder / "photo.jpeg")
    return [(place.folder / "photo.jpeg").rename(place.folder / "model.pt")]


def bomb(place: Place) -> list[object]:
    return [place.file("model.pt", pickle.dumps(Bomb(place.fuse), protocol=2))]


def packed_bomb(place: Place) -> list[object]:
    torch.save(Bomb(place.fuse), place.folder / "model.pt")
    return [place.folder / "model.pt"]


def own_class(place: Place) -> list[object]:
    import bad_functions

    torch.save(bad_functions.Net(), place.folder / "model.pt")
    return [place.folder / "model.pt", *IMAGE]


def weights(place: Place) -> list[object]:
    torch.save(torch.nn.Conv2d(3, 4, 3).state_dict(), place.folder / "weights.pt")
    return [place.folder / "weights.pt"]


def wrong_weights(place: Place) -> list[object]:
    return [*weights(place), *NET, *IMAGE]


def safetensors(place: Place) -> list[object]:
    header = b'{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    content = len(header).to_bytes(8, "little") + header + bytes(4)
    return [place.file("weights.safetensors", content)]


def images_folder(place: Place) -> list[object]:
    (place.folder / "photos").mkdir()
    place.file("photos/one.jpg", "no picture")
    return [place.model, "--calibration", place.folder / "photos"]


def pickled_data(place: Place) -> list[object]:
    np.savez(place.folder / "data.npz", x=np.array([Bomb(place.fuse)], dtype=object))
    return [place.model, "--calibration", place.folder / "data.npz"]


def existing_directory(place: Place) -> list[object]:
    place.out.mkdir()
    return place.calibrated("--out", place.out)


def existing_file(place: Place) -> list[object]:
    return place.calibrated("--force", "--out", place.file("artifact", "dear reader"))


def parent_is_a_file(place: Place) -> list[object]:
    return place.calibrated("--out", place.file("letters", "dear reader") / "artifact")


def foreign_directory(place: Place) -> list[object]:
    place.out.mkdir()
    place.file("artifact/letter.txt", "dear reader")
    return place.calibrated("--force", "--out", place.out)


Case = Callable[[Place], Sequence[object]]
FILES: dict[str, tuple[Case, Sequence[str]]] = {
    "nothing": (lambda p: [], ["no model", "--model"]),
    "missing file": (lambda p: [p.folder / "m.onnx"], ["no file", "m.onnx"]),
    "misspelt file": (misspelt, ["resent.onnx", "Did you mean", "resnet.onnx"]),
    "empty file": (lambda p: [p.file("m.onnx", "")], ["m.onnx", "empty", "Expected"]),
    "half an ONNX file": (lambda p: [p.half(p.model, "m.onnx")], ["m.onnx", "ONNX"]),
    "half a .pt2": (truncated_program, ["model.pt2", "again"]),
    "half a TorchScript archive": (truncated_script, ["model.pt", "again"]),
    "some zip": (other_zip, ["model.pt", "zip", "Expected"]),
    "folder as model": (lambda p: [p.folder], ["folder", "Expected"]),
    "photograph called model.pt": (photograph, ["model.pt", "image", "Expected"]),
    "text as model": (lambda p: [p.file("m.pt", "hello world\n")], ["m.pt", "text", "Expected"]),
    "pickle that runs a command": (bomb, ["system", "--model", "--trust-pickle"]),
    "torch.save that runs a command": (packed_bomb, ["system", "--model", "--trust-pickle"]),
    "pickled class of one's own": (own_class, ["Net", "--model", "--trust-pickle"]),
    "weights without --model": (weights, ["weights.pt", "--model module:factory"]),
    "weights of another network": (wrong_weights, ["weights.pt", "bad_functions:Net"]),
    "safetensors without --model": (safetensors, ["weights.safetensors", "--model"]),
}
FACTORIES: dict[str, tuple[Case, Sequence[str]]] = {
    "no such module": (lambda p: ["--model", "torchvisoin:x"], ["torchvisoin", "installed"]),
    "no such factory": (lambda p: ["--model", "bad_functions:Nett"], ["Nett", "Did you mean"]),
    "no colon": (lambda p: ["--model", "resnet18"], ["resnet18", "module:factory"]),
    "not callable": (lambda p: ["--model", "bad_functions:not_callable"], ["int", "called"]),
    "factory fails": (lambda p: ["--model", "bad_functions:fails"], ["no licence", "without arg"]),
    "factory makes text": (lambda p: ["--model", "bad_functions:makes_text"], ["str", "Module"]),
}
SHAPES: dict[str, tuple[Case, Sequence[str]]] = {
    "nonsense": (lambda p: [p.model, "--input", "3,224,224"], ["3,224,224", "1x3x224x224"]),
    "unknown dtype": (lambda p: [p.model, "--input", "x:1x3:float8"], ["float8", "float32"]),
    "missing": (lambda p: [*NET], ["--input 1x3x224x224"]),
    "wrong rank": (lambda p: [*NET, "--input", "1x192"], ["Net", "[1, 192]"]),
    "wrong channels": (
        lambda p: [*NET, "--input", "1x1x8x8"],
        ["Net", "[1, 1, 8, 8]", "3 channels"],
    ),
    "wrong name": (lambda p: [p.model, "--input", "image:1x3x8x8"], ["'image'", "x"]),
    "contradiction": (lambda p: [p.model, "--input", "1x3x9x9"], ["1x3x9x9", "batchx3x8x8"]),
    "given twice": (lambda p: [p.model, *("--input", "1x3x8x8") * 2], ["2 times", "x"]),
}
DATA: dict[str, tuple[Case, Sequence[str]]] = {
    "missing": (lambda p: [p.model, "--calibration", p.folder / "no.npz"], ["no.npz", ".npz"]),
    "without x": (lambda p: p.with_data(images=X, y=Y), ["'images'", "'x'"]),
    "other image size": (lambda p: p.with_data(x=X[..., :7]), ["3x8x7", "3x8x8"]),
    "NaN": (lambda p: p.with_data(x=NAN), ["NaN", "sample 5"]),
    "objects": (pickled_data, ["Python objects", "astype"]),
    "text": (lambda p: [p.model, "--calibration", p.file("d.npz", "x,y\n")], ["d.npz", ".npz"]),
    "half an .npz": (
        lambda p: [p.model, "--calibration", p.half(p.images, "d.npz")],
        ["d.npz", "x and y"],
    ),
    "lengths differ": (lambda p: p.with_data(x=X, y=Y[:9]), ["16 of 'x'", "9 of 'y'"]),
    "no samples": (lambda p: p.with_data(x=X[:0]), ["no samples", "at least one"]),
    "broken image": (images_folder, ["one.jpg", "Remove or replace"]),
    "empty function": (
        lambda p: [p.model, "--calibration", "bad_functions:no_batches"],
        ["no samples", "at least one"],
    ),
    "no such function": (
        lambda p: [p.model, "--calibration", "bad_functions:no_batch"],
        ["no_batch", "Did you mean 'no_batches'"],
    ),
    "eval without labels": (lambda p: p.with_eval(x=X), ["no labels", "y in an .npz"]),
    "labels out of range": (lambda p: p.with_eval(x=X, y=Y + 1), ["4 classes", "begin at 1"]),
    "one-hot labels": (lambda p: p.with_eval(x=X, y=np.eye(4)[Y]), ["16x4", "argmax"]),
    "eval fails": (lambda p: p.scored("eval_fails"), ["KeyError", "take an engine"]),
    "eval returns None": (
        lambda p: p.scored("eval_nothing"),
        ["returned None", "one finite number"],
    ),
    "eval returns NaN": (lambda p: p.scored("eval_nan"), ["nan", "one finite number"]),
    "eval is a number": (lambda p: p.scored("not_callable"), ["int", "takes an engine"]),
    "layout": (lambda p: p.calibrated("--layout", "hwc"), ["hwc", "nchw"]),
    "mean of two": (lambda p: p.calibrated("--mean", "0.5,0.5"), ["mean has 2", "per channel"]),
    "std of zero": (lambda p: p.calibrated("--std", "0"), ["std is 0", "positive"]),
}
OPTIONS: dict[str, tuple[Case, Sequence[str]]] = {
    "target": (lambda p: p.calibrated("--target", "gpu"), ["gpu", "cpu"]),
    "bits 3": (lambda p: p.calibrated("--bits", 3), ["3", "8"]),
    "bits 0": (lambda p: p.calibrated("--bits", 0), ["0", "8"]),
    "threads 0": (
        lambda p: p.calibrated("--threads", 0),
        ["--threads", "greater than or equal to 1"],
    ),
    "threads 9999": (lambda p: p.calibrated("--threads", 9999), ["9999", "usable cores"]),
    "max-drop": (
        lambda p: p.calibrated("--eval", p.images, "--max-drop", "abc"),
        ["'abc'", "0.5%"],
    ),
    "max-drop without %": (
        lambda p: p.calibrated("--eval", p.images, "--max-drop", "0.5"),
        ["'0.5'", "% sign"],
    ),
    "max-drop without --eval": (lambda p: p.calibrated("--max-drop", "1%"), ["1%", "--eval"]),
    "min-speedup": (lambda p: p.calibrated("--min-speedup", -1), ["-1", "1.5"]),
    "seconds": (lambda p: p.calibrated("--seconds", 0), ["--seconds", "0.5"]),
    "seed": (lambda p: p.calibrated("--seed", -1), ["--seed", "equal to 0"]),
    "samples": (lambda p: p.calibrated("--calibration-samples", 0), ["samples", "equal to 1"]),
    "method": (lambda p: p.calibrated("--method", "kl"), ["kl", "entropy"]),
    "unknown option": (lambda p: p.calibrated("--calibraton", "x"), ["--calibraton"]),
    "no recipe": (lambda p: p.calibrated("--recipe", p.folder / "r.yaml"), ["r.yaml"]),
    "broken YAML": (lambda p: p.recipe("passes: [quantize"), ["recipe.yaml", "YAML"]),
    "no passes": (lambda p: p.recipe("target: cpu\n"), ["recipe.yaml", "`passes`"]),
    "unknown pass": (lambda p: p.recipe("passes: [quantise]\n"), ["quantise", "quantize"]),
    "unknown pass option": (
        lambda p: p.recipe("passes:\n- quantize: {bit: 8}\n"),
        ["bit", "bits"],
    ),
    "wrong pass option": (
        lambda p: p.recipe("passes:\n- quantize: {samples: many}\n"),
        ["samples", "many"],
    ),
    "text as threads": (
        lambda p: p.recipe("passes: []\nthreads: many\n"),
        ["threads", "'many'", "whole number"],
    ),
    "numbers as inputs": (
        lambda p: p.recipe("passes: []\ninputs: [3, 224]\n"),
        ["inputs", "[3, 224]", "texts"],
    ),
    "unknown setting": (lambda p: p.recipe("passes: []\ntargt: cpu\n"), ["targt", "target"]),
    "code in a recipe": (
        lambda p: p.recipe(f"passes: !!python/object/apply:os.system ['touch {p.fuse}']\n"),
        ["recipe.yaml", "not plain YAML"],
    ),
}
ALL = {
    f"{group}: {name}": case
    for group, cases in {
        "model": FILES,
        "factory": FACTORIES,
        "shape": SHAPES,
        "data": DATA,
        "option": OPTIONS,
    }.items()
    for name, case in cases.items()
}


@pytest.fixture
def place(
    tmp_path: Path, tiny_onnx: Path, tiny_images: Path, monkeypatch: pytest.MonkeyPatch
) -> Place:
    (tmp_path / "bad_functions.py").write_text(FUNCTIONS)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "bad_functions", raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))  # the cache of calibrations
    return Place(tmp_path, tiny_onnx, tiny_images)


@pytest.mark.parametrize(("case", "words"), ALL.values(), ids=ALL.keys())
def test_a_bad_input_is_one_paragraph(
    cli: Callable[..., Any],
    place: Place,
    case: Case,
    words: Sequence[str],
    request: pytest.FixtureRequest,
) -> None:
    arguments = ["run", *case(place), "--out", place.out]
    if "--seconds" not in arguments:
        arguments += ["--seconds", "0.5"]
    result = cli(*arguments)
    message = result.err.rstrip("\n").rsplit("\n", 1)[-1]
    _note(request.node.callspec.id, message)
    assert result.code == USAGE, result.err
    assert result.out == ""
    assert "Traceback" not in result.err
    assert message.startswith("Error: ")
    assert [word for word in words if word not in message] == []
    assert not place.out.exists()
    assert not place.fuse.exists()


OUTPUTS: dict[str, tuple[Case, Sequence[str]]] = {
    "existing directory": (existing_directory, ["artifact", "exists already", "--force"]),
    "foreign directory with --force": (foreign_directory, ["no artifact", "another --out"]),
    "file with --force": (existing_file, ["no artifact", "another --out"]),
    "parent is a file": (parent_is_a_file, ["letters is a file", "another --out"]),
}


@pytest.mark.parametrize(("case", "words"), OUTPUTS.values(), ids=OUTPUTS.keys())
def test_an_output_that_cannot_be_is_refused_before_work(
    cli: Callable[..., Any],
    place: Place,
    case: Case,
    words: Sequence[str],
    request: pytest.FixtureRequest,
) -> None:
    arguments = case(place)
    before = listing(place.folder)
    result = cli("run", *arguments)
    message = result.err.rstrip("\n")
    _note(f"output: {request.node.callspec.id}", message)
    assert result.code == USAGE
    assert result.out == ""
    assert message.startswith("Error: ")
    assert "\n" not in message  # no step has begun
    assert [word for word in words if word not in message] == []
    assert listing(place.folder) == before


def test_a_full_disk_leaves_nothing_behind(place: Place, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = f"mount -t tmpfs -o size=4k none {disk}"
    if subprocess.run(["unshare", "-rm", "sh", "-c", mount], check=False, **QUIET).returncode:
        pytest.skip("this system does not let tests mount a file system")
    command = shlex.join([*COMPRESS, *map(str, place.calibrated()), "--seconds", "0.5"])
    script = f"{mount} && {command} --out {disk}/artifact; code=$?; ls -A {disk}; exit $code"
    ran = subprocess.run(["unshare", "-rm", "sh", "-c", script], check=False, **QUIET)
    message = ran.stderr.rstrip("\n").rsplit("\n", 1)[-1]
    _note("output: full disk", message)
    assert ran.returncode == USAGE, ran.stderr
    assert "The disk is full" in message
    assert "another --out" in message
    assert "Traceback" not in ran.stderr
    assert ran.stdout == ""  # what `ls` found


def test_a_refused_run_makes_no_folders(cli: Callable[..., Any], place: Place) -> None:
    out = place.folder / "new" / "folder" / "artifact"
    before = listing(place.folder)
    assert cli("run", place.model, "--calibration", "no.npz", "--out", out).code == USAGE
    assert listing(place.folder) == before


@pytest.mark.parametrize("step", ["Calibrate", "Measuring latency"])
def test_ctrl_c_leaves_nothing_behind(place: Place, step: str) -> None:
    images = np.random.default_rng(0).standard_normal((20_000, 3, 8, 8)).astype(np.float32)
    data = place.arrays(x=images)
    before = listing(place.folder)
    command = [*COMPRESS, place.model, "--calibration", data, "--calibration-samples", "20000"]
    running = subprocess.Popen(
        [*map(str, command), "--seconds", "60", "--out", str(place.out)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert running.stderr is not None
    while (line := running.stderr.readline()) and step not in line:
        pass
    assert step in line
    running.send_signal(signal.SIGINT)
    out, err = running.communicate(timeout=60)
    _note(f"Ctrl-C during {step!r}", err.strip())
    assert running.returncode == STOPPED, err
    assert err.rstrip("\n").rsplit("\n", 1)[-1] == "Stopped; no artifact was written."
    assert out == ""
    assert "Traceback" not in err
    assert [name for name in listing(place.folder) if name not in before] in ([], [".cache"])


def listing(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def _note(name: str, message: str) -> None:
    if table := os.environ.get("BAD_INPUTS_TABLE"):
        with open(table, "a") as file:
            file.write(f"| {name} | {message.replace('|', chr(92) + '|')} |\n")
