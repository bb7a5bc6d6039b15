"""Plots of what was measured, as Matplotlib figures and as PNG.

Each function takes rows, checks them and returns a figure that belongs to no window; `png` makes
the file. Matplotlib is imported where something is drawn.
"""

from __future__ import annotations

from compress.plots.gap import GapPoint, gap_figure, gap_points
from compress.plots.kernels import kernels_figure
from compress.plots.predictions import Errors, prediction_errors, predictions_figure
from compress.plots.roofline import roofline_figure
from compress.plots.sensitivity import sensitivity_figure
from compress.plots.style import PALETTE, png
from compress.plots.waterline import waterline_figure

__all__ = [
    "PALETTE",
    "Errors",
    "GapPoint",
    "gap_figure",
    "gap_points",
    "kernels_figure",
    "png",
    "prediction_errors",
    "predictions_figure",
    "roofline_figure",
    "sensitivity_figure",
    "waterline_figure",
]
