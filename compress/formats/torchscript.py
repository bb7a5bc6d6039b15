"""TorchScript archives, checked before they run and converted to exported programs."""

from __future__ import annotations

import io
import re
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from compress.errors import LoadError, UnsafeFileError, UnsupportedError
from compress.formats.exported import to_float32
from compress.formats.file_safety import clean_copy, open_archive, pickled_names, quiet_readers
from compress.formats.inputs import missing_inputs, pair_inputs
from compress.model import BATCH, Model, TensorSpec

_GAP = r"(?:[\s\\]|#[^\n]*\n)*"
# Operators of the aten and prim namespaces that reach out of the process; from the list of all
# schemas of torch 2.13. As words they are refused wherever they stand: a method call on a tensor
# reaches the same operators.
_UNSAFE_WORDS = re.compile(
    r"\b(save|from_file|PythonOp|rpc_async|rpc_sync|rpc_remote|fork|set_data|record_stream)\b"
)
_NAMESPACE = re.compile(rf"\bops\b{_GAP}(?:\.{_GAP}(\w+))?")
_CUSTOM_CLASS = re.compile(rf"\btorch{_GAP}\.{_GAP}classes\b")
_ATTRIBUTE_NAME = re.compile(rf"\b__annotations__{_GAP}\[{_GAP}([\"'][^\]]*)\]")
_ENTRIES = {"data.pkl", "constants.pkl", "version", "byteorder", ".data/version"}
_PURE_NAMESPACES = {"prim", "aten"}
_NAME = re.compile(r"\w+(?:\.\w+)*", re.ASCII)
_TOLERANCE = 1e-4
PHOTOGRAPH = (1, 3, 224, 224)
"""Assumed of a network that begins with a convolution over three channels, if nobody says it."""


def load_torchscript(
    path: Path, given: Sequence[TensorSpec]
) -> tuple[torch.nn.Module, tuple[TensorSpec, ...], str]:
    """Module, inputs and a note from a TorchScript archive.

    Raises:
        UnsafeFileError: its code could touch files or call foreign operators.
        LoadError: it is damaged, or its conversion computes something else.
        UsageError: `given` does not fit its forward.
    """
    for name in pickled_names(path):
        if _CUSTOM_CLASS.search(name):
            raise _refuse(path.name, name)
    with open_archive(path) as archive:
        root = archive.namelist()[0].partition("/")[0]
        contents: dict[str, str | bytes] = {}
        for info in archive.infolist():
            inner = info.filename.removeprefix(f"{root}/")
            # By exact names: torch's own reader takes no notice of upper and lower case.
            if inner.startswith("code/") and inner.endswith(".py"):
                _check_code(_text(archive, info.filename, path.name), path.name)
            elif inner not in _ENTRIES and not re.fullmatch(r"(data|constants)/\w+", inner):
                continue
            contents[f"model/{inner}"] = info.filename
        with clean_copy(archive, contents) as copy:
            script = _load(copy.read(), path.name)
    return convert_script(script, path.name, given)


def _text(archive: zipfile.ZipFile, entry: str, name: str) -> str:
    try:
        return archive.read(entry).decode()
    except UnicodeDecodeError as error:
        raise LoadError(f"{name} is damaged: {entry} in it is no text.") from error


def _check_code(text: str, name: str) -> None:
    """Refuse TorchScript that could do more than compute.

    Textual and wider than necessary on purpose: there is no second parser to be fooled.
    """
    found = _UNSAFE_WORDS.search(text) or _CUSTOM_CLASS.search(text)
    if found is not None:
        raise _refuse(name, found.group())
    for match in _NAMESPACE.finditer(text):
        if match.group(1) not in _PURE_NAMESPACES:
            raise _refuse(name, " ".join(match.group().split()))
    for match in _ATTRIBUTE_NAME.finditer(text):
        if not re.fullmatch(r"([\"'])\w+\1\s*", match.group(1), re.ASCII):
            raise _refuse(name, match.group(1))


def _refuse(name: str, what: str) -> UnsafeFileError:
    return UnsafeFileError(
        f"{name} is refused: its TorchScript code uses {what!r}, which could do more than compute "
        "(files, processes, foreign operators). Load the original with --model module:factory, "
        "or export it to ONNX or .pt2."
    )


def _load(data: bytes, name: str) -> torch.jit.ScriptModule:
    try:
        with quiet_readers():
            script: torch.jit.ScriptModule = torch.jit.load(  # type: ignore[no-untyped-call]
                io.BytesIO(data), map_location="cpu"
            )
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise LoadError(
            f"{name} is a TorchScript archive that torch {torch.__version__} cannot read "
            f"({reason}): it is damaged or of another version. Save it again."
        ) from error
    # Names reach generated Python source on conversion.
    for key in (*script.state_dict(), *(key for key, _ in script.named_modules() if key)):
        if not _NAME.fullmatch(key):
            raise _refuse(name, key)
    return script


def convert_script(
    script: torch.jit.ScriptModule, name: str, given: Sequence[TensorSpec]
) -> tuple[torch.nn.Module, tuple[TensorSpec, ...], str]:
    """A ScriptModule as a module that can be exported, its inputs and a note.

    Parameters keep their names. Sizes are those of `given`; other batch sizes work where the
    module's code allows them.

    Raises:
        LoadError: it cannot be converted, or the result computes something else.
        UsageError: `given` does not fit its forward.
    """
    specs = _script_inputs(script, name, given)
    script.eval()
    note = to_float32(script)
    failures = []
    batches = (2, 1) if all(spec.shape[:1] in ((), (1,), (BATCH,)) for spec in specs) else (1,)
    for batch in batches:
        example = _example(specs, batch)
        try:
            expected = _run(script, example)
            module = _convert(script, example)
            _check(module, script, specs, expected, example)
        except LoadError:
            raise
        except Exception as error:
            failures.append(" ".join(str(error).split())[:300])
            continue
        return module, specs, note
    if any(spec.assumed for spec in specs):
        raise missing_inputs(name, [spec.name for spec in specs])
    raise LoadError(
        f"{name} is a TorchScript archive whose forward could not be converted ({failures[-1]}). "
        "Load the original with --model module:factory, or export it to ONNX or .pt2."
    )


def _script_inputs(
    script: torch.jit.ScriptModule, name: str, given: Sequence[TensorSpec]
) -> tuple[TensorSpec, ...]:
    try:
        arguments = script._c._get_method("forward").schema.arguments[1:]
    except RuntimeError as error:
        raise LoadError(f"{name} is a TorchScript archive without a forward method.") from error
    required = [a for a in arguments if not a.has_default_value()]
    other = next((a for a in required if str(a.type) != "Tensor"), None)
    if other is not None:
        raise UnsupportedError(
            f"{name}: forward takes {other.name} of type {other.type}; only tensors can be "
            "inputs. Wrap the model in one whose forward takes tensors, and save that."
        )
    names = [a.name for a in arguments if str(a.type) == "Tensor"]
    pairs = pair_inputs(names, given, name)
    if not given and len(required) == 1 and _takes_photographs(script):
        return (TensorSpec(required[0].name, PHOTOGRAPH, assumed=True),)
    if len(pairs) < len(required):
        raise missing_inputs(name, [a.name for a in required])
    return tuple(pairs.values())


def _takes_photographs(script: torch.jit.ScriptModule) -> bool:
    """Whether the first weight is that of a convolution over three channels."""
    weights = (tensor for tensor in script.state_dict().values() if tensor.ndim > 1)
    first = next(weights, None)
    return first is not None and first.ndim == 4 and first.shape[1] == PHOTOGRAPH[1]


def _example(specs: tuple[TensorSpec, ...], batch: int) -> tuple[torch.Tensor, ...]:
    """Random inputs; a batch axis of 1 or any size gets `batch`."""
    shapes = [
        (batch if size in (1, BATCH) and axis == 0 else size for axis, size in enumerate(s.shape))
        for s in specs
    ]
    resized = tuple(
        TensorSpec(spec.name, tuple(shape), spec.dtype)
        for spec, shape in zip(specs, shapes, strict=True)
    )
    arrays = Model(torch.nn.Identity(), resized, "example").example()
    return tuple(torch.from_numpy(arrays[spec.name]) for spec in specs)


def _run(module: Any, inputs: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
    from torch.utils import _pytree as tree

    with torch.no_grad():
        # A copy: recurrent scripts may write into their inputs.
        outputs = module(*(value.clone() for value in inputs))
    return [leaf for leaf in tree.tree_leaves(outputs) if torch.is_tensor(leaf)]


def _convert(script: torch.jit.ScriptModule, example: tuple[torch.Tensor, ...]) -> torch.nn.Module:
    from torch._export.converter import TS2EPConverter

    with quiet_readers():
        program = TS2EPConverter(script, example).convert()
        module = program.module(check_guards=False)
    del module.train, module.eval
    # The hook holds inputs to the sizes of the example, and the sizes are checked elsewhere.
    module._forward_pre_hooks.clear()
    _restore_parameters(module, script)
    _restore_module_stack(module, script)
    return module.eval()


def _restore_parameters(module: torch.fx.GraphModule, script: torch.jit.ScriptModule) -> None:
    """The converter makes every tensor a buffer; make parameters of those that were."""
    for name, _ in script.named_parameters():
        path, _, leaf = name.rpartition(".")
        try:
            owner = module.get_submodule(path)
        except AttributeError:
            continue
        value = owner._buffers.pop(leaf, None)
        if value is not None:
            owner.register_parameter(leaf, torch.nn.Parameter(value, value.is_floating_point()))


def _restore_module_stack(module: torch.fx.GraphModule, script: torch.jit.ScriptModule) -> None:
    """Name the operators that own parameters after the module that the parameters are in."""
    types = {name: getattr(m, "original_name", "Module") for name, m in script.named_modules()}
    for node in module.graph.nodes:
        owners = [
            str(source.target).rpartition(".")[0]
            for source in node.all_input_nodes
            if source.op == "get_attr"
        ]
        if node.op == "call_function":
            stack = {"L__self__": ("", types[""])}
            if owners and owners[0] in types:
                stack[owners[0].replace(".", "_") or "L__self__"] = (owners[0], types[owners[0]])
            node.meta["nn_module_stack"] = stack


def _check(
    module: torch.nn.Module,
    script: torch.jit.ScriptModule,
    specs: tuple[TensorSpec, ...],
    expected: list[torch.Tensor],
    example: tuple[torch.Tensor, ...],
) -> None:
    for inputs, wanted in ((example, expected), (_example(specs, 1), None)):
        wanted = _run(script, inputs) if wanted is None else wanted
        got = _run(module, inputs)
        close = len(got) == len(wanted) and all(
            a.shape == b.shape and torch.allclose(a, b, rtol=_TOLERANCE, atol=_TOLERANCE)
            for a, b in zip(got, wanted, strict=True)
        )
        if not close:
            raise ValueError("its outputs differ from the original's")
