"""Quantization-aware training as a pass: recover in training what rounding lost."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import onnx_ir as ir
import torch
from torch import Tensor

from compress.data import Batch
from compress.fine_tuning import TrainingOptions
from compress.model import Model
from compress.passes import Context
from compress.reference import reference_session, run
from compress.rewrites import STATISTICS, listed, output_statistics, with_constants
from compress.teaching import (
    Lesson,
    Teaching,
    batch_and_parts,
    has_classes,
    training_data,
    training_facts,
)
from compress.torch_graph.network import Network, to_torch
from compress.training import Limits, Samples, Score, train
from quant.learned import Scales
from quant.refine import STATE, emitted, state_of
from quant.trainee import Folded, Trainee

SMALLEST_BATCH = 16
"""Below it a batch says too little: BatchNorm has running statistics from the start."""


@dataclass(frozen=True, kw_only=True)
class QAT(TrainingOptions):
    """Train weights, BatchNorm and scales of a quantized network in its simulation.

    Learned step sizes (LSQ: Esser et al. 2020, arXiv 1902.08153), BatchNorm as in
    Krishnamoorthi 2018, arXiv 1806.08342, section 3.2.2, and the float network as the teacher
    (Hinton et al. 2015, arXiv 1503.02531); labels are used where the training data have them.
    The formats, the zero points and what is quantized stay.

    Attributes:
        learning_rate: largest rate of weights and BatchNorm (Adam, warm-up, half a cosine).
        scale_learning_rate: the same of the logarithm of scales.
        scales: of weights: "lsq" are learned, "minmax" follow the largest weight.
        freeze_at: share of the training after which BatchNorm has running statistics.
    """

    scale_learning_rate: float = 1e-3
    scales: Scales = "lsq"
    freeze_at: float = 0.6

    name: ClassVar[str] = "qat"
    stage: ClassVar[Literal["onnx"]] = "onnx"
    refines: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check("scale_learning_rate", self.scale_learning_rate > 0, "above 0")
        self._check("freeze_at", 0 <= self.freeze_at <= 1, "within 0 and 1")
        kinds = get_args(Scales)
        self._check("scales", self.scales in kinds, f"one of {', '.join(kinds)}")

    def apply(self, model: Model, context: Context) -> Model:
        """The same placement with trained weights and scales; details say what training gained.

        Raises:
            UsageError: there are no data, or the training diverged.
            DataError: the data do not fit.
        """
        self.check(model, context.target)
        state = state_of(model, self.name)
        samples = Samples(training_data(context, self.name), context.seed)
        size, parts = batch_and_parts(model, samples, self.batch)
        network = Network(state.graph_model)
        trainee = Trainee(
            network, state.plan, output_statistics(model), self.scales, state.emulated
        )
        teacher = Network(teacher_graph(model))
        course = Course(trainee, teacher, samples.held, size, self, context.seed)
        epoch = max(1, samples.count // (size * parts))
        steps = self.steps or max(1, round(self.epochs * epoch))
        limits = Limits(steps, self.seconds, min(epoch, math.ceil(steps / 5)), parts)
        outcome = train(course, samples.batches(size), limits, context.progress)
        trained = with_constants(state.graph_model, outcome.best.arrays)
        best = dataclasses.replace(state, graph_model=trained, plan=outcome.best.plan)
        options = dataclasses.asdict(self)
        made = emitted(model, best, self.name, options, {})
        details = {
            "samples": samples.count,
            "normalized": len(trainee.norms),
            **training_facts(outcome),
            "held_out": course.teaching.held_out(outcome),
            **course.compare(outcome.best, made),
            STATISTICS: listed(outcome.best.moments),
        }
        return emitted(model, best, self.name, options, details)


def teacher_graph(model: Model) -> ir.Model:
    """The float graph before any pass refined it: `quantize` left it in its step."""
    states = [step.details[STATE] for step in model.history if STATE in step.details]
    found: ir.Model = states[0].graph_model
    return found


class Course:
    """How a quantized network is taught and judged.

    Attributes:
        trainee: the quantized network.
        teaching: by its float original, and by labels where they are.
    """

    def __init__(
        self, trainee: Trainee, teacher: Network, held: Batch, size: int, options: QAT, seed: int
    ) -> None:
        lesson = Lesson(options.temperature, options.alpha, options.augment)
        self.trainee, self.network, self.options = trainee, trainee.network, options
        self.freeze_at = options.freeze_at if size >= SMALLEST_BATCH else 0.0
        self.teaching: Teaching[Folded] = Teaching(teacher, held, size, lesson, seed)

    def groups(self) -> list[dict[str, Any]]:
        """Weights and scales with their rates."""
        weights, scales = self.trainee.parameters()
        groups = [
            {"params": weights, "lr": self.options.learning_rate},
            {"params": scales, "lr": self.options.scale_learning_rate},
        ]
        return [group for group in groups if group["params"]]

    def begin(self, progress: float) -> None:
        """Freeze BatchNorm when its time has come."""
        self.trainee.frozen = progress >= self.freeze_at

    def loss(self, batch: Batch) -> Tensor:
        """Distillation, and cross entropy with the labels."""
        inputs, expected = self.teaching.batch(batch)
        self.trainee.refresh()
        got = self.trainee.run(inputs, self.teaching.wanted)
        return self.teaching.loss(got, expected, batch.labels)

    def end(self) -> None:
        """Keep scales and gammas in their bounds."""
        self.trainee.restrain()

    def state(self) -> Folded:
        """What would be emitted now."""
        return self.trainee.folded()

    def score(self) -> Score:
        """Top-1, agreement or nothing; and the loss, negative. As emitted, on what is held out."""
        folded = self.trainee.folded()
        simulation = folded.simulated(self.network, self.trainee.float_biases)
        return self.teaching.score(lambda inputs: simulation.run(inputs, self.teaching.wanted))

    @torch.no_grad()
    def compare(self, folded: Folded, made: Model) -> dict[str, float]:
        """How close the emitted model, run by ONNX Runtime, is to the simulation."""
        simulation = folded.simulated(self.network, self.trainee.float_biases)
        runtime = reference_session(made.graph_model, optimize=True)

        def deployed(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
            return to_torch(run(runtime, {name: x.numpy() for name, x in inputs.items()}))

        expected = self.teaching.over(simulation.run)
        got = self.teaching.over(deployed)
        differences = [_difference(got[n].float(), expected[n].float()) for n in expected]
        found = {"largest_difference": max(differences)}
        output = next((n for n in expected if has_classes(expected[n])), None)
        if output is not None:
            same = got[output].argmax(1) == expected[output].argmax(1)
            found["agreement"] = float(same.float().mean())
        return found


def _difference(got: Tensor, expected: Tensor) -> float:
    """Largest difference as a share of the largest magnitude."""
    largest = expected.abs().max().clamp_min(1e-12)
    return float((got - expected).abs().max() / largest)
