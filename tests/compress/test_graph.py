from __future__ import annotations

import json
from collections.abc import Callable

import numpy as np
import pytest

from compress.export import sites
from compress.graph import Site, graph_sites, infer_shapes
from compress.model import Model

Build = Callable[..., Model]


def site(model: Model, name: str) -> Site:
    return next(one for one in graph_sites(model.graph_model) if one.name == name)


@pytest.mark.parametrize(
    ("attributes", "weight", "output", "macs"),
    [
        # output positions x output channels x (input channels of a group x kernel)
        ("group=1", (6, 4, 3, 3), (1, 6, 8, 8), 8 * 8 * 6 * 4 * 9),
        ("pads=[1,1,1,1]", (6, 4, 3, 3), (1, 6, 10, 10), 10 * 10 * 6 * 4 * 9),
        ("strides=[2,2]", (6, 4, 3, 3), (1, 6, 4, 4), 4 * 4 * 6 * 4 * 9),
        ("dilations=[2,2]", (6, 4, 3, 3), (1, 6, 6, 6), 6 * 6 * 6 * 4 * 9),
        ("group=2", (6, 2, 3, 3), (1, 6, 8, 8), 8 * 8 * 6 * 2 * 9),
        ("group=4", (4, 1, 5, 5), (1, 4, 6, 6), 6 * 6 * 4 * 25),
        ("group=1", (6, 4, 1, 1), (1, 6, 10, 10), 10 * 10 * 6 * 4),
    ],
    ids=["plain", "padded", "strided", "dilated", "grouped", "depthwise", "pointwise"],
)
def test_macs_of_a_convolution(
    onnx_model: Build,
    attributes: str,
    weight: tuple[int, ...],
    output: tuple[int, ...],
    macs: int,
) -> None:
    text = "g (float[batch,4,10,10] x) => (float[batch,c,h,k] y)"
    found = site(onnx_model(f"{text} {{[n] y = Conv<{attributes}>(x, w)}}", w=weight), "n")
    assert (found.output, found.weight, found.macs) == (output, weight, macs)
    assert found.inputs == ((1, 4, 10, 10),)


@pytest.mark.parametrize(
    ("attributes", "weight", "macs"),
    [
        # every input number meets every kernel number of its group
        ("strides=[2,2]", (4, 6, 3, 3), 10 * 10 * 4 * 6 * 9),
        ("group=2", (4, 3, 2, 2), 10 * 10 * 4 * 3 * 4),
    ],
    ids=["strided", "grouped"],
)
def test_macs_of_a_transposed_convolution(
    onnx_model: Build, attributes: str, weight: tuple[int, ...], macs: int
) -> None:
    text = "g (float[batch,4,10,10] x) => (float[batch,c,h,k] y)"
    found = site(onnx_model(f"{text} {{[n] y = ConvTranspose<{attributes}>(x, w)}}", w=weight), "n")
    assert found.macs == macs


@pytest.mark.parametrize(
    ("inputs", "body", "weights", "macs"),
    [
        ("float[batch,16] x", "Gemm(x, w, b)", {"w": (16, 5), "b": (5,)}, 16 * 5),
        ("float[batch,16] x", "Gemm<transB=1>(x, w)", {"w": (5, 16)}, 16 * 5),
        ("float[16,3] x", "Gemm<transA=1>(x, w)", {"w": (16, 5)}, 3 * 16 * 5),
        ("float[batch,16] x", "MatMul(x, w)", {"w": (16, 5)}, 16 * 5),
        ("float[batch,7,16] x", "MatMul(x, w)", {"w": (16, 5)}, 7 * 16 * 5),
        ("float[batch,2,7,16] x, float[batch,2,16,7] z", "MatMul(x, z)", {}, 2 * 7 * 16 * 7),
        ("float[batch,7,16] x", "MatMul(w, x)", {"w": (5, 7)}, 5 * 7 * 16),
        ("float[batch,16] x", "Relu(x)", {}, 0),
        ("float[batch,16] x", "Add(x, b)", {"b": (16,)}, 0),
    ],
    ids=[
        "gemm",
        "gemm transB",
        "gemm transA",
        "matmul",
        "matmul 3d",
        "matmul of activations",
        "weight on the left",
        "relu",
        "add",
    ],
)
def test_macs_of_matrix_products(
    onnx_model: Build, inputs: str, body: str, weights: dict[str, tuple[int, ...]], macs: int
) -> None:
    model = onnx_model(f"g ({inputs}) => (float y) {{[n] y = {body}}}", infer=False, **weights)
    assert site(model, "n").macs == macs


def test_parameters_count_where_they_are_met_first(onnx_model: Build) -> None:
    body = "[a] c = Conv(x, w, b) [b] d = Conv(c, w, k) [r] y = Reshape(d, s)"
    text = f"g (float[batch,4,6,6] x) => (float[batch,n] y) {{{body}}}"
    model = onnx_model(text, w=(4, 4, 1, 1), b=(4,), k=(4,), s=np.int64([0, -1]))
    counts = {one.name: one.parameters for one in graph_sites(model.graph_model)}
    assert counts == {"a": 16 + 4, "b": 4, "r": 0}


def test_live_bytes_hold_a_residual_until_it_is_added(onnx_model: Build) -> None:
    body = """[a] c = Conv(x, w) [r] d = Relu(c) [b] e = Conv<pads=[1,1,1,1]>(d, v)
    [s] s = Add(d, e) [p] p = GlobalAveragePool(s) [f] y = Flatten(p)"""
    text = f"g (float[batch,3,10,10] x) => (float[batch,8] y) {{{body}}}"
    model = onnx_model(text, w=(8, 3, 3, 3), v=(8, 8, 3, 3))
    image, map_ = 3 * 10 * 10 * 4, 8 * 8 * 8 * 4
    live = {one.name: one.live_bytes for one in graph_sites(model.graph_model)}
    assert live == {
        "a": image + map_,  # x, c
        "r": map_,  # d in place of c
        "b": map_ + map_,  # d, e
        "s": 2 * map_,  # d, e, s in place of one of them
        "p": map_ + 8 * 4,  # s, p
        "f": 8 * 4,  # y is a view of p
    }


def test_an_output_of_the_graph_stays_alive(onnx_model: Build) -> None:
    body = "[a] y = Relu(x) [b] c = Exp(y) [e] z = GlobalAveragePool(c)"
    text = f"g (float[batch,2,4,4] x) => (float[batch,2,4,4] y, float[batch,2,1,1] z) {{{body}}}"
    live = {one.name: one.live_bytes for one in graph_sites(onnx_model(text).graph_model)}
    assert live == {"a": 128, "b": 2 * 128, "e": 2 * 128 + 8}


def test_a_dynamic_batch_counts_as_one(onnx_model: Build) -> None:
    text = "g (float[{}, 4] x) => (float[{}, 5] y) {{[n] y = MatMul(x, w)}}"
    dynamic = onnx_model(text.format("batch", "batch"), w=(4, 5))
    fixed = onnx_model(text.format(7, 7), w=(4, 5))
    assert site(dynamic, "n").macs * 7 == site(fixed, "n").macs == 7 * 20
    assert site(dynamic, "n").output == (1, 5)


def test_shapes_that_the_graph_computes_are_found(onnx_model: Build) -> None:
    body = """[s] s = Shape(x) [g] g = Gather(s, zero) [u] u = Unsqueeze(g, zeros)
    [k] k = Concat<axis=0>(u, minus) [r] r = Reshape(x, k) [m] y = MatMul(r, w)"""

    constants = {"zero": np.int64(0), "zeros": np.int64([0]), "minus": np.int64([-1])}
    text = f"g (float[batch,4,3,3] x) => (float[batch,5] y) {{{body}}}"
    model = onnx_model(text, infer=False, w=(36, 5), **constants)
    assert site(model, "m").macs == 36 * 5
    assert infer_shapes(model.graph_model)["r"] == (1, 36)


def test_what_cannot_be_known_is_minus_one(onnx_model: Build) -> None:
    text = "g (float[batch,4] x) => (int64[2,n] y) {[n] y = NonZero(x)}"
    assert site(onnx_model(text), "n").output == (2, -1)


def test_the_model_is_left_alone(onnx_model: Build) -> None:
    model = onnx_model(
        "g (float[batch,4] x) => (float[batch,5] y) {[n] y = MatMul(x, w)}", w=(4, 5)
    )
    graph_sites(model.graph_model)
    assert str(model.graph_model.graph.inputs[0].shape) == "[batch,4]"


def test_constants_are_no_sites(onnx_model: Build) -> None:
    body = "[k] k = Constant<value = float {2.0}>() [m] y = Mul(x, k)"
    model = onnx_model(f"g (float[batch,4] x) => (float[batch,4] y) {{{body}}}")
    assert [one.name for one in graph_sites(model.graph_model)] == ["m"]


def test_a_network_as_a_whole(exported: Model) -> None:
    found = {one.name: one for one in sites(exported)}
    assert found["0"].macs == 8 * 8 * 16 * 3 * 9
    assert found["4.depthwise"].macs == 8 * 8 * 16 * 9
    assert found["4.pointwise"].macs == 8 * 8 * 16 * 16
    assert found["8"].macs == 16 * 10
    assert found["8"].parameters == 16 * 10 + 10
    assert json.loads(json.dumps(found["0"].to_dict()))["op_type"] == "Conv"
