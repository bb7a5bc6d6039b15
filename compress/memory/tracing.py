"""Bytes of tensors that are alive while torch runs, counted tensor by tensor.

It counts what torch's operators return, by storage, so that views cost nothing. What a kernel
takes and gives back inside of one operator is not seen.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from compress.graph_liveness import program_of
from compress.liveness import Program
from compress.memory.execution import Patched
from compress.memory.halo import Layer, Region, area, reach
from compress.memory.splitting import stage_steps


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts while it is entered; `peak` is the most bytes that were alive behind an operator.

    Attributes:
        peak: bytes.
    """

    def __init__(self, held: Sequence[torch.Tensor] = ()) -> None:
        """Begin with these tensors alive."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = 0
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}
        for tensor in held:
            self._add(tensor)

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run an operator and count what it made."""
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._add(leaf)
        self._alive = {
            key: one
            for key, one in self._alive.items()
            if not one[0].expired()  # type: ignore[no-untyped-call]
        }
        self.peak = max(self.peak, sum(size for _, size in self._alive.values()))
        return result

    def _add(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        self._alive[storage._cdata] = (
            StorageWeakRef(storage),  # type: ignore[no-untyped-call]
            storage.nbytes(),
        )


def measured_stage(network: Patched, image: torch.Tensor) -> int:
    """The most bytes of tensors alive while the stage runs patch by patch, constants left out."""
    mode = LiveBytes([image])
    with mode:
        network.stage_output(image)
    return mode.peak


def stage_program(network: Patched) -> Program:
    """What `measured_stage` should see: the schedule of the stage as torch executes it.

    Torch writes nothing in place, copies an operand to pad it, and a MaxPool also writes the
    positions of its largest numbers, 8 bytes each.
    """
    analysis, image = network.analysis, network.image
    whole = program_of(analysis.graph_model.graph, analysis.shapes, in_place=False)
    sizes = analysis.stages.sizes
    item = {
        name: whole.sizes[name] // math.prod(sizes[name]) for name in sizes if name in whole.sizes
    }

    def scratch(layer: Layer, needed: dict[str, Region]) -> int:
        region = needed[layer.writes[0]]
        wanted, found = reach(layer, region), 0
        for name in layer.reads:
            ends = zip(wanted, sizes[name], strict=True)
            if any(low < 0 or high > size for (low, high), size in ends):
                found += item[name] * area(wanted)
        if layer.op_type == "MaxPool":
            found += 2 * item[layer.writes[0]] * area(region)
        return found

    stage = network.stage
    steps, bytes_of = stage_steps(whole, analysis.stages, stage, network.tiles, scratch)
    return Program(tuple(steps), bytes_of, (image,), (stage.end,), frozenset([image]))
