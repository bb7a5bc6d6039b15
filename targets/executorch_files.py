"""A program for ExecuTorch as files, and a cache of programs."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import shutil
import tempfile
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from compress.errors import LoadError
from compress.model import TensorSpec
from compress.target import Kernel

PROGRAM, DESCRIPTION = "model.pte", "model.json"
_FORMAT = 1
SITE = "hwcompress_site"
"""Key of `node.meta["custom"]` that says which operator of the ONNX graph a node is from."""


@dataclass(frozen=True)
class Program:
    """A lowered model: everything that is in the files.

    Attributes:
        name: of the engine.
        data: content of the `.pte` file.
        inputs: in the order of the program's arguments; a dynamic batch is 1 in the program.
        outputs: names, in the program's order.
        batched: outputs that have a row for each sample.
        operators: what the program is made of; those of a backend run there.
    """

    name: str
    data: bytes
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[str, ...]
    batched: tuple[str, ...]
    operators: tuple[Kernel, ...]

    def write(self, directory: Path) -> list[Path]:
        """Both files; `OSError` where they cannot be written."""
        rest = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        rest["data"] = hashlib.sha256(self.data).hexdigest()
        rest["inputs"] = [dataclasses.asdict(spec) for spec in self.inputs]
        rest["operators"] = [dataclasses.asdict(one) for one in self.operators]
        files = [directory / PROGRAM, directory / DESCRIPTION]
        files[0].write_bytes(self.data)
        files[1].write_text(json.dumps({"format": _FORMAT, **rest}), encoding="utf-8")
        return files

    @classmethod
    def read(cls, directory: Path) -> Program:
        """What `write` wrote.

        The runtime does not survive every damaged file, so none reaches it.

        Raises:
            LoadError: a file is missing, damaged, or of another release.
        """
        path = directory / DESCRIPTION
        try:
            data = (directory / PROGRAM).read_bytes()
            facts = json.loads(path.read_text(encoding="utf-8"))
            if facts.pop("format") != _FORMAT:
                raise LoadError(f"{path} is of another release; install the one that wrote it.")
            if facts["data"] != hashlib.sha256(data).hexdigest():
                raise LoadError(f"{directory / PROGRAM} is not what was written. Copy it again.")
            specs = [{**one, "shape": tuple(one["shape"])} for one in facts["inputs"]]
            return cls(
                name=str(facts["name"]),
                data=data,
                inputs=tuple(TensorSpec(**one) for one in specs),
                outputs=tuple(map(str, facts["outputs"])),
                batched=tuple(map(str, facts["batched"])),
                operators=tuple(Kernel(**one) for one in facts["operators"]),
            )
        except OSError as error:
            raise LoadError(f"{directory} holds no program for ExecuTorch: {error}.") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, LoadError):
                raise
            raise LoadError(f"{path} is damaged: {error}. Run `compress run` again.") from error


def fingerprint(graph_model: ir.Model) -> str:
    """Hash of what a program is made from; of a graph that was written and read again the same."""
    digest = hashlib.sha256()
    for node in graph_model.graph:
        if node.op_type == "Constant":
            continue
        values = [
            [v.name if v is not None else "" for v in vs] for vs in (node.inputs, node.outputs)
        ]
        found = sorted(node.attributes.items())
        attributes = [(key, _plain(a.value)) for key, a in found if isinstance(a, ir.Attr)]
        digest.update(repr((node.domain, node.op_type, node.name, values, attributes)).encode())
        for value in node.inputs:
            if value is not None and value.const_value is not None:
                digest.update(_plain(value.const_value).encode())
    outputs = [f"{value.name} {value.shape}" for value in graph_model.graph.outputs]
    return f"{digest.hexdigest()} {outputs}"


def _plain(value: Any) -> Any:
    """An attribute as a file holds it: floats have 32 bits, a tensor is told by its hash."""
    if isinstance(value, ir.TensorProtocol):
        array = np.ascontiguousarray(value.numpy())
        return f"{array.dtype} {array.shape} {hashlib.sha256(array.tobytes()).hexdigest()}"
    if isinstance(value, (tuple, list)):
        return [_plain(one) for one in value]
    return float(np.float32(value)) if isinstance(value, float) else str(value)


class Cache:
    """Programs by the hash of what they were made from, in the user's cache folder.

    A search builds each model several times, and once more in a process of its own. A cache that
    cannot be read or written costs time.
    """

    most = 24
    """Programs that are kept, the newest."""

    def __init__(self) -> None:
        self.folder = Path("~/.cache/hwcompress/executorch").expanduser()

    @staticmethod
    def key(*parts: str) -> str:
        """Hash of what a program is made from, and of all code that makes it."""
        code = hashlib.sha256()
        for file in sorted(Path(__file__).parent.glob("executorch*.py")):
            code.update(file.read_bytes())
        all_parts = [*parts, code.hexdigest(), version("executorch"), version("torch")]
        return hashlib.sha256(json.dumps(all_parts).encode()).hexdigest()[:32]

    def get(self, key: str) -> Program | None:
        """A program; None where there is none, or its files are damaged."""
        try:
            return Program.read(self.folder / key)
        except LoadError:
            shutil.rmtree(self.folder / key, ignore_errors=True)
            return None

    def put(self, key: str, program: Program) -> None:
        """Keep a program."""
        with contextlib.suppress(OSError):
            self.folder.mkdir(parents=True, exist_ok=True)
            new = Path(tempfile.mkdtemp(dir=self.folder))
            try:
                program.write(new)
                new.rename(self.folder / key)
            finally:
                shutil.rmtree(new, ignore_errors=True)
            kept = sorted(self.folder.iterdir(), key=lambda path: path.stat().st_mtime)
            for old in kept[: -self.most]:
                shutil.rmtree(old, ignore_errors=True)
