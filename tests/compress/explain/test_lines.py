from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compress.explaining import Side
from compress.explaining.dressing import Dressing, Obstacle
from compress.explaining.lines import Known, Settled, other_names, settle, tabulate
from compress.graph import Site

Row = Callable[..., Any]
PRECISIONS = st.sampled_from(["float32", "int8", "convert", "move", "bfloat16"])
ROWS = st.lists(
    st.builds(
        lambda name, us, precision, op, known: (name, us, precision, op, name if known else ""),
        st.sampled_from("abcdefgh"),
        st.floats(0, 1e4, allow_subnormal=False),
        PRECISIONS,
        st.sampled_from(["Conv", "Transpose", "QuantizeLinear", "Add"]),
        st.booleans(),
    ),
    max_size=12,
)


@given(ROWS, ROWS, st.floats(0.1, 1e5), st.floats(0.1, 1e5), st.sets(st.sampled_from("abcdefgh")))
def test_parts_add_up_to_both_latencies(
    row: Row,
    first: list[Any],
    second: list[Any],
    before_us: float,
    after_us: float,
    dressed: set[str],
) -> None:
    known = Known(
        {name: "Transpose" if name == "h" else "Conv" for name in "abcdefg"},
        {"a": "because"},
        Dressing(
            ends={"b": (("a",), ("c",)), "d": ((), ("e",))},
            types={"a": "Conv"},
            chains={"f": "e"},
            dressed=frozenset(dressed),
        ),
    )
    before = Side("float", "runtime", before_us, tuple(row(*one) for one in first))
    after = Side("int8", "runtime", after_us, tuple(row(*one) for one in second))
    table = tabulate(before, after, known)
    rel = pytest.approx
    assert sum(part.before_us for part in table.parts) == rel(before_us, rel=1e-9, abs=1e-6)
    assert sum(part.after_us for part in table.parts) == rel(after_us, rel=1e-9, abs=1e-6)
    difference = after_us - before_us
    assert sum(p.change_us for p in table.parts) == rel(difference, rel=1e-9, abs=1e-6)
    # Every kernel lies in exactly one line.
    assert sum(len(line.before) for line in table.lines) == len(first)
    assert sum(len(line.after) for line in table.lines) == len(second)
    assert sum(p.lines for p in table.parts) == len(table.lines)


@given(st.lists(st.floats(0, 1e5, allow_subnormal=False), max_size=30), st.floats(0.01, 1e5))
def test_settled_times_fit_the_latency(times: list[float], latency: float) -> None:
    found = settle(times, latency)
    assert sum(found.times_us) + found.rest_us == pytest.approx(latency, rel=1e-9, abs=1e-6)
    assert found.profiler_us >= 0
    assert found.rest_us >= -1e-6
    pairs = list(zip(times, found.times_us, strict=True))
    assert all(0 <= after <= before * (1 + 1e-12) for before, after in pairs)
    assert [after for _, after in sorted(pairs)] == sorted(found.times_us)


def test_the_profiler_costs_every_kernel_the_same() -> None:
    # Three kernels of 10, 4 and 1, each measured with 2 more; the latency is that of all three.
    found = settle([12, 6, 3], 15)
    assert found.times_us == pytest.approx([10, 4, 1])
    assert found.profiler_us == pytest.approx(2)
    assert found.rest_us == pytest.approx(0)
    # Less than the kernels' own: the shortest cannot give more than they have.
    assert settle([12, 1], 9).times_us == pytest.approx([9, 0])
    assert settle([3, 4], 10) == Settled((3, 4), 3)


def test_what_no_constant_explains_is_scaled() -> None:
    found = settle([900, 10, 10, 10], 93)
    assert found.scaled
    assert found.times_us == pytest.approx([90, 1, 1, 1])


def table_of(before: list[Any], after: list[Any], known: Known) -> dict[str, Any]:
    sides = [
        Side(name, "onnxruntime", sum(r["p50_us"] for r in rows), tuple(rows))
        for name, rows in (("float", before), ("int8", after))
    ]
    return {line.name: line for line in tabulate(*sides, known).lines}


def test_kinds_of_lines(row: Row) -> None:
    known = Known(
        {"faster": "Conv", "slow": "Conv", "kept": "Conv", "add": "Add", "gone": "Relu"},
        {"kept": "its weight is not a constant"},
    )
    before = [
        row("faster", 50), row("slow", 10), row("kept", 20), row("gone", 3, op_type="Relu"),
        row("reorder", 4, "move", "ReorderOutput", ""),
    ]  # fmt: skip
    after = [
        row("q", 2, "convert", "QuantizeLinear", "", outputs=[]), row("faster", 20, "int8"),
        row("slow", 15, "int8"), row("dq", 2, "convert", "DequantizeLinear", ""),
        row("kept", 20), row("add", 3, "int8", "QLinearAdd"),
        row("transpose", 5, "move", "Transpose", ""), row("own", 1, op_type="Mul", site="new"),
    ]  # fmt: skip
    lines = table_of(before, after, known)
    kinds = {name: line.kind for name, line in lines.items()}
    assert kinds == {
        "q": "convert", "faster": "narrow", "slow": "slower", "dq": "convert", "kept": "float",
        "add": "own", "gone": "absorbed", "reorder": "move", "transpose": "move", "own": "own",
    }  # fmt: skip
    assert lines["kept"].reason == "its weight is not a constant"
    assert lines["dq"].near == ("slow", "kept")
    assert lines["dq"].around == ("Conv",)
    assert lines["q"].around == ()
    assert (lines["slow"].before_us, lines["slow"].after_us) == (10, 15)


def test_times_within_noise_are_not_slower(row: Row) -> None:
    lines = table_of(
        [row("a", 100), row("b", 2)],
        [row("a", 104, "int8"), row("b", 2.9, "int8")],
        Known({"a": "Conv", "b": "Conv"}),
    )
    assert {line.kind for line in lines.values()} == {"narrow"}


def test_what_dresses_an_unfused_operator_is_its_own(row: Row) -> None:
    dressing = Dressing(
        ends={"in_q": (("",), ("conv",)), "in_dq": (("",), ("conv",)), "w_dq": ((), ("conv",)),
              "out_q": (("norm",), ("",)), "other": (("sigmoid",), ("",))},
        types={"conv": "Conv", "norm": "BatchNormalization", "sigmoid": "Sigmoid"},
        chains={"norm": "conv"},
        dressed=frozenset(["conv"]),
        obstacles={"conv": Obstacle("why", "something stands between", "move it")},
    )  # fmt: skip
    after = [
        row("w_dq", 3, "convert", "DequantizeLinear", inputs=[]),
        row("in_q", 4, "convert", "QuantizeLinear"),
        row("in_dq/duplicated", 4, "convert", "DequantizeLinear", ""),
        row("conv", 40), row("norm", 5, op_type="BatchNormalization"),
        row("out_q", 4, "convert", "QuantizeLinear"),
        row("sigmoid", 2, op_type="Sigmoid"), row("other", 1, "convert", "QuantizeLinear"),
    ]  # fmt: skip
    known = Known(
        {"conv": "Conv", "norm": "BatchNormalization", "sigmoid": "Sigmoid"}, {}, dressing
    )
    lines = table_of([row("conv", 10), row("sigmoid", 2, op_type="Sigmoid")], after, known)
    owned = {name for name, line in lines.items() if line.owner == "conv"}
    assert owned == {"w_dq", "in_q", "in_dq/duplicated", "conv", "norm", "out_q"}
    assert {lines[name].kind for name in owned} == {"unfused"}
    assert lines["conv"].reason == "something stands between"
    assert lines["other"].kind == "convert"
    assert lines["other"].around == ("Sigmoid",)


def test_sites_that_lost_their_names_are_matched_in_order(row: Row) -> None:
    def site(name: str, op_type: str, macs: int) -> Site:
        return Site(name, op_type, (), (), None, macs, 0, 0)

    before = [
        site("a", "Conv", 10),
        site("b", "Conv", 20),
        site("r", "Relu", 0),
        site("c", "Gemm", 5),
    ]
    after = [site("n1", "Conv", 10), site("n2", "Conv", 20), site("extra", "Conv", 7),
             site("c", "Gemm", 5)]  # fmt: skip
    assert other_names(before, after) == {"n1": "a", "n2": "b"}
    lines = table_of(
        [row("a", 10), row("b", 20)],
        [row("n1", 5, "int8"), row("n2", 9, "int8")],
        Known({"a": "Conv", "b": "Conv"}, names=other_names(before, after)),
    )
    assert {(line.site, line.before_us, line.after_us) for line in lines.values()} == {
        ("a", 10, 5),
        ("b", 20, 9),
    }
