"""Tables of re-parameterization for the READMEs; `benchmarks.readme` puts them there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

MODES = ("eval", "tune", "deploy")


def merges(entries: Mapping[str, Any]) -> list[list[str]]:
    """Networks with branches: found, equal, and time."""
    rows = [
        ["network", "merged", "largest error", "MACs", "parameters", "operators", "speed-up in ORT"]
    ]
    for key, entry in entries.items():
        part, _, name = key.partition(": ")
        if part != "structure":
            continue
        sizes = [f"{entry[what][1] / entry[what][0]:.2f}x" for what in ("macs", "parameters")]
        operators = " to ".join(map(str, entry["operators"]))
        found = f"{entry['merged']} of {entry['expected']}"
        error = f"{entry['max_relative_error']:.1g}"
        speed = ratio(entries[f"latency: {name}"]["ratios"]["merged"])
        rows.append([name, found, error, *sizes, operators, speed])
    return rows


def int8(entries: Mapping[str, Any]) -> list[list[str]]:
    """Points of top-1 that int8 loses before and after merging, and with shared scales."""
    found = {k.removeprefix("accuracy: "): e for k, e in entries.items() if k[:8] == "accuracy"}
    labels = dict.fromkeys(label for entry in found.values() for label in entry["int8"])
    rows = [["int8", *(f"{n}, float {100 * e['float']['value']:.1f} %" for n, e in found.items())]]
    for label in labels:
        drops = [entry["int8"].get(label, {}).get("drop") for entry in found.values()]
        rows.append([label, *(interval(drop) if drop else "-" for drop in drops)])
    return rows


def worth(entries: Mapping[str, Any]) -> list[list[str]]:
    """Pairs of branches whose merging adds work and saves tensors."""
    found = {k.removeprefix("worth: "): e["inputs"] for k, e in entries.items() if k[:5] == "worth"}
    shapes = list(next(iter(found.values())))
    runtimes = ("onnxruntime", "openvino")
    heads = [f"{shape}, {runtime}" for shape in shapes for runtime in runtimes]
    rows = [["branches", "MACs added for each element saved", *heads]]
    for name, inputs in found.items():
        added = next(iter(inputs.values()))["added_for_each_element"]
        cells = [ratio(inputs[s][r]["ratios"]["merged"]) for s in shapes for r in runtimes]
        rows.append([name, f"{added:.3g}", *cells])
    return rows


def layernorm(entries: Mapping[str, Any]) -> list[list[str]]:
    """Transformers with BatchNorm in place of LayerNorm."""
    rows = [["network", "replaced", "folded into the next layer", "speed-up in ORT"]]
    for key, entry in entries.items():
        part, _, name = key.partition(": ")
        if part == "layernorm":
            folded = str(entry["folded"].get("next", 0))
            rows.append([name, str(entry["applied"]), folded, ratio(entry["ratios"]["merged"])])
    return rows


def tune_mode(entries: Mapping[str, Any]) -> list[list[str]]:
    """What is kept for the backward pass, time of a step, and how far losses are apart."""
    rows = [
        ["network", "mode", "kept", "speed of a step", "losses beside eval, float32", "float64"]
    ]
    names = dict.fromkeys(key.partition("/")[0] for key in entries)
    for name in names:
        parts = {p: entries[f"{name}/{p}"] for p in ("bytes", "time", "curves", "curves64")}
        for mode in MODES:
            kept = f"{parts['bytes']['modes'][mode]['bytes'] / 1e6:.0f} MB"
            if mode == "eval":
                again = apart(parts["curves"], "eval again"), apart(parts["curves64"], "eval again")
                rows.append([name, "eval", kept, "1", *(f"({one})" for one in again)])
                continue
            speed = ratio(parts["time"]["ratios"][mode])
            far = [apart(parts[part], mode) for part in ("curves", "curves64")]
            rows.append(["", mode, kept, speed, *far])
    return rows


def apart(entry: Mapping[str, Any], label: str) -> str:
    """Largest difference of a curve."""
    return f"{entry['largest_difference'][label]:.1g} in {entry['steps']} steps"


def compiled(entries: Mapping[str, Any]) -> list[list[str]]:
    """Inductor's own pass beside tune mode."""
    heads = ("", "kept", "speed of a step", "folded by Inductor", "compiled in", "gradients within")
    rows = [["network", *heads]]
    for key, entry in entries.items():
        name, _, part = key.partition("/")
        if part != "compiled":
            continue
        for label, found in entry["compiled"].items():
            rows.append(
                [
                    name,
                    label,
                    f"{found['bytes'] / 1e6:.0f} MB",
                    ratio(entry["ratios"][label]),
                    str(found["folded_by_inductor"]),
                    f"{found['compile_seconds']:.0f} s",
                    f"{found['largest_relative_difference_of_gradients']:.0g}",
                ]
            )
    return rows


def lowrank(entries: Mapping[str, Any]) -> list[list[str]]:
    """ResNet-56 with factorised convolutions: work, time, and accuracy before and after tuning."""
    timed = {r: entries[f"latency/cifar10_resnet56/{r}"] for r in ("onnxruntime", "openvino")}
    sizes = timed["onnxruntime"]["sizes"]
    rows = [["factors", "MACs", *timed, "loss, points", "fine-tuned"]]
    settings = (key.removeprefix("tuned/") for key in entries if key.startswith("tuned/"))
    for setting in settings:
        ratios = [one["latency"]["ratios"].get(setting) for one in timed.values()]
        share = sizes[setting]["macs"] / sizes["original"]["macs"]
        losses = [entries.get(f"{part}/{setting}", {}) for part in ("accuracy", "tuned")]
        rows.append(
            [
                setting,
                f"{share:.2f}x",
                *(ratio(one) if one else "1" for one in ratios),
                *(interval(one["drop"]) if "drop" in one else "-" for one in losses),
            ]
        )
    return rows


def picked(entries: Mapping[str, Any]) -> list[list[str]]:
    """What the pass `low_rank` does at its defaults."""
    rows = [["network", "runtime", "what it says", "loss, points", "fine-tuned"]]
    for key, entry in entries.items():
        part, _, rest = key.partition("/")
        if part == "low_rank":
            name, _, runtime = rest.partition("/")
            says = entry["details"]["remark"].partition(": ")[2]
            losses = [entry.get(part) for part in ("alone", "tuned")]
            cells = [interval(one["drop"]) if one else "-" for one in losses]
            rows.append([name, runtime, says, *cells])
    return rows


def activations(entries: Mapping[str, Any]) -> list[list[str]]:
    """ResNet-20 with activations removed: accuracy before and after a fine-tuning, and time."""
    timed = entries["latency"]
    heads = ("layers merged", "MACs", "speed-up in ORT", "loss at once, points", "fine-tuned")
    rows = [["activations removed", *heads]]
    for key, entry in entries.items():
        part, _, count = key.partition("/")
        if part != "accuracy":
            continue
        label = f"{count} removed"
        share = timed["macs"][label] / timed["macs"]["original"]
        layers = sum(len(one["layers"]) for one in entry["segments"])
        merged = f"{layers} into {len(entry['segments'])}"
        drops = [interval(entry[when]["drop"]) for when in ("before", "after")]
        rows.append(
            [count, merged, f"{share:.2f}x", ratio(timed["latency"]["ratios"][label]), *drops]
        )
    return rows


def inverted(entry: Mapping[str, Any]) -> list[list[str]]:
    """The pass on a network of inverted bottlenecks."""
    details, macs = entry["details"], entry["macs"]
    layers = sum(len(one["layers"]) for one in details["merged"].values())
    merged = f"{layers} into {len(details['merged'])}"
    row = [str(details["applied"]), merged, f"{macs[1] / macs[0]:.2f}x", ratio(details["speedup"])]
    heads = ["activations removed", "layers merged", "MACs", "speed-up in ORT", "loss, points"]
    return [heads, [*row, interval(entry["drop"])]]


def ratio(found: Mapping[str, float]) -> str:
    """A speed-up with its interval."""
    return f"{found['value']:.2f} [{found['low']:.2f}, {found['high']:.2f}]"


def interval(drop: Mapping[str, float]) -> str:
    """Points lost with their interval."""
    return f"{drop['points']:+.2f} [{drop['low']:+.2f}, {drop['high']:+.2f}]"
