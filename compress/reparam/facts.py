"""What is said of merges: in the details of the step, in the report, and to later passes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir

from compress.graph import graph_sites
from compress.latency import Ratio
from compress.reparam.emit import name_of
from compress.reparam.offers import Offer
from compress.reparam.reading import WEIGHTED, Shapes, read
from compress.reparam.spread import is_wide
from compress.rewrites import Statistics, constant_array


def merge_facts(offer: Offer, shapes: Shapes, difference: float) -> tuple[str, dict[str, Any]]:
    """The name of the layer, and what the report says of it."""
    part, parameters = offer.part, 0
    macs: dict[ir.Node, int] = {}
    for node in part.nodes:
        constants = [constant_array(v) for v in node.inputs if v is not None and v.const_value]
        parameters += sum(c.size for c in constants if c is not None and c.dtype == np.float32)
        if node.op_type in WEIGHTED:
            macs[node] = read(node, offer.layout, shapes).geometry.macs
    after = offer.geometry.outputs * offer.geometry.inputs // offer.geometry.groups
    after = after * int(np.prod(offer.geometry.sizes)) + offer.geometry.outputs
    return name_of(part, macs), {
        "from": [node.name or "" for node in part.nodes],
        "macs": list(offer.macs),
        "parameters": [parameters, after],
        "operators": [len(part.nodes), 1],
        "max_relative_difference": difference,
    }


def is_suspicious(facts: Mapping[str, Any]) -> bool:
    """Whether int8 may lose accuracy in a merged layer that it did not lose in its branches."""
    spreads = [facts[name] for name in ("weight_spread", "activation_spread") if name in facts]
    return any(map(is_wide, spreads))


def remarks(details: Mapping[str, Any], target: str) -> list[str]:
    """Sentences for the report; `target` names where latency was measured."""
    merged, suspicious = details["merged"], details["suspicious"]
    macs, parameters = (_fewer(*details[what]) for what in ("macs", "parameters"))
    texts = [
        f"{sum(one['operators'][0] for one in merged.values())} operators of branches and chains "
        f"were merged into {len(merged)} layers: {macs} multiply-accumulates, {parameters} "
        f"parameters, outputs equal to {details['max_relative_difference']:.1g} of the largest."
    ]
    if "latency" in details:
        before, after = (details["latency"]["timings"][name] for name in ("before", "after"))
        ratio = Ratio(**details["latency"]["ratios"]["after"])
        texts[0] += (
            f" On {target} that is {ratio} in float: {before['p50_ms']:.3g} ms before, "
            f"{after['p50_ms']:.3g} ms after."
        )
    if suspicious:
        worst = max(
            max(merged[name]["weight_spread"][1], *merged[name].get("activation_spread", [0])[1:])
            for name in suspicious
        )
        texts += [
            f"In {len(suspicious)} merged layers the channels differ in scale by up to "
            f"{worst:.0f} times, which costs int8 accuracy; "
            + (
                "they share their scales with the layers behind them now."
                if "equalized" in details
                else "the pass `equalize` can repair it."
            )
        ]
    return texts


def _fewer(before: int, after: int) -> str:
    share = 100 * (1 - after / max(before, 1))
    return f"{abs(share):.3g} % {'fewer' if share >= 0 else 'more'}"


def keep_statistics(offer: Offer, name: str, statistics: Statistics) -> None:
    """What is known of the merged output: what a BatchNorm or a last layer of a chain said.

    The deviation of a sum depends on how its terms go together, which nobody recorded.
    """
    last = offer.part.nodes[-1]
    kept = statistics.get(last.name or "") if last.op_type in WEIGHTED else None
    if last.op_type == "BatchNormalization":
        gamma, beta, _, var = (
            np.asarray(constant_array(value), np.float64) for value in last.inputs[1:5]
        )
        epsilon = last.attributes.get_float("epsilon", 1e-5)
        kept = beta, np.abs(gamma) * np.sqrt(var / (var + epsilon))
    for node in offer.part.nodes:
        statistics.pop(node.name or "", None)
    if kept is not None:
        statistics[name] = kept


def totals(before: ir.Model, after: ir.Model) -> dict[str, list[int]]:
    """MACs and parameters of the whole network."""
    both = graph_sites(before), graph_sites(after)
    return {
        "macs": [sum(site.macs for site in sites) for sites in both],
        "parameters": [sum(site.parameters for site in sites) for sites in both],
        "operators": [len(sites) for sites in both],
    }
