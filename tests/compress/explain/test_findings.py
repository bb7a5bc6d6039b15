from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest

from compress.explaining import Finding, Side
from compress.explaining.bounds import memory
from compress.explaining.case import Facts
from compress.explaining.dressing import Dressing, Obstacle
from compress.explaining.findings import find, headline, nothing
from compress.explaining.lines import Known, tabulate
from compress.explaining.scaling import (
    batch_finding,
    delegate_findings,
    threads_finding,
)
from compress.explaining.widths import Width, odd_sites, width_finding
from compress.graph import Site
from compress.target import Capabilities, FusablePattern, Kernel

Row = Callable[..., Any]
CAPABILITIES = Capabilities(
    source="made up",
    opset=21,
    precisions=("float32", "int8"),
    patterns=(
        FusablePattern("Conv", "matmul", "made up"),
        FusablePattern("GlobalAveragePool", "pool", "made up"),
        FusablePattern("HardSigmoid", "unary", "made up"),
    ),
)


def explained(
    before: list[Any], after: list[Any], known: Known, outside: float = 0.0, **facts: Any
) -> dict[str, Finding]:
    """Findings by kind, where the latency is the sum of the kernels and what lies outside."""
    first, second = (
        Side(name, "onnxruntime", sum(r["p50_us"] for r in rows) + extra, tuple(rows))
        for name, rows, extra in (("float.onnx", before, 0.0), ("int8.onnx", after, outside))
    )
    table = tabulate(first, second, known)
    given = Facts("onnxruntime", CAPABILITIES, "a CPU", dressing=known.dressing)
    found = find(first, second, table, dataclasses.replace(given, **facts))
    assert [f.us for f in found] == sorted((f.us for f in found), reverse=True)
    assert all(f.sentence.endswith(".") and f.us > 0 for f in found)
    return {f.kind: f for f in found}


def test_unfused_operators_name_the_obstacle_and_its_cure(row: Row) -> None:
    dressing = Dressing(
        ends={"q": (("",), ("a",)), "w": ((), ("a",))},
        types={"a": "Conv", "b": "Conv"},
        dressed=frozenset("ab"),
        obstacles={
            name: Obstacle("scale", "its input has 64 scales", "use one scale") for name in "ab"
        },
    )
    after = [
        row("w", 3, "convert", "DequantizeLinear", inputs=[]),
        row("q", 5, "convert", "QuantizeLinear"), row("a", 40), row("b", 42),
    ]  # fmt: skip
    known = Known({"a": "Conv", "b": "Conv"}, {}, dressing)
    found = explained([row("a", 4), row("b", 5)], after, known, depthwise=frozenset("ab"))
    finding = found["unfused"]
    assert finding.us == pytest.approx(90 - 9)
    assert finding.sites == ("a", "b")
    assert "2 sites (depthwise Conv) run in float between" in finding.sentence
    assert "take 82.0 µs where the original takes 9.0 µs" in finding.sentence
    assert "because their input has 64 scales: a, b." in finding.sentence
    assert "2 kernels around them take another 8.0 µs" in finding.sentence
    assert "1 weight is dequantized at every call" in finding.sentence
    assert finding.advice == "Use one scale."


def test_slower_kernels_and_what_would_come_back(row: Row) -> None:
    shape = [[1, 8, 10, 10], "uint8"]
    after = [
        row("big", 60, "int8", "QLinearConv", macs=5, inputs=[shape], outputs=[shape]),
        row("small", 7, "int8", "QLinearConv", macs=5, inputs=[shape], outputs=[shape]),
        row("q", 4, "convert", "QuantizeLinear", "", inputs=[[[1, 4000], "float32"]]),
    ]
    known = Known({"big": "Conv", "small": "Conv"})
    found = explained([row("big", 20), row("small", 5)], after, known)["slower"]
    assert found.us == pytest.approx(42)
    assert "2 Conv kernels are slower in int8 than in float32, together by 42.0 µs" in (
        found.sentence
    )
    assert "The worst, big, went from 20.0 µs to 60.0 µs" in found.sentence
    # 4 µs for 4000 numbers: 1600 numbers at the borders of each cost 1.6 µs.
    assert found.numbers["predicted_gain_us"] == pytest.approx(40 - 1.6)
    assert found.numbers["gaining"] == ["big"]
    assert "Leave big in float: about 38.4 µs would come back" in found.advice


def test_slower_kernels_on_a_cpu_without_a_dot_product(row: Row) -> None:
    capabilities = dataclasses.replace(CAPABILITIES, int8_dot_product=False)
    after = [row("a", 20, "int8", "QLinearConv", macs=100)]
    found = explained(
        [row("a", 10)], after, Known({"a": "Conv"}), capabilities=capabilities, cpu="an old CPU"
    )["slower"]
    assert "This CPU (an old CPU) has no int8 dot product (VNNI)" in found.sentence
    assert "keep the float model" in found.advice


def test_slower_kernels_with_signed_activations(row: Row) -> None:
    signed = [[[1, 8, 4, 4], "int8"]]
    after = [row("a", 20, "int8", "QLinearConv", macs=100, inputs=signed)]
    found = explained([row("a", 10)], after, Known({"a": "Conv"}))["slower"]
    assert "They read int8 activations" in found.sentence
    assert "uint8" in found.advice


def test_conversions_are_told_by_what_needs_them(row: Row) -> None:
    dressing = Dressing(
        ends={"dq": (("a",), ("gate",)), "q": (("gate",), ("b",)), "in": (("",), ("a",)),
              "mean_dq": (("b",), ("mean",))},
        types={"a": "Conv", "b": "Conv", "gate": "HardSigmoid", "mean": "ReduceMean"},
        shape_only=frozenset(["idle"]),
    )  # fmt: skip
    after = [
        row("in", 4, "convert", "QuantizeLinear"), row("a", 10, "int8"),
        row("dq", 8, "convert", "DequantizeLinear"), row("gate", 5, op_type="HardSigmoid"),
        row("q", 7, "convert", "QuantizeLinear"), row("b", 10, "int8"),
        row("mean_dq", 6, "convert", "DequantizeLinear"), row("mean", 3, op_type="ReduceMean"),
        row("idle", 9, "convert", "DequantizeLinear"),
    ]  # fmt: skip
    known = Known({"a": "Conv", "b": "Conv", "mean": "ReduceMean"}, {}, dressing)
    before = [row("a", 10), row("b", 10), row("mean", 3, op_type="ReduceMean")]
    sides = [Side(n, "onnxruntime", sum(r["p50_us"] for r in rows), tuple(rows))
             for n, rows in (("float", before), ("int8", after))]  # fmt: skip
    table = tabulate(*sides, known)
    found = find(*sides, table, Facts("onnxruntime", CAPABILITIES, dressing=dressing))
    sentences = {f.sentence: f.advice for f in found if "conversion" in f.kind}
    gate = next(s for s in sentences if "around HardSigmoid" in s)
    assert gate.startswith("2 conversions between float and integers around HardSigmoid take 15.0")
    assert "the largest between a and gate (8.0 µs)" in gate
    assert sentences[gate] == "`compress run` has an integer form of HardSigmoid for onnxruntime."
    mean = next(s for s in sentences if "around ReduceMean" in s)
    assert "write it as GlobalAveragePool" in sentences[mean]
    assert any("around model input take 4.0" in s or "around model input takes 4.0" in s
               for s in sentences)  # fmt: skip
    idle = next(s for s in sentences if "only its shape is read" in s)
    assert "9.0 µs" in idle
    gates = next(f for f in found if f.kind == "own kernels")
    assert "which the original does not have under these names: gate" in gates.sentence


def test_inserted_transposes(row: Row) -> None:
    after = [
        row("a", 5, "int8"), row("t", 12, "move", "Transpose", ""), row("b", 5, "int8")
    ]  # fmt: skip
    known = Known({"a": "Conv", "b": "Conv"})
    before = [row("a", 10), row("reorder", 4, "move", "ReorderInput", ""), row("b", 10)]
    found = explained(before, after, known)
    assert "1 kernel that only moves values (Transpose) takes 12.0 µs more" in (
        found["moves"].sentence
    )
    assert "The longest lies between a and b (12.0 µs)" in found["moves"].sentence
    assert found["fewer moves"].us == pytest.approx(4)
    assert found["faster"].us == pytest.approx(10)


def test_sites_in_float_say_why_and_what_int8_gained_elsewhere(row: Row) -> None:
    known = Known({"a": "Conv", "b": "Conv"}, {"b": "its weight is not a constant"})
    before = [row("a", 40, macs=10), row("b", 30, macs=10)]
    after = [row("a", 10, "int8", macs=10), row("b", 30, macs=10)]
    found = explained(before, after, known)["float"]
    assert "1 Conv site stayed in float and takes 30.0 µs (75% of int8.onnx)" in found.sentence
    assert "because its weight is not a constant: b." in found.sentence
    assert "At the 4.0x that int8 gained in the other layers they would take 7.5 µs" in (
        found.sentence
    )
    assert found.us == pytest.approx(22.5)


def test_float_operators_that_read_another_layout(row: Row) -> None:
    inputs = ([[[1, 8, 4, 5], "float32"]], [[[1, 4, 5, 8], "float32"]])
    found = explained(
        [row("m", 5, op_type="ReduceMean", inputs=inputs[0])],
        [row("m", 30, op_type="ReduceMean", inputs=inputs[1])],
        Known({"m": "ReduceMean"}),
    )["float"]
    assert "The original takes 5.0 µs there" in found.sentence
    assert "such as 1x4x5x8 instead of 1x8x4x5" in found.sentence


def test_what_the_original_computes_inside_other_kernels(row: Row) -> None:
    known = Known({"a": "Conv", "add": "Add"})
    before = [row("a", 10, fused="Add+HardSwish"), row("c", 3, op_type="Relu")]
    after = [row("a", 4, "int8"), row("add", 5, "int8", "QLinearAdd"), row("mul", 6, op_type="Mul")]
    sides = [Side(n, "onnxruntime", sum(r["p50_us"] for r in rows), tuple(rows))
             for n, rows in (("float", before), ("int8", after))]  # fmt: skip
    found = find(*sides, tabulate(*sides, known), Facts("onnxruntime", CAPABILITIES))
    own = {f.sentence for f in found if f.kind == "own kernels"}
    assert any(
        "1 Add kernel takes 5.0 µs, which the original computes inside other" in s for s in own
    )
    assert any(s.endswith("mul. The original computes HardSwish (1 times) inside other kernels.")
               for s in own)  # fmt: skip
    assert any(f.kind == "absorbed" and f.us == 3 for f in found)


@pytest.mark.parametrize("steady", [True, False])
def test_time_outside_of_kernels(row: Row, steady: bool) -> None:
    found = explained(
        [row("a", 10)], [row("a", 10)], Known({"a": "Conv"}), outside=30, steady=steady
    )["outside"]
    assert found.us == pytest.approx(30)
    assert "30.0 µs of 40.0 µs (75%) lie outside of kernels" in found.sentence
    assert ("too noisy" in found.sentence) == (not steady)


def test_nothing_to_explain(row: Row) -> None:
    side = Side("m", "onnxruntime", 20, (row("a", 10), row("b", 10)))
    known = Known({"a": "Conv", "b": "Conv"})
    table = tabulate(side, side, known)
    assert find(side, side, table, Facts("onnxruntime", CAPABILITIES)) == []
    [found] = nothing(side, side, table)
    assert "There is nothing to explain: both run the same 2 kernels" in found.sentence
    slower = dataclasses.replace(side, rows=(row("a", 10), row("b", 30)), latency_us=40)
    assert nothing(side, slower, tabulate(side, slower, known)) == []


def test_runtimes_without_times_get_no_sentences_about_kernels() -> None:
    side = Side("m", "executorch", 20)
    table = tabulate(side, side, Known({}))
    assert [part.kind for part in table.parts] == ["outside"]
    assert find(side, side, table, Facts("executorch", CAPABILITIES)) == []
    assert nothing(side, side, table) == []


def test_headlines(row: Row) -> None:
    known = Known({"a": "Conv"})
    before = Side("float", "onnxruntime", 100, (row("a", 100),))
    after = Side("int8", "onnxruntime", 50, (row("a", 50, "int8"),))
    parts = tabulate(before, after, known).parts
    text = headline(before, after, parts, (1.9, 2.1))
    assert text.startswith("int8 takes 50.0 µs in onnxruntime and float 100 µs: 2.00x as fast")
    assert "interval of the speed-up 1.90x to 2.10x" in text
    assert "Of the 50.0 µs less" in text
    assert "1/2" not in headline(before, before, parts)
    assert "equally fast" in headline(before, before, parts)
    slow = dataclasses.replace(after, latency_us=300)
    assert "3.00x slower" in headline(before, slow, tabulate(before, slow, known).parts)
    assert "cannot be told (0.90x to 1.20x)" in headline(before, after, parts, (0.9, 1.2))


@dataclasses.dataclass(frozen=True)
class Peaks:
    bandwidth_gb_s: float = 10.0

    def gmacs(self, precision: str) -> float:
        return 80.0 if precision == "int8" else 20.0


def test_layers_that_wait_for_memory(row: Row) -> None:
    # 4 MB at 10 GB/s are 400 µs, 1M multiply-accumulates at 20 G/s are 50 µs.
    before = [row("fc", 420, macs=10**6, bytes=4 * 10**6), row("conv", 420, macs=8 * 10**6)]
    after = [
        row("fc", 140, "int8", macs=10**6, bytes=10**6),
        row("conv", 140, "int8", macs=8 * 10**6),
    ]
    known = Known({"fc": "Gemm", "conv": "Conv"})
    sides = [Side(n, "r", sum(r["p50_us"] for r in rows), tuple(rows))
             for n, rows in (("float", before), ("int8", after))]  # fmt: skip
    lines = tabulate(*sides, known).lines
    [found] = memory(lines, Peaks(), 280)
    assert found.sites == ("fc",)
    assert found.sentence == (
        "1 layer does 0.25 multiply-accumulates for each byte that it moves in float, and 2 keep "
        "the arithmetic of this machine busy (fc). Where bytes decide, int8, which moves 25% of "
        "them, makes it at most 4.0x as fast; measured 3.0x (420 µs became 140 µs, 50% of the "
        "whole)."
    )
    assert memory(lines, Peaks(bandwidth_gb_s=100), 280) == []  # its weights come out of a cache


def test_widths_beside_a_step(row: Row) -> None:
    known = Known({"conv": "Conv"})
    side = Side("int8", "r", 100, (row("conv", 100, "int8"),))
    [line] = tabulate(side, side, known).lines
    width = Width("conv", "output", {40: 50.0, 42: 60.0, 48: 60.0}, {40: 40, 42: 42, 48: 48}, 42)
    assert width.penalty == pytest.approx(48 / 42)
    found = width_finding(width, line)
    assert found is not None
    assert found.sentence == (
        "conv has 42 output channels, and 42 cost as much as 48 (60.0 µs against 60.0 µs for this "
        "layer alone); 40 take 50.0 µs."
    )
    assert found.advice == "Give it 48 channels, or prune it to 40."
    assert found.us == pytest.approx(100 * (1 - 42 / 48))
    fine = dataclasses.replace(width, times_us={40: 50.0, 42: 52.5, 48: 60.0})
    assert width_finding(fine, line) is None


def test_which_widths_are_odd(row: Row) -> None:
    def site(name: str, weight: tuple[int, ...], **more: Any) -> Site:
        return Site(name, "Conv", ((1, weight[1], 8, 8),), (1, weight[0], 8, 8), weight, 10, 10, 0,
                    (1, 1), **more)  # fmt: skip

    sites = [site("odd", (42, 16, 3, 3)), site("even", (48, 16, 3, 3)), site("in", (16, 42, 1, 1)),
             site("first", (16, 3, 3, 3)), site("short", (42, 16, 3, 3)),
             site("flat", (42, 16, 3, 1))]  # fmt: skip
    times = {"odd": 30, "even": 30, "in": 20, "first": 20, "short": 1, "flat": 30}
    rows = tuple(row(name, us) for name, us in times.items())
    side = Side("m", "r", sum(times.values()), rows)
    lines = tabulate(side, side, Known(dict.fromkeys(times, "Conv"))).lines
    found = odd_sites(lines, sites, side.latency_us)
    assert [(s.name, axis) for _, s, axis in found] == [("odd", "output"), ("in", "input")]


def test_threads_that_gain_nothing(row: Row) -> None:
    one = [row("a", 20, macs=5), row("b", 20, macs=5)]
    many = [row("a", 10, macs=5), row("b", 21, macs=5)]
    [found] = threads_finding(2, 40, 38, one, many)
    assert "2 threads make it 1.05x as fast as one (38.0 µs against 40.0 µs)" in found.sentence
    assert "1 of 2 layers gains nothing from them: b" in found.sentence
    assert found.advice.startswith("Use --threads 1")
    assert threads_finding(2, 40, 22, one, many) == []


def test_a_batch_that_pays(row: Row) -> None:
    [found] = batch_finding(
        8, 40, 120, [row("fc", 30), row("a", 10)], [row("fc", 40), row("a", 80)]
    )
    assert found.us == pytest.approx(25)
    assert "At batch 8 a sample takes 15.0 µs instead of 40.0 µs" in found.sentence
    assert found.sites[0] == "fc"
    assert batch_finding(8, 40, 300, [row("fc", 40)], [row("fc", 300)]) == []


def test_partitions_of_a_delegate() -> None:
    kernels = [
        Kernel("a", "conv", "int8", "conv1", "XNNPACK"),
        Kernel("t", "transpose", "move", "", ""),
        Kernel("l", "layer_norm", "float32", "norm", ""),
        Kernel("b", "conv", "int8", "conv2", "XNNPACK"),
        Kernel("q", "quantize", "convert"),
    ]
    [found] = delegate_findings(kernels)
    assert "XNNPACK executes 2 of 5 operators in 2 partitions" in found.sentence
    assert "between them the runtime's own kernels run transpose, layer_norm (norm)" in (
        found.sentence
    )
    assert found.advice
    [whole] = delegate_findings(kernels[:1] + kernels[4:])
    assert "in 1 partition; 1 before or behind" in whole.sentence
    assert whole.advice == ""
    assert delegate_findings(kernels[1:3]) == []
