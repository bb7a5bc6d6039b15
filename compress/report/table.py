"""Rows and words that the Markdown and the terminal report share."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from compress.report import Candidate, Report

COLUMNS = ("", "latency p50", "speed-up", "size", "memory", "accuracy", "drop", "int8 MACs")


NOT_MEASURED = "not measured"


def candidate_row(candidate: Candidate, chosen: bool) -> tuple[str, ...]:
    """One line of the table of candidates."""
    timing, measured = candidate.timing, bool(candidate.timing)
    return (
        f"{candidate.name} (artifact)" if chosen else candidate.name,
        interval(timing, "p50_ms", "low_ms", "high_ms", " ms") if measured else NOT_MEASURED,
        speedup(candidate.speedup) if measured else "",
        size(candidate.size_bytes),
        memory(candidate.memory),
        score(candidate.score),
        drop(candidate.drop),
        f"{candidate.int8_macs:.1%}",
    )


def interval(
    values: Mapping[str, Any], middle: str, low: str, high: str, unit: str, places: int = 0
) -> str:
    """`1.83 ms [1.80, 1.86]` with as many places as the value needs."""
    value = float(values[middle])
    places = places or max(0, 2 - math.floor(math.log10(max(value, 1e-6))))
    return f"{value:.{places}f}{unit} [{values[low]:.{places}f}, {values[high]:.{places}f}]"


def speedup(ratio: Mapping[str, Any] | None) -> str:
    """`2.06x [2.01, 2.11] faster`."""
    if ratio is None:
        return "1"
    return interval(ratio, "value", "low", "high", "x", 2) + f" {ratio['verdict']}"


def size(size_bytes: int) -> str:
    """Bytes for people."""
    if size_bytes < 1_000_000:
        return f"{size_bytes / 1e3:.1f} kB"
    return f"{size_bytes / 1e6:.2f} MB"


def memory(facts: Mapping[str, Any]) -> str:
    """Peak of the activations, and whether the budget allows it."""
    if facts.get("bytes") is None:
        return "unknown" if facts else ""
    verdict = {True: ", fits", False: ", too much", None: ""}[facts["fits"]]
    return f"{size(facts['bytes'])}{verdict}"


def memory_sentence(name: str, facts: Mapping[str, Any]) -> str:
    """Where the peak of a candidate is, and how it is known."""
    if facts.get("bytes") is None:
        return f"{name}: peak memory of activations {facts['how']}."
    where = f" at {facts['operator']} ({facts['op_type']})" if facts.get("operator") else ""
    shown = [f"{tensor} {size(number)}" for tensor, number in facts.get("tensors", ())]
    tensors = f": {', '.join(shown)}" if shown else ""
    return f"{name}: activations take {size(facts['bytes'])}{where}, {facts['how']}{tensors}."


def score(value: Mapping[str, Any] | None) -> str:
    """Accuracy in the target's runtime."""
    if value is None:
        return "not evaluated"
    shown = f"{value['value']:.2%}" if value["unit"] == "top-1" else f"{value['value']:.4g}"
    return f"{shown}, {value['where']}" if value.get("where") else shown


def drop(value: Mapping[str, Any] | None) -> str:
    """Lost points with their paired interval."""
    if value is None:
        return ""
    return f"{value['points']:+.2f} points [{value['low']:+.2f}, {value['high']:+.2f}]"


def fidelity(value: Mapping[str, Any]) -> str:
    """One sentence about agreement with the original."""
    agreement = value.get("top1_agreement")
    first = f"top-1 agreement {agreement:.2%}, " if agreement is not None else ""
    sqnr = value["sqnr_db"]
    noise = f"SQNR {sqnr:.1f} dB" if isinstance(sqnr, (int, float)) else "SQNR infinite"
    return (
        f"{first}cosine {value['cosine']:.5f}, {noise}, largest difference "
        f"{value['max_abs_difference']:.3g} on {value['samples']} samples of {value['source']}"
    )


def closeness(value: Mapping[str, Any]) -> str:
    """How close outputs of a device are to this machine's."""
    if value["max_abs_difference"] == 0:
        return "equal"
    if value["max_abs_difference"] is None:
        return "not finite in the same places"
    sqnr = value["sqnr_db"]
    noise = f"SQNR {sqnr:.1f} dB" if sqnr is not None else "no signal"
    return f"{noise}, largest difference {value['max_abs_difference']:.3g}"


DEVICES = ("device", "candidate", "latency p50", "speed-up", "outputs, there against here")


def device_rows(report: Report) -> list[tuple[str, ...]]:
    """Lines of the table of devices: each candidate on each, or why there are none."""
    rows: list[tuple[str, ...]] = []
    for one in report.devices:
        found = one["comparison"]
        if found is None:
            rows.append((one["device"], "", "", "", one["error"]))
            continue
        for name, timing in found["timings"].items():
            close = one["closeness"].get(name)
            rows.append(
                (
                    one["device"],
                    f"{name} (artifact)" if name == report.chosen else name,
                    interval(timing, "p50_ms", "low_ms", "high_ms", " ms"),
                    speedup(found["ratios"].get(name)),
                    closeness(close) if close else "",
                )
            )
        rows += [
            (one["device"], name, "", "", f"failed: {reason}")
            for name, reason in one["failures"].items()
        ]
    return rows


TRIED = ("", "speed-up in screening", "latency", "operators kept in float", "settings")


def tried_row(row: Mapping[str, Any]) -> tuple[str, ...]:
    """One line of the table of everything that was screened."""
    if row["failure"]:
        return (row["name"], f"failed: {row['failure'].splitlines()[0][:80]}", "", "", "")
    ratio, latency = row["speedup"], row["p50_ms"]
    shown = "1" if row["name"] == "float32" or ratio is None else _ratio(ratio)
    options = ", ".join(f"{k} {v}" for k, v in row["settings"].items() if v is not None)
    kept = str(row["float_sites"]) if row["precision"] == "mixed" else ""
    return (row["name"], shown, f"{latency:.3g} ms" if latency else "", kept, options)


def _ratio(ratio: Mapping[str, Any]) -> str:
    return interval(ratio, "value", "low", "high", "x", 2)


def region_table(report: Report) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Columns and rows of the regions: what each was predicted to take, and what it got."""
    precisions = list(report.regions[0]["predicted_us"]) if report.regions else []
    columns = ("region", "operators", "MACs", *(f"{p}, µs (predicted)" for p in precisions), "runs")
    rows = [
        (
            row["name"],
            str(row["sites"]),
            f"{row['macs'] / 1e6:.2f} M",
            *(f"{row['predicted_us'][p]:.0f}" for p in precisions),
            row["precision"],
        )
        for row in report.regions
    ]
    return columns, rows


def float_sites(report: Report) -> list[Mapping[str, Any]]:
    """Sites with multiply-accumulates that the compressed model runs in float."""
    return [row for row in report.sites if row["macs"] and row["precision"] != "int8"]


SENSITIVE = 10
"""Operators that the table of sensitivities shows."""
METRICS = {
    "kl": ("KL divergence of the class probabilities from the original's", "nats"),
    "mse": ("power of the outputs' error over their own power", ""),
    "accuracy": ("share of samples whose top-1 is lost", ""),
    "fisher": ("rise of the loss that the Fisher information predicts", "nats"),
    "hutchinson": ("squared rounding error of the weights times their mean curvature", ""),
}
"""What the figures of a sensitivity mean, and their unit."""


def sensitivity_metric(report: Report) -> str:
    """Name of the figure that decides; decibels, of which less is worse, give way to `mse`."""
    name = next(iter(report.sensitivity[0]["metrics"]))
    return "mse" if name == "sqnr" else str(name)


def sensitivities(report: Report) -> dict[str, dict[str, float]]:
    """The deciding figure by operator and format; operators that suffer most come first."""
    metric = sensitivity_metric(report)
    found: dict[str, dict[str, float]] = {}
    for row in report.sensitivity:
        found.setdefault(row["name"], {})[row["format"]] = float(row["metrics"][metric])
    return dict(sorted(found.items(), key=lambda item: -max(item[1].values())))


def sensitivity_table(report: Report) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Columns and rows of the operators that suffer most."""
    formats = list(dict.fromkeys(row["format"] for row in report.sensitivity))
    rows = [
        (name, *(f"{values[one]:.3g}" if one in values else "" for one in formats))
        for name, values in list(sensitivities(report).items())[:SENSITIVE]
    ]
    return ("operator", *formats), rows


def sensitivity_sentence(report: Report) -> str:
    """What the table shows."""
    metric = sensitivity_metric(report)
    words = METRICS.get(metric, (metric, ""))[0]
    total = len({row["name"] for row in report.sensitivity})
    shown = f"the {SENSITIVE} most sensitive of {total}" if total > SENSITIVE else f"all {total}"
    return (
        f"One operator quantized, everything else in float; {shown} operators. {metric}: {words}."
    )


LADDER = ("rung", "passes", "drop", "SQNR", "float operators", "seconds", "result")


def ladder_row(row: Mapping[str, Any]) -> tuple[str, ...]:
    """One line of the table of repairs."""
    if row["drop"] is None:
        passes = ", ".join(row["passes"])
        return (row["rung"], passes, "", "", "", f"{row['seconds']:.1f}", row["reason"])
    lost = drop(row["points"]) if row["points"] else f"{row['drop']:+.4g}"
    sqnr = f"{row['sqnr_db']:.1f} dB" if row["sqnr_db"] is not None else "equal"
    result = "holds" if row["holds"] else "kept" if row["kept"] else f"left out: {row['reason']}"
    return (
        row["rung"],
        ", ".join(row["passes"]),
        lost,
        sqnr,
        str(row["float_sites"] or ""),
        f"{row['seconds']:.1f}",
        result,
    )


def gap(values: Mapping[str, Any]) -> str:
    """One sentence about the artifact and the simulation of its plan."""
    agreement = values["top1_agreement"]
    first = f"top-1 agrees on {agreement:.2%}" if agreement is not None else "outputs compared"
    sqnr = f", SQNR {values['sqnr_db']:.1f} dB" if values["sqnr_db"] is not None else ", equal"
    return (
        f"Artifact in its runtime against the simulation: {first} of {values['samples']} "
        f"samples{sqnr}."
    )


PREDICTED = ("", "cores", "latency (predicted)", "limited by memory")


def predicted_row(row: Mapping[str, Any]) -> tuple[str, ...]:
    """One line of the table of predicted latencies."""
    latency = f"{row['predicted_ms']:.3g} ms"
    return (row["precision"], str(row["cores"]), latency, f"{row['memory_bound']:.0%}")


def predicted_sentence(predicted: Mapping[str, Any]) -> str:
    """What the figures are, and on how firm a ground they stand."""
    device = predicted["device"]
    facts = device["facts"]
    doubtful = [fact for fact in facts.values() if fact["kind"] == "unverified"]
    narrow = "" if predicted["operators"] == "as placed" else " (all operators)"
    sentence = (
        f"Predicted from the sheet of {device['title']}, not measured: the sum over operators of "
        f"max(MACs / peak, bytes / bandwidth), for float32 and int8{narrow}. No kernel reaches "
        f"these peaks, so the device takes longer."
    )
    if doubtful:
        sentence += f" {len(doubtful)} of the sheet's {len(facts)} facts are unverified."
    return sentence


WATERLINES = (
    "R: peak rate of the precisions in use. Waterline: the rate if every kernel took max(MACs / "
    "peak, bytes / bandwidth). Peaks were measured on this machine, times under the runtime's "
    "profiler."
)
WATERLINE = ("", "R", "waterline", "actual", "efficiency (actual / R)", "limited by memory")


def waterline_row(name: str, values: Mapping[str, Any]) -> tuple[str, ...]:
    """One line of the table of waterlines."""
    rates = (values[f"{key}_gmacs"] for key in ("peak", "waterline", "actual"))
    return (
        name,
        *(f"{rate:.3g} GMAC/s" for rate in rates),
        f"{values['efficiency']:.0%}",
        f"{values['memory_bound']:.0%}",
    )
