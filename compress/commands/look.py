"""Commands that look into a model or an artifact: inspect, profile, explain, plot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

from compress.commands import options
from compress.commands.app import command, input_specs, print_json, progress, write_json, write_text
from compress.errors import UsageError


@command(
    "inspect",
    "compress inspect model.onnx",
    "compress inspect --model torchvision.models:resnet18 --input 1x3x224x224",
    "compress inspect model.pt2 --json | jq '.totals.macs'",
    "compress inspect model.onnx --patches   # peak memory if the first stage ran in patches",
)
def inspect(
    model: options.Source = None,
    factory: options.Factory = None,
    inputs: options.Inputs = None,
    patches: options.Patches = False,
    trust_pickle: options.TrustPickle = False,
    as_json: options.Json = False,
) -> None:
    """Show the operators of a model and what they cost.

    Shapes, MACs, parameters and the activations that are in memory while each runs; the peak of
    all with its operator, in float32 and as int8. With --patches also what patch-based execution
    of the first stage would need (MCUNetV2): an analysis for microcontrollers, no target here
    executes it.
    """
    specs = input_specs(inputs)
    from compress import export, loading, render
    from compress.graph import graph_sites
    from compress.memory.inspection import model_memory
    from compress.memory.splitting import table_of

    loaded = loading.load(model, factory=factory, inputs=specs, trust_pickle=trust_pickle)
    graph_model = export.to_onnx(loaded, 21).graph_model
    found = graph_sites(graph_model)
    memory = {
        "float32": model_memory(graph_model),
        "int8": model_memory(graph_model, "int8"),
    }
    table = table_of(graph_model) if patches else None
    if as_json:
        print_json(render.sites_dict(loaded, found, memory, table))
        return
    render.sites(loaded, found, memory)
    if table is not None:
        render.patches(table)


@command(
    "profile",
    "compress profile model.onnx --target cpu --threads 1",
    "compress profile model.onnx --out profile.json",
    "compress profile --build-predictor --target cpu --threads 1 --minutes 20",
    "compress profile --build-predictor mine.onnx other.onnx --target onnxruntime",
    "compress profile model.onnx --threads 1 --source predicted",
)
def profile(
    models: options.Sources = None,
    factory: options.Factory = None,
    target: options.TargetName = "cpu",
    inputs: options.Inputs = None,
    threads: options.Threads = None,
    runs: options.Runs = 20,
    source: options.LatencySource = None,
    build_predictor: options.BuildPredictor = False,
    minutes: options.Minutes = 10.0,
    predictor: options.PredictorFile = None,
    out: options.JsonFile = None,
    trust_pickle: options.TrustPickle = False,
    as_json: options.Json = False,
) -> None:
    """Show where the time goes by kernel, or estimate a latency.

    Kernels are what the target made of the model after its own fusions. Where several runtimes
    serve the target, they are shown side by side, layer by layer. The first time on a machine its
    peak rates are measured too, some seconds, for the roofs of `compress plot`.

    With --source the latency of the whole is measured or estimated, with its interval and where
    the figure is from. With --build-predictor the times of kernels are learned on this machine.
    """
    specs = input_specs(inputs)
    given = models or []
    if len(given) > 1 and not build_predictor:
        raise UsageError(
            f"profile takes one model, and {len(given)} were given: {', '.join(given)}. Several "
            f"are for --build-predictor."
        )
    if build_predictor and source is not None:
        raise UsageError(
            "--build-predictor and --source exclude each other: build first, then estimate."
        )
    load = {"factory": factory, "inputs": specs, "trust_pickle": trust_pickle}
    if build_predictor:
        _build_predictors(given, target, threads, minutes, out, as_json, load)
        return
    if source is not None:
        _estimate(given, target, source, threads, predictor, out, as_json, load)
        return
    from compress import profiling, render

    report = profiling.profile(
        given[0] if given else None,
        target=target,
        threads=threads,
        factory=factory,
        inputs=specs,
        runs=runs,
        trust_pickle=trust_pickle,
        progress=progress(),
    )
    if out is None and not as_json:
        out = Path(f"{report.model}-{report.target}-profile.json")
    if out is not None:
        write_json(out, report.to_dict())
    if as_json:
        print_json(report.to_dict())
    else:
        render.profile(report)
        typer.echo(f"Written to {out}")


@command(
    "explain",
    "compress explain model-cpu",
    "compress explain model-cpu --against model.onnx --markdown why.md",
    "compress explain int8.onnx --against float.onnx --threads 1   # whatever tool made them",
    "compress explain int8.onnx --against float.onnx --target openvino --json",
)
def explain_model(
    compressed: options.Explained,
    against: options.Original = None,
    target: options.TargetName = "cpu",
    threads: options.Threads = None,
    batch: options.ExplainedBatch = None,
    inputs: options.Inputs = None,
    seconds: options.Seconds = 6.0,
    quick: options.Quick = False,
    seed: options.Seed = 0,
    markdown: options.MarkdownFile = None,
    as_json: options.Json = False,
) -> None:
    """Say why a compressed model is not faster.

    Or where its gain comes from: runs it and the original in the same runtime, and says in
    sentences what costs time and what to do about it. Q/DQ that were not fused, conversions,
    layers that are slower in int8 or limited by memory, widths beside a step. The parts add up to
    the difference of the latencies. Works on artifacts and on any two model files.
    """
    from compress.explaining.explain import explain as explain_pair

    found = explain_pair(
        compressed,
        against=against,
        target=target,
        threads=threads,
        batch=batch,
        inputs=inputs or (),
        seconds=seconds,
        quick=quick,
        seed=seed,
        progress=progress(),
    )
    if markdown is not None:
        write_text(markdown, found.markdown())
    if as_json:
        print_json(found.to_dict())
        return
    from compress import render
    from compress.explaining.text import render as render_explanation

    render_explanation(found, render.console())
    if markdown is not None:
        typer.echo(f"Written to {markdown}")


@command(
    "plot",
    "compress plot model-cpu",
    "compress plot model-cpu --kind roofline --kind waterline --out plots",
    "compress plot profile.json   # of `compress profile model.onnx --out profile.json`",
    "compress plot resnet8-cpu resnet20-cpu resnet56-cpu --kind gap --out plots",
    "compress plot predictions.json --kind predictions",
)
def plot(
    first: options.Plotted,
    others: options.PlottedToo = None,
    kinds: options.PlotKinds = None,
    out: options.PlotFolder = None,
    as_json: options.Json = False,
) -> None:
    """Draw the plots of an artifact or of a profile again, as PNG.

    \b
    kernels      time by site, float and compressed side by side, coloured by precision
    roofline     what each kernel reaches under the machine's peaks and bandwidth
    waterline    attainable and actual rate of the kernels in order of execution
    gap          accuracy over the latency that is and the one that the arithmetic allows
    sensitivity  what each operator costs when it alone is quantized (run --sensitivity)
    predictions  measured against predicted latency

    Without --kind, all that there is something for. Several artifacts of one machine give one plot
    of the efficiency gap. Rows of your own are JSON: {"rows": [{"name": ..., "measured_ms": ...,
    "predicted_ms": ..., "source": ...}]}, or for the gap rows with family, name, accuracy, macs and
    latency_ms, beside the "peaks" that `compress profile --out` writes.
    """  # noqa: D301 - the backspace is click's sign for lines that stay as they are
    from compress import plotting

    written = plotting.plot([first, *(others or [])], kinds=kinds or (), out=out)
    if as_json:
        print_json({"files": [str(path) for path in written]})
    else:
        for path in written:
            typer.echo(f"Written to {path}")


def _build_predictors(
    given: list[str],
    target: str,
    threads: int | None,
    minutes: float,
    out: Path | None,
    as_json: bool,
    load: dict[str, Any],
) -> None:
    from compress.commands import estimate_tables, estimates
    from compress.estimate.estimate import open_model

    built = estimates.build_predictors(
        target,
        threads=threads,
        minutes=minutes,
        models=[open_model(one, **load) for one in given],
        out=out,
        progress=progress(),
    )
    if as_json:
        print_json({"predictors": [one.to_dict() for one in built]})
    else:
        estimate_tables.predictors(built)


def _estimate(
    given: list[str],
    target: str,
    source: str,
    threads: int | None,
    predictor: Path | None,
    out: Path | None,
    as_json: bool,
    load: dict[str, Any],
) -> None:
    from compress.commands import estimate_tables, estimates
    from compress.estimate.estimate import open_model

    model = open_model(given[0] if given else None, **load)
    found = estimates.estimate(
        model, target, source, threads=threads, predictor=predictor, progress=progress()
    )
    rows = {"model": model.name, "estimates": [one.to_dict() for one in found]}
    if out is not None:
        write_json(out, rows)
    if as_json:
        print_json(rows)
    else:
        estimate_tables.estimates(model.name, found)
