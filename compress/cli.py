"""The `compress` command. Work is imported inside the commands, so that help is instant."""

from __future__ import annotations

import functools
import json
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ParamSpec

import typer

from compress import options
from compress.errors import OutputError, UsageError
from compress.exits import CANNOT_TELL, NOT_MET, PREPARED, explain

if TYPE_CHECKING:
    from compress.model import TensorSpec
    from compress.progress import Progress
    from compress.report import Report

P = ParamSpec("P")

app = typer.Typer(
    name="compress",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="\b\nStart here:\n  compress doctor\n  compress run model.onnx --target cpu --bits 8",
)


@app.callback()
def _root(
    debug: Annotated[
        bool,
        typer.Option(
            "--debug", help="Show the traceback of an error. Works behind any command too."
        ),
    ] = False,
) -> None:
    """Make a trained model small and fast for one target, and prove it with measurements.

    Exit codes: 0 done and within the budget, 1 budget not met or nothing faster found,
    2 wrong usage or input, 3 unexpected error, 4 prepared for `compress build`,
    5 `compress check --cannot-tell fail` could not tell, 130 stopped.
    """


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the console script."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if "--debug" in given:
        os.environ["COMPRESS_DEBUG"] = "1"
    app([argument for argument in given if argument != "--debug"], prog_name="compress")


def _command(name: str, *examples: str) -> Callable[[Callable[P, None]], Callable[P, None]]:
    """Register a command with examples under its help and errors as sentences."""

    def register(function: Callable[P, None]) -> Callable[P, None]:
        @functools.wraps(function)
        def guarded(*args: P.args, **kwargs: P.kwargs) -> None:
            try:
                function(*args, **kwargs)
            except (typer.Exit, BrokenPipeError):
                raise
            except (Exception, KeyboardInterrupt) as error:
                if os.environ.get("COMPRESS_DEBUG", "0") not in ("", "0"):
                    traceback.print_exc()
                code, message = explain(error)
                typer.secho(message, err=True, fg=typer.colors.RED)
                raise typer.Exit(code) from error

        epilog = "\b\nExamples:\n" + "\n".join(f"  {example}" for example in examples)
        app.command(name, epilog=epilog)(guarded)
        return guarded

    return register


@_command(
    "run",
    "compress run model.onnx --target cpu --bits 8 --calibration images.npz",
    "compress run model.pt --input 1x3x224x224 --calibration photos/ --eval test.npz "
    "--max-drop 0.5%",
    "compress run --model torchvision.models:resnet18 --input 1x3x224x224 --threads 1 --json",
    "compress run model.onnx --bits fp8 --simulate --calibration images.npz --eval test.npz",
    "compress run model.onnx --target openvino --batch 8 --objective throughput --time 120",
    "compress run model.onnx --target tensorrt --calibration images.npz --target-option "
    "version_compatible=true",
    "compress run model.onnx --target ort-mobile --device pixel-8 --calibration images.npz",
    "compress run model.onnx --calibration images.npz --device ssh://pi@192.168.1.7",
    "compress run model.onnx --target openvino --calibration images.npz --max-memory 2MiB",
)
def run(
    model: options.Source = None,
    factory: options.Factory = None,
    target: options.RecipeTarget = None,
    target_options: options.TargetOption = None,
    device: options.SheetOrDevices = None,
    bits: options.Bits = None,
    activation_bits: options.ActivationBits = None,
    simulate: options.Simulate = False,
    inputs: options.Inputs = None,
    calibration: options.Calibration = None,
    evaluate: options.Evaluate = None,
    train: options.Train = None,
    max_drop: options.MaxDrop = None,
    min_speedup: options.MinSpeedup = None,
    max_memory: options.MaxMemory = None,
    repair_seconds: options.RepairTime = None,
    out: options.Directory = None,
    force: options.Force = False,
    recipe: options.RecipeFile = None,
    method: options.Method = None,
    calibration_samples: options.CalibrationSamples = None,
    layout: options.RecipeLayout = None,
    mean: options.Mean = None,
    std: options.Std = None,
    threads: options.Threads = None,
    batch: options.RecipeBatch = None,
    objective: options.Objective = None,
    search_seconds: options.Time = None,
    seconds: options.RecipeSeconds = None,
    sensitivity: options.Sensitivity = False,
    seed: options.RecipeSeed = None,
    trust_pickle: options.TrustPickle = False,
    as_json: options.Json = False,
) -> None:
    """Compress a model, measure it, write an artifact.

    The artifact is the fastest candidate that stays within the budget: float, int8 or a mix of
    both, in the runtime that runs it fastest. Where nothing pays, it is the float model that came
    in, and the report says so first.
    """
    # Options are read before anything heavy is imported, so that a slip shows at once.
    specs, means, deviations = _specs(inputs), _numbers(mean, "--mean"), _numbers(std, "--std")
    chosen = _target_options(target_options)
    from compress import pipeline

    _say_first(target)
    result = pipeline.run(
        model,
        factory=factory,
        target=target,
        target_options=chosen,
        device=device or (),
        bits=bits,
        activation_bits=activation_bits,
        simulate=simulate,
        inputs=specs,
        calibration=calibration,
        evaluate=evaluate,
        train=train,
        max_drop=max_drop,
        repair_seconds=repair_seconds,
        min_speedup=min_speedup,
        max_memory=max_memory,
        out=out,
        overwrite=force,
        recipe=recipe,
        method=method,
        samples=calibration_samples,
        layout=layout,
        mean=means,
        std=deviations,
        threads=threads,
        batch=batch,
        objective=objective,
        search_seconds=search_seconds,
        seconds=seconds,
        sensitivity=sensitivity or None,
        seed=seed,
        trust_pickle=trust_pickle,
        progress=_progress(),
    )
    if as_json:
        _print_json(
            {
                "met": result.met,
                "built": result.built,
                "directory": str(result.directory),
                "report": result.report.to_dict(),
            }
        )
    else:
        from compress import render
        from compress.report.terminal import render as render_report

        render_report(result.report, render.console())
        typer.echo(f"Artifact: {result.directory}")
        if hint := _explain_hint(result.report, result.directory):
            typer.echo(hint)
    if not result.built:
        raise typer.Exit(PREPARED)
    if not result.met:
        raise typer.Exit(NOT_MET)


@_command(
    "build",
    "compress build model-tensorrt",
    "compress build model-tensorrt --eval test.npz --seconds 30",
)
def build(
    directory: options.PreparedDirectory,
    evaluate: options.Evaluate = None,
    layout: options.Layout = "auto",
    mean: options.Mean = None,
    std: options.Std = None,
    max_drop: options.MaxDrop = None,
    min_speedup: options.MinSpeedup = None,
    seconds: options.RecipeSeconds = None,
    seed: options.RecipeSeed = None,
    as_json: options.Json = False,
) -> None:
    """Finish an artifact on the machine that has the hardware.

    Builds every candidate that `compress run` prepared, measures them in turns, keeps the fastest
    that holds the budget and completes the report. Engines that were built before an interruption
    are not built again.
    """
    means, deviations = _numbers(mean, "--mean"), _numbers(std, "--std")
    from compress import building

    report = building.build(
        directory,
        evaluate=evaluate,
        layout=layout,
        mean=means,
        std=deviations,
        max_drop=max_drop,
        min_speedup=min_speedup,
        seconds=seconds,
        seed=seed,
        progress=_progress(),
    )
    if as_json:
        _print_json({"met": report.met, "directory": str(directory), "report": report.to_dict()})
    else:
        from compress import render
        from compress.report.terminal import render as render_report

        render_report(report, render.console())
        typer.echo(f"Artifact: {directory}")
    if not report.met:
        raise typer.Exit(NOT_MET)


@_command(
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
    specs = _specs(inputs)
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
        _print_json(render.sites_dict(loaded, found, memory, table))
        return
    render.sites(loaded, found, memory)
    if table is not None:
        render.patches(table)


@_command(
    "bench",
    "compress bench model.onnx",
    "compress bench model.onnx model-cpu --threads 1",
    "compress bench model-cpu model-cpu   # how far two equal things seem apart",
    "compress bench model.onnx model-cpu --device ssh://pi@192.168.1.7 --device ssh://jetson",
)
def bench(
    first: options.Built,
    others: options.Others = None,
    devices: options.Addresses = None,
    threads: options.Threads = None,
    batch: options.Batch = 1,
    seconds: options.Seconds = 10.0,
    seed: options.Seed = 0,
    as_json: options.Json = False,
) -> None:
    """Measure latency, several models in turns.

    Here, or with --device on other machines, which also compares their outputs with those here.
    """
    from compress import render
    from compress.side_by_side import bench as measure_all
    from compress.side_by_side import bench_on

    if devices:
        found = bench_on(
            devices,
            [first, *(others or [])],
            threads=threads,
            batch=batch,
            seconds=seconds,
            seed=seed,
            progress=_progress(),
        )
        if as_json:
            _print_json({"devices": [one.to_dict() for one in found]})
        else:
            render.on_devices(found)
        return
    comparison = measure_all(
        [first, *(others or [])],
        threads=threads,
        batch=batch,
        seconds=seconds,
        seed=seed,
        progress=_progress(),
    )
    if as_json:
        _print_json(comparison.to_dict())
    else:
        render.latency(comparison)


@_command(
    "compare",
    "compress compare model.onnx model-cpu",
    "compress compare model.onnx model-cpu --eval test.npz --threads 1",
)
def compare(
    first: options.Built,
    second: options.Second,
    evaluate: options.Evaluate = None,
    layout: options.Layout = "auto",
    mean: options.Mean = None,
    std: options.Std = None,
    threads: options.Threads = None,
    seconds: options.Seconds = 10.0,
    seed: options.Seed = 0,
    as_json: options.Json = False,
) -> None:
    """Put two models side by side.

    Latency in turns, how close B's outputs are to A's, and with --eval the accuracy of both.
    """
    means, deviations = _numbers(mean, "--mean"), _numbers(std, "--std")
    from compress import render
    from compress.side_by_side import compare as compare_two

    result = compare_two(
        first,
        second,
        evaluate=evaluate,
        layout=layout,
        mean=means,
        std=deviations,
        threads=threads,
        seconds=seconds,
        seed=seed,
        progress=_progress(),
    )
    if as_json:
        _print_json(result.to_dict())
    else:
        render.side_by_side(result)


@_command(
    "check",
    "compress check model-cpu --against baseline",
    "compress check model-cpu --against model.onnx --budget budgets.yaml --eval test.npz",
    "compress check model-cpu --against baseline --max-slowdown 5% --time 20 --cannot-tell fail",
    "compress check model-cpu --against baseline --junit check.xml --markdown check.md",
)
def check(
    candidate: options.Candidate,
    against: options.Against = None,
    budget: options.BudgetFile = None,
    max_slowdown: options.MaxSlowdown = None,
    evaluate: options.Evaluate = None,
    max_drop: options.MaxDrop = None,
    cannot_tell: options.CannotTell = "pass",
    seconds: options.CheckTime = 60.0,
    threads: options.CheckThreads = None,
    inputs: options.Inputs = None,
    layout: options.Layout = "auto",
    mean: options.Mean = None,
    std: options.Std = None,
    junit: options.Junit = None,
    markdown: options.MarkdownFile = None,
    seed: options.Seed = 0,
    as_json: options.Json = False,
) -> None:
    """Gate a model against a baseline: for CI, on noisy machines too.

    Both run in turns on this machine, built anew many times, until the verdict is sure or --time
    is up. Without a budget the median latency may rise by 2.5%: half-way between no change and a
    slow-down of 5%, so that equal models pass, 5% is found, and a small model takes seconds. A
    change near the limit cannot be told, and --cannot-tell says what becomes of it. With --eval
    one point of accuracy may be lost.

    Absolute times in a budget are judged only on the machine that the budget names.

    Exit codes: 0 passed, 1 failed, 2 could not be checked, 5 cannot tell with --cannot-tell fail.
    """
    from compress.regression.publish import publish, publish_error

    files = {"junit": junit, "comment": markdown}
    try:
        specs, means, deviations = _specs(inputs), _numbers(mean, "--mean"), _numbers(std, "--std")
        from compress.regression import check as check_one

        result = check_one(
            candidate,
            against,
            budget=budget,
            evaluate_on=evaluate,
            max_slowdown=max_slowdown,
            max_drop=max_drop,
            cannot_tell=cannot_tell,
            seconds=seconds,
            threads=threads,
            inputs=specs,
            layout=layout,
            mean=means,
            std=deviations,
            seed=seed,
            progress=_progress(),
        )
    except (Exception, KeyboardInterrupt) as error:
        _, message = explain(error)
        try:
            _print_lines(publish_error(candidate, message, os.environ, **files), as_json)
        except OutputError as second:
            typer.secho(str(second), err=True, fg=typer.colors.RED)
        raise
    if as_json:
        _print_json(result.to_dict())
    else:
        from compress import render

        render.check(result)
    _print_lines(publish(result, os.environ, **files), as_json)
    if result.verdict == "cannot tell":
        typer.secho(f"Attention: {result.headline}", err=True, fg=typer.colors.YELLOW)
    if not result.ok:
        raise typer.Exit(NOT_MET if result.verdict == "fail" else CANNOT_TELL)


@_command(
    "baseline",
    "compress baseline model-cpu --out baseline",
    "compress baseline model-cpu --out baseline --eval test.npz --budget budgets.yaml",
    "compress baseline model.onnx --threads 1 --seconds 20 --force",
)
def baseline(
    source: options.Candidate,
    out: options.BaselineDirectory = None,
    force: options.ForceBaseline = False,
    budget: options.StartingBudget = None,
    evaluate: options.Evaluate = None,
    layout: options.Layout = "auto",
    mean: options.Mean = None,
    std: options.Std = None,
    seconds: options.Seconds = 10.0,
    threads: options.CheckThreads = None,
    inputs: options.Inputs = None,
    seed: options.Seed = 0,
    as_json: options.Json = False,
) -> None:
    """Record what `compress check` compares with.

    A directory with a copy that can run again and `baseline.json`: latency over fresh sessions,
    accuracy, size, peak memory, machine and versions. With --budget also a file of limits to start
    from.
    """
    specs, means, deviations = _specs(inputs), _numbers(mean, "--mean"), _numbers(std, "--std")
    from compress.regression.recording import record_baseline

    directory, record = record_baseline(
        source,
        out,
        overwrite=force,
        budget=budget,
        evaluate_on=evaluate,
        seconds=seconds,
        threads=threads,
        inputs=specs,
        layout=layout,
        mean=means,
        std=deviations,
        seed=seed,
        progress=_progress(),
    )
    if as_json:
        import dataclasses

        _print_json({"directory": str(directory), "record": dataclasses.asdict(record)})
    else:
        from compress import render

        render.baseline(record)
        typer.echo(f"Baseline: {directory}")
        if budget is not None:
            typer.echo(f"Budget: {budget}")


@_command(
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
    """Show where the time goes, kernel by kernel; or estimate a latency, and learn to.

    Kernels are what the target made of the model after its own fusions. Where several runtimes
    serve the target, they are shown side by side, layer by layer. The first time on a machine its
    peak rates are measured too, some seconds, for the roofs of `compress plot`.

    With --source the latency of the whole is measured or estimated, with its interval and where
    the figure is from. With --build-predictor the times of kernels are learned on this machine.
    """
    specs = _specs(inputs)
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
        progress=_progress(),
    )
    if out is None and not as_json:
        out = Path(f"{report.model}-{report.target}-profile.json")
    if out is not None:
        _write_json(out, report.to_dict())
    if as_json:
        _print_json(report.to_dict())
    else:
        render.profile(report)
        typer.echo(f"Written to {out}")


@_command(
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
        _print_json({"files": [str(path) for path in written]})
    else:
        for path in written:
            typer.echo(f"Written to {path}")


@_command(
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
        progress=_progress(),
    )
    if markdown is not None:
        _write_text(markdown, found.markdown())
    if as_json:
        _print_json(found.to_dict())
        return
    from compress import render
    from compress.explaining.text import render as render_explanation

    render_explanation(found, render.console())
    if markdown is not None:
        typer.echo(f"Written to {markdown}")


def _build_predictors(
    given: list[str],
    target: str,
    threads: int | None,
    minutes: float,
    out: Path | None,
    as_json: bool,
    load: dict[str, Any],
) -> None:
    from compress.estimate import commands, tables

    built = commands.build_predictors(
        target,
        threads=threads,
        minutes=minutes,
        models=[commands.load_model(one, **load) for one in given],
        out=out,
        progress=_progress(),
    )
    if as_json:
        _print_json({"predictors": [one.to_dict() for one in built]})
    else:
        tables.predictors(built)


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
    from compress.estimate import commands, tables

    model = commands.load_model(given[0] if given else None, **load)
    found = commands.estimate(
        model, target, source, threads=threads, predictor=predictor, progress=_progress()
    )
    rows = {"model": model.name, "estimates": [one.to_dict() for one in found]}
    if out is not None:
        _write_json(out, rows)
    if as_json:
        _print_json(rows)
    else:
        tables.estimates(model.name, found)


@_command("targets", "compress targets", "compress targets --devices", "compress targets --json")
def targets(devices: options.DeviceSheets = False, as_json: options.Json = False) -> None:
    """List the targets and whether they work here.

    With --devices, the sheets of phones and boards that --device of `run` takes.
    """
    from compress import doctor, render
    from compress.device_sheets import SHEETS

    rows = [device.to_dict() for device in SHEETS] if devices else doctor.targets()
    if as_json:
        _print_json(rows)
    elif devices:
        render.device_sheets(rows)
    else:
        render.targets(rows)


@_command("passes", "compress passes", "compress passes --json")
def passes(as_json: options.Json = False) -> None:
    """List the passes with their stage and their options."""
    from compress import doctor, render

    rows = doctor.passes()
    if as_json:
        _print_json(rows)
    else:
        render.passes(rows)


@_command("doctor", "compress doctor", "compress doctor --json > machine.json")
def doctor(as_json: options.Json = False) -> None:
    """Say what this machine can do and what is missing."""
    from compress import doctor as examination
    from compress import render

    facts = examination.examine()
    if as_json:
        _print_json(facts)
    else:
        render.doctor(facts)


def _specs(texts: list[str] | None) -> tuple[TensorSpec, ...]:
    from compress.model import TensorSpec

    return tuple(TensorSpec.parse(text) for text in texts or ())


def _numbers(text: str | None, option: str) -> tuple[float, ...] | None:
    if text is None:
        return None
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise UsageError(
            f"{option} {text!r} is not a number or a comma-separated list of numbers. Write one "
            f"for all channels or one for each, for example {option} 0.485,0.456,0.406."
        ) from None


def _target_options(texts: list[str] | None) -> dict[str, Any] | None:
    """Whole numbers and true or false as such, everything else as text."""
    found: dict[str, Any] = {}
    for text in texts or ():
        name, equals, value = text.partition("=")
        if not (name.isidentifier() and equals and value):
            raise UsageError(
                f"--target-option {text!r} is not NAME=VALUE, for example workspace_mib=8192."
            )
        number = int(value) if value.isascii() and value.isdigit() else value
        found[name] = {"true": True, "false": False}.get(value.lower(), number)
    return found or None


def _say_first(target: str | None) -> None:
    """What the user should know of the machine before any work."""
    from compress.registry import create_target

    for note in create_target(target or "cpu").capabilities.notes:
        typer.secho(note, err=True, fg=typer.colors.YELLOW)


def _progress() -> Progress:
    from compress.progress import terminal

    return terminal


def _print_lines(lines: Sequence[str], to_stderr: bool) -> None:
    """Workflow commands, which the runner reads from either stream."""
    for line in lines:
        typer.echo(line, err=to_stderr)


def _print_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=2))


def _write_json(path: Path, value: Any) -> None:
    _write_text(path, json.dumps(value, indent=2) + "\n")


def _write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OutputError(
            f"{str(path)!r} cannot be written: {error.strerror}. Choose another file."
        ) from error


_LITTLE = 1.1
"""A speed-up below this makes one ask why."""


def _explain_hint(report: Report, directory: Path) -> str:
    """Where to ask why it is not faster; "" where it is, or where nothing was measured."""
    if not report.built or not report.chosen:
        return ""
    speedup = report.candidate(report.chosen).speedup
    if speedup is not None and speedup["value"] >= _LITTLE:
        return ""
    return f"Why it is not faster: compress explain {directory}"


if __name__ == "__main__":
    main()
