"""Run the `run:` steps of action.yml as GitHub's runner would, with the inputs given.

    python .ci/action_steps.py candidate=demo/digits-int8 baseline=demo/baseline time=20

Each step runs in bash as the runner starts it, its `env` filled from the inputs and their defaults.
GITHUB_OUTPUT and GITHUB_STEP_SUMMARY are files of its own; outputs and summary are printed at the
end. The exit code is that of the step that failed, else 0.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import yaml

ACTION = Path(__file__).parents[1] / "action.yml"


def main() -> int:
    """All steps, until one fails."""
    action = yaml.safe_load(ACTION.read_text())
    inputs = {name: str(one.get("default", "")) for name, one in action["inputs"].items()}
    given = dict(argument.split("=", 1) for argument in sys.argv[1:])
    unknown = set(given) - set(inputs)
    missing = {name for name, one in action["inputs"].items() if one.get("required")} - set(given)
    if unknown or missing:
        print(f"unknown inputs: {sorted(unknown)}, missing: {sorted(missing)}", file=sys.stderr)
        return 2
    values = {f"inputs.{name}": value for name, value in (inputs | given).items()}
    values["github.action_path"] = str(ACTION.parent)
    with tempfile.TemporaryDirectory() as folder:
        output, summary = Path(folder, "output"), Path(folder, "summary.md")
        for file in (output, summary):
            file.touch()
        runner = {
            "GITHUB_ACTIONS": "true",
            "GITHUB_OUTPUT": str(output),
            "GITHUB_STEP_SUMMARY": str(summary),
            "RUNNER_TEMP": folder,
        }
        code = 0
        for step in action["runs"]["steps"]:
            if "run" not in step:
                continue
            code = run(step, values, runner, Path(folder))
            if code:
                break
        print(output.read_text() + summary.read_text())
    return code


def run(
    step: dict[str, object], values: dict[str, str], runner: dict[str, str], folder: Path
) -> int:
    """One step, as `shell: bash` means it."""
    if step.get("shell") != "bash":
        raise SystemExit(f"step {step.get('name')} has no shell: bash")
    environment = {name: fill(str(text), values) for name, text in dict(step["env"]).items()}
    script = folder / "step.sh"
    script.write_text(str(step["run"]))
    print(f"== {step.get('name')}", flush=True)
    # https://docs.github.com/actions/reference/workflow-syntax-for-github-actions, "shell"
    command = ["bash", "--noprofile", "--norc", "-eo", "pipefail", str(script)]
    return subprocess.run(command, env=os.environ | runner | environment, check=False).returncode


def fill(text: str, values: dict[str, str]) -> str:
    """`${{ name }}` replaced by its value; an unknown name is an error of the action."""
    return re.sub(r"\$\{\{\s*([\w.-]+)\s*\}\}", lambda match: values[match[1]], text)


if __name__ == "__main__":
    sys.exit(main())
