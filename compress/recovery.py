"""Recovery: train a float network whose function a pass changed, with the original as teacher."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from compress.fine_tuning import Course, FineTuning, teacher_of
from compress.model import Model, Step
from compress.passes import Context
from compress.progress import Progress, silent

if TYPE_CHECKING:
    from compress.data import Data

UNCHANGED = 1e-6
"""Relative squared error of the outputs below which there is nothing to recover."""


@dataclass(frozen=True, kw_only=True)
class Recover(FineTuning):
    """Fine-tune a float network towards the original that it was made from.

    For passes that change what a network computes: the original is the teacher (Hinton et al.
    2015, arXiv 1503.02531), and labels are used where the training data have them. BatchNorm that
    is not folded keeps its running statistics. A network that computes what the original does is
    left alone. The best state on samples that are held out is kept, which may be the first.

    Options are those of `FineTuning`.
    """

    name: ClassVar[str] = "recover"
    stage: ClassVar[Literal["onnx"]] = "onnx"

    def apply(self, model: Model, context: Context) -> Model:
        """The same graph with trained weights; details say what training gained.

        Raises:
            UsageError: there are no data, or the training diverged.
            DataError: the data do not fit.
            UnsupportedError: the graph has an operator that cannot be trained here.
        """
        from compress.teaching import training_data

        self.check(model, context.target)
        data = training_data(context, self.name)
        teacher = teacher_of(context)
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
        from compress.torch_graph.network import Network

        student = Network(model.graph_model)
        arrays, details = self.taught(
            model, student, teacher, data, Course, seed=seed, progress=progress
        )
        made = with_constants(model.graph_model, arrays)
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
