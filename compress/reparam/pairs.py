"""Layers whose BatchNorm can be folded into them, and the reasons why others cannot."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize

from compress.errors import UsageError
from compress.reparam.flow import Flow, flags, record, trace
from compress.reparam.layers import plain_class

LAYERS: tuple[type[nn.Module], ...] = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
    nn.Linear,
)
NORMS: tuple[type[nn.Module], ...] = (
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.BatchNorm3d,
    nn.SyncBatchNorm,
)
_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
)
_WHY_AN_EXAMPLE = (
    "Which BatchNorm follows which layer shows only where tensors go: names and the order of "
    "definition do not tell."
)


@dataclass(frozen=True)
class Pair:
    """A layer and the BatchNorm that alone reads its output.

    Attributes:
        layer: name of the convolution or linear layer.
        norm: name of the BatchNorm.
    """

    layer: str
    norm: str


@dataclass(frozen=True)
class Found:
    """The pairs of a model.

    Attributes:
        pairs: in the order of the model's modules.
        left: reasons by the name of each other BatchNorm.
        calls: how often each layer was called in one run at most, by name.
        outputs: what the model returned in eval mode; None where nothing was run.
    """

    pairs: tuple[Pair, ...]
    left: Mapping[str, str]
    calls: Mapping[str, int]
    outputs: Any = None


def find_pairs(model: nn.Module, example_inputs: Any) -> Found:
    """Look for layers with a BatchNorm behind them.

    Both paths of the model are looked at, that of `train()` and that of `eval()`; where it can
    only run in one of them, that one.

    Args:
        model: its BatchNorm must be frozen already.
        example_inputs: a tensor, a tuple of arguments or a dict of keyword arguments; None
            traces with torch.fx.

    Raises:
        UsageError: the model cannot be traced, or cannot run with the example.
    """
    watched = (
        {m for m in model.modules() if isinstance(m, LAYERS)},
        {m for m in model.modules() if isinstance(m, _BatchNorm)},
    )
    flows: list[Flow] = []
    outputs, error = None, None
    for training in (True, False):
        with flags(model, training):
            try:
                if example_inputs is None:
                    flows.append(trace(model, *watched))
                else:
                    flow, outputs = record(model, *watched, example_inputs)
                    flows.append(flow)
            except Exception as caught:  # whatever the model's own code raises
                outputs, error = None, caught
    if not flows:
        what = "be traced by torch.fx" if example_inputs is None else "run with the example"
        hint = (
            "Give example_inputs, a tensor or a tuple that the model can be called with."
            if example_inputs is None
            else "Give inputs that the model can be called with."
        )
        first = (str(error).splitlines() or [""])[0][:300]
        raise UsageError(
            f"{type(model).__name__} cannot {what} ({type(error).__name__}: {first}). "
            f"{_WHY_AN_EXAMPLE} {hint}"
        ) from error
    return _judge(model, flows, outputs)


def _judge(model: nn.Module, flows: Sequence[Flow], outputs: Any) -> Found:
    names: dict[nn.Module, str] = {module: name for name, module in model.named_modules()}
    owners = parameter_owners(model)
    pairs: list[Pair] = []
    left: dict[str, str] = {}
    for norm, name in names.items():
        if not isinstance(norm, _BatchNorm):
            continue
        reason = norm_obstacle(norm, owners) or _norm_use(norm, flows)
        if not reason:
            sources = {flow.source[norm] for flow in flows if norm in flow.calls}
            layer = sources.pop()
            if sources or not isinstance(layer, nn.Module):
                reason = f"follows {_name(sources.pop() if sources else layer, names)}"
            else:
                reason = layer_obstacle(layer, owners) or _layer_use(layer, norm, flows, names)
                reason = reason and f"its layer {names[layer]} {reason}"
        if reason:
            left[name] = reason
        else:
            pairs.append(Pair(names[layer], name))  # type: ignore[index]
    called = {module for flow in flows for module in flow.calls}
    calls = {names[m]: max(flow.calls[m] for flow in flows) for m in called}
    return Found(tuple(pairs), left, calls, outputs)


def norm_obstacle(norm: _BatchNorm, owners: Mapping[int, int]) -> str:
    """Why a BatchNorm cannot be folded, whatever is before it; "" where it can."""
    if norm.running_mean is None or norm.running_var is None:
        return "has no running statistics"
    if norm.weight is None or norm.bias is None:
        return "has no gamma and beta"
    return _special(norm, NORMS, owners)


def layer_obstacle(layer: nn.Module, owners: Mapping[int, int]) -> str:
    """Why nothing can be folded into a layer; "" where it can."""
    weight = layer._parameters.get("weight")
    if weight is not None and not weight.is_floating_point():
        return f"has weights of {weight.dtype}"
    return _special(layer, LAYERS, owners)


def _special(module: nn.Module, usual: Sequence[type], owners: Mapping[int, int]) -> str:
    if parametrize.is_parametrized(module):
        return "has parametrizations"
    if plain_class(module) not in usual or "forward" in module.__dict__:
        return f"is a {type(module).__name__} with a forward of its own"
    if any(getattr(module, hooks, None) for hooks in _HOOKS):
        return "has hooks"
    if any(owners[_key(p)] > 1 for p in module._parameters.values() if p is not None):
        return "shares its parameters with another module"
    return ""


def _norm_use(norm: nn.Module, flows: Sequence[Flow]) -> str:
    calls = max(flow.calls[norm] for flow in flows)
    if calls == 0:
        return "was not reached"
    return f"is called {calls} times" if calls > 1 else ""


def _layer_use(
    layer: nn.Module, norm: nn.Module, flows: Sequence[Flow], names: Mapping[nn.Module, str]
) -> str:
    for flow in flows:
        if flow.calls[layer] > 1:
            return f"is called {flow.calls[layer]} times"
        others = flow.users.get(layer, {norm}) - {norm}
        if others:
            return "is also read by " + ", ".join(sorted(_name(one, names) for one in others))
        if flow.calls[layer] and norm not in flow.users.get(layer, ()):
            return "is not always followed by it"
    if _channels(layer) != getattr(norm, "num_features", None):
        return "has its channels on another axis"
    weight = layer._parameters["weight"]
    axes = weight.ndim if weight is not None else 0
    if any(flow.axes.get(layer, axes) != axes for flow in flows):
        return "has its channels on another axis"
    return ""


def _channels(layer: nn.Module) -> int | None:
    count = getattr(layer, "out_channels", getattr(layer, "out_features", None))
    return count if isinstance(count, int) else None


def parameter_owners(model: nn.Module) -> Counter[int]:
    """How many modules hold each parameter."""
    return Counter(
        _key(parameter)
        for module in model.modules()
        for parameter in module._parameters.values()
        if parameter is not None
    )


def _key(parameter: torch.Tensor) -> int:
    """One number for all parameters that share memory."""
    return parameter.data_ptr() or id(parameter)


def _name(origin: nn.Module | str, names: Mapping[nn.Module, str]) -> str:
    return names[origin] if isinstance(origin, nn.Module) else origin
