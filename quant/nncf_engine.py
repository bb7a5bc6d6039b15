"""Calls of NNCF: quiet, on a copy of the graph, and with a look at what it made."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from compress.errors import CompressError, EngineError, MissingExtraError, UnsupportedError
from compress.machine import versions
from compress.model import Model, Step
from compress.passes import Context, options
from compress.reference import reference_session, run
from compress.target import Target

if TYPE_CHECKING:
    import onnx

CONVOLUTIONS = ("Conv", "ConvTranspose")
_MULTIPLIES = (*CONVOLUTIONS, "Gemm", "MatMul", "MatMulNBits")
_RENAMED = "_compressed_matmul"
"""What NNCF appends to the name of a MatMul that becomes a MatMulNBits."""
_LONGEST_REASON = 300


def require_nncf(name: str, target: Target) -> None:
    """Refuse a pass, by name, that cannot run here.

    Raises:
        MissingExtraError: NNCF is not installed.
        UnsupportedError: the target has no int8.
    """
    try:
        found = importlib.util.find_spec("nncf") is not None
    except (ImportError, ValueError):  # what stands in its place cannot be imported
        found = False
    if not found:
        raise MissingExtraError(
            f"Pass {name} needs NNCF, which is not installed: pip install 'hwcompress[nncf]'."
        )
    precisions = target.capabilities.precisions
    if "int8" not in precisions:
        raise UnsupportedError(
            f"Target {target.name} cannot run int8; it runs {', '.join(precisions)}."
        )


def compressed(
    step: Any,
    model: Model,
    context: Context,
    work: Callable[[Any, onnx.ModelProto], Any],
    details: Mapping[str, Any],
    why_float: str = "",
) -> Model:
    """Let NNCF work on the graph, and look at what it made.

    Args:
        step: the pass.
        model: what it works on; its graph is not changed.
        context: of the pass.
        work: gets the library and the graph, and returns another graph.
        details: of the step; `work` may fill them.
        why_float: why operators that it compressed run in float, where they do.

    Raises:
        EngineError: NNCF failed, what it made does not run, or it compressed nothing.
    """
    version = versions("nncf").get("nncf", "")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # Before the output is redirected: its log keeps the stream that it finds now.
            import nncf
        with context.progress(f"Compress with NNCF {version}"), _silenced():
            made = ir.from_proto(work(nncf, ir.to_proto(model.graph_model)))
        _restore_names(model.graph_model, made)
    except CompressError:
        raise
    except Exception as error:
        raise EngineError(f"NNCF {version} failed: {_first_line(error)}") from error
    try:
        run(reference_session(made), model.example())
    except EngineError as error:
        what = _first_line(error.__cause__ or error)
        raise EngineError(f"NNCF {version} failed: its model does not run: {what}") from error
    reduced, left = _split(made.graph)
    if not reduced:
        raise EngineError(f"NNCF {version} failed: it left every multiplication in float.")
    reasons = dict.fromkeys(left, "NNCF left it in float")
    if why_float:
        reasons |= dict.fromkeys(reduced, why_float)
    facts = {"nncf": version, **details, "quantized_nodes": len(reduced), "reasons": reasons}
    return model.evolve(made, Step(step.name, options(step), facts))


@contextlib.contextmanager
def _silenced() -> Iterator[None]:
    """Keep NNCF's log, progress bars and warnings from the terminal."""
    import rich

    rich.get_console()  # made before stdout is redirected, it still knows the terminal afterwards
    logger = logging.getLogger("nncf")
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        with (
            open(os.devnull, "w", encoding="utf-8") as nowhere,
            contextlib.redirect_stdout(nowhere),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _restore_names(before: ir.Model, made: ir.Model) -> None:
    """Inputs, outputs and operators are called as they were."""
    for old, new in (
        (before.graph.inputs, made.graph.inputs),
        (before.graph.outputs, made.graph.outputs),
    ):
        for expected, value in zip(old, new, strict=True):
            value.name = expected.name
    for node in made.graph:
        if node.op_type == "MatMulNBits":
            node.name = (node.name or "").removesuffix(_RENAMED)


def _split(graph: ir.Graph) -> tuple[list[str], list[str]]:
    """Multiply-accumulates that read quantized numbers, and the others, by name."""
    reduced: list[str] = []
    left: list[str] = []
    for node in graph:
        if node.op_type in _MULTIPLIES:
            sources = [value.producer() for value in node.inputs[:2] if value is not None]
            types = {source.op_type for source in sources if source is not None}
            stored = node.op_type == "MatMulNBits" or "DequantizeLinear" in types
            (reduced if stored else left).append(node.name or "")
    return reduced, left


def _first_line(error: BaseException) -> str:
    """Type and first line of an error, short enough for a table."""
    line = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {line}"[:_LONGEST_REASON]
