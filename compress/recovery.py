"""Recovery: train a float network whose function a pass changed, with the original as teacher."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from compress.columns import whole_inputs
from compress.errors import UnsupportedError, UsageError
from compress.model import Model, Step
from compress.passes import Context
from compress.progress import Progress, silent
from compress.target import Target

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from compress.data import Batch, Data
    from compress.teaching import Teaching
    from compress.torch_graph.network import Network
    from compress.training import Score

    Arrays = dict[str, np.ndarray]

UNCHANGED = 1e-6
"""Relative squared error of the outputs below which there is nothing to recover."""
AUGMENTS = ("none", "flip")


@dataclass(frozen=True, kw_only=True)
class Recover:
    """Fine-tune a float network towards the original that it was made from.

    For passes that change what a network computes: the original is the teacher (Hinton et al.
    2015, arXiv 1503.02531), and labels are used where the training data have them. BatchNorm that
    is not folded keeps its running statistics. A network that computes what the original does is
    left alone. The best state on samples that are held out is kept, which may be the first.

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

    name: ClassVar[str] = "recover"
    stage: ClassVar[Literal["onnx"]] = "onnx"

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

    def apply(self, model: Model, context: Context) -> Model:
        """The same graph with trained weights; details say what training gained.

        Raises:
            UsageError: there are no data, or the training diverged.
            DataError: the data do not fit.
            UnsupportedError: the graph has an operator that cannot be trained here.
        """
        from compress.export import to_onnx
        from compress.teaching import training_data

        self.check(model, context.target)
        data = training_data(context, self.name)
        teacher = context.memo.get(self.name)
        if teacher is None:
            opset = context.target.capabilities.opset
            teacher = to_onnx(context.original, opset, context.progress)
            context.memo[self.name] = teacher
        if equal_outputs(model, teacher, data):
            details = {"steps": 0, "stopped": "the network computes what its original does"}
            return model.evolve(model.graph_model, Step(self.name, asdict(self), details))
        return self.train(model, teacher, data, seed=context.seed, progress=context.progress)

    def train(
        self,
        model: Model,
        teacher: Model,
        data: Data,
        *,
        seed: int = 0,
        progress: Progress = silent,
    ) -> Model:
        """The same, without asking whether there is anything to recover.

        Args:
            model: float, at the ONNX stage.
            teacher: the same outputs by name, at the ONNX stage.
            data: to train with, labelled or not; a part is held out.
            seed: of the samples' order.
            progress: opens a tracker in updates.
        """
        from compress.rewrites import with_constants
        from compress.teaching import Lesson, Teaching, batch_and_parts, training_facts
        from compress.torch_graph.network import Network
        from compress.training import Limits, Samples, train

        samples = Samples(data, seed)
        size, parts = batch_and_parts(model, samples, self.batch)
        lesson = Lesson(self.temperature, self.alpha, self.augment)
        teaching: Teaching[Arrays] = Teaching(
            Network(teacher.graph_model), samples.held, size, lesson, seed
        )
        course = _Course(Network(model.graph_model), teaching, self.learning_rate)
        epoch = max(1, samples.count // (size * parts))
        steps = self.steps or max(1, round(self.epochs * epoch))
        limits = Limits(steps, self.seconds, min(epoch, math.ceil(steps / 5)), parts)
        outcome = train(course, samples.batches(size), limits, progress)
        details = {
            "samples": samples.count,
            **training_facts(outcome),
            "held_out": teaching.held_out(outcome),
        }
        made = with_constants(model.graph_model, outcome.best)
        return model.evolve(made, Step(self.name, asdict(self), details))


def recover(
    model: Model,
    data: Any,
    *,
    teacher: Model,
    seed: int = 0,
    progress: Progress = silent,
    **options: Any,
) -> Model:
    """Fine-tune a float network towards a teacher with the same outputs.

    Args:
        model: float, at the ONNX stage.
        data: as `compress.data.load_data` takes it, labelled or not.
        teacher: the network that `model` was made from, at either stage.
        seed: of the samples' order.
        progress: opens a tracker in updates.
        options: of `Recover`.

    Returns:
        The same graph with other weights; its last step says what training gained.
    """
    from compress.data import load_data
    from compress.export import to_onnx

    step = Recover(**options)
    samples = load_data(data, model.inputs)
    opset = model.graph_model.opset_imports.get("", 21)
    return step.train(model, to_onnx(teacher, opset), samples, seed=seed, progress=progress)


def equal_outputs(model: Model, other: Model, data: Data, samples: int = 8) -> bool:
    """Whether two models at the ONNX stage give the same outputs on some samples."""
    from compress.reference import reference_session, run

    size = samples if model.dynamic_batch else 1
    inputs = dict(next(iter(data.take(size).batches(size))).inputs)
    got, expected = (run(reference_session(m.graph_model), inputs) for m in (model, other))
    return all(squared_error(got[name], array) <= UNCHANGED for name, array in expected.items())


def squared_error(got: np.ndarray, expected: np.ndarray) -> float:
    """Mean squared error relative to the power of what is expected."""
    a, b = np.asarray(got, np.float64), np.asarray(expected, np.float64)
    power = float(np.mean(b**2)) if b.size else 0.0
    error = float(np.mean((a - b) ** 2)) if b.size else 0.0
    return error / power if power > 0 else (0.0 if error == 0 else math.inf)


class _Course:
    """A float network whose constants are parameters, and how it is taught."""

    def __init__(self, network: Network, teaching: Teaching[Arrays], rate: float) -> None:
        import torch

        from compress.teaching import trainable

        self.network, self.teaching, self.rate = network, teaching, rate
        self.weights = {
            name: torch.nn.Parameter(network.constants[name].clone()) for name in trainable(network)
        }
        if not self.weights:
            raise UnsupportedError("The network has no weights to train. Leave out recover.")
        network.constants.update(self.weights)
        self.names = {name: _name_in(network, teaching, name) for name in teaching.wanted}

    def groups(self) -> list[dict[str, Any]]:
        return [{"params": list(self.weights.values()), "lr": self.rate}]

    def begin(self, progress: float) -> None:
        """Nothing changes in the course of the training."""

    def end(self) -> None:
        """Parameters may have any value."""

    def loss(self, batch: Batch) -> Tensor:
        inputs, expected = self.teaching.batch(batch)
        return self.teaching.loss(self._run(inputs), expected, batch.labels)

    def score(self) -> Score:
        return self.teaching.score(self._run)

    def state(self) -> Arrays:
        return {name: w.detach().numpy().copy() for name, w in self.weights.items()}

    def _run(self, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
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
