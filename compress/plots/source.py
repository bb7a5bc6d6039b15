"""Everything that can be plotted of a run or a profile, and all its plots at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from compress.plots.gap import gap_figure, gap_points
from compress.plots.kernels import kernels_figure
from compress.plots.predictions import predictions_figure
from compress.plots.roofline import roofline_figure
from compress.plots.sensitivity import sensitivity_figure
from compress.plots.style import png
from compress.plots.waterline import waterline_figure
from compress.waterline import Peaks

KINDS = ("kernels", "roofline", "waterline", "gap", "sensitivity", "predictions")


@dataclass(frozen=True)
class Best:
    """The peaks of a machine: of each precision those of the runtime that reaches most.

    Attributes:
        of: peaks of its runtimes, at least one.
    """

    of: Sequence[Peaks]

    @property
    def bandwidth_gb_s(self) -> float:
        """Of the memory."""
        return max(one.bandwidth_gb_s for one in self.of)

    def gmacs(self, precision: str) -> float:
        """Of one precision."""
        return max(one.gmacs(precision) for one in self.of)


@dataclass(frozen=True, kw_only=True)
class Source:
    """What plots are made of; what is empty is not drawn.

    Attributes:
        name: of the model.
        tables: by variant, `runtime` and `rows` of `compress.kernel_rows.kernel_rows`.
        untimed: variants whose runtime tells no times of kernels.
        peaks: by runtime.
        gap: rows of `compress.plots.gap.gap_points`.
        unit: of their accuracy.
        sensitivity: operator and figure.
        sensitivity_words: format, metric and unit of those.
        predictions: rows of `compress.plots.predictions.predictions_figure`.
    """

    name: str = ""
    tables: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    untimed: tuple[str, ...] = ()
    peaks: Mapping[str, Peaks] = field(default_factory=dict)
    gap: Sequence[Mapping[str, Any]] = ()
    unit: str = "top-1"
    sensitivity: Sequence[tuple[str, float]] = ()
    sensitivity_words: tuple[str, str, str] = ("", "", "")
    predictions: Sequence[Mapping[str, Any]] = ()

    def kinds(self) -> tuple[str, ...]:
        """Plots that there is something for."""
        known = self.known()
        multiplying = any(row["macs"] for table in known.values() for row in table["rows"])
        there = {
            "kernels": any(table["rows"] for table in self.tables.values()),
            "roofline": multiplying and any(
                row["macs"] and row["bytes"] for table in known.values() for row in table["rows"]
            ),
            "waterline": multiplying,
            "gap": bool(self.gap and self.peaks),
            "sensitivity": bool(self.sensitivity),
            "predictions": bool(self.predictions),
        }  # fmt: skip
        return tuple(kind for kind in KINDS if there[kind])

    def known(self) -> dict[str, Mapping[str, Any]]:
        """Tables of the runtimes whose peaks are known."""
        return {v: table for v, table in self.tables.items() if table["runtime"] in self.peaks}

    def draw(self, kind: str) -> bytes:
        """One plot as PNG.

        Raises:
            CompressError: the rows are not what the plot takes.
        """
        return _DRAWERS[kind](self)


@dataclass(frozen=True)
class Drawn:
    """Plots.

    Attributes:
        files: PNG by kind.
        failures: by kind, a sentence about what went wrong.
    """

    files: dict[str, bytes]
    failures: dict[str, str]


def draw_all(source: Source, kinds: Iterable[str] | None = None) -> Drawn:
    """Every plot that there is something for, or those of `kinds`; never raises for one of them."""
    drawn = Drawn({}, {})
    for kind in source.kinds() if kinds is None else kinds:
        try:
            drawn.files[kind] = source.draw(kind)
        except Exception as error:  # whatever Matplotlib meets, a run is worth more than its plot
            text = " ".join(str(error).split()) or type(error).__name__
            drawn.failures[kind] = f"The plot of {kind} could not be drawn: {text}"
    return drawn


def _kernels(source: Source) -> bytes:
    return png(kernels_figure(source.tables, source.name, source.untimed))


def _roofline(source: Source) -> bytes:
    return png(roofline_figure(source.known(), source.peaks, source.name))


def _waterline(source: Source) -> bytes:
    return png(waterline_figure(source.known(), source.peaks, source.name))


def _gap(source: Source) -> bytes:
    return png(gap_figure(gap_points(source.gap, Best(tuple(source.peaks.values()))), source.unit))


def _sensitivity(source: Source) -> bytes:
    form, metric, unit = source.sensitivity_words
    return png(sensitivity_figure(source.sensitivity, form=form, metric=metric, unit=unit))


def _predictions(source: Source) -> bytes:
    return png(predictions_figure(source.predictions))


_DRAWERS: Mapping[str, Callable[[Source], bytes]] = {
    "kernels": _kernels,
    "roofline": _roofline,
    "waterline": _waterline,
    "gap": _gap,
    "sensitivity": _sensitivity,
    "predictions": _predictions,
}
