"""The search behind `low_rank`: time layers, judge what is faster, choose, and confirm."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np

from compress.assignment import assign_within
from compress.latency import Comparison
from compress.model import Model
from compress.passes import Context
from compress.reparam.lowrank_decompose import decompose
from compress.reparam.lowrank_errors import OutputErrors, WeightErrors
from compress.reparam.lowrank_factors import Link, Method, dense
from compress.reparam.lowrank_graph import Layer, find_layers, replace_layer
from compress.reparam.lowrank_timing import Timed, Timer
from compress.reparam.measuring import compare
from compress.rewrites import remove_unused
from compress.sessions import measure_sessions

NAME = "low_rank"
KEPT = "as it is"
"""The choice that leaves a layer alone."""
SMALLEST_SHARE = 0.002
"""Of all multiply-accumulates; a layer below it cannot change the time of the network."""
ATTEMPTS = 5
"""To keep the limit: errors of single layers add up only while they are small."""
CONFIRM_SHARE = 1 / 15
"""Of `seconds`, and beyond them: to time the whole network at the end."""
ERROR_SHARE = 0.5
"""Of `seconds`: for the errors of those candidates that are faster."""
Errors: TypeAlias = WeightErrors | OutputErrors


@dataclass
class Search:
    """One application of the pass, with its options.

    Attributes:
        methods: see `LowRank`, as the next three.
        max_error: of the network.
        speedup: in place of `max_error`.
        seconds: for all of it but the last measurement.
        model: to factorise; it is not changed.
        context: of the pass.
        layers: that are large enough to matter, the largest first.
        timed: by layer, what its options take; without those for which no time was left.
        faster: by layer, the options that are faster.
        losses: by layer and option, the error of the network with that chain alone.
    """

    methods: tuple[Method, ...]
    max_error: float
    speedup: float | None
    seconds: float
    model: Model
    context: Context
    timed: dict[str, list[Timed]] = field(default_factory=dict)
    faster: dict[str, list[Timed]] = field(default_factory=dict)
    losses: dict[str, dict[str, float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.start = time.monotonic()
        found = find_layers(self.model)
        total = sum(layer.macs for layer in found)
        large = [layer for layer in found if layer.macs >= SMALLEST_SHARE * total]
        self.found = found
        self.layers = {layer.name: layer for layer in sorted(large, key=lambda x: -x.macs)}
        self.chains: dict[tuple[str, str], list[Link]] = {}
        self.errors: Errors = WeightErrors(found)

    def time_layers(self, advance: Callable[..., None]) -> None:
        """Time the options of each layer, until the time is over."""
        share = 1 - ERROR_SHARE if self.context.calibration is not None else 1.0
        timer = Timer(
            self.context.target,
            self.methods,
            self.start + share * self.seconds,
            self.context.cache,
            self.context.seed,
            advance,
        )
        for name, layer in self.layers.items():
            found = timer.time(layer)
            if found is not None:
                self.timed[name] = found
                fast = [one for one in found if one.faster]
                if fast:
                    self.faster[name] = fast

    def judge(self, advance: Callable[..., None]) -> None:
        """Find what each faster option loses."""
        if not self.faster:
            return
        start = time.monotonic()
        layers = [self.layers[name] for name in self.faster]
        data, bases = self.context.calibration, {}
        if data is not None:
            self.errors = probe = OutputErrors(self.model, layers, data)
            probe.limit(sum(map(len, self.faster.values())), ERROR_SHARE * self.seconds)
            if "channel_svd" in self.methods:
                bases = probe.bases(layers)
        for layer in layers:
            self._decompose(layer, bases.get(layer.name))
            self.losses[layer.name] = {
                str(one.option): self._error({layer.name: str(one.option)})
                for one in self.faster[layer.name]
            }
        advance(time.monotonic() - start)

    def _decompose(self, layer: Layer, bases: Sequence[np.ndarray] | None) -> None:
        """Chains of every faster option of a layer."""
        wanted = [one.option for one in self.faster[layer.name]]
        for method in dict.fromkeys(option.method for option in wanted):
            own = bases if method == "channel_svd" else None
            make = decompose(layer.weight, layer.groups, method, own)
            for option in wanted:
                if option.method == method:
                    self.chains[layer.name, str(option)] = make(option.ranks)

    def _error(self, chosen: Mapping[str, str]) -> float:
        """Of the network with these options; the dense weights are made anew, as they are large."""
        return self.errors({name: dense(self.chains[name, one]) for name, one in chosen.items()})

    def choose(self) -> tuple[dict[str, str], float]:
        """The option of each layer that is changed, and the error of all of them together."""
        if not self.losses:
            return {}, 0.0
        limit = self.max_error
        for _ in range(ATTEMPTS):
            chosen = self._solve(limit)
            error = self._error(chosen)
            if self.speedup is not None or error <= self.max_error or not chosen:
                return chosen, error
            limit *= 0.9 * self.max_error / error
        return {}, 0.0

    def _solve(self, limit: float) -> dict[str, str]:
        names = list(self.losses)
        times = [
            {
                KEPT: self.faster[n][0].before_us,
                **{str(o.option): o.after_us for o in self.faster[n]},
            }
            for n in names
        ]
        losses = [{KEPT: 0.0, **self.losses[n]} for n in names]
        edges: list[tuple[()]] = [()] * len(names)
        if self.speedup is None:
            picked = assign_within(times, edges, losses, limit)
        else:
            picked = assign_within(losses, edges, times, self._time_limit(times))
        return {name: one for name, one in zip(names, picked, strict=True) if one != KEPT}

    def _time_limit(self, times: Sequence[Mapping[str, float]]) -> float:
        """For the layers that can change; the least they can take where that is more."""
        assert self.speedup is not None
        whole = self._whole_ms() * 1e3
        now = sum(one[KEPT] for one in times)
        least = sum(min(one.values()) for one in times)
        return max(now - whole * (1 - 1 / self.speedup), least * (1 + 1e-9))

    def confirmed(self, chosen: Mapping[str, str], error: float) -> tuple[Model, dict[str, Any]]:
        """The network with these options if it is faster as a whole, else as it was."""
        measured: Comparison | None = None
        made = self.model
        if chosen:
            graph_model = self.model.graph_model.clone()
            for name, option in chosen.items():
                replace_layer(graph_model.graph, self.layers[name], self.chains[name, option])
            remove_unused(graph_model)
            made = dataclasses.replace(self.model, program=graph_model)
            seconds = CONFIRM_SHARE * self.seconds
            seed = self.context.seed
            measured = compare(self.context.target, self.model, made, seconds, seed)
            if measured.ratios["after"].verdict != "faster":
                made = self.model
        applied = chosen if made is not self.model else {}
        details = {
            "applied": len(applied),
            "remark": self._remark(chosen, applied, error, measured),
            "error": error if applied else 0.0,
            "error_of": self.errors.measured_by,
            "speedup": dataclasses.asdict(measured.ratios["after"]) if measured else None,
            "layers": self._rows(chosen, applied),
            "seconds": round(time.monotonic() - self.start, 3),
        }
        return made, details

    def _whole_ms(self) -> float:
        """Latency of the network as it is."""
        inputs = self.model.example()

        def calls() -> dict[str, Any]:
            return {"before": functools.partial(self.context.target.build(self.model), inputs)}

        seconds = CONFIRM_SHARE / 2 * self.seconds
        found = measure_sessions(calls, sessions=1, seconds=seconds, seed=self.context.seed)
        return found.timings["before"].p50_ms

    def _rows(self, chosen: Mapping[str, str], applied: Mapping[str, str]) -> list[dict[str, Any]]:
        """For each layer that was timed its best option: the chosen, or the fastest."""
        rows = []
        for name, found in self.timed.items():
            if not found:
                continue
            picked = next((one for one in found if str(one.option) == chosen.get(name)), None)
            best = picked or min(found, key=lambda one: one.after_us)
            rows.append(
                {
                    "name": name,
                    "macs": self.layers[name].macs,
                    "option": str(best.option),
                    "before_us": best.before_us,
                    "after_us": best.after_us,
                    "error": self.losses.get(name, {}).get(str(best.option)),
                    "options_tried": len(found),
                    "applied": name in applied,
                }
            )
        return rows

    def _remark(
        self,
        chosen: Mapping[str, str],
        applied: Mapping[str, str],
        error: float,
        measured: Comparison | None,
    ) -> str:
        """One sentence or two for the report."""
        where = f"{NAME} on {self.context.target.name}"
        tried = sum(bool(found) for found in self.timed.values())
        late = len(self.layers) - len(self.timed)
        rest = f" No time was left for {late} layers." if late else ""
        if applied and measured is not None:
            missed = self.speedup is not None and (measured.ratios["after"].value < self.speedup)
            short = f", short of {self.speedup:g}x" if missed else ""
            return (
                f"{where}: {len(applied)} of {tried} layers tried are factorised; the network is "
                f"{measured.ratios['after']} before quantization{short}, and the error of its "
                f"{self.errors.measured_by} is {error:.3g}.{rest}"
            )
        if measured is not None:
            return (
                f"{where}: nothing is applied. {len(chosen)} layers are faster alone, and the "
                f"network with them is not ({measured.ratios['after']}).{rest}"
            )
        if self.faster:
            return (
                f"{where}: nothing is applied. {len(self.faster)} of {tried} layers tried would "
                f"be faster, and each with an error of more than {self.max_error:g} "
                f"({self.errors.measured_by}).{rest}"
            )
        best = self._closest()
        return f"{where}: nothing is applied. None of {tried} layers tried gets faster{best}.{rest}"

    def _closest(self) -> str:
        rows = [one for one in self._rows({}, {}) if one["before_us"]]
        if not rows:
            return ""
        row = min(rows, key=lambda one: one["after_us"] / one["before_us"])
        return (
            f"; the closest is {row['name']} with {row['option']}, {row['before_us']:.1f} us "
            f"before and {row['after_us']:.1f} us after"
        )
