"""Fine-tuning a torch network as a pass: in a ConvBN mode, and with branches for the time of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeAlias

from compress.errors import UnsupportedError, UsageError
from compress.fine_tuning import FineTuning, teacher_of
from compress.model import Model, Step, TensorSpec
from compress.passes import Context
from compress.progress import Progress, silent
from compress.target import Target

if TYPE_CHECKING:
    from torch import Tensor, nn

    from compress.data import Batch
    from compress.teaching import Teaching
    from compress.training import Score

    State = dict[str, Tensor]

MODES = ("train", "eval", "tune", "deploy")
EXPANSIONS = ("none", "repvgg", "acb", "dbb", "mobileone")
Expand: TypeAlias = Literal["none", "repvgg", "acb", "dbb", "mobileone"]


@dataclass(frozen=True, kw_only=True)
class FineTune(FineTuning):
    """Fine-tune a torch network on the labelled data of `--train` before it is exported.

    Beside the labels the network as it came in is the teacher, which keeps what the data do not
    show. The best state on samples that are held out is kept, which may be the first.

    Attributes:
        alpha: weight of the distillation beside the labels' cross entropy.
        mode: of ConvBN blocks (see `compress.reparam.set_mode`). "tune" keeps BatchNorm's running
            statistics and the fewest bytes; "train" takes those of each batch. None is "tune",
            and "train" with branches, which differ from one layer by their BatchNorm only.
        expand: branches that are added to convolutions for the training, and merged behind it
            (see `compress.reparam.expand`).
    """

    alpha: float = 0.5
    mode: Literal["train", "eval", "tune", "deploy"] | None = None
    expand: Expand = "none"

    name: ClassVar[str] = "fine_tune"
    stage: ClassVar[Literal["torch"]] = "torch"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check("mode", self.mode in (None, *MODES), f"one of {', '.join(MODES)}")
        self._check("expand", self.expand in EXPANSIONS, f"one of {', '.join(EXPANSIONS)}")
        whole = self.expand == "none" or self.mode != "deploy"
        self._check("expand", whole, "none, as deployed branches cannot be merged any more")

    def check(self, model: Model, target: Target) -> None:
        """Refuse a program that cannot be trained.

        Raises:
            UnsupportedError: it says why.
        """
        import torch

        super().check(model, target)
        program = model.program
        fixed = isinstance(program, torch.jit.ScriptModule) or "train" in vars(program)
        if model.stage == "torch" and fixed:  # torch.export puts a `train` that refuses there
            raise UnsupportedError(
                f"{model.name} is a captured graph ({type(program).__name__}), whose "
                f"BatchNorm and dropout are those of inference for good. Give the network itself "
                f"(--model MODULE:FACTORY and its weights), or use the pass `recover`."
            )

    def apply(self, model: Model, context: Context) -> Model:
        """The same modules with trained weights; details say what training gained.

        Raises:
            UsageError: there are no data or no labels, or the training diverged.
            DataError: the data do not fit.
            UnsupportedError: the program cannot be trained.
        """
        import torch

        from compress.teaching import training_data

        self.check(model, context.target)
        data = training_data(context, self.name)
        teacher = teacher_of(context)
        student = model.torch_module
        if not any(p.requires_grad for p in student.parameters()):  # nobody chose what to train
            student.requires_grad_()
        first = next(iter(data.batches(1)))
        if first.labels is None:
            raise UsageError(
                f"Pass {self.name}: {data.name} has no labels, and without them the network would "
                f"be taught what it says already. Give labelled data as --train, or leave it out."
            )
        example = tuple(torch.from_numpy(first.inputs[spec.name]) for spec in model.inputs)
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(context.seed)
            with self._prepared(student, example) as facts:
                best, found = self.taught(
                    teacher,
                    student,
                    teacher,
                    data,
                    ModuleCourse,
                    seed=context.seed,
                    progress=context.progress,
                )
                student.load_state_dict(best)
        held = found["held_out"]
        remark = (
            f"{self.name}: {held['measure']} on {held['samples']} samples held out "
            f"{held['before']:.4g} before and {held['after']:.4g} after {found['steps']} steps in "
            f"{facts['mode']} mode{facts.pop('with')}."
        )
        details = {**facts, **found, "remark": remark}
        return model.evolve(student, Step(self.name, dataclasses.asdict(self), details))

    @contextmanager
    def _prepared(
        self, student: nn.Module, example: tuple[Tensor, ...]
    ) -> Iterator[dict[str, Any]]:
        """In its mode and with its branches; plain modules in inference afterwards."""
        from compress.reparam.expansion import expand, merge_expanded
        from compress.reparam.modes import set_mode

        mode = self.mode or ("tune" if self.expand == "none" else "train")
        facts: dict[str, Any] = {"mode": mode, "with": ""}
        if self.expand != "none":
            grown = expand(student, self.expand, example)
            facts |= {"expanded": grown.expanded, "not_expanded": dict(grown.left)}
            facts["with"] = f", with {self.expand} branches on {len(grown.expanded)} convolutions"
        student.train()
        report = set_mode(student, mode, example)
        facts |= {"folded": len(report.pairs), "not_folded": dict(report.left)}
        yield facts
        if mode != "deploy":
            set_mode(student, "train")
        student.eval()
        if facts.get("expanded"):
            merge_expanded(student)


@dataclass
class ModuleCourse:
    """A torch module, and how it is taught.

    Attributes:
        module: in train mode, and in inference while it is scored.
        teaching: the teacher takes the same inputs in the same order.
        rate: largest learning rate.
    """

    module: nn.Module
    teaching: Teaching[State]
    rate: float
    _read: Mapping[str, Callable[[Sequence[Tensor]], Tensor]] = field(init=False)

    def __post_init__(self) -> None:
        self._read = {name: _reader(self.teaching, name) for name in self.teaching.wanted}

    def groups(self) -> list[dict[str, Any]]:
        """What is trained."""
        trained = [p for p in self.module.parameters() if p.requires_grad]
        if not trained:
            raise UnsupportedError("The network has no weights to train. Leave out the pass.")
        return [{"params": trained, "lr": self.rate}]

    def begin(self, progress: float) -> None:
        """Nothing changes in the course of the training."""

    def end(self) -> None:
        """Parameters may have any value."""

    def loss(self, batch: Batch) -> Tensor:
        """Distillation, and labels where they are."""
        inputs, expected = self.teaching.batch(batch)
        return self.teaching.loss(self._run(inputs), expected, batch.labels)

    def score(self) -> Score:
        """In inference, on the samples that are held out."""
        self.module.eval()
        try:
            return self.teaching.score(self._run)
        finally:
            self.module.train()

    def state(self) -> State:
        """Copies of parameters and buffers."""
        return {name: x.detach().clone() for name, x in self.module.state_dict().items()}

    def _run(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """What the teacher's tensors are compared with, by their names in the teacher."""
        import torch

        outputs = self.module(*(inputs[name] for name in self.teaching.teacher.inputs))
        leaves = torch.utils._pytree.tree_leaves(outputs)
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        return {name: read(tensors) for name, read in self._read.items()}


def _reader(teaching: Teaching[State], name: str) -> Callable[[Sequence[Tensor]], Tensor]:
    """Finds a tensor of the teacher among the module's outputs.

    What a softmax of the teacher reads is there up to a constant: the logarithm of its output.
    """
    teacher = teaching.teacher
    if name in teacher.outputs:
        at = teacher.outputs.index(name)
        return lambda outputs: outputs[at]
    made = {out: teacher.steps[teacher.producer[out]] for out in teacher.outputs}
    at, step = next((i, s) for i, s in enumerate(made.values()) if name in s.inputs)
    if step.op == "LogSoftmax":
        return lambda outputs: outputs[at]
    return lambda outputs: outputs[at].clamp_min(1e-12).log()


def fine_tune(
    model: Any,
    data: Any,
    *,
    inputs: Sequence[str | TensorSpec] = (),
    seed: int = 0,
    progress: Progress = silent,
    **options: Any,
) -> Model:
    """Fine-tune a torch network on labelled data; see `FineTune`.

    Args:
        model: a torch module, or what `compress.loading.load` makes one of; it stays as it is.
        data: labelled, as `compress.data.load_data` takes them.
        inputs: shapes such as "1x3x224x224" where the model does not say.
        seed: of everything random.
        progress: opens a tracker in updates.
        options: of `FineTune`.

    Returns:
        A model at the torch stage; its last step says what training gained.
    """
    import copy

    from compress.data import load_data
    from compress.loading import load, to_torch
    from compress.registry import create_target

    step = FineTune(**options)
    original = model if isinstance(model, Model) else load(model, inputs=tuple(inputs))
    own = to_torch(original)
    if own is original:
        own = dataclasses.replace(own, program=copy.deepcopy(own.torch_module))
    training = load_data(data, original.inputs)
    target = create_target("cpu")
    context = Context(
        target=target, original=original, training=training, seed=seed, progress=progress
    )
    return step.apply(own, context)
