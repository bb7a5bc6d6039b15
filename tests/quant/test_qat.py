from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from compress.data import Batch, load_data
from compress.errors import DataError, UnsupportedError, UsageError
from compress.export import to_onnx
from compress.model import Model, TensorSpec
from compress.passes import Context
from compress.progress import silent
from compress.recipe import default_passes
from compress.registry import create_target
from compress.rewrites import output_statistics
from compress.teaching import distillation
from compress.testing import IMAGE, NullTarget, PassContract, tiny_convnet, tiny_model
from compress.torch_graph.network import Network
from compress.training import Limits, Samples, Score, rate_factor, train
from quant.correct import CorrectBias
from quant.emit import integer_limits
from quant.fake import expand
from quant.learned import LearnedScale, range_scale, shared_tensors
from quant.plan import QuantPlan
from quant.ptq import Quantize
from quant.qat import QAT, teacher_graph
from quant.quantizer import qparams_from_range, weight_qparams
from quant.refine import emitted, state_of
from quant.simulation import Simulation
from quant.spec import QuantSpec
from quant.trainee import EPSILON, Trainee

TARGET = create_target("onnxruntime", threads=1)
GATED = """g (float[batch,3,8,8] x) => (float[batch,4] y) {
    [conv] c = Conv<pads=[1,1,1,1]>(x, w, b)
    [swish] s = HardSwish(c)
    [second] d = Conv(s, v, e)
    [gate] h = HardSigmoid<alpha=0.16666667, beta=0.5>(d)
    [mul] m = Mul(s, h)
    [third] t = Conv(m, u, f)
    [clip] r = Clip(t, low, high)
    [pool] p = GlobalAveragePool(r)
    [flatten] q = Flatten(p)
    [fc] y = Gemm(q, g, i)
}"""


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def images(count: int = 64) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((count, 3, 16, 16)).astype(np.float32)


def convnet() -> nn.Module:
    """The tiny network; the statistics of its BatchNorm are those of the images."""
    net = tiny_convnet()
    net[3].p = 0.0
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None
    with torch.no_grad():
        net.train()(torch.from_numpy(images(256)))
    return net.eval()


@pytest.fixture(scope="module")
def folded() -> Model:
    """The network after the free rewrites."""
    original = Model(convnet(), (IMAGE,), "tiny")
    model = to_onnx(original, TARGET.capabilities.opset)
    context = Context(target=TARGET, original=original)
    for step in itertools.takewhile(lambda step: step.name != "quantize", default_passes()):
        model = step.apply(model, context)
    return model


def context_of(model: Model, x: np.ndarray, classes: int = 0) -> Context:
    y = np.random.default_rng(1).integers(0, classes or 1, len(x))
    data = load_data((x, y) if classes else x, model.inputs)
    return Context(target=TARGET, original=model, calibration=data, training=data)


@pytest.fixture(scope="module")
def quantized(folded: Model) -> Model:
    return Quantize(samples=32).apply(folded, context_of(folded, images()))


@pytest.fixture(scope="module")
def narrow(folded: Model) -> Model:
    step = Quantize(bits=3, edge_bits=3, simulate=True, samples=32)
    return step.apply(folded, context_of(folded, images()))


def worsened(model: Model) -> Model:
    """The same with scales that training will make smaller, except those that operators dictate."""
    state = state_of(model, "test")
    trainee = trainee_of(model)
    for scale, _ in trainee.learned:
        for parameter in scale.parameters.values():
            parameter.data += math.log(20)
    trainee.restrain()
    worse = dataclasses.replace(state, plan=trainee.folded().plan)
    return emitted(model, worse, "worsen", {}, {})


class TestContract(PassContract):
    step = QAT(steps=2, batch=16)
    target = TARGET

    def model(self) -> Model:
        return self._quantized

    def context(self, model: Model) -> Context:
        return context_of(model, images())

    @pytest.fixture(autouse=True)
    def _share(self, quantized: Model) -> None:
        self._quantized = quantized


def trainee_of(model: Model, **options: Any) -> Trainee:
    state = state_of(model, "test")
    network = Network(state.graph_model)
    statistics = output_statistics(model)
    return Trainee(network, state.plan, statistics, float_biases=state.emulated, **options)


def run(simulation: Simulation, x: np.ndarray | Tensor) -> Tensor:
    """The first output; a trainee's numbers are computed anew."""
    if isinstance(simulation, Trainee):
        simulation.refresh()
    return next(iter(simulation.run({"x": torch.as_tensor(x)}).values()))


def convbn_of(trainee: Trainee) -> tuple[nn.Module, dict[str, tuple[nn.Conv2d, nn.BatchNorm2d]]]:
    """The torch network with the trainee's weights and BatchNorm, and these layers by name."""
    net = convnet()
    block = net[4]
    layers = {
        "0": (net[0], net[1]),
        "4.depthwise": (block.depthwise, block.bn1),
        "4.pointwise": (block.pointwise, block.bn2),
    }
    for step in trainee.network.steps:
        if step.name in layers:
            (conv, norm), mine = layers[step.name], trainee.norms[step.inputs[1]]
            conv.bias = None
            conv.weight.data = trainee.weights[step.inputs[1]].detach().clone()
            norm.weight.data, norm.bias.data = (
                mine.gamma.detach().clone(),
                mine.beta.detach().clone(),
            )
            norm.running_mean, norm.running_var = mine.mean.clone(), mine.variance.clone()
            norm.momentum = 0.1
    return net, layers


def test_without_quantization_it_is_batchnorm_in_training_mode(folded: Model) -> None:
    trainee = Trainee(Network(folded.graph_model), QuantPlan(), output_statistics(folded))
    net, layers = convbn_of(trainee)
    got, expected = run(trainee, images(16)), net.train()(torch.from_numpy(images(16)))
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    weights = torch.randn(10, generator=torch.Generator().manual_seed(0))
    (got @ weights).square().mean().backward()
    (expected @ weights).square().mean().backward()
    compared = 0
    for step in trainee.network.steps:
        if step.name in layers:
            conv, norm = layers[step.name]
            mine, weight = trainee.norms[step.inputs[1]], trainee.weights[step.inputs[1]]
            for first, second in (
                (weight.grad, conv.weight.grad),
                (mine.gamma.grad, norm.weight.grad),
                (mine.beta.grad, norm.bias.grad),
                (mine.mean, norm.running_mean),
                (mine.variance, norm.running_var),
            ):
                torch.testing.assert_close(first, second, atol=1e-5, rtol=1e-4)
                compared += 1
    assert compared == 15


@torch.no_grad()
def test_frozen_it_is_batchnorm_in_evaluation_mode(folded: Model) -> None:
    trainee = Trainee(Network(folded.graph_model), QuantPlan(), output_statistics(folded))
    x = torch.from_numpy(images(16))
    trainee.frozen = True
    start = run(trainee, x)
    torch.testing.assert_close(start, convnet()(x), atol=1e-5, rtol=1e-4)
    trainee.frozen = False
    for _ in range(3):
        run(trainee, 2 * x + 1)
    trainee.frozen = True
    moved = run(trainee, x)
    torch.testing.assert_close(moved, convbn_of(trainee)[0].eval()(x), atol=1e-5, rtol=1e-4)
    assert (moved - start).abs().max() > 0.01


@pytest.mark.parametrize("granularity", ["per_channel", "per_tensor", "per_group"])
@torch.no_grad()
def test_the_correction_is_that_of_the_whitepaper(
    onnx_model: Callable[..., Model], granularity: Any
) -> None:
    rng = np.random.default_rng(3)
    text = "g (float[batch,4,9,9] x) => (float[batch,6,9,9] y) "
    text += "{[conv] y = Conv<pads=[1,1,1,1]>(x, w, b)}"
    model = onnx_model(text, w=(6, 4, 3, 3), b=(6,))
    network = Network(model.graph_model)
    weight, x = network.constants["w"], torch.tensor(rng.normal(size=(8, 4, 9, 9))).float()
    group = 2 if granularity == "per_group" else None
    spec = QuantSpec("int4", granularity=granularity, group=group)
    axis = {"per_channel": 0, "per_tensor": None, "per_group": 1}[granularity]
    params = weight_qparams(weight.numpy(), spec, axis)
    plan = QuantPlan({"conv": "matmul"}, {}, {"w": params})
    trainee = Trainee(network, plan, {"conv": (rng.normal(size=6), rng.uniform(0.5, 2, 6))})
    norm = trainee.norms["w"]
    norm.gamma.mul_(torch.linspace(0.8, 1.3, 6))
    before, factor = norm.mean.clone(), norm.factor()
    running = (norm.variance + EPSILON).sqrt()
    got = run(trainee, x)
    # y = conv(x, Q(gamma W / s_run)) s_run / s_batch + beta - gamma m_batch / s_batch, with the
    # statistics of the quantized convolution divided by gamma / s_run.
    steps = expand(torch.tensor(params.scale), 4, axis, group)
    steps = steps if granularity == "per_tensor" else steps * factor.reshape(-1, 1, 1, 1)
    kernel = weight * factor.reshape(-1, 1, 1, 1)
    u = F.conv2d(x, (kernel / steps).round().clamp(-8, 7) * steps, padding=1)
    z = u / factor.reshape(1, -1, 1, 1)
    mean, deviation = z.mean((0, 2, 3)), (z.var((0, 2, 3), correction=0) + EPSILON).sqrt()
    shift = norm.beta - norm.gamma * mean / deviation
    expected = u * (running / deviation).reshape(-1, 1, 1) + shift.reshape(-1, 1, 1)
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(norm.mean, 0.9 * before + 0.1 * mean, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("scales", ["lsq", "minmax"])
@pytest.mark.parametrize("per_channel", [True, False], ids=["per_channel", "per_tensor"])
@torch.no_grad()
def test_what_is_folded_equals_what_was_trained(
    folded: Model, scales: str, per_channel: bool
) -> None:
    context = context_of(folded, images())
    model = Quantize(samples=32, per_channel=per_channel).apply(folded, context)
    trainee = trainee_of(model, scales=scales)
    generator = torch.Generator().manual_seed(0)
    for parameter in itertools.chain(*trainee.parameters()):
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.add_(noise * 0.05 * parameter.abs().mean().clamp_min(0.1))
    run(trainee, images(32))
    trainee.frozen = True
    expected = run(trainee, images(32))
    got = run(trainee.folded().simulated(trainee.network), images(32))
    # A weight at the middle between two integers may fall to the other side.
    assert (got - expected).abs().max() < 0.02 * expected.abs().max()
    assert (got - expected).abs().mean() < 1e-3 * expected.abs().mean()


def test_training_lowers_the_loss_and_the_emitted_model_agrees(narrow: Model) -> None:
    context = context_of(narrow, images(160))
    done = QAT(steps=60, batch=32, learning_rate=1e-3).apply(narrow, context)
    details = done.history[-1].details
    assert details["steps"] == 60
    assert details["samples"] == 152
    assert details["normalized"] == 3
    assert details["last_loss"] < 0.8 * details["first_loss"]
    assert details["held_out"]["measure"] == "agreement with float"
    assert details["held_out"]["samples"] == 8
    assert details["held_out"]["after"] >= details["held_out"]["before"]
    assert details["agreement"] >= 0.99
    assert details["largest_difference"] < 0.01


def test_in_eight_bits_the_runtime_agrees_with_the_simulation(quantized: Model) -> None:
    context = context_of(quantized, images(640), classes=10)
    step = QAT(steps=10, batch=64, scales="minmax", augment="flip", alpha=0.5)
    done = step.apply(worsened(quantized), context)
    details = done.history[-1].details
    assert details["held_out"]["measure"] == "top-1"
    assert details["held_out"]["samples"] == 32
    assert details["held_out"]["after"] >= details["held_out"]["before"]
    assert state_of(done, "test").plan.constants != state_of(quantized, "test").plan.constants
    assert details["agreement"] >= 0.99
    assert details["largest_difference"] < 0.02
    kernels = [
        [kernel.op_type for kernel in TARGET.build(model).kernels()] for model in (quantized, done)
    ]
    assert kernels[0] == kernels[1]


def test_tensors_that_share_a_scale_still_do(quantized: Model) -> None:
    start = worsened(quantized)
    done = QAT(steps=10, batch=16).apply(start, context_of(quantized, images()))
    before, after = state_of(start, "test").plan, state_of(done, "test").plan
    assert [len(names) for names in shared_tensors(after)] == [
        len(names) for names in shared_tensors(before)
    ]
    assert max(len(names) for names in shared_tensors(after)) > 1
    changed = [n for n, p in before.activations.items() if p != after.activations[n]]
    assert set(changed) == set(before.activations)
    for name, params in before.activations.items():
        assert params.zero_point == after.activations[name].zero_point
    assert before.roles == after.roles


def gated(onnx_model: Callable[..., Model]) -> Model:
    weights = {"w": (8, 3, 3, 3), "v": (8, 8, 1, 1), "u": (8, 8, 1, 1), "g": (8, 4)}
    limits = {"low": np.float32(0), "high": np.float32(0.5)}
    model = onnx_model(GATED, **weights, **limits, b=(8,), e=(8,), f=(8,), i=(4,))
    x = np.random.default_rng(0).standard_normal((64, 3, 8, 8)).astype(np.float32)
    return Quantize(samples=32, method="minmax").apply(model, context_of(model, x))


def test_scales_that_an_operator_dictates_stay(onnx_model: Callable[..., Model]) -> None:
    model = gated(onnx_model)
    x = np.random.default_rng(0).standard_normal((64, 3, 8, 8)).astype(np.float32)
    step = QAT(steps=10, batch=16, scale_learning_rate=0.03)
    start = worsened(model)
    done = step.apply(start, context_of(model, x))
    before, after = state_of(start, "test").plan, state_of(done, "test").plan
    assert before.roles["swish"] == before.roles["gate"] == "unary"
    same = {n for n, p in before.activations.items() if p == after.activations[n]}
    assert {"c", "d", "h"} <= same
    assert same.isdisjoint({"x", "s", "m"})


def test_a_scale_never_costs_a_clip(onnx_model: Callable[..., Model]) -> None:
    model = gated(onnx_model)
    trainee = trainee_of(model)
    plan = trainee.plan
    assert plan.roles["clip"] == "activation"
    assert integer_limits((0.0, 0.5), plan.activations["r"]) is None
    ((scale, _),) = [pair for pair in trainee.learned if "r" in pair[1]]
    for parameter in scale.parameters.values():
        parameter.data += 3.0
    trainee.restrain()
    wide = trainee.folded().plan.activations["r"]
    assert integer_limits((0.0, 0.5), wide) is None
    assert wide.scale > plan.activations["r"].scale
    above = dataclasses.replace(wide, scale=wide.scale * 1.01)
    assert integer_limits((0.0, 0.5), above) is not None


def test_a_scale_keeps_what_it_learned_for_each_format() -> None:
    options = [
        qparams_from_range(0.0, 6.0, QuantSpec(d, symmetric=False)) for d in ("uint8", "uint4")
    ]
    scale = LearnedScale(*options)
    optimizer = torch.optim.SGD(scale.parameters.values(), lr=0.1)
    for dtype, target in itertools.islice(itertools.cycle((("uint8", 0.01), ("uint4", 0.5))), 400):
        optimizer.zero_grad()
        (scale.value(dtype).log() - math.log(target)).square().backward()
        optimizer.step()
    assert scale.qparams("uint8").scale == pytest.approx(0.01, rel=1e-3)
    assert scale.qparams("uint4").scale == pytest.approx(0.5, rel=1e-3)
    assert scale.qparams("uint4").spec == options[1].spec


@settings(max_examples=20)
@given(
    seed=st.integers(0, 2**16),
    layout=st.sampled_from(
        [("per_tensor", None, None), ("per_channel", 1, None), ("per_group", 0, 4)]
    ),
    dtype=st.sampled_from(["int8", "int4", "int2"]),
    power_of_two=st.booleans(),
)
def test_followed_scales_are_those_of_the_quantizer(
    seed: int, layout: tuple[Any, int | None, int | None], dtype: Any, power_of_two: bool
) -> None:
    granularity, axis, group = layout
    weight = np.random.default_rng(seed).normal(size=(8, 6)).astype(np.float32)
    spec = QuantSpec(dtype, granularity=granularity, group=group, power_of_two=power_of_two)
    params = weight_qparams(weight, spec, axis)
    twice = dataclasses.replace(params, scale=params.scale * 2)
    np.testing.assert_allclose(
        range_scale(torch.from_numpy(weight), twice), params.scale, rtol=1e-6
    )


def test_the_time_limit_holds_and_completes_the_schedule(quantized: Model) -> None:
    step = QAT(steps=100_000, batch=16, seconds=1.5)
    details = step.apply(quantized, context_of(quantized, images())).history[-1].details
    assert 1.5 <= details["seconds"] < 3
    assert 0 < details["steps"] < 100_000
    assert details["stopped"] == "after 1.5 seconds"


def test_a_training_that_diverges_says_so(quantized: Model) -> None:
    step = QAT(steps=8, batch=16, learning_rate=1e30, scale_learning_rate=1e30)
    with pytest.raises(UsageError, match="Training failed: loss or gradient is not finite in step"):
        step.apply(quantized, context_of(quantized, images()))


class Slope:
    """Moves a number down by its gradient; its loss is NaN from some step on."""

    def __init__(self, fails_at: int) -> None:
        self.number, self.steps, self.fails_at = nn.Parameter(torch.tensor(1.0)), 0, fails_at

    def groups(self) -> list[dict[str, Any]]:
        return [{"params": [self.number], "lr": 0.01}]

    def begin(self, progress: float) -> None:
        self.steps += 1

    def loss(self, batch: Batch) -> Tensor:
        return self.number * (math.nan if self.steps >= self.fails_at else 1.0)

    def end(self) -> None:
        pass

    def score(self) -> Score:
        return -self.number.item(), 0.0

    def state(self) -> float:
        return self.number.item()


def test_what_was_best_before_a_divergence_is_kept() -> None:
    batches = itertools.repeat(Batch({"x": np.zeros(1)}))
    outcome = train(Slope(fails_at=8), batches, Limits(20, None, between=3), silent)
    assert outcome.stopped == "loss or gradient is not finite in step 8"
    assert len(outcome.losses) == 7
    assert outcome.best == -outcome.after[0] < 1.0 == -outcome.before[0]


def test_the_best_state_need_not_be_the_last() -> None:
    class Bowl(Slope):
        def score(self) -> Score:
            return -abs(self.number.item() - 0.95), 0.0

    batches = itertools.repeat(Batch({"x": np.zeros(1)}))
    outcome = train(Bowl(fails_at=10**9), batches, Limits(60, None, between=1), silent)
    assert outcome.best == pytest.approx(0.95, abs=0.006)
    assert outcome.losses[-1] < 0.8


def test_the_rate_rises_and_falls() -> None:
    factors = [rate_factor(step, 100, step / 100) for step in range(100)]
    assert factors[0] == pytest.approx(0.2)
    assert np.argmax(factors) == 4
    assert all(a > b for a, b in itertools.pairwise(factors[4:]))
    assert factors[-1] < 1e-3


def test_what_is_held_out_is_never_trained_on(folded: Model) -> None:
    x = np.arange(50, dtype=np.float32).repeat(3 * 16 * 16).reshape(50, 3, 16, 16)
    samples = Samples(load_data((x, np.arange(50)), folded.inputs), seed=1)
    held = samples.held
    trained: list[int] = []
    orders = []
    for batch in itertools.islice(samples.batches(12), 8):
        assert batch.labels is not None
        np.testing.assert_array_equal(batch.inputs["x"][:, 0, 0, 0], batch.labels)
        orders.append(batch.labels.tolist())
        trained += orders[-1]
    assert held.labels is not None
    assert samples.count == 48
    assert len(held) == 2
    assert sorted([*trained[:48], *held.labels]) == list(range(50))
    assert set(trained) == set(trained[:48])
    assert orders[0] != orders[4]


def test_samples_that_do_not_fit_into_memory_are_all_seen(
    folded: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("compress.training.POOL_BYTES", 30 * 3 * 16 * 16 * 4)
    monkeypatch.setattr("compress.training.SMALLEST_POOL", 1)
    x = np.arange(80, dtype=np.float32).repeat(3 * 16 * 16).reshape(80, 3, 16, 16)
    samples = Samples(load_data((x, np.arange(80)), folded.inputs), seed=1)
    held = set(samples.held.labels.tolist())
    assert len(held) == 4
    assert max(held) < 30
    batches = list(itertools.islice(samples.batches(4), 400))
    assert {int(label) for batch in batches for label in batch.labels} == set(range(80)) - held


@settings(max_examples=10)
@given(seed=st.integers(0, 2**16), temperature=st.floats(0.5, 20))
def test_distillation_is_the_scaled_divergence(seed: int, temperature: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    student, teacher = torch.randn(2, 5, 7, generator=generator, dtype=torch.float64)
    p, q = (torch.softmax(z / temperature, 1) for z in (teacher, student))
    expected = temperature**2 * (p * (p / q).log()).sum(1).mean()
    torch.testing.assert_close(distillation(student, teacher, temperature), expected)
    assert float(distillation(teacher, teacher, temperature)) == pytest.approx(0, abs=1e-12)


def test_a_network_without_classes_learns_its_outputs(onnx_model: Callable[..., Model]) -> None:
    text = "g (float[batch,3,8,8] x) => (float[batch,4,8,8] y) {"
    text += "[a] c = Conv<pads=[1,1,1,1]>(x, w, b) [r] d = Relu(c) [e] y = Conv(d, v, u)}"
    model = onnx_model(text, w=(8, 3, 3, 3), b=(8,), v=(4, 8, 1, 1), u=(4,))
    x = np.random.default_rng(0).standard_normal((80, 3, 8, 8)).astype(np.float32)
    context = context_of(model, x)
    start = Quantize(bits=3, edge_bits=3, simulate=True, samples=32).apply(model, context)
    step = QAT(steps=20, batch=16, learning_rate=5e-3, scale_learning_rate=5e-3)
    details = step.apply(start, context).history[-1].details
    assert details["held_out"]["measure"] == "negative relative squared error"
    assert details["held_out"]["after"] > details["held_out"]["before"]
    assert "agreement" not in details
    assert details["normalized"] == 0


def test_a_fixed_batch_is_trained_in_parts(onnx_model: Callable[..., Model]) -> None:
    text = "g (float[4,3,8,8] x) => (float[4,5] y) {[a] c = Conv(x, w, b) [p] d = "
    text += "GlobalAveragePool(c) [f] e = Flatten(d) [l] y = Gemm(e, v, u)}"
    model = onnx_model(text, w=(8, 3, 3, 3), b=(8,), v=(8, 5), u=(5,))
    x = np.random.default_rng(0).standard_normal((42, 3, 8, 8)).astype(np.float32)
    start = Quantize(samples=8).apply(model, context_of(model, x))
    details = QAT(epochs=2, batch=8).apply(start, context_of(model, x)).history[-1].details
    assert details["steps"] == 10
    assert details["held_out"]["samples"] == 2
    with pytest.raises(DataError, match="no 4 samples for one batch: 2 are there to train on"):
        QAT().apply(start, context_of(model, x[:3]))


def test_statistics_of_the_trained_network_are_recorded(quantized: Model) -> None:
    start = worsened(quantized)
    done = QAT(steps=10, batch=32).apply(start, context_of(quantized, images()))
    before, after = output_statistics(start), output_statistics(done)
    assert before.keys() == after.keys()
    assert all(not np.array_equal(before[n][0], after[n][0]) for n in before)
    _, deviations = after["0"]
    np.testing.assert_allclose(deviations, before["0"][1], rtol=0.1)


def test_the_teacher_is_the_network_before_corrections(folded: Model, quantized: Model) -> None:
    corrected = CorrectBias(samples=32).apply(quantized, context_of(folded, images()))
    twice = QAT(steps=1).apply(corrected, context_of(folded, images()))
    start = state_of(quantized, "test").graph_model
    assert state_of(corrected, "test").graph_model is not start
    assert teacher_graph(corrected) is start
    assert teacher_graph(twice) is start


def test_without_data_it_says_what_to_give(quantized: Model) -> None:
    with pytest.raises(UsageError, match=r"trains, and there are no data\. Give --train"):
        QAT().apply(quantized, Context(target=TARGET, original=tiny_model()))


def test_labels_that_are_no_classes(quantized: Model) -> None:
    with pytest.raises(DataError, match=r"have the label 1\d, and the model has 10 classes"):
        QAT(steps=1).apply(quantized, context_of(quantized, images(), classes=20))


def test_it_stands_behind_quantize(folded: Model) -> None:
    with pytest.raises(UsageError, match="before it stands"):
        QAT().apply(folded, context_of(folded, images()))


def test_a_model_without_a_batch_is_refused() -> None:
    model = Model(nn.Identity(), (TensorSpec("x", (3, 4)), TensorSpec("state", (2, 1, 8))), "vad")
    with pytest.raises(UnsupportedError, match="axis 0 of its inputs is not the batch"):
        QAT().check(model, NullTarget())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, "epochs is 0, not above 0"),
        ({"steps": 0}, "steps is 0, not above 0"),
        ({"freeze_at": 1.5}, "freeze_at is 1.5, not within 0 and 1"),
        ({"scales": "mse"}, "scales is 'mse', not one of lsq, minmax"),
        ({"augment": "crop"}, "augment is 'crop', not one of none, flip"),
    ],
    ids=["epochs", "steps", "freeze_at", "scales", "augment"],
)
def test_options_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        QAT(**options)
