from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir
import pytest
import torch
from torch import nn

from compress.data import load_data
from compress.errors import ExportError, UnsupportedError
from compress.export import check_export, to_onnx
from compress.graph import name_sites
from compress.loading import load
from compress.model import Model, TensorSpec
from compress.reference import reference_session, run
from compress.testing import IMAGE, tiny_convnet

OPSET = 21
VECTOR = TensorSpec("x", (1, 4))


def names(model: Model) -> list[str]:
    return [node.name or "" for node in model.graph_model.graph]


def model_of(module: nn.Module, *inputs: TensorSpec) -> Model:
    return Model(module.eval(), inputs, "net")


class Scaled(nn.Module):
    """Several inputs of several types, and several outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(2, 4)

    def forward(
        self, ids: torch.Tensor, x: torch.Tensor, mask: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        mixed = self.table(ids) * x
        return {"mixed": torch.where(mask, mixed, torch.zeros_like(mixed)), "total": mixed.sum(1)}


class FixedView(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(torch.relu(x).view(1, -1))


class Random(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.rand_like(x)


class Branching(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 1 if float(x.sum()) > 0 else x - 1


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3)
        self.conv2 = nn.Conv2d(4, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.conv1(x))
        return torch.relu(y + self.conv2(y))


def test_operators_are_named_after_their_modules(exported: Model) -> None:
    expected = {"0", "1", "2", "4.depthwise", "4.bn1", "4/Relu", "4.pointwise", "4.bn2", "4/Add"}
    assert expected | {"4/Relu.1", "5", "6", "8"} <= set(names(exported))
    assert len(set(names(exported))) == len(names(exported))


def test_names_do_not_depend_on_what_else_is_in_the_graph() -> None:
    alone = to_onnx(model_of(nn.Sequential(Inner()), IMAGE), OPSET)
    longer = nn.Sequential(Inner(), nn.Conv2d(4, 2, 1), nn.ReLU(), behind())
    together = to_onnx(model_of(longer, IMAGE), OPSET)
    assert {"0.conv1", "0/Relu", "0.conv2", "0/Add", "0/Relu.1"} <= set(names(alone))
    assert set(names(alone)) <= set(names(together))


def behind() -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 2, 1), nn.ReLU())


def test_a_program_that_was_exported_before_keeps_its_layer_names() -> None:
    program = torch.export.export(tiny_convnet(), (torch.zeros(1, 3, 16, 16),), strict=False)
    again = to_onnx(load(program), OPSET)
    assert {"0", "4.depthwise", "4.pointwise", "8"} <= set(names(again))
    assert again.inputs[0].shape == (1, 3, 16, 16)  # torch.export.export fixes what it is given


def test_the_batch_is_dynamic_where_the_model_allows(exported: Model) -> None:
    assert exported.inputs[0].shape == ("batch", 3, 16, 16)
    assert exported.dynamic_batch
    assert exported.history[-1].details["dynamic_batch"] is True
    for batch in (1, 2, 5):
        (out,) = run(reference_session(exported.graph_model), exported.example(batch)).values()
        assert out.shape == (batch, 10)


def test_the_symbol_is_called_batch_everywhere(exported: Model) -> None:
    symbols = {
        str(size)
        for node in exported.graph_model.graph
        for out in node.outputs
        for size in out.shape or ()
        if not isinstance(size, int)
    }
    assert symbols == {"batch"}


def test_a_model_with_a_fixed_batch_is_exported_with_it() -> None:
    exported = to_onnx(model_of(FixedView(), VECTOR), OPSET)
    assert exported.inputs[0].shape == (1, 4)
    assert not exported.dynamic_batch
    assert exported.history[-1].details["dynamic_batch"] is False


def test_a_batch_that_was_asked_for_is_kept() -> None:
    exported = to_onnx(model_of(nn.Linear(4, 2), TensorSpec("x", (6, 4))), OPSET)
    assert exported.inputs[0].shape == (6, 4)


def test_several_inputs_keep_names_order_and_types() -> None:
    specs = (
        TensorSpec("ids", (1, 5), "int64"),
        TensorSpec("x", (1, 5, 4)),
        TensorSpec("mask", (1, 5, 1), "bool"),
    )
    exported = to_onnx(model_of(Scaled(), *specs), OPSET)
    assert [spec.name for spec in exported.inputs] == ["ids", "x", "mask"]
    assert [spec.dtype for spec in exported.inputs] == ["int64", "float32", "bool"]
    graph = exported.graph_model.graph
    assert [value.name for value in graph.inputs] == ["ids", "x", "mask"]
    outputs = run(reference_session(exported.graph_model), exported.example(3))
    assert [array.shape for array in outputs.values()] == [(3, 5, 4), (3, 4)]


def test_the_difference_from_the_original_is_reported(exported: Model) -> None:
    details = exported.history[-1].details
    assert 0 <= details["max_abs_difference"] < 1e-4 * details["max_abs_output"]


def test_the_export_is_compared_on_calibration_inputs_too() -> None:
    model = model_of(nn.Linear(4, 2), VECTOR)
    data = load_data(torch.full((3, 4), 100.0), model.inputs)
    details = to_onnx(model, OPSET, data=data).history[-1].details
    assert details["max_abs_difference_on_calibration"] < 1e-3


def test_less_data_than_a_fixed_batch_are_no_comparison() -> None:
    model = model_of(nn.Linear(4, 2), TensorSpec("x", (6, 4)))
    data = load_data(torch.ones(2, 4), model.inputs)
    details = to_onnx(model, OPSET, data=data).history[-1].details
    assert "max_abs_difference_on_calibration" not in details


def test_random_outputs_are_refused() -> None:
    with pytest.raises(ExportError, match="randomness"):
        to_onnx(model_of(Random(), VECTOR), OPSET)


def test_eval_mode_is_what_is_exported() -> None:
    module = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 2))
    model = Model(module.train(), (VECTOR,), "net")
    assert to_onnx(model, OPSET).history[-1].details["max_abs_difference"] < 1e-5


def test_an_export_of_something_else_is_refused() -> None:
    # What a pass that confuses two models would leave.
    one, other = (model_of(nn.Linear(4, 2), VECTOR) for _ in range(2))
    exported = to_onnx(one, OPSET)
    with pytest.raises(ExportError, match="differs from the original by"):
        check_export(other, exported, [exported.example(2)])
    wider = model_of(nn.Linear(4, 3), VECTOR)
    with pytest.raises(ExportError, match=r"returns shape \(2, 2\)"):
        check_export(wider, exported, [exported.example(2)])


class Outputs(nn.Module):
    """A layer, and whatever else a function makes of its output."""

    def __init__(self, function: Callable[[torch.Tensor], object]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> object:
        return self.function(x)


def test_minus_infinity_in_the_same_places_is_no_difference() -> None:
    masked = Outputs(lambda x: torch.where(x > 0, x, torch.full_like(x, -torch.inf)))
    details = to_onnx(model_of(masked, VECTOR), OPSET).history[-1].details
    assert details["max_abs_difference"] == 0
    assert 0 < details["max_abs_output"] < 10


def test_nan_where_the_original_has_numbers_is_refused() -> None:
    logarithm = to_onnx(model_of(Outputs(torch.log), VECTOR), OPSET)
    original = model_of(Outputs(lambda x: torch.log(x.abs())), VECTOR)
    with pytest.raises(ExportError, match="differs from the original by inf"):
        check_export(original, logarithm, [logarithm.example(3)])


@pytest.mark.parametrize(
    "function",
    [lambda x: (torch.relu(x),) * 2, lambda x: (torch.relu(x), x.shape[0])],
    ids=["one tensor twice", "a size"],
)
def test_outputs_that_onnx_cannot_name_are_refused(
    function: Callable[[torch.Tensor], object],
) -> None:
    with pytest.raises(ExportError, match="nothing but tensors"):
        to_onnx(model_of(Outputs(function), VECTOR), OPSET)


def test_data_dependent_control_flow_is_refused() -> None:
    with pytest.raises(UnsupportedError, match=r"torch\.export cannot capture net") as caught:
        to_onnx(model_of(Branching(), VECTOR), OPSET)
    assert "\n" not in str(caught.value)
    assert "pass the .onnx file" in str(caught.value)


def test_an_onnx_model_comes_back_unchanged(exported: Model) -> None:
    assert to_onnx(exported, OPSET) is exported


def test_the_opset_is_the_one_asked_for() -> None:
    exported = to_onnx(model_of(nn.Linear(4, 2), VECTOR), 18)
    assert exported.graph_model.graph.opset_imports[""] == 18


def test_nothing_of_this_machine_is_in_the_file(exported: Model) -> None:
    data = ir.to_proto(exported.graph_model).SerializeToString()
    for trace in (b".py", b"site-packages", b"File ", b"stack_trace", b"/home", b"/usr"):
        assert trace not in data


def test_weights_keep_their_names(exported: Model) -> None:
    held = set(exported.graph_model.graph.initializers)
    assert {"0.weight", "0.bias", "4.depthwise.weight", "8.weight", "8.bias"} <= held


def test_repeated_names_of_a_graph_are_numbered(exported: Model) -> None:
    for node in exported.graph_model.graph:
        node.name = None if node.op_type == "Clip" else "same"
    name_sites(exported.graph_model)
    assert len(set(names(exported))) == len(names(exported))
    assert {"Clip", "same", "same.1"} <= set(names(exported))
