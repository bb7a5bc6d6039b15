from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from compress.errors import UsageError
from compress.model import DTYPES, Model, Step, TensorSpec


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("1x3x224x224", TensorSpec("", (1, 3, 224, 224))),
        ("batchx3x8x8", TensorSpec("", ("batch", 3, 8, 8))),
        ("ids:1x128", TensorSpec("ids", (1, 128))),
        ("ids:1x128:int64", TensorSpec("ids", (1, 128), "int64")),
        ("1x128:int64", TensorSpec("", (1, 128), "int64")),
        ("scale:scalar", TensorSpec("scale", ())),
        (" 4 ", TensorSpec("", (4,))),
    ],
)
def test_parse(text: str, spec: TensorSpec) -> None:
    assert TensorSpec.parse(text) == spec


@pytest.mark.parametrize(
    "text",
    ["", "x", "1x", "1x0x3", "1x-3", "1xx3", "a:b:c", "1x3:float31", "n:1x3:int64:1", "1,3,8,8",
     "1x3x1e3", "ids:"],
)  # fmt: skip
def test_parse_refuses(text: str) -> None:
    with pytest.raises(UsageError, match="is not an input shape") as caught:
        TensorSpec.parse(text)
    assert "1x3x224x224" in str(caught.value)


@given(
    name=st.sampled_from(["", "x", "input.1"]),
    shape=st.lists(st.integers(1, 999), max_size=4),
    dynamic=st.booleans(),
    dtype=st.sampled_from(DTYPES),
)
def test_the_text_of_a_spec_reads_back(
    name: str, shape: list[int], dynamic: bool, dtype: str
) -> None:
    sizes = ("batch", *shape) if dynamic else tuple(shape)
    spec = TensorSpec(name, sizes, dtype)
    assert TensorSpec.parse(str(spec).removeprefix(":")) == spec


def test_a_dynamic_batch_is_one_by_default() -> None:
    spec = TensorSpec("x", ("batch", 3))
    assert spec.dynamic_batch
    assert (spec.concrete(), spec.concrete(7)) == ((1, 3), (7, 3))
    assert not TensorSpec("x", (4, 3)).dynamic_batch
    assert not TensorSpec("x", ()).dynamic_batch


@pytest.mark.parametrize(
    ("shapes", "dynamic"),
    [
        ([("batch", 3)], True),
        ([("batch", 3), ()], True),
        ([("batch", 3), (1, 3)], False),
        ([(1, 3)], False),
        ([()], False),
    ],
    ids=["one", "with a scalar", "one of two", "fixed", "scalar only"],
)
def test_dynamic_batch_of_a_model(shapes: list[tuple[int | str, ...]], dynamic: bool) -> None:
    specs = tuple(TensorSpec(str(index), shape) for index, shape in enumerate(shapes))
    assert Model(torch.nn.ReLU(), specs, "m").dynamic_batch is dynamic


def test_examples_repeat_and_have_the_right_types() -> None:
    specs = (TensorSpec("x", ("batch", 3)), TensorSpec("ids", ("batch", 5), "int64"))
    model = Model(torch.nn.ReLU(), specs, "m")
    arrays, again = model.example(4), model.example(4)
    assert {name: (a.shape, a.dtype.name) for name, a in arrays.items()} == {
        "x": ((4, 3), "float32"),
        "ids": ((4, 5), "int64"),
    }
    assert set(np.unique(arrays["ids"])) <= {0, 1}
    np.testing.assert_array_equal(arrays["x"], again["x"])
    assert not np.array_equal(arrays["x"], model.example(4, seed=1)["x"])


def test_stage_and_history() -> None:
    model = Model(torch.nn.ReLU(), (), "m")
    graph = ir.Model(ir.Graph([], [], nodes=[], name="g"), ir_version=10)
    assert model.stage == "torch"
    with pytest.raises(TypeError, match="export it first"):
        _ = model.graph_model
    done = model.evolve(graph, Step("export"))
    assert done.stage == "onnx"
    assert [step.name for step in done.history] == ["export"]
    assert model.history == ()
    with pytest.raises(TypeError, match="needs a torch module"):
        _ = done.torch_module
