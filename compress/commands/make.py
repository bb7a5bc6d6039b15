"""Commands that make an artifact: run, build."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from compress.commands import options
from compress.commands.app import command, input_specs, numbers, print_json, progress
from compress.errors import UsageError
from compress.exits import NOT_MET, PREPARED

if TYPE_CHECKING:
    from compress.report import Report

_LITTLE = 1.1
"""A speed-up below this makes one ask why."""


@command(
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
    reparam: options.Reparam = None,
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
    specs, means, deviations = input_specs(inputs), numbers(mean, "--mean"), numbers(std, "--std")
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
        progress=progress(),
    )
    if as_json:
        print_json(
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


@command(
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
    means, deviations = numbers(mean, "--mean"), numbers(std, "--std")
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
        progress=progress(),
    )
    if as_json:
        print_json({"met": report.met, "directory": str(directory), "report": report.to_dict()})
    else:
        from compress import render
        from compress.report.terminal import render as render_report

        render_report(report, render.console())
        typer.echo(f"Artifact: {directory}")
    if not report.met:
        raise typer.Exit(NOT_MET)


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


def _explain_hint(report: Report, directory: Path) -> str:
    """Where to ask why it is not faster; "" where it is, or where nothing was measured."""
    if not report.built or not report.chosen:
        return ""
    speedup = report.candidate(report.chosen).speedup
    if speedup is not None and speedup["value"] >= _LITTLE:
        return ""
    return f"Why it is not faster: compress explain {directory}"
