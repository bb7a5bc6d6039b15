"""Low-rank factorisation as a pass: ranks by measured time and by what the network loses."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from compress.data import load_data
from compress.errors import UsageError
from compress.export import to_onnx
from compress.model import Model, Step
from compress.passes import Context
from compress.progress import Progress, silent
from compress.registry import create_target
from compress.reparam.lowrank_factors import Method, require
from compress.reparam.lowrank_search import Search
from compress.reparam.measuring import require_timing
from compress.target import Target, runtimes


@dataclass(frozen=True, kw_only=True)
class LowRank:
    """Factorise the layers that get faster by it on the target, as far as accuracy allows.

    For each layer and method a few ranks are timed on the target against the layer as it is. Of
    those that are faster, a multiple-choice knapsack, solved exactly, takes the fastest whose
    errors are within `max_error`, or those of the least error that reach `speedup`. The network is
    then timed as a whole, and it stays as it was if it is not faster.

    Errors are squared errors of the network's outputs on calibration data, relative to their
    power; without data those of the weights, summed over the layers. With data the 1 x 1 part of
    channel_svd spans the principal directions of the layer's outputs instead of its weight's.
    It changes what the network computes: `recover` behind it trains that back. Times are those of
    the float model; what quantization makes of the parts is judged later, like everything else.

    Attributes:
        methods: of "channel_svd", "spatial_svd", "tucker" and "cp"; the last two need tensorly.
        max_error: largest error.
        speedup: of the network over what it was; takes the place of `max_error`.
        seconds: to time and judge candidates, the largest layers first; what is left is not tried.
    """

    methods: tuple[Method, ...] = ("channel_svd", "spatial_svd")
    max_error: float = 0.05
    speedup: float | None = None
    seconds: float = 60.0

    name: ClassVar[str] = "low_rank"
    stage: ClassVar[Literal["onnx"]] = "onnx"

    def __post_init__(self) -> None:
        object.__setattr__(self, "methods", tuple(self.methods))
        self._check("methods", bool(self.methods), "at least one")
        self._check("max_error", self.max_error > 0, "above 0")
        self._check("speedup", self.speedup is None or 1 < self.speedup < 1000, "above 1")
        self._check("seconds", self.seconds > 0, "above 0")
        for method in self.methods:
            require(method)

    def _check(self, option: str, holds: bool, rule: str) -> None:
        if not holds:
            raise UsageError(f"{self.name}: {option} is {getattr(self, option)!r}, not {rule}.")

    def check(self, model: Model, target: Target) -> None:
        """Refuse a target on which nothing can be timed here.

        Raises:
            UnsupportedError: its engines run on another machine.
        """
        require_timing(self.name, target)

    def apply(self, model: Model, context: Context) -> Model:
        """The network with chains in place of some layers; details tell what was tried.

        Raises:
            EngineError: the target refuses the network.
            DataError: calibration data that do not fit.
        """
        self.check(model, context.target)
        with context.progress("Time low-rank factors", total=self.seconds) as advance:
            search = Search(
                self.methods, self.max_error, self.speedup, self.seconds, model, context
            )
            search.time_layers(advance)
            search.judge(advance)
        chosen, error = search.choose()
        made, details = search.confirmed(chosen, error)
        step = Step(self.name, dataclasses.asdict(self), details)
        return model.evolve(made.graph_model, step)


def low_rank(
    model: Any,
    target: Target | str = "cpu",
    *,
    data: Any = None,
    seed: int = 0,
    cache: Path | None = None,
    progress: Progress = silent,
    **options: Any,
) -> Model:
    """Factorise what gets faster by it on a target; see `LowRank`.

    Args:
        model: `Model` at either stage.
        target: one runtime, or its name; of a target with several the first.
        data: calibration data as `compress.data.load_data` takes them, or None.
        seed: of the order of measurements.
        cache: folder where times of layers are kept, or None.
        progress: opens a tracker in seconds.
        options: of `LowRank`.

    Returns:
        The model at the ONNX stage; `history[-1].details` says what was tried and found.
    """
    step = LowRank(**options)
    where = runtimes(create_target(target) if isinstance(target, str) else target)[0]
    exported = to_onnx(model, where.capabilities.opset, progress)
    exported = dataclasses.replace(exported, program=exported.graph_model.clone())
    found = load_data(data, exported.inputs) if data is not None else None
    context = Context(target=where, original=model, calibration=found, seed=seed, progress=progress)
    return step.apply(exported, context)
