"""Calibration data made from a model's BatchNorm statistics, for when there are no real data.

ZeroQ (Cai et al. 2020, arXiv 2001.00281, section 3.1): optimise a noise batch until the mean and
deviation at every BatchNorm's input match the running ones. Two things differ from the paper:
differences are taken relative to the running deviation, so that no layer outweighs the others by
its scale, and the optimisation is short, since ranges need far less than sensitivities do.

As in the paper, inputs are taken to be normalized. BatchNorm statistics hardly tell the scale of
the input (noise of the wrong scale fits MLPerf Tiny's ResNet-8, which takes 0 to 255, no worse
than noise of the right one), so a model that takes raw pixels needs real calibration data.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.overrides import TorchFunctionMode

from compress.errors import UnsupportedError
from compress.model import TensorSpec
from compress.progress import Progress, Tracker, silent

GROUP_ELEMENTS = 8 * 3 * 224 * 224
"""Input elements optimised at once. Activations and gradients of a deep network at eight 224 px
images stay near 1 GiB."""

LEARNING_RATE = 0.1
"""Of Adam. The paper's 0.5 overshoots within the few steps taken here: on MobileNetV1 0.25 the
loss falls from 30.7 to 9.5 in 40 steps, with 0.1 to 1.1."""

PATIENCE = 20
"""Steps without a 1 % lower loss after which a group is done."""

_FUNCTIONAL = torch.nn.functional.batch_norm
_BATCH_NORMS: tuple[Callable[..., Any], ...] = (
    _FUNCTIONAL,
    torch.batch_norm,
    torch.ops.aten.batch_norm.default,
    torch.ops.aten._native_batch_norm_legit_no_training.default,
)


@dataclass(frozen=True)
class SyntheticData:
    """Inputs whose statistics resemble those of the training data.

    Attributes:
        arrays: input name -> array of the model's own shape with the samples on axis 0.
        first_loss: of the noise that the optimisation began with, mean over groups.
        last_loss: of the arrays, mean over groups.
        batchnorms: how many BatchNorms were matched.
        steps: optimisation steps taken, over all groups.
    """

    arrays: dict[str, np.ndarray]
    first_loss: float
    last_loss: float
    batchnorms: int
    steps: int


def synthesize(
    module: torch.nn.Module,
    inputs: Sequence[TensorSpec],
    *,
    samples: int = 16,
    steps: int = 100,
    seed: int = 0,
    seconds: float = 60.0,
    progress: Progress = silent,
) -> SyntheticData | None:
    """Make calibration inputs for `module`; the module is as before afterwards.

    The result depends on the seed alone unless `seconds` cut it short. Samples are optimised in
    groups: as many at once as fit `GROUP_ELEMENTS`, or the batch size that the model demands.

    Args:
        module: an ordinary module, or the one of an exported program.
        inputs: in the order of the module's arguments.
        samples: how many to make; rounded up to whole batches where the batch size is fixed.
        steps: most optimisation steps for each group.
        seed: of the noise.
        seconds: most time for everything; every group gets its share, and at least one step.
        progress: shows how far it is, in steps.

    Returns:
        None where this cannot be done: the module has no BatchNorm with running statistics, or
        takes an input that is not floating point.

    Raises:
        UnsupportedError: the loss is NaN or infinite, as with broken running statistics.
    """
    if not inputs or not all(spec.dtype.startswith("float") for spec in inputs):
        return None
    sizes = _group_sizes(inputs, samples)
    generator = torch.Generator().manual_seed(seed)
    deadline = time.monotonic() + seconds
    groups: list[_Group] = []
    with (
        _frozen(module),
        torch.enable_grad(),
        progress("Synthetic calibration data", steps * len(sizes)) as advance,
    ):
        for index, size in enumerate(sizes):
            group = _Group(module, inputs, size, generator)
            now = time.monotonic()
            group.optimise(steps, now + (deadline - now) / (len(sizes) - index), advance)
            if group.batchnorms == 0:
                return None
            groups.append(group)
    return SyntheticData(
        arrays={
            spec.name: np.concatenate([group.best[i] for group in groups])
            for i, spec in enumerate(inputs)
        },
        first_loss=float(np.mean([group.first_loss for group in groups])),
        last_loss=float(np.mean([group.best_loss for group in groups])),
        batchnorms=groups[0].batchnorms,
        steps=sum(group.steps for group in groups),
    )


class _Group:
    """Samples that are optimised together.

    Attributes:
        batchnorms: BatchNorms that the module ran through; without any, nothing is optimised.
        first_loss: of the noise.
        best_loss: the smallest so far.
        best: the arrays that had it, one for each input.
        steps: optimisation steps taken.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        inputs: Sequence[TensorSpec],
        size: int,
        generator: torch.Generator,
    ) -> None:
        self._module = module
        device = next((tensor.device for tensor in module.state_dict().values()), None)
        self._tensors = [
            torch.randn(spec.concrete(size), generator=generator)
            .to(device, getattr(torch, spec.dtype))
            .requires_grad_()
            for spec in inputs
        ]
        self.steps = 0
        self.batchnorms = 0
        self.best_loss = math.inf
        self.best: list[np.ndarray] = []
        self.first_loss = math.inf

    def optimise(self, steps: int, deadline: float, advance: Tracker) -> None:
        """Take up to `steps` steps; stop at the deadline or when the loss no longer falls."""
        loss = self._evaluate()
        if self.batchnorms == 0:
            return
        self.first_loss = self.best_loss
        optimizer = torch.optim.Adam(self._tensors, lr=LEARNING_RATE)
        milestone, milestone_step = self.first_loss, 0
        while self.steps < steps and self.steps - milestone_step < PATIENCE:
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            loss = self._evaluate()
            self.steps += 1
            advance(1, f"loss {self.best_loss:.3g}")
            if self.best_loss < 0.99 * milestone:
                milestone, milestone_step = self.best_loss, self.steps
            if time.monotonic() > deadline:
                break
        advance(steps - self.steps)

    def _evaluate(self) -> torch.Tensor:
        """The loss of the present tensors, which are kept if they are the best."""
        with _StatisticsLoss() as statistics:
            self._module(*self._tensors)
        self.batchnorms = len(statistics.terms)
        terms = statistics.terms + [
            _mismatch(tensor, tensor.new_zeros(1), tensor.new_ones(1))
            for tensor in self._tensors
            if tensor.ndim > 1
        ]
        loss = torch.stack(terms).sum() if self.batchnorms else torch.zeros(())
        value = float(loss.detach())
        if not math.isfinite(value):
            raise UnsupportedError(
                "The statistics at the model's BatchNorms are NaN or infinite, so no calibration "
                "data can be made from them. Load a checkpoint whose training did not diverge, or "
                "give real data with --calibration."
            )
        if value < self.best_loss:
            self.best_loss = value
            self.best = [tensor.detach().cpu().numpy().copy() for tensor in self._tensors]
        return loss


class _StatisticsLoss(TorchFunctionMode):
    """Collects the mismatch at every BatchNorm call that happens inside of the context.

    Watching the calls rather than the modules serves ordinary modules, functional calls and
    exported programs alike.
    """

    def __init__(self) -> None:
        super().__init__()
        self.terms: list[torch.Tensor] = []

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run `func`, and look at its input first if it is a BatchNorm."""
        kwargs = dict(kwargs or {})
        if func in _BATCH_NORMS:
            at = 1 if func is _FUNCTIONAL else 3
            mean = args[at] if len(args) > at else kwargs.get("running_mean")
            variance = args[at + 1] if len(args) > at + 1 else kwargs.get("running_var")
            if mean is not None and variance is not None:
                x = args[0] if args else kwargs["input"]
                self.terms.append(_mismatch(x, mean, variance))
        return func(*args, **kwargs)


def _mismatch(x: torch.Tensor, mean: torch.Tensor, variance: torch.Tensor) -> torch.Tensor:
    """Squared relative distance of the channel statistics of `x` (N, C, ...) from the given ones.

    Averaged over channels, as in the reference code of ZeroQ.
    """
    tiny = 1e-5  # BatchNorm's own epsilon: a channel that never varies stays finite
    axes = [axis for axis in range(x.ndim) if axis != 1]
    x_variance, x_mean = torch.var_mean(x, dim=axes, correction=0)
    deviation = (variance + tiny).sqrt()
    centers = (x_mean - mean) / deviation
    spreads = (x_variance + tiny).sqrt() / deviation - 1
    return (centers**2 + spreads**2).mean().float()


def _group_sizes(inputs: Sequence[TensorSpec], samples: int) -> list[int]:
    """How many samples to optimise together, group after group."""
    if not all(spec.dynamic_batch for spec in inputs if spec.shape):
        fixed = next((spec.shape[0] for spec in inputs if spec.shape), 1)
        size = fixed if isinstance(fixed, int) else 1
        return [size] * math.ceil(samples / size)
    elements = sum(math.prod(spec.concrete()) for spec in inputs)
    groups = math.ceil(samples / max(1, min(samples, GROUP_ELEMENTS // elements)))
    return [samples // groups + (index < samples % groups) for index in range(groups)]


@contextmanager
def _frozen(module: torch.nn.Module) -> Iterator[None]:
    """Eval mode and no gradients for parameters, and both as before afterwards.

    The flags are set directly: an exported program's module refuses `eval()`.
    """
    modes = {child: child.training for child in module.modules()}
    needs = {parameter: parameter.requires_grad for parameter in module.parameters()}
    try:
        for child in modes:
            child.training = False
        for parameter in needs:
            parameter.requires_grad_(False)
        yield
    finally:
        for child, training in modes.items():
            child.training = training
        for parameter, required in needs.items():
            parameter.requires_grad_(required)
