"""torch -> ONNX once, with names kept and outputs checked against the original."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
import torch

from compress.errors import ExportError, UnsupportedError, UsageError
from compress.graph import NAME_SCOPES, Site, graph_sites, name_sites
from compress.model import BATCH, Arrays, Model, Step, TensorSpec
from compress.progress import Progress, silent
from compress.reference import (
    largest_difference,
    largest_magnitude,
    reference_session,
    run,
)

if TYPE_CHECKING:
    from compress.data import Data

_CHECK_BATCHES = (1, 3)
_RELATIVE_TOLERANCE = 1e-3


def to_onnx(
    model: Model, opset: int, progress: Progress = silent, data: Data | None = None
) -> Model:
    """The model at the ONNX stage; one that is there already comes back unchanged.

    The batch axis is dynamic where the model allows. Every operator is named after the module
    that it came from (`layer1.0.conv1`, `layer1.0/Add`), and its outputs are compared with the
    original's on random inputs and on the first of `data`; the differences are the step's
    details.

    Raises:
        UnsupportedError: torch.export cannot capture the model.
        ExportError: the ONNX model computes something else.
    """
    if model.stage == "onnx":
        return model
    with progress("Export to ONNX", total=3) as advance:
        program, dynamic = _capture(model)
        advance(note="captured")
        graph_model = _convert(program, opset)
        advance(note="converted")
        inputs = _name_batch(graph_model, model.inputs, dynamic)
        name_sites(graph_model)
        exported = replace(model, program=graph_model, inputs=inputs)
        details: dict[str, Any] = {"opset": opset, "dynamic_batch": dynamic}
        batches = _CHECK_BATCHES if exported.dynamic_batch else (None,)
        details |= check_export(model, exported, [exported.example(batch) for batch in batches])
        if data is not None:
            size = next((spec.concrete()[0] for spec in inputs if spec.shape), 1)
            real = next(iter(data.batches(size)))
            if len(real) == size:
                on_data = check_export(model, exported, [dict(real.inputs)])
                details["max_abs_difference_on_calibration"] = on_data["max_abs_difference"]
        advance(note="checked")
    return exported.evolve(graph_model, Step("export", {"opset": opset}, details))


def sites(model: Model, opset: int = 21) -> tuple[Site, ...]:
    """The operators of a model in order of execution (see `compress.graph.graph_sites`).

    A model at the torch stage is exported first, so that names and counts are those of the
    graph that will be deployed.
    """
    return graph_sites(to_onnx(model, opset).graph_model)


def _capture(model: Model) -> tuple[torch.export.ExportedProgram, bool]:
    module = model.torch_module.eval()
    batched = [bool(spec.shape) for spec in model.inputs]
    if all(not spec.shape or spec.shape[0] in (1, BATCH) for spec in model.inputs):
        # torch.export specialises sizes 0 and 1, so the dynamic trace needs another one.
        axis = torch.export.Dim(BATCH, min=1, max=65535)
        shapes = tuple({0: axis} if has_axes else {} for has_axes in batched)
        specs = [
            replace(spec, shape=(BATCH, *spec.shape[1:])) if spec.shape else spec
            for spec in model.inputs
        ]
        arguments = _tensors(replace(model, inputs=tuple(specs)).example(2))
        try:
            if _follows_batch(module, arguments):
                return _export(module, arguments, shapes), True
        except Exception as error:
            logging.getLogger(__name__).debug("no dynamic batch: %s", error)
    _require_runs(model)
    try:
        return _export(module, _tensors(model.example()), None), False
    except Exception as error:
        raise UnsupportedError(
            f"torch.export cannot capture {model.name}: {_first_line(error)} Give a model "
            f"without data-dependent Python control flow, or export it to ONNX yourself and "
            f"pass the .onnx file."
        ) from error


def _follows_batch(module: torch.nn.Module, arguments: tuple[torch.Tensor, ...]) -> bool:
    """Whether two samples in give two samples out, for every output.

    It also finds what a program from torch.export checks only when it is called: its sizes.
    """
    with torch.no_grad():
        outputs = torch.utils._pytree.tree_leaves(module(*arguments))
    tensors = [out for out in outputs if isinstance(out, torch.Tensor)]
    return all(out.ndim and out.shape[0] == 2 for out in tensors)


def _require_runs(model: Model) -> None:
    """Refuse shapes that the module itself cannot take.

    Raises:
        UsageError: it fails on them.
    """
    try:
        run_torch(model.torch_module, model.example())
    except Exception as error:
        given = ", ".join(str(spec) for spec in model.inputs)
        raise UsageError(
            f"{model.name} cannot run on inputs {given}: {_first_line(error)} Give the shapes it "
            f"was trained with as --input, for example --input 1x3x224x224."
        ) from error


def _export(
    module: torch.nn.Module, arguments: tuple[torch.Tensor, ...], shapes: Any
) -> torch.export.ExportedProgram:
    with _quiet(), torch.no_grad():
        return torch.export.export(module, arguments, dynamic_shapes=shapes, strict=False)


def _tensors(arrays: Arrays) -> tuple[torch.Tensor, ...]:
    return tuple(torch.from_numpy(array) for array in arrays.values())


def _convert(program: torch.export.ExportedProgram, opset: int) -> ir.Model:
    import onnxscript.optimizer as optimizer

    try:
        with _quiet():
            # optimize=False: BatchNorm is folded by our own pass, in float64 and checked.
            exported = torch.onnx.export(
                program, dynamo=True, opset_version=opset, optimize=False, verbose=False
            )
            if exported is None:
                raise ExportError("torch.onnx.export returned no program.")
            graph_model = exported.model
            optimizer.inline(graph_model)
            optimizer.fold_constants(graph_model, onnx_shape_inference=True)
            optimizer.remove_unused_nodes(graph_model)
    except Exception as error:
        raise ExportError(
            f"torch.onnx.export failed: {_first_line(error)} Operators without an ONNX "
            f"translation have to be replaced in the model, or pass an .onnx file."
        ) from error
    for node in graph_model.graph:
        # Source paths and stack traces of the exporting machine do not belong in an artifact.
        for key in [key for key in node.metadata_props if key != NAME_SCOPES]:
            del node.metadata_props[key]
    return graph_model


def _name_batch(
    graph_model: ir.Model, specs: tuple[TensorSpec, ...], dynamic: bool
) -> tuple[TensorSpec, ...]:
    """Call the symbolic axis 0 `batch` everywhere, and read the inputs' final names."""
    graph = graph_model.graph
    symbols = {
        str(value.shape[0])
        for value in graph.inputs
        if dynamic and value.shape and not isinstance(value.shape[0], int)
    }
    values = [*graph.inputs, *(out for node in graph for out in node.outputs)]
    for value in values if symbols else ():
        if value.shape is not None and any(str(size) in symbols for size in value.shape):
            value.shape = ir.Shape(
                [BATCH if str(size) in symbols else size for size in value.shape]
            )
    named = []
    for value, spec in zip(graph.inputs, specs, strict=True):
        shape = (BATCH, *spec.shape[1:]) if dynamic and spec.shape else spec.concrete()
        value.name = spec.name
        named.append(replace(spec, shape=tuple(shape)))
    return tuple(named)


def check_export(model: Model, exported: Model, examples: Sequence[Arrays]) -> dict[str, float]:
    """Largest difference of the ONNX model from the torch module, and the largest output.

    Raises:
        ExportError: it is more than rounding explains.
    """
    worst, scale = 0.0, 0.0
    runtime = reference_session(exported.graph_model)
    for arrays in examples:
        expected = run_torch(model.torch_module, arrays)
        got = list(run(runtime, arrays).values())
        if len(got) != len(expected):
            raise ExportError(
                f"{model.name} returns {len(expected)} tensors and its ONNX export {len(got)}. "
                f"Return every tensor once, and nothing but tensors."
            )
        for mine, theirs in zip(got, expected, strict=True):
            if mine.shape != theirs.shape:
                raise ExportError(
                    f"The ONNX export of {model.name} returns shape {mine.shape} where the "
                    f"original returns {theirs.shape}. Please report the model."
                )
            worst = max(worst, largest_difference(mine, theirs))
            scale = max(scale, largest_magnitude(theirs))
    if not worst <= _RELATIVE_TOLERANCE * max(scale, 1e-6):
        raise ExportError(
            f"The ONNX export of {model.name} differs from the original by {worst:.3g} where "
            f"outputs reach {scale:.3g}; at most {_RELATIVE_TOLERANCE:g} of that is rounding. "
            f"The model may depend on the batch (BatchNorm in training mode?) or on randomness."
        )
    return {"max_abs_difference": worst, "max_abs_output": scale}


def run_torch(module: torch.nn.Module, arrays: Arrays) -> list[np.ndarray]:
    """The module's tensors on named inputs, flattened in order."""
    with torch.no_grad():
        outputs = module(*_tensors(arrays))
    leaves = torch.utils._pytree.tree_leaves(outputs)
    return [leaf.numpy() for leaf in leaves if isinstance(leaf, torch.Tensor)]


def _first_line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    line = text.splitlines()[0][:300]
    return line if line.endswith((".", "!", "?")) else line + "."


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's own warnings and prints away from the user's terminal."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
