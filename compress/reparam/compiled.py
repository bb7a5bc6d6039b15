"""Tune mode in torch.compile, by the pass that PyTorch has for it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.modules.conv import _ConvTransposeNd

from compress.errors import UnsupportedError
from compress.reparam.modes import set_mode

OPTION = "efficient_conv_bn_eval_fx_passes"
"""Inductor's switch for it, off unless asked for (`torch._inductor.config`)."""


def compile_tuned(model: nn.Module, **options: Any) -> Any:
    """The model compiled for training, with its BatchNorm folded by Inductor in each step.

    The model is set to eval mode in place (see `set_mode`), which the pass needs, and compiled
    with its `efficient_conv_bn_eval_fx_passes`. No example is needed. It differs from tune mode:

    - it folds what a captured graph shows, also functional convolutions, and cannot see across
      a graph break; what it leaves is not named.
      `torch._dynamo.utils.counters["inductor"]["efficient_conv_bn_eval"]` counts what it folded.
    - it folds in the parameters' own dtype: with 16-bit parameters in 16 bits.
    - it takes no transposed convolution with groups: the factors have the wrong shape (2.13).

    A model in tune mode compiles as well, with `torch.compile(model)` and without any option. Both
    keep the same bytes. On CPUs neither is sure to be faster than eager tune mode: measure.

    Args:
        model: stays as it is but for its mode; parameters are shared with the result.
        options: further options of Inductor, by name.

    Returns:
        What `torch.compile` returns: call it like the model.

    Raises:
        UnsupportedError: the model has a transposed convolution with groups.
    """
    for name, module in model.named_modules():
        if isinstance(module, _ConvTransposeNd) and module.groups > 1:
            raise UnsupportedError(
                f"{name} is a transposed convolution with {module.groups} groups, for which "
                f"Inductor's {OPTION} computes factors of the wrong shape. Use "
                f'set_mode(model, "tune", example_inputs) and torch.compile(model) instead.'
            )
    set_mode(model, "eval")
    return torch.compile(model, options={OPTION: True, **options})
