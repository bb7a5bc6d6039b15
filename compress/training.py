"""One plain training loop: shuffled samples, Adam with warm-up and cosine, the best state kept."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeAlias, TypeVar

import numpy as np
import torch
from torch import Tensor

from compress.data import Batch, Data
from compress.errors import DataError, UsageError
from compress.progress import Progress

State = TypeVar("State")
Seen = TypeVar("Seen", covariant=True)
Score: TypeAlias = tuple[float, float]
"""What counts, and what decides between equals; higher is better."""

HELD_OUT = 0.05
"""Share of the data that is kept for choosing the best state."""
LARGEST_HELD_OUT = 512
POOL_BYTES = 1_000_000_000
"""Of samples in memory; larger data are read again in every epoch and shuffled part by part."""
SMALLEST_POOL = 256
"""Samples in memory at least, however large they are."""
WARM_UP = 0.05
"""Share of the steps in which the learning rate rises."""
LARGEST_GRADIENT = 1.0
"""Norm to which the gradient of all weights, or of all scales, is cut."""


class Samples:
    """Data in two parts: a slice that is held out, and the rest to train on.

    What is held out is spread over all data; where they do not fit into memory, over the part
    at their beginning that does.

    Attributes:
        held: the samples that are never trained on.
        count: of the others.
    """

    def __init__(self, data: Data, seed: int) -> None:
        total = len(data)
        if total < 2:
            raise DataError(
                f"{data.name} holds {total} sample; training needs one to learn from and one to "
                f"judge by, and more of both to be of use."
            )
        sample = next(iter(data.batches(1)))
        nbytes = sum(array.nbytes for array in sample.inputs.values())
        self._part = max(POOL_BYTES // max(nbytes, 1), SMALLEST_POOL)
        first = next(iter(data.batches(self._part)))
        largest = min(LARGEST_HELD_OUT, len(first) // 2)
        held = int(np.clip(round(total * HELD_OUT), 1, largest))
        edges = np.arange(held + 1) * len(first) // held
        self._positions = np.random.default_rng(seed).integers(edges[:-1], edges[1:])
        self.held, self.count = pick(first, self._positions), total - held
        self._data, self._seed = data, seed
        self._pool = self._kept(first) if len(first) == total else None

    def batches(self, size: int) -> Iterator[Batch]:
        """Batches of `size` samples without end, every epoch in another order.

        Samples that do not fill a batch at the end of an epoch, or of a part that fits into
        memory, are left out of that epoch.

        Raises:
            DataError: there are not enough for a single batch.
        """
        rng = np.random.default_rng(self._seed)
        found = True
        while found:
            found = False
            for part in self._parts():
                order = rng.permutation(len(part))
                for start in range(0, len(order) - size + 1, size):
                    found = True
                    yield pick(part, order[start : start + size])
        raise DataError(
            f"{self._data.name} has no {size} samples for one batch: {self.count} are there to "
            f"train on, and {self._part} of them fit into memory. Give more, or smaller batches."
        )

    def _parts(self) -> Iterator[Batch]:
        if self._pool is not None:
            yield self._pool
            return
        for index, part in enumerate(self._data.batches(self._part)):
            yield part if index else self._kept(part)

    def _kept(self, first: Batch) -> Batch:
        return pick(first, np.setdiff1d(np.arange(len(first)), self._positions))


def pick(batch: Batch, rows: np.ndarray) -> Batch:
    """Some rows of a batch, in this order."""
    inputs = {name: array[rows] if array.ndim else array for name, array in batch.inputs.items()}
    return Batch(inputs, None if batch.labels is None else batch.labels[rows])


class Subject(Protocol[Seen]):
    """What is trained."""

    def groups(self) -> list[dict[str, Any]]:
        """Parameters and their largest learning rate, as torch's optimizers take them."""

    def begin(self, progress: float) -> None:
        """Prepare a step; `progress` is the share of the training that is over."""

    def loss(self, batch: Batch) -> Tensor:
        """Loss of a batch, a scalar."""

    def end(self) -> None:
        """Restore what parameters must fulfil after an update."""

    def score(self) -> Score:
        """Quality on the samples that are held out."""

    def state(self) -> Seen:
        """A copy of the present state."""


@dataclass(frozen=True)
class Limits:
    """When a training ends.

    Attributes:
        steps: updates at most.
        seconds: of wall time at most, or None. The learning rate follows whichever of the two
            is nearer to its end, so that a training that time cuts short is complete too.
        between: updates between two scores.
        parts: batches whose gradients make one update.
    """

    steps: int
    seconds: float | None
    between: int
    parts: int = 1


@dataclass(frozen=True)
class Outcome(Generic[State]):
    """What a training found.

    Attributes:
        best: the state with the highest score, which may be the first.
        before: score of the first state.
        after: score of the best.
        losses: one for each update.
        seconds: of wall time.
        stopped: why it ended early, or "".
    """

    best: State
    before: Score
    after: Score
    losses: tuple[float, ...]
    seconds: float
    stopped: str

    @property
    def first_loss(self) -> float:
        """Mean over the first twentieth of the updates; NaN without any."""
        return float(np.mean(self.losses[: self._few])) if self.losses else math.nan

    @property
    def last_loss(self) -> float:
        """Mean over the last twentieth; NaN without any."""
        return float(np.mean(self.losses[-self._few :])) if self.losses else math.nan

    @property
    def _few(self) -> int:
        return max(1, len(self.losses) // 20)


def train(
    subject: Subject[State], batches: Iterator[Batch], limits: Limits, progress: Progress
) -> Outcome[State]:
    """Train until a limit is reached, and choose the best state that was seen.

    Raises:
        UsageError: the loss is NaN or infinite before anything better than the first state was
            found.
    """
    start = time.monotonic()
    groups = subject.groups()
    highest = [group["lr"] for group in groups]
    optimizer = torch.optim.Adam(groups)
    before = score = subject.score()
    best, stopped = subject.state(), ""
    losses: list[float] = []
    with progress("Train the network", total=limits.steps) as advance:
        while len(losses) < limits.steps:
            share = len(losses) / limits.steps
            if limits.seconds is not None:
                share = max(share, (time.monotonic() - start) / limits.seconds)
            if share >= 1:
                stopped = f"after {limits.seconds:g} seconds"
                break
            subject.begin(share)
            for group, rate in zip(optimizer.param_groups, highest, strict=True):
                group["lr"] = rate * rate_factor(len(losses), limits.steps, share)
            loss = _update(subject, optimizer, batches, limits.parts)
            if not math.isfinite(loss):
                stopped = f"loss or gradient is not finite in step {len(losses) + 1}"
                if score == before:
                    raise UsageError(
                        f"Training failed: {stopped} of {limits.steps}, and no state before it "
                        f"was better than the first. Lower the learning rates, and look for NaN "
                        f"or infinity in the training data."
                    )
                break
            losses.append(loss)
            advance(1, f"loss {loss:.3g}")
            if len(losses) % limits.between == 0 or len(losses) == limits.steps:
                score, best = _better(subject, score, best)
        if stopped.startswith("after") and losses:
            score, best = _better(subject, score, best)
    seconds = time.monotonic() - start
    return Outcome(best, before, score, tuple(losses), seconds, stopped)


def rate_factor(step: int, steps: int, share: float) -> float:
    """Share of the learning rate in a step: a linear warm-up, then half a cosine down to 0.

    Args:
        step: updates that were made.
        steps: of the whole training.
        share: of the training that is over.
    """
    warm = min(1.0, (step + 1) / max(1.0, steps * WARM_UP))
    return warm * (1 + math.cos(math.pi * share)) / 2


def _update(
    subject: Subject[State], optimizer: torch.optim.Adam, batches: Iterator[Batch], parts: int
) -> float:
    """One update from the mean gradient of some batches; the mean loss."""
    optimizer.zero_grad(set_to_none=True)
    total = 0.0
    for batch in itertools.islice(batches, parts):
        loss = subject.loss(batch) / parts
        total += loss.item()
        if not math.isfinite(total):
            return total
        loss.backward()  # type: ignore[no-untyped-call]
    for group in optimizer.param_groups:
        norm = torch.nn.utils.clip_grad_norm_(group["params"], LARGEST_GRADIENT)
        if not torch.isfinite(norm):
            return math.nan
    optimizer.step()
    subject.end()
    return total


def _better(subject: Subject[State], score: Score, best: State) -> tuple[Score, State]:
    found = subject.score()
    return (found, subject.state()) if found > score else (score, best)
