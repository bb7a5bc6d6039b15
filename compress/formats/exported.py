"""torch.export archives (.pt2) and exported programs as modules."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.export.graph_signature import TensorArgument
from torch.fx.node import map_aggregate

from compress.errors import LoadError, UnsafeFileError, UnsupportedError
from compress.formats.exported_safety import clean_payloads, clean_program
from compress.formats.file_safety import clean_copy, load_weights_only, open_archive, quiet_readers
from compress.formats.inputs import complete_inputs
from compress.model import DTYPES, TensorSpec

_CODE_SUFFIXES = (".so", ".dll", ".dylib", ".pyd", ".cubin", ".o", ".py", ".cpp")
_OTHER_FLOATS = (torch.float16, torch.bfloat16, torch.float64)
_LEGACY_PROGRAM = "serialized_exported_program.json"


def load_exported(
    path: Path, given: Sequence[TensorSpec]
) -> tuple[torch.fx.GraphModule, tuple[TensorSpec, ...], str]:
    """Module, inputs and a note from a torch.export archive; nothing in it is executed.

    Raises:
        UnsafeFileError: it carries code.
        LoadError: it is damaged, or of a version that this torch cannot read.
        UnsupportedError: it takes something other than tensors.
    """
    with open_archive(path) as archive:
        contents = _checked_contents(archive, path.name)
        with clean_copy(archive, contents) as copy:
            program = _quietly(path.name, lambda: torch.export.load(copy))
    return program_module(program, path.name, given)


def _checked_contents(archive: zipfile.ZipFile, name: str) -> dict[str, str | bytes]:
    """What of the archive goes to torch: new name -> old entry or new bytes."""
    entries = [info.filename for info in archive.infolist() if not info.is_dir()]
    code = [e for e in entries if e.endswith(_CODE_SUFFIXES) or "/data/aotinductor/" in e]
    if code:
        raise UnsafeFileError(
            f"{name} is refused: it carries compiled code ({code[0]}). Save the exported program "
            "with torch.export.save and not a compiled package."
        )
    if _LEGACY_PROGRAM in entries:
        return _legacy_contents(archive, entries, name)
    root = entries[0].partition("/")[0]
    programs = [
        entry[len(f"{root}/models/") : -len(".json")]
        for entry in entries
        if entry.startswith(f"{root}/models/") and entry.endswith(".json")
    ]
    if len(programs) != 1 and "model" not in programs:
        raise LoadError(
            f"{name} holds {len(programs)} exported programs ({', '.join(programs) or 'none'}); "
            "save the one to compress alone, with torch.export.save(program, path)."
        )
    program = "model" if "model" in programs else programs[0]
    contents: dict[str, str | bytes] = {
        f"model/{entry}": f"{root}/{entry}"
        for entry in ("archive_format", "archive_version", ".data/version", "byteorder")
        if f"{root}/{entry}" in entries
    }
    text = archive.read(f"{root}/models/{program}.json")
    contents["model/models/model.json"] = clean_program(text, name)
    # Sample inputs are a pickle, and nothing here needs them.
    contents["model/data/sample_inputs/model.pt"] = b""
    for folder, table, prefix in (
        ("data/weights", "weights_config", "weight_"),
        ("data/constants", "constants_config", "tensor_"),
    ):
        contents |= _payloads(archive, (root, folder, program, table), prefix, name)
    return contents


def _payloads(
    archive: zipfile.ZipFile, place: tuple[str, str, str, str], prefix: str, name: str
) -> dict[str, str | bytes]:
    root, folder, program, table = place
    old, new = f"{root}/{folder}", f"model/{folder}"
    pickled = f"{old}/{program}.pt"
    if pickled in archive.namelist():
        return {f"{new}/model.pt": _checked_pickle(archive, pickled, name)}
    try:
        text = archive.read(f"{old}/{program}_{table}.json")
    except KeyError as error:
        raise LoadError(f"{name} is incomplete: it has no {table}; save it again.") from error
    cleaned, entries = clean_payloads(text, name, prefix)
    return {
        f"{new}/model_{table}.json": cleaned,
        **{f"{new}/{entry}": f"{old}/{entry}" for entry in entries},
    }


def _legacy_contents(
    archive: zipfile.ZipFile, entries: list[str], name: str
) -> dict[str, str | bytes]:
    """The layout of torch 2.1 to 2.7: a description and pickled dicts of tensors."""
    contents: dict[str, str | bytes] = {
        "version": archive.read("version") if "version" in entries else b"",
        _LEGACY_PROGRAM: clean_program(archive.read(_LEGACY_PROGRAM), name),
        "serialized_example_inputs.pt": b"",
    }
    for entry in ("serialized_state_dict.pt", "serialized_constants.pt"):
        contents[entry] = _checked_pickle(archive, entry, name) if entry in entries else b""
    return contents


def _checked_pickle(archive: zipfile.ZipFile, entry: str, name: str) -> bytes:
    """A pickled dict of tensors, pickled anew.

    torch falls back to full unpickling where its weights-only one fails, so it gets no bytes
    of the file.
    """
    data = archive.read(entry)
    if not data:
        return b""
    try:
        values = load_weights_only(Path(name), data=data)
    except LoadError as error:
        raise UnsafeFileError(
            f"{name} is refused: {entry} inside it is not a plain pickle of tensors, and "
            "unpickling it could execute code."
        ) from error
    plain = (torch.Tensor, torch.nn.Parameter)
    if not isinstance(values, dict) or not all(type(v) in plain for v in values.values()):
        raise UnsafeFileError(f"{name} is refused: {entry} inside it holds more than tensors.")
    buffer = io.BytesIO()
    torch.save(dict(values), buffer)
    return buffer.getvalue()


def _quietly(name: str, load: Callable[[], Any]) -> Any:
    # Whatever torch finds wrong with the file, by whatever exception, is one case to the user.
    try:
        with quiet_readers():
            return load()
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise LoadError(
            f"{name} is a torch.export archive that torch {torch.__version__} cannot read "
            f"({reason}): it is damaged or of another version. Export it again."
        ) from error


def program_module(
    program: torch.export.ExportedProgram, name: str, given: Sequence[TensorSpec]
) -> tuple[torch.fx.GraphModule, tuple[TensorSpec, ...], str]:
    """An exported program as a module in eval mode on the CPU, its inputs and a note.

    Raises:
        UnsupportedError: it takes nested, keyword or non-tensor inputs.
        UsageError: `given` contradicts the program's inputs, or an axis stays open.
    """
    specs = complete_inputs(_program_inputs(program, name), given, name)
    module = _quietly(name, lambda: program.module(check_guards=False))
    # These two instance attributes only say "not supported", and they break copies.
    del module.train, module.eval
    note = to_float32(module)
    if note:
        specs = tuple(
            TensorSpec(spec.name, spec.shape, "float32") if spec.dtype.startswith("float") else spec
            for spec in specs
        )
    _to_inference(module)
    return module.eval(), specs, note


def _program_inputs(program: torch.export.ExportedProgram, name: str) -> list[TensorSpec]:
    placeholders = {node.name: node for node in program.graph.find_nodes(op="placeholder")}
    in_spec = program.call_spec.in_spec
    flat = in_spec is None or (
        all(child.is_leaf() for child in in_spec.child(0).children())
        and in_spec.child(1).num_leaves == 0
    )
    specs = []
    for entry in program.graph_signature.input_specs:
        if entry.kind is not torch.export.graph_signature.InputKind.USER_INPUT:
            continue
        value = placeholders[entry.arg.name].meta.get("val") if entry.arg.name else None
        if not flat or not isinstance(entry.arg, TensorArgument) or not torch.is_tensor(value):
            raise UnsupportedError(
                f"{name} takes an input {entry.arg.name!r} that is no plain tensor argument; "
                "export a model whose forward takes tensors by position."
            )
        specs.append(tensor_spec(str(placeholders[entry.arg.name].target), value))
    return specs


def tensor_spec(name: str, value: torch.Tensor) -> TensorSpec:
    """The spec of an input that looks like `value`; symbolic sizes keep their names.

    Raises:
        UnsupportedError: the element type is none that an input may have.
    """
    dtype = str(value.dtype).removeprefix("torch.")
    if value.dtype is torch.bfloat16:
        dtype = "float32"
    if dtype not in DTYPES:
        raise UnsupportedError(
            f"Input {name!r} has element type {dtype}; an input may have {', '.join(DTYPES)}."
        )
    shape = tuple(size if isinstance(size, int) else str(size) for size in value.shape)
    return TensorSpec(name, shape, dtype)


def to_float32(module: torch.nn.Module) -> str:
    """Make every parameter and buffer float32, in place; what was done, or "".

    Raises:
        UnsupportedError: parameters are of a type that has no float32 equivalent.
    """
    tensors = [*module.parameters(), *module.buffers()]
    others = {str(t.dtype).removeprefix("torch.") for t in tensors if t.dtype in _OTHER_FLOATS}
    if not others:
        return ""
    module.float()
    if isinstance(module, torch.fx.GraphModule):
        for node in module.graph.nodes:
            node.args = map_aggregate(node.args, _as_float32)
            node.kwargs = map_aggregate(node.kwargs, _as_float32)
        module.recompile()
    return f"{' and '.join(sorted(others))} converted to float32"


def _as_float32(value: Any) -> Any:
    return torch.float32 if value in _OTHER_FLOATS else value


# Arguments that exporting in train mode bakes in, and what they are for inference.
_INFERENCE = {"train": False, "training": False, "dropout_p": 0.0}


def _to_inference(module: torch.fx.GraphModule) -> None:
    changed = False
    for node in list(module.graph.nodes):
        schema = getattr(node.target, "_schema", None)
        for position, argument in enumerate(schema.arguments if schema else ()):
            value = _INFERENCE.get(argument.name)
            if value is not None and position < len(node.args):
                changed |= bool(node.args[position] != value)
                node.update_arg(position, value)
            elif value is not None and argument.name in node.kwargs:
                changed |= bool(node.kwargs[argument.name] != value)
                node.update_kwarg(argument.name, value)
        counts = node.target is torch.ops.aten.add_.Tensor and not node.users
        if counts and str(node.args[0].target).endswith("num_batches_tracked"):
            module.graph.erase_node(node)
            changed = True
    if changed:
        module.recompile()
