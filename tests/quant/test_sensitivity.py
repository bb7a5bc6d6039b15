from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr

from compress.data import Data, load_data
from compress.errors import DataError, UnsupportedError, UsageError
from compress.model import Model
from compress.passes import Context
from compress.recipe import default_passes
from compress.registry import create_target
from compress.testing import tiny_exported
from compress.torch_graph.network import Network, to_torch
from quant import curvature, perturbation
from quant.curvature import hessian_traces
from quant.decisions import Decision, Option, Side, decide, decisions, in_format, rounded, uniform
from quant.perturbation import boundary, perturbed
from quant.plan import QuantPlan
from quant.ptq import Quantize
from quant.sensitivity import OPTIONS, Metric, Sensitivity, measure_sensitivity
from quant.simulation import Simulation
from quant.spec import FORMATS, QuantSpec

TARGET = create_target("onnxruntime", threads=1)
torch.set_num_threads(1)

RESIDUAL = """g (float[batch,3,8,8] x) => (float[batch,5] y, float[batch,12,4,4] z) {
    [stem] a = Conv<pads=[1,1,1,1]>(x, w1, b1)
    [r1] b = Relu(a)
    [left] c = Conv<pads=[1,1,1,1]>(b, w2)
    [r2] d = Relu(c)
    [right] e = Conv<pads=[1,1,1,1]>(d, w3)
    [add] f = Add(b, e)
    [r3] h = Relu(f)
    [low] i = Conv<strides=[2,2], pads=[1,1,1,1]>(h, w4)
    [pool] j = MaxPool<kernel_shape=[2,2], strides=[2,2]>(b)
    [cat] z = Concat<axis=1>(i, j)
    [mean] k = GlobalAveragePool(z)
    [flat] l = Flatten(k)
    [fc] y = Gemm<transB=1>(l, w5, b5)
}"""
WEIGHTS: dict[str, Any] = {
    "w1": (6, 3, 3, 3), "b1": (6,), "w2": (6, 6, 3, 3), "w3": (6, 6, 3, 3), "w4": (6, 6, 3, 3),
    "w5": (5, 12), "b5": (5,),
}  # fmt: skip
LINEAR = "g (float[batch,6] x) => (float[batch,4] y) {[fc] y = Gemm<transB=1>(x, w, b)}"


@pytest.fixture(scope="module")
def residual(onnx_model: Callable[..., Model]) -> tuple[Model, QuantPlan]:
    model = onnx_model(RESIDUAL, **WEIGHTS)
    return model, plan_of(model)


@pytest.fixture(scope="module")
def linear(onnx_model: Callable[..., Model]) -> tuple[Model, QuantPlan]:
    model = onnx_model(LINEAR, w=(4, 6), b=(4,))
    return model, plan_of(model, rows(64))


@pytest.fixture(scope="module")
def tiny() -> tuple[Model, QuantPlan]:
    model = tiny_exported(TARGET.capabilities.opset)
    context = Context(target=TARGET, original=model)
    for step in itertools.takewhile(lambda step: step.name != "quantize", default_passes()):
        model = step.apply(model, context)
    return model, plan_of(model, images(64, 16))


def plan_of(model: Model, x: np.ndarray | None = None, **options: Any) -> QuantPlan:
    data = load_data(images(64, 8) if x is None else x, model.inputs)
    context = Context(target=TARGET, original=model, calibration=data)
    details = Quantize(samples=64, **options).apply(model, context).history[-1].details
    return QuantPlan.from_dict(details["plan"])


def images(count: int, size: int = 8, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.standard_normal((count, 3, size, size)).astype(np.float32)


def rows(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, 6)).astype(np.float32)


def data_of(model: Model, count: int = 24, labels: int = 0, seed: int = 0) -> Data:
    x = images(count, int(model.inputs[0].shape[-1]), seed)
    if not labels:
        return load_data(x, model.inputs)
    y = np.random.default_rng(seed + 1).integers(0, labels, count)
    return load_data((x, y), model.inputs)


def restricted(plan: QuantPlan, chosen: list[tuple[Decision, str]]) -> QuantPlan:
    """The plan with nothing but these sites under these options."""
    roles, constants, activations = {}, {}, {}
    for site, option in chosen:
        roles[site.site] = plan.roles[site.site]
        if option in site.weights:
            constants[site.weight] = site.weights[option]
        activations.update(site.activations.get(option, {}))
        if site.side == "output":
            absorbed = ("activation", "epilogue")
            roles |= {n: r for n, r in plan.roles.items() if r in absorbed}
    return QuantPlan(roles, activations, constants)


def sites_of(
    model: Model,
    plan: QuantPlan,
    options: dict[str, Option] | None = None,
    side: Side = "output",
) -> tuple[Network, list[Decision]]:
    network = Network(model.graph_model)
    wanted = options or uniform("int8", "int4")
    return network, decide(model, network, plan, data_of(model), wanted, side=side)


@pytest.mark.parametrize("side", ["output", "input"])
@pytest.mark.parametrize("name", ["residual", "tiny"])
def test_the_suffix_gives_what_the_whole_simulation_gives(
    name: str, side: Side, request: pytest.FixtureRequest
) -> None:
    model, plan = request.getfixturevalue(name)
    options = {"weight": Option("int4", None), "activations": Option(None, "int4")}
    if side == "output":  # with both, the simulation rounds the bias of a site's input side
        options |= uniform("int8", "int4")
    network, sites = sites_of(model, plan, options, side)
    inputs = to_torch({"x": images(4, int(model.inputs[0].shape[-1]), seed=5)})
    wanted = network.outputs
    kept = network.run(inputs, boundary(network, sites) | set(wanted))
    assert len(sites) == sum(role == "matmul" for role in plan.roles.values())
    for site in sites:
        for option in site.options:
            params = site.weights.get(option)
            weight = rounded(network.constants[site.weight], params) if params else None
            activations = site.activations.get(option, {})
            found = perturbed(network, site, weight, activations, kept, wanted)
            expected = Simulation(network, restricted(plan, [(site, option)])).run(inputs)
            for tensor in wanted:
                torch.testing.assert_close(found[tensor], expected[tensor], rtol=0, atol=0)
            assert any(not torch.equal(found[tensor], kept[tensor]) for tensor in wanted)


def test_a_site_is_a_weight_with_the_tensor_behind_its_activation(
    residual: tuple[Model, QuantPlan],
) -> None:
    model, plan = residual
    found = {site.site: site for site in decisions(Network(model.graph_model), plan)}
    assert list(found) == ["stem", "left", "right", "low", "fc"]
    assert [(site.weight, site.tensors) for site in found.values()] == [
        ("w1", ("b",)), ("w2", ("d",)), ("w3", ("e",)), ("w4", ("i",)), ("w5", ()),
    ]  # fmt: skip
    steps = Network(model.graph_model).steps
    assert [steps[i].name for i in found["low"].suffix] == ["low", "cat", "mean", "flat", "fc"]


def test_a_site_is_a_weight_with_the_tensors_that_it_reads(
    residual: tuple[Model, QuantPlan], onnx_model: Callable[..., Model]
) -> None:
    model, plan = residual
    found = decisions(Network(model.graph_model), plan, "input")
    assert [site.tensors for site in found] == [("x",), ("b",), ("d",), ("h",), ("l",)]
    text = """g (float[batch,4,6] x) => (float[batch,4,4] y) {
        [t] z = Transpose<perm=[0,2,1]>(x) [product] p = MatMul(x, z) [last] y = MatMul(p, w)
    }"""
    model = onnx_model(text, w=(4, 4))
    x = np.random.default_rng(0).standard_normal((32, 4, 6)).astype(np.float32)
    plan = plan_of(model, x)
    product, last = decisions(Network(model.graph_model), plan, "input")
    assert (product.weight, product.tensors) == ("", ("x", "z"))
    assert (last.weight, last.tensors) == ("w", ("p",))


def test_only_what_the_suffixes_read_is_kept(residual: tuple[Model, QuantPlan]) -> None:
    model, plan = residual
    network = Network(model.graph_model)
    assert boundary(network, decisions(network, plan)) == {"x", "b", "d", "h", "j", "l"}


def test_options_keep_the_signs_and_the_granularity_of_the_plan() -> None:
    weight = QuantSpec("int8", reduced=True, granularity="per_channel")
    assert in_format(weight, "int8") is weight
    assert in_format(weight, "int4") == QuantSpec("int4", granularity="per_channel")
    activation = QuantSpec("uint8", symmetric=False)
    assert in_format(activation, "int6") == QuantSpec("uint6", symmetric=False)
    assert in_format(activation, "float8_e4m3fn") == QuantSpec("float8_e4m3fn")


def test_the_plans_own_parameters_are_used_where_it_has_the_format(
    residual: tuple[Model, QuantPlan],
) -> None:
    model, plan = residual
    _, sites = sites_of(model, plan, {"mixed": Option("int4", "int8"), "same": OPTIONS["int8"]})
    for site in sites:
        assert site.weights["same"] is plan.constants[site.weight]
        assert site.weights["mixed"].spec.dtype == "int4"
        for name in site.tensors:
            assert site.activations["mixed"][name] is plan.activations[name]


def test_tensors_that_share_a_scale_share_it_in_every_format(
    onnx_model: Callable[..., Model],
) -> None:
    text = """g (float[batch,3,8,8] x) => (float[batch,4,6,6] y) {
        [a] p = Conv(x, w) [b] q = Conv(x, v) [cat] r = Concat<axis=1>(p, q) [c] y = Conv(r, u)
    }"""
    large = 20 * np.random.default_rng(0).standard_normal((4, 3, 3, 3)).astype(np.float32)
    model = onnx_model(text, w=(4, 3, 3, 3), v=large, u=(4, 8, 1, 1))
    plan = plan_of(model)
    _, (first, second, _) = sites_of(model, plan)
    assert plan.activations["p"] == plan.activations["q"]
    assert first.activations["int4"]["p"] == second.activations["int4"]["q"]
    assert first.activations["int4"]["p"].spec.bits == 4


@pytest.mark.parametrize("name", ["residual", "tiny"])
def test_fewer_bits_hurt_more(name: str, request: pytest.FixtureRequest) -> None:
    model, plan = request.getfixturevalue(name)
    found = measure_sensitivity(model, plan, data_of(model, 48))
    means = {
        metric: [np.mean(list(found.losses(o, metric).values())) for o in ("int8", "int6", "int4")]
        for metric in ("kl", "mse", "sqnr")
    }
    for metric, values in means.items():
        assert values == sorted(values), metric
        assert values[0] < values[-1]
    assert means["kl"][0] > 0


@pytest.mark.parametrize("metric", ["kl", "mse", "sqnr", "fisher", "hutchinson"])
def test_a_layer_full_of_outliers_ranks_first(
    metric: Metric, onnx_model: Callable[..., Model]
) -> None:
    rng = np.random.default_rng(0)
    dead, whole = (rng.normal(0, 54**-0.5, (6, 6, 3, 3)).astype(np.float32) for _ in range(2))
    dead[0] = 0
    spoiled = whole.copy()
    spoiled[:, 0] = 20.0  # of a channel that is always 0; the step of the others becomes 1.3
    ranks = []
    for w3 in (whole, spoiled):
        model = onnx_model(RESIDUAL, **{**WEIGHTS, "w2": dead, "w3": w3})
        found = measure_sensitivity(
            model,
            plan_of(model),
            data_of(model, 16),
            options={"int5": Option("int5", None)},
            metrics=(metric,),
            rounds=4,
        )
        assert found.metric == metric
        ranks.append(found.ranked("int5").index("right"))
    assert ranks[0] > 0
    assert ranks[1] == 0


def test_output_metrics_are_those_of_their_definitions(linear: tuple[Model, QuantPlan]) -> None:
    model, plan = linear
    x, y = rows(40, seed=3), np.random.default_rng(4).integers(0, 4, 40)
    data = load_data((x, y), model.inputs)
    options = {"int3": Option("int3", "int3")}
    network = Network(model.graph_model)
    (site,) = decide(model, network, plan, data, options)
    w, b = network.constants["w"], network.constants["b"]
    before = torch.from_numpy(x) @ w.T + b
    after = torch.from_numpy(x) @ rounded(w, site.weights["int3"]).T + b
    assert site.tensors == (), "a last layer writes float"
    p, q = (torch.softmax(scores.double(), 1).numpy() for scores in (before, after))
    mse = float((after - before).square().sum() / before.square().sum())
    right = [(scores.numpy().argmax(1) == y).mean() for scores in (before, after)]
    for labelled in (data, load_data(x, model.inputs)):
        found = measure_sensitivity(model, plan, labelled, options=options).rows[0].values["int3"]
        assert found["kl"] == pytest.approx((p * np.log(p / q)).sum(1).mean(), rel=1e-5)
        assert found["mse"] == pytest.approx(mse, rel=1e-5)
        assert found["sqnr"] == pytest.approx(-10 * np.log10(mse), rel=1e-5)
        changed = float((p.argmax(1) != q.argmax(1)).mean())
        expected = right[0] - right[1] if labelled is data else changed
        assert found["accuracy"] == pytest.approx(expected, abs=1e-9)


def test_what_is_not_quantized_loses_nothing(linear: tuple[Model, QuantPlan]) -> None:
    model, plan = linear
    data = load_data(rows(8), model.inputs)
    options = {"none": Option(None, "int4")}
    found = measure_sensitivity(model, plan, data, options=options, metrics=("mse", "fisher"))
    assert found.rows[0].values["none"] == {
        "mse": 0.0, "sqnr": 200.0, "kl": 0.0, "accuracy": 0.0, "fisher": 0.0,
    }  # fmt: skip


def test_fisher_is_the_sum_of_squared_gradients_of_single_samples(
    linear: tuple[Model, QuantPlan],
) -> None:
    model, plan = linear
    x, y = rows(12, seed=3), np.random.default_rng(4).integers(0, 4, 12)
    data = load_data((x, y), model.inputs)
    options = {"int4": Option("int4", "int4")}
    network = Network(model.graph_model)
    (site,) = decide(model, network, plan, data, options)
    w, b = (network.constants[name].double().numpy() for name in ("w", "b"))
    scores = x @ w.T + b
    p = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
    slopes = (p - np.eye(4)[y])[:, :, None] * x[:, None]  # (N, classes, features)
    weight = network.constants["w"]
    step = (rounded(weight, site.weights["int4"]) - weight).double().numpy()
    expected = 0.5 * ((slopes**2).mean(0) * step**2).sum()
    found = measure_sensitivity(model, plan, data, options=options, metrics=("fisher",))
    assert found.losses("int4")["fc"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("side", ["output", "input"])
def test_fisher_counts_activations_as_well(side: Side, residual: tuple[Model, QuantPlan]) -> None:
    model, plan = residual
    options = {
        "both": Option("int4", "int4"), "weight": Option("int4", None), "out": Option(None, "int4"),
    }  # fmt: skip
    data = data_of(model, 6, labels=5)
    metrics: tuple[Metric, ...] = ("fisher",)
    found = measure_sensitivity(model, plan, data, options=options, metrics=metrics, side=side)
    for row in found.rows:
        figures = {name: values["fisher"] for name, values in row.values.items()}
        assert figures["both"] == pytest.approx(figures["weight"] + figures["out"], rel=1e-5)
        assert figures["weight"] > 0
        assert (figures["out"] > 0) == (row.site != "fc" or side == "input")


def test_fisher_of_an_input_is_that_of_its_reader(linear: tuple[Model, QuantPlan]) -> None:
    model, plan = linear
    x, y = rows(12, seed=3), np.random.default_rng(4).integers(0, 4, 12)
    data = load_data((x, y), model.inputs)
    options = {"int4": Option(None, "int4")}
    network = Network(model.graph_model)
    (site,) = decide(model, network, plan, data, options, side="input")
    w, b = (network.constants[name].double().numpy() for name in ("w", "b"))
    p = np.exp(x @ w.T + b)
    p /= p.sum(1, keepdims=True)
    slopes = (p - np.eye(4)[y]) @ w
    given = torch.from_numpy(x)
    step = (rounded(given, site.activations["int4"]["x"]) - given).double().numpy()
    expected = 0.5 * (slopes**2 * step**2).sum(1).mean()
    found = measure_sensitivity(
        model, plan, data, options=options, metrics=("fisher",), side="input"
    )
    assert found.losses("int4")["fc"] == pytest.approx(expected, rel=1e-4)


def test_fisher_of_a_fixed_batch_looks_at_single_samples_too(
    onnx_model: Callable[..., Model], linear: tuple[Model, QuantPlan]
) -> None:
    model, plan = linear
    fixed = onnx_model(LINEAR.replace("batch", "4"), w=(4, 6), b=(4,))
    x, y = rows(12, seed=3), np.random.default_rng(4).integers(0, 4, 12)
    first, second = (
        measure_sensitivity(m, plan, load_data((x, y), m.inputs), metrics=("fisher", "mse"))
        for m in (model, fixed)
    )
    for option in OPTIONS:
        assert first.losses(option) == pytest.approx(second.losses(option), rel=1e-5)


def quadratic(matrix: torch.Tensor, shape: tuple[int, ...]) -> tuple[torch.Tensor, Any]:
    leaf = torch.zeros(shape, requires_grad=True)

    def parts() -> Iterator[tuple[int, torch.Tensor]]:
        flat = leaf.reshape(-1)
        yield 3, 0.5 * flat @ (1.5 * matrix) @ flat + flat.sum()
        yield 1, 0.5 * flat @ (-0.5 * matrix) @ flat

    return leaf, parts


@settings(max_examples=15)
@given(st.integers(0, 2**31))
def test_hutchinson_finds_the_trace_of_a_quadratic(seed: int) -> None:
    factor = torch.randn(30, 12, generator=torch.Generator().manual_seed(seed))
    matrix = factor.T @ factor
    leaf, parts = quadratic(matrix, (3, 4))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(curvature, "TOLERANCE", 0.0)  # all rounds: stopping early picks the lucky
        trace = hessian_traces({"w": leaf}, parts, seed=seed, limit=200)["w"]
    assert trace.rounds == 200
    # Of signs v, Var(v' H v) = 2 sum of H_ij**2 off the diagonal; the two parts' probes differ.
    crossed = matrix - matrix.diag().diag()
    variance = 2 * float(crossed.square().sum()) * ((3 / 4 * 1.5) ** 2 + (1 / 4 * 0.5) ** 2)
    exact = float(matrix.trace())  # of the mean over samples, 3/4 * 1.5 - 1/4 * 0.5 = 1
    assert trace.value == pytest.approx(exact, abs=6 * (variance / 200) ** 0.5)
    assert trace.deviation == pytest.approx((variance / 200) ** 0.5, rel=0.5)


def test_hutchinson_ends_once_the_trace_is_known() -> None:
    factor = torch.randn(30, 12, generator=torch.Generator().manual_seed(0))
    leaf, parts = quadratic(factor.T @ factor, (3, 4))
    trace = hessian_traces({"w": leaf}, parts, limit=500)["w"]
    assert trace.settled
    assert 5 <= trace.rounds < 500


def test_hutchinson_is_exact_for_a_diagonal_and_leaves_out_other_blocks() -> None:
    one, two = (torch.ones(5, requires_grad=True) for _ in range(2))
    linear = torch.ones(2, requires_grad=True)
    unused = torch.ones(2, requires_grad=True)

    def parts() -> Iterator[tuple[int, torch.Tensor]]:
        yield 1, (one**3).sum() + 7 * (one.sum() * two.sum()) + linear.sum()

    tensors = {"one": one, "two": two, "linear": linear, "unused": unused}
    found = hessian_traces(tensors, parts)
    assert (found["one"].value, found["one"].deviation) == (30.0, 0.0)
    assert {found[name].value for name in ("two", "linear", "unused")} == {0.0}
    assert found["one"].rounds == 9


def test_hutchinson_stops_at_its_limit_and_says_so(residual: tuple[Model, QuantPlan]) -> None:
    model, plan = residual
    found = measure_sensitivity(
        model, plan, data_of(model, 8, labels=5), metrics=("hutchinson",), rounds=2
    )
    unsettled = [row.site for row in found.rows if row.trace and not row.trace.settled]
    assert {row.trace.rounds for row in found.rows if row.trace} == {2}
    assert found.notes[0].startswith(f"{len(unsettled)} of 5 Hessian traces")


def test_hutchinson_finds_the_hessian_of_a_linear_classifier(
    linear: tuple[Model, QuantPlan],
) -> None:
    model, plan = linear
    x, y = rows(40, seed=3), np.random.default_rng(4).integers(0, 4, 40)
    data = load_data((x, y), model.inputs)
    found = measure_sensitivity(model, plan, data, metrics=("hutchinson",), rounds=200)
    network = Network(model.graph_model)
    w, b = (network.constants[name].double().numpy() for name in ("w", "b"))
    p = np.exp(x @ w.T + b)
    p /= p.sum(1, keepdims=True)
    exact = ((p * (1 - p)).sum(1) * (x**2).sum(1)).mean()
    trace = found.rows[0].trace
    assert trace is not None
    assert trace.settled
    assert trace.value == pytest.approx(exact, abs=5 * trace.deviation)
    params = plan.constants["w"]
    step = (rounded(network.constants["w"], params) - network.constants["w"]).double().numpy()
    expected = trace.value / 24 * (step**2).sum()
    assert found.losses("int8")["fc"] == pytest.approx(expected, rel=1e-5)


def test_probes_depend_on_nothing_but_the_seed(residual: tuple[Model, QuantPlan]) -> None:
    model, plan = residual
    one, again, other = (
        measure_sensitivity(
            model, plan, data_of(model, 8), metrics=("hutchinson",), rounds=2, seed=seed
        )
        for seed in (0, 0, 1)
    )
    assert one == again
    assert one.losses("int4") != other.losses("int4")


def test_without_labels_the_models_own_choice_is_the_label(
    linear: tuple[Model, QuantPlan],
) -> None:
    model, plan = linear
    x = rows(12)
    network = Network(model.graph_model)
    chosen = network.run(to_torch({"x": x}))["y"].argmax(1).numpy()
    first, second = (
        measure_sensitivity(model, plan, load_data(data, model.inputs), metrics=("fisher",))
        for data in (x, (x, chosen))
    )
    assert first.losses("int4") == pytest.approx(second.losses("int4"))
    assert (first.labelled, second.labelled) == (False, True)


def test_a_final_softmax_is_looked_through(
    onnx_model: Callable[..., Model], linear: tuple[Model, QuantPlan]
) -> None:
    text = """g (float[batch,6] x) => (float[batch,4] p) {
        [fc] y = Gemm<transB=1>(x, w, b) [s] p = Softmax<axis=-1>(y)
    }"""
    model = onnx_model(text, w=(4, 6), b=(4,))
    plain, plan = linear
    data = load_data(rows(20), model.inputs)
    weight = {"int4": Option("int4", None)}
    metrics: tuple[Metric, ...] = ("kl", "fisher")
    first = measure_sensitivity(plain, plan, data, options=weight, metrics=metrics)
    second = measure_sensitivity(model, plan, data, options=weight, metrics=metrics)
    for metric in metrics:
        assert first.losses("int4", metric) == pytest.approx(second.losses("int4", metric))
    assert first.losses("int4", "mse") != second.losses("int4", "mse")


@pytest.fixture(scope="module")
def filters(onnx_model: Callable[..., Model]) -> tuple[Model, QuantPlan]:
    text = "g (float[batch,3,8,8] x) => (float[batch,4,6,6] y) {[a] y = Conv(x, w)}"
    model = onnx_model(text, w=(4, 3, 3, 3))
    return model, plan_of(model)


def test_outputs_that_are_no_classes_are_compared_by_mse(
    filters: tuple[Model, QuantPlan], tmp_path: Path
) -> None:
    model, plan = filters
    for _ in range(2):
        found = measure_sensitivity(model, plan, data_of(model, 8), cache=tmp_path)
        assert found.metric == "mse"
        assert "No output holds class scores" in found.notes[0]
        assert set(found.rows[0].values["int4"]) == {"mse", "sqnr"}
    with pytest.raises(UsageError, match="kl was not measured; there are mse, sqnr"):
        found.losses("int4", "kl")
    with pytest.raises(UnsupportedError, match="fisher needs a loss"):
        measure_sensitivity(model, plan, data_of(model, 8), metrics=("fisher",))


def test_memory_bounds_the_batch_and_not_the_result(
    residual: tuple[Model, QuantPlan], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, plan = residual
    data = data_of(model, 20, labels=5)
    seen: list[int] = []
    run = Network.run

    def counting(self: Network, inputs: Any, keep: Any = ()) -> Any:
        seen.append(len(inputs["x"]))
        return run(self, inputs, keep)

    monkeypatch.setattr(Network, "run", counting)
    whole = measure_sensitivity(model, plan, data)
    assert seen == [20]
    seen.clear()
    # x, b, d, h, j and l with the outputs y and z: 1,837 numbers a sample.
    monkeypatch.setattr(perturbation, "MEMORY_BYTES", 4 * 1837 * 7)
    parts = measure_sensitivity(model, plan, data)
    assert seen == [7, 7, 6]
    for option in OPTIONS:
        assert parts.losses(option) == pytest.approx(whole.losses(option), rel=1e-4)
        assert parts.losses(option, "accuracy") == whole.losses(option, "accuracy")


def test_the_second_time_figures_come_from_the_cache(
    residual: tuple[Model, QuantPlan], tmp_path: Path
) -> None:
    model, plan = residual
    passes: list[int] = []

    def batches() -> Iterator[np.ndarray]:
        passes.append(1)
        yield images(8)

    data = load_data(batches, model.inputs)
    metrics: tuple[Metric, ...] = ("kl", "fisher", "hutchinson")
    settings: dict[str, Any] = {"metrics": metrics, "rounds": 2, "cache": tmp_path}
    first = measure_sensitivity(model, plan, data, **settings)
    read = len(passes)
    assert measure_sensitivity(model, plan, data, **settings) == first
    assert len(passes) == read
    assert len(list(tmp_path.glob("sensitivity-*.json"))) == 3
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize("change", ["weights", "data", "options", "plan", "side"])
def test_the_cache_knows_what_it_was_made_from(
    change: str,
    residual: tuple[Model, QuantPlan],
    tmp_path: Path,
    onnx_model: Callable[..., Model],
) -> None:
    model, plan = residual
    data, options = data_of(model, 8), dict(OPTIONS)
    before = measure_sensitivity(model, plan, data, cache=tmp_path)
    if change == "weights":
        model = onnx_model(RESIDUAL, **{**WEIGHTS, "w1": np.ones((6, 3, 3, 3), np.float32)})
    elif change == "data":
        data = data_of(model, 8, seed=1)
    elif change == "options":
        options["int6"] = Option("int5", "int5")
    elif change == "plan":
        plan = plan_of(model, per_channel=False)
    side: Side = "input" if change == "side" else "output"
    after = measure_sensitivity(model, plan, data, options=options, side=side, cache=tmp_path)
    assert after == measure_sensitivity(model, plan, data, options=options, side=side)
    assert after != before


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: "",
        lambda text: text[:40],
        lambda text: "[]",
        lambda text: text.replace('"stem"', '"other"'),
        lambda text: text.replace('"kl"', '"k"'),
        lambda text: text.replace('"mse": ', '"mse": NaN, "old": '),
        lambda text: text.replace('"traces": {', '"traces": {"a": {}'),
    ],
    ids=["empty", "cut", "list", "other site", "other metric", "no number", "other trace"],
)
def test_a_damaged_cache_is_measured_again(
    damage: Callable[[str], str], residual: tuple[Model, QuantPlan], tmp_path: Path
) -> None:
    model, plan = residual
    data = data_of(model, 8)
    expected = measure_sensitivity(model, plan, data, cache=tmp_path)
    (file,) = tmp_path.glob("sensitivity-*.json")
    whole = file.read_text()
    assert damage(whole) != whole
    file.write_text(damage(whole))
    assert measure_sensitivity(model, plan, data, cache=tmp_path) == expected
    assert file.read_text() == whole


def test_a_cache_that_cannot_be_written_is_no_error(
    linear: tuple[Model, QuantPlan], tmp_path: Path
) -> None:
    model, plan = linear
    blocked = tmp_path / "file"
    blocked.write_text("")
    data = load_data(rows(8), model.inputs)
    assert measure_sensitivity(model, plan, data, cache=blocked / "cache").samples == 8


def test_a_sensitivity_survives_json(residual: tuple[Model, QuantPlan]) -> None:
    model, plan = residual
    data = data_of(model, 8)
    found = measure_sensitivity(model, plan, data, metrics=("hutchinson", "kl"), rounds=2)
    text = json.dumps(found.to_dict(), allow_nan=False)
    assert Sensitivity.from_dict(json.loads(text)) == found
    assert found.rows[0].trace is not None
    rows = found.report_rows()
    assert len(rows) == 5 * 3
    assert (rows[4]["name"], rows[4]["format"]) == ("left", "int6")
    assert next(iter(rows[4]["metrics"])) == "hutchinson"
    assert rows[4]["metrics"]["kl"] == found.losses("int6", "kl")["left"]
    assert (found.rows[0].op_type, found.rows[0].macs, found.rows[0].parameters) == (
        "Conv", 6 * 64 * 27, 6 * 28,
    )  # fmt: skip


def test_ranks_go_from_the_most_sensitive_down(residual: tuple[Model, QuantPlan]) -> None:
    found = measure_sensitivity(*residual, data_of(residual[0], 8))
    ranked = [found.losses("int4")[site] for site in found.ranked("int4")]
    assert ranked == sorted(ranked, reverse=True)
    assert found.ranked("int4", "sqnr") == found.ranked("int4", "mse")
    level = dataclasses.replace(
        found, rows=tuple(dataclasses.replace(r, values={"int4": {"kl": 0.0}}) for r in found.rows)
    )
    assert level.ranked("int4") == ("stem", "left", "right", "low", "fc")


def test_a_network_that_overflows_has_finite_figures(onnx_model: Callable[..., Model]) -> None:
    text = """g (float[batch,6] x) => (float[batch,4] z) {
        [fc] y = Gemm<transB=1>(x, w, b) [m] v = Mul(y, c) [e] z = Exp(v)
    }"""
    model = onnx_model(text, w=(4, 6), b=(4,), c=np.float32(24))
    x = rows(30) / 10
    x[:, :1] += 1.2
    plan = plan_of(model, x)
    found = measure_sensitivity(
        model, plan, load_data(x, model.inputs), options={"int2": Option("int2", "int2")}
    )
    figures = found.rows[0].values["int2"]
    assert all(np.isfinite(list(figures.values())))
    assert figures["mse"] > 0


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"metrics": ("loss",)}, UsageError, "loss is not what .* choose at least one of kl"),
        ({"metrics": ()}, UsageError, "Nothing is not what"),
        ({"options": {}}, UsageError, "an option and a sample at least; got 0 and 128"),
        ({"samples": 0}, UsageError, "got 3 and 0"),
    ],
    ids=["metric", "no metric", "no option", "no sample"],
)
def test_settings_out_of_range(
    options: dict[str, Any],
    error: type[Exception],
    message: str,
    linear: tuple[Model, QuantPlan],
) -> None:
    model, plan = linear
    with pytest.raises(error, match=message):
        measure_sensitivity(model, plan, load_data(rows(8), model.inputs), **options)


def test_names_that_do_not_exist(linear: tuple[Model, QuantPlan]) -> None:
    model, plan = linear
    found = measure_sensitivity(model, plan, load_data(rows(8), model.inputs))
    with pytest.raises(UsageError, match="no option 'int2'; measured were int8, int6, int4"):
        found.losses("int2")
    with pytest.raises(UsageError, match="fisher was not measured; there are accuracy, kl"):
        found.ranked("int8", "fisher")
    with pytest.raises(UsageError, match="'int9' is not a format"):
        Option("int9", None)  # type: ignore[arg-type]


@pytest.mark.parametrize("metrics", [("kl",), ("fisher",)])
def test_labels_must_be_classes_of_the_model(
    metrics: tuple[Metric, ...], linear: tuple[Model, QuantPlan]
) -> None:
    model, plan = linear
    data = load_data((rows(8), np.full(8, 4)), model.inputs)
    with pytest.raises(DataError, match="labels from 4 to 4, and the model has 4 classes"):
        measure_sensitivity(model, plan, data, metrics=metrics)


def test_too_few_samples_for_a_fixed_batch(
    onnx_model: Callable[..., Model], linear: tuple[Model, QuantPlan]
) -> None:
    fixed = onnx_model(LINEAR.replace("batch", "4"), w=(4, 6), b=(4,))
    data = load_data(rows(3), fixed.inputs)
    with pytest.raises(DataError, match="hold 3 samples and the model takes batches of 4"):
        measure_sensitivity(fixed, linear[1], data)


def test_every_format_can_be_tried(linear: tuple[Model, QuantPlan]) -> None:
    model, plan = linear
    names = [name for name in FORMATS if not name.startswith("uint")]
    options = {name: Option(name, name) for name in names}  # type: ignore[arg-type]
    data = load_data(rows(8), model.inputs)
    found = measure_sensitivity(model, plan, data, options=options)
    mse = {name: found.losses(name, "mse")["fc"] for name in names}
    assert mse["float16"] < mse["bfloat16"] < mse["float8_e4m3fn"] < mse["float8_e5m2"]
    assert mse["float8_e5m2"] < mse["float4_e2m1"] < mse["int2"]


@pytest.mark.parametrize("side", ["output", "input"])
def test_sums_of_single_losses_rank_random_policies(
    side: Side, tiny: tuple[Model, QuantPlan]
) -> None:
    model, plan = tiny
    options = uniform("int8", "int5", "int4", "int3")
    network, sites = sites_of(model, plan, options, side)
    data = data_of(model, 64, seed=9)
    metrics: tuple[Metric, ...] = ("kl", "fisher")
    found = measure_sensitivity(model, plan, data, options=options, metrics=metrics, side=side)
    (batch,) = data.batches(64)
    inputs = to_torch(batch.inputs)
    (output,) = network.outputs
    before = torch.log_softmax(network.run(inputs)[output].double(), 1)
    rng = np.random.default_rng(0)
    joint, predicted = [], {metric: [] for metric in metrics}
    for _ in range(60):
        policy = [(site, str(rng.choice(list(options)))) for site in sites]
        simulation = Simulation(network, restricted(plan, policy))
        after = torch.log_softmax(simulation.run(inputs)[output].double(), 1)
        joint.append(float((before.exp() * (before - after)).sum(1).mean()))
        for metric in metrics:
            losses = [found.losses(o, metric)[site.site] for site, o in policy]
            predicted[metric].append(sum(losses))
    for metric in metrics:
        assert spearmanr(predicted[metric], joint).statistic > 0.9, metric


def test_a_plan_without_sites_has_no_rows(linear: tuple[Model, QuantPlan]) -> None:
    model, _ = linear
    data = load_data(rows(8), model.inputs)
    metrics: tuple[Metric, ...] = ("kl", "fisher", "hutchinson")
    found = measure_sensitivity(model, QuantPlan(), data, metrics=metrics)
    assert found.rows == ()
    assert found.ranked("int8") == ()


def test_products_of_activations_have_no_weight(onnx_model: Callable[..., Model]) -> None:
    text = """g (float[batch,4,6] x) => (float[batch,16] y) {
        [t] z = Transpose<perm=[0,2,1]>(x) [product] p = MatMul(x, z) [flat] y = Flatten(p)
    }"""
    model = onnx_model(text)
    x = np.random.default_rng(0).standard_normal((32, 4, 6)).astype(np.float32)
    plan, data = plan_of(model, x), load_data(x, model.inputs)
    metrics: tuple[Metric, ...] = ("kl", "fisher", "hutchinson")
    found = measure_sensitivity(model, plan, data, metrics=metrics, side="input")
    assert found.losses("int4", "kl")["product"] > found.losses("int8", "kl")["product"] > 0
    assert found.losses("int4", "fisher")["product"] > 0
    assert found.losses("int4", "hutchinson") == {"product": 0.0}
