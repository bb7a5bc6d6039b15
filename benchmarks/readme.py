"""The tables of both READMEs from the results: `python -m benchmarks.readme` writes them in place.

A table stands between `<!-- NAME -->` and `<!-- end -->`; what is between is replaced.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from benchmarks import reparam_tables
from benchmarks.common import HERE
from benchmarks.peers import EXECUTORCH, ORT_FLOAT, ORT_INT8, OV_INT8, OV_QDQ, OV_WIDE

FORMS = ("+.2f", ".1f", ".3f")
UNITS = ("", " dB", " ms")
PAGES = (HERE.parent / "README.md", HERE / "README.md")


def entries(name: str) -> dict[str, Any]:
    """What a benchmark found."""
    found: dict[str, Any] = json.loads((HERE / "results" / f"{name}.json").read_text())["entries"]
    return found


def artifact(name: str) -> str:
    """Name of a candidate without its settings."""
    return name.partition(",")[0]


def against_peers(name: str) -> list[list[str]]:
    """Time of each peer over ours."""
    columns = (ORT_FLOAT, ORT_INT8, OV_WIDE, OV_INT8, OV_QDQ)
    rows = [["network", "artifact", *columns, "command, s"]]
    values: dict[str, list[float]] = {column: [] for column in columns}
    for network, entry in entries(name).items():
        ratios = {c: r["value"] for c, r in entry["peer_over_ours"].items()}
        cells = [f"{ratios[c]:.2f}" if c in ratios else "failed" for c in columns]
        wall = f"{entry['wall_seconds']:.0f}"
        rows.append([network, artifact(entry["artifact"]), *cells, wall])
        for column in ratios:
            values[column].append(math.log(ratios[column]))
    means = [f"{math.exp(sum(values[c]) / len(values[c])):.2f}" for c in columns]
    return [*rows, ["geometric mean", "", *means, ""]]


def trained() -> list[list[str]]:
    """Loss and time on trained networks; in brackets what the other loses, in points."""
    columns = (ORT_FLOAT, ORT_INT8, OV_WIDE, OV_INT8, EXECUTORCH)
    rows = [["network", "artifact", "loss, points", *columns]]
    for network, entry in entries("trained").items():
        losses = entry.get("drop") or entry["changed"]
        cells = [_cell(entry["peer_over_ours"], losses, column) for column in columns]
        ours = losses["ours"]
        loss = f"{ours['points']:+.2f} [{ours['low']:+.2f}, {ours['high']:+.2f}]"
        rows.append([network, artifact(entry["artifact"]), loss, *cells])
    return rows


def _cell(ratios: Mapping[str, Any], losses: Mapping[str, Any], column: str) -> str:
    if column not in ratios:
        return "-"
    return f"{ratios[column]['value']:.2f} ({losses[column]['points']:+.2f})"


def executorch() -> list[list[str]]:
    """Programs of ours beside ExecuTorch's own recipe: loss, and speed over ONNX Runtime."""
    rows = [["network", "artifact", "MACs in int8", "kB", "ours", "recipe by hand"]]
    for network, entry in entries("executorch").items():
        if "error" in entry:
            rows.append([network, entry["error"], "", "", "-", "-"])
            continue
        losses, speeds = entry.get("drop") or entry["changed"], entry["speedup_over_onnxruntime"]
        cells = [
            f"{losses[label]['points']:+.2f}, {speeds[label]['value']:.2f}x"
            if label in losses and label in speeds
            else "-"
            for label in ("ours", EXECUTORCH)
        ]
        share, size = f"{100 * entry['int8_macs']:.0f} %", f"{entry['bytes'] / 1e3:.0f}"
        rows.append([network, artifact(entry["artifact"]), share, size, *cells])
    return rows


def limited() -> list[list[str]]:
    """What is chosen when OpenVINO may not use all instructions."""
    rows = [["network", "all instructions", "", "AVX2", ""]]
    full = entries("zoo_latency")
    for network, entry in entries("zoo_latency_avx2").items():
        row = [network]
        for one in (full[network], entry):
            ratio = one["peer_over_ours"][ORT_FLOAT]
            speed = f"{ratio['value']:.2f} [{ratio['low']:.2f}, {ratio['high']:.2f}]"
            row += [artifact(one["artifact"]), speed]
        rows.append(row)
    return rows


def fragile() -> list[list[str]]:
    """Drops of one documented call of each tool, in points of top-1; in brackets the speed-up."""
    found = entries("quant_fragile")
    networks = [key.partition("/")[0] for key in found if key.endswith("/default")]
    labels = dict.fromkeys(
        label for n in networks for label in found.get(f"{n}/peers", {}).get("drops", {})
    )
    rows = [["", *networks]]
    ours = []
    for network in networks:
        entry = found[f"{network}/default"]
        speed = f"{entry['speedup']['value']:.2f}x" if entry["speedup"] else "1x"
        ours.append(f"{entry['drop']['points']:+.2f} ({artifact(entry['artifact'])}, {speed})")
    rows.append(["`compress run --eval`", *ours])
    for label in labels:
        drops = [found.get(f"{n}/peers", {}).get("drops", {}).get(label) for n in networks]
        rows.append([label, *(f"{d['points']:+.2f}" if d else "-" for d in drops)])
    return rows


def rungs(network: str) -> list[list[str]]:
    """Drops of each rung alone, in points of top-1."""
    cells = entries("quant_fragile")[f"{network}/grid"]["cells"]
    names = dict.fromkeys(rung for column in cells.values() for rung in column)
    rows = [["rung alone", *cells]]
    for rung in names:
        found = [column.get(rung, {}) for column in cells.values()]
        rows.append([rung, *(f"{c['points']:+.2f}" if "points" in c else "-" for c in found)])
    return rows


def climbs() -> list[list[str]]:
    """Drop before and after the climb at each width and granularity, and the rung it ends on."""
    found = entries("quant_fragile")
    networks = [key.partition("/")[0] for key in found if key.endswith("/ladder")]
    rows = [["", *networks]]
    for width in next(found[f"{n}/ladder"]["cells"] for n in networks):
        cells = [found[f"{n}/ladder"]["cells"][width] for n in networks]
        rows.append([width, *map(_climb, cells)])
    return rows


def _climb(cell: Mapping[str, Any]) -> str:
    if not cell["ladder"]:
        return "holds at once" if cell["met"] else "not faster than float"
    kept = [row for row in cell["ladder"] if row["kept"]]
    first, last = (row["points"]["points"] for row in (kept[0], kept[-1]))
    ends = "" if kept[-1]["holds"] else ", does not hold"
    return f"{first:+.2f} to {last:+.2f} ({kept[-1]['rung']}{ends})"


def choices() -> list[list[str]]:
    """Placement of the ladder's knapsack beside random ones of as many regions in float."""
    rows = [["network", "int8", "float regions", "by sensitivity", "20 at random"]]
    for key, entry in entries("quant_fragile").items():
        network, _, part = key.partition("/")
        for granularity, found in entry.get("granularities", {}).items():
            if part != "mixed" or network == "kws_dscnn":
                continue  # of the keyword network float is as fast, and the knapsack takes it
            every, chosen = found["rows"]["all int8"], found["rows"]["by sensitivity"]
            others = [row for label, row in found["rows"].items() if label.startswith("random")]
            names = ("points", "sqnr_db", "p50_ms")
            low, middle, high = (
                {name: float(np.quantile([row[name] for row in others], q)) for name in names}
                for q in (0, 0.5, 1)
            )
            ranges = [
                f"{middle[name]:{form}} [{low[name]:{form}}, {high[name]:{form}}]{unit}"
                for name, form, unit in zip(names, FORMS, UNITS, strict=True)
            ]
            rows.append(
                [
                    f"{network}, {granularity}",
                    _three(every),
                    f"{chosen['float_regions']} of {found['regions']}",
                    _three(chosen),
                    ", ".join(ranges),
                ]
            )
    return rows


def _three(row: Mapping[str, Any]) -> str:
    names = ("points", "sqnr_db", "p50_ms")
    cells = zip(names, FORMS, UNITS, strict=True)
    return ", ".join(f"{row[name]:{form}}{unit}" for name, form, unit in cells)


def markdown(rows: list[list[str]]) -> str:
    """A table whose first row is the header."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def predictor() -> list[list[str]]:
    """Errors of the four classes of estimates, and of proxies, on networks none of them saw."""
    rows = [["estimate", "within 5 %", "within 10 %", "MAPE", "Spearman", "set-up", "a query"]]
    for source, found in entries("predictor")["summary"].items():
        if not isinstance(found, dict) or "all" not in found:
            continue
        every = found["all"]
        shares = [f"{every[key]:.0%}" for key in ("within_5", "within_10")]
        errors = [f"{every['mape']:.1%}", f"{every['spearman']:.3f}"]
        times = [_seconds(found.get(key)) for key in ("setup_seconds", "query_seconds")]
        rows.append([source, *shares, *errors, *times])
    return rows


def _seconds(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.0f} s" if value >= 10 else f"{value:.2g} s"


def gate(name: str) -> list[list[str]]:
    """How often the gate says what, and how long it takes."""
    rows = [["planted", "tries", "fail", "pass", "cannot tell", "median s", "longest s"]]
    for key, found in entries(name).items():
        scenario, _, kind = key.partition("/")
        if kind == "summary":
            low, high = found["clopper_pearson"]
            failed = f"{found['fail']} [{low:.1%}, {high:.1%}]"
            counts = [str(found["tries"]), failed, str(found["pass"]), str(found["cannot tell"])]
            times = [f"{found[key]:.1f}" for key in ("median_seconds", "max_seconds")]
            rows.append([scenario, *counts, *times])
    return rows


def memory() -> list[list[str]]:
    """Estimated peaks over the runtimes' own figures."""
    columns = [(form, run) for form in ("float32", "int8") for run in ("onnxruntime", "openvino")]
    rows = [["network", "ideal float32", "ideal int8", *(" ".join(pair) for pair in columns)]]
    for network, entry in entries("memory").items():
        if "ideal" not in entry:
            continue
        ideal = [f"{entry['ideal'][form]['best_bytes'] / 1e6:.3g} MB" for form in FORMATS]
        ratios = [
            entry.get(form, {}).get(run, {}).get("estimate_over_runtime") for form, run in columns
        ]
        rows.append([network, *ideal, *(f"{r:.3f}" if r else "-" for r in ratios)])
    return rows


FORMATS = ("float32", "int8")


def patches() -> list[list[str]]:
    """Peaks of MobileNetV2 in patches, and the products that overlaps cost."""
    rows = [["input", "whole, int8", *(f"{n}x{n} patches" for n in (2, 3, 4))]]
    for size in (160, 224):
        table = entries("memory")[f"patches_{size}"]["table"]
        splits = {row["split"]: row for row in table["rows"]}
        cells = [
            f"{splits[n]['int8']['bytes'] / 1e3:.0f} kB, +{splits[n]['overhead']:.1%} MACs"
            for n in (2, 3, 4)
        ]
        rows.append([f"{size} px", f"{table['int8']['bytes'] / 1e3:.0f} kB", *cells])
    return rows


def main() -> None:
    """Replace every table of both pages."""
    tables = {
        "zoo_latency": against_peers("zoo_latency"),
        "zoo_throughput": against_peers("zoo_throughput"),
        "zoo_latency_xeon": against_peers("zoo_latency_xeon"),
        "trained": trained(),
        "executorch": executorch(),
        "limited": limited(),
        "fragile": fragile(),
        "rungs_mobilenet": rungs("imagenet_mobilenet_v1_025"),
        "rungs_resnet20": rungs("cifar10_resnet20"),
        "climbs": climbs(),
        "choices": choices(),
        "predictor": predictor(),
        "gate": gate("gate"),
        "gate_threads": gate("gate_threads"),
        "memory": memory(),
        "patches": patches(),
        "merges": reparam_tables.merges(entries("reparam")),
        "merged_int8": reparam_tables.int8(entries("reparam")),
        "worth": reparam_tables.worth(entries("reparam")),
        "layernorm": reparam_tables.layernorm(entries("reparam")),
        "tune_mode": reparam_tables.tune_mode(entries("tune_mode")),
        "compiled": reparam_tables.compiled(entries("tune_mode")),
        "lowrank": reparam_tables.lowrank(entries("lowrank")),
        "picked": reparam_tables.picked(entries("lowrank")),
        "activations": reparam_tables.activations(entries("activations")),
        "inverted": reparam_tables.inverted(entries("activations")["inverted"]),
    }
    texts = {page: page.read_text() for page in PAGES}
    for name, rows in tables.items():
        place = re.compile(rf"(<!-- {name} -->\n).*?(\n?<!-- end -->)", re.DOTALL)
        page = next((page for page, text in texts.items() if place.search(text)), None)
        if page is None:
            raise SystemExit(f"No page has a place for the table {name}.")
        put = f"{markdown(rows)}\n<!-- end -->"
        texts[page] = place.sub(lambda found, put=put: f"{found[1]}{put}", texts[page])
    for page, text in texts.items():
        page.write_text(text)


if __name__ == "__main__":
    main()
