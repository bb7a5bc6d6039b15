from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest

from compress.model import Model
from compress.registry import create_target
from quant.placement import Placement, clip_bounds, place

FACTS = create_target("cpu", threads=1).capabilities
IN, OUT = "float[batch,3,8,8] x", "float[batch,8,8,8] y"
PAD = "<pads=[1,1,1,1]>"
W, V = (8, 3, 3, 3), (8, 8, 3, 3)

Build = Callable[..., Model]


def placed(model: Model, *keep_float: str) -> Placement:
    return place(model.graph_model.graph, FACTS, frozenset(keep_float))


def group_of(placement: Placement, name: str) -> set[str]:
    return next((set(group) for group in placement.groups if name in group), set())


def test_a_relu_is_absorbed_by_its_convolution(onnx_model: Build) -> None:
    body = f"[a] c = Conv{PAD}(x, w) [r] y = Relu(c)"
    found = placed(onnx_model(f"g ({IN}) => ({OUT}) {{{body}}}", w=W))
    assert found.roles == {"a": "matmul", "r": "activation"}
    assert {name for group in found.groups for name in group} == {"x", "y"}
    assert found.constants == ("w",)
    assert found.reasons == {}


@pytest.mark.parametrize(
    ("body", "site", "reason"),
    [
        (f"[a] c = Conv{PAD}(x, w) [r] r = Relu(c) [s] y = Add(c, r)", "r", "other users"),
        (f"[a] c = Conv{PAD}(x, w) [r] y = Clip(c, lo, hi)", "r", "do not contain zero"),
        (f"[a] c = Conv{PAD}(x, w) [r] y = Tanh(c)", "r", "no int8 kernel for Tanh"),
        ("[r] y = Relu(x)", "r", "its input is float"),
        ("[p] y = GlobalAveragePool(x)", "p", "a conversion would cost more"),
        (f"[a] y = Conv{PAD}(x, w2)", "a", "its weight is not a constant"),
        (f"[h] y = HardSwish(x) [a] z = Conv{PAD}(y, w)", "h", "an input is float"),
        (
            f"[a] c = Conv{PAD}(x, w) [h] h = HardSwish(c) [s] y = Add(c, h)",
            "h",
            "its input has other users",
        ),
        (
            f"[a] c = Conv{PAD}(x, w) [h] y = HardSigmoid(c)",
            "h",
            "only relu6(x + 3) / 6 has an integer form",
        ),
        (
            f"[a] c = Conv{PAD}(x, w) [s] s = Sigmoid(c) [h] y = HardSwish(s)",
            "h",
            "not written by an int8 multiply-accumulate",
        ),
        (
            f'[a] c = Conv{PAD}(x, w) [p] y = Pad<mode="reflect">(c, pads)',
            "p",
            "only constant padding",
        ),
        (
            f"[a] c = Conv{PAD}(x, w) [p] y = Pad(c, pads, lo)",
            "p",
            "only padding with zeros",
        ),
        (
            f'[a] c = Conv{PAD}(x, w) [p] y = Resize<mode="cubic">(c, , scales)',
            "p",
            "resize mode cubic",
        ),
        (
            f"[a] c = Conv{PAD}(x, w) [t] y = ConvTranspose(c, w)",
            "t",
            "no int8 kernel for ConvTranspose",
        ),
    ],
    ids=[
        "relu with a sibling",
        "clip above zero",
        "no pattern",
        "relu on the input",
        "pool on the input",
        "weight from an input",
        "gate on the input",
        "gate with a sibling",
        "other hard sigmoid",
        "gate behind sigmoid",
        "reflecting pad",
        "pad with ones",
        "cubic resize",
        "transposed convolution",
    ],
)
def test_what_stays_float_says_why(onnx_model: Build, body: str, site: str, reason: str) -> None:
    inputs = f"{IN}, float[8,3,3,3] w2" if "w2" in body else IN
    outputs = "float[batch,n,h,v] y" + (", float[batch,8,8,8] z" if " z =" in body else "")
    weights = {
        "w": (8, 3, 3, 3),
        "lo": np.float32(1),
        "hi": np.float32(2),
        "pads": np.int64([0, 0, 1, 1, 0, 0, 1, 1]),
        "scales": np.float32([1, 1, 2, 2]),
    }
    used = {
        name: value for name, value in weights.items() if f"{name})" in body or f"{name}," in body
    }
    text = f"g ({inputs}) => ({outputs}) {{{body}}}"
    found = placed(onnx_model(text, infer=False, **used))
    assert reason in found.reasons[site]
    assert site not in found.roles


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("[g] y = Gemm<alpha=0.5>(x, w, b)", "transA or alpha"),
        ("[g] y = Gemm<beta=0.5>(x, w, b)", "beta"),
        ("[g] y = Gemm<transA=1>(x, s, k)", "transA or alpha"),
        ("[g] y = Gemm(x, w, m)", "one number per output channel"),
        ("[g] y = Gemm(w, x)", "its weight is not a constant"),
    ],
    ids=["alpha", "beta", "transA", "bias for each row", "weight on the left"],
)
def test_forms_of_gemm_without_int8_kernel(onnx_model: Build, body: str, reason: str) -> None:
    shapes = {"w": (8, 8), "s": (8, 5), "b": (8,), "k": (5,), "m": (8, 8)}
    used = {
        name: shape for name, shape in shapes.items() if f"{name})" in body or f"{name}," in body
    }
    model = onnx_model(f"g (float[8,8] x) => (float[8,n] y) {{{body}}}", **used)
    assert reason in placed(model).reasons["g"]


def test_moves_share_the_scale_of_what_they_move(onnx_model: Build) -> None:
    body = f"""[a] c = Conv{PAD}(x, w) [p] p = MaxPool<kernel_shape=[2,2]>(c)
    [t] t = Transpose<perm=[0,1,3,2]>(p) [b] y = Conv{PAD}(t, v)"""
    found = placed(onnx_model(f"g ({IN}) => (float[batch,8,7,7] y) {{{body}}}", w=W, v=V))
    assert group_of(found, "c") == {"c", "p", "t"}
    assert found.roles["p"] == found.roles["t"] == "same_scale"


def test_rectified_branches_of_a_concat_share_one_scale(onnx_model: Build) -> None:
    body = f"""[a] c = Conv{PAD}(x, w) [r] d = Relu(c) [b] e = Conv{PAD}(x, v) [s] f = Relu(e)
    [k] y = Concat<axis=1>(d, f)"""
    text = f"g ({IN}) => (float[batch,16,8,8] y) {{{body}}}"
    found = placed(onnx_model(text, w=W, v=(8, 3, 3, 3)))
    assert group_of(found, "y") == {"d", "f", "y"}


def test_signed_branches_of_a_concat_share_one_scale(onnx_model: Build) -> None:
    body = f"""[a] c = Conv{PAD}(x, w) [b] e = Conv{PAD}(x, v) [k] y = Concat<axis=1>(c, e)"""
    text = f"g ({IN}) => (float[batch,16,8,8] y) {{{body}}}"
    found = placed(onnx_model(text, w=W, v=(8, 3, 3, 3)))
    assert group_of(found, "y") == {"c", "e", "y"}


def test_the_last_gemm_writes_float(onnx_model: Build) -> None:
    body = "[g] c = Gemm(x, w) [r] d = Relu(c) [h] y = Gemm(d, v)"
    text = f"g (float[batch,8] x) => (float[batch,8] y) {{{body}}}"
    found = placed(onnx_model(text, w=(8, 8), v=(8, 8)))
    assert found.float_outputs == ("h",)
    assert not group_of(found, "y")


def test_a_move_before_the_first_convolution_runs_on_integers(onnx_model: Build) -> None:
    body = f"[r] r = Transpose<perm=[0,3,1,2]>(x) [a] y = Conv{PAD}(r, w)"
    found = placed(onnx_model(f"g (float[batch,8,8,3] x) => ({OUT}) {{{body}}}", w=W))
    assert found.roles == {"r": "same_scale", "a": "matmul"}
    assert group_of(found, "x") == {"x", "r"}


def test_integers_are_not_quantized(onnx_model: Build) -> None:
    body = "[g] e = Gather(t, x) [m] y = MatMul(e, w)"
    text = f"g (int64[batch,4] x) => (float[batch,4,8] y) {{{body}}}"
    found = placed(onnx_model(text, t=(10, 6), w=(6, 8)))
    assert found.roles == {"m": "matmul"}
    assert not group_of(found, "x")


def test_kept_operators_are_left_and_the_rest_is_not(onnx_model: Build) -> None:
    body = f"[a] c = Conv{PAD}(x, w) [r] d = Relu(c) [b] y = Conv{PAD}(d, v)"
    model = onnx_model(f"g ({IN}) => ({OUT}) {{{body}}}", w=W, v=V)
    found = placed(model, "a")
    assert found.roles == {"b": "matmul"}
    assert found.reasons == {"a": "kept in float on request", "r": "its input is float"}
    assert found.constants == ("v",)


def test_gates_need_unsigned_activations(onnx_model: Build) -> None:
    body = f"[a] c = Conv{PAD}(x, w) [h] y = HardSwish(c)"
    model = onnx_model(f"g ({IN}) => ({OUT}) {{{body}}}", w=W)
    signed = dataclasses.replace(FACTS, activation="int8")
    found = place(model.graph_model.graph, signed)
    assert found.reasons == {"h": "its integer form needs unsigned activations"}


def test_a_target_without_patterns_gets_nothing(onnx_model: Build) -> None:
    model = onnx_model(f"g ({IN}) => ({OUT}) {{[a] y = Conv{PAD}(x, w)}}", w=W)
    found = place(model.graph_model.graph, dataclasses.replace(FACTS, patterns=()))
    assert (found.roles, found.groups, found.constants) == ({}, (), ())
    assert found.reasons == {"a": "the target has no int8 kernel for Conv"}


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("[r] y = Clip(x, lo, hi)", (1.0, 2.0)),
        ("[r] y = Clip(x, lo)", (1.0, np.inf)),
        ("[r] y = Clip(x, , hi)", (-np.inf, 2.0)),
        ("[r] y = Clip(x)", (-np.inf, np.inf)),
        ("[r] y = Clip(x, z)", (None, np.inf)),
    ],
    ids=["both", "low", "high", "none", "computed"],
)
def test_clip_bounds(
    onnx_model: Build, body: str, expected: tuple[float | None, float | None]
) -> None:
    inputs = "float[batch,4] x" + (", float z" if "z)" in body else "")
    bounds = {"lo": np.float32(1), "hi": np.float32(2)}
    used = {name: value for name, value in bounds.items() if name in body}
    model = onnx_model(f"g ({inputs}) => (float[batch,4] y) {{{body}}}", **used)
    assert clip_bounds(model.graph_model.graph[0]) == expected


def test_a_product_that_needs_a_constant_stays_float_without_one(onnx_model: Build) -> None:
    body = "[a] p = MatMul(x, w) [b] y = MatMul(p, p)"
    model = onnx_model(f"g (float[4,4] x) => (float[4,4] y) {{{body}}}", w=(4, 4))
    patterns = [
        dataclasses.replace(one, float_output=False, constant_weight=one.op == "MatMul")
        for one in FACTS.patterns
    ]
    facts = dataclasses.replace(FACTS, patterns=tuple(patterns))
    found = place(model.graph_model.graph, facts)
    assert found.roles == {"a": "matmul"}
    assert found.reasons == {"b": "its weight is not a constant"}
    assert set(placed(model).roles) == {"a", "b"}
