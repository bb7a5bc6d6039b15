"""Branches change nothing when they are added, and nothing when they are merged."""

from __future__ import annotations

import copy
from typing import Any, get_args

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from compress import reparam
from compress.errors import UsageError
from compress.reparam.expanded import ExpandedConv
from compress.reparam.expansion import Kind
from compress.testing import tiny_convnet

KINDS = get_args(Kind)
IMAGES = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")


def randomize(model: nn.Module) -> None:
    """Every BatchNorm as if it had been trained."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            for tensor in (module.weight, module.bias, module.running_mean):
                nn.init.normal_(tensor)
            nn.init.uniform_(module.running_var, 0.3, 3)


def error(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).detach().abs().max() / expected.detach().abs().max())


@st.composite
def plain_networks(draw: st.DrawFn) -> tuple[nn.Sequential, tuple[int, ...]]:
    """One convolution, with a BatchNorm or a bias or both, and its input's shape."""
    rank = draw(st.sampled_from([1, 2, 2, 3]))
    groups = draw(st.integers(1, 3))
    inputs = groups * draw(st.integers(1, 2))
    outputs = draw(st.sampled_from([inputs, groups, 2 * groups]))
    size = tuple(draw(st.integers(1, 4)) for _ in range(rank))
    stride, dilation = draw(st.integers(1, 2)), draw(st.sampled_from([1, 1, 2]))
    padding: Any = draw(st.integers(0, 2))
    mode = draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"]))
    if draw(st.booleans()):
        stride, padding = 1, "same"
    norm, bias = draw(st.sampled_from([(True, False), (True, True), (False, True)]))
    torch.manual_seed(draw(st.integers(0, 99)))
    make: Any = CONVOLUTIONS[rank - 1]
    conv = make(
        inputs, outputs, size, stride=stride, padding=padding, dilation=dilation, groups=groups,
        padding_mode=mode, bias=bias,
    )  # fmt: skip
    layers = [conv, NORMS[rank - 1](outputs)] if norm else [conv]
    net = nn.Sequential(*layers).double()
    randomize(net)
    return net, (3, inputs, *(8,) * rank)


@settings(max_examples=40)
@given(network=plain_networks(), kind=st.sampled_from(KINDS))
def test_expanding_and_merging_are_exact(
    network: tuple[nn.Sequential, tuple[int, ...]], kind: Kind
) -> None:
    net, shape = network
    x = torch.randn(shape, dtype=torch.float64)
    before = copy.deepcopy(net)
    report = reparam.expand(net, kind, x, count=2)
    assert set(report.expanded) | set(report.left) == {"0"}
    for training in (False, True):
        assert torch.equal(net.train(training)(x), before.train(training)(x))
    if not report.expanded:
        assert "has no use for" in report.left["0"]
        return
    randomize(net)
    optimizer = torch.optim.SGD(net.parameters(), 0.05)
    for _ in range(3):
        optimizer.zero_grad()
        net(x).square().mean().backward()
        optimizer.step()
    expected = net.eval()(x)
    assert reparam.merge_expanded(net) == ("0",)
    assert error(net(x), expected) < 1e-12
    assert [type(m) for m in net.modules()] == [type(m) for m in before.modules()]
    assert list(net.state_dict()) == list(before.state_dict())
    before.load_state_dict(net.state_dict())
    assert torch.equal(before.eval()(x), net(x))


@pytest.mark.parametrize("kind", KINDS)
def test_a_network_is_trained_with_branches_and_merged(kind: Kind) -> None:
    torch.manual_seed(0)
    net = tiny_convnet().train()
    plain = copy.deepcopy(net).eval()
    report = reparam.expand(net, kind, IMAGES)
    names = {"0", "4.depthwise"} | ({"4.pointwise"} if kind == "mobileone" else set())
    assert set(report.expanded) == names
    assert torch.equal(net.eval()(IMAGES), plain(IMAGES))
    assert isinstance(net[0], ExpandedConv)
    net.train()
    optimizer = torch.optim.SGD(net.parameters(), 0.05, momentum=0.9)
    losses = []
    for _ in range(12):
        loss = F.cross_entropy(net(IMAGES), torch.tensor([1, 2, 3, 4]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    learned = [branch.norm.weight.abs().max() for branch in net[0].branches]
    assert min(learned) > 1e-4
    expected = net.eval()(IMAGES)
    reparam.merge_expanded(net)
    assert error(net(IMAGES), expected) < 1e-5
    assert list(net.state_dict()) == list(plain.state_dict())
    assert type(net[0]) is nn.Conv2d


@pytest.mark.parametrize("kind", KINDS)
def test_branches_are_those_of_the_paper(kind: Kind) -> None:
    net = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1))
    reparam.expand(net, kind)
    made = [type(branch).__name__ for branch in net[0].branches]  # type: ignore[union-attr]
    assert (
        made
        == {
            "repvgg": ["ConvBranch", "IdentityBranch"],
            "acb": ["ConvBranch"] * 2,
            "dbb": ["ConvBranch", "PointThenConv", "PointThenAverage"],
            "mobileone": ["ConvBranch"] * 5 + ["IdentityBranch"],
        }[kind]
    )


def test_copies_of_an_expanded_network_are_merged_apart() -> None:
    net = tiny_convnet()
    reparam.expand(net, "repvgg", IMAGES)
    randomize(net)
    other = copy.deepcopy(net)
    expected = net(IMAGES)
    reparam.merge_expanded(other)
    assert error(other(IMAGES), expected) < 1e-5
    assert torch.equal(net(IMAGES), expected)


def test_an_expanded_network_goes_through_the_modes() -> None:
    net = tiny_convnet()
    reparam.expand(net, "repvgg", IMAGES)
    randomize(net)
    expected = net(IMAGES)
    report = reparam.set_mode(net, "tune", IMAGES)
    assert any("branches" in pair.layer for pair in report.pairs)
    assert error(net(IMAGES), expected) < 1e-5
    reparam.merge_expanded(net)
    assert error(net(IMAGES), expected) < 1e-5
    reparam.set_mode(net, "train")
    assert type(net[1]) is nn.BatchNorm2d


def test_what_is_not_expanded_is_named() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bare = nn.Conv2d(3, 3, 3, bias=False)
            self.up = nn.ConvTranspose2d(3, 3, 3)
            self.twice = nn.Conv2d(3, 3, 3, padding=1)
            self.point = nn.Conv2d(3, 3, 1)
            self.never = nn.Conv2d(3, 3, 3)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.point(self.twice(self.twice(self.up(self.bare(x)))))
            return y

    report = reparam.expand(Shared(), "repvgg")
    assert report.expanded == ()
    assert report.left == {
        "bare": "has neither a bias nor a BatchNorm of its own for the shift of branches",
        "up": "is transposed",
        "twice": "is called 2 times",
        "point": "has no use for repvgg: its window is 1x1",
        "never": "was not reached",
    }
    assert reparam.expand(nn.Conv2d(3, 3, 3), "repvgg").left == {"": "is the whole model"}


def test_wrong_uses_are_refused() -> None:
    net = tiny_convnet()
    with pytest.raises(UsageError, match="'vgg' is unknown; there are repvgg, acb, dbb"):
        reparam.expand(net, "vgg")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="count is 0"):
        reparam.expand(net, "mobileone", count=0)
    with pytest.raises(UsageError, match="Nothing in the model is expanded"):
        reparam.merge_expanded(net)
    reparam.set_mode(net, "eval")
    with pytest.raises(UsageError, match="is in eval or tune mode"):
        reparam.expand(net, "repvgg")
    reparam.set_mode(net, "train")
    reparam.expand(net, "repvgg")
    with pytest.raises(UsageError, match="is expanded already"):
        reparam.expand(net, "repvgg")
    reparam.set_mode(net, "deploy", IMAGES)
    with pytest.raises(UsageError, match="were deployed"):
        reparam.merge_expanded(net)


def test_the_flags_of_batchnorm_stay() -> None:
    net = tiny_convnet().train()
    net[1].eval()
    reparam.expand(net, "acb", IMAGES)
    assert not net[1].training
    assert net[4].bn1.training
