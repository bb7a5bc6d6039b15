"""ONNX models: checked, brought to a usable opset, with input shapes that are known."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import onnx
import onnx_ir as ir
from onnx_ir.passes.common import (
    LiftConstantsToInitializersPass,
    RemoveInitializersFromInputsPass,
    ShapeInferencePass,
)

from compress.errors import LoadError, UnsafeFileError, UnsupportedError, UsageError
from compress.formats.file_safety import quiet_readers
from compress.formats.inputs import complete_inputs, missing_inputs, pair_inputs
from compress.graph import name_sites
from compress.model import DTYPES, TensorSpec

_OLDEST_OPSET = 13  # the first with per-channel QuantizeLinear
_OLDEST_IR_VERSION = 8
_LARGEST_PROTO_BYTES = 2**31 - 1
_QUANTIZED = {
    *("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "QLinearConv"),
    *("QLinearMatMul", "ConvInteger", "MatMulInteger"),
}


def load_onnx(
    source: Path | onnx.ModelProto | ir.Model, name: str, given: Sequence[TensorSpec]
) -> tuple[ir.Model, tuple[TensorSpec, ...], str]:
    """Model, inputs and a note from an ONNX file or object; weights beside it are read, too.

    Raises:
        UnsafeFileError: its external data lie outside of its own folder.
        LoadError: it is damaged or invalid, or its opset is too old to convert.
        UsageError: `given` contradicts the inputs, or an axis stays open.
        UnsupportedError: an input is no tensor.
    """
    if isinstance(source, ir.Model):
        model = source.clone()
    elif isinstance(source, Path):
        model = _attempt(name, "read", lambda: ir.load(source, format="protobuf"))
        _check_external(model, source.parent, name)
        _attempt(name, "accepted", lambda: onnx.checker.check_model(source))
    else:
        _check_inline(source, name)
        _attempt(name, "accepted", lambda: onnx.checker.check_model(source))
        model = _attempt(name, "read", lambda: ir.from_proto(source))
    model, notes = _modernize(model, name)
    RemoveInitializersFromInputsPass()(model)
    LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    _attempt(name, "read", lambda: ir.external_data.load_to_model(model))
    name_sites(model)
    specs = _settle_inputs(model, name, given)
    operators = {node.op_type for node in model.graph.all_nodes()}
    if operators & _QUANTIZED:
        notes.append("already quantized")
    return model, specs, ", ".join(notes)


def _attempt(name: str, verb: str, action: Callable[[], Any]) -> Any:
    # protobuf, onnx and onnx_ir each have their own exceptions for the same thing.
    try:
        with quiet_readers():
            return action()
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise LoadError(
            f"{name} looks like an ONNX model but cannot be {verb} ({reason}): it is truncated, "
            "damaged or invalid. Copy it again, or export it again."
        ) from error


def _check_inline(proto: onnx.ModelProto, name: str) -> None:
    for tensor in onnx.external_data_helper._get_all_tensors(proto):
        if onnx.external_data_helper.uses_external_data(tensor):
            raise LoadError(
                f"{name} keeps weights in other files ({tensor.name!r}), and an object does not "
                "know where they are; give the path of the .onnx file."
            )


def _check_external(model: ir.Model, folder: Path, name: str) -> None:
    for tensor in _external_tensors(model):
        location = str(tensor.location)
        paths = PurePosixPath(location), PureWindowsPath(location)
        outside = any(path.is_absolute() or ".." in path.parts or path.anchor for path in paths)
        file = folder / location
        if outside or not file.resolve().is_relative_to(folder.resolve()):
            raise UnsafeFileError(
                f"{name} is refused: it would read the weights {tensor.name!r} from {location!r}, "
                "outside of its own folder."
            )
        if not file.is_file():
            raise LoadError(
                f"{name} keeps its weights in {location!r}, and that file is not beside it; "
                "copy both into one folder."
            )
        end = (tensor.offset or 0) + (tensor.length or tensor.nbytes)
        if end > file.stat().st_size:
            raise LoadError(
                f"{name} keeps its weights in {location!r}, and that file is truncated: "
                f"{tensor.name!r} would end at byte {end:,} of {file.stat().st_size:,}."
            )


def _external_tensors(model: ir.Model) -> Iterator[ir.ExternalTensor]:
    graphs = [*model.graphs(), *model.functions.values()]
    for graph in graphs:
        values = graph.initializers.values() if isinstance(graph, ir.Graph) else ()
        for value in values:
            if isinstance(value.const_value, ir.ExternalTensor):
                yield value.const_value
        for node in graph:
            for attribute in node.attributes.values():
                held = attribute.value if isinstance(attribute, ir.Attr) else None
                for tensor in held if isinstance(held, list | tuple) else (held,):
                    if isinstance(tensor, ir.ExternalTensor):
                        yield tensor


def _modernize(model: ir.Model, name: str) -> tuple[ir.Model, list[str]]:
    opset = model.graph.opset_imports.get("", _OLDEST_OPSET)
    if opset >= _OLDEST_OPSET:
        model.ir_version = max(model.ir_version or 0, _OLDEST_IR_VERSION)
        return model, []
    try:
        proto = ir.to_proto(model)
        if proto.ByteSize() > _LARGEST_PROTO_BYTES:
            raise ValueError("larger than 2 GB")
        converted = ir.from_proto(onnx.version_converter.convert_version(proto, _OLDEST_OPSET))
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise LoadError(
            f"{name} is of ONNX opset {opset}, and {_OLDEST_OPSET} is the oldest that can be used "
            f"here; converting it failed ({reason}). Export it again with opset_version=17."
        ) from error
    converted.ir_version = max(converted.ir_version or 0, _OLDEST_IR_VERSION)
    return converted, [f"opset {opset} converted to {_OLDEST_OPSET}"]


def _settle_inputs(
    model: ir.Model, name: str, given: Sequence[TensorSpec]
) -> tuple[TensorSpec, ...]:
    """The inputs with only the batch open, and the same written into the model."""
    values = {str(value.name): value for value in model.graph.inputs}
    pairs = pair_inputs(list(values), given, name)
    unknown = [key for key, value in values.items() if value.shape is None and key not in pairs]
    if unknown:
        raise missing_inputs(name, unknown)
    known = [_spec(value, pairs.get(key)) for key, value in values.items()]
    specs = complete_inputs(known, given, name)
    sizes = _symbol_sizes(known, specs, name)
    pinned = any(old.shape[1:] != new.shape[1:] for old, new in zip(known, specs, strict=True))
    for value in _all_values(model):
        if value.shape is not None:
            # What a pinned axis makes of the other symbols is inferred again.
            value.shape = ir.Shape(
                [
                    sizes.get(_symbol(dim), None if pinned else dim) if _symbol(dim) else dim
                    for dim in value.shape
                ]
            )
    for spec in specs:
        values[spec.name].shape = ir.Shape(spec.shape)
    if pinned:
        _attempt(name, "given these input shapes", lambda: ShapeInferencePass()(model))
    return specs


def _symbol_sizes(
    known: Sequence[TensorSpec], specs: Sequence[TensorSpec], name: str
) -> dict[str, int | str]:
    """What each named axis of the file became.

    Raises:
        UsageError: one name got two sizes.
    """
    sizes: dict[str, int | str] = {}
    for old, new in zip(known, specs, strict=True):
        for symbol, size in zip(old.shape, new.shape, strict=True):
            if isinstance(symbol, str) and sizes.setdefault(symbol, size) != size:
                raise UsageError(
                    f"{name}: the axis {symbol!r} is shared by several inputs and would have both "
                    f"size {sizes[symbol]} and {size}. Give every input that has it the same "
                    "size with --input."
                )
    return sizes


def _all_values(model: ir.Model) -> Iterator[ir.Value]:
    for graph in model.graphs():
        yield from graph.inputs
        for node in graph:
            yield from node.outputs


def _symbol(dim: int | ir.SymbolicDim) -> str:
    return "" if isinstance(dim, int) else str(dim.value or "")


def _spec(value: ir.Value, given: TensorSpec | None) -> TensorSpec:
    dtype = _dtype(value)
    if value.shape is None:
        return TensorSpec(str(value.name), given.shape if given else (), dtype)
    # Exporters write 0 and -1 as well where they mean "any size".
    shape = tuple(
        dim if isinstance(dim, int) and dim > 0 else _symbol(dim) or f"{value.name}_axis{axis}"
        for axis, dim in enumerate(value.shape)
    )
    return TensorSpec(str(value.name), shape, dtype)


def _dtype(value: ir.Value) -> str:
    try:
        dtype = str(value.dtype.numpy()) if value.dtype is not None else "unknown"
    except TypeError:
        dtype = str(value.dtype)
    if dtype not in DTYPES or not isinstance(value.type, ir.TensorType):
        raise UnsupportedError(
            f"Input {value.name!r} is of type {value.type or dtype}; an input must be a tensor of "
            f"{', '.join(DTYPES)}."
        )
    return dtype
