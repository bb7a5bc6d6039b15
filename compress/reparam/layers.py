"""What a layer and its BatchNorm become in a mode: the same objects with another class.

Parameters, buffers and names stay, so optimizers, checkpoints and references to the modules hold.
A class is made for each pair of a mode and the module's own class; `swap` and `unswap` exchange
it. Copies keep the mode, and so do pickled modules.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from compress.errors import UsageError
from compress.reparam.folding import folded

_NORMALIZED_BY = "_normalized_by"
"""Attribute of a tensor that a folded layer made: the BatchNorm that it stands for."""
NORM = "_folded_norm"
"""Where a layer keeps its BatchNorm: not as a submodule, which would be in the state_dict."""


class Swapped(nn.Module):
    """Marks the classes made here.

    Attributes:
        plain: the class that the module had.
        kind: what was put before it.
    """

    plain: type[nn.Module]
    kind: type[Swapped]

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _revive, (self.kind, self.plain), self.__getstate__()  # type: ignore[no-untyped-call]


class Frozen(Swapped):
    """A BatchNorm that keeps its running statistics, whatever `train()` says."""

    def train(self, mode: bool = True) -> Frozen:
        """Nothing but inference."""
        super().train(False)
        return self

    def reset_running_stats(self) -> None:
        """Refused: the statistics are the function that is being trained.

        Raises:
            UsageError: always; `torch.optim.swa_utils.update_bn` calls it.
        """
        raise UsageError(
            "The running statistics of a frozen BatchNorm cannot be reset or estimated again. "
            'Call compress.reparam.set_mode(model, "train") before.'
        )


class FoldedNorm(Frozen):
    """A BatchNorm whose layer has done its work already."""

    def forward(self, input: Tensor) -> Tensor:
        """The input, which the layer before has normalized.

        Raises:
            UsageError: the tensor comes from somewhere else.
        """
        if torch.compiler.is_exporting():
            normalized: Tensor = super().forward(input)
            return normalized
        if not torch.compiler.is_compiling() and getattr(input, _NORMALIZED_BY, None) is not self:
            raise UsageError(
                f"In tune mode {self} got a tensor that is not what its layer has just returned. "
                f"Either this run takes another path than the one that the mode was set with, or "
                f"a hook stands between them, or torch.nn.DataParallel copied them (use "
                f"DistributedDataParallel). Set the mode again with example_inputs of this run."
            )
        return input


class TunedLayer(Swapped):
    """A convolution or linear layer that folds its BatchNorm in each call."""

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        """The output of the BatchNorm.

        An exported program gets the two layers apart, so that it is the same as in eval mode.

        Raises:
            UsageError: the input has no batch axis, or more axes than the layer's BatchNorm takes.
        """
        if torch.compiler.is_exporting():
            apart: Tensor = super().forward(*(input, output_size)[: 1 + (output_size is not None)])
            return apart
        norm = self.__dict__[NORM]
        weight, bias = folded(self, norm)
        output = _call(self, input, weight, bias, output_size)
        if output.ndim != weight.ndim:
            raise UsageError(
                f"In tune mode {self} returned a tensor {tuple(output.shape)}; with a BatchNorm "
                f"folded it must have {weight.ndim} axes, the first of them the batch."
            )
        if not torch.compiler.is_compiling():
            setattr(output, _NORMALIZED_BY, norm)
        return output


_CLASSES: dict[tuple[type[Swapped], type[nn.Module]], type[nn.Module]] = {}
State: TypeAlias = list[tuple[nn.Module, type[Swapped] | None, Any, bool]]
"""Modules with their kind, the BatchNorm that is folded into them, and their flag."""


class Merged(nn.Identity):
    """Where a BatchNorm was before it was folded for good."""


def _call(
    layer: nn.Module, x: Tensor, weight: Tensor, bias: Tensor, output_size: list[int] | None
) -> Tensor:
    """The layer with another weight and bias."""
    if isinstance(layer, _ConvTransposeNd):
        rank, padding = weight.ndim - 2, [int(p) for p in layer.padding]
        extra = layer._output_padding(
            x,
            output_size,
            list(layer.stride),
            padding,
            list(layer.kernel_size),
            rank,
            list(layer.dilation),
        )
        convolution = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[rank - 1]
        return convolution(
            x, weight, bias, layer.stride, padding, extra, layer.groups, layer.dilation
        )
    if isinstance(layer, _ConvNd):
        output: Tensor = layer._conv_forward(x, weight, bias)
        return output
    return F.linear(x, weight, bias)


def plain_class(module: nn.Module) -> type[nn.Module]:
    """The class of a module without its mode."""
    return type(module).plain if isinstance(module, Swapped) else type(module)


def freeze_all(model: nn.Module) -> None:
    """Every BatchNorm has its running statistics from now on; no module has another mode."""
    for module in model.modules():
        unswap(module)
        if isinstance(module, _BatchNorm):
            swap(module, Frozen)
            module.training = False


def pair_up(layer: nn.Module, norm: _BatchNorm) -> None:
    """Fold `norm` into `layer` in each call from now on."""
    swap(layer, TunedLayer)
    layer.__dict__[NORM] = norm
    swap(norm, FoldedNorm)
    norm.training = False


def swap(module: nn.Module, kind: type[Swapped]) -> None:
    """Give the module the class that `kind` and its own class make together."""
    unswap(module)
    module.__class__ = _class(kind, type(module))


def unswap(module: nn.Module) -> None:
    """Give the module back its own class."""
    module.__class__ = plain_class(module)
    module.__dict__.pop(NORM, None)


def remember(model: nn.Module) -> State:
    """The modes of all modules, for `restore`."""
    return [
        (m, m.kind if isinstance(m, Swapped) else None, m.__dict__.get(NORM), m.training)
        for m in model.modules()
    ]


def restore(state: State) -> None:
    """Modes as they were, and the flags of BatchNorm; parameters stay as they are."""
    for module, kind, norm, training in state:
        unswap(module)
        if kind is not None:
            swap(module, kind)
        if norm is not None:
            module.__dict__[NORM] = norm
        if isinstance(module, _BatchNorm):
            module.training = training


def replace_module(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put `new` wherever the model has `old`: one module may have several names."""
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is old:
                parent._modules[name] = new


def _class(kind: type[Swapped], plain: type[nn.Module]) -> type[nn.Module]:
    if (kind, plain) not in _CLASSES:
        names = {"plain": plain, "kind": kind, "__doc__": kind.__doc__, "__module__": __name__}
        _CLASSES[kind, plain] = type(f"{kind.__name__}{plain.__name__}", (kind, plain), names)
    return _CLASSES[kind, plain]


def _revive(kind: type[Swapped], plain: type[nn.Module]) -> nn.Module:
    made = _class(kind, plain)
    return made.__new__(made)
