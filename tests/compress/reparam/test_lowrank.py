from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from compress.errors import MissingExtraError, UnsupportedError, UsageError
from compress.reparam import factorize, full_ranks
from compress.reparam.lowrank_decompose import decompose
from compress.reparam.lowrank_factors import METHODS, Method, dense, forms

WITHOUT_EXTRA: tuple[Method, ...] = ("channel_svd", "spatial_svd")


def methods(*names: Method) -> list[Any]:
    def mark(name: Method) -> Any:
        return pytest.param(name, marks=[] if name in WITHOUT_EXTRA else [needs_tensorly])

    return [mark(name) for name in names]


def _has_tensorly() -> bool:
    try:
        import tensorly  # noqa: F401
    except ImportError:
        return False
    return True


needs_tensorly = pytest.mark.skipif(not _has_tensorly(), reason="tensorly is not installed")


@st.composite
def convolutions(draw: st.DrawFn, axes: int = 2) -> tuple[nn.Module, torch.Tensor]:
    """A convolution with random weights in float64, and an input for it."""
    groups = draw(st.integers(1, 3))
    kernel = [draw(st.integers(1, 3)) for _ in range(axes)]
    kind = nn.Conv2d if axes == 2 else nn.Conv1d
    with torch.random.fork_rng():
        torch.manual_seed(draw(st.integers(0, 1000)))
        layer = kind(
            groups * draw(st.integers(1, 4)),
            groups * draw(st.integers(1, 4)),
            kernel,
            stride=[draw(st.integers(1, 3)) for _ in range(axes)],
            padding=[draw(st.integers(0, 2)) for _ in range(axes)],
            dilation=[draw(st.integers(1, 2)) for _ in range(axes)],
            groups=groups,
            bias=draw(st.booleans()),
            padding_mode=draw(st.sampled_from(["zeros", "circular", "reflect", "replicate"])),
        ).double()
        x = torch.randn(2, layer.in_channels, *[draw(st.integers(6, 9)) for _ in range(axes)])
    return layer, x.double()


def relative(got: torch.Tensor, expected: torch.Tensor) -> float:
    largest = expected.detach().abs().max().clamp_min(1e-12)
    return float((got - expected).detach().abs().max() / largest)


def assert_exact(layer: nn.Module, x: torch.Tensor, method: Method) -> None:
    chain = factorize(layer, full_ranks(layer, method), method)
    assert relative(chain(x), layer(x)) < 1e-10
    chain = factorize(layer.float(), full_ranks(layer, method), method)
    assert relative(chain(x.float()), layer(x.float())) < 1e-5


@settings(max_examples=40)
@given(made=convolutions(), method=st.sampled_from(WITHOUT_EXTRA))
def test_an_svd_of_full_rank_is_exact(made: tuple[nn.Module, torch.Tensor], method: Method) -> None:
    assert_exact(*made, method)


@needs_tensorly
@settings(max_examples=15)
@given(made=convolutions(), method=st.sampled_from(["tucker", "cp"]))
def test_tensor_decompositions_of_full_rank_are_exact(
    made: tuple[nn.Module, torch.Tensor], method: Method
) -> None:
    assert_exact(*made, method)


@settings(max_examples=15)
@given(made=convolutions(axes=1))
def test_convolutions_with_one_axis(made: tuple[nn.Module, torch.Tensor]) -> None:
    assert_exact(*made, "channel_svd")
    if _has_tensorly():
        assert_exact(made[0].double(), made[1], "tucker")


@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_layer_of_full_rank_is_exact(bias: bool) -> None:
    layer = nn.Linear(7, 5, bias=bias).double()
    assert_exact(layer, torch.randn(3, 4, 7, dtype=torch.float64), "channel_svd")


def test_padding_given_as_a_word_stays() -> None:
    x = torch.randn(1, 3, 8, 8, dtype=torch.float64)
    for method in WITHOUT_EXTRA:
        assert_exact(nn.Conv2d(3, 6, (1, 3), padding="same", dilation=2).double(), x, method)


@settings(max_examples=25)
@given(
    shape=st.tuples(*[st.integers(1, 6)] * 2, *[st.integers(1, 3)] * 2),
    method=st.sampled_from(WITHOUT_EXTRA),
    seed=st.integers(0, 1000),
)
def test_the_error_of_an_svd_is_the_energy_of_its_tail(
    shape: tuple[int, ...], method: Method, seed: int
) -> None:
    weight = np.random.default_rng(seed).standard_normal(shape)
    matrix = weight.reshape(shape[0], -1)
    if method == "spatial_svd":
        outputs, inputs, height, width = shape
        matrix = weight.transpose(1, 2, 0, 3).reshape(inputs * height, outputs * width)
    squares = np.linalg.svd(matrix, compute_uv=False) ** 2
    make = decompose(weight, 1, method)
    errors = [
        float(((dense(make((rank,))) - weight) ** 2).sum()) for rank in range(1, len(squares) + 1)
    ]
    tails = [squares[rank:].sum() for rank in range(1, len(squares) + 1)]
    np.testing.assert_allclose(errors, tails, atol=1e-10 * squares.sum())
    assert all(a >= b - 1e-10 * squares.sum() for a, b in itertools.pairwise(errors))


@needs_tensorly
@pytest.mark.parametrize("method", ["tucker", "cp"])
def test_tensor_decompositions_come_closer_with_rank(method: Method) -> None:
    weight = np.random.default_rng(0).standard_normal((8, 6, 3, 3))
    make = decompose(weight, 1, method)
    errors = [
        float(np.linalg.norm(dense(make((r, r) if method == "tucker" else (r,))) - weight))
        for r in (1, 2, 4, 6)
    ]
    assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize("method", methods(*METHODS))
@pytest.mark.parametrize("groups", [1, 2])
def test_random_factors_keep_the_size_of_activations(method: Method, groups: int) -> None:
    layer = nn.Conv2d(16, 32, 3, padding=1, groups=groups)
    ranks = (4, 6) if method == "tucker" else (4,)
    first = factorize(layer, ranks, method, "random", seed=1)
    again = factorize(layer, ranks, method, "random", seed=1)
    other = factorize(layer, ranks, method, "random", seed=2)
    x = torch.randn(4, 16, 8, 8)
    assert torch.equal(first(x), again(x))
    assert not torch.equal(first(x), other(x))
    assert 0.4 < float(first(x).detach().std() / layer(x).detach().std()) < 2.5
    assert all(p.requires_grad for p in first.parameters())


@pytest.mark.parametrize("method", methods(*METHODS))
@pytest.mark.parametrize("groups", [1, 2])
def test_forms_are_those_of_the_chain(method: Method, groups: int) -> None:
    weight = np.random.default_rng(0).standard_normal((6, 4, 3, 2))
    ranks = (2, 3) if method == "tucker" else (2,)
    links = decompose(weight, groups, method)(ranks)
    found = [(link.shape, link.groups, link.spans) for link in links]
    expected = forms(weight.shape, groups, method, ranks)
    assert found == [(form.shape, form.groups, form.spans) for form in expected]


def test_what_a_layer_does_not_allow_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="ConvTranspose2d cannot be factorised"):
        factorize(nn.ConvTranspose2d(4, 4, 3), 2)
    with pytest.raises(UsageError, match="two spatial axes"):
        factorize(nn.Linear(4, 4), 2, "spatial_svd")
    with pytest.raises(UsageError, match="takes ranks of 1 to 4, and 5 was given"):
        factorize(nn.Linear(4, 8), 5)
    with pytest.raises(UsageError, match="does not exist"):
        factorize(nn.Linear(4, 8), 2, init="zeros")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="There is no method 'svd'"):
        factorize(nn.Linear(4, 8), 2, "svd")  # type: ignore[arg-type]


def test_without_tensorly_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "tensorly.decomposition", None)
    with pytest.raises(MissingExtraError, match=r"hwcompress\[lowrank\]"):
        factorize(nn.Conv2d(4, 4, 3), 2, "tucker")
