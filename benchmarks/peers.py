"""What other tools make of a float model, as engines that are called like ours.

All peers get the same exported graph and the same calibration batches, with the defaults of one
documented call; NNCF is told what is a transformer, as its documentation asks.
"""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from benchmarks.zoo import quantize_with_onnxruntime
from compress.errors import EngineError
from compress.model import Model
from compress.target import Engine, Target
from compress.trial import Trials
from targets.onnxruntime import OnnxRuntime
from targets.openvino import OpenVINO
from targets.openvino_engine import CompileSettings, OpenVinoEngine

Batches = list[dict[str, np.ndarray]]
Build = Callable[[], tuple[Engine, Target]]
ORT_FLOAT, ORT_INT8 = "ORT float32", "ORT quantize_static"
EXECUTORCH = "ExecuTorch int8"
OV_WIDE, OV_INT8, OV_QDQ = "OpenVINO default", "NNCF OpenVINO int8", "OpenVINO reading ORT's QDQ"


def peers(
    exported: Model, batches: Batches, *, threads: int, streams: int = 1, transformer: bool = False
) -> tuple[dict[str, Build], dict[str, str]]:
    """A builder for each peer, and the errors of those that fail to make a model.

    OpenVINO runs in bfloat16 what is not int8 where the CPU has it, as it does by default.
    """
    errors: dict[str, str] = {}
    runtime = OnnxRuntime(threads=threads)
    vino = OpenVINO(threads=threads, streams=streams)
    if "bfloat16" in vino.capabilities.precisions:
        vino = dataclasses.replace(vino, precision="bfloat16")

    def vino_of(model: Any) -> Build:
        settings = CompileSettings(threads=threads, streams=streams, precision=vino.precision)
        return lambda: (OpenVinoEngine("OpenVINO", model, exported.inputs, settings), vino)

    found: dict[str, Build] = {
        ORT_FLOAT: lambda: (runtime.build(exported), runtime),
        OV_WIDE: vino_of(openvino_reads(exported)),
    }
    with tempfile.TemporaryDirectory() as folder:
        try:
            quantized = quantize_with_onnxruntime(exported, batches, Path(folder))
            quantized = Model(quantized.program, exported.inputs, "quantize_static")
            found[ORT_INT8] = lambda: (runtime.build(quantized), runtime)
        except Exception as error:  # a peer that fails must not hide the others
            errors[ORT_INT8] = _first_line(error)
        else:
            try:
                with Trials() as trials:  # it crashes on DenseNet-121
                    trials.survives(vino, quantized, batches[0])
                found[OV_QDQ] = vino_of(openvino_reads(quantized))
            except EngineError as error:
                errors[OV_QDQ] = _first_line(error)
        try:
            found[OV_INT8] = vino_of(nncf_openvino(exported, batches, transformer))
        except Exception as error:  # as above
            errors[OV_INT8] = _first_line(error)
    return found, errors


def openvino_reads(model: Model) -> Any:
    """The graph as OpenVINO reads it, without what our target adds."""
    import openvino as ov

    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "model.onnx"
        ir.save(model.graph_model, source)
        core = ov.Core()
        core.set_property({"ENABLE_MMAP": False})
        return core.read_model(source)


def nncf_openvino(exported: Model, batches: Batches, transformer: bool) -> Any:
    """NNCF's defaults on OpenVINO's graph."""
    import nncf

    options = {"model_type": nncf.ModelType.TRANSFORMER} if transformer else {}
    with contextlib.redirect_stdout(None), contextlib.redirect_stderr(None):
        return nncf.quantize(
            openvino_reads(exported),
            nncf.Dataset(batches),
            subset_size=max(1, len(batches)),
            **options,
        )


def executorch_int8(module: Any, inputs: tuple[int, ...], images: np.ndarray) -> Callable[..., Any]:
    """ExecuTorch's documented int8 recipe for XNNPACK, per channel, on one thread.

    Raises:
        ImportError: executorch is not installed.
    """
    import torch
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
        XNNPACKQuantizer,
        get_symmetric_quantization_config,
    )
    from executorch.exir import to_edge_transform_and_lower
    from executorch.extension.pybindings import portable_lib
    from executorch.runtime import Runtime
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    example = (torch.zeros(inputs),)
    quantizer = XNNPACKQuantizer()
    quantizer.set_global(get_symmetric_quantization_config(is_per_channel=True))
    prepared = prepare_pt2e(torch.export.export(module.eval(), example).module(), quantizer)
    with torch.no_grad():
        for image in images:
            prepared(torch.from_numpy(image[None]))
    exported = torch.export.export(convert_pt2e(prepared), example)
    program = to_edge_transform_and_lower(exported, partitioner=[XnnpackPartitioner()])
    buffer = program.to_executorch().buffer
    # A new pool would take the old one from the programs that are loaded already.
    if portable_lib._threadpool_get_thread_count() != 1:
        portable_lib._unsafe_reset_threadpool(1)
    loaded = Runtime.get().load_program(buffer)
    method = loaded.load_method("forward")

    def call(array: np.ndarray, keep: object = loaded) -> np.ndarray:
        # The program has a fixed batch of 1, and writes each output over the one before.
        rows = (torch.from_numpy(array[index : index + 1]) for index in range(len(array)))
        return np.concatenate([np.array(method.execute([row])[0]) for row in rows])

    return call


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:300]
