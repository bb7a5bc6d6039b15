from __future__ import annotations

import dataclasses

import numpy as np
import onnx_ir as ir
import pytest
import torch

from compress.data import load_data
from compress.model import Model
from compress.passes import Context
from compress.recipe import default_passes
from compress.reference import reference_session, run
from compress.registry import create_target
from compress.rewrites import output_statistics
from compress.testing import tiny_exported
from compress.torch_graph.network import Network, to_torch
from quant.correct import CorrectBias, ReestimateBatchNorm, clip_behind, rectified_mean
from quant.emulate import emit_emulated
from quant.plan import QuantPlan
from quant.ptq import Quantize
from quant.quantizer import fake_quantize, qparams_from_range, quantize, weight_qparams
from quant.refine import emitted, state_of
from quant.simulation import Simulation
from quant.spec import QuantSpec
from quant.sweep import Layer, channel_moments, layers, sweep

IMAGES = np.random.default_rng(0).standard_normal((64, 3, 16, 16)).astype(np.float32)


@pytest.fixture(scope="module")
def context() -> Context:
    model = tiny_exported(21)
    data = load_data(IMAGES, model.inputs)
    target = create_target("onnxruntime", threads=1)
    return Context(target=target, original=model, calibration=data)


@pytest.fixture(scope="module")
def folded(context: Context) -> Model:
    model = context.original
    model = dataclasses.replace(model, program=model.graph_model.clone())
    for step in default_passes()[:-2]:
        model = step.apply(model, context)
    return model


@pytest.fixture(scope="module")
def quantized(folded: Model, context: Context) -> Model:
    return Quantize().apply(folded, context)


def outputs(model: Model) -> np.ndarray:
    return next(iter(run(reference_session(model.graph_model), {"x": IMAGES}).values()))


def simulated(model: Model) -> np.ndarray:
    state = state_of(model, "test")
    with torch.no_grad():
        found = Simulation.of(state).run(to_torch({"x": IMAGES}))
    return next(iter(found.values())).numpy()


def step_size(model: Model) -> float:
    """Of the logits' quantization; where they stay float, a 256th of their range."""
    state = state_of(model, "test")
    name = model.graph_model.graph.outputs[0].name or ""
    params = state.plan.activations.get(name)
    array = outputs(model)
    return float(params.scale) if params else float(np.ptp(array)) / 256


def test_the_simulation_computes_what_the_emitted_model_computes(quantized: Model) -> None:
    difference = np.abs(simulated(quantized) - outputs(quantized))
    # A value halfway between two integers may fall to either side; one step, rarely.
    assert difference.max() <= 2.1 * step_size(quantized)
    assert np.mean(difference > 0.1 * step_size(quantized)) < 0.05


def test_an_emulated_plan_computes_what_the_simulation_computes(quantized: Model) -> None:
    state = state_of(quantized, "test")
    emulated = run(
        reference_session(emit_emulated(state.graph_model, state.plan), optimize=True),
        {"x": IMAGES},
    )
    difference = np.abs(simulated(quantized) - next(iter(emulated.values())))
    assert np.mean(difference > 0.1 * step_size(quantized)) < 0.05
    assert difference.max() <= 2.1 * step_size(quantized)


@pytest.mark.parametrize(
    "dtype",
    ["int2", "int4", "uint6", "int16", "float8_e4m3fn", "float8_e5m2", "float4_e2m1", "bfloat16"],
)
def test_every_format_is_emulated_to_the_last_bit(dtype: str) -> None:
    x = ir.Value(name="x", shape=ir.Shape([4096]), type=ir.TensorType(ir.DataType.FLOAT))
    node = ir.node("Relu", [x], name="relu")
    out = node.outputs[0]
    out.name, out.shape, out.type = "y", x.shape, x.type
    graph = ir.Graph([x], [out], nodes=[node], opset_imports={"": 21}, name="one")
    spec = QuantSpec(dtype, symmetric=dtype != "uint6")  # type: ignore[arg-type]
    params = qparams_from_range(-3.0, 5.0, spec)
    plan = QuantPlan(roles={"relu": "unary"}, activations={"x": params})
    model = emit_emulated(ir.Model(graph, ir_version=10), plan)
    array = np.linspace(-7, 7, 4096, dtype=np.float32)
    got = run(reference_session(model, optimize=True), {"x": array})["y"]
    expected = np.maximum(fake_quantize(array, params), 0)
    assert len(np.unique(expected)) > 1
    np.testing.assert_array_equal(got, expected)


def test_layers_are_swept_in_order_and_see_what_was_changed_before(quantized: Model) -> None:
    state = state_of(quantized, "test")
    simulation = Simulation.of(state)
    names, first = [], None
    with torch.no_grad():
        reference = Network(state.reference)
        for layer, _, got in sweep(reference, simulation, to_torch({"x": IMAGES[:4]})):
            names.append(layer.step.name)
            if first is None:
                first = layer
                before = got.clone()
                bias = simulation.constant(layer.bias)
                simulation.replace(layer.bias, bias + 1.0)
            elif len(names) == 2:
                second = got.clone()
    assert names == [layer.step.name for layer in layers(simulation)]
    assert before.shape[0] == 4
    with torch.no_grad():
        fresh = Simulation.of(state)
        unchanged = [got for _, _, got in sweep(reference, fresh, to_torch({"x": IMAGES[:4]}))]
    assert torch.equal(unchanged[0], before)
    assert not torch.equal(unchanged[1], second)


def test_a_corrected_bias_restores_the_mean_of_every_channel(
    quantized: Model, context: Context
) -> None:
    coarse = coarsened(quantized, context)
    corrected = CorrectBias(samples=64).apply(coarse, context)
    state = state_of(corrected, "test")
    simulation = Simulation.of(state)
    before = state_of(coarse, "test")
    uncorrected = Simulation.of(before)
    with torch.no_grad():
        inputs = to_torch({"x": IMAGES})
        reference = Network(before.reference)
        after = [mean_gap(reference, *found) for found in sweep(reference, simulation, inputs)]
        gaps = [mean_gap(reference, *found) for found in sweep(reference, uncorrected, inputs)]
    assert max(gaps) > 0.02
    assert max(after) < 0.1 * max(gaps)
    assert corrected.history[-1].details["corrected"] == len(after)


def mean_gap(network: Network, layer: Layer, expected: torch.Tensor, got: torch.Tensor) -> float:
    """Behind the activation that follows."""
    bounds = clip_behind(network, layer)
    pair = (channel_moments(t.clamp(*bounds), layer.axis)[0] for t in (expected, got))
    first, second = pair
    return float((first - second).abs().max())


def coarsened(quantized: Model, context: Context) -> Model:
    """The same with weights of 3 bits, so that there is something to correct."""

    state = state_of(quantized, "test")
    network = Network(state.graph_model)
    constants = {
        name: weight_qparams(
            network.constants[name].numpy(), QuantSpec("int3", granularity="per_channel"), p.axis
        )
        if p.axis is not None
        else p
        for name, p in state.plan.constants.items()
    }
    plan = dataclasses.replace(state.plan, constants=constants)
    return emitted(quantized, dataclasses.replace(state, plan=plan), "coarsen", {}, {})


def test_reestimated_statistics_match_in_mean_and_deviation(
    quantized: Model, context: Context
) -> None:
    coarse = coarsened(quantized, context)
    found = ReestimateBatchNorm(samples=64).apply(coarse, context)
    normed = output_statistics(coarse)
    state = state_of(found, "test")
    simulation = Simulation.of(state)
    checked = 0
    with torch.no_grad():
        for layer, expected, got in sweep(
            Network(state.reference), simulation, to_torch({"x": IMAGES})
        ):
            if layer.step.name not in normed:
                continue
            checked += 1
            target, present = channel_moments(expected, 1), channel_moments(got, 1)
            torch.testing.assert_close(present[0], target[0], rtol=0.02, atol=0.02)
            torch.testing.assert_close(present[1], target[1], rtol=0.02, atol=0.02)
    assert checked >= 2


def test_reestimation_keeps_every_integer(quantized: Model, context: Context) -> None:
    found = ReestimateBatchNorm(samples=32).apply(quantized, context)
    before, after = state_of(quantized, "test"), state_of(found, "test")
    old, new = Network(before.graph_model), Network(after.graph_model)
    scaled = 0
    for name, params in after.plan.constants.items():
        one = quantize(old.constants[name].numpy(), before.plan.constants[name])
        other = quantize(new.constants[name].numpy(), params)
        # A weight halfway between two integers may fall to either side.
        assert np.mean(one != other) < 0.01
        scaled += int(not np.array_equal(params.scale, before.plan.constants[name].scale))
    assert scaled >= 2


@pytest.mark.parametrize(("low", "high"), [(0.0, np.inf), (0.0, 6.0), (-1.0, 2.0)])
def test_the_mean_of_a_clipped_normal_equals_that_of_samples(low: float, high: float) -> None:
    rng = np.random.default_rng(0)
    mean, deviation = np.array([-2.0, 0.0, 1.0, 5.0]), np.array([1.0, 2.0, 0.5, 3.0])
    samples = np.clip(mean + deviation * rng.standard_normal((400_000, 4)), low, high)
    np.testing.assert_allclose(
        rectified_mean(mean, deviation, low, high), samples.mean(0), atol=0.02
    )


def test_the_analytic_shift_is_close_to_the_measured_one(
    quantized: Model, context: Context
) -> None:
    coarse = coarsened(quantized, context)
    analytic = CorrectBias(source="analytic").apply(coarse, context)
    empirical = CorrectBias(source="empirical").apply(coarse, context)
    before, first, second = (outputs(m) for m in (coarse, analytic, empirical))
    assert analytic.history[-1].details["analytic"] >= 1
    assert not np.array_equal(before, first)
    assert not np.array_equal(first, second)
