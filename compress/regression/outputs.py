"""Outputs of the GitHub Action, from the JSON that `compress check --json` printed.

python -m compress.regression.outputs check.json >> "$GITHUB_OUTPUT"
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def outputs(path: Path) -> str:
    """Lines `verdict=...` and `ratio=...`; the verdict is "error" where there is no result."""
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        ratios = [row["value"] for row in result["rows"] if row["metric"] == "latency_p50"]
        units = [row["unit"] for row in result["rows"] if row["metric"] == "latency_p50"]
        verdict = str(result["verdict"])
    except (OSError, ValueError, KeyError, TypeError):
        return "verdict=error\nratio=\n"
    found = [value for value, unit in zip(ratios, units, strict=True) if unit == "x"]
    ratio = f"{found[0]:.4f}" if found and found[0] is not None else ""
    return f"verdict={verdict}\nratio={ratio}\n"


if __name__ == "__main__":
    sys.stdout.write(outputs(Path(sys.argv[1])))
