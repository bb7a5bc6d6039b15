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
from compress.exits import NOT_MET, PREPARED, explain

if TYPE_CHECKING:
    from compress.model import TensorSpec
    from compress.progress import Progress

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
    2 wrong usage or input, 3 unexpected error, 4 prepared for `compress build`, 130 stopped.
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
    reparam: options.Reparam = None,
    inputs: options.Inputs = None,
    calibration: options.Calibration = None,
    evaluate: options.Evaluate = None,
    train: options.Train = None,
    max_drop: options.MaxDrop = None,
    min_speedup: options.MinSpeedup = None,
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
        reparam=reparam,
        inputs=specs,
        calibration=calibration,
        evaluate=evaluate,
        train=train,
        max_drop=max_drop,
        repair_seconds=repair_seconds,
        min_speedup=min_speedup,
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
)
def inspect(
    model: options.Source = None,
    factory: options.Factory = None,
    inputs: options.Inputs = None,
    trust_pickle: options.TrustPickle = False,
    as_json: options.Json = False,
) -> None:
    """Show the operators of a model and what they cost.

    Shapes, MACs, parameters and the activations that are in memory while each runs.
    """
    specs = _specs(inputs)
    from compress import export, loading, render

    loaded = loading.load(model, factory=factory, inputs=specs, trust_pickle=trust_pickle)
    found = export.sites(loaded)
    if as_json:
        _print_json(render.sites_dict(loaded, found))
    else:
        render.sites(loaded, found)


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
    "profile",
    "compress profile model.onnx --target cpu --threads 1",
    "compress profile model.onnx --out profile.json",
)
def profile(
    model: options.Source = None,
    factory: options.Factory = None,
    target: options.TargetName = "cpu",
    inputs: options.Inputs = None,
    threads: options.Threads = None,
    runs: options.Runs = 20,
    out: options.JsonFile = None,
    trust_pickle: options.TrustPickle = False,
    as_json: options.Json = False,
) -> None:
    """Show where the time goes, kernel by kernel.

    Kernels are what the target made of the model after its own fusions. Where several runtimes
    serve the target, they are shown side by side, layer by layer.
    """
    specs = _specs(inputs)
    from compress import profiling, render

    report = profiling.profile(
        model,
        target=target,
        threads=threads,
        factory=factory,
        inputs=specs,
        runs=runs,
        trust_pickle=trust_pickle,
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


def _print_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=2))


def _write_json(path: Path, value: Any) -> None:
    try:
        path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise OutputError(
            f"{str(path)!r} cannot be written: {error.strerror}. Choose another --out."
        ) from error


if __name__ == "__main__":
    main()
