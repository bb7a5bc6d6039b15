"""Synthetic calibration data follow the model's BatchNorm statistics."""

from __future__ import annotations

import time
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import nn

from compress.errors import UnsupportedError
from compress.model import TensorSpec
from quant.synthetic import synthesize

IMAGE = TensorSpec("image", ("batch", 3, 12, 12))


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Tensors this small gain nothing from threads, and lose much beside other processes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class FunctionalNorm(nn.Module):
    """A BatchNorm that is a call, not a module."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.batch_norm(
            x, running_mean=self.norm.running_mean, running_var=self.norm.running_var
        )


def trained(network: nn.Module, shape: tuple[int, ...], seed: int = 0) -> nn.Module:
    """The network after its running statistics have seen data far from standard normal."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
        network.train()
        for _ in range(50):
            batch = torch.rand((16, *shape), generator=generator) ** 3 * 4 - 0.5
            network(batch.cumsum(-1) / 2)
    return network.eval()


def conv_network() -> nn.Module:
    torch.manual_seed(0)
    return trained(
        nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(),
            nn.Conv2d(8, 16, 3, stride=2), nn.BatchNorm2d(16), nn.ReLU(),
            nn.Dropout(0.5), nn.Flatten(), nn.Linear(256, 4), nn.BatchNorm1d(4),
        ),
        (3, 12, 12),
    )  # fmt: skip


def exported(network: nn.Module, decomposed: bool) -> nn.Module:
    batch = torch.export.Dim("batch")
    program = torch.export.export(
        network, (torch.zeros(2, 3, 12, 12),), dynamic_shapes=({0: batch},)
    )
    return (program.run_decompositions() if decomposed else program).module()


def statistics_error(network: nn.Module, image: np.ndarray) -> float:
    """Relative distance of batch from running statistics, seen through module hooks."""
    errors = []

    def look(norm: nn.Module, args: tuple[torch.Tensor]) -> None:
        axes = [axis for axis in range(args[0].ndim) if axis != 1]
        deviation = norm.running_var.sqrt()
        errors.append(((args[0].mean(axes) - norm.running_mean) / deviation).square().mean())
        errors.append((args[0].std(axes) / deviation - 1).square().mean())

    norms = [m for m in network.modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d)]
    handles = [norm.register_forward_pre_hook(look) for norm in norms]
    with torch.no_grad():
        network(torch.from_numpy(image))
    for handle in handles:
        handle.remove()
    return float(sum(errors))


def test_statistics_come_much_nearer_than_those_of_noise() -> None:
    network = conv_network()
    data = synthesize(network, [IMAGE])
    assert data is not None
    assert data.batchnorms == 3
    assert data.last_loss < data.first_loss / 5
    image = data.arrays["image"]
    assert image.shape == (16, 3, 12, 12)
    assert image.dtype == np.float32
    noise = np.random.default_rng(0).standard_normal(image.shape).astype(np.float32)
    assert statistics_error(network, image) < statistics_error(network, noise) / 5


@pytest.mark.parametrize("decomposed", [False, True], ids=["export", "core-aten"])
def test_exported_programs_give_the_same_data(decomposed: bool) -> None:
    network = conv_network()
    expected = synthesize(network, [IMAGE], steps=10)
    data = synthesize(exported(network, decomposed), [IMAGE], steps=10)
    assert data is not None
    assert expected is not None
    assert data.batchnorms == 3
    assert data.first_loss == pytest.approx(expected.first_loss, rel=1e-4)
    assert data.last_loss == pytest.approx(expected.last_loss, rel=0.05)


def test_same_seed_same_data_and_no_trace_in_the_global_generator() -> None:
    network = conv_network()
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = synthesize(network, [IMAGE], steps=5, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(6)
    again, other = (synthesize(network, [IMAGE], steps=5, seed=seed) for seed in (1, 2))
    assert first is not None
    assert again is not None
    assert other is not None
    np.testing.assert_array_equal(first.arrays["image"], again.arrays["image"])
    assert not np.array_equal(first.arrays["image"], other.arrays["image"])


def test_the_module_is_left_as_it_was() -> None:
    network = conv_network()
    network[0].train()
    network[0].bias.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    with torch.no_grad():
        assert synthesize(network, [IMAGE], steps=3) is not None
    assert [child.training for child in network.modules()].count(True) == 1
    assert network[0].training
    assert [name for name, p in network.named_parameters() if not p.requires_grad] == ["0.bias"]
    assert all(p.grad is None for p in network.parameters())
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, before[name])


@pytest.mark.parametrize(
    ("network", "spec"),
    [
        (nn.Sequential(nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4)), TensorSpec("x", ("batch", 3, 9))),
        (nn.Sequential(nn.Linear(3, 4), nn.SyncBatchNorm(4)), TensorSpec("x", ("batch", 3))),
        (nn.BatchNorm3d(2), TensorSpec("x", ("batch", 2, 3, 3, 3))),
        (FunctionalNorm(), TensorSpec("x", ("batch", 4))),
    ],
    ids=["1d", "sync", "3d", "functional"],
)
def test_every_kind_of_batchnorm(network: nn.Module, spec: TensorSpec) -> None:
    for name, buffer in network.named_buffers():
        if name.endswith("running_var"):
            buffer.mul_(16)
    data = synthesize(network.eval(), [spec], samples=16)
    assert data is not None
    assert data.batchnorms == 1
    assert data.last_loss < data.first_loss


@pytest.mark.parametrize(
    ("network", "spec"),
    [
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), IMAGE),
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False)), IMAGE),
        (nn.ReLU(), IMAGE),
        (nn.Embedding(4, 4), TensorSpec("ids", ("batch", 3), "int64")),
    ],
    ids=["no-norm", "no-statistics", "no-parameters", "integers"],
)
def test_what_has_no_statistics_gives_no_data(network: nn.Module, spec: TensorSpec) -> None:
    assert synthesize(network.eval(), [spec]) is None


def test_a_fixed_batch_size_is_kept() -> None:
    sizes: set[int] = set()
    network = conv_network()
    network.register_forward_pre_hook(lambda _, args: sizes.add(len(args[0])))
    data = synthesize(network, [TensorSpec("image", (4, 3, 12, 12))], samples=10, steps=2)
    assert data is not None
    assert sizes == {4}
    assert data.arrays["image"].shape == (12, 3, 12, 12)
    assert data.steps == 6


def test_large_inputs_are_made_in_groups() -> None:
    sizes: set[int] = set()
    network = nn.BatchNorm2d(1).eval()
    network.register_forward_pre_hook(lambda _, args: sizes.add(len(args[0])))
    spec = TensorSpec("image", ("batch", 1, 512, 512))
    data = synthesize(network, [spec], samples=9, steps=1)
    assert data is not None
    assert data.arrays["image"].shape == (9, 1, 512, 512)
    assert sizes == {3}


def test_time_is_bounded() -> None:
    start = time.monotonic()
    data = synthesize(conv_network(), [IMAGE], steps=1_000_000, seconds=0.2)
    assert time.monotonic() - start < 20
    assert data is not None
    assert 1 <= data.steps < 1_000_000


def test_it_stops_where_nothing_is_left_to_gain() -> None:
    network = nn.BatchNorm1d(2).eval()
    data = synthesize(network, [TensorSpec("x", ("batch", 2))], steps=100_000)
    assert data is not None
    assert data.steps < 5000


def test_broken_statistics_are_refused() -> None:
    network = conv_network()
    network[1].running_var[0] = float("nan")
    with pytest.raises(UnsupportedError, match="NaN or infinite"):
        synthesize(network, [IMAGE])
