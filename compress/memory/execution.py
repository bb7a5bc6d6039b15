"""Patch-based execution in torch: the proof that the analysis describes a real execution.

Border patches get the real padding, inner ones overlap, so that every number of the stage's output
is the sum of the same products as in the execution as a whole. `compress.memory.proof` compares.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from compress.errors import UsageError
from compress.memory.halo import Region, reach
from compress.memory.splitting import Analysis
from compress.torch_graph.network import Network

if TYPE_CHECKING:
    import onnx_ir as ir

_FILL = {"MaxPool": -math.inf}


class Patched:
    """A network whose first stage runs patch by patch.

    Attributes:
        network: the exported graph in torch.
        stage: that is split.
        split: parts along each spatial axis.
        tiles: region of every tensor, for each patch.
        image: name of the network's input.
        positions: of the stage's operators in the network.
    """

    def __init__(self, graph_model: ir.Model, split: int, end: str | None = None) -> None:
        """Choose the stage and compute the patches.

        Args:
            graph_model: with an input of known size.
            split: parts along each spatial axis, 2 or more.
            end: name of the operator that ends the stage; None takes the lowest peak in int8.

        Raises:
            UnsupportedError: the network has no stage that patches could run, and why.
            UsageError: no stage ends there, or its output has fewer positions than parts.
        """
        analysis = Analysis(graph_model)
        chosen = analysis.best(split) if end is None and split >= 2 else None
        name = chosen.tensor if chosen is not None else end
        stage = analysis.stage(name) if name is not None else None
        if stage is None or split < 2 or min(analysis.stages.sizes[stage.end]) < split:
            raise UsageError(
                f"A stage cannot be split into {split} parts along each axis: give 2 or more, and "
                f"no more than its output has rows and columns."
            )
        self.analysis, self.stage, self.split = analysis, stage, split
        self.tiles = analysis.tiles(stage, split)
        self.network = Network(graph_model)
        self.image = analysis.stages.image
        writers = self.network.producer
        self.positions = [writers[layer.writes[0]] for layer in stage.layers]

    def __call__(self, image: Tensor) -> tuple[Tensor, ...]:
        """The network's outputs, the stage patch by patch.

        Args:
            image: (N, C, ...) of the exported size.
        """
        values = {self.stage.end: self.stage_output(image), self.image: image}
        with torch.no_grad():
            done = set(self.positions)
            for index in range(len(self.network.steps)):
                if index not in done:
                    self.network.advance(index, values)
                self.network.release(values, index, self.network.outputs)
            return tuple(self.network.value(values, name) for name in self.network.outputs)

    def whole(self, image: Tensor) -> tuple[Tensor, ...]:
        """The same without patches."""
        with torch.no_grad():
            found = self.network.run({self.image: image})
        return tuple(found[name] for name in self.network.outputs)

    def stage_output(self, image: Tensor) -> Tensor:
        """What the stage writes, patch by patch."""
        self._require(image)
        shape = (len(image), self.stage.channels, *self._sizes(self.stage.end))
        gathered = torch.empty(shape, dtype=image.dtype)
        with torch.no_grad():
            for needed in self.tiles:
                gathered[_slices(needed[self.stage.end])] = self._tile(image, needed)
        return gathered

    def stage_whole(self, image: Tensor) -> Tensor:
        """The same at once."""
        self._require(image)
        values = {self.image: image}
        with torch.no_grad():
            for index in self.positions:
                self.network.advance(index, values)
                self.network.release(values, index, (self.stage.end,))
        return values[self.stage.end]

    def _require(self, image: Tensor) -> None:
        sizes = self._sizes(self.image)
        if tuple(image.shape[2:]) != sizes:
            raise UsageError(
                f"The network was exported for images of {'x'.join(map(str, sizes))}, and this one "
                f"has the shape {'x'.join(map(str, image.shape))}. Patches are cut for one size."
            )

    def _tile(self, image: Tensor, needed: Mapping[str, Region]) -> Tensor:
        values: dict[str, Tensor] = {self.image: image}
        whole = {self.image: tuple((0, size) for size in image.shape[2:])}
        layers = list(zip(self.positions, self.stage.layers, strict=True))
        last = {name: i for i, (_, layer) in enumerate(layers) for name in layer.reads}
        for position, (index, layer) in enumerate(layers):
            if layer.writes[0] not in needed:
                continue
            wanted = reach(layer, needed[layer.writes[0]])
            regions = {name: whole.get(name, needed[name]) for name in layer.reads}
            values |= self._layer(index, layer.op_type, values, regions, wanted)
            for name in layer.reads:
                if last[name] <= position:
                    values.pop(name, None)
        return values[self.stage.end]

    def _layer(
        self,
        index: int,
        op_type: str,
        values: Mapping[str, Tensor],
        regions: Mapping[str, Region],
        wanted: Region,
    ) -> dict[str, Tensor]:
        """Run one step on parts of its operands, padded with what is really outside of them."""
        step = self.network.steps[index]

        def read(position: int, name: str) -> Tensor:
            if name in self.network.constants or name not in regions:
                return self.network.constants[name]
            sizes = self._sizes(name)
            fill = _FILL.get(op_type, self._pad_value(index))
            return part(values[name], regions[name], wanted, sizes, fill)

        operands = [read(i, name) if name else None for i, name in enumerate(step.inputs)]
        if op_type == "Pad":
            return {step.outputs[0]: operands[0]} if operands[0] is not None else {}
        # What is outside of the tensor is there by now.
        attributes = {**step.attributes, "auto_pad": "VALID", "ceil_mode": 0}
        result = self.network.operators[op_type](attributes, *operands)
        outputs = result if isinstance(result, tuple) else (result,)
        return dict(zip(step.outputs, outputs, strict=False))

    def _pad_value(self, index: int) -> float:
        step = self.network.steps[index]
        if step.op != "Pad" or len(step.inputs) < 3 or not step.inputs[2]:
            return 0.0
        return float(self.network.constants[step.inputs[2]].item())

    def _sizes(self, name: str) -> tuple[int, ...]:
        return self.analysis.stages.sizes[name]


def part(
    tensor: Tensor, region: Region, wanted: Region, sizes: Sequence[int], fill: float
) -> Tensor:
    """What an operator reads of a tensor of which one region is there.

    Args:
        tensor: (N, C, ...) that region.
        region: of the whole tensor.
        wanted: of it, where it may reach over its ends.
        sizes: of the whole tensor.
        fill: what is outside of the whole tensor.
    """
    index: list[slice] = [slice(None), slice(None)]
    pads: list[int] = []
    for (start, _), (low, high), size in zip(region, wanted, sizes, strict=True):
        index.append(slice(max(low, 0) - start, min(high, size) - start))
        pads = [max(-low, 0), max(high - size, 0), *pads]
    found = tensor[tuple(index)]
    return F.pad(found, pads, value=fill) if any(pads) else found


def _slices(region: Region) -> tuple[slice, ...]:
    return (slice(None), slice(None), *(slice(start, stop) for start, stop in region))


def patched(
    model: Any,
    split: int,
    stage: str | None = None,
    *,
    inputs: Sequence[Any] = (),
) -> Patched:
    """A model whose first stage runs patch by patch, in torch.

    Call it with an image; `whole` runs the same without patches. `compress.memory.prove` compares
    them.

    Args:
        model: a torch module, a path, or anything else that `compress.run` takes.
        split: parts along each spatial axis: 2 means 2 x 2 patches of an image.
        stage: name of the operator that ends the stage; None takes the lowest peak in int8.
        inputs: the shape of the image, such as "1x3x224x224", where the model does not say.

    Raises:
        UnsupportedError: the network has no first stage that patches could run, and why.
        UsageError: no stage ends there, or its output has fewer positions than parts.
    """
    from compress.export import to_onnx
    from compress.loading import load

    return Patched(to_onnx(load(model, inputs=tuple(inputs)), 21).graph_model, split, stage)
