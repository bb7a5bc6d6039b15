"""Every rule is planted once, found, and named alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import numpy_helper

from compress.errors import UsageError
from targets.tensorrt_operators import SUPPORTED
from targets.tensorrt_rules import RULES, Violation, check, summary

IMAGE, MAPS = "float[2,8,4,4] x", "float[2,8,4,4] y"
X = "[q] q = QuantizeLinear(x, s, z) [d] d = DequantizeLinear(q, s, z)"
WEIGHT = "[w] w = DequantizeLinear<axis=0>(wi, ws, wz)"
BEHIND = "[oq] oq = QuantizeLinear(o, s, z) [y] y = DequantizeLinear(oq, s, z)"
S, Z = np.float32(0.05), np.int8(0)
RNG = np.random.default_rng(0)


def integers(*shape: int) -> np.ndarray:
    return RNG.integers(-127, 128, shape, np.int8)


def scales(*shape: int) -> np.ndarray:
    return RNG.uniform(0.01, 0.02, shape).astype(np.float32)


ACTIVATION = {"s": S, "z": Z}
LAYER = {"wi": integers(8, 8, 1, 1), "ws": scales(8), "wz": np.zeros(8, np.int8), **ACTIVATION}
BLOCK = ACTIVATION | {"wi": integers(128, 8).astype(ml_dtypes.int4), "ws": scales(2, 8)}


@dataclass(frozen=True)
class Planted:
    rule: str
    node: str
    body: str
    weights: dict[str, Any]
    inputs: str = IMAGE
    outputs: str = MAPS
    opset: int = 21


def planted(rule: str, node: str, body: str, weights: dict[str, Any], **rest: Any) -> Planted:
    return Planted(rule, node, body, weights, **rest)


def layer(rule: str, weight: str, node: str = "w", **changed: Any) -> Planted:
    rest = {k: changed.pop(k) for k in ("inputs", "outputs", "opset") if k in changed}
    return planted(rule, node, f"{X} {weight}", LAYER | changed, **rest)


def pair(rule: str, node: str = "q", body: str = "", **changed: Any) -> Planted:
    rest = {k: changed.pop(k) for k in ("inputs", "outputs", "opset") if k in changed}
    text = body or "[q] q = QuantizeLinear(x, s, z) [d] y = DequantizeLinear(q, s, z)"
    weights = {name: value for name, value in (ACTIVATION | changed).items() if value is not None}
    return planted(rule, node, text, weights, **rest)


CASES = (
    planted("opset", "", "[a] y = Relu(x)", {}, opset=26),
    planted("opset", "", "[a] y = Relu(x)", {}, opset=8),
    planted("domain", "a", "[a] y = com.microsoft.QuickGelu(x)", {}),
    planted("operator", "a", "[a] y = Det(x)", {}, outputs="float[2,8] y"),
    planted("operator_form", "a", "[a] y = MaxPool<kernel_shape=[2,2],dilations=[2,2]>(x)", {},
            outputs="float[2,8,2,2] y"),
    planted("operator_form", "a", '[a] y = Resize<mode="cubic">(x, , r)',
            {"r": np.float32([1, 1, 2, 2])}, outputs="float[2,8,8,8] y"),
    planted("tensor_type", "a", "[a] i = Cast<to=5>(x) [b] y = Cast<to=1>(i)", {}),
    planted("mixed_types", "b", "[a] h = Cast<to=10>(x) [b] y = Add(h, x)", {}),
    planted("rank", "a", "[a] t = Reshape(x, r) [b] y = Reshape(t, f)",
            {"r": np.int64([2, 2, 2, 2, 1, 4, 1, 4, 1]), "f": np.int64([2, 8, 4, 4])}),
    planted("float64", "a", "[a] t = Cast<to=11>(x) [b] y = Cast<to=1>(t)", {}),
    planted("dynamic_shape", "", "[a] y = Relu(x)", {}, inputs="float[n,8,4,4] x"),
    pair("zero_point", z=np.int8(5)),
    pair("zero_point", inputs=f"{IMAGE}, int8 z", z=None),
    pair("uint8", z=np.uint8(0)),
    pair("uint8", body="[q] q = QuantizeLinear(x, s) [d] y = DequantizeLinear(q, s)", z=None),
    pair("float8_format", z=np.zeros((), ml_dtypes.float8_e5m2)),
    pair("quantized_type", z=np.int16(0)),
    pair("scale_constant", inputs=f"{IMAGE}, float s", s=None),
    pair("scale_positive", s=np.float32(0)),
    pair("scale_positive", s=np.float32(-0.1)),
    pair("scale_positive", s=np.float32(np.nan)),
    pair("scale_type", body="[a] h = Cast<to=10>(x) [q] q = QuantizeLinear(h, s, z) "
         "[d] y = DequantizeLinear(q, s, z)"),
    pair("activation_scales", s=scales(8), z=np.zeros(8, np.int8)),
    pair("quantization_opset", z=np.zeros((), ml_dtypes.float8_e4m3fn), opset=18),
    pair("int4_weights", z=np.zeros((), ml_dtypes.int4)),
    pair("int4_packing", node="d", body="[d] y = DequantizeLinear(t, s)", z=None, opset=23,
         t=np.ones((3, 5), ml_dtypes.float4_e2m1fn), outputs="float[3,5] y"),
    pair("dequantize_missing", body="[q] y = QuantizeLinear(x, s, z)", outputs="int8[2,8,4,4] y"),
    pair("quantize_missing", "d", "[d] y = DequantizeLinear(x, s, z)", inputs="int8[2,8,4,4] x"),
    pair("quantized_operand", "p", "[q] q = QuantizeLinear(x, s, z) "
         "[p] p = MaxPool<kernel_shape=[1,1]>(q) [d] y = DequantizeLinear(p, s, z)"),
    pair("pool_output", "p", f"{X} [p] y = GlobalAveragePool(d)", outputs="float[2,8,1,1] y"),
    layer("quantized_bias", f"{WEIGHT} [b] b = DequantizeLinear<axis=0>(bi, bs, bz) "
          "[c] y = Conv(d, w, b)", "c", bi=np.arange(8, dtype=np.int32), bs=scales(8),
          bz=np.zeros(8, np.int32)),
    layer("scale_shape", f"{WEIGHT} [c] y = Conv(d, w)", ws=scales(7), wz=np.zeros(7, np.int8)),
    layer("scale_shape", f"{WEIGHT} [c] y = Conv(d, w)", wz=np.zeros((), np.int8)),
    layer("weight_axis", "[w] w = DequantizeLinear<axis=1>(wi, ws, wz) [c] y = Conv(d, w)"),
    layer("weight_axis", f"{WEIGHT} [c] y = ConvTranspose(d, w)"),
    layer("weight_axis", "[w] w = DequantizeLinear<axis=1>(wi, ws, wz) "
          "[c] y = Gemm<transB=1>(d, w)", wi=integers(8, 8), inputs="float[2,8] x",
          outputs="float[2,8] y"),
    layer("weight_axis", f"{WEIGHT} [c] y = MatMul(d, w)", wi=integers(8, 8),
          inputs="float[2,8] x", outputs="float[2,8] y"),
    layer("weight_range", f"{WEIGHT} [c] y = Conv(d, w)",
          wi=np.full((8, 8, 1, 1), -128, np.int8)),
    planted("weighted_inputs", "c", f"{WEIGHT} [c] y = Conv(x, w)", LAYER),
    planted("weighted_inputs", "c", f"{X} [c] y = Conv(d, w)",
            ACTIVATION | {"w": scales(8, 8, 1, 1)}),
    layer("weighted_inputs", f"{WEIGHT} [c] y = Conv(d, w)", "c",
          z=np.zeros((), ml_dtypes.float8_e4m3fn)),
    layer("output_before_activation", f"{WEIGHT} [c] c = Conv(d, w) "
          "[cq] cq = QuantizeLinear(c, s, z) [cd] cd = DequantizeLinear(cq, s, z) "
          "[r] y = Relu(cd)", "r"),
    planted("concat_scales", "k", f"{X} [e] e = QuantizeLinear(x, t, z) "
            "[f] f = DequantizeLinear(e, t, z) [k] y = Concat<axis=1>(d, f)",
            ACTIVATION | {"t": np.float32(0.1)}, outputs="float[2,16,4,4] y"),
    planted("concat_scales", "k", f"{X} [k] y = Concat<axis=1>(d, x)", ACTIVATION,
            outputs="float[2,16,4,4] y"),
    layer("residual_in_float", f"{WEIGHT} [c] c = Conv(d, w) [e] e = Exp(x) [a] o = Add(c, e) "
          f"{BEHIND}", "a"),
    planted("residual_scales", "a", f"{X} [e] e = QuantizeLinear(x, t, z) "
            f"[f] f = DequantizeLinear(e, t, z) [a] o = Add(d, f) {BEHIND}",
            ACTIVATION | {"t": np.float32(0.1)}),
    planted("int4_weights", "w", "[w] w = DequantizeLinear<axis=1,block_size=64>(wi, ws) "
            "[c] y = Conv(x, w)", {"wi": integers(8, 64, 1, 1).astype(ml_dtypes.int4),
            "ws": scales(8, 1, 1, 1)}, inputs="float[2,64,4,4] x"),
    planted("int4_blocks", "w", "[w] w = DequantizeLinear<axis=0,block_size=32>(wi, ws) "
            "[c] y = MatMul(x, w)", BLOCK | {"ws": scales(4, 8)}, inputs="float[2,128] x",
            outputs="float[2,8] y"),
    planted("scale_shape", "w", "[w] w = DequantizeLinear<axis=0,block_size=64>(wi, ws) "
            "[c] y = MatMul(x, w)", BLOCK | {"ws": scales(2, 4)}, inputs="float[2,128] x",
            outputs="float[2,8] y"),
)  # fmt: skip

CLEAN = (
    layer("", f"{WEIGHT} [c] y = Conv(d, w, b)", b=scales(8)),
    layer("", f"{WEIGHT} [c] c = Conv(d, w) [a] o = Add(c, d) {BEHIND}"),
    layer("", "[w] w = DequantizeLinear<axis=1>(wi, ws, wz) [c] y = ConvTranspose(d, w)"),
    planted("", "", "[w] w = DequantizeLinear<axis=0,block_size=64>(wi, ws) [c] y = MatMul(x, w)",
            BLOCK, inputs="float[2,128] x", outputs="float[2,8] y"),
    pair("", z=np.zeros((), ml_dtypes.float8_e4m3fn)),
)  # fmt: skip


def build(case: Planted) -> ir.Model:
    """The model as it is written, without ONNX's own checks."""
    text = (
        f'<ir_version: 10, opset_import: ["" : {case.opset}, "com.microsoft" : 1]> '
        f"g ({case.inputs}) => ({case.outputs}) {{{case.body}}}"
    )
    proto = onnx.parser.parse_model(text)
    for name, value in case.weights.items():
        proto.graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))
    if "rank" in case.rule:
        proto = onnx.shape_inference.infer_shapes(proto, data_prop=True)
    return ir.from_proto(proto)


def ids(case: Planted) -> str:
    return case.rule or "clean"


@pytest.mark.parametrize("case", CASES, ids=ids)
def test_a_planted_violation_is_found_and_nothing_else(case: Planted) -> None:
    found = check(build(case))
    assert {violation.rule for violation in found} == {case.rule}
    assert case.node in {violation.node for violation in found}


@pytest.mark.parametrize("case", CASES, ids=ids)
def test_a_violation_names_its_source(case: Planted) -> None:
    for violation in check(build(case)):
        assert violation.source
        assert violation.sentence.endswith(".")
        if violation.node:
            assert violation.node in violation.sentence


@pytest.mark.parametrize("case", CLEAN, ids=lambda case: case.body[-40:])
def test_what_keeps_the_rules_is_left_alone(case: Planted) -> None:
    assert check(build(case)) == ()


def test_every_rule_is_planted() -> None:
    assert {case.rule for case in CASES} == {rule.id for rule in RULES}
    assert len({rule.id for rule in RULES}) == len(RULES)


def test_the_newest_opset_depends_on_the_version() -> None:
    model = build(Planted("opset", "", "[a] y = Relu(x)", {}, opset=25))
    assert [violation.rule for violation in check(model, version="10.15")] == ["opset"]
    assert check(model, version="11") == ()


@pytest.mark.parametrize("version", ["9", "12", "ten", ""])
def test_other_versions_are_refused(version: str) -> None:
    with pytest.raises(UsageError, match="10 and 11"):
        check(build(CLEAN[0]), version=version)


def test_errors_come_first() -> None:
    body = f"{WEIGHT} [c] y = Conv(x, w) [e] e = Det(x)"
    found = check(build(Planted("", "", body, LAYER, inputs="float[n,8,4,4] x")))
    assert [violation.severity for violation in found] == ["error", "performance", "note"]
    assert summary(found) == {"error": 1, "performance": 1, "note": 1}


def test_operators_of_a_branch_are_seen() -> None:
    body = """[i] y = If (c) <then_branch = t () => (float[2,8] u) {[in] u = Det(x)},
        else_branch = e () => (float[2,8] v) {[out] v = ReduceMax<keepdims=0>(x, axes)}>"""
    case = Planted(
        "operator", "in", body, {"axes": np.int64([2, 3])}, f"{IMAGE}, bool c", "float[2,8] y"
    )
    assert [violation.node for violation in check(build(case))] == ["in"]


def test_a_sparse_constant_is_no_crash() -> None:
    case = Planted("", "", "[a] y = Relu(x)", {})
    model = build(case)
    sparse = ir.Node("", "Constant", [], [ir.AttrInt64("value_other", 1)], name="k")
    model.graph.insert_before(model.graph[0], sparse)
    model.graph[1].replace_input_with(0, sparse.outputs[0])
    assert check(model) == ()


def test_functions_of_the_model_are_no_foreign_domain() -> None:
    proto = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["" : 21, "mine" : 1]> g (float[2] x) => (float[2] y) '
        '{[a] y = mine.twice(x)} <domain: "mine", opset_import: ["" : 21]> twice (a) => (b) '
        "{b = Add(a, a)}"
    )
    assert check(ir.from_proto(proto)) == ()


def test_supported_operators_are_onnx_operators() -> None:
    known = {schema.name for schema in onnx.defs.get_all_schemas_with_history()}
    own = {"ImageScaler", "ParametricSoftplus", "ScaledTanh"}  # of ONNX's first, experimental set
    assert SUPPORTED - own <= known


def test_violations_compare_by_what_they_say() -> None:
    first, second = check(build(CASES[3])), check(build(CASES[3]))
    assert first == second
    assert isinstance(first[0], Violation)
