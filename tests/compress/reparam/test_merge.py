"""Branches in exported graphs: found, merged and equal; what only looks alike is left alone."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import nn

from compress.data import load_data
from compress.errors import UsageError
from compress.export import to_onnx
from compress.facts import step_facts, step_remarks
from compress.model import Arrays, Model, TensorSpec
from compress.passes import Context
from compress.recipe import Recipe, default_passes
from compress.reference import reference_session, run
from compress.registry import create_pass, create_target
from compress.reparam import MergeBranches, merge
from compress.report.steps import step_lines
from compress.rewrites import output_statistics
from compress.settings import Settings, choose_passes
from compress.target import Engine
from compress.testing import PassContract
from targets.onnxruntime import OnnxRuntime

TARGET = create_target("cpu", threads=1)
Build = Callable[..., Model]
IN, OUT = "float[batch,4,9,9] x", "float[batch,k,h,w] y"


def applied(model: Model, profit: Any = "auto", **options: Any) -> tuple[Model, Arrays, Arrays]:
    """The merged model, and the outputs before and after."""
    inputs = model.example(2)
    before = run(reference_session(model.graph_model), inputs)
    step = MergeBranches(profit=profit, **{"seconds": 0.0, **options})
    done = step.apply(model, Context(target=TARGET, original=model))
    return done, before, run(reference_session(done.graph_model), inputs)


def assert_same(before: Arrays, after: Arrays, tolerance: float = 1e-5) -> None:
    assert list(before) == list(after)
    for name, array in before.items():
        scale = max(np.abs(array).max(), 1e-6)
        np.testing.assert_allclose(after[name], array, rtol=0, atol=tolerance * scale)


def op_types(model: Model) -> list[str]:
    return [n.op_type for n in model.graph_model.graph if n.op_type != "Constant"]


def details(model: Model) -> dict[str, Any]:
    return dict(model.history[-1].details)


@settings(max_examples=15, suppress_health_check=[HealthCheck.too_slow])
@given(
    sizes=st.lists(st.tuples(st.integers(1, 4), st.integers(1, 3)), min_size=2, max_size=3),
    stride=st.integers(1, 2),
    groups=st.sampled_from([1, 2, 4]),
    excess=st.integers(-2, 2),
    bias=st.booleans(),
    skip=st.booleans(),
    operator=st.sampled_from(["Add", "Sub"]),
)
def test_parallel_convolutions_become_one(
    onnx_model: Build,
    sizes: list[tuple[int, int]],
    stride: int,
    groups: int,
    excess: int,
    bias: bool,
    skip: bool,
    operator: str,
) -> None:
    assume(all(excess + d * (k - 1) >= 0 for k, d in sizes))
    skip = skip and stride == 1 and excess == 0
    body, weights = "", {}
    for index, (k, d) in enumerate(sizes):
        total = excess + d * (k - 1)
        begin = total // 2
        pads = [begin, begin, total - begin, total - begin]
        weights[f"w{index}"] = (4, 4 // groups, k, k)
        inputs = f"x, w{index}"
        if bias:
            weights[f"b{index}"] = (4,)
            inputs += f", b{index}"
        body += (
            f"[c{index}] v{index} = Conv<strides=[{stride},{stride}], dilations=[{d},{d}], "
            f"pads={pads}, group={groups}>({inputs}) "
        )
    last = "v0"
    for index in range(1, len(sizes)):
        body += f"[a{index}] s{index} = {operator}({last}, v{index}) "
        last = f"s{index}"
    if skip:
        body += f"[skip] t = Add({last}, x) "
        last = "t"
    text = f"g ({IN}) => ({OUT}) {{{body} [r] y = Relu({last})}}"
    done, before, after = applied(onnx_model(text, **weights), "all")
    assert op_types(done) == ["Conv", "Relu"]
    assert_same(before, after)
    merged = details(done)["merged"]
    (facts,) = merged.values()
    assert facts["operators"] == [2 * len(sizes) - 1 + skip, 1]


CONV = "Conv<pads=[1,1,1,1]>"
PAIR = f"[a] a = {CONV}(x, w) [b] b = Conv(x, v) "
WEIGHTS: dict[str, tuple[int, ...]] = {"w": (4, 4, 3, 3), "v": (4, 4, 1, 1), "c": (4,)}


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (PAIR + "[s] s = Add(a, b) [r] y = Relu(s)", ["Conv", "Relu"]),
        (PAIR + "[s] s = Sum(a, b, x) [r] y = Relu(s)", ["Conv", "Relu"]),
        (PAIR + "[n] n = Neg(b) [s] s = Add(a, n) [r] y = Relu(s)", ["Conv", "Relu"]),
        (PAIR + "[m] m = Mul(b, k) [d] d = Div(m, k) [s] s = Add(d, a) [r] y = Relu(s)",
         ["Conv", "Relu"]),
        (PAIR + "[s] s = Add(a, b) [t] t = Sub(k, s) [r] y = Relu(t)", ["Conv", "Relu"]),
        ("[p] p = AveragePool<kernel_shape=[3,3],pads=[1,1,1,1],count_include_pad=1>(x) "
         f"[a] a = {CONV}(x, w) [s] s = Add(p, a) [r] y = Relu(s)", ["Conv", "Relu"]),
        ("[p] p = AveragePool<kernel_shape=[3,3],auto_pad=\"SAME_UPPER\",count_include_pad=1>(x) "
         "[a] a = Conv<auto_pad=\"SAME_LOWER\">(x, w) [s] s = Add(p, a) [r] y = Relu(s)",
         ["Conv", "Relu"]),
        ("[q] q = Pad(x, pads) [a] a = Conv(q, w) [b] b = Conv(x, v) [s] s = Add(a, b) "
         "[r] y = Relu(s)", ["Conv", "Relu"]),
        (PAIR + "[e] e = Exp(x) [s] s = Add(e, a) [t] t = Add(s, b) [r] y = Relu(t)",
         ["Exp", "Conv", "Add", "Relu"]),
        (PAIR + "[e] e = Exp(x) [s] s = Sub(e, a) [t] t = Add(s, b) [r] y = Relu(t)",
         ["Exp", "Conv", "Add", "Relu"]),
        ("[a] a = Conv(x, v) [b] b = Conv(x, u) [s] s = Concat<axis=1>(a, b) [r] y = Relu(s)",
         ["Conv", "Relu"]),
        ("[i] i = Conv(x, wide) [o] o = Conv(i, narrow) [r] y = Relu(o)", ["Conv", "Relu"]),
        ("[i] i = Conv(x, wide) [o] o = Conv<pads=[1,1,1,1]>(i, narrow3) [r] y = Relu(o)",
         ["Conv", "Relu"]),
    ],
    ids=["sum of two", "sum of three", "negative", "scaled", "subtracted from", "mean",
         "auto_pad", "pad of one branch", "term between", "subtracted between", "concat", "chain",
         "chain with zeros between"],
)  # fmt: skip
def test_forms_of_branches(onnx_model: Build, body: str, expected: list[str]) -> None:
    rng = np.random.default_rng(0)
    weights: dict[str, Any] = {
        "w": (4, 4, 3, 3), "v": (4, 4, 1, 1), "u": (6, 4, 1, 1), "wide": (32, 4, 1, 1),
        "narrow": (4, 32, 1, 1), "narrow3": (4, 32, 3, 3),
        "k": rng.uniform(0.5, 2, (4, 1, 1)).astype(np.float32),
        "pads": np.array([0, 0, 1, 1, 0, 0, 1, 1]),
    }  # fmt: skip
    used = {
        name: w
        for name, w in weights.items()
        if name in body.replace("(", " ").replace(")", " ").replace(",", " ").split()
    }
    done, before, after = applied(onnx_model(f"g ({IN}) => ({OUT}) {{{body}}}", **used))
    assert op_types(done) == expected
    assert_same(before, after)
    assert not [name for name in done.graph_model.graph.initializers if name.endswith("_")]


@pytest.mark.parametrize(
    ("body", "outputs", "reason"),
    [
        ("[a] a = Conv<pads=[1,1,1,1]>(x, w) [t] t = Relu(a) [b] b = Conv(x, v) [s] y = Add(t, b)",
         OUT, ""),
        (PAIR + "[s] y = Add(a, b) [e] z = Exp(a)", f"{OUT}, float[batch,4,9,9] z", ""),
        ("[a] a = Conv(x, v) [b] b = Exp(x) [d] d = Conv(b, v) [s] y = Add(a, d)", OUT, ""),
        ("[a] y = Conv(x, v) [b] z = Conv(y, v)", f"{OUT}, float[batch,4,9,9] z", ""),
        ("[m] m = Mul(x, x) [a] a = Conv(m, v) [s] y = Mul(a, x)", OUT, ""),
        ("[e] e = Exp(v) [a] a = Conv(x, e) [b] b = Conv(x, v) [s] y = Add(a, b)", OUT, ""),
        ("[p] p = AveragePool<kernel_shape=[3,3],pads=[1,1,1,1]>(x) [a] a = Conv(x, v) "
         "[s] y = Add(p, a)", OUT, "p leaves padding out of its means"),
        ("[p] p = AveragePool<kernel_shape=[3,3],pads=[1,1,1,1],count_include_pad=1,"
         "strides=[2,2],ceil_mode=1>(x) [a] a = Conv<strides=[2,2]>(x, v) [s] y = Add(p, a)",
         OUT, "p rounds the size of its output up"),
        ("[a] a = Conv(x, v, c) [b] b = Conv<pads=[1,1,1,1]>(a, w) [s] y = Add(b, x)", OUT,
         "zeros are padded between two layers where the first would write its bias"),
        ("[a] a = Conv<pads=[1,1,1,1]>(x, w) [b] b = Conv<pads=[1,1,1,1]>(a, w) [s] y = Add(b, x)",
         OUT, "a padded layer reads the output of a window: borders would differ"),
        ("[a] a = Conv(x, v) [b] b = Mul(a, map) [s] y = Add(b, x)", OUT,
         "a constant differs from place to place"),
        ("[a] a = Conv<pads=[1,1,1,1]>(x, w) [b] b = Conv<pads=[3,3,3,3],dilations=[3,3]>(x, w) "
         "[s] y = Add(a, b)", OUT, "one layer would take 2.72 times the multiply-accumulates"),
        ("[a] a = Conv(x, n) [b] y = Conv<pads=[1,1,1,1]>(a, m)", OUT,
         "one layer instead of the chain would take"),
        ("[a] a = Conv(x, v) [b] b = Conv(x, u) [s] y = Concat<axis=2>(a, b)", OUT,
         "s concatenates along another axis"),
    ],
    ids=["activation", "second user", "other inputs", "output", "product", "computed weights",
         "mean at borders", "ceil", "padded bias", "padded window", "map", "dilated",
         "growing chain", "axis"],
)  # fmt: skip
def test_what_is_left_alone(onnx_model: Build, body: str, outputs: str, reason: str) -> None:
    weights: dict[str, Any] = {"w": (4, 4, 3, 3), "v": (4, 4, 1, 1), "c": (4,), "u": (4, 4, 1, 1)}
    weights |= {"n": (1, 4, 1, 1), "m": (4, 1, 3, 3)}
    weights["map"] = np.random.default_rng(0).normal(size=(1, 1, 9, 9)).astype(np.float32)
    text = f"g ({IN}) => ({outputs}) {{{body}}}"
    used = {
        n: w for n, w in weights.items() if f" {n})" in body or f" {n}," in body or f"({n})" in body
    }
    model = onnx_model(text, **used)
    operators = op_types(model)
    done, before, after = applied(model)
    assert op_types(done) == operators
    assert_same(before, after, 0)
    assert details(done)["merged"] == {}
    reasons = details(done)["left"].values()
    assert any(reason in one for one in reasons) if reason else not reasons


def test_strides_that_differ_are_left_alone(onnx_model: Build) -> None:
    body = "[a] a = Conv<strides=[2,2]>(x, v) [b] b = Conv<strides=[1,1]>(x, u) [s] y = Add(a, b)"
    text = f"g (float[1,4,1,1] x) => (float[1,4,1,1] y) {{{body}}}"
    done, _, _ = applied(onnx_model(text, v=(4, 4, 1, 1), u=(4, 4, 1, 1)))
    assert details(done)["left"] == {"s": "strides 2 and 1 differ"}


def test_doubles_are_left_alone(onnx_model: Build) -> None:
    text = "g (double[1,5,4] x) => (double[1,5,4] y) {[a] a = MatMul(x, v) [s] y = Add(a, x)}"
    model = onnx_model(text, v=np.ones((4, 4)))
    done, _, _ = applied(model)
    assert "float32" in details(done)["left"]["s"]


def test_all_takes_what_auto_leaves(onnx_model: Build) -> None:
    body = "[a] a = Conv(x, v, c) [b] y = AveragePool<kernel_shape=[2,2],strides=[2,2]>(a)"
    text = f"g ({IN}) => ({OUT}) {{{body}}}"
    weights = {"v": (4, 4, 1, 1), "c": (4,)}
    assert op_types(applied(onnx_model(text, **weights))[0]) == ["Conv", "AveragePool"]
    done, before, after = applied(onnx_model(text, **weights), "all")
    assert op_types(done) == ["Conv"]
    assert_same(before, after)
    assert op_types(applied(done, "all")[0]) == ["Conv"]


class Sum(nn.Module):
    """Branches of one tensor, their sum, and an activation function."""

    def __init__(self, *branches: nn.Module) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(sum(branch(x) for branch in self.branches))  # type: ignore[call-overload]


class Bordered(nn.Module):
    """BatchNorm padded with what it makes of zero, as the diverse branch block writes it."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        norm = self.norm
        out = nn.functional.pad(norm(x), [1] * 4)
        assert norm.running_mean is not None
        assert norm.running_var is not None
        factor = norm.weight / torch.sqrt(norm.running_var + norm.eps)
        frame = (norm.bias - norm.running_mean * factor).view(1, -1, 1, 1)
        out[:, :, 0:1, :] = frame
        out[:, :, -1:, :] = frame
        out[:, :, :, 0:1] = frame
        out[:, :, :, -1:] = frame
        return out


class Scaled(nn.Module):
    """The token mixer of FastViT: x + scale (mix(x) - norm(x))."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.mix = Sum(normed(channels, channels, 3, padding=1, groups=channels), norm(channels))
        self.norm, self.scale = norm(channels), nn.Parameter(torch.rand(channels, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mixed = sum(branch(x) for branch in self.mix.branches)
        return torch.relu(x + self.scale * (mixed - self.norm(x)))


def norm(channels: int) -> nn.BatchNorm2d:
    """BatchNorm with the numbers of a trained one."""
    made = nn.BatchNorm2d(channels)
    with torch.no_grad():
        for tensor in (made.weight, made.running_var):
            assert tensor is not None
            tensor.uniform_(0.5, 1.5)
        for tensor in (made.bias, made.running_mean):
            assert tensor is not None
            tensor.normal_(0, 0.3)
    return made


def normed(inputs: int, outputs: int, kernel: int, **options: Any) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, kernel, bias=False, **options), norm(outputs))


def families() -> dict[str, Callable[[], nn.Module]]:
    """One block of each kind, after a first layer that makes 6 channels."""

    def depthwise(kernel: int, dilation: int = 1) -> nn.Module:
        pad = dilation * (kernel - 1) // 2
        return normed(6, 6, kernel, padding=pad, dilation=dilation, groups=6)

    return {
        "RepVGG": lambda: Sum(normed(6, 6, 3, padding=1), normed(6, 6, 1), norm(6)),
        "MobileOne depthwise": lambda: Sum(*map(depthwise, (3, 3, 3, 1)), norm(6)),
        "MobileOne pointwise": lambda: Sum(*(normed(6, 6, 1) for _ in range(3)), norm(6)),
        "ACB": lambda: Sum(
            normed(6, 8, 3, padding=1),
            normed(6, 8, (3, 1), padding=(1, 0)),  # type: ignore[arg-type]
            normed(6, 8, (1, 3), padding=(0, 1)),  # type: ignore[arg-type]
        ),
        "DBB": lambda: Sum(
            normed(6, 8, 3, padding=1, stride=2),
            normed(6, 8, 1, stride=2),
            nn.Sequential(normed(6, 6, 1, padding=1), normed(6, 8, 3, stride=2)),
            nn.Sequential(normed(6, 8, 1, padding=1), nn.AvgPool2d(3, 2), norm(8)),
        ),
        "DBB with a frame": lambda: Sum(
            normed(6, 8, 3, padding=1),
            nn.Sequential(nn.Conv2d(6, 6, 1, bias=False), Bordered(6), normed(6, 8, 3)),
        ),
        "UniRepLKNet": lambda: Sum(depthwise(9), depthwise(5), depthwise(5, 2), depthwise(3, 4)),
        "FMViT": lambda: Sum(normed(6, 6, 1, groups=3), normed(6, 6, 1, groups=3), norm(6)),
        "FastViT": lambda: Scaled(6),
    }  # fmt: skip


@pytest.mark.parametrize("family", families())
def test_every_family_is_found_in_the_export(family: str) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), families()[family]())
    done = merge(net.eval(), inputs=["1x3x12x12"])
    assert [t for t in op_types(done) if t not in ("Shape", "Squeeze")] == ["Conv", "Relu"] * 2
    found = details(done)
    assert len(found["merged"]) == 1
    (facts,) = found["merged"].values()
    assert facts["macs"][1] <= facts["macs"][0]
    assert facts["parameters"][1] < facts["parameters"][0]
    x = done.example(2, seed=1)
    with torch.no_grad():
        expected = net(torch.from_numpy(next(iter(x.values())))).numpy()
    got = next(iter(run(reference_session(done.graph_model), x).values()))
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    assert found["macs"][1] <= found["macs"][0]
    assert list(output_statistics(done)) == []


class Tokens(nn.Module):
    """Linear branches on tokens: common, low rank, grouped, and a skip."""

    def __init__(self, grouped: bool) -> None:
        super().__init__()
        self.grouped = grouped
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8, bias=False)
        self.down, self.up = nn.Linear(8, 2, bias=False), nn.Linear(2, 8)
        self.first = nn.Parameter(torch.randn(2, 4, 4))
        self.second = nn.Parameter(torch.randn(2, 4, 4))
        self.scale = nn.Parameter(torch.rand(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.grouped:
            low = 0.5 * self.up(self.down(x))
            return torch.relu(self.a(x) + self.scale * self.b(x) + low + x)
        parts = x.unflatten(-1, (2, 4)).transpose(1, 2)
        out = torch.matmul(parts, self.first) + torch.matmul(parts, self.second)
        out = out + parts * self.scale.view(2, 1, 4)
        return torch.relu(out).transpose(1, 2).flatten(2)


@pytest.mark.parametrize(
    ("grouped", "shape", "layers"),
    [(False, "1x5x8", ["MatMul", "Add"]), (False, "1x8", ["Gemm"]), (True, "1x5x8", ["MatMul"])],
    ids=["tokens", "vectors", "grouped"],
)
def test_linear_branches(grouped: bool, shape: str, layers: list[str]) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = Tokens(grouped).eval()
    done = merge(net, inputs=[shape])
    kinds = [t for t in op_types(done) if t in ("MatMul", "Gemm", "Add", "Mul", "Relu")]
    assert kinds == [*layers, "Relu"]
    x = done.example(3, seed=1)
    with torch.no_grad():
        expected = net(torch.from_numpy(next(iter(x.values())))).numpy()
    got = next(iter(run(reference_session(done.graph_model), x).values()))
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_one_and_three_dimensions(onnx_model: Build) -> None:
    for dims in (1, 3):
        sizes = ",".join(["6"] * dims)
        pads = [1] * 2 * dims
        body = (
            f"[a] a = Conv<pads={pads}>(x, w) [b] b = Conv(x, v) [s] s = Add(a, b) [r] y = Relu(s)"
        )
        text = f"g (float[batch,4,{sizes}] x) => (float[batch,4,{sizes}] y) {{{body}}}"
        model = onnx_model(text, w=(4, 4, *[3] * dims), v=(4, 4, *[1] * dims))
        done, before, after = applied(model)
        assert op_types(done) == ["Conv", "Relu"]
        assert_same(before, after)


def test_statistics_of_a_norm_behind_the_sum_stay(onnx_model: Build) -> None:
    body = PAIR + "[s] s = Add(a, b) [n] n = BatchNormalization(s, gamma, beta, mean, var) "
    text = f"g ({IN}) => ({OUT}) {{{body} [r] y = Relu(n)}}"
    numbers = {name: np.float32([0.5, 1, 2, 3]) for name in ("gamma", "beta", "mean", "var")}
    weights = {"w": (4, 4, 3, 3), "v": (4, 4, 1, 1)}
    done, before, after = applied(onnx_model(text, **weights, **numbers))
    assert op_types(done) == ["Conv", "Relu"]
    assert_same(before, after)
    mean, deviation = output_statistics(done)["a"]
    np.testing.assert_allclose(mean, numbers["beta"])
    np.testing.assert_allclose(deviation, numbers["gamma"], rtol=1e-4)
    assert "statistics" not in step_facts(done.history[-1])["details"]


def test_scales_that_differ_are_flagged_and_shared(onnx_model: Build) -> None:
    """One channel of the small branch is a hundred times the others."""
    rng = np.random.default_rng(0)
    w = rng.normal(0, 0.1, (4, 4, 3, 3)).astype(np.float32)
    v = rng.normal(0, 0.1, (4, 4, 1, 1)).astype(np.float32)
    identity = np.float32([0.1, 10, 0.1, 0.1]).reshape(4, 1, 1)
    body = PAIR + (
        "[k] k = Mul(x, identity) [s] s = Add(a, b) [t] t = Add(s, k) [r] r = Relu(t) "
        f"[o] y = {CONV}(r, w2)"
    )
    text = f"g ({IN}) => ({OUT}) {{{body}}}"
    weights = {"w": w, "v": v, "identity": identity, "w2": (4, 4, 3, 3)}
    images = rng.normal(size=(6, 4, 9, 9)).astype(np.float32)
    largest = {}
    for equalize in (False, True):
        model = onnx_model(text, **weights)
        context = Context(
            target=TARGET, original=model, calibration=load_data(images, model.inputs)
        )
        before = run(reference_session(model.graph_model), model.example(2))
        done = MergeBranches(equalize=equalize, samples=4, seconds=0).apply(model, context)
        assert_same(before, run(reference_session(done.graph_model), done.example(2)))
        found = details(done)
        assert found["suspicious"] == ["a"]
        was, now = found["merged"]["a"]["weight_spread"]
        assert now > 8
        assert now > 2 * was
        assert found["merged"]["a"]["activation_spread"][1] > 8
        assert ("equalized" in found) is equalize
        text_of_remark = step_remarks(done)[1]
        assert ("share their scales" in text_of_remark) is equalize
        weight = done.graph_model.graph.initializers["a.weight"].const_value
        assert weight is not None
        ranges = np.abs(weight.numpy()).max((1, 2, 3))
        largest[equalize] = float(ranges.max() / np.median(ranges))
    assert largest[True] < largest[False] / 2


def test_a_network_without_branches_is_not_looked_into(exported: Model) -> None:
    before = op_types(exported)
    done, *outputs = applied(exported)
    assert op_types(done) == before
    assert details(done) == {"merged": {}, "left": {}}
    assert_same(*outputs, 0)
    assert step_remarks(done) == []


def test_the_setting_decides_over_the_recipe() -> None:
    names = [step.name for step in default_passes()]
    assert names.index("merge_branches") == names.index("fold_batchnorm") + 1
    assert "merge_branches" not in [step.name for step in default_passes(reparam="off")]
    recipe = Recipe((create_pass("fold_batchnorm"), create_pass("fold_pad")))
    assert choose_passes(recipe) == recipe.passes
    chosen = choose_passes(recipe, "all")
    assert chosen == (
        recipe.passes[0],
        create_pass("merge_branches", profit="all"),
        recipe.passes[1],
    )
    assert choose_passes(Recipe(chosen), "off") == recipe.passes
    assert choose_passes(None, "off") == default_passes(reparam="off")
    read = Recipe((), {"reparam": "off"})
    assert Settings.resolve({"model": "m.onnx"}, read).reparam == "off"
    with pytest.raises(UsageError, match="--reparam some is none of auto, off, all"):
        Settings.resolve({"model": "m.onnx", "reparam": "some"}, None)
    with pytest.raises(UsageError, match="profit is 'none'; choose from auto, all"):
        create_pass("merge_branches", profit="none")


def test_merging_leaves_the_model_that_was_given_as_it_is(onnx_model: Build) -> None:
    text = f"g ({IN}) => ({OUT}) {{{PAIR} [s] s = Add(a, b) [r] y = Relu(s)}}"
    model = onnx_model(text, w=(4, 4, 3, 3), v=(4, 4, 1, 1))
    done = merge(model)
    assert op_types(model) == ["Conv", "Conv", "Add", "Relu"]
    assert op_types(done) == ["Conv", "Relu"]
    assert dataclasses.asdict(MergeBranches()) == {
        "profit": "auto",
        "equalize": True,
        "samples": 32,
        "seconds": 2.0,
    }


def branches(onnx_model: Build) -> Model:
    """Two branches behind a layer of their own."""
    text = f"g ({IN}) => ({OUT}) {{{PAIR} [s] s = Add(a, b) [r] y = Relu(s)}}"
    return onnx_model(text, w=(4, 4, 3, 3), v=(4, 4, 1, 1))


def test_latency_is_measured_before_and_after(onnx_model: Build) -> None:
    done, *outputs = applied(branches(onnx_model), seconds=0.2)
    assert_same(*outputs)
    found = details(done)["latency"]
    assert set(found["timings"]) == {"before", "after"}
    assert all(timing["p50_ms"] > 0 for timing in found["timings"].values())
    assert f"{found['ratios']['after']['value']:.2f}x" in step_remarks(done)[0]
    assert "On onnxruntime" in step_remarks(done)[0]
    assert "10 % fewer multiply-accumulates, 10 % fewer parameters" in step_remarks(done)[0]
    unmeasured, *_ = applied(branches(onnx_model))
    assert "latency" not in details(unmeasured)
    assert " ms before" not in step_remarks(unmeasured)[0]


def test_the_report_names_what_was_merged_and_what_was_left(onnx_model: Build) -> None:
    done, *_ = applied(branches(onnx_model))
    (name,) = details(done)["merged"]
    lines = step_lines(step_facts(done.history[-1]))
    assert lines[0].startswith("1. `merge_branches`: max_relative_difference")
    assert lines[1].startswith(f"   - `{name}` from 3 operators: multiply-accumulates 1")
    text = f"g ({IN}) => ({OUT}) {{[a] h = {CONV}(x, w) [b] y = {CONV}(h, v)}}"
    left, *_ = applied(onnx_model(text, w=(4, 4, 3, 3), v=(4, 4, 3, 3)))
    (line,) = step_lines(step_facts(left.history[-1]))[1:]
    assert line.startswith("   - left alone: `b`: "), line


@dataclasses.dataclass(frozen=True, kw_only=True)
class SlowKernels(OnnxRuntime):
    """ONNX Runtime on a machine where one operator takes longer than two."""

    def build(self, model: Model) -> Engine:
        engine = super().build(model)
        seconds = 0.02 if op_types(model).count("Conv") == 1 else 0.0

        class Slowed:
            def __call__(self, inputs: Arrays) -> Arrays:
                time.sleep(seconds)
                return dict(engine(inputs))

        return cast(Engine, Slowed())


def test_what_is_slower_on_the_target_is_undone_unless_everything_is_asked_for(
    onnx_model: Build,
) -> None:
    target = SlowKernels(threads=1)
    for profit, kept in (("auto", 2), ("all", 1)):
        model = branches(onnx_model)
        step = create_pass("merge_branches", profit=profit, seconds=0.2)
        done = step.apply(model, Context(target=target, original=model))
        assert op_types(done).count("Conv") == kept
        assert len(details(done)["merged"]) == 2 - kept
        if profit == "auto":
            assert "slower on" in details(done)["left"][""]
        else:
            assert details(done)["latency"]["ratios"]["after"]["verdict"] == "slower"


def test_time_to_measure_is_not_negative() -> None:
    with pytest.raises(UsageError, match="seconds is -1, not 0 or above"):
        create_pass("merge_branches", seconds=-1)


class TestMergeBranches(PassContract):
    step = MergeBranches()
    target = TARGET

    def model(self) -> Model:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), families()["RepVGG"]())
        return to_onnx(Model(net.eval(), (TensorSpec("x", (1, 3, 12, 12)),), "branches"), 21)
