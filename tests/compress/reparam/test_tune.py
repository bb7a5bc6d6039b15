"""Tune equals Eval: outputs and gradients, for random layers."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from compress import reparam
from compress.reparam.folding import folded
from compress.reparam.layers import TunedLayer

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
LIMITS = {torch.float32: 1e-5, torch.float64: 1e-10}


@dataclass(frozen=True)
class Block:
    """One layer with a BatchNorm, and its input's shape."""

    layer: nn.Module
    norm: nn.Module
    shape: tuple[int, ...]


def randomize(norm: Any, generator: torch.Generator) -> None:
    """Statistics and parameters as after a training."""
    with torch.no_grad():
        norm.running_mean.normal_(0, 0.5, generator=generator)
        norm.running_var.uniform_(0.3, 3, generator=generator)
        norm.weight.normal_(0, 1, generator=generator)
        norm.bias.normal_(0, 1, generator=generator)


@st.composite
def blocks(draw: st.DrawFn) -> Block:
    """Conv1d to Conv3d, transposed ones and linear layers."""
    rank = draw(st.integers(1, 3))
    kind = draw(st.sampled_from(["conv", "conv", "transposed", "linear"]))
    bias = draw(st.booleans())
    groups = draw(st.integers(1, 3))
    inputs, outputs = groups * draw(st.integers(1, 3)), groups * draw(st.integers(1, 3))
    torch.manual_seed(draw(st.integers(0, 99)))
    if kind == "linear":
        layer: nn.Module = nn.Linear(inputs, outputs, bias=bias)
        return Block(layer, nn.BatchNorm1d(outputs), (4, inputs))
    size = tuple(draw(st.integers(1, 3)) for _ in range(rank))
    stride, dilation = draw(st.integers(1, 2)), draw(st.integers(1, 2))
    padding: Any = draw(st.integers(0, 2))
    options = {"groups": groups, "bias": bias, "dilation": dilation}
    if kind == "transposed":
        extra = draw(st.integers(0, max(stride, dilation) - 1))
        make: Any = TRANSPOSED[rank - 1]
        layer = make(
            inputs, outputs, size, stride=stride, padding=padding, output_padding=extra, **options
        )
    else:
        mode = draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"]))
        if draw(st.booleans()):
            stride, padding = 1, draw(st.sampled_from(["same", "valid"]))
        make = CONVOLUTIONS[rank - 1]
        layer = make(
            inputs, outputs, size, stride=stride, padding=padding, padding_mode=mode, **options
        )
    norm = NORMS[rank - 1](outputs, eps=draw(st.sampled_from([1e-5, 1e-3])))
    return Block(layer, norm, (2, inputs, *(7,) * rank))


def error(got: Tensor, expected: Tensor) -> float:
    """Largest difference, as a share of the largest value."""
    got, expected = got.detach(), expected.detach()
    return float((got - expected).abs().max() / expected.abs().max().clamp_min(1e-3))


def gradients(net: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Output, gradient of the input and of every parameter."""
    x = x.clone().requires_grad_()
    net.zero_grad()
    y = net(x)
    generator = torch.Generator().manual_seed(7)
    direction = torch.randn(y.shape, generator=generator, dtype=torch.float64)
    (y * direction.to(y.dtype)).sum().backward()
    assert x.grad is not None
    grads = {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}
    return {"y": y.detach(), "x": x.grad, **grads}


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@settings(max_examples=40)
@given(block=blocks())
def test_outputs_and_gradients_are_those_of_eval(dtype: torch.dtype, block: Block) -> None:
    generator = torch.Generator().manual_seed(3)
    randomize(block.norm, generator)
    net = nn.Sequential(block.layer, block.norm).to(dtype)
    x = torch.randn(block.shape, generator=generator, dtype=torch.float64).to(dtype)
    reparam.set_mode(net, "eval")
    expected = gradients(net, x)
    report = reparam.set_mode(net, "tune", x)
    assert report.pairs == (reparam.Pair("0", "1"),)
    got = gradients(net, x)
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        # Where everything cancels (a bias of zero gradient), rounding is judged by its terms.
        assert error(got[name], value) <= LIMITS[dtype], name


@settings(max_examples=25)
@given(block=blocks())
def test_deploy_computes_the_same(block: Block) -> None:
    generator = torch.Generator().manual_seed(3)
    randomize(block.norm, generator)
    net = nn.Sequential(block.layer, block.norm).double()
    x = torch.randn(block.shape, generator=generator, dtype=torch.float64)
    expected = net.eval()(x)
    report = reparam.set_mode(net, "deploy")
    assert report.pairs == (reparam.Pair("0", "1"),)
    assert error(net(x), expected) < 1e-12
    assert set(net.state_dict()) == {"0.weight", "0.bias"}


def test_the_output_size_of_a_transposed_convolution_is_kept() -> None:
    class Up(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.norm = nn.ConvTranspose2d(2, 4, 3, 2), nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.norm(self.up(x, output_size=[12, 12]))
            return y

    net, x = Up(), torch.randn(1, 2, 5, 5)
    expected = net.eval()(x)
    assert reparam.set_mode(net, "tune", x).pairs
    torch.testing.assert_close(net(x), expected)
    assert net(x).shape[2:] == (12, 12)


def test_autocast_folds_in_float32() -> None:
    layer, norm = nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)
    randomize(norm, torch.Generator().manual_seed(0))
    expected = folded(layer, norm)
    with torch.autocast("cpu", torch.bfloat16):
        weight, bias = folded(layer, norm)
    assert weight.dtype == bias.dtype == torch.float32
    assert torch.equal(weight, expected[0])
    assert torch.equal(bias, expected[1])


def test_16_bit_parameters_are_folded_in_float32_and_rounded_once() -> None:
    layer, norm = nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)
    randomize(norm, torch.Generator().manual_seed(0))
    for module in (layer, norm):
        module.to(torch.bfloat16)
    weight, bias = folded(layer, norm)
    exact, shift = folded(copy.deepcopy(layer).float(), copy.deepcopy(norm).float())
    assert torch.equal(weight, exact.bfloat16())
    assert torch.equal(bias, shift.bfloat16())


def test_autocast_trains_like_eval() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3))
    randomize(net[1], torch.Generator().manual_seed(0))
    x = torch.randn(4, 3, 9, 9)
    found = {}
    for mode in ("eval", "tune"):
        reparam.set_mode(net, mode, x)  # type: ignore[arg-type]
        with torch.autocast("cpu", torch.bfloat16):
            found[mode] = gradients(net, x)
    for name, value in found["eval"].items():
        assert error(found["tune"][name].float(), value.float()) < 0.03, name


def test_the_input_of_batchnorm_is_not_kept_for_the_backward_pass() -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3),
        nn.BatchNorm2d(8),
    )  # fmt: skip
    x = torch.randn(4, 3, 32, 32)
    kept: dict[str, set[int]] = {}
    for mode in ("eval", "tune"):
        reparam.set_mode(net, mode, x)  # type: ignore[arg-type]
        sizes = kept.setdefault(mode, set())
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, sizes=sizes: (sizes.add((t.data_ptr(), t.nbytes)), t)[1], lambda t: t
        ):
            net(x)
    total = {mode: sum(n for _, n in found) for mode, found in kept.items()}
    assert total["tune"] < 0.6 * total["eval"]


def test_a_tuned_model_compiles_to_the_same_gradients() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten())
    randomize(net[1], torch.Generator().manual_seed(0))
    x = torch.randn(2, 3, 6, 6)
    reparam.set_mode(net, "tune", x)
    assert isinstance(net[0], TunedLayer)
    expected = gradients(net, x)
    got = gradients(torch.compile(net, backend="eager", fullgraph=True), x)  # type: ignore[arg-type]
    for name, value in expected.items():
        mine = got.get(name, got.get(f"_orig_mod.{name}"))
        assert mine is not None
        assert error(mine, value) < 1e-6, name
