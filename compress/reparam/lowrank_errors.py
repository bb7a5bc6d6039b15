"""What a network loses when layers get other weights, on calibration data or without any."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence

import numpy as np

from compress.columns import whole_inputs
from compress.data import Data
from compress.errors import DataError
from compress.model import Arrays, Model
from compress.recovery import squared_error
from compress.reference import reference_session, run
from compress.reparam.lowrank_graph import Layer, stored_weight
from compress.rewrites import replace_constant

SAMPLES = 64
FEWEST = 4
BATCH = 8
"""Samples that run at once; memory for the activations of more is not needed."""


class WeightErrors:
    """Without data: squared error of the weights, relative to their energy."""

    measured_by = "weights"

    def __init__(self, layers: Sequence[Layer]) -> None:
        self._layers = {layer.name: layer for layer in layers}

    def __call__(self, weights: Mapping[str, np.ndarray]) -> float:
        """Sum over the layers whose weight is given, each (T, S / groups, *kernel)."""
        return sum(squared_error(w, self._layers[name].weight) for name, w in weights.items())


class OutputErrors:
    """With data: squared error of the network's outputs, relative to their power.

    One session in which the weights of the layers are inputs, so that no other is built.
    """

    def __init__(self, model: Model, layers: Sequence[Layer], data: Data) -> None:
        graph_model = model.graph_model.clone()
        graph = graph_model.graph
        nodes = {node.name: node for node in graph}
        self._nodes = {layer.name: nodes[layer.name] for layer in layers}
        self._layers = {layer.name: layer for layer in layers}
        self._inputs: dict[str, str] = {}
        for layer in layers:
            node = nodes[layer.name]
            array = stored_weight(layer, node, layer.weight)
            replace_constant(graph, node, 1, array, f"{layer.name}.weight")
            value = node.inputs[1]
            if value is not None and value.name:
                self._inputs[layer.name] = value.name
                graph.inputs.append(value)  # with its numbers as the default
        self._session = reference_session(graph_model, optimize=True)
        size = BATCH if model.dynamic_batch else fitting_batch(model)
        found = data.take(SAMPLES).batches(size)
        full = (dict(b.inputs) for b in found if model.dynamic_batch or len(b) == size)
        self._batches: list[Arrays] = list(full)
        if not self._batches:
            raise DataError(
                f"{data.name} holds {len(data)} samples and the model takes batches of {size}. "
                f"Give at least {size} samples, or export the model with a dynamic batch."
            )
        self._model, self._size = model, size
        self._expected = [run(self._session, inputs) for inputs in self._batches]

    @property
    def measured_by(self) -> str:
        """For reports."""
        return f"outputs on {len(self._batches) * self._size} calibration samples"

    def limit(self, runs: int, seconds: float) -> None:
        """Use fewer samples, so that so many runs take about this time."""
        start = time.perf_counter()
        run(self._session, self._batches[0])
        batches = int(seconds / max(runs * (time.perf_counter() - start), 1e-9))
        self._batches = self._batches[: max(math.ceil(FEWEST / self._size), batches)]

    def __call__(self, weights: Mapping[str, np.ndarray]) -> float:
        """Mean over the float outputs, with these weights (T, S / groups, *kernel) by layer."""
        given = {
            self._inputs[name]: stored_weight(self._layers[name], self._nodes[name], weight)
            for name, weight in weights.items()
        }
        errors = []
        for inputs, expected in zip(self._batches, self._expected, strict=False):
            got = run(self._session, {**inputs, **given})
            errors += [
                squared_error(got[name], array)
                for name, array in expected.items()
                if np.issubdtype(array.dtype, np.floating)
            ]
        return float(np.mean(errors)) if errors else 0.0

    def bases(self, layers: Sequence[Layer]) -> dict[str, list[np.ndarray]]:
        """Principal directions of what each layer writes, the strongest first, for each group.

        They span the best approximation of the layer's output for the data (Zhang et al. 2015,
        arXiv 1505.06798, section 2.1, here without a mean): of W x, leaving the bias out.
        """
        graph_model = self._model.graph_model.clone()
        names = {}
        for node in graph_model.graph:
            if any(layer.name == node.name for layer in layers):
                out = node.outputs[0]
                names[node.name or ""] = out.name or ""
                if not out.is_graph_output():
                    graph_model.graph.outputs.append(out)
        session = reference_session(graph_model)
        sums: dict[str, np.ndarray] = {}
        for inputs in self._batches:
            found = run(session, inputs)
            for layer in layers:
                moment = _second_moments(layer, found[names[layer.name]])
                sums[layer.name] = sums.get(layer.name, 0.0) + moment
        return {
            name: [np.linalg.eigh(one)[1][:, ::-1] for one in moments]
            for name, moments in sums.items()
        }


def fitting_batch(model: Model) -> int:
    """The batch of a model with a fixed one; 1 where axis 0 is no batch."""
    if whole_inputs(model.inputs):
        return 1
    return next((int(spec.shape[0]) for spec in model.inputs if spec.shape), 1)


def _second_moments(layer: Layer, outputs: np.ndarray) -> np.ndarray:
    """Sum of y y^T over samples and positions, (groups, T / groups, T / groups)."""
    y: np.ndarray = np.moveaxis(outputs, 1 if layer.op_type == "Conv" else -1, 0).reshape(
        len(layer.weight), -1
    )
    y = y.astype(np.float64)
    if layer.bias is not None:
        y = y - layer.bias[:, None]
    y = y.reshape(layer.groups, -1, y.shape[1])
    return np.asarray(y @ y.transpose(0, 2, 1))
