"""Quantizer arithmetic against its definition and against onnxruntime."""

from __future__ import annotations

import json
import math
from dataclasses import fields, replace

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from onnx import TensorProto, helper

from compress.errors import UnsupportedError, UsageError
from quant.quantizer import (
    dequantize,
    fake_quantize,
    qparams_from_range,
    quantize,
    round_to_format,
    weight_qparams,
)
from quant.spec import FORMATS, FloatFormat, IntegerFormat, QParams, QuantSpec

EIGHT_BITS = [
    QuantSpec(dtype, symmetric=symmetric, reduced=reduced, restricted=restricted)
    for dtype in ("int8", "uint8")
    for symmetric in (True, False)
    for reduced in (False, True)
    for restricted in ((False, True) if dtype == "int8" else (False,))
]
OTHERS = [
    QuantSpec(dtype, symmetric=symmetric)  # type: ignore[arg-type]
    for dtype, form in FORMATS.items()
    for symmetric in ((True, False) if isinstance(form, IntegerFormat) else (True,))
    if dtype not in ("int8", "uint8")
]
RESTRICTED = [QuantSpec(dtype, restricted=True) for dtype in ("int2", "int4", "int16")]  # type: ignore[arg-type]
POWER_OF_TWO = [
    QuantSpec("int8", power_of_two=True),
    QuantSpec("int8", restricted=True, power_of_two=True),
    QuantSpec("uint8", power_of_two=True),
    QuantSpec("uint8", symmetric=False, power_of_two=True),
    QuantSpec("int2", power_of_two=True),
    QuantSpec("int16", symmetric=False, power_of_two=True),
    QuantSpec("float4_e2m1", power_of_two=True),
    QuantSpec("float8_e4m3fn", power_of_two=True),
    QuantSpec("float16", power_of_two=True),
]
SPECS = EIGHT_BITS + OTHERS + RESTRICTED + POWER_OF_TWO
FLOATS = [spec for spec in OTHERS if not spec.integer]


def name_of(spec: QuantSpec) -> str:
    flags = [f.name for f in fields(spec) if getattr(spec, f.name) is True]
    return "-".join([spec.dtype, *flags])


each_spec = pytest.mark.parametrize("spec", SPECS, ids=name_of)
values = st.floats(-(2.0**100), 2.0**100, width=32)
vectors = hnp.arrays(np.float32, st.integers(1, 40), elements=values)
matrices = hnp.arrays(np.float32, hnp.array_shapes(min_dims=2, max_dims=4), elements=values)


def per_channel(spec: QuantSpec) -> QuantSpec:
    return replace(spec, granularity="per_channel")


def half_step(x: np.ndarray, qparams: QParams) -> np.ndarray:
    """Half the distance of the two values of the format around each `x`."""
    scale, form = float(qparams.scale), qparams.spec.format
    if isinstance(form, IntegerFormat):
        return np.full(x.shape, scale / 2)
    exponent = np.frexp(x.astype(np.float64) / scale)[1] - 1
    return scale * 2.0 ** (np.maximum(exponent, 1 - form.bias) - form.mantissa_bits - 1)


def runtime_values(x: np.ndarray, qparams: QParams) -> np.ndarray:
    """What onnxruntime's QuantizeLinear and DequantizeLinear leave of `x`."""
    spec, shape = qparams.spec, qparams.scale.shape
    name = {"float8_e4m3fn": "FLOAT8E4M3FN", "float8_e5m2": "FLOAT8E5M2"}.get(spec.dtype)
    storage = getattr(TensorProto, name or spec.dtype.upper())
    attributes = {"axis": qparams.axis or 0, "block_size": spec.group or 0}
    graph = helper.make_graph(
        [
            helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"], **attributes),
            helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"], **attributes),
        ],
        "quantize",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, x.shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, x.shape)],
        [
            helper.make_tensor("s", TensorProto.FLOAT, shape, qparams.scale.reshape(-1).tolist()),
            helper.make_tensor("z", storage, shape, qparams.zero_point.reshape(-1).tolist()),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 25)], ir_version=11)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return np.asarray(session.run(None, {"x": x})[0])


def runtime_quantize(x: np.ndarray, qparams: QParams) -> np.ndarray:
    """What onnxruntime's own QuantizeLinear makes of `x`."""
    scale, zero_point = np.array(qparams.scale), np.array(qparams.zero_point)
    storage = helper.np_dtype_to_tensor_dtype(zero_point.dtype)
    graph = helper.make_graph(
        [helper.make_node("QuantizeLinear", ["x", "s", "z"], ["y"], axis=qparams.axis or 0)],
        "quantize",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, x.shape)],
        [helper.make_tensor_value_info("y", storage, x.shape)],
        [onnx.numpy_helper.from_array(scale, "s"), onnx.numpy_helper.from_array(zero_point, "z")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    return np.asarray(session.run(None, {"x": x})[0])


@pytest.mark.parametrize(
    ("spec", "limits"),
    [
        (QuantSpec("int8"), (-128, 127)),
        (QuantSpec("int8", restricted=True), (-127, 127)),
        (QuantSpec("int8", reduced=True), (-64, 63)),
        (QuantSpec("int8", reduced=True, restricted=True), (-63, 63)),
        (QuantSpec("uint8"), (0, 255)),
        (QuantSpec("uint8", reduced=True), (0, 127)),
    ],
    ids=str,
)
def test_limits_of_a_format(spec: QuantSpec, limits: tuple[int, int]) -> None:
    assert (spec.qmin, spec.qmax) == limits


@pytest.mark.parametrize(
    "options",
    [{"dtype": "int9"}, {"granularity": "per_group"}, {"dtype": "uint8", "restricted": True}],
    ids=str,
)
def test_a_spec_that_makes_no_sense_is_refused(options: dict[str, object]) -> None:
    with pytest.raises(UsageError):
        QuantSpec(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("spec", "scale", "zero_point", "axis"),
    [
        (QuantSpec(), 0.0, 0, None),
        (QuantSpec(), math.inf, 0, None),
        (QuantSpec(), math.nan, 0, None),
        (QuantSpec("uint8", reduced=True), 1.0, 200, None),
        (QuantSpec(), [1.0, 1.0], [0, 0], 0),
        (QuantSpec(granularity="per_channel"), 1.0, 0, None),
        (QuantSpec(granularity="per_channel"), [1.0, 1.0], [0], 0),
    ],
    ids=["zero", "infinite", "nan", "zero-point", "not-a-scalar", "no-axis", "shapes"],
)
def test_impossible_qparams_are_refused(
    spec: QuantSpec, scale: object, zero_point: object, axis: int | None
) -> None:
    with pytest.raises(UsageError):
        QParams(spec, np.asarray(scale), np.asarray(zero_point), axis)


@each_spec
@given(x=matrices, data=st.data())
@settings(max_examples=8)
def test_qparams_survive_json(spec: QuantSpec, x: np.ndarray, data: st.DataObject) -> None:
    axis = data.draw(st.none() | st.integers(-x.ndim, x.ndim - 1))
    qparams = weight_qparams(x, spec if axis is None else per_channel(spec), axis)
    restored = QParams.from_dict(json.loads(json.dumps(qparams.to_dict())))
    assert restored == qparams
    assert restored.zero_point.dtype == np.dtype(spec.format.storage)


@each_spec
@given(x=vectors)
@settings(max_examples=12)
def test_error_is_at_most_half_a_step_inside_the_range(spec: QuantSpec, x: np.ndarray) -> None:
    qparams = weight_qparams(x, spec)
    half = half_step(x, qparams)
    rounding = np.abs(x) * 1e-6 + half * 1e-4  # of float32 arithmetic
    assert (np.abs(x.astype(np.float64) - fake_quantize(x, qparams)) <= half + rounding).all()


@each_spec
@given(x=vectors)
@settings(max_examples=12)
def test_zero_is_exact_and_order_is_kept(spec: QuantSpec, x: np.ndarray) -> None:
    qparams = weight_qparams(x, spec)
    assert fake_quantize(np.zeros(3, np.float32), qparams).tolist() == [0, 0, 0]
    q = quantize(np.sort(x), qparams).astype(np.float64)
    assert (np.diff(q) >= 0).all()
    assert q.min() >= spec.qmin
    assert q.max() <= spec.qmax


@each_spec
@given(x=vectors)
@settings(max_examples=12)
def test_quantizing_twice_changes_nothing(spec: QuantSpec, x: np.ndarray) -> None:
    qparams = weight_qparams(x, spec)
    once = fake_quantize(x, qparams)
    np.testing.assert_array_equal(fake_quantize(once, qparams), once)


@each_spec
@given(x=matrices, data=st.data())
@settings(max_examples=8)
def test_per_channel_equals_a_loop_of_per_tensor(
    spec: QuantSpec, x: np.ndarray, data: st.DataObject
) -> None:
    axis = data.draw(st.integers(-x.ndim, x.ndim - 1))
    qparams = weight_qparams(x, per_channel(spec), axis)
    q = quantize(x, qparams)
    assert qparams.scale.shape == (x.shape[axis],)
    for channel in range(x.shape[axis]):
        part = x.take(channel, axis)
        single = weight_qparams(part, spec)
        np.testing.assert_array_equal(q.take(channel, axis), quantize(part, single))
        if part.any():
            assert qparams.scale[channel] == single.scale


@pytest.mark.parametrize("dtype", ["int8", "uint8"])
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("axis", [None, 0, 1, 2], ids=str)
def test_integers_equal_those_of_onnxruntime(dtype: str, symmetric: bool, axis: int | None) -> None:
    rng = np.random.default_rng(0)
    spec = QuantSpec(dtype, symmetric)  # type: ignore[arg-type]
    x = rng.standard_normal((7, 5, 300)).astype(np.float32)
    x[0] *= 1e4  # saturates with the scales of the rest
    qparams = weight_qparams(
        x[1:2] if axis != 0 else x, spec if axis is None else per_channel(spec), axis
    )
    np.testing.assert_array_equal(quantize(x, qparams), runtime_quantize(x, qparams))


@each_spec
@given(x=matrices.filter(lambda x: x.ndim < 4), group=st.integers(2, 4), data=st.data())
@settings(max_examples=8)
def test_per_group_equals_a_loop_of_per_tensor(
    spec: QuantSpec, x: np.ndarray, group: int, data: st.DataObject
) -> None:
    axis = data.draw(st.integers(-x.ndim, x.ndim - 1))
    x = np.concatenate([x, -x / 3, x * 2, x / 7][:group], axis)  # so that groups divide it
    qparams = weight_qparams(x, replace(spec, granularity="per_group", group=group), axis)
    axis %= x.ndim
    assert qparams.scale.shape == (*x.shape[:axis], x.shape[axis] // group, *x.shape[axis + 1 :])
    q, values = quantize(x, qparams), fake_quantize(x, qparams)
    for index in np.ndindex(qparams.scale.shape):
        part = tuple(
            slice(i * group, (i + 1) * group) if a == axis else i for a, i in enumerate(index)
        )
        if not x[part].any():
            assert not values[part].any()
            continue
        single = weight_qparams(x[part], spec)
        assert qparams.scale[index] == single.scale
        np.testing.assert_array_equal(q[part], quantize(x[part], single))
        np.testing.assert_array_equal(values[part], fake_quantize(x[part], single))


@pytest.mark.parametrize("spec", POWER_OF_TWO, ids=name_of)
@given(x=vectors)
@settings(max_examples=12)
def test_powers_of_two_hold_the_range_and_half_of_them_would_not(
    spec: QuantSpec, x: np.ndarray
) -> None:
    low, high = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
    qparams = qparams_from_range(low, high, spec)
    scale, zero_point = float(qparams.scale), float(qparams.zero_point)
    assert math.frexp(scale)[0] == 0.5
    below, above = (spec.qmin - zero_point) * scale, (spec.qmax - zero_point) * scale
    slack = 0 if spec.symmetric else scale / 2  # the zero point is rounded
    assert below - slack <= low <= high <= above + slack
    finer = qparams_from_range(low, high, replace(spec, power_of_two=False))
    assert float(finer.scale) * (1 - 1e-6) <= scale
    assert scale < 2 * float(finer.scale) or scale == np.finfo(np.float32).tiny


def bits(x: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(x, np.float32).view(np.uint32)


@pytest.mark.parametrize("spec", FLOATS[1:], ids=lambda spec: spec.dtype)
def test_float_formats_round_as_torch_casts(spec: QuantSpec) -> None:
    """Every code, the middle of every two neighbours, what is beside it, and random values."""
    form, dtype = spec.format, getattr(torch, spec.dtype)
    assert isinstance(form, FloatFormat)
    integer = torch.uint8 if form.bits == 8 else torch.uint16
    codes = torch.arange(2**form.bits).to(integer).view(dtype).float().numpy()
    codes = codes[np.isfinite(codes)]
    unit = QParams(spec, np.float32(1), np.float32(0))
    np.testing.assert_array_equal(bits(quantize(codes, unit)), bits(codes))
    assert codes.max() == form.max
    neighbours = np.unique(codes)
    middles = ((neighbours[:-1].astype(np.float64) + neighbours[1:]) / 2).astype(np.float32)
    rng = np.random.default_rng(0)
    magnitudes = 2.0 ** rng.uniform(-160, np.log2(form.max), 20_000)
    x = np.concatenate(
        [
            middles,
            np.nextafter(middles, np.float32(-np.inf)),
            np.nextafter(middles, np.float32(np.inf)),
            magnitudes * rng.choice([-1, 1], magnitudes.size),
            rng.standard_normal(20_000) * form.max / 8,
        ]
    ).astype(np.float32)
    x = x[np.abs(x) <= form.max]
    cast = torch.tensor(x).to(dtype).float().numpy()
    np.testing.assert_array_equal(bits(quantize(x, unit)), bits(cast))
    beyond = np.array([form.max * 1.001, 3.4e38, np.inf], np.float32)
    np.testing.assert_array_equal(quantize(beyond, unit), np.full(3, form.max, np.float32))
    np.testing.assert_array_equal(quantize(-beyond, unit), np.full(3, -form.max, np.float32))


def test_the_grid_of_e2m1() -> None:
    grid = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    form = FORMATS["float4_e2m1"]
    assert isinstance(form, FloatFormat)
    x = np.linspace(-8, 8, 4097, dtype=np.float32)  # every middle of two values is among them
    distance = np.abs(np.abs(x)[:, None] - grid)
    tie = distance == distance.min(axis=1, keepdims=True)
    # Of two equally near values the one with an even code.
    nearest = np.argmin(np.where(tie, np.arange(8) % 2, 2), axis=1)
    rounded = x.copy()
    round_to_format(rounded, form)
    np.testing.assert_array_equal(rounded, np.sign(x) * grid[nearest])
    assert set(np.abs(rounded)) == set(grid)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_float_of_sixteen_bits_has_no_scale_where_it_needs_none(dtype: str) -> None:
    spec = QuantSpec(dtype)  # type: ignore[arg-type]
    for high in (0.0, 1e-30, 1.0, 60_000.0):
        assert qparams_from_range(-high / 2, high, spec).scale == 1
    wide = qparams_from_range(0, 131_008, QuantSpec("float16"))
    assert wide.scale == 2


RUNTIME_DTYPES = [
    *("int2", "uint2", "int4", "uint4", "int8", "uint8", "int16", "uint16"),
    *("float8_e4m3fn", "float8_e5m2"),
]


@pytest.mark.parametrize("granularity", ["per_tensor", "per_channel", "per_group"])
@pytest.mark.parametrize("dtype", RUNTIME_DTYPES)
def test_values_equal_those_of_onnxruntime(dtype: str, granularity: str) -> None:
    rng = np.random.default_rng(0)
    symmetric = dtype.startswith("float")
    group = 3 if granularity == "per_group" else None
    spec = QuantSpec(dtype, symmetric, granularity=granularity, group=group)  # type: ignore[arg-type]
    axis = None if granularity == "per_tensor" else 1
    x = rng.standard_normal((7, 6, 50)).astype(np.float32)
    qparams = weight_qparams(x, spec, axis)
    x[:, :, ::5] *= 1.5  # some saturate
    np.testing.assert_array_equal(fake_quantize(x, qparams), runtime_values(x, qparams))


@pytest.mark.parametrize("zero_point", [-3, 0, 127])
def test_ties_round_to_even_as_in_onnxruntime(zero_point: int) -> None:
    qparams = QParams(QuantSpec("int8", symmetric=False), np.float32(0.25), np.int8(zero_point))
    x = np.arange(-1200, 1200, dtype=np.float32) / 8  # every second one is a tie
    expected = np.clip([round(v / 0.25) + zero_point for v in x.tolist()], -128, 127)
    np.testing.assert_array_equal(quantize(x, qparams), expected)
    np.testing.assert_array_equal(quantize(x, qparams), runtime_quantize(x, qparams))


@given(low=values, high=values)
@settings(max_examples=100)
def test_known_formulas(low: float, high: float) -> None:
    """Krishnamoorthi, arXiv 1806.08342, sections 2.1 and 2.2."""
    low, high = min(low, high, 0.0), max(low, high, 0.0)
    if high - low < 1e-20:
        return
    affine = qparams_from_range(low, high, QuantSpec("uint8", symmetric=False))
    assert affine.scale == pytest.approx((high - low) / 255, rel=1e-6)
    assert abs(int(affine.zero_point) + low / (high - low) * 255) <= 0.5001
    symmetric = qparams_from_range(low, high, QuantSpec("int8", restricted=True))
    assert symmetric.scale == pytest.approx(max(-low, high) / 127, rel=1e-6)


@pytest.mark.parametrize(
    ("low", "zero_point"), [(0.0, 0), (-0.1, 128)], ids=["non-negative", "signed"]
)
def test_symmetric_unsigned_wastes_nothing_on_non_negative_data(
    low: float, zero_point: int
) -> None:
    assert qparams_from_range(low, 1.0, QuantSpec("uint8")).zero_point == zero_point


@each_spec
@pytest.mark.parametrize(
    ("low", "high"),
    [(0, 0), (0, 1e-45), (-1e-40, 1e-42), (-3.4028235e38, 3.4028235e38), (5, 6), (-6, -5)],
    ids=str,
)
def test_extreme_ranges_stay_finite(spec: QuantSpec, low: float, high: float) -> None:
    qparams = qparams_from_range(low, high, spec)
    assert np.finfo(np.float32).tiny <= qparams.scale < np.inf
    assert np.isfinite(fake_quantize(np.array([low, 0, high], np.float32), qparams)).all()
    if low == high == 0:
        assert qparams.scale == 1


@pytest.mark.parametrize(("low", "high"), [(1.0, -1.0), (math.nan, 1.0), (0.0, math.inf)], ids=str)
def test_what_is_not_a_range_is_refused(low: float, high: float) -> None:
    with pytest.raises(UsageError, match="not a range"):
        qparams_from_range(low, high, QuantSpec())


def test_dead_channels_take_the_scale_of_the_others() -> None:
    w = np.array([[0.0, 0.0], [1.27, -0.5], [0.0254, 0.0]], np.float32)
    qparams = weight_qparams(w, QuantSpec(restricted=True, granularity="per_channel"), axis=0)
    assert qparams.scale.tolist() == pytest.approx([0.01, 0.01, 0.0002])
    assert not quantize(w, qparams)[0].any()
    grouped = weight_qparams(w, QuantSpec(granularity="per_group", group=2, restricted=True), 1)
    assert grouped.scale.tolist() == [[scale] for scale in qparams.scale.tolist()]
    dead = weight_qparams(w * 0, QuantSpec(granularity="per_channel"), axis=0)
    assert dead.scale.tolist() == [1, 1, 1]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf], ids=str)
def test_bad_weights_are_refused(bad: float) -> None:
    with pytest.raises(UnsupportedError, match="NaN or infinity"):
        weight_qparams(np.array([1.0, bad], np.float32), QuantSpec())


def test_wrong_axis_and_wrong_number_of_channels_are_refused() -> None:
    w = np.ones((3, 4), np.float32)
    spec = QuantSpec(granularity="per_channel")
    with pytest.raises(UsageError, match="no axis 2"):
        weight_qparams(w, spec, axis=2)
    with pytest.raises(UsageError, match="3 scales"):
        quantize(w.reshape(4, 3), weight_qparams(w, spec, axis=0))
    with pytest.raises(UsageError, match="given the axis 0"):
        weight_qparams(w, QuantSpec(), axis=0)


def test_groups_that_do_not_divide_an_axis_are_refused() -> None:
    spec = QuantSpec("int4", granularity="per_group", group=4)
    with pytest.raises(UsageError, match="groups of 4 do not divide"):
        weight_qparams(np.ones((6, 4), np.float32), spec, axis=0)
    with pytest.raises(UsageError, match=r"needs scales of shape \(2, 6\)"):
        quantize(np.ones((8, 6), np.float32), weight_qparams(np.ones((4, 6), np.float32), spec, 0))


def test_large_tensors_are_cut_into_blocks_without_seams() -> None:
    w = np.random.default_rng(0).standard_normal((3, 2, 70_001)).astype(np.float32)
    for axis in range(3):
        qparams = weight_qparams(w, QuantSpec("int8", False, granularity="per_channel"), axis)
        shape = [-1 if i == axis else 1 for i in range(3)]
        scale, zero_point = qparams.scale.reshape(shape), qparams.zero_point.reshape(shape)
        whole = np.clip(np.rint(w / scale) + zero_point, -128, 127)
        np.testing.assert_array_equal(quantize(w, qparams), whole)
    folded = w[:, :, :70_000].reshape(6, 10_000, 7)
    grouped = weight_qparams(folded, QuantSpec("int4", granularity="per_group", group=7), -1)
    np.testing.assert_array_equal(
        quantize(folded, grouped), np.clip(np.rint(folded / grouped.scale), -8, 7)
    )
    whole_tensor = weight_qparams(w, QuantSpec())
    np.testing.assert_array_equal(
        dequantize(quantize(w, whole_tensor), whole_tensor),
        np.clip(np.rint(w / whole_tensor.scale), -128, 127) * whole_tensor.scale,
    )


def test_empty_tensors_stay_empty() -> None:
    empty = np.zeros((0, 4), np.float32)
    assert quantize(empty, weight_qparams(empty, QuantSpec())).shape == (0, 4)


def test_other_float_types_are_quantized_as_float32() -> None:
    x = np.linspace(-1, 1, 100)
    qparams = weight_qparams(x, QuantSpec())
    expected = quantize(x.astype(np.float16).astype(np.float32), qparams)
    np.testing.assert_array_equal(quantize(x.astype(np.float16), qparams), expected)


@pytest.mark.parametrize(("value", "expected"), [(3e38, 127), (-3e38, -128)], ids=str)
def test_division_that_overflows_saturates(value: float, expected: int) -> None:
    qparams = QParams(QuantSpec(), np.float32(2e-38), np.int8(0))
    assert quantize(np.array([value], np.float32), qparams) == expected
