"""Inductor's own pass beside tune mode."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from compress import reparam
from compress.errors import UnsupportedError
from compress.reparam.layers import Frozen
from compress.testing import tiny_convnet


def test_grouped_transposed_convolutions_are_refused() -> None:
    net = nn.Sequential(nn.ConvTranspose2d(4, 6, 3, groups=2), nn.BatchNorm2d(6))
    with pytest.raises(UnsupportedError, match="0 is a transposed convolution with 2 groups"):
        reparam.compile_tuned(net)
    assert type(net[1]) is nn.BatchNorm2d


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs a C++ compiler, g++.")
@pytest.mark.filterwarnings("ignore")
def test_inductors_pass_gives_the_gradients_of_tune(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch._dynamo.reset()
    x = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    nets = {name: tiny_convnet() for name in ("tune", "inductor", "compiled tune")}
    pairs = reparam.set_mode(nets["tune"], "tune", x).pairs
    reparam.set_mode(nets["compiled tune"], "tune", x)
    counters.clear()
    calls: dict[str, Any] = {
        "tune": nets["tune"],
        "inductor": reparam.compile_tuned(nets["inductor"]),
        "compiled tune": torch.compile(nets["compiled tune"]),
    }
    assert isinstance(nets["inductor"][1], Frozen)
    for name, net in calls.items():
        net(x).square().sum().backward()
        if name == "inductor":
            assert counters["inductor"]["efficient_conv_bn_eval"] == len(pairs)
    for name, net in nets.items():
        for mine, other in zip(net.parameters(), nets["tune"].parameters(), strict=True):
            assert mine.grad is not None
            torch.testing.assert_close(mine.grad, other.grad, rtol=1e-4, atol=1e-4, msg=name)
