"""Programs as files and in the cache; nothing of ExecuTorch is needed for that."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest

from compress.errors import LoadError
from compress.loading import load
from compress.model import TensorSpec
from compress.reference import save_onnx
from compress.target import Kernel
from compress.testing import tiny_exported
from targets.executorch_files import DESCRIPTION, PROGRAM, Cache, Program, fingerprint

MADE = Program(
    name="ExecuTorch int8",
    data=b"not a program, and nobody runs it",
    inputs=(TensorSpec("x", ("batch", 3, 8, 8)), TensorSpec("flag", (), "bool")),
    outputs=("y", "z"),
    batched=("y",),
    operators=(Kernel("conv", "convolution", "int8", "layer.0", "XNNPACK"),),
)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cache:
    monkeypatch.setenv("HOME", str(tmp_path))
    return Cache()


def test_what_is_written_is_read(tmp_path: Path) -> None:
    assert MADE.write(tmp_path) == [tmp_path / PROGRAM, tmp_path / DESCRIPTION]
    assert (tmp_path / PROGRAM).read_bytes() == MADE.data
    assert Program.read(tmp_path) == MADE


@pytest.mark.parametrize("content", ["", "[]", "{}", "null", '{"format": 1}', "\udcff"])
def test_a_damaged_description_is_a_load_error(tmp_path: Path, content: str) -> None:
    MADE.write(tmp_path)
    (tmp_path / DESCRIPTION).write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(LoadError, match=r"model\.json is damaged"):
        Program.read(tmp_path)


@pytest.mark.parametrize(
    "changed",
    [
        {"inputs": [{"name": "x"}]},
        {"operators": [{"kind": "conv"}]},
        {"outputs": None},
        {"data": 1},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_a_description_that_says_something_else_is_refused(
    tmp_path: Path, changed: dict[str, Any]
) -> None:
    MADE.write(tmp_path)
    path = tmp_path / DESCRIPTION
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))
    with pytest.raises(LoadError, match=r"model\.(json is damaged|pte is not what was written)"):
        Program.read(tmp_path)


def test_a_graph_that_was_written_and_read_has_the_same_fingerprint(tmp_path: Path) -> None:
    model = tiny_exported(21)
    path = tmp_path / "model.onnx"
    save_onnx(model.graph_model, path)
    assert fingerprint(load(path).graph_model) == fingerprint(model.graph_model)


@pytest.mark.parametrize("what", ["weight", "attribute", "name", "output"])
def test_another_graph_has_another_fingerprint(what: str) -> None:
    model = tiny_exported(21)
    graph = model.graph_model.graph
    before = fingerprint(model.graph_model)
    if what == "weight":
        weight = graph.initializers["8.weight"]
        weight.const_value = ir.tensor(weight.const_value.numpy() + 1e-6)
    elif what == "attribute":
        graph[0].attributes["group"] = ir.AttrInt64("group", 3)
    elif what == "name":
        graph[0].name = "another"
    else:
        graph.outputs[0].name = "another"
    assert fingerprint(model.graph_model) != before


def test_the_cache_gives_back_what_it_was_given(cache: Cache) -> None:
    assert cache.get("a") is None
    cache.put("a", MADE)
    assert cache.get("a") == MADE
    cache.put("a", dataclasses.replace(MADE, name="another"))
    assert cache.get("a") == MADE
    assert [path.name for path in cache.folder.iterdir()] == ["a"]


def test_a_damaged_entry_is_none(cache: Cache) -> None:
    cache.put("a", MADE)
    (cache.folder / "a" / PROGRAM).write_bytes(b"")
    assert cache.get("a") is None
    cache.put("a", MADE)
    assert cache.get("a") == MADE


def test_the_cache_keeps_the_newest(cache: Cache) -> None:
    for index in range(Cache.most + 3):
        cache.put(f"{index:03}", MADE)
    assert len(list(cache.folder.iterdir())) == Cache.most
    assert cache.get(f"{Cache.most + 2:03}") == MADE


def test_a_cache_that_cannot_be_written_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / ".cache").write_text("a file")
    monkeypatch.setenv("HOME", str(tmp_path))
    cache = Cache()
    cache.put("a", MADE)
    assert cache.get("a") is None
