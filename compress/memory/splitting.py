"""Patch-based inference: what splitting the first stage into patches saves, and what it costs.

This is analysis after MCUNetV2 (Lin et al. 2021): the stage runs patch by patch, so that only one
patch of its large tensors is in memory, and the rest of the network runs whole. The image and the
stage's output are in memory all the time. No runtime of this toolkit executes it;
`compress.memory.patched` does in torch, as a proof.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from compress.errors import UnsupportedError, UsageError
from compress.graph import graph_sites, infer_shapes
from compress.graph_liveness import Reading, program_of
from compress.liveness import Peak, Program, Step, peak
from compress.memory.halo import Layer, Region, area, grid, regions
from compress.memory.stage import Stage, Stages, first_stages

if TYPE_CHECKING:
    import onnx_ir as ir

SPLITS = (2, 3, 4)
MOST = 8
"""Largest number of parts of an axis that is tried for a limit."""


@dataclass(frozen=True)
class Patches:
    """One split of the first stage.

    Attributes:
        split: parts along each spatial axis: 3 means 3 x 3 patches of an image.
        end: name of the operator that ends the stage.
        tensor: that it writes, the one that goes on.
        float32: peak of the whole network in float32.
        int8: the same with every tensor in one byte a number.
        macs: multiply-accumulates of the whole network, those done twice included.
        overhead: additional share of the network's multiply-accumulates, 0.1 for 10 %.
        stage_overhead: additional share of the stage's own.
    """

    split: int
    end: str
    tensor: str
    float32: Peak
    int8: Peak
    macs: int
    overhead: float
    stage_overhead: float

    def reading(self, reading: Reading) -> Peak:
        """The peak in one of the two readings."""
        return self.int8 if reading == "int8" else self.float32

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class PatchTable:
    """Splits of a network beside its execution as a whole.

    Attributes:
        float32: peak without patches.
        int8: the same with every tensor in one byte a number.
        macs: multiply-accumulates without patches.
        rows: for each split the stage end with the lowest peak in int8.
        limit: why the stage cannot be longer.
    """

    float32: Peak
    int8: Peak
    macs: int
    rows: tuple[Patches, ...]
    limit: str

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return dataclasses.asdict(self)


class Analysis:
    """The first stages of a graph, and its schedules whole and in patches."""

    def __init__(self, graph_model: ir.Model) -> None:
        """Find the stages.

        Raises:
            UnsupportedError: the network has no stage that patches could run.
        """
        self.stages: Stages = first_stages(graph_model)
        self.graph_model, self.shapes = graph_model, infer_shapes(graph_model)
        self.whole: dict[Reading, Program] = {
            reading: program_of(graph_model.graph, self.shapes, reading)
            for reading in ("as written", "int8")
        }
        self.macs = sum(site.macs for site in graph_sites(graph_model))

    def stage(self, end: str) -> Stage:
        """The stage that ends with the operator, or the tensor, of that name.

        Raises:
            UsageError: there is none.
        """
        for stage in self.stages.stages:
            if end in (stage.site, stage.end):
                return stage
        names = ", ".join(stage.site for stage in self.stages.stages)
        raise UsageError(
            f"No first stage ends with {end!r}. Those that do, from short to long: {names}."
        )

    def patches(self, stage: Stage, split: int) -> Patches | None:
        """Peak and cost of one split; None where the stage's output has too few positions."""
        if split < 2 or min(self.stages.sizes[stage.end]) < split:
            return None
        tiles, own = self.tiles(stage, split), sum(layer.macs for layer in stage.layers)
        macs = self._macs(stage, tiles)
        return Patches(
            split=split,
            end=stage.site,
            tensor=stage.end,
            float32=self._peak("as written", stage, tiles),
            int8=self._peak("int8", stage, tiles),
            macs=self.macs - own + macs,
            overhead=(macs - own) / self.macs if self.macs else 0.0,
            stage_overhead=(macs - own) / own if own else 0.0,
        )

    def best(self, split: int, reading: Reading = "int8") -> Patches | None:
        """The split with the stage end of the lowest peak; of equals the one that costs least."""
        return self._least(split, reading, lambda found, macs: (found, macs))

    def cheapest(self, split: int, limit_bytes: int, reading: Reading) -> Patches | None:
        """The split within a limit that costs least, or None."""
        found = self._least(split, reading, lambda found, macs: (found > limit_bytes, macs))
        if found is None or found.reading(reading).bytes > limit_bytes:
            return None
        return found

    def _least(
        self, split: int, reading: Reading, rank: Callable[[int, int], tuple[int, int]]
    ) -> Patches | None:
        ranked = []
        for index, stage in enumerate(self.stages.stages):
            if min(self.stages.sizes[stage.end]) >= split:
                tiles = self.tiles(stage, split)
                again = self._macs(stage, tiles) - sum(layer.macs for layer in stage.layers)
                ranked.append((rank(self._peak(reading, stage, tiles).bytes, again), index))
        return self.patches(self.stages.stages[min(ranked)[1]], split) if ranked else None

    def _peak(self, reading: Reading, stage: Stage, tiles: Sequence[dict[str, Region]]) -> Peak:
        # Patches of one shape need the same, except that the image may be freed in the last.
        shapes = {
            str(sorted((n, area(r)) for n, r in one.items())): one for one in tiles[:-1][::-1]
        }
        few = [*shapes.values(), tiles[-1]]
        return peak(patched_program(self.whole[reading], self.stages, stage, few))

    def _macs(self, stage: Stage, tiles: Sequence[dict[str, Region]]) -> int:
        """Multiply-accumulates of a stage in patches."""
        return sum(
            layer.macs * area(needed[layer.writes[0]]) // self._area(layer.writes[0])
            for needed in tiles
            for layer in stage.layers
            if layer.macs and layer.writes[0] in needed
        )

    def tiles(self, stage: Stage, split: int) -> list[dict[str, Region]]:
        """For each patch, the region of every tensor that it needs."""
        sizes = self.stages.sizes
        cells = grid(sizes[stage.end], split)
        return [regions(stage.layers, sizes, stage.end, cell) for cell in cells]

    def _area(self, name: str) -> int:
        return area(tuple((0, size) for size in self.stages.sizes[name]))


def patched_program(
    program: Program, stages: Stages, stage: Stage, tiles: Sequence[dict[str, Region]]
) -> Program:
    """The schedule with a stage once for each patch, its output gathered in one tensor.

    Args:
        program: of the whole network, with one step for each node.
        stages: of the network.
        stage: that is split.
        tiles: region of every tensor, for each patch.
    """
    steps, sizes = stage_steps(program, stages, stage, tiles)
    done = set(stage.steps)
    steps += [step for index, step in enumerate(program.steps) if index not in done]
    return dataclasses.replace(program, steps=tuple(steps), sizes=sizes)


def stage_steps(
    program: Program,
    stages: Stages,
    stage: Stage,
    tiles: Sequence[dict[str, Region]],
    scratch: Callable[[Layer, dict[str, Region]], int] = lambda layer, needed: 0,
) -> tuple[list[Step], dict[str, int]]:
    """The steps of a stage in patches, and the sizes of all tensors.

    Args:
        program: of the whole network, with one step for each node.
        stages: of the network.
        stage: that is split.
        tiles: region of every tensor, for each patch.
        scratch: bytes that a layer needs beside its tensors, given the regions of a patch.
    """
    sizes = dict(program.sizes)
    inside = {name for layer in stage.layers for name in layer.writes}
    full = {name: area(tuple((0, n) for n in stages.sizes[name])) for name in inside}
    steps = [Step("stage output", "Gather", (), (stage.end,))]
    for number, needed in enumerate(tiles):
        local = {name: f"{name}@{number}" for name in inside}
        for name in inside & needed.keys() & sizes.keys():
            sizes[local[name]] = program.sizes[name] * area(needed[name]) // full[name]
        for index, layer in zip(stage.steps, stage.layers, strict=True):
            if layer.writes[0] in needed:
                step = _renamed(program.steps[index], local)
                steps.append(dataclasses.replace(step, scratch=scratch(layer, needed)))
        steps.append(Step("stage output", "Copy", (local[stage.end],)))
    return steps, sizes


def _renamed(step: Step, names: dict[str, str]) -> Step:
    def new(old: Sequence[str]) -> tuple[str, ...]:
        return tuple(names.get(name, name) for name in old)

    return dataclasses.replace(
        step,
        reads=new(step.reads),
        writes=new(step.writes),
        overwrites=tuple(n for n in new(step.overwrites) if n in names.values()),
        views={names.get(a, a): names.get(b, b) for a, b in step.views.items()},
    )


def table_of(graph_model: ir.Model, splits: Sequence[int] = SPLITS) -> PatchTable:
    """For each split the stage end with the lowest peak; of equals the one that costs least.

    Raises:
        UnsupportedError: the network has no stage that patches could run.
    """
    analysis = Analysis(graph_model)
    found = (analysis.best(split) for split in splits)
    return PatchTable(
        peak(analysis.whole["as written"]),
        peak(analysis.whole["int8"]),
        analysis.macs,
        tuple(one for one in found if one is not None),
        analysis.stages.limit,
    )


def smallest_fit(
    graph_model: ir.Model, limit_bytes: int, reading: Reading = "int8"
) -> Patches | None:
    """The split with the fewest patches that stays within a limit, and of those the cheapest.

    None where none does, or the network has no stage that patches could run.
    """
    try:
        analysis = Analysis(graph_model)
    except UnsupportedError:
        return None
    found = (analysis.cheapest(split, limit_bytes, reading) for split in range(2, MOST + 1))
    return next((one for one in found if one is not None), None)


def patches(
    model: Any,
    *,
    splits: Sequence[int] = SPLITS,
    factory: str | None = None,
    inputs: Sequence[Any] = (),
    trust_pickle: bool = False,
) -> PatchTable:
    """What patch-based execution of the first stage would need and cost (analysis, not execution).

    Args:
        model: anything that `compress.run` takes.
        splits: parts along each spatial axis to look at.
        factory: `module:function` that makes the network.
        inputs: shapes such as "1x3x224x224" where the model does not say.
        trust_pickle: unpickle `model` even if that executes code.

    Raises:
        UnsupportedError: the network has no stage that patches could run, and why.
        LoadError: the model cannot be read.
    """
    from compress.export import to_onnx
    from compress.loading import load

    loaded = load(model, factory=factory, inputs=tuple(inputs), trust_pickle=trust_pickle)
    return table_of(to_onnx(loaded, 21).graph_model, splits)
