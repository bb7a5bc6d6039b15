"""Train, Eval, Tune and Deploy: four ways to compute a convolution with its BatchNorm.

You et al. 2024, Efficient ConvBN Blocks for Transfer Learning and Beyond (arXiv 2305.11624):

| mode | statistics | trained | kept for the backward pass |
|---|---|---|---|
| train | of the batch | W, b, gamma, beta | input and output of the convolution |
| eval | running, frozen | W, b, gamma, beta | input and output of the convolution |
| tune | running, frozen | W, b, gamma, beta | input of the convolution, folded weight |
| deploy | folded away | W', b' | input of the convolution |

Tune computes what Eval computes, and its gradients. Deploy does not train alike: a step on W' is
one on W that is larger by (sqrt(variance + epsilon) / gamma)**2, without bound for small gamma.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_leaves

from compress.errors import UnsupportedError, UsageError
from compress.reparam.flow import call, flags
from compress.reparam.folding import folded
from compress.reparam.layers import (
    Merged,
    Swapped,
    freeze_all,
    pair_up,
    remember,
    replace_module,
    restore,
    unswap,
)
from compress.reparam.pairs import Found, Pair, find_pairs

Mode: TypeAlias = Literal["train", "eval", "tune", "deploy"]

_DIGITS = 0.5
"""Share of a dtype's decimal digits to which a model must agree with itself in tune mode."""


@dataclass(frozen=True)
class ModeReport:
    """What a change of mode did.

    Attributes:
        mode: the new one.
        pairs: layers with the BatchNorm that is folded into them; empty in train and eval.
        left: the reason, by the name of each BatchNorm that stays as it is.
    """

    mode: Mode
    pairs: tuple[Pair, ...] = ()
    left: Mapping[str, str] = field(default_factory=dict)


def set_mode(model: nn.Module, mode: Mode, example_inputs: Any = None) -> ModeReport:
    """Switch every ConvBN block of a model, in place.

    Only BatchNorm and the layers before it change, never the `training` flag of other modules.

    - "train": ordinary modules. BatchNorm takes over the model's own flag, and follows
      `model.train()` and `model.eval()` again.
    - "eval": all BatchNorm uses its running statistics, also after `model.train()`.
    - "tune": the same function and the same gradients as eval; layers fold their BatchNorm in
      each call, in float32 at least (under autocast too), so that its input is not kept.
      `model.train()` and `model.eval()` change nothing in it. Also BatchNorm that cannot be
      folded is frozen. torch.export and `compress.run` see the model of eval mode.
    - "deploy": folded for good, **in place** (`copy.deepcopy` before, to keep the original):
      weights have new values, layers have a bias, BatchNorm is gone from the state_dict. There
      is no way back. Make optimizers afterwards.

    In train, eval and tune the parameters are the same objects, and the state_dict has the same
    keys: optimizers and checkpoints go on.

    Blocks are found by where tensors go. That needs `example_inputs` where torch.fx cannot trace
    the model, as Python code that branches on values is seen only when it runs; with an example
    the result is also checked against eval mode. Left alone and named are a BatchNorm that does
    not directly follow a Conv, ConvTranspose or Linear, one without running statistics or without
    gamma and beta, and a block whose layer has a second user, is called twice, or shares
    parameters; further modules with hooks, parametrizations, or a `forward` of their own.

    Args:
        model: any torch module.
        mode: the new mode.
        example_inputs: a tensor, a tuple of arguments or a dict of keyword arguments that the
            model can be called with; for tune and deploy only.

    Raises:
        UsageError: the mode is unknown, the model was deployed, or it can be neither traced nor
            run.
        UnsupportedError: folded, the model returns something else on the example; nothing
            has changed then.
    """
    if mode not in get_args(Mode):
        raise UsageError(f"Mode {mode!r} is unknown; there are {', '.join(get_args(Mode))}.")
    _refuse_deployed(model, mode)
    if mode == "train":
        for module in model.modules():
            if isinstance(module, Swapped):
                unswap(module)
            if isinstance(module, _BatchNorm):
                module.train(model.training)
        return ModeReport(mode)
    before = remember(model)
    try:
        freeze_all(model)
        if mode == "eval":
            return ModeReport(mode)
        found = find_pairs(model, example_inputs)
        _tune(model, found, example_inputs)
        if mode == "deploy":
            _deploy(model, found)
    except BaseException:
        restore(before)
        raise
    return ModeReport(mode, found.pairs, found.left)


@contextlib.contextmanager
def tune(model: nn.Module, example_inputs: Any = None) -> Iterator[ModeReport]:
    """Tune mode for a `with` block; afterwards every module is in the mode that it was in.

        with reparam.tune(model, example_inputs=images) as report:
            fine_tune(model)

    What was trained stays. Args and errors are those of `set_mode`.
    """
    before = remember(model)
    try:
        yield set_mode(model, "tune", example_inputs)
    finally:
        restore(before)


@torch.no_grad()
def _tune(model: nn.Module, found: Found, example: Any) -> None:
    for pair in found.pairs:
        norm: Any = model.get_submodule(pair.norm)
        pair_up(model.get_submodule(pair.layer), norm)
    if found.outputs is None:
        return
    with flags(model, False):
        outputs = call(model, example)
    for mine, theirs in zip(tree_leaves(outputs), tree_leaves(found.outputs), strict=True):
        if not isinstance(mine, Tensor) or not mine.is_floating_point() or not mine.numel():
            continue
        largest = float(theirs.abs().nan_to_num(0, 0).max())
        limit = largest * torch.finfo(mine.dtype).eps ** _DIGITS
        if not torch.isclose(mine, theirs, rtol=0, atol=limit, equal_nan=True).all():
            raise UnsupportedError(
                f"{type(model).__name__} differs from itself by "
                f"{float((mine - theirs).abs().max()):.3g} with its BatchNorm folded, where its "
                f"outputs reach {largest:.3g}. It may depend on more than its inputs, or gamma and "
                f"the running variances are too extreme for folding. Stay in eval mode."
            )


@torch.no_grad()
def _deploy(model: nn.Module, found: Found) -> None:
    for pair in found.pairs:
        layer: Any = model.get_submodule(pair.layer)
        norm: Any = model.get_submodule(pair.norm)
        unswap(layer)
        weight, bias = folded(layer, norm, torch.float64)
        layer.weight.copy_(weight)
        if layer.bias is None:
            layer.bias = nn.Parameter(bias, requires_grad=layer.weight.requires_grad)
        else:
            layer.bias.copy_(bias)
        replace_module(model, norm, Merged())


def _refuse_deployed(model: nn.Module, mode: str) -> None:
    names = [name for name, module in model.named_modules() if isinstance(module, Merged)]
    if names and mode != "deploy":
        raise UsageError(
            f"The model was deployed and cannot go to mode {mode}: {len(names)} BatchNorm "
            f"({names[0]}, ...) were folded for good, and their gamma, beta and statistics are "
            f"gone. Build the model anew and load a checkpoint from before, or copy it with "
            f"copy.deepcopy before deploying."
        )
