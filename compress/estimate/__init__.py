"""Latency estimates: what a model will take on a target, with an interval and where it is from.

    from compress.estimate import latency

    print(latency("model.onnx", "onnxruntime", source="predicted"))

Four ways to find a latency stand behind one function, from the surest to the cheapest (Benmeziane
et al., arXiv 2101.09336): measured, from a lookup table, predicted from kernels, analytical.
"""

from __future__ import annotations

from compress.estimate.build import build_predictor
from compress.estimate.estimate import latency
from compress.estimate.peaks import Peaks, cached_peaks, measure_peaks
from compress.estimate.predictor import Predictor, load_predictor
from compress.estimate.result import KernelEstimate, Latency, Source

__all__ = [
    "KernelEstimate",
    "Latency",
    "Peaks",
    "Predictor",
    "Source",
    "build_predictor",
    "cached_peaks",
    "latency",
    "load_predictor",
    "measure_peaks",
]
