"""A plan simulated in torch: every tensor is rounded where the emitted model rounds it.

The simulation sees what the runtime sees (Q/DQ at the same places, int32 biases, absorbed
activations), so that what is corrected, reconstructed or trained in it holds in the artifact.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from compress.torch_graph.network import Network, Step
from quant.fake import fake_quantize
from quant.plan import QuantPlan
from quant.quantizer import qparams_from_range
from quant.refine import Quantized
from quant.spec import IntegerFormat, QParams, QuantSpec

_ROUNDED = "\0rounded"
_RUN_TIME = QuantSpec("uint8", symmetric=False)


class Simulation:
    """A network under a plan.

    Attributes:
        network: of the float graph that the plan was made for.
        plan: says what is rounded and how; its scales are those of `scales`.
        values: constants that replace the network's own, float; a trainer may put tensors here
            that need gradients.
        rounded: constants that are used as they are: learned roundings, by name.
        scales: of each tensor in the plan, as torch tensors; a trainer may replace them. Tensors
            that share parameters in the plan share the tensor here.
        float_biases: biases are not rounded, as in a model with emulated formats.
    """

    def __init__(self, network: Network, plan: QuantPlan, float_biases: bool = False) -> None:
        self.network, self.plan = network, plan
        self.float_biases = float_biases or plan.float_biases
        self.values: dict[str, Tensor] = {}
        self.rounded: dict[str, Tensor] = {}
        self.scales: dict[str, Tensor] = {}
        self._zero_points: dict[str, Tensor] = {}
        shared: dict[int, tuple[Tensor, Tensor]] = {}
        for name, params in (*plan.activations.items(), *plan.constants.items()):
            if id(params) not in shared:
                shared[id(params)] = (
                    torch.tensor(params.scale),
                    torch.tensor(params.zero_point).float(),
                )
            self.scales[name], self._zero_points[name] = shared[id(params)]
        self._cache: dict[str, Tensor] = {}

    @classmethod
    def of(cls, state: Quantized) -> Simulation:
        """The simulation of what a quantized model was emitted from."""
        return cls(Network(state.graph_model), state.plan, state.emulated)

    def run(self, inputs: Mapping[str, Tensor], keep: Collection[str] = ()) -> dict[str, Tensor]:
        """The outputs; and the tensors named in `keep`, as their readers in int8 see them."""
        values = self.start(inputs)
        wanted = {*self.network.outputs, *keep}
        for index in range(len(self.network.steps)):
            self.execute(index, values)
            self.release(values, index, wanted)
        outputs = {name: self.network.value(values, name) for name in self.network.outputs}
        return {name: self.seen(values, name) for name in keep} | outputs

    def start(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The values that a run begins with."""
        values: dict[str, Tensor] = {}
        for name, tensor in inputs.items():
            self._write(values, None, name, tensor)
        return values

    def execute(self, index: int, values: dict[str, Tensor]) -> None:
        """Run one step on these values, and add its outputs to them."""
        step = self.network.steps[index]
        for name, tensor in self._compute(index, values).items():
            self._write(values, step, name, tensor)

    def output(self, index: int, values: Mapping[str, Tensor]) -> Tensor:
        """The first output of one step on these values, before it is rounded."""
        return self._compute(index, values)[self.network.steps[index].outputs[0]]

    def _compute(self, index: int, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        step = self.network.steps[index]
        return self.network.execute(
            index, lambda position, name: self._read(values, step, position, name)
        )

    def release(self, values: dict[str, Tensor], index: int, keep: Collection[str] = ()) -> None:
        """Forget tensors that no step after this one reads."""
        self.network.release(values, index, keep)
        for name in self.network.steps[index].inputs:
            if name not in values:
                values.pop(name + _ROUNDED, None)

    def seen(self, values: Mapping[str, Tensor], name: str) -> Tensor:
        """A tensor as operators in int8 read it."""
        return values[name + _ROUNDED] if name + _ROUNDED in values else values[name]

    def constant(self, name: str) -> Tensor:
        """A constant before rounding."""
        return self.values[name] if name in self.values else self.network.constants[name]

    def replace(self, name: str, tensor: Tensor) -> None:
        """Give a constant another value; what was rounded of the old one is forgotten."""
        self.values[name] = tensor
        self._cache.pop(name, None)

    def weight(self, name: str) -> Tensor:
        """A constant of the plan after rounding; kept while nothing needs gradients."""
        if name in self.rounded:
            return self.rounded[name]
        if name in self._cache:
            return self._cache[name]
        tensor = self.round(name, self.constant(name), self.plan.constants[name])
        if not tensor.requires_grad:
            self._cache[name] = tensor
        return tensor

    def round(self, name: str, tensor: Tensor, params: QParams) -> Tensor:
        """What is left of a tensor after quantization with its present scale."""
        zero_point = self._zero_points[name]
        return fake_quantize(tensor, self.scales[name], zero_point, params.spec, params.axis)

    def _read(self, values: Mapping[str, Tensor], step: Step, position: int, name: str) -> Tensor:
        if name in self.network.constants:
            return self._read_constant(step, position, name)
        if step.name in self.plan.dynamic and position == 0:
            return _round_at_run_time(values[name])
        if step.name in self.plan.roles:
            return self.seen(values, name)
        return values[name]

    def _read_constant(self, step: Step, position: int, name: str) -> Tensor:
        role = self.plan.roles.get(step.name)
        if role is None:
            return self.constant(name)
        if name in self.plan.constants:
            return self.weight(name)
        if role == "matmul" and position == 2:
            return self._bias(step, name)
        return self.constant(name)

    def _bias(self, step: Step, name: str) -> Tensor:
        """A bias as int32 of scale s_x s_w, with a straight-through gradient."""
        bias = self.constant(name)
        source, weight = step.inputs[0], step.inputs[1]
        if source not in self.plan.activations or weight not in self.plan.constants:
            return bias
        if self.float_biases or not isinstance(
            self.plan.activations[source].spec.format, IntegerFormat
        ):
            return bias
        scale = (self.scales[source] * self.scales[weight]).detach()
        return bias + (torch.round(bias / scale) * scale - bias).detach()

    def _write(
        self, values: dict[str, Tensor], step: Step | None, name: str, tensor: Tensor
    ) -> None:
        params = self.plan.activations.get(name)
        values[name] = tensor
        if params is None:
            return
        if step is not None and step.name in self.plan.roles:
            values[name] = self.round(name, tensor, params)
        elif any(self.network.steps[i].name in self.plan.roles for i in self._readers(name)):
            values[name + _ROUNDED] = self.round(name, tensor, params)

    def _readers(self, name: str) -> list[int]:
        return self.network.readers.get(name, [])


def _round_at_run_time(x: Tensor) -> Tensor:
    params = qparams_from_range(float(x.min()), float(x.max()), _RUN_TIME)
    scale, zero_point = torch.tensor(params.scale), torch.tensor(params.zero_point).float()
    return fake_quantize(x, scale, zero_point, _RUN_TIME)
