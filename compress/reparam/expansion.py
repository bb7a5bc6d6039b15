"""Branches for training around the convolutions of a plain network, and the way back.

| kind | branches beside each convolution | source |
|---|---|---|
| repvgg | 1x1; identity | Ding et al. 2021, arXiv 2101.03697 |
| acb | 1xk and kx1 | Ding et al. 2019, arXiv 1908.03930 |
| dbb | 1x1; 1x1 then kxk; 1x1 then average | Ding et al. 2021, arXiv 2103.13425 |
| mobileone | `count` times kxk; 1x1; identity | Vasu et al. 2023, arXiv 2206.04040 |

Each branch ends with a BatchNorm. In the papers so does the convolution itself, and the sum has
none; here the network's own BatchNorm stays behind the sum, as in QARepVGG (Chu et al. 2024,
arXiv 2212.01593). So nothing has to be divided by its gamma on the way back.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from compress.errors import UsageError
from compress.reparam.expanded import (
    Branch,
    ConvBranch,
    ExpandedConv,
    IdentityBranch,
    PointThenAverage,
    PointThenConv,
    Window,
)
from compress.reparam.layers import Merged, Swapped, freeze_all, remember, replace_module, restore
from compress.reparam.pairs import Found, find_pairs, layer_obstacle, parameter_owners

Kind: TypeAlias = Literal["repvgg", "acb", "dbb", "mobileone"]


@dataclass(frozen=True)
class Expansion:
    """What `expand` did.

    Attributes:
        kind: of the branches.
        expanded: names of the convolutions that have branches now.
        left: the reason, by the name of each other convolution.
    """

    kind: Kind
    expanded: tuple[str, ...]
    left: Mapping[str, str]


def expand(
    model: nn.Module, kind: Kind, example_inputs: Any = None, *, count: int = 4
) -> Expansion:
    """Add parallel linear branches to the convolutions of a plain network, in place.

    The last gamma of each branch is zero, so the network computes exactly what it did before,
    in training and in inference. Train it like any other; `merge_expanded` makes the plain
    network of it again. Other weights of branches are drawn from torch's global generator. Make
    optimizers afterwards: there are more parameters.

    Left alone and named are transposed convolutions, 1x1 ones (but for mobileone), and what
    `set_mode` leaves alone: hooks, parametrizations, shared parameters. A convolution needs a
    bias, or a BatchNorm that alone reads its output, for the shift of the branches. acb is for
    two spatial axes; a dilated convolution gets no average in dbb, and only one with stride 1
    and as many outputs as inputs gets an identity.

    Args:
        model: any torch module.
        kind: of the branches.
        example_inputs: a tensor, a tuple of arguments or a dict of keyword arguments that the
            model can be called with; needed where torch.fx cannot trace it (see `set_mode`).
        count: of the kxk branches that mobileone adds; its S0 has 4.

    Raises:
        UsageError: the kind is unknown, the model is in another mode than train or expanded
            already, or it can be neither traced nor run.
    """
    if kind not in get_args(Kind):
        raise UsageError(f"Kind {kind!r} is unknown; there are {', '.join(get_args(Kind))}.")
    if count < 1:
        raise UsageError(f"count is {count}; mobileone adds 1 branch kxk or more.")
    for name, module in model.named_modules():
        if isinstance(module, ExpandedConv):
            raise UsageError(f"{name} is expanded already. Call merge_expanded(model) before.")
        if isinstance(module, Swapped):
            raise UsageError(
                f"{name} is in eval or tune mode, and new branches would not be. Call "
                f'set_mode(model, "train") before expand; modes can be set again afterwards.'
            )
    before = remember(model)
    try:
        freeze_all(model)
        found = find_pairs(model, example_inputs)
    finally:
        restore(before)
    norms = {pair.layer: model.get_submodule(pair.norm) for pair in found.pairs}
    owners = parameter_owners(model)
    expanded, left = [], {}
    for name, conv in list(model.named_modules()):
        if not isinstance(conv, _ConvNd):
            continue
        window, branches = _window(conv), list[Branch]()
        reason = layer_obstacle(conv, owners) or _obstacle(name, conv, norms, found)
        if not reason:
            branches = _branches(kind, window, conv.weight, count)
            reason = "" if branches else f"has no use for {kind}: its window is {_size(window)}"
        if reason:
            left[name] = reason
            continue
        norm = norms.get(name)
        made = ExpandedConv(conv, branches, norm if isinstance(norm, _BatchNorm) else None)
        replace_module(model, conv, made.train(conv.training))
        expanded.append(name)
    return Expansion(kind, tuple(expanded), left)


@torch.no_grad()
def merge_expanded(model: nn.Module) -> tuple[str, ...]:
    """Merge the branches that `expand` added, in place; the names of the convolutions.

    The model has the modules, and the state_dict the keys, that it had before. It computes the
    same with running statistics, that is after `model.eval()`; sums are taken in float64. With
    statistics of the batch a branch is no linear map, so that in training it differs.

    Raises:
        UsageError: nothing is expanded, or branches are in tune mode or deployed.
    """
    found = {n: m for n, m in model.named_modules() if isinstance(m, ExpandedConv)}
    if not found:
        raise UsageError("Nothing in the model is expanded: call compress.reparam.expand before.")
    if isinstance(model, ExpandedConv):
        raise UsageError("Give merge_expanded the whole network that was given to expand.")
    for name, module in found.items():
        if any(isinstance(inner, Merged) for inner in module.modules()):
            raise UsageError(
                f"The branches of {name} were deployed, and cannot be merged any more. Call "
                f"merge_expanded before deploying."
            )
    for module in found.values():
        replace_module(model, module, module.merge())
    return tuple(found)


def _obstacle(name: str, conv: _ConvNd, norms: Mapping[str, nn.Module], found: Found) -> str:
    if not name:
        return "is the whole model"
    if conv.transposed:
        return "is transposed"
    calls = found.calls.get(name, 0)
    if calls != 1:
        return f"is called {calls} times" if calls else "was not reached"
    if conv.bias is None and name not in norms:
        return "has neither a bias nor a BatchNorm of its own for the shift of branches"
    return ""


def _window(conv: _ConvNd) -> Window:
    return Window(
        conv.in_channels,
        conv.out_channels,
        conv.groups,
        conv.kernel_size,
        conv.stride,
        conv.dilation,
    )


def _branches(kind: Kind, window: Window, like: torch.Tensor, count: int) -> list[Branch]:
    """New branches for one convolution; none where the kind has none for it."""
    ones = (1,) * window.rank
    if kind == "acb":
        if window.rank != 2 or min(window.size) == 1:
            return []
        (high, wide), (row, column) = window.size, window.center
        return [
            ConvBranch(window, (1, wide), (row, 0), like),
            ConvBranch(window, (high, 1), (0, column), like),
        ]
    if kind != "mobileone" and max(window.size) == 1:
        return []
    branches: list[Branch] = []
    if kind == "mobileone":
        zeros = (0,) * window.rank
        branches += [ConvBranch(window, window.size, zeros, like) for _ in range(count)]
    if max(window.size) > 1:
        branches.append(ConvBranch(window, ones, window.center, like))
    if kind == "dbb":
        branches.append(PointThenConv(window, like))
        if max(window.dilation) == 1:
            branches.append(PointThenAverage(window, like))
    elif window.inputs == window.outputs and max(window.stride) == 1:
        branches.append(IdentityBranch(window, like))
    return branches


def _size(window: Window) -> str:
    return "x".join(str(k) for k in window.size)
