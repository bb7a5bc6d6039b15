"""How long layers take on the target, as they are and as chains of low-rank factors.

Layers are timed alone, with the activation that is computed inside them, against the original in
alternating blocks. Equal layers are timed once, and what was timed is kept in a file.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from compress.errors import EngineError
from compress.latency import Comparison, measure
from compress.machine import fingerprint, this_machine, versions
from compress.reparam.lowrank_factors import Method, Ranks, forms, full_ranks, random_links
from compress.reparam.lowrank_graph import Layer, alone
from compress.target import Target
from compress.variants import settings

CANDIDATE_SECONDS = 0.25
"""For each candidate, and the original among them."""
SHARES = (0.0625, 0.125, 0.25, 0.375, 0.5, 0.625)
"""Of the full rank; rounded to multiples."""
MULTIPLE = 8
"""Runtimes on CPUs compute channels in vectors of this size (AVX2, float32) or of twice that."""
MARGIN = 0.02
"""A chain must be faster by so much, with confidence, to be a candidate."""
PACKAGES = ("onnxruntime", "openvino", "onnxruntime-gpu")


@dataclass(frozen=True)
class Option:
    """One way to factorise a layer."""

    method: Method
    ranks: Ranks

    def __str__(self) -> str:
        return f"{self.method} {'/'.join(map(str, self.ranks))}"


@dataclass(frozen=True)
class Timed:
    """What one option takes.

    Attributes:
        option: which.
        before_us: of the layer, median.
        after_us: of the chain: `before_us` divided by the ratio within the rounds.
        faster: the interval of the ratio is above 1 + `MARGIN`.
    """

    option: Option
    before_us: float
    after_us: float
    faster: bool

    def to_dict(self) -> dict[str, Any]:
        """Plain values for the file."""
        return asdict(self)

    @classmethod
    def from_dict(cls, row: Mapping[str, Any]) -> Timed:
        """What `to_dict` wrote."""
        option = Option(row["option"]["method"], tuple(map(int, row["option"]["ranks"])))
        times = float(row["before_us"]), float(row["after_us"])
        return cls(option, *times, bool(row["faster"]))


@dataclass
class Timer:
    """Times layers on a target within a time limit.

    Attributes:
        target: what is timed on.
        methods: to try.
        deadline: of `time.monotonic`; a layer that was begun is finished.
        folder: for what was timed before, or None.
        seed: of the order of blocks.
        advance: is told the seconds that passed.
    """

    target: Target
    methods: tuple[Method, ...]
    deadline: float
    folder: Path | None = None
    seed: int = 0
    advance: Callable[[float], None] = lambda _: None

    def __post_init__(self) -> None:
        self._known: dict[str, list[Timed]] = {}

    def time(self, layer: Layer) -> list[Timed] | None:
        """Every option that was tried; None where there was no time left.

        The smallest ranks come first. A method that is not faster with these is given up, for
        larger ones take longer. Between the largest rank that is faster and the next, the middle
        is tried as well: times rise in steps, and not every step ends at a multiple of 8.
        """
        key = self._key(layer)
        if key not in self._known:
            found = self._recall(key)
            if found is None:
                if time.monotonic() > self.deadline:
                    return None
                start = time.monotonic()
                found = self._measure(layer)
                self._remember(key, found)
                self.advance(time.monotonic() - start)
            self._known[key] = found
        return self._known[key]

    def _measure(self, layer: Layer) -> list[Timed]:
        ladders = {method: options(layer, method, self._multiple) for method in self.methods}
        ladders = {method: ladder for method, ladder in ladders.items() if ladder}
        found = self._compare(layer, [ladder[0] for ladder in ladders.values()])
        promising = {one.option.method for one in found if one.faster}
        rest = [o for method, ladder in ladders.items() if method in promising for o in ladder[1:]]
        found += self._compare(layer, rest)
        return found + self._compare(layer, _between(found))

    def _compare(self, layer: Layer, candidates: Sequence[Option]) -> list[Timed]:
        if not candidates:
            return []
        calls = {"": self._call(layer, None)}
        for option in candidates:
            try:
                calls[str(option)] = self._call(layer, option)
            except EngineError:  # the runtime refuses this form: it is no candidate
                continue
        if len(calls) == 1:
            return []
        seconds = CANDIDATE_SECONDS * len(calls)
        comparison = measure(calls, seconds=seconds, min_blocks=6, margin=MARGIN, seed=self.seed)
        return [_timed(one, comparison) for one in candidates if str(one) in calls]

    def _call(self, layer: Layer, option: Option | None) -> Callable[[], object]:
        rng = np.random.default_rng(self.seed)
        links = (
            random_links(layer.weight.shape, layer.groups, option.method, option.ranks, rng)
            if option is not None
            else ()
        )
        model = alone(layer, links)
        engine, inputs = self.target.build(model), model.example()
        return lambda: engine(inputs)

    @property
    def _multiple(self) -> int:
        return max(MULTIPLE, self.target.capabilities.channel_multiple)

    def _key(self, layer: Layer) -> str:
        parts = [
            layer.signature,
            self.methods,
            self.target.name,
            settings(self.target),
            fingerprint(this_machine()),
            versions(*PACKAGES),
        ]
        return hashlib.sha256(json.dumps(parts, default=str).encode()).hexdigest()[:32]

    def _recall(self, key: str) -> list[Timed] | None:
        if self.folder is None:
            return None
        try:
            rows = json.loads((self.folder / f"lowrank-{key}.json").read_text())
            return [Timed.from_dict(row) for row in rows]
        except (OSError, ValueError, KeyError, TypeError):
            return None  # absent or damaged: time again

    def _remember(self, key: str, found: Sequence[Timed]) -> None:
        """Keep it; a cache that cannot be written costs time later, not this run."""
        if self.folder is None:
            return
        file = self.folder / f"lowrank-{key}.json"
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            temporary = file.with_suffix(f".{time.monotonic_ns()}.tmp")
            temporary.write_text(json.dumps([one.to_dict() for one in found]))
            temporary.replace(file)
        except OSError:
            return


def options(layer: Layer, method: Method, multiple: int = MULTIPLE) -> list[Option]:
    """The ranks to try, ascending: multiples that save multiply-accumulates; [] where none does.

    Full rank where a 1 x 1 window or a vector leaves a method nothing to do is no option either.
    """
    shape, groups = layer.weight.shape, layer.groups
    kernel = shape[2:]
    needs = {"channel_svd": 0, "spatial_svd": 2, "tucker": 1, "cp": 1}[method]
    if sum(size > 1 for size in kernel) < needs or (method == "spatial_svd" and len(kernel) != 2):
        return []
    full = full_ranks(shape, groups, method)
    if method == "cp":  # at its exact rank it is far larger than the layer
        full = (max(shape[0] // groups, shape[1]),)
    found: dict[Ranks, Option] = {}
    for share in SHARES:
        ranks = tuple(_rounded(share * most, most, multiple) for most in full)
        if layer.chain_macs(forms(shape, groups, method, ranks)) < layer.macs:
            found[ranks] = Option(method, ranks)
    return list(found.values())


def _rounded(rank: float, most: int, multiple: int) -> int:
    """Up to a multiple; where the layer has few channels, to what there is."""
    if most < 2 * multiple:
        return max(1, min(most, math.ceil(rank)))
    return min(most, multiple * math.ceil(rank / multiple))


def _between(found: Sequence[Timed]) -> list[Option]:
    """For each method, the ranks in the middle between the last that is faster and the next."""
    middle = []
    for method in dict.fromkeys(one.option.method for one in found):
        rows = sorted((o for o in found if o.option.method == method), key=lambda o: o.option.ranks)
        fast = [index for index, one in enumerate(rows) if one.faster]
        if not fast or fast[-1] + 1 == len(rows):
            continue
        low, high = rows[fast[-1]].option.ranks, rows[fast[-1] + 1].option.ranks
        ranks = tuple((a + b) // 2 for a, b in zip(low, high, strict=True))
        if ranks != low:
            middle.append(Option(method, ranks))
    return middle


def _timed(option: Option, comparison: Comparison) -> Timed:
    before = comparison.timings[comparison.baseline].p50_ms * 1e3
    ratio = comparison.ratios[str(option)]
    return Timed(option, before, before / ratio.value, ratio.verdict == "faster")
