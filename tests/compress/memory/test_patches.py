"""Patches: halo arithmetic against perturbation, and patched execution against the whole one."""

from __future__ import annotations

import math

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from compress.errors import UnsupportedError, UsageError
from compress.liveness import peak
from compress.memory import patched, patches, prove
from compress.memory.execution import Patched
from compress.memory.halo import regions
from compress.memory.splitting import Analysis, smallest_fit, table_of
from compress.memory.tracing import measured_stage, stage_program
from compress.testing import IMAGE, tiny_convnet

SIZE = 13


class Chain:
    """Builds a graph with one operator after the other."""

    def __init__(self, size: int = SIZE) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        self.name, self.channels, self.size = "x", 2, size

    def add(self, op: str, *operands: str, **attributes: object) -> str:
        """An operator on the last tensor and others."""
        name = f"t{len(self.nodes)}"
        inputs = [self.name, *operands]
        self.nodes.append(
            helper.make_node(op, inputs, [name], name=f"{op}{len(self.nodes)}", **attributes)
        )
        self.name = name
        return name

    def constant(self, values: np.ndarray) -> str:
        """An initializer."""
        name = f"w{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(values.astype(np.float32), name))
        return name

    def convolution(self, k: int, *, out: int = 3, group: int = 1, **how: object) -> None:
        """With random weights and a bias."""
        rng = np.random.default_rng(len(self.nodes))
        weight = self.constant(rng.normal(0, 1, (out, self.channels // group, k, k)))
        self.add("Conv", weight, self.constant(rng.normal(0, 1, out)), group=group, **how)
        self.channels = out

    def model(self) -> ir.Model:
        """The graph, with a global pool at the end that no patch can run."""
        last = helper.make_node("GlobalAveragePool", [self.name], ["y"], name="global")
        graph = helper.make_graph(
            [*self.nodes, last],
            "chain",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 2, self.size, self.size])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, self.channels, 1, 1])],
            self.weights,
        )
        opsets = [helper.make_opsetid("", 21)]
        return ir.from_proto(helper.make_model(graph, opset_imports=opsets, ir_version=10))


@st.composite
def chains(draw: st.DrawFn) -> ir.Model:
    """One to four blocks of convolutions, pools, activations and residual additions."""
    chain = Chain()
    for _ in range(draw(st.integers(1, 4))):
        kind = draw(st.sampled_from(["conv", "depthwise", "max", "average", "residual", "point"]))
        k, stride = draw(st.integers(1, 3)), draw(st.integers(1, 2))
        dilation = draw(st.integers(1, 2))
        pads = [draw(st.integers(0, k - 1)) for _ in range(4)]
        window = {"strides": [stride] * 2, "pads": pads}
        if kind == "conv":
            chain.convolution(k, dilations=[dilation] * 2, **window)
        elif kind == "depthwise":
            chain.convolution(k, out=chain.channels, group=chain.channels, **window)
        elif kind == "max":
            whole = draw(st.integers(0, 1))
            chain.add("MaxPool", kernel_shape=[k, k], ceil_mode=whole, **window)
        elif kind == "average":
            even = [pads[0], pads[1]] * 2
            chain.add(
                "AveragePool",
                kernel_shape=[k, k],
                strides=[stride] * 2,
                pads=even,
                count_include_pad=1,
            )
        elif kind == "residual":
            before = chain.name
            chain.convolution(3, out=chain.channels, pads=[1] * 4)
            chain.add("Relu")
            chain.convolution(1, out=chain.channels)
            chain.add("Add", before)
        else:
            chain.add("Clip", chain.constant(np.array(-3)), chain.constant(np.array(3)))
    return chain.model()


def stages(model: ir.Model) -> Analysis:
    """The analysis, where a stage's output has at least two positions along each axis."""
    try:
        analysis = Analysis(model)
    except (UnsupportedError, ValueError):
        assume(False)
    assume(min(analysis.stages.sizes[analysis.stages.stages[-1].end]) >= 2)
    return analysis


@settings(max_examples=15)
@given(chains(), st.integers(2, 3), st.data())
def test_patches_equal_the_whole_bit_for_bit(
    model: ir.Model, split: int, data: st.DataObject
) -> None:
    analysis = stages(model)
    stage = data.draw(st.sampled_from(analysis.stages.stages))
    assume(min(analysis.stages.sizes[stage.end]) >= split)
    network = Patched(model, split, stage.end)
    image = torch.from_numpy(np.random.default_rng(0).normal(size=(2, 2, SIZE, SIZE))).float()
    proof = prove(network, image)
    assert proof.identical
    assert proof.largest_sum > 0
    assert proof.float32 < 1e-5
    assert proof.float64 < 1e-13
    expected = network.whole(image)[0]
    torch.testing.assert_close(network(image)[0], expected, atol=1e-5, rtol=1e-5)


@settings(max_examples=15)
@given(chains(), st.integers(2, 3))
def test_tensors_alive_in_patches_are_those_of_the_analysis(model: ir.Model, split: int) -> None:
    analysis = stages(model)
    end = analysis.stages.stages[-1].end
    assume(min(analysis.stages.sizes[end]) >= split)
    network = Patched(model, split, end)
    assert (
        measured_stage(network, torch.zeros(1, 2, SIZE, SIZE)) == peak(stage_program(network)).bytes
    )


@settings(max_examples=6)
@given(chains(), st.data())
def test_the_region_of_the_image_is_what_the_patch_depends_on(
    model: ir.Model, data: st.DataObject
) -> None:
    analysis = stages(model)
    stage = analysis.stages.stages[-1]
    sizes = analysis.stages.sizes
    patch = tuple(
        tuple(sorted(data.draw(st.lists(st.integers(0, n), min_size=2, max_size=2, unique=True))))
        for n in sizes[stage.end]
    )
    network = Patched(model, 2, stage.end)
    # Sums of magnitudes: no weight is zero, so whatever is read changes the result.
    for name, tensor in network.network.constants.items():
        network.network.constants[name] = tensor.abs() + 0.1
    network.network.operators = {
        **network.network.operators,
        "Clip": lambda attributes, x, *limits: x,
    }
    image = torch.full((1, 2, SIZE, SIZE), 1.0)
    needed = regions(stage.layers, sizes, stage.end, patch).get("x", ((0, 0), (0, 0)))

    def patch_of(pixels: torch.Tensor) -> torch.Tensor:
        found = network.stage_whole(pixels)
        return found[(slice(None), slice(None), *(slice(a, b) for a, b in patch))]

    before = patch_of(image)
    for row in range(SIZE):
        for column in range(SIZE):
            changed = image.clone()
            changed[..., row, column] = 100.0
            inside = needed[0][0] <= row < needed[0][1] and needed[1][0] <= column < needed[1][1]
            if not inside:
                assert torch.equal(patch_of(changed), before)


def test_a_stride_of_one_reads_its_whole_region() -> None:
    # Where windows leave no holes, the region is exact in both directions.
    chain = Chain()
    chain.convolution(3, pads=[1, 1, 1, 1])
    chain.convolution(3, pads=[1, 1, 1, 1], strides=[2, 2])
    network = Patched(chain.model(), 2)
    needed = regions(
        network.stage.layers, network.analysis.stages.sizes, network.stage.end, ((2, 4), (0, 1))
    )
    assert needed["x"] == ((2, 9), (0, 3))
    image = torch.zeros(1, 2, SIZE, SIZE, requires_grad=True)
    values = {"x": image}
    for index in network.positions:
        network.network.advance(index, values)
    values[network.stage.end][:, :, 2:4, 0:1].sum().backward()
    assert image.grad is not None
    rows, columns = torch.nonzero(image.grad.abs().sum((0, 1)), as_tuple=True)
    assert (int(rows.min()), int(rows.max()) + 1) == (2, 9)
    assert (int(columns.min()), int(columns.max()) + 1) == (0, 3)


def test_peaks_of_a_small_chain_by_hand() -> None:
    chain = Chain(size=8)
    chain.convolution(3, out=10, pads=[1] * 4)
    chain.convolution(1, out=2, strides=[2, 2])
    found = table_of(chain.model(), splits=(2,))
    image, wide, narrow = 2 * 64, 10 * 64, 2 * 16
    assert found.int8.bytes == wide + image
    assert found.float32.bytes == 4 * (wide + image)
    row = found.rows[0]
    # The patch of 2x2 outputs reads 3x3 of the wide tensor: strides leave out the last.
    assert row.end == "Conv1"
    assert row.int8.bytes == image + narrow + 10 * 9 + 2 * 4
    assert row.macs == 4 * (9 * 10 * 9 * 2) + 16 * 2 * 10
    assert row.overhead == pytest.approx(row.macs / found.macs - 1)


def test_float_is_four_times_int8_where_all_tensors_are_float() -> None:
    found = patches(tiny_convnet(), inputs=[str(IMAGE).removeprefix("x:")], splits=(2, 3))
    assert [row.split for row in found.rows] == [2, 3]
    for row in found.rows:
        assert row.float32.bytes == 4 * row.int8.bytes < found.float32.bytes
        assert row.overhead >= 0


def test_a_torch_model_runs_patch_by_patch() -> None:
    module = tiny_convnet()
    network = patched(module, 2, inputs=["1x3x16x16"])
    image = torch.randn(3, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(network(image)[0], module(image))
    proof = prove(network, image)
    assert proof.identical
    assert math.isfinite(proof.float32)


def test_the_smallest_split_that_fits_is_the_first_that_does() -> None:
    chain = Chain(size=32)
    chain.convolution(3, out=16, pads=[1] * 4)
    chain.convolution(3, out=4, strides=[4, 4])
    model = chain.model()
    analysis = Analysis(model)
    needed = {n: analysis.best(n) for n in (2, 3)}
    assert needed[2] is not None
    assert needed[3] is not None
    limit = needed[3].int8.bytes
    assert limit < needed[2].int8.bytes
    found = smallest_fit(model, limit)
    assert found is not None
    assert found.split == 3
    assert found.int8.bytes <= limit
    assert smallest_fit(model, 10) is None


@pytest.mark.parametrize(
    ("op", "reason"),
    [("GlobalAveragePool", "looks at the whole image"), ("Softmax", "combines all positions")],
    ids=["pool", "softmax"],
)
def test_what_sees_everything_is_refused_with_the_reason(op: str, reason: str) -> None:
    chain = Chain()
    chain.add(op)
    with pytest.raises(UnsupportedError, match=reason):
        Analysis(chain.model())


def test_a_stage_ends_before_squeeze_and_excite() -> None:
    chain = Chain()
    chain.convolution(3, pads=[1] * 4)
    before = chain.add("Relu")
    chain.add("GlobalAveragePool")
    chain.convolution(1, out=3)
    chain.add("Sigmoid")
    chain.add("Mul", before)
    chain.convolution(3)
    analysis = Analysis(chain.model())
    assert [stage.end for stage in analysis.stages.stages] == [before]
    assert (
        analysis.stages.limit == "GlobalAveragePool2 (GlobalAveragePool) looks at the whole image"
    )


def test_a_split_that_is_too_fine_is_refused() -> None:
    chain = Chain(size=4)
    chain.convolution(3, strides=[2, 2], pads=[1] * 4)
    with pytest.raises(UsageError, match="cannot be split into 3 parts"):
        Patched(chain.model(), 3)
    with pytest.raises(UsageError, match="No first stage ends with 'nowhere'"):
        Patched(chain.model(), 2, "nowhere")
    with pytest.raises(UsageError, match="exported for images of 4x4"):
        Patched(chain.model(), 2)(torch.zeros(1, 2, 8, 8))
