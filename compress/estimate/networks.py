"""Random networks of the shapes that people deploy: what predictors learn from.

Widths, resolutions and blocks are drawn from what model zoos are made of (residual, inverted
residual, plain and concatenating blocks), as nn-Meter's prior does (Zhang et al., MobiSys 2021,
section 5). A third of all widths is not a multiple of anything: time climbs in steps of 8, 16 or
32 channels, and who samples only those multiples never sees the stairs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from compress.estimate.graphs import Network, Tensor
from compress.model import Model

MOST_MACS = 400e6
"""Of one network; larger ones cost time and teach little more, as time per MAC levels off."""
_SIZES = (16, 24, 28, 32, 32, 32, 40, 48, 56, 64, 96, 112, 128, 160)
_CLASSES = (2, 10, 12, 100, 100, 1000)


@dataclass(frozen=True)
class Window:
    """One convolution as sampling sees it.

    Attributes:
        size: height and width of what it reads.
        channels_in: that it reads.
        channels_out: that it writes; those that it reads where it is depthwise.
        kernel: height and width of the window.
        stride: of the window.
        depthwise: each channel by itself.
    """

    size: int
    channels_in: int
    channels_out: int
    kernel: int
    stride: int
    depthwise: bool = False

    @property
    def macs(self) -> float:
        """Multiply-accumulates, about."""
        out = max(1, self.size // self.stride) ** 2
        fan = 1 if self.depthwise else self.channels_in
        return float(out * self.channels_out * fan * self.kernel**2)


def width(rng: np.random.Generator, low: float, high: float) -> int:
    """A number of channels, uniform on a logarithmic scale; two thirds are multiples of 8 or 4."""
    drawn = float(np.exp(rng.uniform(np.log(low), np.log(high))))
    step = int(rng.choice((8, 4, 1), p=(0.4, 0.25, 0.35)))
    return max(step, 2, round(drawn / step) * step)


def random_network(rng: np.random.Generator, name: str, opset: int = 21) -> Model:
    """A network of one family, with at most about `MOST_MACS`."""
    size = int(rng.choice(_SIZES))
    network = Network((1, 3, size, size), opset, name)
    stride = 2 if size >= 64 or rng.random() < 0.15 else 1
    x = network.conv(network.start, width(rng, 6, 64), int(rng.choice((3, 3, 3, 5, 7))), stride)
    x = _activation(network, x, "relu")
    if size >= 112 and rng.random() < 0.5:
        x = network.pool(x, "MaxPool", 3, 2)
    budget = float(np.exp(rng.uniform(np.log(MOST_MACS / 40), np.log(MOST_MACS))))
    block = _BLOCKS[int(rng.choice(len(_BLOCKS), p=_SHARES))]
    spent, channels = 0.0, float(x.shape[1])
    for _ in range(int(rng.integers(3, 7))):
        count = int(rng.integers(1, 8))
        for index in range(count):
            down = 2 if index == 0 and x.shape[2] >= 6 and rng.random() < 0.7 else 1
            before = len(network.nodes)
            x = block(network, rng, x, channels, down)
            spent += _spent(network, before, x)
            if spent > budget:
                return _finish(network, rng, x)
        channels = min(channels * float(rng.uniform(1.1, 2.4)), 640)
    return _finish(network, rng, x)


def networks_around(
    windows: Sequence[Window], rng: np.random.Generator, name: str, opset: int = 21
) -> Model:
    """A network that holds variants of one convolution after another, channels scaled 0.4 to 1.2.

    nn-Meter's adaptive sampling: what is predicted badly gets new samples around it.
    """
    first = windows[0]
    wide = scaled(rng, first.channels_in)
    network = Network((1, 3, first.size, first.size), opset, name)
    start = network.relu(network.conv(network.start, wide, 1))
    ends: list[Tensor] = []
    for window in windows:
        if window.depthwise:
            x = network.conv(start, wide, window.kernel, window.stride, wide)
        else:
            x = network.conv(start, scaled(rng, window.channels_out), window.kernel, window.stride)
            if window.stride == 1 and rng.random() < 0.3:
                y = network.relu(x)
                y = network.conv(y, x.shape[1], 1)
                x = network.binary("Add", y, x)
        ends.append(network.global_pool(network.relu(x)))
    x = network.concat(ends) if len(ends) > 1 else ends[0]
    return network.model(network.linear(network.flatten(x), 10))


def scaled(rng: np.random.Generator, channels: int) -> int:
    """Channels times 0.4 to 1.2, in half of all cases as a multiple of 8."""
    found = max(2, round(channels * float(rng.uniform(0.4, 1.2))))
    return max(8, round(found / 8) * 8) if rng.random() < 0.5 else found


def _activation(network: Network, x: Tensor, kind: str) -> Tensor:
    if kind == "relu6":
        return network.relu6(x)
    return network.relu(x) if kind == "relu" else network.unary(kind, x)


def _widened(rng: np.random.Generator, channels: float) -> int:
    """Widths of one stage vary from layer to layer, as pruning and search make them."""
    return width(rng, max(4, channels * 0.5), max(8, channels * 1.25))


def _plain(
    network: Network, rng: np.random.Generator, x: Tensor, channels: float, stride: int
) -> Tensor:
    kernel = int(rng.choice((3, 3, 3, 1, 5)))
    pooled = stride == 2 and rng.random() < 0.5
    x = network.conv(x, _widened(rng, channels), kernel, 1 if pooled else stride)
    x = _activation(network, x, "relu")
    kind = str(rng.choice(("MaxPool", "MaxPool", "AveragePool")))
    return network.pool(x, kind, *((2, 2) if rng.random() < 0.7 else (3, 2))) if pooled else x


def _residual(
    network: Network, rng: np.random.Generator, x: Tensor, channels: float, stride: int
) -> Tensor:
    bottleneck = rng.random() < 0.35
    changes = stride == 2 or rng.random() < 0.2
    out = _widened(rng, channels * (2 if bottleneck else 1)) if changes else x.shape[1]
    inner = _widened(rng, channels)
    if bottleneck:
        y = network.relu(network.conv(x, inner, 1))
        y = network.relu(network.conv(y, _widened(rng, channels), 3, stride))
        y = network.conv(y, out, 1)
    else:
        y = network.relu(network.conv(x, inner, 3, stride))
        y = network.conv(y, out, 3)
    if changes:
        x = network.conv(x, out, 1, stride)
    return network.relu(network.binary("Add", y, x))


def _inverted(
    network: Network, rng: np.random.Generator, x: Tensor, channels: float, stride: int
) -> Tensor:
    kind = str(rng.choice(("relu6", "relu6", "relu", "HardSwish")))
    inner = width(rng, x.shape[1] * 1.5, max(x.shape[1] * 6.5, 12))
    y = _activation(network, network.conv(x, inner, 1), kind)
    y = network.conv(y, inner, int(rng.choice((3, 3, 5))), stride, inner)
    y = _activation(network, y, kind)
    if rng.random() < 0.15:
        y = _excited(network, rng, y)
    keeps = stride == 1 and rng.random() < 0.7
    y = network.conv(y, x.shape[1] if keeps else _widened(rng, channels), 1)
    return network.binary("Add", y, x) if keeps else y


def _excited(network: Network, rng: np.random.Generator, x: Tensor) -> Tensor:
    """Squeeze-and-excitation (Hu et al. 2018, arXiv 1709.01507)."""
    gate = network.global_pool(x)
    gate = network.relu(network.conv(gate, max(4, x.shape[1] // 4), 1))
    gate = network.conv(gate, x.shape[1], 1)
    gate = network.unary(str(rng.choice(("Sigmoid", "HardSigmoid"))), gate)
    return network.binary("Mul", x, gate)


def _separable(
    network: Network, rng: np.random.Generator, x: Tensor, channels: float, stride: int
) -> Tensor:
    kind = str(rng.choice(("relu", "relu6")))
    kernel = int(rng.choice((3, 3, 5)))
    x = _activation(network, network.conv(x, x.shape[1], kernel, stride, x.shape[1]), kind)
    return _activation(network, network.conv(x, _widened(rng, channels * 1.5), 1), kind)


def _concatenating(
    network: Network, rng: np.random.Generator, x: Tensor, channels: float, stride: int
) -> Tensor:
    if stride == 2:
        x = network.pool(x, "MaxPool", 3, 2)
    x = network.relu(network.conv(x, _widened(rng, channels / 2), 1))
    left = network.relu(network.conv(x, _widened(rng, channels / 2), 1))
    right = network.relu(network.conv(x, _widened(rng, channels / 2), 3))
    return network.concat([left, right])


Block = Callable[[Network, np.random.Generator, Tensor, float, int], Tensor]
_BLOCKS: tuple[Block, ...] = (_plain, _residual, _inverted, _separable, _concatenating)
_SHARES = (0.15, 0.35, 0.3, 0.1, 0.1)


def _spent(network: Network, before: int, out: Tensor) -> float:
    """Multiply-accumulates of the nodes since `before`, from the weights that they read."""
    sizes = {weight.name: int(np.prod(weight.dims)) for weight in network.weights}
    nodes = [node for node in network.nodes[before:] if node.op_type == "Conv"]
    return float(sum(sizes[node.input[1]] for node in nodes) * out.shape[2] * out.shape[3])


def _finish(network: Network, rng: np.random.Generator, x: Tensor) -> Model:
    if rng.random() < 0.2:
        x = network.relu(network.conv(x, width(rng, x.shape[1], x.shape[1] * 4), 1))
    x = network.flatten(network.global_pool(x))
    return network.model(network.linear(x, int(rng.choice(_CLASSES))))
