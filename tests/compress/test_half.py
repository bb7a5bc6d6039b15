from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx.defs
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx.reference import ReferenceEvaluator

from compress.element_types import element_types
from compress.errors import UnsupportedError, UsageError
from compress.half import to_half
from compress.half_limits import float_operators, takes
from compress.model import Arrays, Model
from compress.passes import Context
from compress.reference import reference_session, run
from compress.rewrites import FoldBatchNorm, output_statistics
from compress.testing import NullTarget, tiny_exported, tiny_model

FLOAT, HALF = ir.DataType.FLOAT, ir.DataType.FLOAT16
Build = Callable[..., Model]


def types(model: ir.Model) -> dict[str, ir.DataType | None]:
    """Of the first output of each operator, by its name."""
    return {node.name or "": node.outputs[0].dtype for node in model.graph}


def outputs(model: ir.Model, inputs: Arrays) -> Arrays:
    return run(reference_session(model), inputs)


def test_a_network_agrees_and_keeps_its_interface() -> None:
    model = tiny_exported(21)
    half = to_half(model.graph_model)
    inputs = model.example(4)
    expected, got = outputs(model.graph_model, inputs), outputs(half, inputs)
    assert list(got) == list(expected)
    for name, array in expected.items():
        assert got[name].dtype == np.float32
        np.testing.assert_allclose(got[name], array, atol=2e-3 * np.abs(array).max())
    weights = [v for v in half.graph.initializers.values() if "weight" in (v.name or "")]
    assert {value.dtype for value in weights} == {HALF}


def test_the_model_that_is_given_stays() -> None:
    model = tiny_exported(21)
    before = outputs(model.graph_model, model.example())
    declared = types(model.graph_model)
    to_half(model.graph_model, float_interface=False)
    assert types(model.graph_model) == declared
    for name, array in outputs(model.graph_model, model.example()).items():
        np.testing.assert_array_equal(array, before[name])


def test_the_interface_can_be_half() -> None:
    model = tiny_exported(21)
    half = to_half(model.graph_model, float_interface=False)
    assert [value.dtype for value in (*half.graph.inputs, *half.graph.outputs)] == [HALF, HALF]
    inputs = {name: array.astype(np.float16) for name, array in model.example().items()}
    assert all(array.dtype == np.float16 for array in outputs(half, inputs).values())


def test_what_is_written_down_is_what_runs() -> None:
    half = to_half(tiny_exported(21).graph_model)
    found = element_types(half.graph)
    for node in half.graph:
        for out in node.outputs:
            assert out.dtype == found[out]


def test_what_loses_too_much_stays_in_float(onnx_model: Build) -> None:
    model = onnx_model(
        """g (float[2,8] x) => (float[2,8] y) {[m] a = MatMul(x, w) [s] b = Softmax(a)
        [l] c = LayerNormalization(b, g, h) [r] y = Relu(c)}""",
        w=(8, 8), g=(8,), h=(8,),
    )  # fmt: skip
    found = types(to_half(model.graph_model))
    assert [found[name] for name in "mslr"] == [HALF, FLOAT, FLOAT, HALF]
    assert set(float_operators(model.graph_model.graph)) == {"s", "l"}


def test_operators_can_be_kept_by_name(onnx_model: Build) -> None:
    model = onnx_model(
        "g (float[2,8] x) => (float[2,8] y) {[m] a = MatMul(x, w) [k] y = MatMul(a, w)}", w=(8, 8)
    )
    half = to_half(model.graph_model, keep_float=["k"])
    found = types(half)
    assert (found["m"], found["k"]) == (HALF, FLOAT)
    assert {v.dtype for v in half.graph.initializers.values()} == {HALF, FLOAT}


def test_constants_out_of_range_keep_their_operator(onnx_model: Build) -> None:
    model = onnx_model(
        """g (float[4] x) => (float[4] y) {[big] a = Mul(x, b) [small] c = Add(a, e)
        [sqrt] d = Sqrt(c) [inf] f = Min(d, i) [plain] y = Add(f, o)}""",
        b=np.float32([1e5, 1, 1, 1]), e=np.float32(1e-12), i=np.float32(np.inf), o=np.float32(1),
    )  # fmt: skip
    reasons = float_operators(model.graph_model.graph)
    assert set(reasons) == {"big", "small"}
    assert "overflows" in reasons["big"]
    assert "becomes 0" in reasons["small"]
    assert float_operators(model.graph_model.graph, "bfloat16") == {}


def test_layers_whose_outputs_may_overflow_stay_in_float() -> None:
    model = tiny_exported(21)
    context = Context(target=NullTarget(), original=tiny_model())
    folded = FoldBatchNorm().apply(model, context)
    statistics = output_statistics(folded)
    assert float_operators(folded.graph_model.graph, statistics=statistics).keys() == {"6"}
    mean, deviation = statistics["0"]
    statistics["0"] = mean, deviation * 1e6
    reasons = float_operators(folded.graph_model.graph, statistics=statistics)
    assert reasons.keys() == {"0", "6"}
    assert "overflow" in reasons["0"]
    wide = float_operators(folded.graph_model.graph, "bfloat16", statistics=statistics)
    assert "0" not in wide


def test_sizes_are_counted_exactly(onnx_model: Build) -> None:
    model = onnx_model(
        """g (float[1,2049] x) => (float[1,4097] y) {[s] s = Shape(x) [c] f = Cast<to=1>(s)
        [a] g = Add(f, f) [m] h = Sub(g, one) [i] n = Cast<to=7>(h) [l] z = Relu(x)
        [p] p = Concat<axis=1>(z, z) [k] y = Slice(p, lo, n, axes)}""",
        one=np.float32(1), lo=np.int64([0, 0]), axes=np.int64([0, 1]), infer=False,
    )  # fmt: skip
    half = to_half(model.graph_model)
    assert types(half)["l"] == HALF
    assert outputs(half, model.example())["y"].shape == (1, 4097)


def test_scales_of_a_resize_stay_in_float(onnx_model: Build) -> None:
    model = onnx_model(
        'g (float[1,2,4,4] x) => (float[1,2,8,8] y) {[r] y = Resize<mode="linear">(x, , s)}',
        s=np.float32([1, 1, 2, 2]),
    )
    half = to_half(model.graph_model)
    assert types(half)["r"] == HALF
    assert half.graph.initializers["s"].dtype == FLOAT
    np.testing.assert_allclose(
        outputs(half, model.example())["y"],
        outputs(model.graph_model, model.example())["y"],
        atol=5e-3,
    )


def test_subgraphs_read_float(onnx_model: Build) -> None:
    model = onnx_model(
        """g (float[2,3] x, bool c) => (float[2,3] y) {[r] r = Relu(x) [i] z = If (c) <
        then_branch = t () => (float[2,3] u) {u = Sin(r)},
        else_branch = e () => (float[2,3] v) {v = Cos(r)}> [n] y = Neg(z)}"""
    )
    half = to_half(model.graph_model)
    assert [types(half)[name] for name in "rin"] == [HALF, FLOAT, HALF]
    for flag in (True, False):
        inputs = {**model.example(), "c": np.array(flag)}
        got, expected = outputs(half, inputs)["y"], outputs(model.graph_model, inputs)["y"]
        np.testing.assert_allclose(got, expected, atol=2e-3)


def test_an_output_that_is_read_keeps_its_name(onnx_model: Build) -> None:
    model = onnx_model(
        "g (float[2,3] x) => (float[2,3] y, float[2,3] z) {[r] y = Relu(x) [s] z = Sigmoid(y)}"
    )
    half = to_half(model.graph_model)
    expected = outputs(model.graph_model, model.example())
    for name, array in outputs(half, model.example()).items():
        np.testing.assert_allclose(array, expected[name], atol=2e-3)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_q_and_dq_have_one_scale_in_both_types(onnx_model: Build, dtype: str) -> None:
    model = onnx_model(
        """g (float[2,3] x) => (float[2,3] y) {[q] q = QuantizeLinear(x, s, z)
        [d] d = DequantizeLinear(q, s, z) [r] r = Relu(d) [qr] qr = QuantizeLinear(r, s, z)
        [dr] e = DequantizeLinear(qr, s, z) [m] y = ReduceMean(e, axes)}""",
        s=np.float32(0.0123), z=np.int8(0), axes=np.int64([0]), infer=False,
    )  # fmt: skip
    half = to_half(model.graph_model, dtype)  # type: ignore[arg-type]
    nodes = {node.name: node for node in half.graph}
    scales = [nodes[name].inputs[1].const_value for name in ("q", "d", "qr", "dr")]
    assert [scale.dtype.name for scale in scales] == ["FLOAT", *[dtype.upper()] * 3]
    assert len({float(scale.numpy().astype(np.float32)) for scale in scales}) == 1


def test_scales_that_half_cannot_hold_keep_float(onnx_model: Build) -> None:
    model = onnx_model(
        """g (float[2,3] x) => (float[2,3] y) {[m] a = Mul(x, x) [q] q = QuantizeLinear(a, s, z)
        [d] d = DequantizeLinear(q, s, z) [r] y = Relu(d)}""",
        s=np.float32(3e-8), z=np.int8(0),
    )  # fmt: skip
    half = to_half(model.graph_model)
    assert [types(half)[name] for name in "mdr"] == [HALF, FLOAT, HALF]
    assert half.graph.initializers["s"].const_value.numpy() == np.float32(3e-8)
    outputs(half, model.example())


@given(
    st.lists(st.floats(-12, 0), min_size=1, max_size=6),
    st.lists(st.integers(-127, 127), min_size=6, max_size=6),
)
def test_weights_stay_close_in_half(exponents: list[float], numbers: list[int]) -> None:
    scale = np.float32(10.0 ** np.array(exponents))
    weights = np.int8([[number] * len(scale) for number in numbers])
    proto = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["" : 21]> g (float[1] x) => (float[6,n] y) '
        "{[d] w = DequantizeLinear<axis=1>(i, s, z) [m] y = Relu(w)}"
    )
    arrays = {"i": weights, "s": scale, "z": np.zeros(len(scale), np.int8)}
    proto.graph.initializer.extend(
        onnx.numpy_helper.from_array(array, name) for name, array in arrays.items()
    )
    half = to_half(ir.from_proto(proto))
    (got,) = ReferenceEvaluator(ir.to_proto(half)).run(None, {"x": np.zeros(1, np.float32)})
    exact = np.maximum(weights.astype(np.float64) * scale, 0)
    least = 2.0**-24 / 2.0**-8
    assert np.all(np.abs(got - exact) <= 2.0**-8 * exact + least / 2 + 2.0**-24)
    assert half.graph[0].inputs[1].dtype == HALF


@pytest.mark.parametrize(("opset", "dtype"), [(18, "float16"), (20, "bfloat16")])
def test_an_old_opset_is_refused(onnx_model: Build, opset: int, dtype: str) -> None:
    model = onnx_model(
        """g (float[2] x) => (float[2] y) {[q] q = QuantizeLinear(x, s, z)
        [d] y = DequantizeLinear(q, s, z)}""",
        opset=opset, s=np.float32(0.1), z=np.int8(0),
    )  # fmt: skip
    with pytest.raises(UnsupportedError, match=f"opset {opset}"):
        to_half(model.graph_model, dtype)  # type: ignore[arg-type]


def test_opsets_21_and_22_differ_in_types_alone() -> None:
    """So a model of the one is a model of the other, and bfloat16 may ask for 22."""
    later = [s for s in onnx.defs.get_all_schemas_with_history() if s.since_version == 22]
    assert later
    for schema in (s for s in later if s.domain == ""):
        before = onnx.defs.get_schema(schema.name, 21, "")
        for one in ("inputs", "outputs"):
            names = [[(p.name, p.option) for p in getattr(s, one)] for s in (before, schema)]
            assert names[0] == names[1]
        kept = [
            {n: str(a.default_value) for n, a in s.attributes.items()} for s in (before, schema)
        ]
        assert kept[0] == kept[1]


def test_types_come_from_the_schema(onnx_model: Build) -> None:
    model = onnx_model("g (float[1,2,4,4] x) => (float[1,2,4,4] y) {[a] y = Conv(x, w)}",
                       w=(2, 2, 1, 1))  # fmt: skip
    conv = model.graph_model.graph[0]
    assert takes(conv, 0, 21, "float16")
    assert not takes(conv, 0, 21, "bfloat16")
    assert takes(conv, 0, 22, "bfloat16")


def test_unknown_types_and_names_are_refused() -> None:
    model = tiny_exported(21).graph_model
    with pytest.raises(UsageError, match="float16 or bfloat16"):
        to_half(model, "float8")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="nothing"):
        to_half(model, keep_float=["nothing"])
