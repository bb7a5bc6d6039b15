"""The table of formats, and which specs there are."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any, get_args

import numpy as np
import pytest

from compress.errors import UsageError
from quant.spec import (
    FORMATS,
    DType,
    FloatDType,
    FloatFormat,
    IntegerDType,
    IntegerFormat,
    QParams,
    QuantSpec,
)


@pytest.mark.parametrize("dtype", get_args(IntegerDType))
def test_an_integer_format_is_what_its_name_says(dtype: str) -> None:
    form = FORMATS[dtype]
    assert isinstance(form, IntegerFormat)
    assert dtype == f"{'int' if form.signed else 'uint'}{form.bits}"
    spec = QuantSpec(dtype)  # type: ignore[arg-type]
    storage = np.iinfo(form.storage)
    assert storage.min <= spec.qmin < spec.qmax <= storage.max
    assert storage.bits == (8 if form.bits <= 8 else 16)
    assert spec.qmax - spec.qmin + 1 == 2**form.bits
    assert spec.integer


@pytest.mark.parametrize("dtype", get_args(FloatDType))
def test_the_largest_value_of_a_float_format_is_on_its_grid(dtype: str) -> None:
    form = FORMATS[dtype]
    assert isinstance(form, FloatFormat)
    fraction, exponent = np.frexp(form.max)
    digits = float(fraction) * 2 ** (form.mantissa_bits + 1)
    assert digits == int(digits)
    assert 1 <= exponent - 1 + form.bias < 2**form.exponent_bits
    spec = QuantSpec(dtype)  # type: ignore[arg-type]
    assert (spec.qmin, spec.qmax, spec.bits) == (-form.max, form.max, form.bits)
    assert not spec.integer
    assert np.float32(form.max) == form.max


def test_every_format_has_a_name_for_the_type_checker() -> None:
    integers, floats = get_args(DType)
    assert {*get_args(integers), *get_args(floats)} == set(FORMATS)


@pytest.mark.parametrize(
    ("spec", "limits"),
    [
        (QuantSpec("int2"), (-2, 1)),
        (QuantSpec("int2", restricted=True), (-1, 1)),
        (QuantSpec("int4", restricted=True), (-7, 7)),
        (QuantSpec("int3", reduced=True), (-2, 1)),
        (QuantSpec("uint2"), (0, 3)),
        (QuantSpec("int16", restricted=True), (-32767, 32767)),
        (QuantSpec("uint16"), (0, 65535)),
        (QuantSpec("float4_e2m1"), (-6, 6)),
        (QuantSpec("float8_e4m3fn"), (-448, 448)),
        (QuantSpec("float8_e5m2"), (-57344, 57344)),
        (QuantSpec("float16"), (-65504, 65504)),
    ],
    ids=str,
)
def test_limits_of_the_formats(spec: QuantSpec, limits: tuple[float, float]) -> None:
    assert (spec.qmin, spec.qmax) == limits


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int9"}, "'int9' is not a quantized format.*uint16.*bfloat16"),
        ({"granularity": "per_row"}, "per_tensor, per_channel, per_group"),
        ({"dtype": "uint4", "restricted": True}, "most negative value"),
        ({"dtype": "int2", "reduced": True}, "leaves 1 bit of int2"),
        ({"dtype": "float8_e4m3fn", "symmetric": False}, "float format"),
        ({"dtype": "float4_e2m1", "restricted": True}, "float format"),
        ({"dtype": "bfloat16", "reduced": True}, "float format"),
        ({"granularity": "per_group"}, "per_group needs group.*None"),
        ({"granularity": "per_group", "group": 1}, "per_group needs group.*1"),
        ({"granularity": "per_group", "group": "32"}, "per_group needs group.*'32'"),
        ({"granularity": "per_channel", "group": 32}, "no meaning per_channel"),
        ({"group": 32}, "no meaning per_tensor"),
    ],
    ids=str,
)
def test_specs_that_make_no_sense_say_why(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        QuantSpec(**options)


def test_what_a_spec_was_before_is_what_it_is_without_the_new_fields() -> None:
    old = {
        "dtype": "uint8",
        "symmetric": False,
        "reduced": True,
        "restricted": False,
        "granularity": "per_channel",
    }
    spec = QuantSpec(**old)  # type: ignore[arg-type]
    assert (spec.group, spec.power_of_two, spec.dynamic) == (None, False, False)
    assert {**asdict(spec), **old} == asdict(spec)


@pytest.mark.parametrize(
    "spec",
    [
        QuantSpec("int4", granularity="per_group", group=2, power_of_two=True),
        QuantSpec("float8_e5m2", granularity="per_group", group=2),
        QuantSpec("uint16", symmetric=False, granularity="per_group", group=2, dynamic=True),
    ],
    ids=str,
)
def test_grouped_parameters_survive_json(spec: QuantSpec) -> None:
    scale = np.array([[0.1, 0.25, 3.0], [1e-3, 7.0, 0.3]], np.float32)
    params = QParams(spec, scale, np.zeros((2, 3)), 1)
    restored = QParams.from_dict(json.loads(json.dumps(params.to_dict())))
    assert restored == params
    assert restored.zero_point.dtype == np.dtype(spec.format.storage)


@pytest.mark.parametrize(
    ("spec", "scale", "zero_point", "axis", "message"),
    [
        (QuantSpec(granularity="per_group", group=2), 1.0, 0, 0, "per_group scale has shape"),
        (QuantSpec(granularity="per_group", group=2), [1.0], [0], None, "axis None"),
        (QuantSpec(granularity="per_group", group=2), [[1.0]], [[0]], 2, "one of its axes"),
        (QuantSpec("float8_e4m3fn"), 1.0, 1, None, "zero point is 0"),
        (QuantSpec("int3"), 1.0, 4, None, r"within \[-4, 3\]"),
    ],
    ids=["rank", "no-axis", "axis", "float", "narrow"],
)
def test_impossible_parameters_say_why(
    spec: QuantSpec, scale: object, zero_point: object, axis: int | None, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        QParams(spec, np.asarray(scale), np.asarray(zero_point), axis)
