from __future__ import annotations

from compress.kernel_rows import kernel_rows
from compress.target import Kernel, KernelTensors, KernelTime, TensorType


def test_macs_go_to_the_longest_kernel_of_a_site() -> None:
    tensor = TensorType((1, 4, 8, 8), "float32")
    moved = KernelTensors((tensor,), (TensorType((4, 4), "int8"),), (tensor,))
    times = [
        KernelTime(Kernel("in", "QuantizeLinear", "convert", "conv"), 9.0),
        KernelTime(Kernel("first", "Conv", "int8", "conv", tensors=moved), 4.0),
        KernelTime(Kernel("second", "Conv", "int8", "conv"), 7.0),
        KernelTime(Kernel("other", "Relu", "float32", ""), 0.0),
    ]
    rows = kernel_rows(times, {"conv": 1000})
    assert [row["macs"] for row in rows] == [0, 0, 1000, 0]
    assert [row["share"] for row in rows] == [0.45, 0.2, 0.35, 0.0]
    assert [row["bytes"] for row in rows] == [None, 2 * 4 * 256 + 16, None, None]
    assert rows[1]["weights"] == [[[4, 4], "int8"]]


def test_bytes_of_types_that_numpy_lacks() -> None:
    shape = (1, 3, 5)
    sizes = {
        name: TensorType(shape, name).bytes
        for name in ("bfloat16", "float8", "int4", "bool", "dynamic")
    }
    assert sizes == {"bfloat16": 30, "float8": 15, "int4": 8, "bool": 15, "dynamic": 0}
    assert TensorType((-1, 3), "float32").bytes == 12
