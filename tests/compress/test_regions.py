from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from compress.graph import graph_sites
from compress.model import Model
from compress.regions import LARGE_PIECE, MANY_REGIONS, Region, cut_regions

Build = Callable[..., Model]
WIDE = 32
"""Channels of a 1x1 convolution: 32 MACs for each element, which is worth a cut."""
PLAIN = (WIDE, WIDE, 1, 1)


def regions(model: Model) -> tuple[Region, ...]:
    """The regions, after everything that holds for every graph is checked."""
    found = cut_regions(model.graph_model)
    sites = {site.name: site for site in graph_sites(model.graph_model)}
    home = {name: index for index, region in enumerate(found) for name in region.sites}
    assert sorted(name for region in found for name in region.sites) == sorted(sites)
    assert len({region.name for region in found}) == len(found)
    assert sum(region.macs for region in found) == sum(site.macs for site in sites.values())
    assert len(found) == 1 or all(region.macs for region in found)
    read: list[dict[int, int]] = [defaultdict(int) for _ in found]
    for node in model.graph_model.graph:
        for out in node.outputs:
            for reader in {home[user.name or ""] for user in out.consumers()}:
                if reader != home[node.name or ""]:
                    read[reader][home[node.name or ""]] += np.prod(sites[node.name or ""].output)
    for index, region in enumerate(found):
        assert region.border_elements == read[index]
        assert region.inputs == tuple(sorted(read[index]))
        assert all(source < index for source in region.inputs)
    return found


@pytest.fixture(scope="session")
def network(onnx_model: Callable[..., Model]) -> Build:
    """A model from operators `[name] output = ...` on an image x (1, WIDE, 8, 8).

    ONNX text takes no names with dots and slashes, so they are given afterwards.
    """
    label = re.compile(r"\[([\w./]+)\] (\w+) =")

    def build(body: str, outputs: tuple[str, ...] = ("y",), **options: Any) -> Model:
        inputs = ", ".join([f"float[batch,{WIDE},8,8] x", *options.pop("inputs", ())])
        ends = ", ".join(f"float {name}" for name in outputs)
        operators = label.sub(r"\2 =", body)
        text = f"g ({inputs}) => ({ends}) {{{operators}}}"
        model = onnx_model(text, **{"w": PLAIN, **options})
        named = {output: name for name, output in label.findall(body)}
        for node in model.graph_model.graph:
            node.name = named[node.outputs[0].name]
        return model

    return build


def names(found: tuple[Region, ...]) -> list[str]:
    return [region.name for region in found]


BLOCKS = """[a.conv1] a1 = Conv(x, w) [a.relu1] a2 = Relu(a1) [a.conv2] a3 = Conv(a2, w)
[a/Add] a4 = Add(a3, x) [a.relu2] a5 = Relu(a4)
[b.conv1] b1 = Conv(a5, w) [b.relu1] b2 = Relu(b1) [b.conv2] b3 = Conv(b2, w)
[b.down] b4 = Conv(a5, w) [b/Add] b5 = Add(b3, b4) [b.relu2] y = Relu(b5)"""


def test_a_cut_lies_behind_a_residual_block(network: Build) -> None:
    found = regions(network(BLOCKS))
    conv = WIDE * WIDE * 64
    first = ("a.conv1", "a.relu1", "a.conv2", "a/Add", "a.relu2")
    second = ("b.conv1", "b.relu1", "b.conv2", "b.down", "b/Add", "b.relu2")
    assert found == (
        Region("a", first, (), {}, 2 * conv),
        Region("b", second, (0,), {0: WIDE * 64}, 3 * conv),
    )


GATED = """[in] t = Conv(x, w) [act] u = Relu(t) [se.pool] p = GlobalAveragePool(u)
[se.fc1] q = Conv(p, s) [se.relu] r = Relu(q) {more} [se.fc2] m = Conv(r, e)
[se.gate] k = Sigmoid(m) [se/Mul] z = Mul(k, u)"""
SQUEEZE = {"s": (4, WIDE, 1, 1), "e": (WIDE, 4, 1, 1)}


@pytest.mark.parametrize(
    ("more", "out"),
    [
        ("", "[out] y = Conv(z, w)"),
        ("[far] f = Relu(u)", "[out] c = Conv(z, w) [sum] y = Add(c, f)"),
    ],
    ids=["alone", "interleaved"],
)
def test_squeeze_and_excite_is_a_region_of_its_own(network: Build, more: str, out: str) -> None:
    found = regions(network(f"{GATED.format(more=more)} {out}", **SQUEEZE))
    assert names(found) == ["in", "se", "out"]
    assert found[1].sites == ("se.pool", "se.fc1", "se.relu", "se.fc2", "se.gate")
    assert found[1].border_elements == {0: WIDE * 64}
    assert found[2].sites[:2] == ("se/Mul", "out")
    # The interleaved operator belongs to the trunk before the branch; its result crosses too.
    assert found[2].border_elements == {0: WIDE * 64 * (2 if more else 1), 1: WIDE}


@pytest.mark.parametrize(
    ("gate", "outputs"),
    [
        ("[p] p = GlobalAveragePool(t) [k] k = Sigmoid(p)", ("y",)),
        ("[p] p = Conv(t, w) [k] k = Sigmoid(p)", ("y",)),
        ("[p] p = GlobalAveragePool(t) [q] q = Conv(p, w) [k] k = Sigmoid(q)", ("y", "q")),
    ],
    ids=["without weights", "as large as the trunk", "used elsewhere"],
)
def test_what_is_no_squeeze_and_excite_stays_in_its_block(
    network: Build, gate: str, outputs: tuple[str, ...]
) -> None:
    body = f"[in] t = Conv(x, w) {gate} [mul] z = Mul(k, t) [out] y = Conv(z, w)"
    found = regions(network(body, outputs))
    home = {name: index for index, region in enumerate(found) for name in region.sites}
    assert home["k"] == home["mul"]


def test_a_gate_behind_which_nothing_multiplies_is_not_cut_out(network: Build) -> None:
    found = regions(network(GATED.format(more=""), ("z",), **SQUEEZE))
    assert found[-1].sites[-3:] == ("se.fc2", "se.gate", "se/Mul")


def test_a_depthwise_layer_is_not_worth_its_conversions(network: Build) -> None:
    depthwise = f"Conv<group={WIDE}, pads=[1,1,1,1]>"
    body = f"[a] t = Conv(x, w) [d] u = {depthwise}(t, v) [r] r = Relu(u) [b] y = Conv(r, w)"
    found = regions(network(body, v=(WIDE, 1, 3, 3)))
    assert [region.sites for region in found] == [("a", "d", "r"), ("b",)]


def test_what_follows_a_product_stays_with_it(network: Build) -> None:
    body = """[a] t = Conv(x, w) [h] h = HardSigmoid(t) [m] m = Mul(h, t)
    [p] p = MaxPool<kernel_shape=[2,2], strides=[2,2]>(m) [b] y = Conv(p, w)"""
    found = regions(network(body))
    assert [region.sites for region in found] == [("a", "h", "m", "p"), ("b",)]
    assert found[1].border_elements == {0: WIDE * 16}


def test_a_cut_is_before_what_makes_a_tensor_larger(network: Build) -> None:
    pads = np.int64([0, 0, 1, 1, 0, 0, 1, 1])
    found = regions(network("[a] t = Conv(x, w) [p] p = Pad(t, n) [b] y = Conv(p, w)", n=pads))
    assert [region.sites for region in found] == [("a",), ("p", "b")]


def test_a_large_piece_is_divided_between_its_layers(network: Build) -> None:
    layers = 12
    features = ["x", *(f"f{i}" for i in range(layers))]
    body = " ".join(
        f"[l{i}.cat] k{i} = Concat<axis=1>({', '.join(features[: i + 1])}) "
        f"[l{i}.conv1] m{i} = Conv(k{i}, w{i}) [l{i}.conv2] f{i} = Conv(m{i}, v)"
        for i in range(layers)
    )
    weights = {f"w{i}": (128, WIDE * (i + 1), 1, 1) for i in range(layers)}
    last = f"[cat] y = Concat<axis=1>({', '.join(features)})"
    found = regions(network(f"{body} {last}", v=(WIDE, 128, 1, 1), **weights))
    parts = [[name for name in region.sites if "conv" in name] for region in found]
    assert all(len(part) <= LARGE_PIECE for part in parts)
    assert len(found) <= 6, "four layers would fit"
    assert all(part[0].endswith("conv1") and part[-1].endswith("conv2") for part in parts)
    assert found[-1].inputs == tuple(range(len(found) - 1))


def test_many_regions_are_joined_until_few_enough_are_left(network: Build) -> None:
    length = MANY_REGIONS + 10
    body = " ".join(f"[c{i}] t{i + 1} = Conv(t{i}, w)" for i in range(length))
    found = regions(network(f"[r] t0 = Relu(x) {body}", (f"t{length}",)))
    assert len(found) == MANY_REGIONS
    assert max(region.macs for region in found) == 2 * WIDE * WIDE * 64


def test_finished_outputs_do_not_forbid_cuts(network: Build) -> None:
    body = "[h] y = Conv(x, w) [a] a = Conv(x, w) [b] b = Conv(a, w) [k] z = Relu(a)"
    found = regions(network(body, ("y", "b", "z")))
    assert names(found) == ["h", "a", "b"]
    assert [region.inputs for region in found] == [(), (), (1,)]


def test_arithmetic_on_shapes_keeps_nothing_alive(network: Build) -> None:
    body = """[s] s = Shape(x) [g] g = Gather(s, zero) [k] k = Concat<axis=0>(g, rest)
    [a] t = Conv(x, w) [b] u = Conv(t, w) [r] r = Reshape(u, k) [m] y = MatMul(r, v)"""
    constants = {"zero": np.int64([0]), "rest": np.int64([-1])}
    found = cut_regions(network(body, v=(WIDE * 64, 4), **constants).graph_model)
    assert [region.sites for region in found] == [("s", "g", "k", "a"), ("b", "r", "m")]
    # The shape that the second reads from the first needs no conversion.
    assert found[1].border_elements == {0: WIDE * 64}


def test_a_tensor_that_a_subgraph_reads_is_needed_until_then(network: Build) -> None:
    body = """[a] t = Conv(x, w) [b] s = Conv(t, w) [d] u = Conv(s, w) [i] v = If(flag) <
      then_branch = yes () => (float p) { p = Add(t, u) },
      else_branch = no () => (float q) { q = Relu(u) }> [c] y = Conv(v, w)"""
    found = cut_regions(network(body, inputs=("bool flag",), infer=False).graph_model)
    # Between b and d, s would be alone if the subgraph did not read t.
    assert [region.sites for region in found] == [("a",), ("b", "d", "i"), ("c",)]
    assert found[1].border_elements == {0: WIDE * 64}


def test_a_graph_without_products_is_one_region(network: Build) -> None:
    found = regions(network("[a] t = Relu(x) [b] y = Exp(t)"))
    assert found == (Region("a..b", ("a", "b"), (), {}, 0),)


def test_a_graph_without_nodes_has_no_region() -> None:
    graph = ir.Graph([], [], nodes=[], opset_imports={"": 21}, name="empty")
    assert cut_regions(ir.Model(graph, ir_version=10)) == ()


def test_nodes_of_one_name_give_regions_of_different_names(network: Build) -> None:
    model = network("[a] t = Conv(x, w) [b] y = Conv(t, w)")
    for node in model.graph_model.graph:
        node.name = "conv"
    assert names(cut_regions(model.graph_model)) == ["conv", "conv#1"]


def test_an_exported_network_is_cut_and_left_as_it_is(exported: Model) -> None:
    before = [node.name for node in exported.graph_model.graph]
    assert 2 <= len(cut_regions(exported.graph_model)) <= 4
    assert [node.name for node in exported.graph_model.graph] == before


@st.composite
def random_graphs(draw: st.DrawFn) -> tuple[str, tuple[str, ...]]:
    """Operators and outputs of graphs with any wiring: branches, gates, several ends."""
    forms = ("Conv({0}, w)", "Conv({0}, w)", "Relu({0})", "Add({0}, {1})", "Mul({0}, {1})")
    forms += ("GlobalAveragePool({0})", "Sigmoid({0})")
    tensors = ["x"]
    lines: list[str] = []
    for index in range(draw(st.integers(1, 30))):
        recent = st.sampled_from(tensors[-5:])
        form = draw(st.sampled_from(forms)).format(draw(recent), draw(recent))
        lines.append(f"[m{index % 3}.n{index}] t{index} = {form}")
        tensors.append(f"t{index}")
    read = {name for line in lines for name in re.findall(r"\w+", line.partition("=")[2])}
    return " ".join(lines), tuple(name for name in tensors[1:] if name not in read)


@settings(max_examples=100, suppress_health_check=[HealthCheck.too_slow])
@given(graph=random_graphs())
def test_any_graph_is_partitioned_in_an_order_that_can_run(
    network: Build, graph: tuple[str, tuple[str, ...]]
) -> None:
    body, outputs = graph
    model = network(body, outputs)
    assert regions(model) == regions(model)
