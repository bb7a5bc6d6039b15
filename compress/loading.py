"""Models from files, objects and factories; safe by default, by content and not by file name."""

from __future__ import annotations

import copy
import difflib
import hashlib
import inspect
import re
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from compress.errors import (
    CompressError,
    LoadError,
    MissingExtraError,
    UnsupportedError,
    UsageError,
)
from compress.formats.file_kind import DESCRIPTIONS, FileKind, file_kind
from compress.formats.inputs import (
    EXAMPLE,
    complete_inputs,
    missing_inputs,
    pair_inputs,
    parse_inputs,
)
from compress.model import Model, Step, TensorSpec

if TYPE_CHECKING:
    import onnx
    import onnx_ir as ir
    import torch

Source: TypeAlias = (
    "str | Path | torch.nn.Module | torch.export.ExportedProgram | onnx.ModelProto | ir.Model"
    " | Model"
)
Loaded = tuple[Any, tuple[TensorSpec, ...], str]
_WEIGHT_FILES: tuple[FileKind, ...] = ("torch", "torch_legacy", "safetensors")
_EXPECTED = (
    "Expected is a torch.export archive (.pt2), TorchScript, ONNX, or weights with --model "
    "module:factory."
)


def load(
    source: Source | None,
    *,
    factory: str | None = None,
    inputs: Sequence[str | TensorSpec] = (),
    trust_pickle: bool = False,
) -> Model:
    """A model from a file, an object, or an importable factory.

    Args:
        source: path, module, ONNX model or `Model`; None where `factory` says everything.
        factory: `module:function` that makes the module; with a file, the file is its weights.
        inputs: shapes, as `--input` takes them; needed where the file has none.
        trust_pickle: unpickle whatever the file holds. It may run any code.

    Raises:
        UsageError: options are missing, contradict each other or the file.
        LoadError: the file cannot be read.
        UnsafeFileError: loading the file would execute code that it carries.
        UnsupportedError: the model takes something other than tensors.
    """
    given = parse_inputs(inputs)
    if isinstance(source, Model):
        return _with_inputs(source, given, factory)
    if source is None:
        if factory is None:
            raise UsageError("There is nothing to load: give a file, or --model module:factory.")
        from compress.formats.factory import call_factory

        module = call_factory(factory)
        name = factory.partition(":")[2].rpartition(".")[2]
        return _model(_module(module, name, given), name, f"{factory} with its own weights")
    if isinstance(source, str | Path):
        return _load_file(Path(source), factory, given, trust_pickle)
    if factory is not None:
        raise UsageError("--model goes with a file of weights, and not with a model object.")
    return _load_object(source, given)


def _with_inputs(model: Model, given: tuple[TensorSpec, ...], factory: str | None) -> Model:
    if factory is not None:
        raise UsageError("--model goes with a file of weights, and not with a loaded model.")
    return replace(model, inputs=complete_inputs(model.inputs, given, model.name))


def _load_object(source: Any, given: tuple[TensorSpec, ...]) -> Model:
    import torch

    name = type(source).__name__
    if isinstance(source, torch.jit.ScriptModule):
        from compress.formats.torchscript import convert_script

        name = source.original_name
        return _model(convert_script(source, name, given), name, f"TorchScript module {name}")
    if isinstance(source, torch.export.ExportedProgram):
        from compress.formats.exported import program_module

        return _model(program_module(source, "program", given), "program", "exported program")
    if isinstance(source, torch.nn.Module):
        # A copy: eval mode and float32 are set in place.
        copied = _module(copy.deepcopy(source), name, given)
        return _model(copied, name, f"torch module {name}")
    import onnx
    import onnx_ir as ir

    if isinstance(source, onnx.ModelProto | ir.Model):
        from compress.formats.onnx_file import load_onnx

        graph = source.graph.name or "model"
        return _model(load_onnx(source, graph, given), graph, f"ONNX model {graph}")
    raise UsageError(
        f"A {name} is no model. Give a path, a torch.nn.Module, an onnx.ModelProto, an "
        "onnx_ir.Model or a compress Model."
    )


def _model(loaded: Loaded, name: str, phrase: str, sha256: str = "") -> Model:
    program, specs, note = loaded
    short = re.sub(r"[^\w.-]+", "_", name).strip("._")[:80] or "model"
    return Model(program, specs, short, f"{phrase}, {note}" if note else phrase, sha256)


def _load_file(
    path: Path, factory: str | None, given: tuple[TensorSpec, ...], trust_pickle: bool
) -> Model:
    kind = _known_kind(path)
    if factory is not None and kind not in _WEIGHT_FILES:
        raise UsageError(
            f"{path.name} is {DESCRIPTIONS[kind]}, which holds its own architecture; leave "
            "--model out, or give a file of weights."
        )
    try:
        loaded = _read(path, kind, factory, given, trust_pickle)
    except CompressError:
        raise
    # The last of several nets: a damaged file can make a reader raise anything at all.
    except Exception as error:
        raise LoadError(
            f"{path.name} is {DESCRIPTIONS[kind]} that cannot be used ({type(error).__name__}: "
            f"{error}); it is damaged, or written by something that is not known here."
        ) from error
    what = DESCRIPTIONS[kind].removeprefix("a ").removeprefix("an ")
    phrase = f"{what} {path.name} ({path.stat().st_size / 1e6:.1f} MB)"
    return _model(loaded, path.stem, f"{phrase} in {factory}" if factory else phrase, _hash(path))


def _read(
    path: Path,
    kind: FileKind,
    factory: str | None,
    given: tuple[TensorSpec, ...],
    trust_pickle: bool,
) -> Loaded:
    if kind in _WEIGHT_FILES:
        from compress.formats.weights import load_weights

        return _module(load_weights(path, kind, factory, trust_pickle), path.name, given)
    if kind == "export":
        from compress.formats.exported import load_exported

        return load_exported(path, given)
    if kind == "torchscript":
        from compress.formats.torchscript import load_torchscript

        return load_torchscript(path, given)
    from compress.formats.onnx_file import load_onnx

    return load_onnx(path, path.name, given)


def _known_kind(path: Path) -> FileKind:
    """The kind of a file that can be loaded.

    Raises:
        LoadError: there is no such file, or it holds something else.
    """
    try:
        if path.is_dir():
            raise LoadError(f"{path} is a folder and not a model file. {_EXPECTED}")
        if not path.exists():
            raise LoadError(f"There is no file {path}.{_near(path)} {_EXPECTED}")
        if not path.is_file():
            raise LoadError(f"{path} is no regular file. {_EXPECTED}")
        kind = file_kind(path)
    except (OSError, ValueError) as error:
        if isinstance(error, LoadError):
            raise
        raise LoadError(f"{path} cannot be read: {error}.") from error
    if kind not in (*_WEIGHT_FILES, "export", "torchscript", "onnx"):
        raise LoadError(f"{path.name} is {DESCRIPTIONS[kind]}. {_EXPECTED}")
    return kind


def _near(path: Path) -> str:
    if not path.parent.is_dir():
        return f" The folder {path.parent} does not exist either."
    names = [entry.name for entry in path.parent.iterdir()]
    close = difflib.get_close_matches(path.name, names, n=3)
    return f" Did you mean {' or '.join(close)}?" if close else ""


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _module(module: torch.nn.Module, name: str, given: tuple[TensorSpec, ...]) -> Loaded:
    """A torch module, ready: on the CPU, in eval mode, float32, with named inputs."""
    import torch

    from compress.formats.exported import to_float32

    if isinstance(module, torch.jit.ScriptModule):
        from compress.formats.torchscript import convert_script

        return convert_script(module, name, given)
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(module.forward).parameters.values()
    names = [p.name for p in parameters if p.kind in positional]
    required = [p.name for p in parameters if p.kind in positional and p.default is p.empty]
    if any(p.kind is inspect.Parameter.VAR_POSITIONAL for p in parameters):
        names += [f"input{i}" for i in range(len(names), len(given))]
    if not given:
        raise missing_inputs(name, required or names[:1])
    pairs = pair_inputs(names, given, name)
    absent = [key for key in required if key not in pairs]
    if absent or list(pairs) != names[: len(pairs)]:
        raise UsageError(
            f"{name} takes the inputs {', '.join(names)} in this order, of which "
            f"{', '.join(required)} must be given; --input says only {', '.join(pairs)}. Give one "
            f"--input for each, such as {EXAMPLE}."
        )
    module = module.cpu().eval()
    return module, tuple(pairs.values()), to_float32(module)


def _import_onnx2torch(name: str) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import onnx2torch
    # It imports torchvision, which raises RuntimeError where it was built for another torch.
    except (ImportError, RuntimeError, OSError) as error:
        raise MissingExtraError(
            f"{name} is an ONNX model, and what is asked for works on torch modules; converting "
            f"it needs onnx2torch and a torchvision made for this torch ({error}): pip install "
            "onnx2torch torchvision."
        ) from error
    return onnx2torch


def to_torch(model: Model) -> Model:
    """The model at the torch stage; an ONNX one is converted with onnx2torch.

    Raises:
        MissingExtraError: onnx2torch is not installed.
        UnsupportedError: it cannot convert the model, or what it made does not run.
    """
    if model.stage == "torch":
        return model
    onnx2torch = _import_onnx2torch(model.name)
    import onnx_ir as ir
    import torch

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            module = onnx2torch.convert(ir.to_proto(model.graph_model)).eval()
            example = [torch.from_numpy(array) for array in model.example().values()]
            with torch.no_grad():
                module(*example)
    except Exception as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UnsupportedError(
            f"{model.name} is an ONNX model that onnx2torch cannot convert to torch ({reason}). "
            "Use passes that work on ONNX, or give the original with --model module:factory."
        ) from error
    return model.evolve(module, Step("onnx2torch"))
