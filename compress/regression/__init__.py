"""The latency gate: is this artifact slower, larger or less accurate than the one before?

from compress import check

result = check("model-cpu", "baseline", budget="budgets.yaml")
assert result.ok, result.headline
"""

from compress.regression.checking import check
from compress.regression.result import CheckResult, Row

__all__ = ["CheckResult", "Row", "check"]
