"""Widths beside a step: a layer at its number of channels and at the multiples around it, timed."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import takewhile

from compress.errors import CompressError
from compress.estimate.graphs import Network, quantized
from compress.explaining import Finding, Line
from compress.explaining.lines import main_row
from compress.explaining.words import time
from compress.graph import Site
from compress.latency import measure
from compress.progress import Progress, silent
from compress.target import FLOATS, Target

MULTIPLE = 8
"""Floats of an AVX2 register; blocks of channels are made of 8 or 16."""
LEAST_SHARE = 0.03
"""Of the latency; shorter layers are not worth a measurement."""
MOST = 3
PENALTY = 1.05
"""Time for each multiply-accumulate, against the next multiple, from which a width is slow."""


@dataclass(frozen=True)
class Width:
    """One layer at three widths.

    Attributes:
        site: its name.
        axis: "output" or "input" channels.
        times_us: by number of channels: the one below, its own, the one above.
        macs: the same.
        own: its number of channels.
    """

    site: str
    axis: str
    times_us: Mapping[int, float]
    macs: Mapping[int, int]
    own: int

    @property
    def above(self) -> int:
        """The next multiple."""
        return max(self.times_us)

    @property
    def penalty(self) -> float:
        """Time for each multiply-accumulate, over that of the next multiple."""
        rate = {width: us / self.macs[width] for width, us in self.times_us.items()}
        return rate[self.own] / rate[self.above]


def odd_sites(
    lines: Sequence[Line], sites: Sequence[Site], latency_us: float
) -> list[tuple[Line, Site, str]]:
    """Square convolutions beside a multiple of 8 that matter, with the axis; longest first."""
    by_name = {site.name: site for site in sites}
    found = []
    for line in sorted(lines, key=lambda line: -line.after_us):
        site = by_name.get(line.site)
        if site is None or not line.after or line.after_us < LEAST_SHARE * latency_us:
            continue
        weight = site.weight
        square = weight is not None and len(weight) == 4 and weight[2] == weight[3]
        if weight is None or site.op_type != "Conv" or not square or not site.inputs:
            continue
        if len(site.inputs[0]) != 4 or len(set(site.strides)) != 1 or -1 in site.inputs[0]:
            continue
        if weight[0] % MULTIPLE:
            found.append((line, site, "output"))
        elif site.groups == 1 and weight[1] > MULTIPLE and weight[1] % MULTIPLE:
            found.append((line, site, "input"))
    return found[:MOST]


def probe(line: Line, site: Site, axis: str, target: Target, seconds: float) -> Width:
    """Time one layer at its width and at the multiples of 8 around it, in turns.

    Raises:
        CompressError: the runtime refuses the layer.
    """
    weight = site.weight or ()
    own = weight[0] if axis == "output" else weight[1]
    below = own // MULTIPLE * MULTIPLE
    widths = [width for width in (below, own, below + MULTIPLE) if width]
    precision = main_row(line.after)["precision"]
    calls, macs = {}, {}
    for width in widths:
        groups = width if site.groups == weight[0] and site.groups > 1 else site.groups
        if groups not in (1, width):
            raise CompressError(f"{site.name} has {groups} groups, which no other width keeps.")
        depth = width if groups > 1 or axis == "input" else weight[1]
        _, _, height, breadth = site.inputs[0]
        network = Network((1, depth, height, breadth), target.capabilities.opset, site.name)
        out = width if axis == "output" else weight[0]
        made = network.conv(network.start, out, weight[2], site.strides[0], groups)
        model = network.model(network.relu(made))
        macs[width] = max(1, out * depth // groups)
        engine = target.build(model if precision in FLOATS else quantized(model, target))
        calls[str(width)] = partial(engine, model.example())
    timings = measure(calls, baseline=str(own), seconds=seconds).timings
    times = {width: timings[str(width)].p50_ms * 1e3 for width in widths}
    return Width(site.name, axis, times, macs, own)


def width_findings(
    lines: Sequence[Line],
    sites: Sequence[Site],
    target: Target,
    latency_us: float,
    *,
    seconds: float = 1.0,
    progress: Progress = silent,
) -> list[Finding]:
    """A sentence for each layer whose width was measured to fall on a slow step."""
    candidates = odd_sites(lines, sites, latency_us)
    if not candidates:
        return []
    found = []
    with progress("Measuring widths", total=len(candidates)) as advance:
        for line, site, axis in candidates:
            try:
                width = probe(line, site, axis, target, seconds)
            except CompressError:  # a form that the small network cannot have
                continue
            finally:
                advance(1, site.name)
            found += [told] if (told := width_finding(width, line)) is not None else []
    return found


def width_finding(width: Width, line: Line) -> Finding | None:
    """What three measured times say; None where the width is as good as the multiple above."""
    if width.penalty < PENALTY:
        return None
    own, above = width.times_us[width.own], width.times_us[width.above]
    lower = next(iter(takewhile(lambda w: w < width.own, sorted(width.times_us))), None)
    lost = max(0.0, 1 - 1 / width.penalty)
    sentence = (
        f"{width.site} has {width.own} {width.axis} channels, and {width.own} cost "
        f"{'as much as' if own >= 0.97 * above else 'nearly as much as'} {width.above} "
        f"({time(own)} against {time(above)} for this layer alone)"
    )
    advice = f"Give it {width.above} channels"
    if lower is not None:
        sentence += f"; {lower} take {time(width.times_us[lower])}"
        advice += f", or prune it to {lower}"
    return Finding(
        "width",
        f"{sentence}.",
        lost * line.after_us,
        (width.site,),
        f"{advice}.",
        dataclasses.asdict(width),
    )
