"""The GitHub Action: its form, and its own steps run as the runner would run them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[3]
EXAMPLES = ROOT / "examples" / "ci"


@pytest.fixture(scope="module")
def action() -> dict[str, Any]:
    return dict(yaml.safe_load((ROOT / "action.yml").read_text()))


def test_inputs_and_outputs(action: dict[str, Any]) -> None:
    inputs = action["inputs"]
    expected = {"candidate", "baseline", "budget", "eval", "time", "cannot-tell", "python"}
    assert set(inputs) == expected
    required = {name for name, one in inputs.items() if one.get("required")}
    assert required == {"candidate", "baseline"}
    assert all("default" in one for name, one in inputs.items() if name not in required)
    assert set(action["outputs"]) == {"verdict", "ratio"}
    ids = {step.get("id") for step in action["runs"]["steps"]}
    for one in action["outputs"].values():
        match = re.fullmatch(r"\$\{\{ steps\.(\w+)\.outputs\.\w+ \}\}", one["value"])
        assert match is not None
        assert match[1] in ids


def test_no_input_is_put_into_a_script(action: dict[str, Any]) -> None:
    """Text between ${{ and }} becomes part of the program; a variable's value does not."""
    assert action["runs"]["using"] == "composite"
    used = set()
    for step in action["runs"]["steps"]:
        assert "${{" not in step["run"]
        assert step["shell"] == "bash"
        used |= set(re.findall(r"inputs\.([\w-]+)", " ".join(step["env"].values())))
        for name in step["env"]:
            assert f'"${name}"' in step["run"] or f"${{{name}}}" in step["run"], name
    assert used == set(action["inputs"])


def steps(folder: Path, *inputs: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / ".ci" / "action_steps.py"), *inputs]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, f"python={sys.executable}"],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_steps_give_outputs_and_a_summary(tmp_path: Path, tiny_onnx: Path) -> None:
    """Short of time on purpose: a verdict is not what is tested, and names are not run."""
    name = '-- "$(touch gone)`touch gone`;touch gone.onnx'
    (tmp_path / name).write_bytes(tiny_onnx.read_bytes())
    ran = steps(tmp_path, f"candidate={name}", f"baseline=./{name}", "time=0.5")
    assert ran.returncode == 0, ran.stderr
    assert "verdict=cannot tell\n" in ran.stdout
    assert re.search(r"^ratio=\d+\.\d+$", ran.stdout, re.MULTILINE)
    assert "### Compression check: cannot tell" in ran.stdout
    assert "::warning title=compress check::" in ran.stdout + ran.stderr
    assert not (tmp_path / "gone").exists()


def test_an_error_reaches_the_outputs_and_the_exit_code(tmp_path: Path, tiny_onnx: Path) -> None:
    ran = steps(tmp_path, "candidate=no_such.onnx", f"baseline={tiny_onnx}")
    assert ran.returncode == 2
    assert "verdict=error\nratio=\n" in ran.stdout
    assert "### Compression check: error" in ran.stdout
    assert "::error title=compress check::" in ran.stdout + ran.stderr


def test_the_examples_are_workflows_that_use_what_there_is(action: dict[str, Any]) -> None:
    workflow = yaml.safe_load((EXAMPLES / "github.yml").read_text())
    (check,) = [step for step in workflow["jobs"]["check"]["steps"] if step.get("id") == "check"]
    assert set(check["with"]) <= set(action["inputs"])
    assert all("${{" not in step.get("run", "") for step in workflow["jobs"]["check"]["steps"])
    gitlab = yaml.safe_load((EXAMPLES / "gitlab-ci.yml").read_text())
    report = gitlab["model"]["artifacts"]["reports"]["junit"]
    assert f"--junit {report}" in " ".join(gitlab["model"]["script"])
    for name in ("budgets.yaml", "github.yml", "gitlab-ci.yml", "test_budget.py"):
        assert f"`{name}`" in (EXAMPLES / "README.md").read_text()
