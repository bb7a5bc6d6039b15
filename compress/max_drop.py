"""How much of a metric may be lost: the option `--max-drop`."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from compress.errors import UsageError


@dataclass(frozen=True)
class MaxDrop:
    """The largest loss that is allowed.

    Attributes:
        fraction: of the metric's full scale 0..1, so 0.005 is half a point of top-1.
        relative: the fraction is one of the baseline's own value instead.
    """

    fraction: float
    relative: bool = False

    def __post_init__(self) -> None:
        if not (math.isfinite(self.fraction) and 0 <= self.fraction <= 1):
            raise UsageError(
                f"A drop of {self.fraction:.6g} is not possible; it lies between 0 and 1, "
                f"written 0% to 100%."
            )

    def allowed(self, baseline: float) -> float:
        """The loss that is allowed from this baseline, in the metric's unit."""
        return self.fraction * abs(baseline) if self.relative else self.fraction

    def __str__(self) -> str:
        return f"{self.fraction * 100:g}%{'rel' if self.relative else ''}"


def parse_max_drop(value: str | float | MaxDrop) -> MaxDrop:
    """Read "0.5%" (absolute points) or "0.5%rel" (share of the baseline); a float is a fraction.

    The text needs its % sign, because 0.5 could be meant either way. In Python, 0.005 is half a
    point. For a score on another scale than 0..1 use the relative form.

    Raises:
        UsageError: anything else.
    """
    if isinstance(value, MaxDrop):
        return value
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return MaxDrop(float(value))
    match = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*%\s*(rel)?\s*", str(value))
    if match is None:
        number = re.fullmatch(r"\s*\d*\.?\d+\s*(?:rel)?\s*", str(value))
        reason = "needs a % sign, as it could be points or a fraction" if number else "is no drop"
        raise UsageError(
            f"--max-drop {value!r} {reason}. Write 0.5% for half a point of the metric, or "
            f"0.5%rel for half a percent of the baseline's own value."
        )
    return MaxDrop(float(match[1]) / 100, relative=match[2] is not None)
