from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from compress.errors import UsageError
from compress.model import TensorSpec
from compress.registry import create_target
from compress.target import BuiltElsewhere, Target
from targets import tensorrt
from targets.gpu import Gpu
from targets.tensorrt import TensorRT
from targets.tensorrt_layers import kernel_of

IMAGES = TensorSpec("x", ("batch", 3, 32, 32))


def test_it_is_registered_and_built_elsewhere() -> None:
    target = create_target("tensorrt", batch=2)
    assert isinstance(target, TensorRT)
    assert isinstance(target, Target)
    assert isinstance(target, BuiltElsewhere)
    assert not isinstance(create_target("onnxruntime"), BuiltElsewhere)


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"batch": 0}, "at least 1"),
        ({"workspace_mib": 1.5}, "whole numbers"),
        ({"max_batch": True}, "whole numbers"),
        ({"min_batch": 4, "batch": 2}, "above the batch 2"),
        ({"hardware_compatible": "all"}, "ampere_plus"),
        ({"compute_capability": "sm89"}, "write 8.9"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], part: str) -> None:
    with pytest.raises(UsageError, match=part):
        TensorRT(**options)


def test_the_largest_batch_holds_the_one_that_is_asked_for() -> None:
    assert TensorRT(batch=64).max_batch == 64
    assert TensorRT(batch=2, max_batch=8).max_batch == 8


def test_profiles_are_of_inputs_with_a_dynamic_batch() -> None:
    target = TensorRT(min_batch=2, batch=4, max_batch=8)
    fixed, number = TensorSpec("mask", (1, 32)), TensorSpec("t", ())
    assert target.profiles((IMAGES, fixed, number)) == {
        "x": {"min": [2, 3, 32, 32], "opt": [4, 3, 32, 32], "max": [8, 3, 32, 32]}
    }
    assert target.profiles((fixed,)) == {}


def test_everything_that_is_missing_is_named_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorrt, "find_gpu", lambda: "The NVIDIA driver finds no GPU.")
    monkeypatch.setattr(tensorrt, "_version", {"torch": "2.13.0+cpu"}.get)
    check = TensorRT().check()
    assert not check.available
    assert check.reason == (
        "The NVIDIA driver finds no GPU. TensorRT is not installed. The installed torch is built "
        "without CUDA."
    )
    assert "pip install 'hwcompress[tensorrt]'" in check.install
    assert TensorRT().builder() == {}

    versions = {"torch": "2.13.0", "tensorrt": "11.4.0.106"}
    monkeypatch.setattr(tensorrt, "_version", versions.get)
    monkeypatch.setattr(tensorrt, "find_gpu", lambda: Gpu("NVIDIA L4", (8, 9)))
    assert TensorRT().check().available
    assert TensorRT().builder() == {
        "tensorrt": "11.4.0.106",
        "gpu": "NVIDIA L4",
        "compute_capability": "8.9",
    }


def test_facts_say_that_nobody_has_run_it() -> None:
    facts = TensorRT().capabilities
    assert "unverified on hardware" in facts.notes[0]
    assert {"float32", "float16", "int8"} <= set(facts.precisions)
    assert facts.activation == "int8"
    assert "unverified" in TensorRT().build_sheet((IMAGES,))["unverified"]


def test_a_gpu_that_is_named_decides_which_formats_there_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tensorrt, "find_gpu", lambda: "The NVIDIA driver finds no GPU.")
    ada = TensorRT(compute_capability="8.9").capabilities
    assert "float8_e4m3fn" in ada.precisions
    assert "float8_e4m3fn" not in TensorRT().capabilities.precisions
    assert any("No GPU is known" in note for note in TensorRT().capabilities.notes)
    assert not any("No GPU is known" in note for note in ada.notes)


@dataclasses.dataclass(frozen=True)
class Layer:
    name: str
    entry: Any
    op_type: str
    precision: str
    site: str


def layer(kind: str, types: str, metadata: str = "", name: str = "layer") -> dict[str, Any]:
    inputs = [{"Name": "x", "Format/Datatype": types}]
    return {"Name": name, "LayerType": kind, "Inputs": inputs, "Metadata": metadata}


LAYERS = (
    Layer("a name", "conv1 + relu", "", "float32", "conv1"),
    Layer(
        "int8",
        layer(
            "CaskConvolution",
            "Thirty-two wide channel vectorized row major Int8 format",
            "[ONNX Layer: conv1.weight/dq]\x1e[ONNX Layer: conv1]\x1e[ONNX Layer: y/q]",
        ),
        "CaskConvolution",
        "int8",
        "conv1",
    ),
    Layer("half", layer("CaskConvolution", "Channel major FP16 format where channel % 8 == 0"),
          "CaskConvolution", "float16", "layer"),
    Layer("half by name", layer("gemm", "Half"), "gemm", "float16", "layer"),
    Layer("bfloat16", layer("gemm", "Row major linear BF16"), "gemm", "bfloat16", "layer"),
    Layer("float8", layer("gemm", "Row major linear FP8 format"), "gemm", "float8", "layer"),
    Layer("float32", layer("gemm", "Row major linear FP32"), "gemm", "float32", "layer"),
    Layer("move", layer("Reformat", "Row major linear FP32"), "Reformat", "move", "layer"),
    Layer("only quantizing", layer("Cast", "Int8", name="x/q"), "Cast", "int8", ""),
    Layer("nothing known", {}, "", "float32", ""),
)  # fmt: skip


@pytest.mark.parametrize("case", LAYERS, ids=lambda case: case.name)
def test_layers_of_the_inspector_become_kernels(case: Layer) -> None:
    kernel = kernel_of(case.entry)
    assert (kernel.op_type, kernel.precision, kernel.site) == (
        case.op_type,
        case.precision,
        case.site,
    )
