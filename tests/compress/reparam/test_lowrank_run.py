"""`low_rank` in a recipe: what it loses is judged against the model that came in."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import compress
from compress.model import Model
from compress.recipe import Recipe
from compress.recovery import Recover
from compress.reference import reference_session, run
from compress.reparam.lowrank import LowRank

TEXT = """
    wide (float[n, 512] x) => (float[n, 8] y) {
        h = Gemm<transB=1>(x, a, b)
        r = Relu(h)
        y = Gemm(r, c, d)
    }
"""


@pytest.fixture(scope="module")
def decaying(onnx_model: Callable[..., Model]) -> Model:
    """Singular values that fall, so that rank 32 loses something, and its gain is certain."""
    rng = np.random.default_rng(0)
    u, _, v = np.linalg.svd(rng.standard_normal((2048, 512)), full_matrices=False)
    weight = (u * np.geomspace(4, 0.02, 512)) @ v
    return onnx_model(TEXT, a=weight.astype(np.float32), b=(2048,), c=(2048, 8), d=(8,))


def test_the_baseline_of_a_run_is_the_model_that_came_in(decaying: Model, tmp_path: Path) -> None:
    inputs = decaying.example(256)
    labels = run(reference_session(decaying.graph_model), inputs)["y"].argmax(1)
    passes = (LowRank(methods=("channel_svd",), max_error=0.9, seconds=3), Recover(steps=10))
    result = compress.run(
        decaying.graph_model,
        target="onnxruntime",
        threads=1,
        recipe=Recipe(passes),
        calibration=inputs["x"][:128],
        evaluate=(inputs["x"], labels),
        max_drop="100%",
        search_seconds=0,
        seconds=0.5,
        out=tmp_path / "artifact",
    )
    report = result.report
    baseline, factorised = report.candidates
    assert baseline.name == "float32"
    assert baseline.score["value"] == 1.0  # labels are the original's own answers
    assert factorised.name == "onnxruntime float32"
    assert factorised.drop is not None
    assert factorised.drop["points"] == pytest.approx(100 * (1 - factorised.score["value"]))
    assert factorised.fidelity is not None
    assert [step["name"] for step in report.steps][-2:] == ["low_rank", "recover"]
    assert any("layers tried are factorised" in line for line in report.headline), report.headline
    assert (tmp_path / "artifact" / "recipe.yaml").read_text().count("low_rank") == 1
