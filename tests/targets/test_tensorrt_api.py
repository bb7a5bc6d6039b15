"""The TensorRT engine against the list of what it uses, and the list against NVIDIA's bindings."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from targets.tensorrt_api import DOCUMENTATION, ENTERED, NAMES, OBJECTS, SOURCES, Name

ROOT = Path(__file__).parents[2]
BY_PATH = {name.path: name for name in NAMES}
OTHERS = {
    "begin", "dict", "end", "functools", "inputs", "json", "kernel", "kind", "known", "log",
    "model", "np", "one", "os", "path", "self", "settings", "shapes", "spec", "statistics",
    "tempfile", "temporary", "tensor", "threading", "times", "torch",
}  # fmt: skip
"""What else has attributes there; a name that is in neither list fails the test."""
BINDINGS = "HWCOMPRESS_TENSORRT_BINDINGS"
"""Folders with the package `tensorrt_bindings` of other versions, separated by colons."""


def tree() -> ast.Module:
    """All of the modules, one behind the other."""
    texts = [(ROOT / "targets" / name).read_text() for name in SOURCES]
    return ast.Module([node for text in texts for node in ast.parse(text).body], [])


def chain(node: ast.expr) -> str:
    """`trt.ILogger.Severity` as text; "" where it does not begin with a name."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        before = chain(node.value)
        return f"{before}.{node.attr}" if before else ""
    return ""


def chains(module: ast.AST) -> Iterator[tuple[ast.Attribute, str]]:
    """The longest chains of attributes, and those behind a call, with "" for the latter."""
    inner = {id(n.value) for n in ast.walk(module) if isinstance(n, ast.Attribute)}
    for node in ast.walk(module):
        if isinstance(node, ast.Attribute) and (id(node) not in inner or not chain(node)):
            yield node, chain(node)


def resolved(text: str) -> str | None:
    """The path that a chain stands for; None where it is not TensorRT's."""
    if text.startswith("trt."):
        return text.removeprefix("trt.")
    for variable, kind in OBJECTS.items():
        if text.startswith(f"{variable}."):
            return f"{kind}.{text.removeprefix(f'{variable}.')}"
    return None


def listed(path: str) -> str:
    """The entry of a path, which may end in what every object or text has."""
    for ending in ("", ".__init__", ".partition"):
        if path.endswith(ending) and path[: len(path) - len(ending)] in BY_PATH:
            return path[: len(path) - len(ending)]
    return ""


def used() -> dict[str, list[int]]:
    """Paths of TensorRT's API in the engine module, with their lines."""
    found: dict[str, list[int]] = {}
    for node, text in chains(tree()):
        path = resolved(text) if text else None
        if path is not None:
            found.setdefault(listed(path) or path, []).append(node.lineno)
    for node in ast.walk(tree()):
        if isinstance(node, ast.ClassDef) and node.name in ENTERED:
            for method in node.body:
                if isinstance(method, ast.FunctionDef) and method.name != "__init__":
                    found.setdefault(f"{ENTERED[node.name]}.{method.name}", []).append(node.lineno)
    return found


def test_the_engine_uses_no_name_that_is_not_listed() -> None:
    unknown = {path: lines for path, lines in used().items() if path not in BY_PATH}
    assert unknown == {}


def test_no_name_is_listed_that_the_engine_does_not_use() -> None:
    assert {name.path for name in NAMES} == set(used())


def test_attributes_belong_to_objects_whose_kind_is_known() -> None:
    """So that no call of TensorRT hides behind a variable of another name, or behind a call."""
    for node, text in chains(tree()):
        if text:
            root = text.split(".")[0]
            assert root in {*OTHERS, "trt", *OBJECTS}, f"line {node.lineno}: {text}"
            continue
        called = node.value.func if isinstance(node.value, ast.Call) else None
        behind = chain(called) if called is not None else ""
        assert resolved(behind) is None, f"line {node.lineno}: name what {behind} returns"


def calls() -> Iterator[tuple[int, Name, ast.Call]]:
    for node in ast.walk(tree()):
        if isinstance(node, ast.Call):
            path = resolved(chain(node.func))
            if path is not None and path in BY_PATH:
                yield node.lineno, BY_PATH[path], node


def test_no_other_module_imports_tensorrt() -> None:
    importing = {
        path.name
        for folder in ("compress", "quant", "prune", "distill", "targets")
        for path in (ROOT / folder).rglob("*.py")
        if re.search(r"^\s*(import|from) tensorrt\b", path.read_text(), re.MULTILINE)
    }
    assert importing == set(SOURCES)


def test_calls_give_as_many_arguments_as_are_listed() -> None:
    count = 0
    for line, name, call in calls():
        assert name.arguments is not None, f"line {line}: {name.path} is called"
        assert len(call.args) + len(call.keywords) == len(name.arguments), f"line {line}"
        assert {one.arg for one in call.keywords} <= set(name.arguments), f"line {line}"
        count += 1
    assert count > 30


def test_every_name_has_its_page_for_both_versions() -> None:
    for name in NAMES:
        for major, base in DOCUMENTATION.items():
            assert re.fullmatch(rf"{re.escape(base)}/[A-Za-z/]+\.html", name.url(major))
    assert "1001" in DOCUMENTATION["10"]
    assert "/11." in DOCUMENTATION["11"]


LIBRARIES = ("nvinfer", "nvonnxparser", "nvinfer_plugin")
ENTRY_POINTS = (
    "createInferBuilder_INTERNAL", "createInferRefitter_INTERNAL", "createInferRuntime_INTERNAL",
    "createNvOnnxParserRefitter_INTERNAL", "createNvOnnxParser_INTERNAL",
    "getBuilderPluginRegistry", "getNvOnnxParserVersion", "getPluginRegistry",
    "initLibNvInferPlugins",
)  # fmt: skip
"""What the bindings want of TensorRT's libraries. Here each of them ends the process."""

ASK = """
import json, sys
sys.path[:0] = [one for one in sys.argv[1:2] if one]
import tensorrt_bindings as trt

def about(path):
    value = trt
    for part in path.split("."):
        value = getattr(value, part, None)
    if value is None:
        return None
    if isinstance(value, type):
        value = value.__init__
    return {"doc": getattr(value, "__doc__", None) or "", "property": isinstance(value, property)}

version = trt.__version__
print(json.dumps({"version": version, "names": {path: about(path) for path in sys.argv[2:]}}))
"""


@pytest.fixture(scope="module")
def empty_libraries(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Libraries of TensorRT's names without anything in them, so that its bindings load."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("there is no C compiler to make empty libraries with")
    folder = tmp_path_factory.mktemp("libraries")
    code = folder / "empty.c"
    functions = "".join(f"void {name}(void) {{ abort(); }}\n" for name in ENTRY_POINTS)
    code.write_text(f"#include <stdlib.h>\n{functions}")
    for major in (10, 11):
        for library in LIBRARIES:
            file = f"lib{library}.so.{major}"
            options = ["-shared", "-fPIC", f"-Wl,-soname,{file}", "-o", str(folder / file)]
            subprocess.run([compiler, *options, str(code)], check=True, capture_output=True)
    return folder


def bindings() -> list[str]:
    """Folders to import the bindings from; "" for those that are installed."""
    installed = [""] if importlib.util.find_spec("tensorrt_bindings") is not None else []
    return [*installed, *filter(None, os.environ.get(BINDINGS, "").split(":"))]


def signatures(text: str) -> list[tuple[list[str], list[str]]]:
    """Required and optional arguments of each overload in a pybind11 docstring."""
    found = []
    for given in re.findall(r"\(self: ([^\n]*)\) -> ", text):
        arguments = re.split(r", (?=\w+: )", given)[1:]
        required = [one.split(":")[0] for one in arguments if " = " not in one]
        optional = [one.split(":")[0] for one in arguments if " = " in one]
        found.append((required, optional))
    return found


def test_the_list_agrees_with_the_bindings(empty_libraries: Path) -> None:
    folders = bindings()
    if not folders:
        pytest.skip(
            "the package tensorrt-cu12-bindings is not installed (pip install --no-deps "
            f"tensorrt-cu12-bindings), nor named in {BINDINGS}"
        )
    for folder in folders:
        ran = subprocess.run(
            [sys.executable, "-c", ASK, folder, *BY_PATH],
            env=os.environ | {"LD_LIBRARY_PATH": str(empty_libraries)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert ran.returncode == 0, ran.stderr
        answer = json.loads(ran.stdout)
        version = tuple(map(int, answer["version"].split(".")[:2]))
        for path, name in BY_PATH.items():
            about = answer["names"][path]
            if version < name.since:
                continue
            assert about is not None, f"{path} is not in TensorRT {answer['version']}"
            known = signatures(about["doc"])
            if name.arguments is None or not known:
                continue
            given = list(name.arguments)
            fits = [
                required == given[: len(required)] and set(given[len(required) :]) <= set(optional)
                for required, optional in known
            ]
            assert any(fits), f"{path}{name.arguments} in {answer['version']}: {known}"
        methods = [n for n in NAMES if n.arguments is not None and n.path != "nptype"]
        unread = [n.path for n in methods if not signatures(answer["names"][n.path]["doc"])]
        assert unread == []
