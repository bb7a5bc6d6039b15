"""Rows of kernels with made-up times."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest


@pytest.fixture(scope="session")
def row() -> Callable[..., dict[str, Any]]:
    """A kernel as `compress.kernel_rows` describes it; by default a float Conv of its own site."""

    def make(
        kernel: str,
        us: float,
        precision: str = "float32",
        op_type: str = "Conv",
        site: str | None = None,
        **more: Any,
    ) -> dict[str, Any]:
        shape = [[1, 8, 4, 4], "float32"]
        return {
            "kernel": kernel,
            "op_type": op_type,
            "precision": precision,
            "site": kernel if site is None else site,
            "backend": "",
            "fused": "",
            "p50_us": us,
            "share": 0.0,
            "macs": 0,
            "gmacs_per_second": 0.0,
            "bytes": 1024,
            "inputs": [shape],
            "weights": [],
            "outputs": [shape],
            **more,
        }

    return make
