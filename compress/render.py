"""Tables of the command line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from compress.graph import Site
    from compress.latency import Comparison
    from compress.memory.inspection import ModelMemory
    from compress.memory.splitting import PatchTable
    from compress.model import Model
    from compress.profiling import ProfileReport
    from compress.regression.record import Record
    from compress.regression.result import CheckResult
    from compress.remote import OnDevice
    from compress.side_by_side import SideBySide

PIPED_WIDTH = 140
"""Columns where nobody knows the width, so that names in logs are not folded."""


def console() -> Console:
    """The console of stdout."""
    probe = Console()
    return probe if probe.is_terminal else Console(width=PIPED_WIDTH)


def sites_dict(
    model: Model,
    found: Sequence[Site],
    memory: Mapping[str, ModelMemory],
    table: PatchTable | None = None,
) -> dict[str, Any]:
    """Sites, totals, peaks and patches as plain values."""
    patched = {"patches": table.to_dict()} if table is not None else {}
    return {
        "name": model.name,
        "source": model.source,
        "inputs": [str(spec) for spec in model.inputs],
        "totals": _totals(found),
        "memory": {name: one.to_dict() for name, one in memory.items()},
        **patched,
        "sites": [site.to_dict() for site in found],
    }


def sites(model: Model, found: Sequence[Site], memory: Mapping[str, ModelMemory]) -> None:
    """The table of `compress inspect`."""
    totals = _totals(found)
    table = _table("site", "operator", "output", right=("MACs", "share", "parameters", "live"))
    for site in found:
        table.add_row(
            escape(site.name),
            site.op_type,
            "x".join(map(str, site.output)) or "scalar",
            count(site.macs) if site.macs else "",
            f"{site.macs / totals['macs']:.1%}" if site.macs else "",
            count(site.parameters) if site.parameters else "",
            size(site.live_bytes),
        )
    out = console()
    out.print(table)
    out.print(
        f"{model.name}: {totals['sites']} sites, {count(totals['macs'])} MACs, "
        f"{count(totals['parameters'])} parameters",
        highlight=False,
        markup=False,
    )
    for reading, one in memory.items():
        out.print(_peak(reading, one), highlight=False, markup=False)


def _peak(reading: str, memory: ModelMemory) -> str:
    """One sentence about the most memory that activations take."""
    at = memory.peak
    best = ""
    if memory.best_bytes < at.bytes:
        exact = "best" if memory.best_is_exact else "best that was found"
        best = f"; {size(memory.best_bytes)} in the {exact} order of branches"
    estimated = " (estimated)" if reading != "float32" else ""
    return (
        f"Activations in {reading}{estimated}: at most {size(at.bytes)} alive at once, at "
        f"{at.step} ({at.op_type}); {size(memory.arena_bytes)} as one block of memory{best}"
    )


def patches(found: PatchTable) -> None:
    """The table of `compress inspect --patches`."""
    right = ("float32", "int8", "more MACs", "of the stage")
    table = _table("patches", "stage ends with", right=right, last="peak at")
    table.add_row("whole", "", size(found.float32.bytes), size(found.int8.bytes), "", "", "")
    for row in found.rows:
        table.add_row(
            f"{row.split} along each axis",
            escape(row.end),
            size(row.float32.bytes),
            size(row.int8.bytes),
            f"{row.overhead:.1%}",
            f"{row.stage_overhead:.1%}",
            escape(row.int8.step),
        )
    out = console()
    out.print(table)
    out.print(
        f"Analysis for a runtime with patch-based execution, which no target here is. The image "
        f"and the stage's output stay in memory. No longer stage: {found.limit}.",
        highlight=False,
        markup=False,
    )


def latency(comparison: Comparison) -> None:
    """The table of `compress bench`."""
    table = _table("model", right=("p50 ms", "95 % interval", "p90 ms", "speedup"), last="verdict")
    for name, timing in comparison.timings.items():
        ratio = comparison.ratios.get(name)
        table.add_row(
            escape(name),
            f"{timing.p50_ms:.3f}",
            f"{timing.low_ms:.3f} to {timing.high_ms:.3f}",
            f"{timing.p90_ms:.3f}",
            f"{ratio.value:.2f}x ({ratio.low:.2f} to {ratio.high:.2f})" if ratio else "",
            ratio.verdict if ratio else "baseline",
        )
    out = console()
    out.print(table)
    for note in comparison.notes:
        out.print(note, highlight=False, markup=False)


def on_devices(results: Sequence[OnDevice]) -> None:
    """The tables of `compress bench --device`, one for each device."""
    from compress.report.table import closeness

    out = console()
    for result in results:
        if result.comparison is None:
            out.print(result.error, highlight=False, markup=False)
            continue
        known = ("cpu", "cores", "os", "runner")
        facts = ", ".join(f"{key} {result.machine[key]}" for key in known if key in result.machine)
        out.print(f"{result.device} ({facts})", highlight=False, markup=False)
        latency(result.comparison)
        plain = result.to_dict()["closeness"]
        for name in result.comparison.timings:
            if name in plain:
                text = f"Outputs of {name}, there against here: {closeness(plain[name])}."
                out.print(text, highlight=False, markup=False)
        for name, reason in result.failures.items():
            out.print(f"{name} failed there: {reason}", highlight=False, markup=False)


def check(result: CheckResult) -> None:
    """The table of `compress check`."""
    from compress.regression.result import cells

    table = _table("metric", "limit", right=("baseline", "candidate", "found"), last="verdict")
    for row in result.rows:
        table.add_row(*map(escape, cells(row)[:-1]))
    out = console()
    out.print(table)
    for row in result.rows:
        if row.reason:
            out.print(f"{row.metric}: {row.reason}", highlight=False, markup=False)
    for note in result.notes:
        out.print(note, highlight=False, markup=False)
    out.print(
        f"Pairs of sessions: {result.pairs}, looks: {result.looks}, {result.seconds:.1f} s",
        highlight=False,
    )
    out.print(result.headline, highlight=False, markup=False)


def baseline(record: Record) -> None:
    """The table of `compress baseline`."""
    table = _table("what", "found")
    for quantile in ("p50", "p90"):
        one = record.latency[f"{quantile}_ms"]
        shown = f"{one['value']:.4g} ms [{one['low']:.4g}, {one['high']:.4g}]"
        table.add_row(f"latency_{quantile}", shown)
    accuracy = record.accuracy
    if accuracy is not None:
        table.add_row("accuracy", f"{accuracy['value']:.6g} on {escape(accuracy['data'])}")
    table.add_row("size", f"{record.size_bytes} bytes")
    peak = record.peak_memory_bytes
    table.add_row("peak_memory", f"{peak} bytes" if peak is not None else "unknown")
    table.add_row("machine", f"{escape(record.machine['cpu'])}, {record.machine['fingerprint']}")
    console().print(table)


def side_by_side(result: SideBySide) -> None:
    """The tables of `compress compare`."""
    latency(result.latency)
    table = _table("outputs of B against A", right=("value",))
    close = result.fidelity
    if close.top1_agreement is not None:
        table.add_row("top-1 agreement", f"{close.top1_agreement:.2%}")
    table.add_row("cosine", f"{close.cosine:.6f}")
    table.add_row("SQNR", f"{close.sqnr_db:.1f} dB")
    table.add_row("largest difference", f"{close.max_abs_difference:.4g}")
    table.add_row("samples", f"{close.samples} ({close.source})")
    if result.scores is not None:
        for name, score in zip((result.first, result.second), result.scores, strict=True):
            shown = f"{score.value:.2%}" if score.unit == "top-1" else f"{score.value:.6g}"
            table.add_row(f"{score.unit} of {escape(name)}", shown)
    if result.drop is not None:
        table.add_row("drop", str(result.drop))
    console().print(table)


def profile(report: ProfileReport) -> None:
    """The table of `compress profile`: by kernel, or with several runtimes layer by layer."""
    if report.layers:
        _layers(report)
        return
    table = _table("kernel", "operator", "precision", right=("µs", "share", "MACs", "GMAC/s"))
    for row in report.rows:
        macs, rate = row["macs"], row["gmacs_per_second"]
        table.add_row(
            escape(row["site"] or row["kernel"]),
            row["op_type"],
            row["precision"],
            f"{row['p50_us']:.1f}",
            f"{row['share']:.1%}",
            count(macs) if macs else "",
            f"{rate:.1f}" if rate else "",
        )
    console().print(table)


def _layers(report: ProfileReport) -> None:
    runtimes = list(dict.fromkeys(row["runtime"] for row in report.rows))
    right = ("MACs", *(f"{runtime} µs" for runtime in runtimes))
    table = _table("site", "operator", right=right, last="faster")
    for row in report.layers:
        spent = row["p50_us"]
        cells = (f"{spent[r]:.1f}" if r in spent else "fused" for r in runtimes)
        both = len(spent) == len(runtimes)
        table.add_row(
            escape(row["site"] or "(inserted by the runtime)"),
            row["op_type"] if row["site"] else "",
            count(row["macs"]) if row["macs"] else "",
            *cells,
            min(spent, key=spent.__getitem__) if both else "",
        )
    totals = [sum(row["p50_us"].get(r, 0.0) for row in report.layers) for r in runtimes]
    table.add_row("sum", "", "", *(f"{total:.1f}" for total in totals), "")
    console().print(table)


def targets(rows: Sequence[Mapping[str, Any]]) -> None:
    """The table of `compress targets`."""
    table = _table("target", "here", "why not", "install", "from")
    for row in rows:
        cells = (row["reason"], row["install"], row["provider"])
        table.add_row(row["name"], "yes" if row["available"] else "no", *map(escape, cells))
    console().print(table)


def device_sheets(rows: Sequence[Mapping[str, Any]]) -> None:
    """The table of `compress targets --devices`."""
    right = ("float32 GFLOP/s", "float16 GFLOP/s", "int8 GOP/s", "GB/s", "GB")
    table = _table("device", "cores", "features", right=right, last="unverified")
    for row in rows:
        peaks = (row["peak_gops"][precision] for precision in ("float32", "float16", "int8"))
        doubtful = sum(fact["kind"] == "unverified" for fact in row["facts"].values())
        table.add_row(
            row["name"],
            ", ".join(row["cores"]),
            ", ".join(row["features"]),
            *(f"{peak:.0f}" if peak is not None else "" for peak in peaks),
            f"{row['bandwidth_gb_s']:g}",
            f"{row['memory_gb']:g}",
            f"{doubtful} of {len(row['facts'])} facts",
        )
    out = console()
    out.print(table)
    out.print(
        "Peaks are of the first kind of core, all of them together. --json has all sources.",
        highlight=False,
    )


def passes(rows: Sequence[Mapping[str, Any]]) -> None:
    """The table of `compress passes`."""
    table = _table("pass", "stage", "what it does", "options", "from")
    for row in rows:
        settings = "\n".join(f"{name}={value}" for name, value in row["options"].items())
        cells = (row["description"], settings, row["provider"])
        table.add_row(row["name"], row["stage"], *map(escape, cells))
    console().print(table)


def doctor(facts: Mapping[str, Any]) -> None:
    """The tables of `compress doctor`."""
    machine = facts["machine"]
    table = _table("what", "found")
    table.add_row("processor", escape(machine["cpu"]))
    table.add_row("usable cores", str(machine["cores"]))
    table.add_row("features", ", ".join(machine["features"]) or "unknown")
    table.add_row("int8 dot product", "yes" if facts["int8_dot_product"] else "no")
    table.add_row("memory", size(machine["memory_bytes"]) if machine["memory_bytes"] else "unknown")
    table.add_row("governor", machine["governor"] or "unknown")
    table.add_row("system", escape(machine["os"]))
    table.add_row("Python", facts["python"])
    for package, version in facts["versions"].items():
        table.add_row(package, version)
    writable = "writable" if facts["directory"]["writable"] else "not writable"
    table.add_row("this folder", f"{escape(facts['directory']['path'])}, {writable}")
    out = console()
    out.print(table)
    targets(facts["targets"])
    for problem in facts["problems"]:
        out.print(f"Attention: {problem}", highlight=False, markup=False)


def count(number: float) -> str:
    """A number with three digits and k, M, G or T."""
    for unit in ("", "k", "M", "G"):
        if abs(number) < 999.5:
            return f"{number:.3g}{unit}"
        number /= 1000
    return f"{number:.3g}T"


def size(number_bytes: float) -> str:
    """Bytes with a binary unit."""
    for unit in ("B", "KiB", "MiB"):
        if number_bytes < 1000:
            return f"{number_bytes:.3g} {unit}"
        number_bytes /= 1024
    return f"{number_bytes:.3g} GiB"


def _totals(found: Sequence[Site]) -> dict[str, int]:
    return {
        "sites": len(found),
        "macs": sum(site.macs for site in found),
        "parameters": sum(site.parameters for site in found),
        "peak_live_bytes": max((site.live_bytes for site in found), default=0),
    }


def _table(*left: str, right: Sequence[str] = (), last: str = "") -> Table:
    table = Table(header_style="bold", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in left:
        table.add_column(name, overflow="fold")
    for name in right:
        table.add_column(name, justify="right", no_wrap=True)
    if last:
        table.add_column(last)
    return table
