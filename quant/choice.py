"""What operators lose at each width, for passes that choose among widths or precisions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from compress.data import Data
from compress.graph import graph_sites
from compress.model import Model
from compress.passes import Context
from quant.decisions import Option
from quant.plan import QuantPlan
from quant.sensitivity import Sensitivity, measure_sensitivity
from quant.widths import Width, dtype_of

SAMPLES = 128
"""Enough to rank operators; choices are confirmed on whole models."""


def losses_by_width(
    model: Model,
    plan: QuantPlan,
    data: Data,
    widths: Sequence[Width],
    context: Context,
    *,
    activations: bool = True,
) -> tuple[dict[str, int], dict[str, Mapping[Width, float]], Sensitivity]:
    """Parameters of each operator, and what it loses at each width when the rest stays float.

    Losses are mean squared errors of the outputs, relative to their power: they add up while
    errors are small, which the divergence of the classes' probabilities does not.

    Args:
        model: float, at the ONNX stage.
        plan: of it, that says what carries Q/DQ.
        data: to run.
        widths: to try.
        context: for cache and progress.
        activations: an operator's own activations take the width too; else its weight alone.
    """
    options: dict[str, Option] = {}
    for width in widths:
        dtype: Any = dtype_of(width, signed=True)
        options[str(width)] = Option(dtype, dtype if activations else None)
    found = measure_sensitivity(
        model,
        plan,
        data,
        options=options,
        metrics=("mse",),
        side="input",  # a plan gives an operator's width to what it reads
        samples=SAMPLES,
        cache=context.cache,
        progress=context.progress,
    )
    measured = {str(width): found.losses(str(width)) for width in widths}
    losses: dict[str, Mapping[Width, float]] = {
        row.site: {width: max(0.0, measured[str(width)][row.site]) for width in widths}
        for row in found.rows
    }
    sizes = {site.name: site.parameters for site in graph_sites(model.graph_model)}
    return {name: sizes.get(name, 0) for name in losses}, losses, found
