"""Networks that train with more branches than they need afterwards, and their training on CIFAR-10.

Small ones in the style of RepVGG (Ding et al. 2021), MobileOne (Vasu et al. 2023), the diverse
branch block (Ding et al. 2021), UniRepLKNet's dilated branches (Ding et al. 2024) and a linear
layer with grouped branches. Nothing here marks what can be merged: that is what is tested.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as functional
from torch import nn

BATCH = 128
LEARNING_RATE = 0.1


def conv_bn(inputs: int, outputs: int, kernel: int, **options: Any) -> nn.Sequential:
    """Convolution without bias, and BatchNorm."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, bias=False, **options), nn.BatchNorm2d(outputs)
    )


class Branches(nn.Module):
    """The sum of branches, and an activation function."""

    def __init__(self, branches: list[nn.Module], act: nn.Module | None = None) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)
        self.act = act if act is not None else nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, C, H, W) to (N, O, H', W')."""
        out = self.branches[0](x)
        for branch in self.branches[1:]:
            out = out + branch(x)
        return self.act(out)


def repvgg_block(inputs: int, outputs: int, stride: int) -> Branches:
    """3x3, 1x1 and, where the shapes allow, BatchNorm alone."""
    branches: list[nn.Module] = [
        conv_bn(inputs, outputs, 3, stride=stride, padding=1),
        conv_bn(inputs, outputs, 1, stride=stride),
    ]
    if inputs == outputs and stride == 1:
        branches.append(nn.BatchNorm2d(inputs))
    return Branches(branches)


def mobileone_block(inputs: int, outputs: int, stride: int, copies: int = 3) -> nn.Sequential:
    """A depthwise and a pointwise stage, each with copies of its convolution and a skip."""
    spatial: list[nn.Module] = [
        conv_bn(inputs, inputs, 3, stride=stride, padding=1, groups=inputs) for _ in range(copies)
    ]
    spatial.append(conv_bn(inputs, inputs, 1, stride=stride, groups=inputs))
    if stride == 1:
        spatial.append(nn.BatchNorm2d(inputs))
    pointwise: list[nn.Module] = [conv_bn(inputs, outputs, 1) for _ in range(copies)]
    if inputs == outputs:
        pointwise.append(nn.BatchNorm2d(inputs))
    return nn.Sequential(Branches(spatial), Branches(pointwise))


def dbb_block(inputs: int, outputs: int, stride: int) -> Branches:
    """A 3x3, a 1x1, a 1x1 then 3x3, and 1x1 then average; the 1x1 in front pads its own input."""
    return Branches(
        [
            conv_bn(inputs, outputs, 3, stride=stride, padding=1),
            conv_bn(inputs, outputs, 1, stride=stride),
            nn.Sequential(
                conv_bn(inputs, inputs, 1, padding=1), conv_bn(inputs, outputs, 3, stride=stride)
            ),
            nn.Sequential(
                conv_bn(inputs, outputs, 1, padding=1),
                nn.AvgPool2d(3, stride),
                nn.BatchNorm2d(outputs),
            ),
        ]
    )


class BorderedNorm(nn.Module):
    """BatchNorm whose output is padded with what it makes of zero, written into the frame.

    The form of the diverse branch block's published code.
    """

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.norm, self.width = nn.BatchNorm2d(channels), width

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, C, H, W) to (N, C, H + 2 width, W + 2 width)."""
        norm, p = self.norm, self.width
        out = functional.pad(norm(x), [p] * 4)
        assert norm.running_mean is not None
        assert norm.running_var is not None
        deviation = torch.sqrt(norm.running_var + norm.eps)
        frame = (norm.bias - norm.running_mean * norm.weight / deviation).view(1, -1, 1, 1)
        out[:, :, :p, :] = frame
        out[:, :, -p:, :] = frame
        out[:, :, :, :p] = frame
        out[:, :, :, -p:] = frame
        return out


def bordered_block(inputs: int, outputs: int) -> Branches:
    """A 3x3 beside a 1x1 then 3x3, with the frame between them written after BatchNorm."""
    return Branches(
        [
            conv_bn(inputs, outputs, 3, padding=1),
            nn.Sequential(
                nn.Conv2d(inputs, inputs, 1, bias=False),
                BorderedNorm(inputs, 1),
                conv_bn(inputs, outputs, 3),
            ),
        ]
    )


class LargeKernelBlock(nn.Module):
    """Depthwise K x K with dilated branches, BatchNorm, and an inverted bottleneck."""

    def __init__(self, width: int, kernel: int, dilated: list[tuple[int, int]]) -> None:
        super().__init__()
        same = {"groups": width}
        branches = [conv_bn(width, width, kernel, padding=kernel // 2, **same)]
        branches += [
            conv_bn(width, width, k, padding=r * (k - 1) // 2, dilation=r, **same)
            for k, r in dilated
        ]
        self.spatial = Branches(list(branches), nn.BatchNorm2d(width))
        self.inner = nn.Sequential(
            nn.Conv2d(width, 4 * width, 1), nn.GELU(), nn.Conv2d(4 * width, width, 1)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, C, H, W) to the same shape."""
        out: torch.Tensor = x + self.inner(self.spatial(x))
        return out


class GroupedLinear(nn.Module):
    """Tokens through two grouped linear layers and a skip, then through a common one."""

    def __init__(self, width: int, groups: int) -> None:
        super().__init__()
        size = width // groups
        self.first = nn.Parameter(torch.randn(groups, size, size) / size**0.5)
        self.second = nn.Parameter(torch.randn(groups, size, size) / size**0.5)
        self.mix, self.groups = nn.Linear(width, width), groups

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, T, C) to the same shape."""
        parts = x.unflatten(2, (self.groups, -1)).transpose(1, 2)
        out = torch.matmul(parts, self.first) + torch.matmul(parts, self.second) + parts
        out = torch.relu(out).transpose(1, 2).flatten(2)
        mixed: torch.Tensor = torch.relu(self.mix(out) + out)
        return mixed


def head(width: int) -> list[nn.Module]:
    """Mean over the image, and ten classes."""
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10)]


def repvgg() -> nn.Module:
    """7 blocks for 32 x 32 images."""
    plan = [(3, 16, 1), (16, 32, 2), (32, 32, 1), (32, 64, 2), (64, 64, 1), (64, 128, 2)]
    plan.append((128, 128, 1))
    return nn.Sequential(*(repvgg_block(*block) for block in plan), *head(128))


def mobileone() -> nn.Module:
    """5 blocks behind a stem, for 32 x 32 images."""
    plan = [(32, 64, 1), (64, 64, 1), (64, 128, 2), (128, 128, 1), (128, 256, 2)]
    stem = repvgg_block(3, 32, 2)
    return nn.Sequential(stem, *(mobileone_block(*block) for block in plan), *head(256))


def dbb() -> nn.Module:
    """4 diverse branch blocks, one of them as published."""
    plan = [(3, 16, 1), (16, 32, 2), (32, 32, 1)]
    blocks = [dbb_block(*block) for block in plan]
    return nn.Sequential(*blocks, bordered_block(32, 64), *head(64))


def unireplknet() -> nn.Module:
    """Large kernels of 13 and 9 with their dilated branches."""
    first = LargeKernelBlock(24, 13, [(5, 1), (7, 2), (3, 3), (3, 4), (3, 5)])
    second = LargeKernelBlock(24, 9, [(5, 1), (5, 2), (3, 3), (3, 4)])
    stem = nn.Sequential(conv_bn(3, 24, 3, padding=1), nn.ReLU())
    return nn.Sequential(stem, first, second, *head(24))


def grouped_linear() -> nn.Module:
    """Two token layers with grouped branches."""
    return nn.Sequential(GroupedLinear(32, 4), GroupedLinear(32, 4), nn.Linear(32, 10))


class InvertedBlock(nn.Module):
    """1x1 to six times the width, depthwise 3x3, 1x1 back, and a skip where shapes allow."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        wide = 6 * inputs
        self.inner = nn.Sequential(
            *(conv_bn(inputs, wide, 1), nn.ReLU6()),
            *(conv_bn(wide, wide, 3, stride=stride, padding=1, groups=wide), nn.ReLU6()),
            conv_bn(wide, outputs, 1),
        )
        self.skips = stride == 1 and inputs == outputs

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, C, H, W) to (N, O, H', W')."""
        out: torch.Tensor = self.inner(x)
        return x + out if self.skips else out


def inverted() -> nn.Module:
    """8 inverted bottlenecks as in MobileNetV2 behind a stem, for 32 x 32 images; no branches."""
    plan = [(16, 16, 1), (16, 24, 2), (24, 24, 1), (24, 32, 1), (32, 32, 1), (32, 48, 2)]
    plan += [(48, 48, 1), (48, 48, 1)]
    stem = nn.Sequential(conv_bn(3, 16, 3, padding=1), nn.ReLU6())
    last = nn.Sequential(conv_bn(48, 192, 1), nn.ReLU6())
    return nn.Sequential(stem, *(InvertedBlock(*block) for block in plan), last, *head(192))


OURS: dict[str, tuple[Callable[[], nn.Module], str, int]] = {
    "repvgg": (repvgg, "1x3x32x32", 7),
    "mobileone": (mobileone, "1x3x32x32", 11),
    "dbb": (dbb, "1x3x32x32", 4),
    "unireplknet": (unireplknet, "1x3x32x32", 2),
    "grouped_linear": (grouped_linear, "1x16x32", 4),
    "inverted": (inverted, "1x3x32x32", 0),
}
"""What builds it, the shape of its input, and how many groups of branches it has."""
TRAINED = ("repvgg", "mobileone")


def randomise(module: nn.Module, seed: int = 0) -> nn.Module:
    """Give every BatchNorm numbers as after training, and layer scales that are not small."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(tensor: torch.Tensor, low: float, high: float) -> None:
        tensor.copy_(torch.rand(tensor.shape, generator=generator) * (high - low) + low)

    with torch.no_grad():
        for norm in module.modules():
            if isinstance(norm, nn.modules.batchnorm._BatchNorm):
                assert norm.running_mean is not None
                assert norm.running_var is not None
                uniform(norm.weight, 0.5, 1.5)
                uniform(norm.bias, -0.3, 0.3)
                uniform(norm.running_mean, -0.3, 0.3)
                uniform(norm.running_var, 0.5, 1.5)
    return module.eval()


def rescale(net: nn.Module, octaves: float = 5.0, seed: int = 0) -> nn.Module:
    """The same function of a RepVGG-style network with channels of very different scales.

    What a channel of a block is multiplied by, up to 2 to the power of `octaves`, the branches of
    the next block divide by: what long training with batch statistics does to some networks.
    """
    generator = torch.Generator().manual_seed(seed)
    blocks = [block for block in net.children() if isinstance(block, Branches)]
    with torch.no_grad():
        for block, behind in itertools.pairwise(blocks):
            norms = [b if isinstance(b, nn.BatchNorm2d) else b[1] for b in block.branches]
            scale = 2 ** (octaves * (2 * torch.rand(len(norms[0].weight), generator=generator) - 1))
            for norm in norms:
                norm.weight *= scale
                norm.bias *= scale
            for branch in behind.branches:
                if isinstance(branch, nn.BatchNorm2d):
                    branch.running_mean *= scale
                    branch.weight /= (branch.running_var + branch.eps).sqrt()
                    branch.running_var *= scale**2
                    branch.weight *= (branch.running_var + branch.eps).sqrt() / scale
                else:
                    branch[0].weight /= scale.view(1, -1, 1, 1)
    return net


def train(
    name: str,
    images: np.ndarray,
    labels: np.ndarray,
    epochs: int,
    folder: Path,
    seed: int = 0,
) -> nn.Module:
    """A trained network; the state after every epoch is in `folder`, and a killed run goes on."""
    path = folder / f"reparam_{name}_{epochs}x{len(images)}.pt"
    torch.manual_seed(seed)
    net = OURS[name][0]()
    steps = epochs * (len(images) // BATCH)
    decays = [p for p in net.parameters() if p.ndim > 1]
    others = [p for p in net.parameters() if p.ndim <= 1]
    optimizer = torch.optim.SGD(
        [{"params": decays, "weight_decay": 5e-4}, {"params": others}],
        LEARNING_RATE,
        0.9,
        nesterov=True,
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps)
    done = 0
    if path.exists():
        saved = torch.load(path, weights_only=True)
        net.load_state_dict(saved["net"])
        optimizer.load_state_dict(saved["optimizer"])
        schedule.load_state_dict(saved["schedule"])
        done = saved["epochs"]
    x, y = torch.from_numpy(images), torch.from_numpy(labels).long()
    for epoch in range(done, epochs):
        net.train()
        generator = torch.Generator().manual_seed(1000 * seed + epoch)
        order = torch.randperm(len(x), generator=generator)
        total = 0.0
        for chosen in order[: len(x) // BATCH * BATCH].split(BATCH):
            batch = x[chosen]
            flipped = torch.rand(len(batch), generator=generator) < 0.5
            batch = torch.where(flipped.view(-1, 1, 1, 1), batch.flip(3), batch)
            dy, dx = torch.randint(0, 9, (2,), generator=generator).tolist()
            batch = functional.pad(batch, [4] * 4)[:, :, dy : dy + 32, dx : dx + 32]
            loss = functional.cross_entropy(net(batch), y[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item() * BATCH
        print(f"   {name} epoch {epoch + 1}/{epochs}: loss {total / len(x):.3f}", flush=True)
        folder.mkdir(parents=True, exist_ok=True)
        state = {"net": net.state_dict(), "optimizer": optimizer.state_dict()}
        state |= {"schedule": schedule.state_dict(), "epochs": epoch + 1}
        temporary = path.with_suffix(".tmp")
        torch.save(state, temporary)
        temporary.replace(path)
    return net.eval()
