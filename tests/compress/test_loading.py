"""Every kind of file that can be loaded, the rules for shapes, and what wrong files say."""

from __future__ import annotations

import hashlib
import io
import json
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from onnx import helper
from torch import nn

from compress.data import load_data
from compress.errors import (
    DataError,
    LoadError,
    MissingExtraError,
    UnsupportedError,
    UsageError,
)
from compress.export import to_onnx
from compress.facts import data_remarks
from compress.formats.file_kind import FileKind, file_kind
from compress.loading import load, to_torch
from compress.model import BATCH, TensorSpec
from targets.onnxruntime import OnnxRuntime

# Writing TorchScript is deprecated in torch; reading what others wrote is what is tested.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")

SHAPE = "1x3x8x8"


class Branching(nn.Module):
    """Convolution, normalization and a residual, under named submodules."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4))
        self.head = nn.Linear(4, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.stem(x))
        return self.head((y + y.sigmoid()).mean((2, 3)))


class TwoInputs(nn.Module):
    """Two tensors by position, the second of integers."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(4, 3)

    def forward(self, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return x + self.table(ids)


def network() -> nn.Module:
    """A network with statistics that are not the initial ones, always the same."""
    torch.manual_seed(0)
    net = Branching()
    net(torch.randn(4, 3, 8, 8))
    return net.eval()


def plain_network() -> nn.Module:
    """A network of torch.nn's own classes only."""
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, stride=2), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(36, 5)
    ).eval()


def outputs(program: nn.Module, batch: int = 1) -> torch.Tensor:
    """What a program gives for always the same input."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        value = program(torch.randn(batch, 3, 8, 8, generator=generator))
    assert isinstance(value, torch.Tensor)
    return value


def save_export(path: Path, net: nn.Module, dynamic: bool = True) -> Path:
    shapes = ({0: torch.export.Dim("n", min=1, max=64)},) if dynamic else None
    program = torch.export.export(net, (torch.randn(2, 3, 8, 8),), dynamic_shapes=shapes)
    torch.export.save(program, path)
    return path


def save_script(path: Path, net: nn.Module) -> Path:
    torch.jit.save(torch.jit.script(net), path)
    return path


def save_npz(path: Path) -> None:
    with path.open("wb") as file:
        np.savez(file, x=np.zeros(3))


def onnx_model(shape: list[int | str], opset: int = 17) -> onnx.ModelProto:
    """A convolution, its weight listed among the inputs as old exporters do."""
    weight = np.random.default_rng(0).standard_normal((4, 3, 3, 3)).astype(np.float32)
    graph = helper.make_graph(
        [
            helper.make_node("Conv", ["x", "w"], ["y"], "conv"),
            helper.make_node("Relu", ["y"], ["z"], "relu"),
        ],
        "net",
        [
            helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, shape),
            helper.make_tensor_value_info("w", onnx.TensorProto.FLOAT, [4, 3, 3, 3]),
        ],
        [helper.make_tensor_value_info("z", onnx.TensorProto.FLOAT, ["a", 4, "c", "d"])],
        [onnx.numpy_helper.from_array(weight, "w")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def save_onnx(path: Path, shape: list[int | str], opset: int = 17) -> Path:
    onnx.save(onnx_model(shape, opset), path)
    return path


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with this file's networks importable from it as `nets`."""
    (tmp_path / "nets.py").write_text(
        "import torch\nfrom torch import nn\n"
        "def small(width=5): return nn.Linear(3, width)\n"
        "def wide(): return nn.Linear(3, 7)\n"
        "def needs(width): return nn.Linear(3, width)\n"
        "def text(): return 'a network'\n"
        "number = 3\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "nets", raising=False)
    return tmp_path


# --- kinds ------------------------------------------------------------------------------------

WRITERS: dict[FileKind, Callable[[Path], object]] = {
    "export": lambda path: save_export(path, plain_network()),
    "torchscript": lambda path: save_script(path, plain_network()),
    "torch": lambda path: torch.save(plain_network().state_dict(), path),
    "torch_legacy": lambda path: torch.save(
        plain_network().state_dict(), path, _use_new_zipfile_serialization=False
    ),
    "onnx": lambda path: save_onnx(path, [1, 3, 8, 8]),
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("import torch\n"),
    "html": lambda path: path.write_text("<!DOCTYPE html><title>404</title>"),
    "lfs_pointer": lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\n"),
    "openvino": lambda path: path.write_text('<?xml version="1.0"?>\n<net name="x"></net>'),
    "image": lambda path: path.write_bytes(b"\xff\xd8\xff\xe0" + bytes(200)),
    "tflite": lambda path: path.write_bytes(b"\x1c\0\0\0TFL3" + bytes(200)),
    "tensorflow": lambda path: path.write_bytes(b"\x08\x01\x12\x04abcd"),
    "hdf5": lambda path: path.write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(200)),
    "npz": lambda path: save_npz(path),
    "broken_zip": lambda path: path.write_bytes(b"PK\x03\x04" + bytes(200)),
    "archive": lambda path: path.write_bytes(b"\x1f\x8b\x08" + bytes(200)),
    "unknown": lambda path: path.write_bytes(b"\x01\x02\x03\xff" * 50),
}
LOADABLE = ("export", "torchscript", "torch", "torch_legacy", "onnx")


@pytest.mark.parametrize("kind", WRITERS)
def test_a_kind_is_told_by_content_and_not_by_name(kind: FileKind, tmp_path: Path) -> None:
    path = tmp_path / "model.jpeg"
    WRITERS[kind](path)
    assert file_kind(path) == kind


@pytest.mark.parametrize("kind", [kind for kind in WRITERS if kind not in LOADABLE])
def test_other_files_are_named_in_one_paragraph(kind: FileKind, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    WRITERS[kind](path)
    with pytest.raises(LoadError, match=r"model\.onnx is .*Expected is") as caught:
        load(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", LOADABLE)
@pytest.mark.parametrize("share", [0.02, 0.3, 0.6, 0.9, 0.999])
def test_truncated_files_are_load_errors(kind: FileKind, share: float, tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    WRITERS[kind](whole)
    data = whole.read_bytes()
    cut.write_bytes(data[: max(1, int(len(data) * share))])
    with pytest.raises(LoadError, match="cut"):
        load(cut, inputs=[SHAPE] if kind != "onnx" else [])


# --- round trips ------------------------------------------------------------------------------


@pytest.mark.parametrize("dynamic", [True, False], ids=["dynamic", "static"])
def test_exported_program(tmp_path: Path, dynamic: bool) -> None:
    net = network()
    model = load(save_export(tmp_path / "my net.pt2", net, dynamic))
    shape = (BATCH if dynamic else 2, 3, 8, 8)
    assert model.inputs == (TensorSpec("x", shape),)
    assert model.name == "my_net"
    assert model.source.startswith("torch.export archive my net.pt2 (")
    assert set(model.torch_module.state_dict()) == set(net.state_dict())
    batch = 3 if dynamic else 2
    torch.testing.assert_close(outputs(model.torch_module, batch), outputs(net, batch))
    again = torch.export.export(model.torch_module, (torch.randn(2, 3, 8, 8),))
    paths = {
        path
        for node in again.graph.nodes
        for path, _ in node.meta.get("nn_module_stack", {}).values()
    }
    assert {"stem.0", "stem.1", "head"} <= paths


def test_a_program_exported_for_training_is_loaded_for_inference(tmp_path: Path) -> None:
    net = network()
    path = save_export(tmp_path / "net.pt2", net.train())
    model = load(path)
    torch.testing.assert_close(outputs(model.torch_module, 3), outputs(net.eval(), 3))
    before = {k: v.clone() for k, v in model.torch_module.state_dict().items()}
    outputs(model.torch_module)
    after = model.torch_module.state_dict()
    assert all(torch.equal(value, after[key]) for key, value in before.items())


class Attention(nn.Module):
    """Attention, recurrence and dropout, all with a mode for training."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.5, batch_first=True)
        self.lstm = nn.LSTM(4, 4, num_layers=2, dropout=0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lstm(self.layer(x))[0]


@pytest.mark.filterwarnings("ignore:The tensor attributes self.lstm:UserWarning")
def test_dropout_of_a_program_exported_for_training_is_off(tmp_path: Path) -> None:
    net, x = Attention(), torch.randn(2, 3, 4)
    torch.export.save(torch.export.export(net, (x,)), tmp_path / "net.pt2")
    loaded = load(tmp_path / "net.pt2").torch_module
    torch.testing.assert_close(loaded(x), net.eval()(x))


class Resizing(nn.Module):
    """Computes with its sizes, returns nested outputs, and has names that are no identifiers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({"a-b": nn.Conv2d(3, 3, 3, stride=2, padding=1)})

    def forward(self, x: torch.Tensor) -> dict[str, object]:
        y = nn.functional.interpolate(self.layers["a-b"](x), size=x.shape[2:])
        batch, channels, height, width = y.shape
        y = y.view(batch, channels, height * width).softmax(-1)
        branch = torch.cond(y.sum() > 0, lambda v: v.sin(), lambda v: v.cos(), (y,))
        return {"out": y.view(batch, channels, height // 2, width * 2), "aux": [branch, y > 0]}


@pytest.mark.parametrize("decomposed", [False, True], ids=["whole", "decomposed"])
@torch.no_grad()
def test_a_program_with_symbolic_arithmetic(tmp_path: Path, decomposed: bool) -> None:
    net, x = Resizing().eval(), torch.randn(2, 3, 8, 8)
    height = torch.export.Dim("h", min=2, max=99)
    sizes = {0: torch.export.Dim.AUTO, 2: 2 * height, 3: torch.export.Dim("w", min=4, max=99)}
    program = torch.export.export(net, (x,), dynamic_shapes=(sizes,))
    torch.export.save(program.run_decompositions() if decomposed else program, tmp_path / "n.pt2")
    with pytest.raises(UsageError, match="axis 2 and 3 of input"):
        load(tmp_path / "n.pt2")
    model = load(tmp_path / "n.pt2", inputs=["batchx3x10x12"])
    assert model.inputs == (TensorSpec("x", (BATCH, 3, 10, 12)),)
    x = torch.randn(3, 3, 10, 12)
    torch.testing.assert_close(model.torch_module(x), net(x))


def test_the_archive_layout_before_torch_2_8(tmp_path: Path) -> None:
    net = network()
    new, old = save_export(tmp_path / "new.pt2", net), tmp_path / "old.pt2"
    weights = io.BytesIO()
    torch.save({**dict(net.named_parameters()), **dict(net.named_buffers())}, weights)
    with zipfile.ZipFile(new) as archive, zipfile.ZipFile(old, "w") as target:
        program = archive.read("new/models/model.json")
        version = json.loads(program)["schema_version"]
        target.writestr("version", f"{version['major']}.{version['minor']}")
        target.writestr("serialized_exported_program.json", program)
        target.writestr("serialized_state_dict.pt", weights.getvalue())
        target.writestr("serialized_constants.pt", b"")
        target.writestr("serialized_example_inputs.pt", b"not even a pickle")
    assert file_kind(old) == "export"
    torch.testing.assert_close(outputs(load(old).torch_module, 3), outputs(net, 3))


def test_a_half_precision_program_becomes_float32(tmp_path: Path) -> None:
    class Casting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(x.to(torch.float16))

    path = tmp_path / "half.pt2"
    net = Casting().half().eval()
    torch.export.save(torch.export.export(net, (torch.randn(1, 3).half(),)), path)
    model = load(path)
    assert "float16 converted to float32" in model.source
    assert model.inputs[0].dtype == "float32"
    x = torch.randn(1, 3)
    torch.testing.assert_close(model.torch_module(x), net.float().fc(x))


@pytest.mark.parametrize("how", ["script", "trace"])
def test_torchscript(tmp_path: Path, how: str) -> None:
    net, path = network(), tmp_path / "net.pt"
    if how == "script":
        save_script(path, net)
    else:
        torch.jit.save(torch.jit.trace(net, torch.randn(1, 3, 8, 8)), path)
    model = load(path, inputs=[SHAPE])
    assert model.inputs == (TensorSpec("x", (1, 3, 8, 8)),)
    assert {n for n, _ in model.torch_module.named_parameters()} == {
        n for n, _ in net.named_parameters()
    }
    for batch in (1, 3):
        torch.testing.assert_close(outputs(model.torch_module, batch), outputs(net, batch))


def test_torchscript_without_input_asks_for_it(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"--input 1x3x224x224"):
        load(save_script(tmp_path / "net.pt", plain_network()))


def test_onnx_keeps_its_graph_and_names_the_batch(tmp_path: Path) -> None:
    path = save_onnx(tmp_path / "net.onnx", ["N", 3, 8, 8])
    model = load(path)
    assert model.inputs == (TensorSpec("x", (BATCH, 3, 8, 8)),)
    assert model.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    x = np.random.default_rng(0).standard_normal((2, 3, 8, 8)).astype(np.float32)
    proto = ir.to_proto(model.graph_model)
    assert [value.name for value in proto.graph.input] == ["x"]
    assert proto.graph.input[0].type.tensor_type.shape.dim[0].dim_param == BATCH
    results = [
        ort.InferenceSession(data, providers=["CPUExecutionProvider"]).run(None, {"x": x})[0]
        for data in (proto.SerializeToString(), path.read_bytes())
    ]
    np.testing.assert_allclose(*results, rtol=1e-4, atol=1e-5)


def test_onnx_objects_load_like_files_and_stay_as_they_are() -> None:
    proto = onnx_model(["N", 3, 8, 8])
    graph_model = ir.from_proto(proto)
    for source in (proto, graph_model):
        assert load(source).inputs == (TensorSpec("x", (BATCH, 3, 8, 8)),)
    assert proto.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "N"
    assert str(graph_model.graph.inputs[0].shape) == "[N,3,8,8]"


def test_an_old_opset_is_converted_and_said(tmp_path: Path) -> None:
    model = load(save_onnx(tmp_path / "net.onnx", [1, 3, 8, 8], opset=9))
    assert model.graph_model.graph.opset_imports[""] >= 13
    assert "opset 9 converted to 13" in model.source


def test_a_quantized_onnx_model_is_said_to_be_one() -> None:
    graph = helper.make_graph(
        [
            helper.make_node("QuantizeLinear", ["x", "s"], ["q"]),
            helper.make_node("DequantizeLinear", ["q", "s"], ["y"]),
        ],
        "net",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1, 3])],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1, 3])],
        [onnx.numpy_helper.from_array(np.float32(0.1), "s")],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    assert load(proto).source.endswith("already quantized")


def test_onnx_with_weights_in_a_file_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    onnx.save(
        onnx_model([1, 3, 8, 8]), path, save_as_external_data=True, location="w", size_threshold=0
    )
    model = load(path)
    expected = ort.InferenceSession(path).run(None, model.example())
    engine = OnnxRuntime(threads=1).build(model)
    (saved,) = engine.save(tmp_path)
    (tmp_path / "w").write_bytes(b"123")
    with pytest.raises(LoadError, match="truncated"):
        load(path)
    (tmp_path / "w").unlink()
    with pytest.raises(LoadError, match="not beside it"):
        load(path)
    got = OnnxRuntime(threads=1).build(load(saved))(model.example())
    np.testing.assert_allclose(next(iter(got.values())), expected[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["torch", "module", "safetensors", "checkpoint", "legacy"])
def test_weights_with_a_factory(kind: str, here: Path) -> None:
    net, path = nn.Linear(3, 5), here / "weights.bin"
    if kind == "safetensors":
        save_file = pytest.importorskip("safetensors.torch").save_file
        save_file(net.state_dict(), path)
    elif kind == "legacy":
        torch.save(net.state_dict(), path, _use_new_zipfile_serialization=False)
    else:
        held = {
            "torch": net.state_dict(),
            "module": net,
            "checkpoint": {
                "epoch": 3,
                "state_dict": {f"module.{k}": v for k, v in net.state_dict().items()},
            },
        }[kind]
        torch.save(held, path)
    model = load(path, factory="nets:small", inputs=["1x3"])
    x = torch.randn(2, 3)
    torch.testing.assert_close(model.torch_module(x), net(x))
    assert model.name == "weights"


def test_a_pickled_module_of_torch_classes_needs_no_trust(tmp_path: Path) -> None:
    net = nn.Sequential(plain_network(), nn.Unflatten(1, (1, 5)), nn.LSTM(5, 2))
    layer = nn.TransformerEncoderLayer(8, 2, dim_feedforward=8)
    torch.save(net, tmp_path / "net.pt")
    torch.save(layer, tmp_path / "layer.pt")
    loaded = load(tmp_path / "net.pt", inputs=[SHAPE]).torch_module
    torch.testing.assert_close(outputs(loaded[0]), outputs(net[0]))
    assert not loaded.training
    load(tmp_path / "layer.pt", inputs=["1x4x8"])


def test_a_factory_without_a_file(here: Path) -> None:
    model = load(None, factory="nets:small", inputs=["1x3"])
    assert (model.name, model.inputs) == ("small", (TensorSpec("input", (1, 3)),))
    assert str(here) not in sys.path


def test_a_module_is_copied_and_set_to_inference() -> None:
    net = nn.Sequential(nn.Linear(3, 2), nn.Dropout()).double().train()
    model = load(net, inputs=["1x3"])
    assert "float64 converted to float32" in model.source
    assert not model.torch_module.training
    assert net.training
    assert next(net.parameters()).dtype is torch.float64


def test_a_loaded_model_loads_again_with_other_inputs() -> None:
    model = load(onnx_model(["N", 3, 8, 8]))
    assert load(model) == model
    assert load(model, inputs=["4x3x8x8"]).inputs[0].shape == (4, 3, 8, 8)


# --- what goes wrong --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("factory", "words"),
    [
        ("nets", "is no factory"),
        ("nets:smal", "Did you mean 'small'"),
        ("no_such_module:f", "cannot be imported"),
        ("nets:needs", "without arguments failed"),
        ("nets:text", "made a str"),
        ("nets:number", "cannot be called"),
    ],
)
@pytest.mark.usefixtures("here")
def test_bad_factories(factory: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        load(None, factory=factory, inputs=["1x3"])


def test_weights_that_do_not_fit_name_the_keys(here: Path) -> None:
    torch.save({"weight": torch.zeros(5, 3), "gain": torch.zeros(1)}, here / "w.pt")
    with pytest.raises(LoadError, match=r"1 keys are missing: bias; 1 keys are unexpected: gain"):
        load(here / "w.pt", factory="nets:small", inputs=["1x3"])
    torch.save(nn.Linear(3, 5).state_dict(), here / "w.pt")
    with pytest.raises(LoadError, match=r"2 shapes differ: weight is \(5, 3\)"):
        load(here / "w.pt", factory="nets:wide", inputs=["1x3"])


@pytest.mark.parametrize("held", [[1, 2], {"epoch": 3}, {}], ids=["list", "numbers", "empty"])
def test_torch_files_without_a_model(tmp_path: Path, held: object) -> None:
    torch.save(held, tmp_path / "x.pt")
    with pytest.raises(LoadError, match="no model and no state_dict"):
        load(tmp_path / "x.pt")


def test_weights_alone_ask_for_the_architecture(tmp_path: Path) -> None:
    torch.save(plain_network().state_dict(), tmp_path / "w.pt")
    with pytest.raises(UsageError, match=r"0\.weight, 0\.bias, .*--model module:factory"):
        load(tmp_path / "w.pt", inputs=[SHAPE])


def test_a_factory_with_a_file_that_needs_none(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="holds its own architecture"):
        load(save_onnx(tmp_path / "n.onnx", [1, 3, 8, 8]), factory="nets:small")


def test_missing_files_and_folders(tmp_path: Path) -> None:
    save_onnx(tmp_path / "resnet18.onnx", [1, 3, 8, 8])
    with pytest.raises(LoadError, match=r"Did you mean resnet18\.onnx"):
        load(tmp_path / "resnet81.onnx")
    with pytest.raises(LoadError, match="does not exist either"):
        load(tmp_path / "nowhere" / "x.onnx")
    with pytest.raises(LoadError, match="is a folder"):
        load(tmp_path)


def test_nothing_and_no_model_at_all() -> None:
    with pytest.raises(UsageError, match="nothing to load"):
        load(None)
    with pytest.raises(UsageError, match="int is no model"):
        load(3)  # type: ignore[arg-type]


# --- shapes -----------------------------------------------------------------------------------


def test_inputs_follow_the_signature() -> None:
    model = load(TwoInputs(), inputs=["ids:1x4:int64", "1x4x3"])
    assert [str(spec) for spec in model.inputs] == ["x:1x4x3:float32", "ids:1x4:int64"]


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ([], "does not say what shape its inputs"),
        (["1x4x3"], "ids must be given"),
        (["y:1x4x3"], "no input called 'y'"),
        (["1x4x3", "1x4", "1"], "given 3 times"),
        (["x:1x3", "x:1x3"], "given twice"),
        (["x:1xbatch"], "only the first axis"),
    ],
)
def test_wrong_inputs_of_a_module(inputs: list[str], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        load(TwoInputs(), inputs=inputs)


def test_photographs_are_assumed_for_a_script_that_begins_with_three_channels(
    tmp_path: Path,
) -> None:
    network = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten()
    )
    torch.jit.save(torch.jit.script(network.eval()), tmp_path / "net.pt")
    model = load(tmp_path / "net.pt")
    assert [str(spec) for spec in model.inputs] == ["input:1x3x224x224:float32"]
    assert model.inputs[0].assumed
    (remark,) = data_remarks({"ranges_from": ""}, to_onnx(model, 21))
    assert "input:batchx3x224x224:float32" in remark
    with pytest.raises(DataError, match=r"3x32x32; .* 3x224x224 was assumed. Give --input"):
        load_data(np.zeros((2, 3, 32, 32), np.float32), model.inputs)
    assert not load(tmp_path / "net.pt", inputs=["1x3x8x8"]).inputs[0].assumed


def test_nothing_is_assumed_for_other_scripts(tmp_path: Path) -> None:
    torch.jit.save(torch.jit.script(torch.nn.Linear(3, 4)), tmp_path / "net.pt")
    with pytest.raises(UsageError, match="does not say what shape its input"):
        load(tmp_path / "net.pt")


def test_inputs_that_contradict_the_file_name_both(tmp_path: Path) -> None:
    path = save_export(tmp_path / "net.pt2", plain_network())
    with pytest.raises(UsageError, match=r"1x3x9x9.*contradicts net\.pt2.*x3x8x8"):
        load(path, inputs=["1x3x9x9"])
    assert load(path, inputs=["5x3x8x8"]).inputs[0].shape == (5, 3, 8, 8)


def test_open_axes_of_onnx_must_be_pinned() -> None:
    proto = onnx_model(["N", 3, "H", 8])
    with pytest.raises(UsageError, match=r"axis 2 of input x:Nx3xHx8"):
        load(proto)
    model = load(proto, inputs=["batchx3x6x8"])
    assert model.inputs == (TensorSpec("x", (BATCH, 3, 6, 8)),)
    (output,) = model.graph_model.graph.outputs
    assert output.shape is not None
    assert [str(size) for size in output.shape] == [BATCH, "4", "4", "6"]


def test_nonsense_sizes_of_onnx_count_as_open() -> None:
    assert load(onnx_model([0, 3, 8, 8])).inputs[0].shape == (BATCH, 3, 8, 8)
    assert load(onnx_model([-1, 3, 8, 8])).inputs[0].shape == (BATCH, 3, 8, 8)


def test_nested_inputs_of_a_program_are_unsupported(tmp_path: Path) -> None:
    class Nested(nn.Module):
        def forward(self, pair: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
            return pair[0] + pair[1]

    program = torch.export.export(Nested(), ((torch.randn(2), torch.randn(2)),))
    torch.export.save(program, tmp_path / "n.pt2")
    with pytest.raises(UnsupportedError, match="no plain tensor argument"):
        load(tmp_path / "n.pt2")


def test_a_script_that_takes_numbers_is_unsupported(tmp_path: Path) -> None:
    class Scaled(nn.Module):
        def forward(self, x: torch.Tensor, rate: int) -> torch.Tensor:
            return x * rate

    with pytest.raises(UnsupportedError, match="rate of type int"):
        load(save_script(tmp_path / "s.pt", Scaled()), inputs=["1x3"])


def test_onnx_to_torch() -> None:
    model = load(onnx_model([1, 3, 8, 8]))
    try:
        converted = to_torch(model)
    except MissingExtraError as error:
        pytest.skip(str(error))
    session = ort.InferenceSession(
        ir.to_proto(model.graph_model).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    arrays = model.example()
    result = converted.torch_module(torch.from_numpy(arrays["x"]))
    torch.testing.assert_close(
        result.detach(), torch.from_numpy(session.run(None, arrays)[0]), rtol=1e-4, atol=1e-5
    )
    assert [step.name for step in converted.history] == ["onnx2torch"]
