from __future__ import annotations

import dataclasses
import itertools
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.data import load_data
from compress.errors import UnsupportedError, UsageError
from compress.export import to_onnx
from compress.loading import load
from compress.model import Model
from compress.passes import Context
from compress.recipe import default_passes
from compress.reference import reference_session, run, save_onnx, session
from compress.registry import create_target
from compress.target import Target
from quant.ptq import Quantize
from quant.quantizer import fake_quantize, weight_qparams
from quant.refine import state_of
from quant.spec import QuantSpec
from quant.weight_scale import narrow_weight
from quant.widths import bits_of, parse_bits, spread

IMAGES = np.random.default_rng(0).standard_normal((64, 3, 8, 8)).astype(np.float32)
TARGETS = [
    "onnxruntime",
    pytest.param("openvino", marks=pytest.mark.skipif(
        not create_target("openvino").check().available, reason="OpenVINO is not installed")),
]  # fmt: skip


def network() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Conv2d(3, 16, 3, padding=1),
        torch.nn.BatchNorm2d(16),
        torch.nn.ReLU(),
        torch.nn.Conv2d(16, 64, 3, padding=1),
        torch.nn.ReLU(),
        torch.nn.AdaptiveAvgPool2d(1),
        torch.nn.Flatten(),
        torch.nn.Linear(64, 96),
        torch.nn.ReLU(),
        torch.nn.Linear(96, 10),
    ).eval()


@pytest.fixture(scope="module")
def exported() -> Model:
    return to_onnx(load(network(), inputs=["1x3x8x8"]), 21)


def prepared(exported: Model, target: Target) -> tuple[Model, Context]:
    context = Context(
        target=target, original=exported, calibration=load_data(IMAGES, exported.inputs)
    )
    model = dataclasses.replace(exported, program=exported.graph_model.clone())
    for step in default_passes()[:-2]:
        model = step.apply(model, context)
    return model, context


def operators(model: Model) -> Counter[str]:
    """What ONNX Runtime makes of the graph."""
    with tempfile.TemporaryDirectory() as folder:
        options = ort.SessionOptions()
        options.optimized_model_filepath = str(Path(folder) / "out.onnx")
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
        session(model.graph_model, options, ["CPUExecutionProvider"])
        graph = onnx.load(Path(folder) / "out.onnx").graph
    return Counter(node.op_type for node in graph.node)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (8, (8,)),
        ("8", (8,)),
        ("4,8", (4, 8)),
        ([8, 4], (8, 4)),
        ("fp8", ("fp8",)),
        ("FP4, 8", ("fp4", 8)),
        ("auto", ("auto",)),
    ],
)
def test_bits_as_users_write_them(text: object, expected: tuple[object, ...]) -> None:
    assert parse_bits(text) == expected


@pytest.mark.parametrize("text", ["", "eight", "1", "9", "32", True, "8,", "8,auto", "8,8", []])
def test_what_is_no_width_is_refused(text: object) -> None:
    with pytest.raises(UsageError, match="--bits"):
        parse_bits(text)


@given(data=st.data())
@settings(max_examples=30)
def test_widths_are_spread_as_brute_force_would(data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 5))
    parameters = {f"s{i}": data.draw(st.integers(1, 50)) for i in range(count)}
    losses: dict[str, dict[Any, float]] = {}
    for name in parameters:
        numbers = sorted((data.draw(st.integers(0, 60)) for _ in range(3)), reverse=True)
        losses[name] = dict(zip((2, 4, 8), map(float, numbers), strict=True))
    average = data.draw(st.integers(8, 32)) / 4

    def size(chosen: dict[str, Any]) -> float:
        return sum(parameters[n] * w for n, w in chosen.items()) / sum(parameters.values())

    policies = [
        dict(zip(parameters, widths, strict=True))
        for widths in itertools.product((2, 4, 8), repeat=count)
    ]
    allowed = [p for p in policies if size(p) <= average]
    best = min(sum(losses[n][w] for n, w in p.items()) for p in allowed)
    found = spread(parameters, losses, (2, 4, 8), average)
    assert size(found) <= average + 1e-6
    assert sum(losses[n][w] for n, w in found.items()) == pytest.approx(best)  # type: ignore[index]


@pytest.mark.parametrize("name", TARGETS)
def test_four_bits_are_stored_and_computed_with_in_float(exported: Model, name: str) -> None:
    target = create_target(name, threads=1)
    model, context = prepared(exported, target)
    stored = Quantize(bits=4).apply(model, context)
    assert stored.history[-1].details["ranges_from"] == "none: weights only"
    state = state_of(stored, "test")
    groups = Counter(p.spec.granularity for p in state.plan.constants.values())
    assert groups == {"per_channel": 2, "per_group": 2}
    assert {p.spec.dtype for p in state.plan.constants.values()} == {"int4"}
    inputs = {exported.inputs[0].name: IMAGES}
    got = next(iter(target.build(stored)(inputs).values()))
    reference = next(iter(run(reference_session(stored.graph_model), inputs).values()))
    original = next(iter(run(reference_session(exported.graph_model), inputs).values()))
    np.testing.assert_allclose(got, reference, atol=0.02 * np.abs(reference).max())
    error = np.linalg.norm(got - original) / np.linalg.norm(original)
    assert 0.001 < error < 0.3


def test_linear_layers_in_four_bits_are_one_kernel_in_onnx_runtime(exported: Model) -> None:
    model, context = prepared(exported, create_target("onnxruntime", threads=1))
    assert operators(Quantize(bits=4).apply(model, context))["MatMulNBits"] == 2


def test_the_file_gets_smaller_by_the_bits(exported: Model, tmp_path: Path) -> None:
    model, context = prepared(exported, create_target("onnxruntime", threads=1))
    sizes = {}
    for bits in (8, 4):
        copy = dataclasses.replace(model, program=model.graph_model.clone())
        save_onnx(Quantize(bits=bits).apply(copy, context).graph_model, tmp_path / f"{bits}.onnx")
        sizes[bits] = (tmp_path / f"{bits}.onnx").stat().st_size
    weights = 3 * 16 * 9 + 16 * 64 * 9 + 64 * 96 + 96 * 10
    assert sizes[8] - sizes[4] > 0.3 * weights


def test_several_widths_are_spread_over_the_operators(exported: Model) -> None:
    model, context = prepared(exported, create_target("onnxruntime", threads=1))
    mixed = Quantize(bits=(4, 8)).apply(model, context)
    plan = state_of(mixed, "test").plan
    weights = {n: p for n, p in plan.constants.items() if p.spec.dtype in ("int4", "int8")}
    assert {p.spec.dtype for p in weights.values()} == {"int4", "int8"}
    graph = state_of(mixed, "test").graph_model.graph
    sizes = {n: graph.initializers[n].const_value.size for n in weights}  # type: ignore[union-attr]
    average = sum(sizes[n] * p.spec.bits for n, p in weights.items()) / sum(sizes.values())
    assert average <= 6
    got = run(reference_session(mixed.graph_model), {exported.inputs[0].name: IMAGES})
    assert all(np.isfinite(array).all() for array in got.values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": "fp8"}, "cannot run --bits fp8; it runs 8, 4 .weights only"),
        ({"bits": 6}, "cannot run --bits 6"),
        ({"bits": 8, "activation_bits": 4}, "cannot run --bits activations of 4"),
    ],
    ids=["fp8", "6", "activations"],
)
def test_what_a_target_does_not_have_is_refused_unless_simulated(
    exported: Model, options: dict[str, Any], message: str
) -> None:
    target = create_target("onnxruntime", threads=1)
    with pytest.raises(UnsupportedError, match=message) as caught:
        Quantize(**options).check(exported, target)
    assert "--simulate" in str(caught.value)
    Quantize(**options, simulate=True).check(exported, target)


def test_the_edges_of_a_simulated_network_keep_eight_bits(exported: Model) -> None:
    model, context = prepared(exported, create_target("onnxruntime", threads=1))
    made = Quantize(bits=4, simulate=True).apply(model, context)
    plan = state_of(made, "test").plan
    bits = [p.spec.bits for p in plan.constants.values()]
    assert bits == [8, 4, 4, 8]
    assert made.history[-1].details["simulated"]
    everywhere = Quantize(bits=4, edge_bits=4, simulate=True)
    model, context = prepared(exported, create_target("onnxruntime", threads=1))
    plan = state_of(everywhere.apply(model, context), "test").plan
    assert {p.spec.bits for p in plan.constants.values()} == {4}


@pytest.mark.parametrize(
    ("bits", "makes", "buys"),
    [
        (8, "int8", "speed"),
        (4, "int4 weights", "size"),
        ((4, 8), "int8 and int4 weights", "size"),
    ],
)
def test_a_pass_says_what_it_makes(bits: Any, makes: str, buys: str) -> None:
    assert (Quantize(bits=bits).makes, Quantize(bits=bits).buys) == (makes, buys)
    assert Quantize(bits=bits, simulate=True).buys == "numbers"
    assert bool(Quantize(bits=bits).other_ranges()) == (bits != 4)  # weights only have no ranges


@given(seed=st.integers(0, 100), bits=st.integers(2, 7))
@settings(max_examples=30)
def test_a_narrow_weight_errs_no_more_than_min_max(seed: int, bits: int) -> None:
    weight = np.random.default_rng(seed).laplace(size=(6, 40)).astype(np.float32)
    spec = QuantSpec(f"int{bits}", granularity="per_channel")  # type: ignore[arg-type]
    errors = [
        np.square(weight - fake_quantize(weight, make(weight, spec, 0))).sum(1)
        for make in (weight_qparams, narrow_weight)
    ]
    assert (errors[1] <= errors[0] * (1 + 1e-6)).all()
    assert bits > 4 or errors[1].sum() < errors[0].sum()


def test_bits_of_float_formats() -> None:
    assert [bits_of(w) for w in (3, "fp4", "fp8", "bf16")] == [3, 4, 8, 16]
