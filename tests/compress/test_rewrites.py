from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from compress.errors import ExportError
from compress.facts import step_facts
from compress.model import Arrays, Model, Step
from compress.passes import Context, Pass
from compress.reference import reference_session, run
from compress.registry import create_target
from compress.rewrites import (
    FoldBatchNorm,
    PoolSpatialMean,
    RemoveIdentity,
    check_equal,
    output_statistics,
)
from compress.testing import PassContract

TARGET = create_target("cpu", threads=1)
Build = Callable[..., Model]
EPSILON = 1e-3


def applied(step: Pass, model: Model, batch: int = 3) -> tuple[Model, Arrays, Arrays]:
    """The new model, and the outputs before and after."""
    inputs = model.example(batch)
    before = run(reference_session(model.graph_model), inputs)
    done = step.apply(model, Context(target=TARGET, original=model))
    return done, before, run(reference_session(done.graph_model), inputs)


def assert_same(before: Arrays, after: Arrays, tolerance: float = 1e-5) -> None:
    assert list(before) == list(after)
    for name, array in before.items():
        scale = max(np.abs(array).max(), 1e-6)
        np.testing.assert_allclose(after[name], array, rtol=0, atol=tolerance * scale)


def norm(channels: int, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    values = {
        "gamma": rng.uniform(-2, 2, channels),
        "beta": rng.normal(size=channels),
        "mean": rng.normal(size=channels),
        "var": rng.uniform(0.01, 4, channels),
    }
    return {name: array.astype(np.float32) for name, array in values.items()}


BN = f"[n] y = BatchNormalization<epsilon={EPSILON}>(c, gamma, beta, mean, var)"


def op_types(model: Model) -> list[str]:
    return [node.op_type for node in model.graph_model.graph]


def factor(values: dict[str, np.ndarray]) -> np.ndarray:
    """gamma / sqrt(var + epsilon) in float64."""
    return values["gamma"].astype(np.float64) / np.sqrt(values["var"].astype(np.float64) + EPSILON)


def stored(model: Model, index: int) -> np.ndarray:
    value = model.graph_model.graph[0].inputs[index]
    assert value is not None
    assert value.const_value is not None
    return value.const_value.numpy()


@settings(max_examples=30, suppress_health_check=[HealthCheck.too_slow])
@given(
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    stride=st.integers(1, 2),
    groups=st.sampled_from([1, 2, 4]),
    per_group=st.integers(1, 3),
    bias=st.booleans(),
    transposed=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_a_convolution_with_folded_norm_is_the_same(
    onnx_model: Build,
    kernel: tuple[int, int],
    stride: int,
    groups: int,
    per_group: int,
    bias: bool,
    transposed: bool,
    seed: int,
) -> None:
    channels = groups * per_group
    rng = np.random.default_rng(seed)
    shape = (4, per_group, *kernel) if transposed else (channels, 4 // groups, *kernel)
    weights = {"w": rng.normal(size=shape).astype(np.float32), **norm(channels, seed)}
    if bias:
        weights["b"] = rng.normal(size=channels).astype(np.float32)
    op = "ConvTranspose" if transposed else "Conv"
    arguments = "x, w, b" if bias else "x, w"
    body = f"[a] c = {op}<strides=[{stride},{stride}],group={groups}>({arguments}) {BN}"
    text = f"g (float[batch,4,7,7] x) => (float[batch,c,h,k] y) {{{body}}}"
    done, before, after = applied(FoldBatchNorm(), onnx_model(text, **weights))
    assert op_types(done) == [op]
    assert_same(before, after)
    # W' = s W and b' = s (b - mean) + beta, by channel, in float64.
    s = factor(weights)
    for channel in range(channels):
        group, inner = divmod(channel, per_group)
        rows = slice(group * 4 // groups, (group + 1) * 4 // groups)
        where: Any = (rows, inner) if transposed else channel
        expected = weights["w"].astype(np.float64)[where] * s[channel]
        np.testing.assert_allclose(stored(done, 1)[where], expected, rtol=1e-6)
    old = weights.get("b", np.zeros(channels))
    expected_bias = s * (old.astype(np.float64) - weights["mean"]) + weights["beta"]
    np.testing.assert_allclose(stored(done, 2), expected_bias, rtol=1e-5, atol=1e-6)


@settings(max_examples=20)
@given(
    transposed=st.booleans(),
    alpha=st.sampled_from([1.0, 0.5]),
    beta=st.sampled_from([1.0, 2.0]),
    bias=st.sampled_from([None, (5,), (1, 5), (1,), ()]),
    seed=st.integers(0, 1000),
)
def test_a_gemm_with_folded_norm_is_the_same(
    onnx_model: Build,
    transposed: bool,
    alpha: float,
    beta: float,
    bias: tuple[int, ...] | None,
    seed: int,
) -> None:
    rng = np.random.default_rng(seed)
    shape = (5, 8) if transposed else (8, 5)
    weights = {"w": rng.normal(size=shape).astype(np.float32), **norm(5, seed)}
    if bias is not None:
        weights["b"] = np.asarray(rng.normal(size=bias), np.float32)
    attributes = f"transB={int(transposed)},alpha={alpha},beta={beta}"
    arguments = "x, w, b" if bias is not None else "x, w"
    body = f"[a] c = Gemm<{attributes}>({arguments}) {BN}"
    text = f"g (float[batch,8] x) => (float[batch,5] y) {{{body}}}"
    done, before, after = applied(FoldBatchNorm(), onnx_model(text, **weights))
    assert op_types(done) == ["Gemm"]
    assert_same(before, after)


CONV = "[a] c = Conv<pads=[1,1,1,1]>(x, w)"
IN, OUT = "float[batch,4,6,6] x", "float[batch,4,6,6] y"


@pytest.mark.parametrize(
    ("body", "outputs", "reason"),
    [
        (f"{CONV} {BN} [r] z = Relu(c)", f"{OUT}, float[batch,4,6,6] z", "second user"),
        (f"{CONV} {BN}", f"{OUT}, float[batch,4,6,6] c", "second user"),
        (f"{CONV} [r] d = Relu(c) {BN.replace('(c,', '(d,')}", OUT, "follows Relu"),
        (BN.replace("(c,", "(x,"), OUT, "follows an input"),
        ("[a] c = Conv<pads=[1,1,1,1]>(x, v) " + BN, OUT, "not constant"),
    ],
    ids=["two users", "graph output", "behind relu", "on the input", "computed weight"],
)
def test_what_cannot_be_folded_is_left_and_named(
    onnx_model: Build, body: str, outputs: str, reason: str
) -> None:
    inputs = f"{IN}, float[4,4,3,3] v" if "v)" in body else IN
    weights: dict[str, Any] = {**norm(4)}
    if "x, w)" in body:
        weights["w"] = (4, 4, 3, 3)
    model = onnx_model(f"g ({inputs}) => ({outputs}) {{{body}}}", **weights)
    done, before, after = applied(FoldBatchNorm(), model)
    assert_same(before, after, 0)
    details = done.history[-1].details
    assert details["folded"] == 0
    assert reason in details["left"]["n"]
    assert "BatchNormalization" in op_types(done)


def test_a_bias_for_each_row_is_left(onnx_model: Build) -> None:
    body = f"[a] c = Gemm(x, w, b) {BN}"
    text = f"g (float[3,8] x) => (float[3,5] y) {{{body}}}"
    done, before, after = applied(FoldBatchNorm(), onnx_model(text, w=(8, 5), b=(3, 5), **norm(5)))
    assert_same(before, after, 0)
    assert done.history[-1].details["left"] == {"n": "a has a bias for each row"}


def test_a_shared_weight_is_folded_for_each_user_apart(onnx_model: Build) -> None:
    body = f"""[a] c = Conv(x, w, b) {BN.replace("[n] y", "[n] d")} [e] e = Conv(d, w, b)
    [m] y = BatchNormalization(e, beta, gamma, mean, var)"""
    text = f"g ({IN}) => ({OUT}) {{{body}}}"
    done, before, after = applied(
        FoldBatchNorm(), onnx_model(text, w=(4, 4, 1, 1), b=(4,), **norm(4))
    )
    assert done.history[-1].details["folded"] == 2
    assert_same(before, after)


def test_statistics_are_those_of_the_folded_layer_on_the_data_of_the_norm(
    onnx_model: Build,
) -> None:
    # The convolution's own moments on these data become the BatchNorm's running statistics.
    x = np.random.default_rng(3).normal(1, 2, (16, 4, 6, 6)).astype(np.float32)
    plain = onnx_model(
        f"g ({IN}) => ({OUT}) {{[a] y = Conv<pads=[1,1,1,1]>(x, w)}}", w=(4, 4, 3, 3)
    )
    out = run(reference_session(plain.graph_model), {"x": x})["y"].astype(np.float64)
    own = norm(4, 5) | {
        "mean": out.mean((0, 2, 3)).astype(np.float32),
        "var": out.var((0, 2, 3)).astype(np.float32),
    }
    model = onnx_model(f"g ({IN}) => ({OUT}) {{{CONV} {BN}}}", w=(4, 4, 3, 3), **own)
    done = FoldBatchNorm().apply(model, Context(target=TARGET, original=model))
    folded = run(reference_session(done.graph_model), {"x": x})["y"].astype(np.float64)
    mean, deviation = output_statistics(done)["a"]
    np.testing.assert_allclose(mean, folded.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(deviation, folded.std((0, 2, 3)), rtol=1e-4)
    np.testing.assert_array_equal(mean, own["beta"].astype(np.float64))


def test_the_last_record_of_statistics_holds_and_a_fold_keeps_it(onnx_model: Build) -> None:
    model = onnx_model(f"g ({IN}) => ({OUT}) {{{CONV} {BN}}}", w=(4, 4, 3, 3), **norm(4))
    assert output_statistics(model) == {}
    once, _, _ = applied(FoldBatchNorm(), model)
    twice, _, _ = applied(FoldBatchNorm(), once)
    np.testing.assert_array_equal(output_statistics(twice)["a"], output_statistics(once)["a"])
    newer = {"a": {"mean": [1.0], "std": [2.0]}}
    later = twice.evolve(twice.program, Step("other", {}, {"statistics": newer}))
    later = later.evolve(later.program, Step("another"))
    np.testing.assert_array_equal(output_statistics(later)["a"], [[1.0], [2.0]])


def test_a_report_leaves_the_statistics_out(onnx_model: Build) -> None:
    model = onnx_model(f"g ({IN}) => ({OUT}) {{{CONV} {BN}}}", w=(4, 4, 3, 3), **norm(4))
    done, _, _ = applied(FoldBatchNorm(), model)
    step = done.history[-1]
    assert set(step.details) - set(step_facts(step)["details"]) == {"statistics"}


def test_nothing_unused_is_left_behind(onnx_model: Build) -> None:
    model = onnx_model(f"g ({IN}) => ({OUT}) {{{CONV} {BN}}}", w=(4, 4, 3, 3), **norm(4))
    done, _, _ = applied(FoldBatchNorm(), model)
    assert len(done.graph_model.graph.initializers) == 2


def test_an_output_without_recorded_type_gets_one(
    onnx_model: Build, caplog: pytest.LogCaptureFixture
) -> None:
    text = f"g ({IN}) => ({OUT}) {{{CONV} {BN}}}"
    done, before, after = applied(
        FoldBatchNorm(), onnx_model(text, infer=False, w=(4, 4, 3, 3), **norm(4))
    )
    assert_same(before, after)
    assert done.graph_model.graph.outputs[0].dtype is not None
    assert not caplog.records


@pytest.mark.parametrize(
    ("body", "outputs", "removed", "left"),
    [
        ("[r] r = Relu(x) [i] y = Identity(r)", OUT, 1, ["Relu"]),
        ("[i] i = Identity(x) [r] y = Relu(i)", OUT, 1, ["Relu"]),
        ("[i] y = Identity(x)", OUT, 0, ["Identity"]),
        ("[r] r = Relu(x) [i] i = Identity(r) [j] j = Identity(i) [e] y = Exp(j)", OUT, 2,
         ["Relu", "Exp"]),
        ("[r] r = Relu(x) [i] y = Identity(r) [j] z = Identity(r)",
         f"{OUT}, float[batch,4,6,6] z", 1, ["Relu", "Identity"]),
        ("[r] z = Relu(x) [i] y = Identity(z)", f"{OUT}, float[batch,4,6,6] z", 0,
         ["Relu", "Identity"]),
        ("[r] r = Relu(x) [i] y = Identity(r) [e] z = Exp(r)", f"{OUT}, float[batch,4,6,6] z", 1,
         ["Relu", "Exp"]),
        ("[r] r = Relu(x) [d] d = Dropout(r) [e] y = Exp(d)", OUT, 1, ["Relu", "Exp"]),
        ("[r] r = Relu(x) [d] d = Dropout(r, p, no) [e] y = Exp(d)", OUT, 1, ["Relu", "Exp"]),
        ("[r] r = Relu(x) [d] d, z = Dropout(r) [e] y = Exp(d)", f"{OUT}, bool[batch,4,6,6] z", 0,
         ["Relu", "Dropout", "Exp"]),
    ],
    ids=["on an output", "on an input", "input to output", "two in a row", "two outputs",
         "output of an output", "producer with users", "dropout", "dropout not training",
         "mask in use"],
)  # fmt: skip
def test_identities_disappear(
    onnx_model: Build, body: str, outputs: str, removed: int, left: list[str]
) -> None:
    constants = {"p": np.float32(0.5), "no": np.bool_(False)} if "no)" in body else {}
    model = onnx_model(f"g ({IN}) => ({outputs}) {{{body}}}", **constants)
    done, before, after = applied(RemoveIdentity(), model)
    assert_same(before, after, 0)
    assert done.history[-1].details == {"removed": removed}
    assert op_types(done) == left


def test_dropout_in_training_mode_is_kept(onnx_model: Build) -> None:
    text = f"g ({IN}) => ({OUT}) {{[d] d = Dropout(x, p, yes) [e] y = Exp(d)}}"
    model = onnx_model(text, p=np.float32(0.0), yes=np.bool_(True))
    done, _, _ = applied(RemoveIdentity(), model)
    assert op_types(done) == ["Dropout", "Exp"]


@pytest.mark.parametrize("keepdims", [0, 1])
@pytest.mark.parametrize("axes", [[2, 3], [-2, -1], [3, 2]], ids=str)
@pytest.mark.parametrize("opset", [13, 18])
def test_a_spatial_mean_becomes_a_pool(
    onnx_model: Build, opset: int, axes: list[int], keepdims: int
) -> None:
    shape = "1,1" if keepdims else ""
    output = f"float[batch,4{',' + shape if shape else ''}] y"
    given_axes = f",axes={axes}" if opset == 13 else ""
    arguments = "r" if opset == 13 else "r, axes"
    constants = {} if opset == 13 else {"axes": np.int64(axes)}
    body = f"[r] r = Relu(x) [m] y = ReduceMean<keepdims={keepdims}{given_axes}>({arguments})"
    model = onnx_model(f"g ({IN}) => ({output}) {{{body}}}", opset=opset, **constants)
    done, before, after = applied(PoolSpatialMean(), model)
    assert_same(before, after)
    assert op_types(done) == ["Relu", "GlobalAveragePool"] + ["Flatten"] * (not keepdims)
    assert done.graph_model.graph[1].name == "m"


@pytest.mark.parametrize(
    ("dtype", "shape", "axes"),
    [
        ("float", "batch,4,6,6", [1]),
        ("float", "batch,4,6,6", [1, 2]),
        ("float", "batch,4,6,6", [1, 2, 3]),
        ("float", "batch,6,6", [1, 2]),
        ("double", "batch,4,6,6", [2, 3]),
        ("int32", "batch,4,6,6", [2, 3]),
    ],
    ids=["channels", "channels and rows", "all", "rank 3", "double", "integers"],
)
def test_other_means_stay(onnx_model: Build, dtype: str, shape: str, axes: list[int]) -> None:
    text = f"g ({dtype}[{shape}] x) => ({dtype} y) {{[m] y = ReduceMean(x, axes)}}"
    model = onnx_model(text, infer=False, axes=np.int64(axes))
    done, before, after = applied(PoolSpatialMean(), model)
    assert_same(before, after, 0)
    assert op_types(done) == ["ReduceMean"]


def test_a_rewrite_that_changes_the_outputs_is_an_error(onnx_model: Build) -> None:
    model = onnx_model(f"g ({IN}) => ({OUT}) {{y = Relu(x)}}")
    before = run(reference_session(model.graph_model), model.example())
    assert check_equal(model, before) == {"max_abs_difference": 0.0}
    with pytest.raises(ExportError, match="changed its outputs by 1"):
        check_equal(model, {"y": before["y"] + 1})


class RewriteContract(PassContract):
    target = TARGET


class TestFoldBatchNorm(RewriteContract):
    step = FoldBatchNorm()

    def test_every_norm_of_the_network_is_folded(self) -> None:
        done, before, after = applied(self.step, self.model())
        assert done.history[-1].details["folded"] == 3
        assert "BatchNormalization" not in op_types(done)
        assert_same(before, after)


class TestRemoveIdentity(RewriteContract):
    step = RemoveIdentity()


class TestPoolSpatialMean(RewriteContract):
    step = PoolSpatialMean()

    def test_the_pool_of_the_network_is_found(self) -> None:
        done, before, after = applied(self.step, self.model())
        assert done.history[-1].details["replaced"] == 1
        assert_same(before, after)
