"""Quantization-aware training as a pass: recover in training what rounding lost."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeAlias, get_args

import numpy as np
import onnx_ir as ir
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from compress.columns import whole_inputs
from compress.data import Batch, Data
from compress.errors import DataError, UnsupportedError, UsageError
from compress.model import Model
from compress.passes import Context
from compress.reference import reference_session, run
from compress.rewrites import STATISTICS, listed, output_statistics
from compress.target import Target
from compress.torch_graph.network import Network, to_torch
from quant.learned import Scales
from quant.refine import STATE, emitted, state_of, with_constants
from quant.trainee import Folded, Trainee
from quant.training import Limits, Outcome, Samples, Score, pick, train

Augment = Literal["none", "flip"]
Run: TypeAlias = Callable[[dict[str, Tensor]], dict[str, Tensor]]

SMALLEST_BATCH = 16
"""Below it a batch says too little: BatchNorm has running statistics from the start."""


@dataclass(frozen=True, kw_only=True)
class QAT:
    """Train weights, BatchNorm and scales of a quantized network in its simulation.

    Learned step sizes (LSQ: Esser et al. 2020, arXiv 1902.08153), BatchNorm as in
    Krishnamoorthi 2018, arXiv 1806.08342, section 3.2.2, and the float network as the teacher
    (Hinton et al. 2015, arXiv 1503.02531); labels are used where the training data have them.
    The formats, the zero points and what is quantized stay.

    Attributes:
        epochs: passes over the training data.
        steps: updates, in place of epochs.
        batch: samples for one update.
        learning_rate: largest rate of weights and BatchNorm (Adam, warm-up, half a cosine).
        scale_learning_rate: the same of the logarithm of scales.
        scales: of weights: "lsq" are learned, "minmax" follow the largest weight.
        freeze_at: share of the training after which BatchNorm has running statistics.
        temperature: of the softmax that is distilled.
        alpha: weight of the distillation beside the labels' cross entropy.
        augment: "flip" mirrors half of the images.
        seconds: of training at most.
    """

    epochs: float = 1.0
    steps: int | None = None
    batch: int = 64
    learning_rate: float = 3e-4
    scale_learning_rate: float = 1e-3
    scales: Scales = "lsq"
    freeze_at: float = 0.6
    temperature: float = 4.0
    alpha: float = 0.9
    augment: Augment = "none"
    seconds: float | None = None

    name: ClassVar[str] = "qat"
    stage: ClassVar[Literal["onnx"]] = "onnx"
    refines: ClassVar[bool] = True

    def __post_init__(self) -> None:
        above_zero = ("epochs", "batch", "learning_rate", "scale_learning_rate", "temperature")
        for option in above_zero:
            self._check(option, getattr(self, option) > 0, "above 0")
        self._check("steps", self.steps is None or self.steps > 0, "above 0")
        self._check("seconds", self.seconds is None or self.seconds > 0, "above 0")
        self._check("freeze_at", 0 <= self.freeze_at <= 1, "within 0 and 1")
        self._check("alpha", 0 <= self.alpha <= 1, "within 0 and 1")
        for option, kind in (("scales", Scales), ("augment", Augment)):
            allowed = get_args(kind)
            self._check(option, getattr(self, option) in allowed, f"one of {', '.join(allowed)}")

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
        """The same placement with trained weights and scales; details say what training gained.

        Raises:
            UsageError: there are no data, or the training diverged.
            DataError: the data do not fit.
        """
        self.check(model, context.target)
        state = state_of(model, self.name)
        samples = Samples(self._data(context), context.seed)
        size, parts = self._batches(model, samples)
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
            **_facts(outcome),
            "held_out": course.held_out(outcome),
            **course.compare(outcome.best, made),
            STATISTICS: listed(outcome.best.moments),
        }
        return emitted(model, best, self.name, options, details)

    def _data(self, context: Context) -> Data:
        data = context.training if context.training is not None else context.calibration
        if data is None:
            raise UsageError(
                f"Pass {self.name} trains, and there are no data. Give --train (labelled or not), "
                f"or at least --calibration."
            )
        return data

    def _batches(self, model: Model, samples: Samples) -> tuple[int, int]:
        """Samples that run at once, and how often they do for one update."""
        if model.dynamic_batch:
            return min(self.batch, samples.count), 1
        size = next((int(spec.shape[0]) for spec in model.inputs if spec.shape), 1)
        return size, max(1, round(self.batch / size))


def teacher_graph(model: Model) -> ir.Model:
    """The float graph before any pass refined it: `quantize` left it in its step."""
    states = [step.details[STATE] for step in model.history if STATE in step.details]
    found: ir.Model = states[0].graph_model
    return found


def _facts(outcome: Outcome[Folded]) -> dict[str, Any]:
    return {
        "steps": len(outcome.losses),
        "seconds": outcome.seconds,
        "first_loss": outcome.first_loss,
        "last_loss": outcome.last_loss,
        "stopped": outcome.stopped,
    }


class Course:
    """How a network is taught and judged: by its float original, and by labels where they are.

    Attributes:
        trainee: the quantized network.
        teacher: the float original.
        held: samples to judge by.
        expected: what the teacher says of them.
        classes: the tensor (N, classes) that is compared, before a softmax; "" where no output
            has classes, and all outputs are compared by their squared error.
    """

    def __init__(
        self, trainee: Trainee, teacher: Network, held: Batch, size: int, options: QAT, seed: int
    ) -> None:
        self.trainee, self.network, self.teacher = trainee, trainee.network, teacher
        self.held, self.size, self.options = held, size, options
        self.freeze_at = options.freeze_at if size >= SMALLEST_BATCH else 0.0
        self.generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            outputs = self._over(lambda inputs: teacher.run(inputs))
            self.classes = _class_scores(teacher, outputs)
            floats = tuple(name for name, x in outputs.items() if x.is_floating_point())
            self.wanted = (self.classes,) if self.classes else floats
            if not self.wanted:
                raise UnsupportedError(
                    f"No output is float ({', '.join(outputs)}), so there is no loss to train with."
                )
            self.expected = self._over(self._teach)
        self._check_labels(held.labels)

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
        self._check_labels(batch.labels)
        inputs = {name: self._augmented(x) for name, x in to_torch(batch.inputs).items()}
        with torch.no_grad():
            expected = self._teach(inputs)
        self.trainee.refresh()
        got = self.trainee.run(inputs, self.wanted)
        return self._loss(got, expected, batch.labels)

    def _loss(
        self, got: Mapping[str, Tensor], expected: Mapping[str, Tensor], labels: np.ndarray | None
    ) -> Tensor:
        if not self.classes:
            errors = [relative_error(got[name], expected[name]) for name in self.wanted]
            return torch.stack(errors).mean()
        logits = got[self.classes]
        distilled = distillation(logits, expected[self.classes], self.options.temperature)
        if labels is None:
            return distilled
        alpha = self.options.alpha
        return alpha * distilled + (1 - alpha) * F.cross_entropy(logits, torch.from_numpy(labels))

    def _check_labels(self, labels: np.ndarray | None) -> None:
        count = self.expected[self.classes].shape[1] if self.classes else 0
        if labels is not None and count and labels.max() >= count:
            raise DataError(
                f"The training data have the label {labels.max()}, and the model has {count} "
                f"classes, 0..{count - 1}. Labels must number the model's own classes."
            )

    def end(self) -> None:
        """Keep scales and gammas in their bounds."""
        self.trainee.restrain()

    def state(self) -> Folded:
        """What would be emitted now."""
        return self.trainee.folded()

    @torch.no_grad()
    def score(self) -> Score:
        """Top-1, agreement or nothing; and the loss, negative. As emitted, on what is held out."""
        folded = self.trainee.folded()
        simulation = folded.simulated(self.network, self.trainee.float_biases)
        got = self._over(lambda inputs: simulation.run(inputs, self.wanted))
        loss = float(self._loss(got, self.expected, self.held.labels))
        if not self.classes:
            return -loss, 0.0
        found = got[self.classes].argmax(1).numpy()
        right = self.held.labels
        if right is None:
            right = self.expected[self.classes].argmax(1).numpy()
        return float((found == right).mean()), -loss

    def held_out(self, outcome: Outcome[Folded]) -> dict[str, Any]:
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

    @torch.no_grad()
    def compare(self, folded: Folded, made: Model) -> dict[str, float]:
        """How close the emitted model, run by ONNX Runtime, is to the simulation."""
        simulation = folded.simulated(self.network, self.trainee.float_biases)
        runtime = reference_session(made.graph_model, optimize=True)

        def deployed(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
            return to_torch(run(runtime, {name: x.numpy() for name, x in inputs.items()}))

        expected = self._over(simulation.run)
        got = self._over(deployed)
        differences = [_difference(got[n].float(), expected[n].float()) for n in expected]
        found = {"largest_difference": max(differences)}
        output = next((n for n in expected if _has_classes(expected[n])), None)
        if output is not None:
            same = got[output].argmax(1) == expected[output].argmax(1)
            found["agreement"] = float(same.float().mean())
        return found

    def _teach(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return self.teacher.run(inputs, self.wanted)

    def _augmented(self, x: Tensor) -> Tensor:
        """Images in the memory order that convolutions are fast with, some of them mirrored."""
        if x.ndim != 4:
            return x
        if self.options.augment == "flip":
            mirrored = torch.rand(len(x), 1, 1, 1, generator=self.generator) < 0.5
            x = torch.where(mirrored, x.flip(3), x)
        return x.contiguous(memory_format=torch.channels_last)

    def _over(self, call: Run) -> dict[str, Tensor]:
        """Outputs for all samples that are held out, a batch at a time.

        The last batch is filled up with copies of its last sample: the model's batch may be fixed.
        """
        found: dict[str, list[Tensor]] = {}
        for start in range(0, len(self.held), self.size):
            rows = np.arange(start, start + self.size).clip(max=len(self.held) - 1)
            for name, output in call(to_torch(pick(self.held, rows).inputs)).items():
                found.setdefault(name, []).append(output)
        return {name: torch.cat(parts)[: len(self.held)] for name, parts in found.items()}


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


def _difference(got: Tensor, expected: Tensor) -> float:
    """Largest difference as a share of the largest magnitude."""
    largest = expected.abs().max().clamp_min(1e-12)
    return float((got - expected).abs().max() / largest)


def _has_classes(tensor: Tensor) -> bool:
    return tensor.ndim == 2 and tensor.shape[1] > 1


def _class_scores(network: Network, outputs: Mapping[str, Tensor]) -> str:
    """The first output (N, classes), or what its softmax reads; "" where there is none."""
    output = next((n for n in network.outputs if _has_classes(outputs[n])), "")
    maker = network.steps[network.producer[output]] if output in network.producer else None
    softmax = maker is not None and maker.op in ("Softmax", "LogSoftmax")
    return maker.inputs[0] if maker is not None and softmax else output
