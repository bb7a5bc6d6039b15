"""What passes that train a float network have in common: options, and the original as teacher."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar

import numpy as np

from compress.columns import whole_inputs
from compress.errors import UnsupportedError, UsageError
from compress.model import Model
from compress.passes import Context
from compress.progress import Progress, silent
from compress.target import Target

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch
    from torch import Tensor

    from compress.data import Batch, Data
    from compress.teaching import Teaching
    from compress.torch_graph.network import Network
    from compress.training import Score, Subject

    Arrays = dict[str, np.ndarray]

Student = TypeVar("Student")
State = TypeVar("State")

AUGMENTS = ("none", "flip")
TEACHER = "teacher"
"""Where the exported original is kept for the next pass that trains."""


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """Options of a pass that trains a network towards its float original.

    Attributes:
        epochs: passes over the training data.
        steps: updates, in place of epochs.
        batch: samples for one update.
        learning_rate: largest rate (Adam, warm-up, half a cosine).
        temperature: of the softmax that is distilled.
        alpha: weight of the distillation beside the labels' cross entropy.
        augment: "flip" mirrors half of the images.
        seconds: of training at most.
    """

    epochs: float = 1.0
    steps: int | None = None
    batch: int = 64
    learning_rate: float = 3e-4
    temperature: float = 4.0
    alpha: float = 0.9
    augment: Literal["none", "flip"] = "none"
    seconds: float | None = None

    name: ClassVar[str]

    def __post_init__(self) -> None:
        for option in ("epochs", "steps", "batch", "learning_rate", "temperature", "seconds"):
            value = getattr(self, option)
            optional = option in ("steps", "seconds")
            self._check(option, (optional and value is None) or value > 0, "above 0")
        self._check("alpha", 0 <= self.alpha <= 1, "within 0 and 1")
        self._check("augment", self.augment in AUGMENTS, f"one of {', '.join(AUGMENTS)}")

    def _check(self, option: str, holds: bool, rule: str) -> None:
        if not holds:
            raise UsageError(f"{self.name}: {option} is {getattr(self, option)!r}, not {rule}.")

    def check(self, model: Model, target: Target) -> None:
        """Refuse a model without a batch axis.

        Raises:
            UnsupportedError: batches cannot be formed.
        """
        if whole_inputs(model.inputs):
            raise UnsupportedError(
                f"{model.name} cannot be trained: axis 0 of its inputs is not the batch "
                f"({', '.join(map(str, model.inputs))}). Leave out {self.name}."
            )


@dataclass(frozen=True, kw_only=True)
class FineTuning(TrainingOptions):
    """A pass that trains a float network; options are those of `TrainingOptions`."""

    def taught(
        self,
        model: Model,
        student: Student,
        teacher: Model,
        data: Data,
        course: Callable[[Student, Teaching[State], float], Subject[State]],
        *,
        seed: int = 0,
        progress: Progress = silent,
    ) -> tuple[State, dict[str, Any]]:
        """The best state of a network, and facts about its training.

        Args:
            model: what the student is made from; says whether its batch is fixed.
            student: what is trained: a graph, which may have operators of a pass's own, or a
                torch module.
            teacher: as in `train`.
            data: as in `train`.
            course: `Course`, or one that changes the student in the course of the training.
            seed: of the samples' order.
            progress: opens a tracker in updates.
        """
        from compress.teaching import Lesson, Teaching, batch_and_parts, training_facts
        from compress.torch_graph.network import Network
        from compress.training import Limits, Samples, train

        samples = Samples(data, seed)
        size, parts = batch_and_parts(model, samples, self.batch)
        lesson = Lesson(self.temperature, self.alpha, self.augment)
        teaching: Teaching[State] = Teaching(
            Network(teacher.graph_model), samples.held, size, lesson, seed
        )
        subject = course(student, teaching, self.learning_rate)
        epoch = max(1, samples.count // (size * parts))
        steps = self.steps or max(1, round(self.epochs * epoch))
        limits = Limits(steps, self.seconds, min(epoch, math.ceil(steps / 5)), parts)
        outcome = train(subject, samples.batches(size), limits, progress)
        return outcome.best, {
            "samples": samples.count,
            **training_facts(outcome),
            "held_out": teaching.held_out(outcome),
        }


def teacher_of(context: Context) -> Model:
    """The original at the ONNX stage; exported once for all passes of a context."""
    from compress.export import to_onnx

    teacher = context.memo.get(TEACHER)
    if not isinstance(teacher, Model):
        teacher = to_onnx(context.original, context.target.capabilities.opset, context.progress)
        context.memo[TEACHER] = teacher
    return teacher


class Course:
    """A float network whose constants are parameters, and how it is taught."""

    def __init__(self, network: Network, teaching: Teaching[Arrays], rate: float) -> None:
        import torch

        from compress.teaching import trainable

        self.network, self.teaching, self.rate = network, teaching, rate
        self.weights = {
            name: torch.nn.Parameter(network.constants[name].clone()) for name in trainable(network)
        }
        if not self.weights:
            raise UnsupportedError("The network has no weights to train. Leave out the pass.")
        network.constants.update(self.weights)
        self.names = {name: _name_in(network, teaching, name) for name in teaching.wanted}

    def groups(self) -> list[dict[str, Any]]:
        """What is trained."""
        return [{"params": list(self.weights.values()), "lr": self.rate}]

    def begin(self, progress: float) -> None:
        """Nothing changes in the course of the training."""

    def end(self) -> None:
        """Parameters may have any value."""

    def loss(self, batch: Batch) -> Tensor:
        """Distillation, and labels where they are."""
        inputs, expected = self.teaching.batch(batch)
        return self.teaching.loss(self.run(inputs), expected, batch.labels)

    def score(self) -> Score:
        """On the samples that are held out."""
        return self.teaching.score(self.run)

    def state(self) -> Arrays:
        """Copies of the weights, by the names of the constants."""
        return {name: w.detach().numpy().copy() for name, w in self.weights.items()}

    def run(self, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """What the teacher's tensors are compared with, by their names in the teacher."""
        found = self.network.run(inputs, self.names.values())
        return {name: found[own] for name, own in self.names.items()}


def _name_in(student: Network, teaching: Teaching[Arrays], name: str) -> str:
    """A tensor of the teacher by its name in the student: what the same output's softmax reads."""
    teacher = teaching.teacher
    if name in teacher.outputs:
        return name
    made = (out for out in teacher.outputs if out in teacher.producer)
    output = next(out for out in made if name in teacher.steps[teacher.producer[out]].inputs)
    return student.steps[student.producer[output]].inputs[0]
