"""Measured against predicted latency, by where the predictions come from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from compress.errors import UsageError
from compress.plots.style import (
    FAINT,
    FAMILIES,
    INK,
    drawing,
    log_axis,
    new_figure,
    number,
    padded,
    shortened,
)

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.figure import Figure

BAND = 0.1
"""Of the measured latency: predictions that near are good, as nn-Meter counts them (MobiSys'21)."""
_MARKS = "osD^vPX"
_HEIGHT = 5.2
_RANKED = 2
"""Least number of models that can be ranked."""


@dataclass(frozen=True)
class Errors:
    """How good the predictions of one source are.

    Attributes:
        n: models.
        within: share of them whose prediction is within `BAND` of the measurement, 0..1.
        mape: mean of |predicted - measured| / measured, 0..1 and above.
        spearman: rank correlation, -1..1; None where nothing can be ranked.
    """

    n: int
    within: float
    mape: float
    spearman: float | None


def prediction_errors(measured: Sequence[float], predicted: Sequence[float]) -> Errors:
    """Errors of predictions.

    Args:
        measured: positive latencies.
        predicted: for the same models.

    Raises:
        UsageError: there are none, or they are not as many.
    """
    if not measured or len(measured) != len(predicted):
        raise UsageError(
            f"{len(measured)} measured and {len(predicted)} predicted latencies make no pairs; "
            f"give each model both."
        )
    off = [abs(p - m) / m for m, p in zip(measured, predicted, strict=True)]
    ranked = min(len(set(measured)), len(set(predicted))) >= _RANKED
    rho = None
    if ranked:
        from scipy.stats import spearmanr

        rho = float(spearmanr(measured, predicted).statistic)
    # A prediction at the very edge is within, whatever the rounding.
    within = sum(one <= BAND + 1e-12 for one in off) / len(off)
    return Errors(len(off), within, sum(off) / len(off), rho)


def predictions_figure(rows: Iterable[Mapping[str, Any]], title: str = "") -> Figure:
    """Points around the diagonal with a band of 10%, by source.

    Args:
        rows: name, measured_ms, predicted_ms and source, such as "profiler", "lookup table",
            "predictor" or "roofline".
        title: takes the place of the usual one.

    Raises:
        UsageError: there are no rows, a field is missing, or a latency is not positive.
    """
    sources = _sources(rows)
    errors = {source: prediction_errors(*pairs) for source, pairs in sources.items()}
    with drawing():
        figure = new_figure(
            _HEIGHT,
            title or _title(errors),
            "Grey: within 10% of the measurement. MAPE: mean absolute error in percent of the "
            "measurement. ρ: Spearman's rank correlation.",
            legend=_legend(errors),
            width=_HEIGHT + 1.6,
        )
        axes = figure.add_subplot()
        everything = [value for pairs in sources.values() for side in pairs for value in side]
        low, high = padded(everything, 1.3)
        axes.set_xlim(low, high)
        axes.set_ylim(low, high)
        log_axis(axes, "x")
        log_axis(axes, "y")
        axes.set_aspect("equal")
        axes.grid()
        ends = [low, high]
        axes.fill_between(
            ends, [v * (1 - BAND) for v in ends], [v * (1 + BAND) for v in ends], color="#d0d7de",
            alpha=0.6, linewidth=0, zorder=1, label="band",
        )  # fmt: skip
        axes.plot(ends, ends, color=INK, linewidth=0.9, zorder=2, label="diagonal")
        for index, (source, (measured, predicted)) in enumerate(sources.items()):
            axes.scatter(
                measured, predicted, s=24, marker=_MARKS[index % len(_MARKS)], zorder=3,
                color=FAMILIES[index % len(FAMILIES)], alpha=0.75, edgecolors="white",
                linewidths=0.4, label=f"source {source}",
            )  # fmt: skip
        axes.set_xlabel("measured latency, ms")
        axes.set_ylabel("predicted latency, ms")
        for word, x, y in (("slower", 0.01, 0.97), ("faster", 0.69, 0.01)):
            text = f"predicted {word} than measured"
            axes.annotate(text, (x, y), xycoords="axes fraction", color=FAINT, fontsize=7)
    return figure


def _sources(rows: Iterable[Mapping[str, Any]]) -> dict[str, tuple[list[float], list[float]]]:
    """Measured and predicted latencies by source."""
    found: dict[str, tuple[list[float], list[float]]] = {}
    for row in rows:
        try:
            name, source = str(row["name"]), str(row["source"])
            pair = row["measured_ms"], row["predicted_ms"]
        except KeyError as error:
            raise UsageError(
                f"A row of predictions lacks {error}; it needs name, measured_ms, predicted_ms and "
                f"source."
            ) from error
        sides = found.setdefault(source, ([], []))
        for side, value, what in zip(sides, pair, ("measured_ms", "predicted_ms"), strict=True):
            if not number(value, f"{what} of {name}"):
                raise UsageError(
                    f"{what} of {name} is 0, which has no place on a logarithmic axis. Leave the "
                    f"row out."
                )
            side.append(float(value))
    if not found:
        raise UsageError("There are no predictions to plot.")
    return found


def _legend(errors: Mapping[str, Errors]) -> list[Artist]:
    from matplotlib.lines import Line2D

    found: list[Artist] = []
    for index, (source, one) in enumerate(errors.items()):
        rho = f", ρ {one.spearman:.2f}" if one.spearman is not None else ""
        text = f"{shortened(source, 24)} (n {one.n}): {one.within:.0%} within 10%, "
        found.append(
            Line2D(
                [], [], linestyle="", marker=_MARKS[index % len(_MARKS)], markersize=5,
                color=FAMILIES[index % len(FAMILIES)], label=f"{text}MAPE {one.mape:.1%}{rho}",
            )
        )  # fmt: skip
    return found


def _title(errors: Mapping[str, Errors]) -> str:
    best = min(errors, key=lambda source: errors[source].mape)
    nearest = " is nearest" if len(errors) > 1 else ""
    found = f"{shortened(best)}{nearest}, MAPE {errors[best].mape:.1%}"
    return f"Predicted against measured latency: {found}"
