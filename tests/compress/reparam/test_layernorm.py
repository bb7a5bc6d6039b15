from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from compress.data import Data, load_data
from compress.errors import UsageError
from compress.model import Model
from compress.passes import Context
from compress.recovery import squared_error
from compress.reference import reference_session, run
from compress.registry import create_pass, create_target
from compress.reparam import layernorm
from compress.reparam.layernorm import LayerNormToBatchNorm
from compress.reparam.layernorm_graph import find_norms, without_norms
from compress.reparam.layernorm_training import (
    PREPBN,
    PRepBN,
    Replacing,
    fit_norms,
    folded_map,
    set_state,
    student_of,
)
from compress.teaching import Lesson, Teaching
from compress.torch_graph.network import Network
from compress.training import Samples

TARGET = create_target("onnxruntime", threads=1)
Build = Callable[..., Model]
BLOCK = """
    block (float[n, 6, 8] x) => (float[n, 4] y) {
        [embed] e = MatMul(x, w0)
        [embed_bias] e1 = Add(e, b0)
        [norm0] u = LayerNormalization(e1, g0, h0)
        [norm1] a = LayerNormalization<epsilon=0.000001>(u, g1, h1)
        [query] q = MatMul(a, wq)
        [value] v0 = MatMul(a, wv)
        [value_bias] v = Add(bv, v0)
        [mix] m = Tanh(q)
        [gate] t = Mul(m, v)
        [skip] s = Add(t, u)
        [norm2] z = LayerNormalization(s, g2, h2)
        [mean] p = ReduceMean<keepdims=0>(z, axes)
        [norm3] o = LayerNormalization(p, g3, h3)
        [head] y = Gemm<transB=1>(o, wh, bh)
    }
"""
WIDTHS = {"w0": (8, 8), "b0": (8,), "wq": (8, 8), "wv": (8, 8), "bv": (8,), "wh": (4, 8)}


@pytest.fixture
def block(onnx_model: Build) -> Model:
    """LayerNorms behind a layer, before two, between a skip and a mean, and before a Gemm."""
    rng = np.random.default_rng(3)
    norms = {f"{kind}{i}": rng.normal(kind == "g", 0.3, 8) for kind in "gh" for i in range(4)}
    weights = {name: array.astype(np.float32) for name, array in norms.items()}
    return onnx_model(BLOCK, axes=np.array([1]), bh=(4,), **WIDTHS, **weights)


def outputs(model: Model, batch: int = 3) -> np.ndarray:
    return next(iter(run(reference_session(model.graph_model), model.example(batch)).values()))


def scores(model: Model) -> np.ndarray:
    """What a softmax makes of the outputs does not depend on their mean."""
    found = outputs(model, 64)
    return found - found.mean(1, keepdims=True)


def samples(model: Model, count: int = 64) -> Data:
    return load_data(next(iter(model.example(count).values())), model.inputs)


def context(model: Model, data: Data | None) -> Context:
    return Context(target=TARGET, original=model, training=data)


def kinds(model: Model) -> list[str]:
    return [node.op_type for node in model.graph_model.graph]


def random_state(model: Model, seed: int = 0) -> tuple[Network, dict[str, np.ndarray], list[str]]:
    """A student without LayerNorm whose RepBN have random parameters and statistics."""
    norms, _ = find_norms(model.graph_model.graph)
    fits = fit_norms(model, norms, [model.example(4)])
    student = student_of(model, norms, fits)
    teacher = Network(model.graph_model.clone())
    teaching: Teaching[dict[str, np.ndarray]] = Teaching(
        teacher, Samples(samples(model, 8), 0).held, 1, Lesson(), 0
    )
    arrays = Replacing(student, teaching, 1e-3, 0.5).state()
    rng = np.random.default_rng(seed)
    for name, array in arrays.items():
        if ".repbn." in name:
            drawn = rng.uniform(0.5, 2, array.shape)
            arrays[name] = np.asarray(drawn, np.float32)
    set_state(student, arrays)
    return student, arrays, [norm.name for norm in norms]


@given(seed=st.integers(0, 2**16))
@settings(max_examples=20, deadline=None)
def test_repbn_is_its_factor_and_shift(seed: int) -> None:
    rng = np.random.default_rng(seed)
    arrays = {
        f"n.repbn.{part}": rng.uniform(0.1, 3, 7) for part in ("gamma", "beta", "mean", "variance")
    }
    arrays["n.repbn.alpha"] = rng.normal(size=())
    tensors = {
        name.rpartition(".")[2]: torch.from_numpy(np.asarray(array))
        for name, array in arrays.items()
    }
    layer = PRepBN({"n": (tensors["mean"], tensors["variance"])})
    layer.share = 0.0
    x = torch.from_numpy(rng.normal(size=(2, 5, 7)))
    got = layer({"site": "n"}, x, x, None, tensors["gamma"], tensors["beta"], tensors["alpha"])
    a, c = folded_map("n", arrays)
    np.testing.assert_allclose(got.numpy(), a * x.numpy() + c, rtol=1e-10, atol=1e-10)
    norm = nn.BatchNorm1d(7).double().eval()
    with torch.no_grad():
        norm.weight.copy_(tensors["gamma"])
        norm.bias.copy_(tensors["beta"])
        assert norm.running_mean is not None
        assert norm.running_var is not None
        norm.running_mean.copy_(tensors["mean"])
        norm.running_var.copy_(tensors["variance"])
        rep = norm(x.reshape(-1, 7)).reshape(x.shape) + tensors["alpha"] * x
    torch.testing.assert_close(got, rep, rtol=1e-10, atol=1e-10)


def test_folded_equals_unfolded(block: Model) -> None:
    student, arrays, names = random_state(block)
    maps = {name: folded_map(name, arrays) for name in names}
    made, places = without_norms(block, maps)
    assert places == {"norm0": "previous", "norm1": "next", "norm2": "kept", "norm3": "next"}
    assert "LayerNormalization" not in kinds(made)
    x = block.example(3)
    expected = student.run({"x": torch.from_numpy(x["x"])})["y"].detach().numpy()
    np.testing.assert_allclose(outputs(made), expected, atol=1e-5 * np.abs(expected).max())
    assert "LayerNormalization" in kinds(block)


def test_only_the_chosen_are_replaced(block: Model) -> None:
    _, arrays, _ = random_state(block)
    made, places = without_norms(block, {"norm3": folded_map("norm3", arrays)})
    assert places == {"norm3": "next"}
    assert kinds(made).count("LayerNormalization") == 3


def test_a_bias_is_added_where_a_layer_had_none(block: Model) -> None:
    _, arrays, _ = random_state(block)
    made, _ = without_norms(block, {"norm1": folded_map("norm1", arrays)})
    query = next(node for node in made.graph_model.graph if node.name == "query")
    assert [use.node.name for use in query.outputs[0].uses()] == ["query/bias"]
    assert kinds(made).count("Add") == kinds(block).count("Add") + 1


def test_prepbn_goes_from_one_norm_to_the_other() -> None:
    x = torch.randn(4, 5, 6)
    scale, bias, ones = torch.rand(6), torch.rand(6), torch.ones(6)
    layer = PRepBN({"n": (torch.zeros(6), torch.ones(6))})
    arguments = ({"site": "n"}, x, scale, bias, ones, 0 * ones, torch.tensor(0.5))
    torch.testing.assert_close(layer(*arguments), nn.functional.layer_norm(x, (6,), scale, bias))
    layer.share = 0.0
    still = layer(*arguments)
    layer.share = 0.25
    mixed = 0.25 * nn.functional.layer_norm(x, (6,), scale, bias) + 0.75 * still
    torch.testing.assert_close(layer(*arguments), mixed)
    assert torch.equal(layer.statistics["n"][0], torch.zeros(6))
    layer.share, layer.learns = 0.0, True
    normal = layer(*arguments) - 0.5 * x
    torch.testing.assert_close(normal.mean((0, 1)), torch.zeros(6), atol=1e-5, rtol=0)
    torch.testing.assert_close(layer.statistics["n"][0], 0.1 * x.mean((0, 1)))
    course = Replacing.__new__(Replacing)
    course.norm, course.until = layer, 0.5
    for progress, share in ((0.0, 1.0), (0.25, 0.5), (0.5, 0.0), (0.9, 0.0)):
        course.begin(progress)
        assert layer.share == share


def test_the_first_map_is_the_nearest(block: Model) -> None:
    norms, _ = find_norms(block.graph_model.graph)
    fits = fit_norms(block, norms, [block.example(64)])
    student = student_of(block, norms[:1], fits)
    operator = student.operators[PREPBN]
    assert isinstance(operator, PRepBN)
    x = {"x": torch.from_numpy(block.example(64)["x"])}
    expected = student.run(x, ["u"])["u"]
    operator.share = 0.0
    got = student.run(x, ["u"])["u"]
    spread = (expected - expected.mean((0, 1))).square().sum()
    assert float((got - expected).square().sum() / spread) == pytest.approx(
        fits["norm0"].error, rel=1e-3
    )
    assert 0 < fits["norm0"].error < 0.7


def test_a_short_training_brings_the_network_back(
    block: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = layernorm.compare(TARGET, block, block, 0.2, 0)
    certain = dataclasses.replace(
        found, ratios={"after": dataclasses.replace(found.ratios["after"], verdict="faster")}
    )
    monkeypatch.setattr(layernorm, "compare", lambda *_: certain)
    step = LayerNormToBatchNorm(steps=150, batch=16, learning_rate=5e-3, search_seconds=1)
    made = step.apply(
        dataclasses.replace(block, program=block.graph_model.clone()),
        context(block, samples(block, 128)),
    )
    details = made.history[-1].details
    assert details["applied"] == 4, details["remark"]
    assert details["folded"] == {"next": 2, "previous": 1, "kept": 1}
    assert "LayerNormalization" not in kinds(made)
    assert details["held_out"]["after"] >= details["held_out"]["before"]
    norms, _ = find_norms(block.graph_model.graph)
    fits = fit_norms(block, norms, [block.example(64)])
    untrained, _ = without_norms(block, {name: fit.map for name, fit in fits.items()})
    expected = scores(block)
    error = squared_error(scores(made), expected)
    assert error < 0.8 * squared_error(scores(untrained), expected)
    assert "4 of 4 LayerNorms are replaced (2 inside the next layers" in details["remark"]


def test_a_count_takes_the_least_sensitive(block: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    found = layernorm.compare(TARGET, block, block, 0.2, 0)
    slower = dataclasses.replace(
        found, ratios={"after": dataclasses.replace(found.ratios["after"], verdict="slower")}
    )
    monkeypatch.setattr(layernorm, "compare", lambda *_: slower)
    made = LayerNormToBatchNorm(count=1).apply(block, context(block, samples(block)))
    details = made.history[-1].details
    rows = details["norms"]
    least = min(rows, key=lambda name: rows[name]["sensitivity"])
    assert [name for name, row in rows.items() if row["place"]] == [least]
    assert "nothing is applied. The network with 1 of 4 LayerNorms" in details["remark"]
    assert kinds(made).count("LayerNormalization") == 4


def test_refusals(block: Model, onnx_model: Build) -> None:
    with pytest.raises(UsageError, match="Pass layernorm_to_batchnorm trains, and there are no"):
        LayerNormToBatchNorm().apply(block, context(block, None))
    with pytest.raises(UsageError, match="layernorm_to_batchnorm: anneal is 0"):
        LayerNormToBatchNorm(anneal=0)
    text = """net (float[n, 6, 8] x) => (float[n, 6, 8] y) {
        [norm] y = LayerNormalization<axis=1>(x, g, h)
    }"""
    wide = onnx_model(text, g=np.ones((6, 8), np.float32), h=np.ones((6, 8), np.float32))
    made = create_pass("layernorm_to_batchnorm").apply(wide, context(wide, samples(wide)))
    assert made.history[-1].details["left"] == {"norm": "it is over more than the last axis"}
    assert "There is no LayerNorm to replace" in made.history[-1].details["remark"]
