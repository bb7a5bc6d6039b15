"""Latency by kernel: what each site takes in each variant, in order of execution."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from compress.errors import UsageError
from compress.plots.style import (
    FAINT,
    colour,
    drawing,
    microseconds,
    new_figure,
    number,
    plain,
    short_names,
    shortened,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

MOST = 30
"""Sites with bars of their own; the rest is summed."""
_INSERTED = 5
"""Of them at least this many go to what runtimes insert."""
_IDLE = ("move", "convert")
_ORDER = ("float32", "bfloat16", "float16", "float8", "int8", "convert", "move", "inserted")
_WORDS = {
    "convert": "conversion of numbers",
    "move": "move (layout or shape)",
    "inserted": "of no site",
}


@dataclass
class Group:
    """Bars of one site, or of what belongs to none.

    Attributes:
        label: of the group.
        times: microseconds by variant, then by precision or kind of kernel.
    """

    label: str
    times: dict[str, dict[str, float]] = field(default_factory=dict)

    def add(self, variant: str, kind: str, us: float) -> None:
        """Add the time of a kernel."""
        spent = self.times.setdefault(variant, {})
        spent[kind] = spent.get(kind, 0.0) + us

    def total(self, variant: str) -> float:
        """Microseconds of a variant."""
        return sum(self.times.get(variant, {}).values())

    @property
    def largest(self) -> float:
        """Of all variants, the longest time."""
        return max((self.total(variant) for variant in self.times), default=0.0)


def kernel_groups(
    tables: Mapping[str, Mapping[str, Any]], most: int = MOST
) -> tuple[list[Group], Group]:
    """Sites in order of execution, what the runtimes inserted, and the sum of the small ones.

    Args:
        tables: by variant, the `rows` of `compress.kernel_rows.kernel_rows`.
        most: groups besides the sum.

    Returns:
        The largest groups, and the sum of the others; its label is empty where there are none.

    Raises:
        UsageError: a time is no finite number from 0 on.
    """
    own = _own_sites(tables)
    order: list[str] = []
    groups: dict[str, Group] = {}
    for variant, table in tables.items():
        previous = ""
        for row in table["rows"]:
            us = number(row["p50_us"], f"p50_us of kernel {row['kernel']}")
            site = row["site"] if row["site"] in own else ""
            key = site or f"\0{row['op_type']}"
            if key not in groups:
                groups[key] = Group(site or f"({row['op_type']})")
                # A site that only a later variant has comes after the one before it there.
                behind = order.index(previous) + 1 if site and previous else len(order)
                order.insert(behind, key)
            inserted = not site and row["precision"] not in _IDLE
            groups[key].add(variant, "inserted" if inserted else row["precision"], us)
            previous = key if site else previous
    sites = [key for key in order if not key.startswith("\0")]
    found = [groups[key] for key in (*sites, *(k for k in order if k.startswith("\0")))]
    most += len(found) == most + 1  # a sum of one says less than its name
    # What runtimes insert is few and often small, and to be seen.
    first = range(len(sites), min(len(sites) + _INSERTED, len(found)))
    by_size = sorted(
        range(len(found)), key=lambda index: (index not in first, -found[index].largest)
    )
    kept = set(by_size[:most])
    rest = Group("")
    for index in by_size[most:]:
        for variant, spent in found[index].times.items():
            for kind, us in spent.items():
                rest.add(variant, kind, us)
    rest.label = f"{len(found) - most} more, together" if rest.times else ""
    return [group for index, group in enumerate(found) if index in kept], rest


def kernels_figure(
    tables: Mapping[str, Mapping[str, Any]], name: str = "", untimed: Sequence[str] = ()
) -> Figure:
    """Bars of each site's time, one for each variant, coloured by precision.

    Args:
        tables: by variant, `runtime` and the `rows` of `compress.kernel_rows.kernel_rows`.
        name: of the model.
        untimed: variants that are missing because their runtime tells no times.

    Raises:
        UsageError: there are no kernels, or a time is no finite number from 0 on.
    """
    groups, rest = kernel_groups(tables)
    if not groups:
        raise UsageError("There are no kernels to plot; profile the model again.")
    totals = {v: sum(group.total(v) for group in (*groups, rest)) for v in tables}
    thick = 0.125 if len(totals) > 1 else 0.14
    lines = len(groups) + bool(rest.label)
    with drawing():
        figure = new_figure(
            0.55 + lines * (thick * len(totals) + 0.07),
            _title(name, totals),
            _remark(list(totals), groups, untimed),
            legend=_legend(groups),
        )
        axes = figure.add_subplot()
        _bars(axes, groups, list(totals))
        names = short_names(group.label for group in groups)
        labels = [names[group.label] for group in groups]
        if rest.label:
            labels.append(rest.label)
            sums = " / ".join(microseconds(rest.total(v)) for v in totals)
            axes.annotate(
                sums, (0, len(groups)), xytext=(3, 0), textcoords="offset points", va="center",
                fontsize=7.5,
            )  # fmt: skip
        axes.set_yticks(range(len(labels)), labels, fontsize=7.5)
        axes.tick_params(axis="y", length=0)
        axes.set_ylim(lines - 0.4, -0.6)
        axes.set_xlim(0, (max(group.largest for group in groups) or 1.0) * 1.08)
        axes.set_xlabel("time of one run, µs (median, under the runtime's profiler)")
        axes.grid(axis="x")
        axes.spines["left"].set_visible(False)
    return figure


def _bars(axes: Axes, groups: Sequence[Group], variants: Sequence[str]) -> None:
    """The stacked bars with their sums."""
    thickness = 0.86 / len(variants)
    for at, group in enumerate(groups):
        for which, variant in enumerate(variants):
            y = at + (which - (len(variants) - 1) / 2) * thickness
            left = 0.0
            for kind in _sorted(group.times.get(variant, {})):
                us = group.times[variant][kind]
                axes.barh(
                    y, us, thickness * 0.9, left=left, color=colour(kind),
                    hatch=_hatch(kind), edgecolor="white", linewidth=0.3,
                )  # fmt: skip
                left += us
            if variant in group.times:
                axes.annotate(
                    plain(left), (left, y), xytext=(3, 0), textcoords="offset points",
                    va="center", fontsize=6, color=FAINT,
                )  # fmt: skip


def _legend(groups: Sequence[Group]) -> list[Patch]:
    from matplotlib.patches import Patch

    kinds = {kind: 0 for group in groups for spent in group.times.values() for kind in spent}
    return [
        Patch(
            facecolor=colour(kind), edgecolor="white", hatch=_hatch(kind),
            label=_WORDS.get(kind, kind),
        )
        for kind in _sorted(kinds)
    ]  # fmt: skip


def _hatch(kind: str) -> str | None:
    return "////" if kind == "convert" else None


def _title(name: str, totals: Mapping[str, float]) -> str:
    parts = [f"{shortened(v, 30)} {microseconds(us)}" for v, us in totals.items()]
    first, last = next(iter(totals.values())), list(totals.values())[-1]
    ratio = f" ({plain(first / last)}x)" if len(totals) == 2 and first and last else ""
    prefix = f"{shortened(name, 40)}: t" if name else "T"
    return f"{prefix}ime by site, in all {' and '.join(parts)}{ratio}"


def _remark(variants: Sequence[str], groups: Sequence[Group], untimed: Sequence[str]) -> str:
    names = " and ".join(shortened(variant, 30) for variant in untimed)
    remark = f"The runtime of {names} tells no times of its kernels. " if untimed else ""
    if len(variants) > 1:
        places = " / ".join(shortened(variant, 30) for variant in variants)
        remark += f"Bars of a site from top to bottom: {places}. "
        if any(set(group.times) != set(variants) for group in groups):
            remark += "No bar: the runtime computes it inside another kernel, or has no such one. "
    if any(group.label.startswith("(") for group in groups):
        remark += (
            "In brackets: operators of no site, inserted by the runtime or nested in a branch. "
        )
    return remark + "A profiler adds some time to every kernel; latency is measured without it."


def _own_sites(tables: Mapping[str, Mapping[str, Any]]) -> set[str]:
    """Sites of the model: those of the first variant, and those that compute in another."""
    found = set()
    for index, table in enumerate(tables.values()):
        for row in table["rows"]:
            if row["site"] and (index == 0 or row["precision"] not in _IDLE):
                found.add(row["site"])
    return found


def _sorted(kinds: Mapping[str, Any]) -> list[str]:
    """Precisions first, then what is not computing."""
    known = {kind: index for index, kind in enumerate(_ORDER)}
    return sorted(kinds, key=lambda kind: known.get(kind, len(_ORDER)))
