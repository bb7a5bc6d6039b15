from __future__ import annotations

from pathlib import Path

import pytest

from compress.errors import UnsupportedError, UsageError
from compress.registry import available, create_pass, create_target, require_target
from compress.testing import NullTarget


def installed(folder: Path, entries: str, module: str = "") -> Path:
    """A distribution with entry points, as pip would leave it."""
    info = folder / "acme-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: acme\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(entries)
    (folder / "acme_plugin.py").write_text(module)
    return folder


def test_ours_are_registered_like_anybody_elses() -> None:
    assert "cpu" in available("compress.targets")
    assert {"fold_batchnorm", "quantize"} <= set(available("compress.passes"))


def test_options_become_fields() -> None:
    assert create_target("cpu", threads=1) == create_target("cpu", threads=1)
    assert create_target("cpu", threads=1) != create_target("cpu")


def test_unknown_names_list_what_is_installed() -> None:
    with pytest.raises(UsageError, match="no target called 'tpu'") as caught:
        create_target("tpu")
    assert "Installed: cpu" in str(caught.value)


def test_unknown_options_list_the_known() -> None:
    with pytest.raises(
        UsageError, match="'quantize' has no option bytes; it has bits, activation_bits"
    ):
        create_pass("quantize", bytes=1)
    with pytest.raises(UsageError, match="'fold_batchnorm' has no option bits; it has none"):
        create_pass("fold_batchnorm", bits=8)


def test_an_unavailable_target_says_why_and_what_to_install() -> None:
    require_target(create_target("cpu"))
    with pytest.raises(UnsupportedError, match="null cannot be used here: It exists only"):
        require_target(NullTarget())
    with pytest.raises(UnsupportedError, match="Install it with: pip install nothing"):
        require_target(NullTarget())


def test_a_broken_plugin_fails_only_for_those_who_ask(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entries = "[compress.targets]\nbroken = acme_plugin:Broken\n"
    monkeypatch.syspath_prepend(installed(tmp_path, entries, "1 / 0\n"))
    assert "broken" in available("compress.targets")
    assert create_target("cpu").name == "cpu"
    with pytest.raises(ZeroDivisionError):
        create_target("broken")


def test_options_for_a_target_without_any(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entries = "[compress.targets]\nplain = acme_plugin2:Plain\n"
    folder = installed(tmp_path, entries)
    (folder / "acme_plugin2.py").write_text("class Plain:\n    name = 'plain'\n")
    monkeypatch.syspath_prepend(folder)
    assert create_target("plain").name == "plain"
    with pytest.raises(UsageError, match="has no option threads"):
        create_target("plain", threads=2)
