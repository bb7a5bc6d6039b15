"""Pass: one transformation of a model, its own configuration and its own line in the report."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, runtime_checkable

from compress.model import Model
from compress.progress import Progress, silent

if TYPE_CHECKING:
    from compress.data import Data
    from compress.target import Target


@dataclass(frozen=True, kw_only=True)
class Context:
    """What a pass may use. Nothing is global.

    Attributes:
        target: where the result will run.
        original: the model as it was loaded: baseline and teacher.
        calibration: unlabelled data for ranges, or None.
        training: data to train with, labelled or not, or None.
        seed: of everything random.
        progress: opens a tracker for each long step.
        cache: folder for statistics that can be computed again, or None.
        memo: what a pass computed and can use when it is applied to the same original again,
            by the pass's name.
    """

    target: Target
    original: Model
    calibration: Data | None = None
    training: Data | None = None
    seed: int = 0
    progress: Progress = silent
    cache: Path | None = None
    memo: dict[str, Any] = field(default_factory=dict)


@runtime_checkable
class Pass(Protocol):
    """A frozen dataclass whose fields are its options."""

    name: ClassVar[str]
    stage: ClassVar[Literal["torch", "onnx"]]

    def check(self, model: Model, target: Target) -> None:
        """Refuse before any work.

        Raises:
            UnsupportedError: the target lacks what this pass needs.
        """

    def apply(self, model: Model, context: Context) -> Model:
        """The transformed model. The pass owns `model` and may change it in place.

        What its step's details call "remark" is a sentence for the head of the report.
        """


@runtime_checkable
class Placing(Pass, Protocol):
    """A pass that chooses a precision for each operator.

    Attributes:
        keep_float: names of operators that it leaves as they are.
    """

    keep_float: tuple[str, ...]


@runtime_checkable
class Compressing(Pass, Protocol):
    """A pass that lowers the precision of a model as a whole, not operator by operator.

    Attributes:
        makes: the precision of its result, as reports call it: "int8".
    """

    makes: ClassVar[str]


@runtime_checkable
class Refining(Pass, Protocol):
    """A pass behind a placing one that changes numbers, and never which kernels run.

    Candidates are timed without it; those that stay are refined before they are judged.

    Attributes:
        refines: true.
    """

    refines: ClassVar[bool]


@runtime_checkable
class Repairable(Placing, Protocol):
    """A placing pass that the repair ladder can turn."""

    def other_ranges(self) -> tuple[Pass, ...]:
        """The same pass with every other way to choose ranges."""

    def sensitivity(self, model: Model, context: Context) -> Mapping[str, float]:
        """How far the outputs move when one operator alone is quantized, by operator; additive."""


def is_left_out(step: Pass, target: Target) -> bool:
    """Whether a pass has nothing to do, as the runtime takes float models and quantizes itself."""
    own = target.capabilities.own_precisions is not None
    return own and isinstance(step, (Placing, Refining))


def options(step: Pass) -> dict[str, Any]:
    """The fields of a pass as plain values, for recipes and reports."""
    if not dataclasses.is_dataclass(step):
        raise TypeError(f"Pass {type(step).__name__} must be a frozen dataclass.")
    return {f.name: getattr(step, f.name) for f in dataclasses.fields(step)}
