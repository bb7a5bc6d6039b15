from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from compress.data import load_data
from compress.errors import UnsupportedError, UsageError
from compress.facts import step_facts
from compress.model import Model
from compress.passes import Context
from compress.recovery import squared_error
from compress.reference import reference_session, run
from compress.registry import create_pass, create_target
from compress.reparam import low_rank
from compress.reparam.lowrank import LowRank
from compress.reparam.lowrank_decompose import decompose
from compress.reparam.lowrank_errors import OutputErrors, WeightErrors
from compress.reparam.lowrank_factors import Method, dense, full_ranks
from compress.reparam.lowrank_graph import alone, find_layers, replace_layer
from compress.reparam.lowrank_search import Search
from compress.reparam.lowrank_timing import Option, Timed, Timer, options
from compress.testing import NullTarget, PassContract

TARGET = create_target("onnxruntime", threads=1)
Build = Callable[..., Model]
WIDE = """
    wide (float[n, 512] x) => (float[n, 16] y) {
        h = Gemm<transB=1>(x, a, b)
        r = Relu(h)
        y = MatMul(r, c)
    }
"""


def conv(attributes: str) -> str:
    return (
        f"one (float[n, 8, 9, 10] x) => (float[n, 8, p, q] y) {{ y = Conv<{attributes}>(x, w, b) }}"
    )


@pytest.fixture
def wide(onnx_model: Build) -> Model:
    """A linear layer of 512 x 2048 numbers whose rank is 8, and a small one behind it."""
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((2048, 8)) @ rng.standard_normal((8, 512)) / 64
    return onnx_model(WIDE, a=weight.astype(np.float32), b=(2048,), c=(2048, 16))


@pytest.fixture(scope="module")
def times(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What was timed in one test is known in the next."""
    return tmp_path_factory.mktemp("times")


def outputs(model: Model, batch: int = 3) -> np.ndarray:
    found = run(reference_session(model.graph_model), model.example(batch))
    return next(iter(found.values()))


@pytest.mark.parametrize("method", ["channel_svd", "spatial_svd"])
@pytest.mark.parametrize(
    "attributes",
    [
        "kernel_shape=[3,3]",
        "kernel_shape=[3,3], strides=[2,1], pads=[1,0,2,1], dilations=[1,2]",
        "kernel_shape=[3,3], auto_pad=\"SAME_UPPER\", strides=[2,2]",
        "kernel_shape=[3,3], auto_pad=\"SAME_LOWER\"",
        "kernel_shape=[3,3], group=2, pads=[1,1,1,1]",
    ],
)  # fmt: skip
def test_a_chain_of_full_rank_equals_the_convolution(
    onnx_model: Build, method: Method, attributes: str
) -> None:
    groups = 2 if "group" in attributes else 1
    model = onnx_model(conv(attributes), w=(8, 8 // groups, 3, 3), b=(8,))
    before = outputs(model)
    (layer,) = find_layers(model)
    ranks = full_ranks(layer.weight.shape, groups, method)
    replace_layer(model.graph_model.graph, layer, decompose(layer.weight, groups, method)(ranks))
    np.testing.assert_allclose(outputs(model), before, atol=1e-5 * np.abs(before).max())
    names = [node.name for node in model.graph_model.graph]
    assert names == [f"{layer.name}/low_rank.0", layer.name]
    last = model.graph_model.graph[0].outputs[0]
    assert last.shape is not None
    assert last.shape[1] == groups * ranks[0]


@pytest.mark.parametrize(
    "text",
    [
        "one (float[n, 6] x) => (float[n, 5] y) { y = Gemm<transB=1>(x, w, b) }",
        "one (float[n, 6] x) => (float[n, 5] y) { y = Gemm(x, w, b) }",
        "one (float[n, 4, 6] x) => (float[n, 4, 5] y) { y = MatMul(x, w) }",
    ],
)
def test_a_chain_of_full_rank_equals_the_linear_layer(onnx_model: Build, text: str) -> None:
    shape = (5, 6) if "transB" in text else (6, 5)
    biases = {"b": (5,)} if "b)" in text else {}
    model = onnx_model(text, w=shape, **biases)
    before = outputs(model)
    (layer,) = find_layers(model)
    assert layer.weight.shape == (5, 6)
    replace_layer(model.graph_model.graph, layer, decompose(layer.weight, 1, "channel_svd")((5,)))
    np.testing.assert_allclose(outputs(model), before, atol=1e-5 * np.abs(before).max())


def test_what_is_no_plain_layer_is_left_out(onnx_model: Build) -> None:
    model = onnx_model(
        """two (float[n, 6] x, float[6, 4] z) => (float[n, 4] y, float[n, 4] u) {
            y = Gemm<alpha=0.5>(x, w, b)
            u = MatMul(x, z)
        }""",
        w=(6, 4),
        b=(4,),
    )
    assert find_layers(model) == []


def test_macs_of_a_chain(onnx_model: Build) -> None:
    text = conv("kernel_shape=[3,3], strides=[2,1], pads=[1,1,1,1]")
    (layer,) = find_layers(onnx_model(text, w=(8, 8, 3, 3), b=(8,)))
    assert layer.macs == 5 * 10 * 8 * 8 * 9
    links = decompose(layer.weight, 1, "spatial_svd")((4,))
    assert layer.chain_macs(links) == 5 * 10 * 4 * 8 * 3 + 5 * 10 * 8 * 4 * 3


def test_a_layer_alone_has_its_activation(onnx_model: Build) -> None:
    model = onnx_model(
        "one (float[n, 8] x) => (float[n, 8] y) { h = Gemm(x, w, b) y = Relu(h) }",
        w=(8, 8), b=(8,),
    )  # fmt: skip
    (layer,) = find_layers(model)
    links = decompose(layer.weight, 1, "channel_svd")((3,))
    chain = alone(layer, links)
    assert [n.op_type for n in chain.graph_model.graph] == ["Gemm", "Gemm", "Relu"]
    assert outputs(chain, 1).shape == outputs(alone(layer), 1).shape == (1, 8)


def test_options_are_multiples_that_save_work(onnx_model: Build) -> None:
    text = "one (float[n,64,16,16] x) => (float[n,64,16,16] y) { y = Conv<pads=[1,1,1,1]>(x, w) }"
    (layer,) = find_layers(onnx_model(text, w=(64, 64, 3, 3)))
    found = {
        method: [o.ranks for o in options(layer, method)] for method in ("channel_svd", "tucker")
    }
    assert found["channel_svd"] == [(8,), (16,), (24,), (32,), (40,)]
    assert found["tucker"][0] == (8, 8)
    small = "one (float[n,4,8,8] x) => (float[n,4,8,8] y) { y = Conv(x, w) }"
    (layer,) = find_layers(onnx_model(small, w=(4, 4, 1, 1)))
    assert [o.ranks for o in options(layer, "channel_svd")] == [(1,)]
    assert options(layer, "spatial_svd") == []


def test_errors_are_those_of_the_network(wide: Model) -> None:
    data = load_data(wide.example(12)["x"], wide.inputs)
    layers = find_layers(wide)
    errors = OutputErrors(wide, layers, data)
    assert errors.measured_by == "outputs on 16 calibration samples"
    weights = {
        layer.name: dense(decompose(layer.weight, 1, "channel_svd")((4,))) for layer in layers
    }
    changed = dataclasses.replace(wide, program=wide.graph_model.clone())
    for layer in layers:
        make = decompose(layer.weight, 1, "channel_svd")
        replace_layer(changed.graph_model.graph, layer, make((4,)))
    got, expected = (
        run(reference_session(m.graph_model), {"x": wide.example(12)["x"]})["y"]
        for m in (changed, wide)
    )
    parts = [squared_error(got[rows], expected[rows]) for rows in (slice(8), slice(8, 12))]
    assert errors(weights) == pytest.approx(np.mean(parts), rel=1e-3)
    only = layers[0].name
    assert WeightErrors(layers)({only: weights[only]}) == pytest.approx(
        squared_error(weights[only], layers[0].weight)
    )


def test_directions_of_the_outputs_lose_least_on_the_data(onnx_model: Build) -> None:
    model = onnx_model(
        "one (float[n, 12] x) => (float[n, 9] y) { y = Gemm(x, w, b) }", w=(12, 9), b=(9,)
    )
    rng = np.random.default_rng(3)
    x = (rng.standard_normal((64, 12)) * np.geomspace(10, 0.01, 12)).astype(np.float32)
    (layer,) = find_layers(model)
    errors = OutputErrors(model, [layer], load_data(x, model.inputs))
    (basis,) = errors.bases([layer])[layer.name]
    np.testing.assert_allclose(basis.T @ basis, np.eye(9), atol=1e-10)
    for rank in (1, 3, 6):
        plain = dense(decompose(layer.weight, 1, "channel_svd")((rank,)))
        fitted = dense(decompose(layer.weight, 1, "channel_svd", [basis])((rank,)))
        assert errors({layer.name: fitted}) <= errors({layer.name: plain}) + 1e-9
    full = dense(decompose(layer.weight, 1, "channel_svd", [basis])((9,)))
    np.testing.assert_allclose(full, layer.weight, atol=1e-5)


def test_a_wide_layer_of_low_rank_is_factorised(wide: Model, times: Path) -> None:
    # 16 times fewer multiply-accumulates and bytes: faster on any machine.
    before = outputs(wide)
    x = wide.example(16)["x"]
    done = low_rank(wide, TARGET, data=x, cache=times, methods=("channel_svd",), seconds=10)
    details = done.history[-1].details
    assert details["applied"] == 1
    assert details["error"] < 1e-6
    assert details["speedup"]["low"] > 1
    np.testing.assert_allclose(outputs(done), before, atol=1e-3 * np.abs(before).max())
    assert "of 2 layers tried" in details["remark"] or "of 1 layers tried" in details["remark"]
    assert [n.op_type for n in wide.graph_model.graph] == ["Gemm", "Relu", "MatMul"]
    rows = {row["name"]: row for row in details["layers"]}
    applied = next(row for row in rows.values() if row["applied"])
    assert applied["after_us"] < applied["before_us"]
    assert step_facts(done.history[-1])["details"]["remark"]


def test_nothing_is_applied_beyond_the_error(onnx_model: Build, times: Path) -> None:
    model = onnx_model(WIDE, a=(2048, 512), b=(2048,), c=(2048, 16))
    done = low_rank(model, TARGET, cache=times, methods=("channel_svd",), max_error=1e-4, seconds=2)
    details = done.history[-1].details
    assert details["applied"] == 0
    assert details["error_of"] == "weights"
    assert "nothing is applied" in details["remark"]
    assert outputs(done) == pytest.approx(outputs(model), abs=0)


def test_layers_without_time_are_counted(wide: Model) -> None:
    details = low_rank(wide, TARGET, seconds=1e-9).history[-1].details
    assert details["applied"] == 0
    assert "No time was left for 2 layers." in details["remark"]


def test_timings_are_kept(wide: Model, tmp_path: Path) -> None:
    layer = find_layers(wide)[0]
    later = time.monotonic() + 60
    first = Timer(TARGET, ("channel_svd",), later, tmp_path).time(layer)
    again = Timer(TARGET, ("channel_svd",), 0.0, tmp_path).time(layer)
    assert first
    assert first == again
    (file,) = tmp_path.iterdir()
    file.write_text("damaged")
    assert Timer(TARGET, ("channel_svd",), 0.0, tmp_path).time(layer) is None


def test_the_knapsack_takes_the_fastest_within_the_error_and_the_least_error_in_time(
    wide: Model,
) -> None:
    context = Context(target=TARGET, original=wide)
    first, second = (layer.name for layer in find_layers(wide))
    slow, fast = Option("channel_svd", (64,)), Option("channel_svd", (8,))
    search = Search(("channel_svd",), 0.05, None, 10, wide, context)
    search.faster = {
        name: [Timed(slow, 100.0, 80.0, True), Timed(fast, 100.0, 30.0, True)]
        for name in (first, second)
    }
    search.losses = {
        first: {str(slow): 0.01, str(fast): 0.04},
        second: {str(slow): 0.01, str(fast): 0.06},
    }
    assert search._solve(0.05) == {first: str(fast), second: str(slow)}
    assert search._solve(0.02) == {first: str(slow), second: str(slow)}
    assert search._solve(0.005) == {}


def test_a_speed_up_is_reached_with_the_least_error(wide: Model, times: Path) -> None:
    x = wide.example(16)["x"]
    done = low_rank(
        wide, TARGET, data=x, cache=times, methods=("channel_svd",), speedup=1.05, seconds=10
    )
    details = done.history[-1].details
    assert details["applied"] == 1
    assert details["error"] < 1e-6


def test_options_that_make_no_sense_are_refused(wide: Model) -> None:
    for given in (
        {"methods": ()},
        {"methods": ("svd",)},
        {"max_error": 0},
        {"speedup": 0.9},
        {"seconds": -1},
    ):
        with pytest.raises(UsageError):
            LowRank(**given)  # type: ignore[arg-type]
    away = create_target("ort-mobile")
    with pytest.raises(UnsupportedError, match="nothing can be timed for ort-mobile"):
        LowRank().check(wide, away)
    LowRank().check(wide, NullTarget())


def test_a_recipe_can_name_it() -> None:
    assert create_pass("low_rank", methods=["channel_svd"]) == LowRank(methods=("channel_svd",))


class TestLowRank(PassContract):
    step = LowRank(methods=("channel_svd",), seconds=2)
    target = TARGET

    @pytest.fixture(autouse=True)
    def _model(self, wide: Model, times: Path) -> None:
        self.wide, self.cache = wide, times

    def model(self) -> Model:
        return dataclasses.replace(self.wide, program=self.wide.graph_model.clone())

    def context(self, model: Model) -> Context:
        return Context(target=self.target, original=self.wide, cache=self.cache)
