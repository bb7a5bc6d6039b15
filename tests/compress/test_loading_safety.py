"""Files that would execute code: each is refused, and what it would have done does not happen."""

from __future__ import annotations

import io
import json
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper
from torch import nn

from compress.errors import LoadError, UnsafeFileError
from compress.formats.exported_safety import clean_program
from compress.formats.file_safety import pickled_names
from compress.loading import load

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")

Program = dict[str, Any]


class Touch:
    """A pickle of this creates a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[..., int], tuple[str, int]]:
        return os.open, (str(self.marker), os.O_CREAT | os.O_WRONLY)


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    """A path that a successful attack creates."""
    return tmp_path / "marker"


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A genuine archive with a dynamic axis, so with symbols, ranges and guards."""
    path = tmp_path_factory.mktemp("genuine") / "net.pt2"
    net = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(36, 5))
    shapes = ({0: torch.export.Dim("n", min=1, max=64)},)
    program = torch.export.export(net.eval(), (torch.randn(2, 3, 8, 8),), dynamic_shapes=shapes)
    torch.export.save(program, path)
    return path


def rezip(source: Path, target: Path, changes: dict[str, bytes]) -> Path:
    """A copy of an archive with entries replaced or added; names without the root folder."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        root = old.namelist()[0].partition("/")[0]
        left = dict(changes)
        for name in old.namelist():
            inner = name.partition("/")[2]
            new.writestr(name, left.pop(inner, None) or old.read(name))
        for name, data in left.items():
            new.writestr(f"{root}/{name}", data)
    return target


def edit(source: Path, target: Path, change: Callable[[Program], None]) -> Path:
    """A copy of an exported archive with its description changed."""
    with zipfile.ZipFile(source) as archive:
        root = archive.namelist()[0].partition("/")[0]
        program = json.loads(archive.read(f"{root}/models/model.json"))
    change(program)
    return rezip(source, target, {"models/model.json": json.dumps(program).encode()})


# --- pickles ----------------------------------------------------------------------------------


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("wrap", ["alone", "in_state_dict", "in_module"])
def test_torch_pickles(tmp_path: Path, marker: Path, zipped: bool, wrap: str) -> None:
    path = tmp_path / "net.pt"
    held: object = Touch(marker)
    if wrap == "in_state_dict":
        held = {"weight": torch.zeros(3), "extra": held}
    elif wrap == "in_module":
        module = nn.Sequential(nn.Linear(3, 3))
        module.extra = held  # type: ignore[assignment]
        held = module
    torch.save(held, path, _use_new_zipfile_serialization=zipped)
    for factory in (None, "torch.nn:Identity"):
        with pytest.raises(LoadError) as caught:
            load(path, factory=factory, inputs=["1x3"])
        if wrap != "in_module" or zipped:
            assert isinstance(caught.value, UnsafeFileError)
            assert "posix.open" in str(caught.value)
            assert "--model module:factory" in str(caught.value)
            assert "--trust-pickle" in str(caught.value)
    assert not marker.exists()


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
def test_plain_pickles(tmp_path: Path, marker: Path, protocol: int) -> None:
    path = tmp_path / "model.pt"
    path.write_bytes(pickle.dumps(Touch(marker), protocol=protocol))
    with pytest.raises(LoadError):
        load(path)
    assert pickled_names(path) == ("posix.open",)
    assert not marker.exists()


def test_a_pickle_with_the_extension_of_another_format(tmp_path: Path, marker: Path) -> None:
    for name in ("net.pt2", "net.onnx", "net.safetensors"):
        torch.save({"a": Touch(marker)}, tmp_path / name)
        with pytest.raises(UnsafeFileError, match=r"posix\.open"):
            load(tmp_path / name)
    assert not marker.exists()


def test_trust_is_what_unpickles(tmp_path: Path, marker: Path) -> None:
    torch.save([Touch(marker), nn.Linear(3, 2)], tmp_path / "net.pt")
    with pytest.raises(LoadError, match="no model"):
        load(tmp_path / "net.pt", trust_pickle=True, inputs=["1x3"])
    assert marker.exists()


def test_a_class_of_another_library_is_named(tmp_path: Path) -> None:
    torch.save(nn.LazyLinear(3), tmp_path / "net.pt")
    with pytest.raises(UnsafeFileError, match=r"torch\.nn\.modules\.linear\.LazyLinear"):
        load(tmp_path / "net.pt", inputs=["1x3"])


@pytest.mark.parametrize("key", ["forward", "_forward_pre_hooks"])
def test_state_that_replaces_methods(tmp_path: Path, key: str) -> None:
    module = nn.Linear(3, 3)
    vars(module)[key] = {0: nn.ReLU()} if "hooks" in key else nn.ReLU()
    torch.save(nn.Sequential(module), tmp_path / "net.pt")
    with pytest.raises(UnsafeFileError, match=f"module '0' replaces '{key}'"):
        load(tmp_path / "net.pt", inputs=["1x3"])


# --- archives ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["../evil", "a/../../evil", "/etc/evil", "..\\evil", "C:/evil"])
def test_entries_outside_of_the_archive(exported: Path, tmp_path: Path, name: str) -> None:
    weights, script = tmp_path / "w.pt", tmp_path / "s.pt"
    torch.save({"w": torch.zeros(3)}, weights)
    torch.jit.save(torch.jit.script(nn.Linear(3, 2)), script)
    for source in (exported, weights, script):
        path = tmp_path / f"bad_{source.name}"
        path.write_bytes(source.read_bytes())
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr(zipfile.ZipInfo(name), b"x")
        with pytest.raises(UnsafeFileError, match="points outside of the archive"):
            load(path, inputs=["1x3"])


def test_two_entries_with_one_name(exported: Path, tmp_path: Path) -> None:
    path = rezip(exported, tmp_path / "net.pt2", {"Models/Model.json": b"{}"})
    with pytest.raises(UnsafeFileError, match="two entries"):
        load(path)


def test_an_archive_that_would_fill_the_disk(tmp_path: Path) -> None:
    path = tmp_path / "bomb.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb/data.pkl", b"\x80\x02}.")
        with archive.open("bomb/data/0", "w") as entry:
            for _ in range(300):
                entry.write(bytes(1024 * 1024))
    with pytest.raises(UnsafeFileError, match="would unpack to"):
        load(path)


# --- exported programs ------------------------------------------------------------------------


def first_size(program: Program) -> dict[str, Any]:
    """The symbolic size of the first tensor that has one."""
    for tensor in program["graph_module"]["graph"]["tensor_values"].values():
        for size in tensor["sizes"]:
            if "as_expr" in size:
                found: dict[str, Any] = size["as_expr"]
                return found
    raise AssertionError("the program has no symbolic size")


def test_a_genuine_archive_loads(exported: Path, tmp_path: Path) -> None:
    copied = edit(exported, tmp_path / "copy.pt2", lambda program: None)
    assert first_size(json.loads(zipfile.ZipFile(copied).read("net/models/model.json")))
    load(copied)


EXPRESSIONS = [
    "__import__('os').open({marker!r}, 65)",
    "Symbol('s0').__class__.__init__.__globals__",
    "[x for x in (1,)][0]",
    "eval('1')",
    "lambda: 1",
    "Symbol(open('x'))",
    "9**9**9**9",
    "Pow(Integer(10), Integer(999999999))",
    "s0; s1",
    "s0 if s1 else s2",
    "",
    "(" * 3000 + ")" * 3000,
]


@pytest.mark.parametrize("text", EXPRESSIONS, ids=[e[:20] or "empty" for e in EXPRESSIONS])
def test_sizes_that_sympy_would_evaluate(
    exported: Path, tmp_path: Path, marker: Path, text: str
) -> None:
    def attack(program: Program) -> None:
        first_size(program)["expr_str"] = text.replace("{marker!r}", repr(str(marker)))

    with pytest.raises(UnsafeFileError, match="the size"):
        load(edit(exported, tmp_path / "net.pt2", attack))
    assert not marker.exists()


@pytest.mark.parametrize("key", ["target", "as_operator"])
@pytest.mark.parametrize(
    "target",
    [
        "torch.serialization.os.system",
        "torch.load",
        "torch.hub.load",
        "torch.ops.load_library",
        "torch.ops.aten.from_file.default",
        "torch.ops.aten.__class__.__init__",
        "torch.ops.aten.__init_subclass__",
        "torch.ops.higher_order.triton_kernel_wrapper_mutation",
        "_operator.methodcaller",
        "_operator.attrgetter",
        "math.__loader__.load_module",
        "#extension:op",
        "builtins.eval",
    ],
)
def test_operators_that_no_network_needs(
    exported: Path, tmp_path: Path, target: str, key: str
) -> None:
    def attack(program: Program) -> None:
        node = program["graph_module"]["graph"]["nodes"][0]
        if key == "target":
            node["target"] = target
        else:
            node["inputs"][0]["arg"] = {"as_operator": target}

    with pytest.raises(UnsafeFileError, match="the operator"):
        load(edit(exported, tmp_path / "net.pt2", attack))


def test_guards_are_dropped_and_never_executed(
    exported: Path, tmp_path: Path, marker: Path
) -> None:
    def attack(program: Program) -> None:
        program["guards_code"] = [f"__import__('os').open({str(marker)!r}, 65)"]

    model = load(edit(exported, tmp_path / "net.pt2", attack))
    model.torch_module(torch.randn(2, 3, 8, 8))
    torch.export.export(model.torch_module, (torch.randn(2, 3, 8, 8),))
    assert not marker.exists()


def test_names_that_would_become_source(exported: Path, tmp_path: Path, marker: Path) -> None:
    code = f"x=__import__('os').open({str(marker)!r},65)#"
    with zipfile.ZipFile(exported) as archive:
        text = archive.read("net/models/model.json").decode()
    for name in ("conv2d", "p_0_weight", "0.weight", "input"):
        assert f'"{name}"' in text
        evil = text.replace(f'"{name}"', json.dumps(code))
        path = rezip(exported, tmp_path / "net.pt2", {"models/model.json": evil.encode()})
        with pytest.raises(UnsafeFileError, match="the name"):
            load(path)
    assert not marker.exists()


@pytest.mark.parametrize(
    ("kind", "context"),
    [
        ("collections.defaultdict", {"default_factory_module": "os"}),
        ("builtins.dict", json.dumps([{"__enum__": True, "fqn": "os:x", "name": "y"}])),
        ("my.Dataclass", "null"),
    ],
)
def test_trees_that_import(exported: Path, tmp_path: Path, kind: str, context: object) -> None:
    tree = json.dumps([1, {"type": kind, "context": context, "children_spec": []}])

    def attack(program: Program) -> None:
        program["graph_module"]["module_call_graph"][0]["signature"]["out_spec"] = tree

    with pytest.raises(LoadError):
        load(edit(exported, tmp_path / "net.pt2", attack))


@pytest.mark.parametrize("place", ["weight", "constant", "legacy", "samples"])
def test_pickles_inside_of_an_exported_archive(
    exported: Path, tmp_path: Path, marker: Path, place: str
) -> None:
    buffer = io.BytesIO()
    torch.save({"0.weight": Touch(marker)}, buffer)
    changes = {
        "samples": {"data/sample_inputs/model.pt": buffer.getvalue()},
        "legacy": {"data/weights/model.pt": buffer.getvalue()},
        "weight": {
            "data/weights/weight_0": buffer.getvalue(),
            "data/weights/model_weights_config.json": payload("0.weight", "weight_0"),
        },
        "constant": {
            "data/constants/opaque_obj_0": pickle.dumps(Touch(marker)),
            "data/constants/model_constants_config.json": payload("c", "opaque_obj_0"),
        },
    }[place]
    path = rezip(exported, tmp_path / "net.pt2", changes)
    if place == "samples":
        load(path)  # never read
    else:
        with pytest.raises(UnsafeFileError, match="pickle"):
            load(path)
    assert not marker.exists()


def payload(name: str, entry: str) -> bytes:
    """A table of payloads with one pickled one."""
    meta = {"path_name": entry, "is_param": False, "use_pickle": True, "tensor_meta": None}
    return json.dumps({"config": {name: meta}}).encode()


def test_compiled_code_inside_of_an_exported_archive(exported: Path, tmp_path: Path) -> None:
    path = rezip(exported, tmp_path / "n.pt2", {"data/aotinductor/model/x.so": b"\x7fELF"})
    with pytest.raises(UnsafeFileError, match="compiled code"):
        load(path)


@given(st.data())
@settings(max_examples=60)
def test_a_damaged_description_is_a_load_error(exported: Path, data: st.DataObject) -> None:
    """Whatever replaces a part of the description, cleaning it gives JSON or a LoadError."""
    with zipfile.ZipFile(exported) as archive:
        text = archive.read("net/models/model.json")
    start = data.draw(st.integers(0, len(text)))
    length = data.draw(st.integers(0, 40))
    damaged = text[:start] + data.draw(st.binary(max_size=8)) + text[start + length :]
    try:
        cleaned = clean_program(damaged, "x.pt2")
    except LoadError:
        return
    assert json.loads(cleaned)["guards_code"] == []


# --- TorchScript ------------------------------------------------------------------------------


def script_with(tmp_path: Path, line: str) -> Path:
    """A genuine TorchScript archive with one line put in front of its forward's first."""
    genuine, path = tmp_path / "genuine.pt", tmp_path / "evil.pt"
    torch.jit.save(torch.jit.script(nn.Sequential(nn.Linear(3, 3))), genuine)
    with zipfile.ZipFile(genuine) as archive:
        root = archive.namelist()[0].partition("/")[0]
        name = next(n for n in archive.namelist() if "/container" in n and n.endswith(".py"))
        text = archive.read(name).decode()
    body = text.index("\n", text.index("-> Tensor:")) + 1
    evil = f"{text[:body]}    {line}\n{text[body:]}"
    return rezip(genuine, path, {name.removeprefix(f"{root}/"): evil.encode()})


@pytest.mark.parametrize(
    "line",
    [
        "torch.save(input, {marker!r})",
        "input.save({marker!r})",
        "x = torch.from_file({marker!r}, True, 4)",
        "x = torch . \\\n      from_file({marker!r}, True, 4)",
        "ops.image.write_file({marker!r}, input)",
        "ops . image . write_file({marker!r}, input)",
        "o = ops",
        "x = annotate(__torch__.torch.classes.foo.Bar, input)",
        "ops.prim.PythonOp(input)",
    ],
)
def test_torchscript_that_does_more_than_compute(tmp_path: Path, marker: Path, line: str) -> None:
    path = script_with(tmp_path, line.replace("{marker!r}", repr(str(marker))))
    with pytest.raises(UnsafeFileError, match="TorchScript code uses"):
        load(path, inputs=["1x3"])
    assert not marker.exists()


class Writes(nn.Module):
    """Touches a file when it is loaded, and again when it runs."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self.path = path

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        torch.save(x, self.path)
        return x

    @torch.jit.export
    def __getstate__(self) -> tuple[str, bool]:
        return self.path, self.training

    @torch.jit.export
    def __setstate__(self, state: tuple[str, bool]) -> None:
        self.path, self.training = state
        torch.save(torch.zeros(1), self.path)


def test_scripted_modules_that_write_files(tmp_path: Path, marker: Path) -> None:
    path = tmp_path / "net.pt"
    torch.jit.save(torch.jit.script(Writes(str(marker))), path)
    with pytest.raises(UnsafeFileError, match="'save'"):
        load(path, inputs=["1x3"])
    assert not marker.exists()
    torch.jit.load(path)
    assert marker.exists(), "the attack itself does not work, so nothing was tested"


def test_torchscript_code_under_a_name_in_capitals(tmp_path: Path, marker: Path) -> None:
    path, renamed = tmp_path / "net.pt", tmp_path / "renamed.pt"
    torch.jit.save(torch.jit.script(Writes(str(marker))), path)
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(renamed, "w") as new:
        for name in old.namelist():
            new.writestr(name.replace(".py", ".PY"), old.read(name))
    with pytest.raises(LoadError):
        load(renamed, inputs=["1x3"])
    assert not marker.exists()


def test_torchscript_objects_of_compiled_classes(tmp_path: Path) -> None:
    path = tmp_path / "net.pt"
    torch.jit.save(torch.jit.script(nn.Linear(3, 3)), path)
    evil = b"\x80\x02c__torch__.torch\nclasses.foo.Bar\n)\x81."
    with pytest.raises(UnsafeFileError, match=r"classes\.foo\.Bar"):
        load(rezip(path, tmp_path / "evil.pt", {"data.pkl": evil}), inputs=["1x3"])


# --- ONNX -------------------------------------------------------------------------------------


@pytest.mark.parametrize("location", ["../secret", "/etc/passwd", "a/../../secret", "link"])
def test_onnx_weights_outside_of_its_folder(tmp_path: Path, location: str) -> None:
    (tmp_path / "secret").write_bytes(bytes(64))
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "link").symlink_to(tmp_path / "secret")
    tensor = onnx.TensorProto(
        name="w",
        dims=[4],
        data_type=onnx.TensorProto.FLOAT,
        data_location=onnx.TensorProto.EXTERNAL,
    )
    tensor.external_data.add(key="location", value=location)
    tensor.external_data.add(key="length", value="16")
    graph = helper.make_graph(
        [helper.make_node("Add", ["x", "w"], ["y"])],
        "net",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1, 4])],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1, 4])],
        [tensor],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    (folder / "net.onnx").write_bytes(proto.SerializeToString())
    with pytest.raises(UnsafeFileError, match="outside of its own folder"):
        load(folder / "net.onnx")
