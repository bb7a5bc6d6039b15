"""Every identity of structural re-parameterization, in float64 against torch."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as functional
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from compress.reparam.affine import AffineMap, Axis, NotMergeableError

TOLERANCE = 1e-10
EXTENT = 13


def tensor(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array, np.float64))


def applied(whole: AffineMap, x: torch.Tensor) -> torch.Tensor:
    """The map as torch computes it: explicit padding, then a convolution without any."""
    axes, dims = whole.geometry.axes, len(whole.geometry.axes)
    if not dims:
        return functional.linear(x, tensor(whole.weight), tensor(whole.bias))
    pads = [pad for axis in reversed(axes) for pad in axis.pads]
    filling = tensor(whole.fill).view(1, -1, *[1] * dims)
    padded = functional.pad(x - filling, pads) + filling
    convolution = (functional.conv1d, functional.conv2d, functional.conv3d)[dims - 1]
    out: torch.Tensor = convolution(
        padded,
        tensor(whole.weight),
        tensor(whole.bias),
        stride=[axis.stride for axis in axes],
        dilation=[axis.step for axis in axes],
        groups=whole.geometry.groups,
    )
    return out


def assert_equal(got: torch.Tensor, expected: torch.Tensor) -> None:
    assert got.shape == expected.shape
    assert (got - expected).abs().max() <= TOLERANCE * max(1.0, float(expected.abs().max()))


def random_map(
    rng: np.random.Generator,
    inputs: int,
    outputs: int,
    groups: int,
    windows: list[tuple[int, int, int, int, int]],
    bias: bool = True,
) -> AffineMap:
    """Windows are (size, stride, dilation, begin, end)."""
    axes = [Axis.of(*window, EXTENT) for window in windows]
    weight = rng.normal(size=(outputs, inputs // groups, *(w[0] for w in windows)))
    shift = rng.normal(size=outputs) if bias else None
    return AffineMap.of(weight, shift, groups, axes)


def image(rng: np.random.Generator, channels: int, dims: int, extent: int = EXTENT) -> torch.Tensor:
    return tensor(rng.normal(size=(2, channels, *[extent] * dims)))


SEEDS = st.integers(0, 10_000)
WINDOW = st.tuples(
    st.integers(1, 4), st.just(1), st.integers(1, 3), st.integers(0, 3), st.integers(0, 3)
)
quick = settings(max_examples=40)


@quick
@given(seed=SEEDS, dims=st.integers(1, 3), groups=st.sampled_from([1, 2, 4]), bias=st.booleans())
def test_i_batchnorm_behind_a_convolution(seed: int, dims: int, groups: int, bias: bool) -> None:
    rng = np.random.default_rng(seed)
    window = (3, int(rng.integers(1, 3)), int(rng.integers(1, 3)), 1, 2)
    conv = random_map(rng, 4, 8, groups, [window] * dims, bias)
    gamma, beta, mean = rng.normal(size=(3, 8))
    var = rng.uniform(0.1, 2, 8)
    factor = gamma / np.sqrt(var + 1e-5)
    norm = AffineMap.scale(factor, beta - factor * mean, [Axis()] * dims)
    x = image(rng, 4, dims)
    expected = functional.batch_norm(
        applied(conv, x), tensor(mean), tensor(var), tensor(gamma), tensor(beta), eps=1e-5
    )
    assert_equal(applied(conv.then(norm), x), expected)


@quick
@given(
    seed=SEEDS,
    first=st.lists(WINDOW, min_size=1, max_size=2),
    second=st.data(),
    groups=st.tuples(st.sampled_from([1, 2, 4]), st.sampled_from([1, 2, 4])),
    stride=st.integers(1, 3),
)
def test_ii_iii_x_xi_parallel_branches(
    seed: int, first: list[Any], second: Any, groups: tuple[int, int], stride: int
) -> None:
    """Kernels of any two sizes, dilations, paddings and groups that give equally large outputs."""
    rng = np.random.default_rng(seed)
    others = []
    for size, _, dilation, begin, end in first:
        excess = begin + end - dilation * (size - 1)
        k, d = second.draw(st.integers(1, 4)), second.draw(st.integers(1, 3))
        total = excess + d * (k - 1)
        assume(total >= 0 and EXTENT + excess >= 1)
        front = second.draw(st.integers(0, total))
        others.append((k, stride, d, front, total - front))
    windows = [(size, stride, *rest) for size, _, *rest in first]
    a = random_map(rng, 4, 8, groups[0], windows)
    b = random_map(rng, 4, 8, groups[1], others)
    x = image(rng, 4, len(first))
    total = a.plus(b)
    assert_equal(applied(total, x), applied(a, x) + applied(b, x))
    assert_equal(applied(a.plus(b.negated()), x), applied(a, x) - applied(b, x))
    assert total.geometry.groups == math.gcd(*groups)


@quick
@given(seed=SEEDS, groups=st.sampled_from([1, 2, 4]), dims=st.integers(1, 3), k=st.integers(1, 3))
def test_iv_ix_identity_and_scale(seed: int, groups: int, dims: int, k: int) -> None:
    rng = np.random.default_rng(seed)
    conv = random_map(rng, 4, 4, groups, [(2 * k - 1, 1, 1, k - 1, k - 1)] * dims)
    x = image(rng, 4, dims)
    factor, shift = rng.normal(size=(2, 4))
    scale = AffineMap.scale(factor, shift, [Axis()] * dims)
    column = (1, -1, *[1] * dims)
    expected = applied(conv, x) + x * tensor(factor).view(column) + tensor(shift).view(column)
    assert_equal(applied(conv.plus(scale), x), expected)
    same = AffineMap.scale(np.ones(4), np.zeros(4), [Axis()] * dims)
    assert_equal(applied(conv.plus(same), x), applied(conv, x) + x)
    assert conv.plus(same).geometry == conv.geometry


@quick
@given(seed=SEEDS, k=st.integers(1, 4), stride=st.integers(1, 3), data=st.data())
def test_v_mean_over_a_window(seed: int, k: int, stride: int, data: Any) -> None:
    rng = np.random.default_rng(seed)
    pad = data.draw(st.integers(0, k // 2))
    weight = np.full((4, 1, k, k), 1 / k**2)
    pool = AffineMap.of(weight, None, 4, [Axis.of(k, stride, 1, pad, pad, EXTENT)] * 2)
    x = image(rng, 4, 2)
    expected = functional.avg_pool2d(x, k, stride, pad, count_include_pad=True)
    assert_equal(applied(pool, x), expected)
    front = random_map(rng, 3, 4, 1, [(1, 1, 1, pad, pad)] * 2)
    inner = AffineMap.of(weight, None, 4, [Axis.of(k, stride, 1, 0, 0)] * 2)
    y = image(rng, 3, 2)
    expected = functional.avg_pool2d(applied(front, y), k, stride)
    assert_equal(applied(front.then(inner), y), expected)


@quick
@given(
    seed=SEEDS,
    dims=st.integers(1, 2),
    groups=st.tuples(st.sampled_from([1, 2, 4]), st.sampled_from([1, 2, 4])),
    strides=st.tuples(st.integers(1, 3), st.integers(1, 2)),
    sizes=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    dilations=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    front=st.integers(0, 2),
)
def test_vi_vii_viii_one_after_the_other(
    seed: int,
    dims: int,
    groups: tuple[int, int],
    strides: tuple[int, int],
    sizes: tuple[int, int],
    dilations: tuple[int, int],
    front: int,
) -> None:
    """Padding only in front: true for every kernel, stride and dilation of both."""
    rng = np.random.default_rng(seed)
    a = random_map(rng, 4, 8, groups[0], [(sizes[0], strides[0], dilations[0], front, 1)] * dims)
    axes = [Axis.of(sizes[1], strides[1], dilations[1], 0, 0)] * dims
    weight = rng.normal(size=(4, 8 // groups[1], *[sizes[1]] * dims))
    b = AffineMap.of(weight, rng.normal(size=4), groups[1], axes)
    x = image(rng, 4, dims)
    between = applied(a, x)
    assume(between.shape[-1] > dilations[1] * (sizes[1] - 1))
    assert_equal(applied(a.then(b), x), applied(b, between))


@quick
@given(seed=SEEDS, stride=st.integers(1, 2), pad=st.integers(1, 2), k=st.integers(2, 4))
def test_vi_with_padding_in_between(seed: int, stride: int, pad: int, k: int) -> None:
    """Zeros are right without a bias; with one, what is padded has to be that bias."""
    rng = np.random.default_rng(seed)
    x = image(rng, 3, 2)
    weight = rng.normal(size=(5, 4, k, k))
    padded = AffineMap.of(weight, None, 1, [Axis.of(k, 1, 1, pad, pad)] * 2)
    plain = random_map(rng, 3, 4, 1, [(1, stride, 1, 0, 0)] * 2, bias=False)
    assert_equal(applied(plain.then(padded), x), applied(padded, applied(plain, x)))
    biased = random_map(rng, 3, 4, 1, [(1, stride, 1, 0, 0)] * 2)
    with pytest.raises(NotMergeableError, match="where the first would write its bias"):
        biased.then(padded)
    frame = AffineMap.scale(np.ones(4), np.zeros(4), [Axis.of(1, 1, 1, pad, pad)] * 2)
    filled = AffineMap(frame.geometry, frame.kernel, frame.bias, biased.bias)
    valid = AffineMap.of(weight, None, 1, [Axis.of(k, 1, 1, 0, 0)] * 2)
    whole = biased.then(filled).then(valid)
    assert not whole.fill.any()
    inner = applied(biased, x)
    column = tensor(biased.bias).view(1, -1, 1, 1)
    expected = applied(valid, functional.pad(inner - column, [pad] * 4) + column)
    assert_equal(applied(whole, x), expected)
    other = AffineMap(frame.geometry, frame.kernel, frame.bias, biased.bias + 1)
    with pytest.raises(NotMergeableError, match="is not the bias of the first"):
        biased.then(other)


def test_a_padded_layer_behind_a_window_is_refused() -> None:
    rng = np.random.default_rng(0)
    first = random_map(rng, 3, 4, 1, [(3, 1, 1, 1, 1)] * 2, bias=False)
    second = random_map(rng, 4, 4, 1, [(3, 1, 1, 1, 1)] * 2)
    with pytest.raises(NotMergeableError, match="borders would differ"):
        first.then(second)
    # One that sees nothing but padding beyond its output is none of those.
    full = random_map(rng, 3, 4, 1, [(3, 1, 1, 2, 2)] * 2, bias=False)
    x = image(rng, 3, 2)
    assert_equal(applied(full.then(second), x), applied(second, applied(full, x)))


@quick
@given(seed=SEEDS, r=st.integers(1, 4), k=st.integers(2, 4), channels=st.integers(1, 4))
def test_x_dilated_beside_dense(seed: int, r: int, k: int, channels: int) -> None:
    rng = np.random.default_rng(seed)
    span = r * (k - 1)
    large = random_map(rng, channels, channels, channels, [(13, 1, 1, 6, 6)] * 2)
    dilated = random_map(
        rng, channels, channels, channels, [(k, 1, r, span // 2, -(-span // 2))] * 2
    )
    x = image(rng, channels, 2)
    total = large.plus(dilated)
    assert total.geometry.sizes == (13, 13)
    assert_equal(applied(total, x), applied(large, x) + applied(dilated, x))
    # By the published formula: zeros between the taps.
    one = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    spread = functional.conv_transpose2d(tensor(dilated.weight), one.expand(1, 1, 1, 1), stride=r)
    offset = 6 - span // 2
    kernel = large.weight.copy()
    kernel[:, :, offset : offset + span + 1, offset : offset + span + 1] += spread.numpy()
    np.testing.assert_allclose(total.weight, kernel, atol=1e-12)


@quick
@given(seed=SEEDS, sizes=st.lists(st.sampled_from([1, 3, 5]), min_size=2, max_size=3))
def test_xii_branches_behind_each_other(seed: int, sizes: list[int]) -> None:
    rng = np.random.default_rng(seed)
    maps = [random_map(rng, 4, 2 + i, 1, [(k, 2, 1, k // 2, k // 2)]) for i, k in enumerate(sizes)]
    x = image(rng, 4, 1)
    whole = maps[0]
    for other in maps[1:]:
        whole = whole.stacked(other)
    assert_equal(applied(whole, x), torch.cat([applied(one, x) for one in maps], 1))
    grouped = random_map(rng, 4, 4, 2, [(3, 2, 1, 1, 1)])
    expected = torch.cat([applied(maps[0], x), applied(grouped, x)], 1)
    assert_equal(applied(maps[0].stacked(grouped), x), expected)


@quick
@given(seed=SEEDS, groups=st.sampled_from([1, 2, 4]), second=st.sampled_from([1, 2]))
def test_linear_layers_on_tokens(seed: int, groups: int, second: int) -> None:
    rng = np.random.default_rng(seed)
    a, b = (random_map(rng, 8, 8, g, []) for g in (groups, groups * second % 3 or 1))
    x = tensor(rng.normal(size=(2, 5, 8)))

    def dense(one: AffineMap) -> AffineMap:
        return one.plus(AffineMap.of(np.zeros((8, 8))))

    p, q = dense(a), dense(b)
    same = AffineMap.scale(np.ones(8), np.zeros(8), [])
    assert_equal(applied(dense(a.plus(b).plus(same)), x), applied(p, x) + applied(q, x) + x)
    assert_equal(applied(dense(a.then(b)), x), applied(q, applied(p, x)))


def test_what_does_not_fit_is_refused_with_the_reason() -> None:
    rng = np.random.default_rng(0)
    conv = random_map(rng, 4, 8, 1, [(3, 1, 1, 1, 1)])
    with pytest.raises(NotMergeableError, match="strides 1 and 2 differ"):
        conv.plus(random_map(rng, 4, 8, 1, [(3, 2, 1, 1, 1)]))
    with pytest.raises(NotMergeableError, match="4 to 8 and 4 to 4 channels differ"):
        conv.plus(random_map(rng, 4, 4, 1, [(3, 1, 1, 1, 1)]))
    with pytest.raises(NotMergeableError, match="only for some sizes"):
        conv.plus(random_map(rng, 4, 8, 1, [(3, 1, 1, 1, 0)]))
    with pytest.raises(NotMergeableError, match="no spatial axes"):
        conv.plus(random_map(rng, 4, 8, 1, []))
    with pytest.raises(NotMergeableError, match="read 4 and 8 channels"):
        conv.stacked(random_map(rng, 8, 8, 1, [(3, 1, 1, 1, 1)]))


def test_equally_large_for_this_input_only() -> None:
    """A mean of 2 x 2 beside a 1x1, both in steps of 2, fit on even sizes."""
    rng = np.random.default_rng(0)
    for extent, fits in ((12, True), (13, False)):
        small = AffineMap.of(rng.normal(size=(4, 4, 1)), None, 1, [Axis.of(1, 2, 1, 0, 0, extent)])
        pool = AffineMap.of(np.full((4, 1, 2), 0.5), None, 4, [Axis.of(2, 2, 1, 0, 0, extent)])
        x = image(rng, 4, 1, extent)
        if fits:
            assert_equal(applied(small.plus(pool), x), applied(small, x) + applied(pool, x))
        else:
            with pytest.raises(NotMergeableError, match="only for some sizes"):
                small.plus(pool)
