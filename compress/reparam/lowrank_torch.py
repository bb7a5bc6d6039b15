"""Factorised layers in torch: to look at, to fine-tune, or to train from the start."""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from torch import nn

from compress.errors import UnsupportedError, UsageError
from compress.reparam import lowrank_factors
from compress.reparam.lowrank_decompose import decompose
from compress.reparam.lowrank_factors import Link, Method, Ranks, dense, random_links

Layer: TypeAlias = nn.Conv1d | nn.Conv2d | nn.Linear


def factorize(
    layer: nn.Module,
    ranks: int | Ranks,
    method: Method = "channel_svd",
    init: Literal["svd", "random"] = "svd",
    *,
    seed: int = 0,
) -> nn.Sequential:
    """The layer as a chain of smaller ones without activations between them.

    At full rank (see `full_ranks`) and with `init="svd"` the chain computes what the layer does.
    With `init="random"` it is a layer to be trained from the start in the factorised form, as
    a-priori compression does (arXiv 2304.04964): the weights are random, and the chain's dense
    weight has the norm of the layer's, so that activations stay as large as they were.

    Args:
        layer: `nn.Conv1d`, `nn.Conv2d` or `nn.Linear`; it is not changed. Groups of channels are
            factorised one by one.
        ranks: channels between the parts, per group; of tucker two, (in, out), or one for both.
        method: "channel_svd", "spatial_svd" (two spatial axes), "tucker" or "cp" (both of which
            need tensorly); see `compress.reparam.lowrank_factors`.
        init: "svd" approximates the layer's weight, "random" does not look at it.
        seed: of random weights.

    Returns:
        Parts of the layer's own kind, in its type and on its device; the last has its bias.

    Raises:
        UnsupportedError: the layer is of another kind.
        UsageError: the method does not apply to the layer, or a rank is out of range.
        MissingExtraError: tucker or cp without tensorly.
    """
    known = _known(layer)
    if init not in ("svd", "random"):
        raise UsageError(f'init={init!r} does not exist; choose "svd" or "random".')
    weight, groups = known.weight.detach(), _groups(known)
    given = (ranks,) * (2 if method == "tucker" else 1) if isinstance(ranks, int) else tuple(ranks)
    array = weight.double().cpu().numpy()
    if init == "svd":
        links = decompose(array, groups, method)(given)
    else:
        rng = np.random.default_rng(seed)
        links = _as_large(random_links(array.shape, groups, method, given, rng), array)
    parts = [_part(known, link, last=link is links[-1]) for link in links]
    return nn.Sequential(*parts).train(layer.training)


def full_ranks(layer: nn.Module, method: Method = "channel_svd") -> Ranks:
    """The smallest ranks at which `factorize` reproduces every layer of this shape exactly.

    Raises:
        UnsupportedError: the layer is of another kind.
        UsageError: the method does not apply to the layer.
    """
    known = _known(layer)
    return lowrank_factors.full_ranks(tuple(known.weight.shape), _groups(known), method)


def _known(layer: nn.Module) -> Layer:
    if type(layer) not in (nn.Conv1d, nn.Conv2d, nn.Linear):
        raise UnsupportedError(
            f"{type(layer).__name__} cannot be factorised; Conv1d, Conv2d and Linear can."
        )
    return layer  # type: ignore[return-value]


def _groups(layer: Layer) -> int:
    return 1 if isinstance(layer, nn.Linear) else layer.groups


def _as_large(links: list[Link], weight: np.ndarray) -> list[Link]:
    """The same chain with a dense weight of this weight's norm."""
    norm = float(np.linalg.norm(dense(links)))
    factor = (float(np.linalg.norm(weight)) / norm) ** (1 / len(links)) if norm else 1.0
    return [Link(link.weight * factor, link.groups, link.spans) for link in links]


def _part(layer: Layer, link: Link, last: bool) -> nn.Module:
    """One link as a module; the last one has the layer's bias."""
    bias = layer.bias if last else None
    weight = torch.from_numpy(link.weight)
    how = {"bias": bias is not None, "device": layer.weight.device, "dtype": layer.weight.dtype}
    make: Any = nn.utils.skip_init  # weights follow
    made: Layer
    outputs, inputs = link.out, link.weight.shape[1] * link.groups
    if isinstance(layer, nn.Linear):
        made = make(nn.Linear, inputs, outputs, **how)
    else:
        made = make(
            type(layer),
            inputs,
            outputs,
            tuple(link.weight.shape[2:]),
            stride=_along(layer.stride, link, 1),
            padding=_padding(layer, link),
            dilation=_along(layer.dilation, link, 1),
            groups=link.groups,
            padding_mode=layer.padding_mode,
            **how,
        )
    with torch.no_grad():
        made.weight.copy_(weight)
        if bias is not None and made.bias is not None:
            made.bias.copy_(bias)
    return made.requires_grad_(layer.weight.requires_grad)


def _along(values: tuple[int, ...], link: Link, otherwise: int) -> tuple[int, ...]:
    """The layer's values along the axes that a link spans."""
    return tuple(v if span else otherwise for v, span in zip(values, link.spans, strict=True))


def _padding(layer: nn.Conv1d | nn.Conv2d, link: Link) -> str | tuple[int, ...]:
    if not any(link.spans):
        return (0,) * len(link.spans)
    if isinstance(layer.padding, str):  # "same" and "valid" hold for each axis by itself
        return layer.padding
    return _along(layer.padding, link, 0)
