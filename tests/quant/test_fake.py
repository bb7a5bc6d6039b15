"""The quantizer in torch against the one on arrays, and its gradients against their formulas."""

from __future__ import annotations

import math
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor

import quant.quantizer
from compress.errors import UsageError
from quant.fake import expand, fake_quantize, lsq_gradient_scale
from quant.quantizer import weight_qparams
from quant.spec import FORMATS, IntegerFormat, QParams, QuantSpec

SPECS = [
    QuantSpec(dtype, symmetric=symmetric)  # type: ignore[arg-type]
    for dtype, form in FORMATS.items()
    for symmetric in ((True, False) if isinstance(form, IntegerFormat) else (True,))
] + [
    QuantSpec("int8", reduced=True, restricted=True),
    QuantSpec("uint8", symmetric=False, reduced=True),
    QuantSpec("int4", power_of_two=True),
]


def name_of(spec: QuantSpec) -> str:
    flags = [f.name for f in fields(spec) if getattr(spec, f.name) is True]
    return "-".join([spec.dtype, *flags])


each_spec = pytest.mark.parametrize("spec", SPECS, ids=name_of)
values = st.floats(-(2.0**100), 2.0**100, width=32)
tensors = hnp.arrays(np.float32, st.tuples(*[st.integers(1, 4)] * 3), elements=values)


def parameters(qparams: QParams) -> tuple[Tensor, Tensor]:
    return torch.tensor(qparams.scale), torch.tensor(qparams.zero_point.astype(np.float32))


def unit(spec: QuantSpec, zero_point: float = 0.0) -> tuple[Tensor, Tensor]:
    """A scale of 0.5 that needs a gradient, and a zero point."""
    return torch.tensor(0.5, requires_grad=True), torch.tensor(zero_point)


@each_spec
@pytest.mark.parametrize("granularity", ["per_tensor", "per_channel", "per_group"])
@given(x=tensors, axis=st.integers(-3, 2), tracked=st.booleans())
@settings(max_examples=8)
def test_values_are_those_of_the_quantizer_to_the_last_bit(
    spec: QuantSpec, granularity: str, x: np.ndarray, axis: int, tracked: bool
) -> None:
    group = None
    if granularity == "per_group":
        group = 2
        x = np.concatenate([x, -x / 3], axis)
    spec = replace(spec, granularity=granularity, group=group)
    place = None if granularity == "per_tensor" else axis
    qparams = weight_qparams(x / 2, spec, place)  # half of the range: some values saturate
    tensor = torch.tensor(x, requires_grad=tracked)
    found = fake_quantize(tensor, *parameters(qparams), spec, place).detach().numpy()
    expected = quant.quantizer.fake_quantize(x, qparams)
    np.testing.assert_array_equal(found.view(np.uint32), expected.view(np.uint32))
    np.testing.assert_array_equal(tensor.detach().numpy(), x)


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2", "float16", "bfloat16"])
def test_float_formats_round_as_torch_casts(dtype: str) -> None:
    spec = QuantSpec(dtype)  # type: ignore[arg-type]
    x = torch.randn(10_000, generator=torch.manual_seed(0)) * torch.logspace(-12, 2, 10_000)
    found = fake_quantize(x, torch.tensor(1.0), torch.tensor(0.0), spec)
    assert torch.equal(found, x.to(getattr(torch, dtype)).float())


@pytest.mark.parametrize(
    ("spec", "zero_point"),
    [
        (QuantSpec("int8"), 0),
        (QuantSpec("int4", restricted=True), 0),
        (QuantSpec("uint8", symmetric=False), 30),
        (QuantSpec("uint3", symmetric=False), 2),
        (QuantSpec("float4_e2m1"), 0),
        (QuantSpec("float8_e4m3fn"), 0),
    ],
    ids=lambda value: name_of(value) if isinstance(value, QuantSpec) else str(value),
)
def test_gradients_are_those_of_lsq(spec: QuantSpec, zero_point: int) -> None:
    """Esser et al., arXiv 1902.08153, equations 3 and 5, written element by element."""
    low, high = spec.qmin - zero_point, spec.qmax - zero_point
    generator = torch.manual_seed(0)
    x = (torch.rand(500, generator=generator) * 1.5 - 0.25) * (high - low) / 2 + low / 2
    x = x.requires_grad_()
    scale, zero = unit(spec, zero_point)
    upstream = torch.randn(500, generator=generator)
    quantized = fake_quantize(x, scale, zero, spec)
    quantized.backward(upstream)
    of_scale = 0.0
    for value, level, weight, gradient in zip(
        x.tolist(), (quantized / 0.5).tolist(), upstream.tolist(), x.grad.tolist(), strict=True
    ):
        steps = value / 0.5
        inside = low <= steps <= high
        assert gradient == (weight if inside else 0)
        of_scale += weight * (level - steps if inside else (low if steps < low else high))
    outside = int((x.grad == 0).sum())
    assert 50 < outside < 450
    assert float(scale.grad) == pytest.approx(of_scale, rel=1e-4, abs=1e-4 * high)


@pytest.mark.parametrize("spec", [QuantSpec("int4"), QuantSpec("float8_e5m2")], ids=name_of)
def test_the_gradient_of_a_saturated_scale_is_that_of_finite_differences(spec: QuantSpec) -> None:
    x = torch.tensor([1e6, 2e6, -1e6])
    scale, zero = unit(spec)
    fake_quantize(x, scale, zero, spec).sum().backward()
    step = 2.0**-6
    up, down = (
        float(fake_quantize(x, torch.tensor(0.5 + change), zero, spec).double().sum())
        for change in (step, -step)
    )
    assert float(scale.grad) == pytest.approx((up - down) / (2 * step))


def test_each_scale_gets_the_gradient_of_its_own_values() -> None:
    x = np.random.default_rng(0).standard_normal((4, 6, 5)).astype(np.float32)
    for granularity, group in (("per_channel", None), ("per_group", 3)):
        spec = QuantSpec("int3", granularity=granularity, group=group)  # type: ignore[arg-type]
        scale, zero = parameters(weight_qparams(x / 2, spec, 1))
        scale.requires_grad_()
        (fake_quantize(torch.tensor(x), scale, zero, spec, 1) ** 2).sum().backward()
        for index in np.ndindex(tuple(scale.shape)):
            part = x[:, index[0]] if group is None else x[index[0], 3 * index[1] :][:3, index[2]]
            single = scale.detach()[index].clone().requires_grad_()
            values = fake_quantize(torch.tensor(part), single, zero[index], QuantSpec("int3"))
            (values**2).sum().backward()
            assert float(scale.grad[index]) == pytest.approx(float(single.grad), rel=1e-4)


def test_the_largest_weight_of_a_channel_can_move() -> None:
    """Its quotient by a min-max scale may be 127.00001."""
    w = np.random.default_rng(0).standard_normal((500, 9)).astype(np.float32)
    spec = QuantSpec("int8", restricted=True, granularity="per_channel")
    weight = torch.tensor(w, requires_grad=True)
    fake_quantize(weight, *parameters(weight_qparams(w, spec, 0)), spec, 0).sum().backward()
    assert (weight.grad == 1).all()


def test_the_gradient_scale_is_a_factor_on_the_scale_alone() -> None:
    spec = QuantSpec("int4")
    found = []
    for factor in (1.0, 0.125):
        x = torch.linspace(-9, 9, 101, requires_grad=True)
        scale, zero = unit(spec)
        fake_quantize(x, scale, zero, spec, gradient_scale=factor).sum().backward()
        found.append((x.grad, float(scale.grad)))
    assert torch.equal(found[0][0], found[1][0])
    assert found[1][1] == pytest.approx(found[0][1] / 8)
    assert lsq_gradient_scale(100, spec) == pytest.approx(1 / math.sqrt(700))


def test_a_learned_scale_comes_close_to_the_best_one() -> None:
    x = torch.tensor(np.random.default_rng(0).laplace(size=4000).astype(np.float32))
    spec, zero = QuantSpec("int4"), torch.tensor(0.0)

    def error(scale: Tensor) -> Tensor:
        return (fake_quantize(x, scale, zero, spec) - x).square().mean()

    scale = (x.abs().max() / 7).requires_grad_()
    first = float(error(scale.detach()))
    optimizer = torch.optim.Adam([scale], lr=0.02)
    for _ in range(200):
        optimizer.zero_grad()
        error(scale).backward()
        optimizer.step()
    best = min(float(error(torch.tensor(s))) for s in np.linspace(0.2, 1.6, 71, dtype=np.float32))
    assert float(error(scale.detach())) <= 1.05 * best < 0.7 * first


def test_gradients_flow_through_half_precision_and_only_where_they_are_wanted() -> None:
    spec, (scale, zero) = QuantSpec("int8"), unit(QuantSpec())
    x = torch.tensor([0.3, 100.0], dtype=torch.float16, requires_grad=True)
    y = fake_quantize(x, scale.detach(), zero, spec)
    assert y.dtype == torch.float32
    y.sum().backward()
    assert x.grad.tolist() == [1, 0]
    assert x.grad.dtype == torch.float16
    with torch.no_grad():
        assert not fake_quantize(x, scale, zero, spec).requires_grad
    fake_quantize(x.detach(), scale, zero, spec).sum().backward()
    assert float(scale.grad) == pytest.approx(127 + 1 - 0.3 / 0.5, rel=1e-3)


def test_a_second_derivative_sees_through_the_rounding() -> None:
    spec, (scale, zero) = QuantSpec("int8"), unit(QuantSpec())
    x = torch.tensor([0.3, 3.0, 100.0], requires_grad=True)
    loss = (fake_quantize(x, scale.detach(), zero, spec) ** 3).sum()
    (first,) = torch.autograd.grad(loss, x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    assert first.tolist() == [0.75, 27, 0]
    assert second.tolist() == [3, 18, 0]


def test_expanded_scales_stand_beside_their_values() -> None:
    assert expand(torch.tensor(2.0), 4).shape == ()
    channels = expand(torch.arange(3.0), 4, -3)
    assert channels.shape == (1, 3, 1, 1)
    groups = torch.arange(6.0).reshape(2, 3).requires_grad_()
    expanded = expand(groups, 2, 1, 2)
    assert expanded.tolist() == [[0, 0, 1, 1, 2, 2], [3, 3, 4, 4, 5, 5]]
    expanded.sum().backward()
    assert (groups.grad == 2).all()


@pytest.mark.parametrize(
    ("spec", "scale", "axis"),
    [
        (QuantSpec(), torch.ones(4), None),
        (QuantSpec(), torch.ones(()), 0),
        (QuantSpec(granularity="per_channel"), torch.ones(4), None),
        (QuantSpec(granularity="per_channel"), torch.ones(1), 0),
        (QuantSpec(granularity="per_channel"), torch.ones(4), 2),
        (QuantSpec(granularity="per_group", group=2), torch.ones(2, 3), 0),
        (QuantSpec(granularity="per_group", group=3), torch.ones(1, 6), 0),
    ],
    ids=["channels", "axis", "no-axis", "one-channel", "no-such-axis", "groups", "ragged"],
)
def test_scales_of_another_tensor_are_refused(
    spec: QuantSpec, scale: Tensor, axis: int | None
) -> None:
    with pytest.raises(UsageError):
        fake_quantize(torch.ones(4, 6), scale, torch.zeros_like(scale), spec, axis)
