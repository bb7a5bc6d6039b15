from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.data import Data, load_data
from compress.errors import UnsupportedError, UsageError
from compress.fine_tuning import Course
from compress.graph import infer_shapes
from compress.model import Model
from compress.passes import Context
from compress.recovery import Recover, squared_error
from compress.reference import reference_session, run
from compress.registry import create_pass, create_target
from compress.reparam.activations import RemoveActivations
from compress.reparam.activations_graph import (
    Segment,
    as_linear,
    as_merged,
    find_segments,
    move_padding,
    nodes_of,
)
from compress.reparam.activations_search import Changes, Tried, choose, judge
from compress.reparam.activations_training import Annealed, Annealing, student_of
from compress.reparam.affine import AffineMap, Axis
from compress.rewrites import with_constants
from compress.testing import NullTarget, PassContract, tiny_exported
from compress.torch_graph.network import Network

TARGET = create_target("onnxruntime", threads=1)
Build = Callable[..., Model]
NARROW = """
    narrow (float[n, 8, 12, 12] x) => (float[n, 5] y) {
        [expand] h = Conv(x, w1, b1)
        [first] r = Relu(h)
        [window] c = Conv<group=96, pads=[1,1,1,1]>(r, w2, b2)
        [second] s = Clip(c, low, high)
        [project] p = Conv(s, w3, b3)
        [last] t = Relu(p)
        [pool] g = GlobalAveragePool(t)
        [flat] f = Flatten(g)
        [head] y = Gemm<transB=1>(f, w4, b4)
    }
"""


@pytest.fixture
def narrow(onnx_model: Build) -> Model:
    """An inverted residual block whose inside is twelve times as wide: one 3x3 layer is faster."""
    low, high = np.array(0, np.float32), np.array(6, np.float32)
    weights = {"w1": (96, 8, 1, 1), "w2": (96, 1, 3, 3), "w3": (8, 96, 1, 1), "w4": (5, 8)}
    shifts = {"b1": (96,), "b2": (96,), "b3": (8,), "b4": (5,)}
    return onnx_model(NARROW, low=low, high=high, **weights, **shifts)


def images(model: Model, count: int = 96) -> Data:
    return load_data(next(iter(model.example(count).values())), model.inputs)


def outputs(model: Model, batch: int = 3) -> np.ndarray:
    return next(iter(run(reference_session(model.graph_model), model.example(batch)).values()))


def scores(model: Model) -> np.ndarray:
    """What a softmax makes of the outputs does not depend on their mean."""
    found = outputs(model, 64)
    return found - found.mean(1, keepdims=True)


def context(model: Model, data: Data | None) -> Context:
    return Context(target=TARGET, original=model, training=data)


def kinds(model: Model) -> list[str]:
    return [node.op_type for node in model.graph_model.graph]


def block(first: str, second: str) -> str:
    return f"""net (float[n, 4, 9, 10] x) => (float[n, 6, p, q] y) {{
        [one] h = Conv<{first}>(x, w1, b1)
        [act] r = Relu(h)
        [two] y = Conv<{second}>(r, w2, b2)
    }}"""


@given(
    kernels=st.tuples(st.sampled_from([1, 3]), st.sampled_from([1, 3])),
    pads=st.tuples(st.integers(0, 2), st.integers(0, 2), st.integers(0, 2), st.integers(0, 2)),
    strides=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    groups=st.tuples(st.sampled_from([1, 2]), st.sampled_from([1, 2])),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=40, deadline=None)
def test_layers_padded_in_front_of_the_first_are_one_layer(
    kernels: tuple[int, int],
    pads: tuple[int, int, int, int],
    strides: tuple[int, int],
    groups: tuple[int, int],
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x, w1, b1 = normal(2, 4, 9, 10), normal(8, 4 // groups[0], *[kernels[0]] * 2), normal(8)
    w2, b2 = normal(6, 8 // groups[1], *[kernels[1]] * 2), normal(6)
    begin, end = pads[0] + strides[0] * pads[2], pads[1] + strides[0] * pads[3]
    padded = F.pad(x, [begin, end, begin, end])
    inner = F.conv2d(padded, w1, b1, strides[0], groups=groups[0])
    expected = F.conv2d(inner, w2, b2, strides[1], groups=groups[1])

    first = [Axis.of(kernels[0], strides[0], 1, begin, end, n) for n in (9, 10)]
    second = [Axis.of(kernels[1], strides[1], 1, 0, 0, n) for n in inner.shape[2:]]
    one = AffineMap.of(w1.numpy(), b1.numpy(), groups[0], first)
    two = AffineMap.of(w2.numpy(), b2.numpy(), groups[1], second)
    whole = one.then(two)
    stride, places = strides[0] * strides[1], whole.geometry.axes
    assert [axis.pads for axis in places] == [(begin, end)] * 2 or stride > 1
    got = F.conv2d(
        F.pad(x, [p for axis in reversed(places) for p in axis.pads]),
        torch.from_numpy(whole.weight),
        torch.from_numpy(whole.bias),
        stride,
        dilation=[axis.step for axis in places],
        groups=whole.geometry.groups,
    )
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("first", "second", "w1", "w2", "kernel"),
    [
        ("kernel_shape=[1,1]", "kernel_shape=[1,1]", (8, 4, 1, 1), (6, 8, 1, 1), (1, 1)),
        ("pads=[1,1,1,1]", "kernel_shape=[1,1]", (8, 4, 3, 3), (6, 8, 1, 1), (3, 3)),
        ("kernel_shape=[1,1]", "pads=[1,1,1,1]", (8, 4, 1, 1), (6, 8, 3, 3), (3, 3)),
        ("pads=[1,1,1,1]", "pads=[1,1,1,1]", (8, 4, 3, 3), (6, 8, 3, 3), (5, 5)),
        ("strides=[2,2], pads=[1,1,1,1]", "pads=[0,1,1,0]", (8, 4, 3, 3), (6, 8, 3, 3), (7, 7)),
        ("auto_pad=\"SAME_UPPER\"", "strides=[2,2]", (8, 4, 3, 3), (6, 8, 3, 3), (5, 5)),
    ],
    ids=["1x1-1x1", "3x3-1x1", "1x1-3x3", "3x3-3x3", "strided", "auto-pad"],
)  # fmt: skip
def test_what_became_linear_is_merged_exactly(
    first: str,
    second: str,
    w1: tuple[int, ...],
    w2: tuple[int, ...],
    kernel: tuple[int, ...],
    onnx_model: Build,
) -> None:
    model = onnx_model(block(first, second), w1=w1, b1=(8,), w2=w2, b2=(6,))
    (segment,), left = find_segments(model, move=True)
    assert segment == Segment(("one", "act", "two"), ("one", "two"), ("act",), segment.macs, kernel)
    assert left == {}
    linear = as_linear(model, [segment], move=True)
    merged, difference = as_merged(linear, [segment])
    assert kinds(linear) == ["Conv", "Conv"]
    assert kinds(merged) == ["Conv"]
    assert difference < 1e-5
    expected = outputs(linear)
    assert expected.shape == outputs(model).shape
    np.testing.assert_allclose(outputs(merged), expected, atol=1e-5 * np.abs(expected).max())


def test_moving_the_padding_changes_nothing_inside(onnx_model: Build) -> None:
    model = onnx_model(
        block("pads=[1,1,1,1]", "pads=[1,1,1,1]"),
        w1=(8, 4, 3, 3), b1=(8,), w2=(6, 8, 3, 3), b2=(6,),
    )  # fmt: skip
    (segment,), _ = find_segments(model, move=True)
    moved = dataclasses.replace(model, program=model.graph_model.clone())
    shapes = infer_shapes(moved.graph_model)
    move_padding(nodes_of(moved.graph_model.graph, segment), shapes)
    got, expected = outputs(moved), outputs(model)
    np.testing.assert_allclose(got[..., 1:-1, 1:-1], expected[..., 1:-1, 1:-1], atol=1e-5)
    assert np.abs(got - expected).max() > 1e-2


@pytest.mark.parametrize(
    ("first", "w1", "reason"),
    [
        ("kernel_shape=[1,1]", (8, 4, 1, 1), "where the first would write its bias"),
        ("pads=[1,1,1,1]", (8, 4, 3, 3), "borders would differ"),
    ],
)
def test_padding_that_may_not_move_is_refused(
    first: str, w1: tuple[int, ...], reason: str, onnx_model: Build
) -> None:
    model = onnx_model(block(first, "pads=[1,1,1,1]"), w1=w1, b1=(8,), w2=(6, 8, 3, 3), b2=(6,))
    segments, left = find_segments(model, move=False)
    assert segments == []
    assert reason in left["act"]


def test_linear_layers_on_tokens(onnx_model: Build) -> None:
    text = """net (float[n, 7, 8] x) => (float[n, 7, 8] y) {
        [fc1] h = MatMul(x, w1)
        [bias1] i = Add(h, b1)
        [act] r = Gelu(i)
        [fc2] o = MatMul(r, w2)
        [bias2] y = Add(o, b2)
    }"""
    model = onnx_model(text, w1=(8, 32), b1=(32,), w2=(32, 8), b2=(8,))
    (segment,), _ = find_segments(model, move=True)
    assert segment.nodes == ("fc1", "bias1", "act", "fc2", "bias2")
    linear = as_linear(model, [segment], move=True)
    merged, _ = as_merged(linear, [segment])
    assert kinds(merged) == ["MatMul", "Add"]
    np.testing.assert_allclose(outputs(merged), outputs(linear), atol=1e-5)


def test_an_activation_behind_a_skip_stays_and_says_why() -> None:
    model = tiny_exported(21)
    model = create_pass("fold_batchnorm").apply(model, context(model, None))
    segments, left = find_segments(model, move=True)
    inside = {name for segment in segments for name in segment.activations}
    relus = [n for n in model.graph_model.graph if n.op_type == "Relu"]
    (behind,) = [n.name for n in relus if n.inputs[0].producer().op_type == "Add"]
    assert behind not in inside
    assert left[behind] == "it follows Add, not a layer"
    assert any("second user" in why or "operators read it" in why for why in left.values())


def test_annealing_ends_linear(narrow: Model) -> None:
    segments, _ = find_segments(narrow, move=True)
    (segment,) = [one for one in segments if len(one.layers) == 3]
    annealed = Annealed()
    student = student_of(narrow, [segment], annealed, move=True)
    x = torch.from_numpy(narrow.example(2)["x"])
    linear = Network(as_linear(narrow, [segment], move=True).graph_model)
    annealed.share = 1.0
    torch.testing.assert_close(student.run({"x": x})["y"], linear.run({"x": x})["y"])
    annealed.share = 0.25
    leaky = annealed({"function": "Relu"}, x)
    torch.testing.assert_close(leaky, F.leaky_relu(x, 0.25))
    course = Annealing.__new__(Annealing)
    course.annealed, course.until = annealed, 0.5
    for progress, share in ((0.0, 0.0), (0.25, 0.5), (0.5, 1.0), (0.9, 1.0)):
        course.begin(progress)
        assert annealed.share == share


def test_padding_stays_until_a_segment_needs_it(narrow: Model) -> None:
    student = student_of(narrow, [], Annealed(), move=True)
    x = narrow.example(2)
    got = student.run({"x": torch.from_numpy(x["x"])})["y"].numpy()
    np.testing.assert_allclose(got, outputs(narrow, 2), atol=1e-5)


@pytest.fixture
def certain(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer multiply-accumulates are faster: what is tested is not the clock."""

    def timed(model: Model, segments: list[Segment], *_: object) -> list[Tried]:
        return [
            Tried(s, float(s.macs[0]), float(s.macs[1]), s.macs[1] < s.macs[0]) for s in segments
        ]

    monkeypatch.setattr("compress.reparam.activations.time_segments", timed)


@pytest.mark.usefixtures("certain")
def test_a_block_becomes_one_layer_and_stays_near_its_teacher(narrow: Model) -> None:
    data = images(narrow)
    step = RemoveActivations(
        share=1.0, steps=120, batch=16, learning_rate=1e-2, max_sensitivity=100, search_seconds=5
    )
    original = dataclasses.replace(narrow, program=narrow.graph_model.clone())
    made = step.apply(narrow, context(original, data))
    details = made.history[-1].details
    assert details["removed"] == ["first", "second"], details["remark"]
    assert kinds(made) == ["Conv", "Relu", "GlobalAveragePool", "Flatten", "Gemm"]
    assert details["speedup"]["verdict"] == "faster"
    assert details["last_loss"] < details["first_loss"]
    whole = _whole(original)
    untrained, _ = as_merged(as_linear(original, whole, True), whole)
    expected = scores(original)
    error = squared_error(scores(made), expected)
    assert error < 0.5 * squared_error(scores(untrained), expected)
    assert "2 activations are removed and 3 layers are 1" in details["remark"]
    assert "held out" in details["remark"]


def _whole(model: Model) -> list[Segment]:
    return [one for one in find_segments(model, True)[0] if len(one.layers) == 3]


def test_nothing_is_applied_where_nothing_gets_faster(onnx_model: Build) -> None:
    model = onnx_model(  # 5x5 with 64 channels takes 1.4 times the MACs of two 3x3 layers
        """net (float[n, 64, 24, 24] x) => (float[n, 64, 24, 24] y) {
            [one] h = Conv<pads=[1,1,1,1]>(x, w1, b1)
            [act] r = Relu(h)
            [two] y = Conv<pads=[1,1,1,1]>(r, w2, b2)
        }""",
        w1=(64, 64, 3, 3), b1=(64,), w2=(64, 64, 3, 3), b2=(64,),
    )  # fmt: skip
    made = RemoveActivations(search_seconds=2).apply(model, context(model, images(model, 8)))
    details = made.history[-1].details
    assert kinds(made) == ["Conv", "Relu", "Conv"]
    assert details["applied"] == 0
    assert "None of 1 merged layers is faster; the closest is one to two" in details["remark"]
    (row,) = details["tried"]
    assert (row["macs_after"] / row["macs_before"], row["kernel"]) == (25 / 18, [5, 5])


def test_the_best_for_their_sensitivity_are_chosen(narrow: Model) -> None:
    segments, _ = find_segments(narrow, True)
    tried = [Tried(s, 10.0, 5.0 - len(s.layers), True) for s in segments]
    judge(narrow, tried, Changes(narrow, images(narrow)), True)
    for one in tried:
        assert one.sensitivity is not None
        assert one.sensitivity > 0
    whole = max(tried, key=lambda one: len(one.segment.layers))
    whole.sensitivity = 1e-9
    assert choose(tried, 2, 1.0) == [whole]
    assert whole not in choose(tried, 1, 100.0)
    assert choose(tried, 2, 1e-12) == []


def test_the_course_holds_the_best_linear_state(narrow: Model) -> None:
    from compress.teaching import Lesson, Teaching
    from compress.training import Samples

    (segment,) = _whole(narrow)
    annealed = Annealed()
    teacher = Network(narrow.graph_model.clone())
    teaching: Teaching[dict[str, np.ndarray]] = Teaching(
        teacher, Samples(images(narrow), 0).held, 16, Lesson(), 0
    )
    student = student_of(narrow, [segment], annealed, True)
    course = Annealing(student, teaching, 1e-3, annealed, 0.5)
    assert isinstance(course, Course)
    course.begin(0.1)
    linear = as_linear(narrow, [segment], True)
    again = Course(Network(linear.graph_model), teaching, 1e-3)
    assert course.score() == pytest.approx(again.score())
    assert annealed.share == 0.2
    assert with_constants(linear.graph_model, course.state())


def test_refusals(narrow: Model) -> None:
    with pytest.raises(UsageError, match="Pass remove_activations trains, and there are no data"):
        RemoveActivations().apply(narrow, context(narrow, None))
    with pytest.raises(UsageError, match="remove_activations: share is 2"):
        RemoveActivations(share=2)
    with pytest.raises(UsageError, match="remove_activations: steps is 0"):
        RemoveActivations(steps=0)
    with pytest.raises(UsageError, match="recover: batch is 0"):
        Recover(batch=0)


class TestContract(PassContract):
    step = RemoveActivations(steps=2, batch=4, search_seconds=1)
    target = TARGET

    def context(self, model: Model) -> Context:
        return Context(target=TARGET, original=model, training=images(model, 16))

    def test_same_seed_same_result(self) -> None:
        pytest.skip("what is faster is measured")


def test_nothing_can_be_timed_elsewhere(narrow: Model) -> None:
    class Away(NullTarget):
        elsewhere = True

    with pytest.raises(UnsupportedError, match="remove_activations chooses by measured time"):
        RemoveActivations().check(narrow, Away())


def test_bounds_that_are_computed_stay(onnx_model: Build) -> None:
    text = """net (float[n, 4, 5, 5] x, float high) => (float[n, 6, 5, 5] y) {
        [one] h = Conv(x, w1)
        [act] r = Clip(h, , high)
        [two] y = Conv(r, w2)
    }"""
    model = onnx_model(text, w1=(8, 4, 1, 1), w2=(6, 8, 1, 1))
    assert isinstance(model.graph_model, ir.Model)
    assert find_segments(model, True) == ([], {})
