"""Memory of activations: what the runtimes say themselves, beside what their graphs say."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from compress.export import to_onnx
from compress.liveness import peak
from compress.memory.engines import engine_peak
from compress.model import Model, TensorSpec
from compress.target import MemoryMeasured, Scheduled
from compress.testing import tiny_exported
from targets.heap import heap_in_use
from targets.onnxruntime import OnnxRuntime
from targets.onnxruntime_memory import most_in_use, planned


def _graph(
    *nodes: onnx.NodeProto, weights: dict[str, tuple[int, ...]] | None = None
) -> onnx.ModelProto:
    tensors = [
        numpy_helper.from_array(np.ones(shape, np.float32), name)
        for name, shape in (weights or {}).items()
    ]
    image = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 8, 8])
    result = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    graph = helper.make_graph(list(nodes), "g", [image], [result], tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)])


def test_a_dead_buffer_of_the_same_shape_is_used_again_and_stays_allocated() -> None:
    # The planner keeps a buffer from its first tensor to the last that lies in it.
    model = _graph(
        helper.make_node("Conv", ["x", "w"], ["a"], name="a"),
        helper.make_node("Conv", ["a", "n"], ["b"], name="b"),
        helper.make_node("Conv", ["b", "w3"], ["c"], name="c"),
        helper.make_node("GlobalAveragePool", ["c"], ["y"], name="y"),
        weights={"w": (16, 3, 1, 1), "n": (3, 16, 1, 1), "w3": (16, 3, 1, 1)},
    )
    program = planned(model)
    assert program is not None
    found = peak(program)
    image, wide, narrow = 3 * 64 * 4, 16 * 64 * 4, 3 * 64 * 4
    assert found.bytes == image + wide + narrow
    assert program.steps[2].views == {"c": "a"}


def test_arithmetic_is_not_done_in_place_and_activations_are() -> None:
    model = _graph(
        helper.make_node("Conv", ["x", "w"], ["a"], name="a"),
        helper.make_node("Add", ["a", "w"], ["b"], name="b"),
        helper.make_node("Relu", ["b"], ["c"], name="c"),
        helper.make_node("GlobalAveragePool", ["c"], ["y"], name="y"),
        weights={"w": (3, 3, 1, 1)},
    )
    model.graph.node[1].input[1] = "s"
    model.graph.initializer.append(numpy_helper.from_array(np.ones((3, 1, 1), np.float32), "s"))
    program = planned(model)
    assert program is not None
    assert program.steps[1].writes == ("b",)
    assert program.steps[2].views == {"c": "b"}


def test_a_symbolic_batch_is_followed_through_arithmetic_on_sizes() -> None:
    model = _graph(
        helper.make_node("Shape", ["x"], ["s"], end=1),
        helper.make_node("Concat", ["s", "rest"], ["shape"], axis=0),
        helper.make_node("Reshape", ["x", "shape"], ["flat"]),
        helper.make_node("Transpose", ["flat"], ["across"]),
        helper.make_node("Relu", ["across"], ["y"]),
    )
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_param = "batch"
    model.graph.initializer.append(numpy_helper.from_array(np.array([-1]), "rest"))
    program = planned(model, batch=5)
    assert program is not None
    assert program.sizes["across"] == 5 * 3 * 64 * 4
    assert program.sizes["shape"] == 16


def test_sizes_without_a_name_share_no_buffer() -> None:
    model = _graph(
        helper.make_node("Transpose", ["x"], ["a"], perm=[0, 1, 3, 2]),
        helper.make_node("Softmax", ["a"], ["b"]),
        helper.make_node("GlobalAveragePool", ["b"], ["y"]),
    )
    size = model.graph.input[0].type.tensor_type.shape.dim[0]
    size.dim_param = "batch"
    named = planned(model)
    for name in ("a", "b"):
        unnamed = helper.make_tensor_value_info(name, TensorProto.FLOAT, [None, 3, 8, 8])
        model.graph.value_info.append(unnamed)
    unknown = planned(model)
    assert named is not None
    assert unknown is not None
    assert named.steps[1].views == {"b": "a"}
    assert unknown.steps[1].writes == ("b",)


def test_an_unknown_kernel_is_not_guessed_at() -> None:
    node = helper.make_node("Riddle", ["x"], ["y"], name="r", domain="nobody")
    assert planned(_graph(node)) is None


def test_a_profile_without_figures_says_nothing() -> None:
    assert most_in_use([{"cat": "Node", "args": {"op_name": "Conv"}}]) is None


@pytest.mark.skipif(heap_in_use() is None, reason="the C library does not count")
def test_the_heap_grows_with_what_is_allocated() -> None:
    before = heap_in_use()
    array = np.ones(4_000_000, np.uint8)
    after = heap_in_use()
    assert before is not None
    assert after is not None
    assert after - before >= array.nbytes


def test_onnxruntime_estimates_what_it_takes() -> None:
    model = tiny_exported(21)
    engine = OnnxRuntime(threads=1).build(model)
    assert isinstance(engine, Scheduled)
    assert isinstance(engine, MemoryMeasured)
    found, account = engine_peak(engine), engine.memory_in_use(model.example())
    assert found is not None
    # Arithmetic on the batch size is folded away in the estimate.
    assert account == pytest.approx(found.bytes, abs=32)


def test_onnxruntime_estimates_a_transformer_with_a_symbolic_batch() -> None:
    layer = torch.nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
    spec = TensorSpec("x", ("batch", 6, 16))
    model = to_onnx(Model(layer, (spec,), "block"), 21)
    engine = OnnxRuntime(threads=1).build(model)
    found, account = engine_peak(engine), engine.memory_in_use(model.example(1))
    assert found is not None
    assert account == found.bytes


@pytest.mark.skipif(heap_in_use() is None, reason="the C library does not count")
def test_openvino_estimates_what_it_gives_back() -> None:
    target = pytest.importorskip("targets.openvino").OpenVINO(threads=1)
    if not target.check().available:
        pytest.skip(target.check().reason)
    model = tiny_exported(21)
    engine = target.build(model)
    found, account = engine_peak(engine), engine.memory_in_use(model.example())
    assert found is not None
    assert account is not None
    # Blocks of memory begin at whole cache lines, which shows in a network of a few kB.
    assert abs(account - found.bytes) < 1024 + 0.1 * found.bytes


@pytest.mark.skipif(heap_in_use() is None, reason="the C library does not count")
def test_executorch_counts_its_plan_and_xnnpacks_workspace() -> None:
    target = pytest.importorskip("targets.executorch").ExecuTorch(threads=1)
    if not target.check().available:
        pytest.skip(target.check().reason)
    model = tiny_exported(21)
    engine = target.build(model)
    account = engine.memory_in_use(model.example())
    assert account is not None
    # At least the image and what the first convolution writes.
    assert account >= 4 * (3 * 16 * 16 + 16 * 8 * 8)
