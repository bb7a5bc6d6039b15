"""A convolution with parallel linear branches, as ordinary modules that any trainer takes.

Every branch reads the input after it was padded once, and pads nothing itself. So it has the same
window as the convolution at the borders too, for any padding and padding mode.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from compress.reparam.kernels import (
    Kernel,
    average,
    identity,
    of_layer,
    placed,
    point_then,
    then_norm,
)

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_POOLS = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)


@dataclass(frozen=True)
class Window:
    """What a convolution reads for one output; numbers by spatial axis."""

    inputs: int
    outputs: int
    groups: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]

    @property
    def rank(self) -> int:
        """Spatial axes."""
        return len(self.size)

    @property
    def center(self) -> tuple[int, ...]:
        """Its middle tap."""
        return tuple((k - 1) // 2 for k in self.size)

    def crop(self, x: Tensor, start: tuple[int, ...], size: tuple[int, ...]) -> Tensor:
        """What a smaller window needs of the padded input, so that it meets the same outputs."""
        for axis in range(self.rank):
            k, s, d = self.size[axis], self.stride[axis], self.dilation[axis]
            last = (x.shape[axis + 2] - d * (k - 1) - 1) // s
            length = s * last + d * (size[axis] - 1) + 1
            x = x.narrow(axis + 2, d * start[axis], length)
        return x

    def convolution(self, inputs: int, size: tuple[int, ...], like: Tensor) -> _ConvNd:
        """One with this window's steps, without padding and bias."""
        made: _ConvNd = _CONVOLUTIONS[self.rank - 1](
            inputs,
            self.outputs,
            size,  # type: ignore[arg-type]
            stride=self.stride,  # type: ignore[arg-type]
            dilation=self.dilation,  # type: ignore[arg-type]
            groups=self.groups,
            bias=False,
            device=like.device,
            dtype=like.dtype,
        )
        return made

    def point(self, outputs: int, like: Tensor) -> _ConvNd:
        """One of size 1 and stride 1."""
        make: Any = _CONVOLUTIONS[self.rank - 1]
        made: _ConvNd = make(
            self.inputs, outputs, 1, groups=self.groups, bias=False, device=like.device,
            dtype=like.dtype,
        )  # fmt: skip
        return made

    def norm(self, channels: int, like: Tensor, zero: bool) -> _BatchNorm:
        """A BatchNorm; one that gives zero for any input, where it ends a branch."""
        made = _NORMS[self.rank - 1](channels, device=like.device, dtype=like.dtype)
        if zero:
            nn.init.zeros_(made.weight)
        return made


class Branch(nn.Module):
    """One of the parallel branches: (N, I, *padded) to (N, O, *out); zero when it is made."""

    def kernel(self) -> Kernel:
        """The one convolution that it is, with running statistics; window of the whole."""
        raise NotImplementedError


class ConvBranch(Branch):
    """A convolution with a part of the window, and a BatchNorm."""

    def __init__(
        self, window: Window, size: tuple[int, ...], start: tuple[int, ...], like: Tensor
    ) -> None:
        super().__init__()
        self.window, self.size, self.start = window, size, start
        self.conv = window.convolution(window.inputs, size, like)
        self.norm = window.norm(window.outputs, like, zero=True)

    def forward(self, padded: Tensor) -> Tensor:
        """BatchNorm of the convolution."""
        part = self.window.crop(padded, self.start, self.size)
        output: Tensor = self.norm(self.conv(part))
        return output

    def kernel(self) -> Kernel:
        """Its own, with zeros around it."""
        whole = then_norm(of_layer(self.conv.weight, None), self.norm)
        return placed(whole, self.window.size, self.start)


class IdentityBranch(Branch):
    """A BatchNorm of the input; stride 1, as many outputs as inputs."""

    def __init__(self, window: Window, like: Tensor) -> None:
        super().__init__()
        self.window = window
        self.norm = window.norm(window.outputs, like, zero=True)

    def forward(self, padded: Tensor) -> Tensor:
        """BatchNorm of what the middle of the window reads."""
        part = self.window.crop(padded, self.window.center, (1,) * self.window.rank)
        output: Tensor = self.norm(part)
        return output

    def kernel(self) -> Kernel:
        """One at the middle tap."""
        window = self.window
        point = identity(window.outputs, window.groups, window.rank, self.norm.weight)
        return placed(then_norm(point, self.norm), window.size, window.center)


class PointThenConv(Branch):
    """A convolution of size 1, one with the whole window, and a BatchNorm behind each."""

    def __init__(self, window: Window, like: Tensor) -> None:
        super().__init__()
        self.window = window
        self.point = window.point(window.inputs, like)
        self.inner = window.norm(window.inputs, like, zero=False)
        self.conv = window.convolution(window.inputs, window.size, like)
        self.norm = window.norm(window.outputs, like, zero=True)

    def forward(self, padded: Tensor) -> Tensor:
        """The four layers; padding comes before the first, or borders would lack its bias."""
        output: Tensor = self.norm(self.conv(self.inner(self.point(padded))))
        return output

    def kernel(self) -> Kernel:
        """The product of both."""
        first = then_norm(of_layer(self.point.weight, None), self.inner)
        second = then_norm(of_layer(self.conv.weight, None), self.norm)
        return point_then(first, second, self.window.groups)


class PointThenAverage(Branch):
    """A convolution of size 1, an average over the window, and a BatchNorm behind each.

    The window is not dilated.
    """

    def __init__(self, window: Window, like: Tensor) -> None:
        super().__init__()
        self.window = window
        self.point = window.point(window.outputs, like)
        self.inner = window.norm(window.outputs, like, zero=False)
        self.norm = window.norm(window.outputs, like, zero=True)

    def forward(self, padded: Tensor) -> Tensor:
        """The four layers; padding comes before the first."""
        pool: Any = _POOLS[self.window.rank - 1]
        mean = pool(self.inner(self.point(padded)), self.window.size, self.window.stride)
        output: Tensor = self.norm(mean)
        return output

    def kernel(self) -> Kernel:
        """The product of both."""
        window = self.window
        first = then_norm(of_layer(self.point.weight, None), self.inner)
        mean = average(window.outputs, window.groups, window.size, self.norm.weight)
        return point_then(first, then_norm(mean, self.norm), window.groups)


class ExpandedConv(nn.Module):
    """A convolution and its branches, added.

    Attributes:
        conv: the network's own convolution.
        branches: beside it.
    """

    def __init__(self, conv: _ConvNd, branches: list[Branch], norm: _BatchNorm | None) -> None:
        super().__init__()
        self.conv, self.branches = conv, nn.ModuleList(branches)
        # Not a submodule: it stays where the network has it.
        self.__dict__["following"] = norm

    def forward(self, x: Tensor) -> Tensor:
        """Shapes are those of the convolution."""
        output: Tensor = self.conv(x)
        pads: list[int] = self.conv._reversed_padding_repeated_twice
        mode = self.conv.padding_mode
        if any(pads):
            x = F.pad(x, pads, "constant" if mode == "zeros" else mode)
        for branch in self.branches:
            output = output + branch(x)
        return output

    @torch.no_grad()
    def merge(self) -> _ConvNd:
        """The network's own convolution, with the branches in it.

        Their shift goes to its bias. Where it has none, the BatchNorm behind it has it taken off
        its running mean, which is the same.
        """
        whole = of_layer(self.conv.weight, self.conv.bias)
        for branch in self.branches:
            if isinstance(branch, Branch):
                whole = whole + branch.kernel()
        self.conv.weight.copy_(whole.weight)
        if self.conv.bias is not None:
            self.conv.bias.copy_(whole.bias)
        else:
            mean = self.__dict__["following"].running_mean
            mean.copy_(mean.double() - whole.bias)
        return self.conv
