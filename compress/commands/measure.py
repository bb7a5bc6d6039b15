"""Commands that measure finished models: bench, compare, check, baseline."""

from __future__ import annotations

import os

import typer

from compress.commands import options
from compress.commands.app import command, input_specs, numbers, print_json, print_lines, progress
from compress.errors import OutputError
from compress.exits import CANNOT_TELL, NOT_MET, explain


@command(
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
            progress=progress(),
        )
        if as_json:
            print_json({"devices": [one.to_dict() for one in found]})
        else:
            render.on_devices(found)
        return
    comparison = measure_all(
        [first, *(others or [])],
        threads=threads,
        batch=batch,
        seconds=seconds,
        seed=seed,
        progress=progress(),
    )
    if as_json:
        print_json(comparison.to_dict())
    else:
        render.latency(comparison)


@command(
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
    means, deviations = numbers(mean, "--mean"), numbers(std, "--std")
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
        progress=progress(),
    )
    if as_json:
        print_json(result.to_dict())
    else:
        render.side_by_side(result)


@command(
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
        specs, means, deviations = (
            input_specs(inputs),
            numbers(mean, "--mean"),
            numbers(std, "--std"),
        )
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
            progress=progress(),
        )
    except (Exception, KeyboardInterrupt) as error:
        _, message = explain(error)
        try:
            print_lines(publish_error(candidate, message, os.environ, **files), as_json)
        except OutputError as second:
            typer.secho(str(second), err=True, fg=typer.colors.RED)
        raise
    if as_json:
        print_json(result.to_dict())
    else:
        from compress import render

        render.check(result)
    print_lines(publish(result, os.environ, **files), as_json)
    if result.verdict == "cannot tell":
        typer.secho(f"Attention: {result.headline}", err=True, fg=typer.colors.YELLOW)
    if not result.ok:
        raise typer.Exit(NOT_MET if result.verdict == "fail" else CANNOT_TELL)


@command(
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
    specs, means, deviations = input_specs(inputs), numbers(mean, "--mean"), numbers(std, "--std")
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
        progress=progress(),
    )
    if as_json:
        import dataclasses

        print_json({"directory": str(directory), "record": dataclasses.asdict(record)})
    else:
        from compress import render

        render.baseline(record)
        typer.echo(f"Baseline: {directory}")
        if budget is not None:
            typer.echo(f"Budget: {budget}")
