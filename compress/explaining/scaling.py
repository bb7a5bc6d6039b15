"""What threads, batch and delegates have to do with a latency."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import groupby

import numpy as np

from compress.errors import CompressError
from compress.explaining import Finding, Row
from compress.explaining.lines import NOISE_US
from compress.explaining.pair import Opened, profile, rows_of
from compress.explaining.words import names, number, time, verb
from compress.latency import measure
from compress.machine import this_machine
from compress.model import random_inputs
from compress.target import Kernel

BATCH = 8
STEADY = 0.1
"""Largest spread of latencies from which something is concluded."""
WORTHWHILE = 1.3
"""Gain of threads, or of a batch, below or above which it is worth a sentence."""


def thread_findings(opened: Opened, *, seconds: float, seed: int) -> list[Finding]:
    """A sentence where more than one thread gains little, with the sites that gain nothing."""
    threads = getattr(opened.target, "threads", None) or this_machine().cores
    if threads == 1:
        return []
    try:
        many, one = opened.build(None), opened.build(1)
    except CompressError:  # a runtime with no such setting
        return []
    inputs = random_inputs(many.inputs, 1, np.random.default_rng(seed))
    timings = measure(
        {"one": partial(one, inputs), "many": partial(many, inputs)}, seconds=seconds, seed=seed
    ).timings
    if any(timing.cv > STEADY for timing in timings.values()):
        return []
    tables = [rows_of([profile(engine, inputs)], opened.sites) for engine in (one, many)]
    alone, together = (timings[name].p50_ms * 1e3 for name in ("one", "many"))
    return threads_finding(threads, alone, together, *tables)


def threads_finding(
    threads: int, alone_us: float, together_us: float, one: Sequence[Row], many: Sequence[Row]
) -> list[Finding]:
    """What the latencies and the kernels with one and with several threads say."""
    gain = alone_us / together_us
    if gain >= WORTHWHILE:
        return []
    times = {row["kernel"]: row["p50_us"] for row in many}
    idle = [
        row
        for row in one
        if row["macs"] and row["kernel"] in times and row["p50_us"] > NOISE_US
        and times[row["kernel"]] > 0.9 * row["p50_us"]
    ]  # fmt: skip
    sentence = (
        f"{threads} threads make it {gain:.2f}x as fast as one ({time(together_us)} against "
        f"{time(alone_us)})"
    )
    if idle:
        count = sum(1 for row in one if row["macs"])
        sentence += (
            f"; {len(idle)} of {number(count, 'layer')} {verb(len(idle), 'gain')} nothing from "
            f"them: {names([row['site'] or row['kernel'] for row in idle])}"
        )
    return [
        Finding(
            "threads",
            f"{sentence}.",
            abs(alone_us - together_us) if gain < 1 else together_us - together_us / WORTHWHILE,
            tuple(row["site"] for row in idle if row["site"]),
            "Use --threads 1, and the other cores for other requests."
            if gain < 1.1
            else "Where throughput counts, give each request one thread.",
            {"threads": threads, "one_us": alone_us, "many_us": together_us},
        )
    ]


def batch_findings(opened: Opened, *, seconds: float, seed: int) -> list[Finding]:
    """A sentence where a batch makes each sample much cheaper, with the sites that gain most."""
    engine = opened.build(None)
    if not any(spec.dynamic_batch for spec in engine.inputs):
        return []
    rng = np.random.default_rng(seed)
    single, several = (random_inputs(engine.inputs, size, rng) for size in (1, BATCH))
    try:
        timings = measure(
            {"1": partial(engine, single), "n": partial(engine, several)}, seconds=seconds
        ).timings
    except CompressError:  # a batch that the model takes by its inputs alone
        return []
    if any(timing.cv > STEADY for timing in timings.values()):
        return []
    tables = [rows_of([profile(engine, inputs)], opened.sites) for inputs in (single, several)]
    return batch_finding(BATCH, timings["1"].p50_ms * 1e3, timings["n"].p50_ms * 1e3, *tables)


def batch_finding(
    batch: int, single_us: float, several_us: float, one: Sequence[Row], many: Sequence[Row]
) -> list[Finding]:
    """What the latencies and the kernels at batch 1 and at a larger one say."""
    gain = single_us / (several_us / batch)
    if gain < WORTHWHILE:
        return []
    times = {row["kernel"]: row["p50_us"] / batch for row in many}
    saved = {
        row["site"] or row["kernel"]: row["p50_us"] - times[row["kernel"]]
        for row in one
        if row["kernel"] in times and row["p50_us"] > NOISE_US
    }
    most = sorted(saved, key=lambda name: -saved[name])[:3]
    return [
        Finding(
            "batch",
            f"At batch {batch} a sample takes {time(several_us / batch)} instead of "
            f"{time(single_us)}"
            + (f"; most is saved at {names(most, 3)}" if most else "")
            + ". At batch 1 these reread their weights, or only start, for a single sample.",
            single_us - several_us / batch,
            tuple(most),
            "Where several samples wait, run them together.",
            {"batch": batch, "single_us": single_us, "batch_us": several_us},
        )
    ]


def delegate_findings(kernels: Sequence[Kernel]) -> list[Finding]:
    """A sentence about what a runtime hands to a backend, and what cuts that into parts."""
    runs = [(backend, list(found)) for backend, found in groupby(kernels, lambda k: k.backend)]
    parts = [found for backend, found in runs if backend]
    if not parts:
        return []
    backend = parts[0][0].backend
    first = next(i for i, (name, _) in enumerate(runs) if name)
    last = max(i for i, (name, _) in enumerate(runs) if name)
    between = [one for name, found in runs[first:last] if not name for one in found]
    left = sum(1 for kernel in kernels if not kernel.backend)
    sentence = (
        f"{backend} executes {sum(map(len, parts))} of {number(len(kernels), 'operator')} in "
        f"{number(len(parts), 'partition')}"
    )
    if between:
        shown = [f"{one.op_type} ({one.site})" if one.site else one.op_type for one in between]
        sentence += f"; between them the runtime's own kernels run {names(shown)}"
    elif left:
        sentence += f"; {left} before or behind run in the runtime's own kernels"
    advice = (
        f"Replace what lies between by operators that {backend} has: every border copies "
        f"activations."
    )
    return [
        Finding(
            "delegates",
            f"{sentence}.",
            0.0,
            tuple(one.site for one in between if one.site),
            advice if between else "",
            {"partitions": len(parts), "between": len(between), "left": left},
        )
    ]
