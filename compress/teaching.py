"""What a network in training should say: what its original says, and labels where they are."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from compress.data import Batch, Data
from compress.errors import DataError, UnsupportedError, UsageError
from compress.model import Model
from compress.passes import Context
from compress.torch_graph.network import Network, to_torch
from compress.training import Outcome, Samples, Score, State, pick

Augment = Literal["none", "flip"]
PARAMETERS = {
    "Conv": (1, 2),
    "ConvTranspose": (1, 2),
    "Gemm": (1, 2),
    "MatMul": (0, 1),
    "BatchNormalization": (1, 2),
    "LayerNormalization": (1, 2),
    "GroupNormalization": (1, 2),
    "InstanceNormalization": (1, 2),
    "PRelu": (1,),
}
"""Inputs of operators that are trained where they are float constants."""
Run: TypeAlias = Callable[[dict[str, Tensor]], dict[str, Tensor]]


@dataclass(frozen=True)
class Lesson:
    """How outputs are compared with the teacher's.

    Attributes:
        temperature: of the softmax that is distilled.
        alpha: weight of the distillation beside the labels' cross entropy.
        augment: "flip" mirrors half of the images.
    """

    temperature: float = 4.0
    alpha: float = 0.9
    augment: Augment = "none"


class Teaching(Generic[State]):
    """A teacher, the samples to judge by, and the loss of a student.

    Attributes:
        teacher: the float original.
        held: samples to judge by.
        size: samples that run at once.
        classes: the tensor (N, classes) that is compared, before a softmax; "" where no output
            has classes, and all outputs are compared by their squared error.
        wanted: names of the tensors that the student has to compute.
        expected: what the teacher says of the samples to judge by.

    Raises:
        UnsupportedError: no output is float.
        DataError: labels do not fit the classes.
    """

    def __init__(self, teacher: Network, held: Batch, size: int, lesson: Lesson, seed: int) -> None:
        self.teacher, self.held, self.size, self.lesson = teacher, held, size, lesson
        self._generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            outputs = self.over(lambda inputs: teacher.run(inputs))
            self.classes = class_scores(teacher, outputs)
            floats = tuple(name for name, x in outputs.items() if x.is_floating_point())
            self.wanted = (self.classes,) if self.classes else floats
            if not self.wanted:
                raise UnsupportedError(
                    f"No output is float ({', '.join(outputs)}), so there is no loss to train with."
                )
            self.expected = self.over(self._teach)
        self._check_labels(held.labels)

    def batch(self, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Inputs of a batch, augmented, and what the teacher says of them."""
        self._check_labels(batch.labels)
        inputs = {name: self._augmented(x) for name, x in to_torch(batch.inputs).items()}
        with torch.no_grad():
            return inputs, self._teach(inputs)

    def loss(
        self, got: Mapping[str, Tensor], expected: Mapping[str, Tensor], labels: np.ndarray | None
    ) -> Tensor:
        """Distillation, and cross entropy with the labels; without classes, the squared error."""
        if not self.classes:
            errors = [relative_error(got[name], expected[name]) for name in self.wanted]
            return torch.stack(errors).mean()
        logits = got[self.classes]
        distilled = distillation(logits, expected[self.classes], self.lesson.temperature)
        if labels is None:
            return distilled
        alpha = self.lesson.alpha
        return alpha * distilled + (1 - alpha) * F.cross_entropy(logits, torch.from_numpy(labels))

    @torch.no_grad()
    def score(self, call: Run) -> Score:
        """Top-1, agreement or nothing; and the loss, negative. On what is held out."""
        got = self.over(call)
        loss = float(self.loss(got, self.expected, self.held.labels))
        if not self.classes:
            return -loss, 0.0
        found = got[self.classes].argmax(1).numpy()
        right = self.held.labels
        if right is None:
            right = self.expected[self.classes].argmax(1).numpy()
        return float((found == right).mean()), -loss

    def held_out(self, outcome: Outcome[State]) -> dict[str, Any]:
        """Scores on the samples that are held out, for the report."""
        measure = "top-1" if self.held.labels is not None else "agreement with float"
        if not self.classes:
            measure = "negative relative squared error"
        return {
            "measure": measure,
            "samples": len(self.held),
            "before": outcome.before[0],
            "after": outcome.after[0],
        }

    def over(self, call: Run) -> dict[str, Tensor]:
        """Outputs for all samples that are held out, a batch at a time.

        The last batch is filled up with copies of its last sample: the model's batch may be fixed.
        """
        found: dict[str, list[Tensor]] = {}
        for start in range(0, len(self.held), self.size):
            rows = np.arange(start, start + self.size).clip(max=len(self.held) - 1)
            for name, output in call(to_torch(pick(self.held, rows).inputs)).items():
                found.setdefault(name, []).append(output)
        return {name: torch.cat(parts)[: len(self.held)] for name, parts in found.items()}

    def _teach(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return self.teacher.run(inputs, self.wanted)

    def _check_labels(self, labels: np.ndarray | None) -> None:
        count = self.expected[self.classes].shape[1] if self.classes else 0
        if labels is not None and count and labels.max() >= count:
            raise DataError(
                f"The training data have the label {labels.max()}, and the model has {count} "
                f"classes, 0..{count - 1}. Labels must number the model's own classes."
            )

    def _augmented(self, x: Tensor) -> Tensor:
        """Images in the memory order that convolutions are fast with, some of them mirrored."""
        if x.ndim != 4:
            return x
        if self.lesson.augment == "flip":
            mirrored = torch.rand(len(x), 1, 1, 1, generator=self._generator) < 0.5
            x = torch.where(mirrored, x.flip(3), x)
        return x.contiguous(memory_format=torch.channels_last)


def trainable(network: Network) -> list[str]:
    """Names of the constants that are trained, in order of execution."""
    names = (
        step.inputs[position]
        for step in network.steps
        for position in PARAMETERS.get(step.op, ())
        if position < len(step.inputs)
    )
    return [
        name
        for name in dict.fromkeys(names)
        if name in network.constants and network.constants[name].is_floating_point()
    ]


def training_data(context: Context, name: str) -> Data:
    """What the pass of this name trains with.

    Raises:
        UsageError: there are no data.
    """
    data = context.training if context.training is not None else context.calibration
    if data is None:
        raise UsageError(
            f"Pass {name} trains, and there are no data. Give --train (labelled or not), "
            f"or at least --calibration."
        )
    return data


def batch_and_parts(model: Model, samples: Samples, wanted: int) -> tuple[int, int]:
    """Samples that run at once, and how often they do for one update of `wanted` samples."""
    if model.dynamic_batch:
        return min(wanted, samples.count), 1
    size = next((int(spec.shape[0]) for spec in model.inputs if spec.shape), 1)
    return size, max(1, round(wanted / size))


def training_facts(outcome: Outcome[State]) -> dict[str, Any]:
    """What a training took, for the report."""
    return {
        "steps": len(outcome.losses),
        "seconds": outcome.seconds,
        "first_loss": outcome.first_loss,
        "last_loss": outcome.last_loss,
        "stopped": outcome.stopped,
    }


def distillation(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T**2 KL(softmax(teacher / T) || softmax(student / T)), mean over samples.

    T**2 makes up for the gradients, which shrink by it (Hinton et al. 2015, arXiv 1503.02531,
    section 2).

    Args:
        student: scores before the softmax, (N, classes).
        teacher: the same.
        temperature: T.
    """
    mine = F.log_softmax(student / temperature, 1)
    wanted = F.log_softmax(teacher / temperature, 1)
    return F.kl_div(mine, wanted, reduction="batchmean", log_target=True) * temperature**2


def relative_error(got: Tensor, expected: Tensor) -> Tensor:
    """Mean squared error as a share of the expected tensor's mean square."""
    return F.mse_loss(got, expected) / expected.square().mean().clamp_min(1e-12)


def has_classes(tensor: Tensor) -> bool:
    """Whether it can be the scores of classes, (N, classes)."""
    return tensor.ndim == 2 and tensor.shape[1] > 1


def class_scores(network: Network, outputs: Mapping[str, Tensor]) -> str:
    """The first output (N, classes), or what its softmax reads; "" where there is none."""
    output = next((n for n in network.outputs if has_classes(outputs[n])), "")
    maker = network.steps[network.producer[output]] if output in network.producer else None
    softmax = maker is not None and maker.op in ("Softmax", "LogSoftmax")
    return maker.inputs[0] if maker is not None and softmax else output
