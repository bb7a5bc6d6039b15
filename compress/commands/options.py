"""Arguments and options of the command line: what each is called and what its help says."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

Source = Annotated[
    str | None,
    typer.Argument(
        metavar="MODEL",
        help="ONNX, torch.export (.pt2), TorchScript, a pickled module of torch.nn classes, or a "
        "state_dict (then --model says what builds the network).",
        show_default=False,
    ),
]
Sources = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="MODEL",
        help="As for `run`; with --build-predictor any number of them, which it then knows best.",
        show_default=False,
    ),
]
Built = Annotated[
    str,
    typer.Argument(metavar="A", help="An artifact directory or a model file.", show_default=False),
]
Explained = Annotated[
    str,
    typer.Argument(
        metavar="A", help="An artifact directory, or a compressed model file.", show_default=False
    ),
]
Original = Annotated[
    str | None,
    typer.Option(
        metavar="MODEL",
        help="The original: a model file or an artifact.  [default: the file that the artifact "
        "was made from, if it is still there]",
    ),
]
ExplainedBatch = Annotated[
    int | None,
    typer.Option("--batch", metavar="N", min=1, help="Samples of one run.  [default: as made]"),
]
Quick = Annotated[
    bool,
    typer.Option(
        "--quick",
        help="One session, without what is measured besides: memory and arithmetic of this "
        "machine, widths, threads, a batch.",
    ),
]
MarkdownFile = Annotated[
    Path | None,
    typer.Option("--markdown", metavar="FILE", help="Write Markdown, as for a pull request."),
]
PreparedDirectory = Annotated[
    Path,
    typer.Argument(
        metavar="DIR",
        help="What `compress run` wrote for a target that is built on another machine.",
        show_default=False,
    ),
]
Factory = Annotated[
    str | None,
    typer.Option(
        "--model",
        metavar="MODULE:FACTORY",
        help="Callable that builds the network, for example torchvision.models:resnet18.",
    ),
]
Inputs = Annotated[
    list[str] | None,
    typer.Option(
        "--input",
        metavar="[NAME:]SHAPE[:DTYPE]",
        help="Input shape where the file has none: 1x3x224x224 or ids:1x128:int64. Repeatable.",
    ),
]
TargetName = Annotated[
    str, typer.Option("--target", metavar="NAME", help="Where it will run; see `targets`.")
]
Threads = Annotated[
    int | None,
    typer.Option(metavar="N", min=1, help="Threads of the runtime.  [default: all usable cores]"),
]
TrustPickle = Annotated[
    bool,
    typer.Option("--trust-pickle", help="Load a pickle that can run code. Only for your own."),
]
Layout = Annotated[
    Literal["auto", "nchw", "nhwc"], typer.Option(help="Axes of the images in the data.")
]
Mean = Annotated[
    str | None,
    typer.Option(metavar="M[,M...]", help="Subtracted from the data, one or per channel."),
]
Std = Annotated[
    str | None,
    typer.Option(metavar="S[,S...]", help="Divides the data, one or per channel."),
]
Evaluate = Annotated[
    str | None,
    typer.Option(
        "--eval",
        metavar="DATA",
        help="Labelled data for top-1, or MODULE:FUNCTION that gets the engine and returns a "
        "number.",
    ),
]
Seconds = Annotated[float, typer.Option(metavar="S", min=0.1, help="Measuring time in all.")]
Seed = Annotated[int, typer.Option(metavar="N", min=0, help="Seed of everything random.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else on stdout.")]
Bits = Annotated[
    str | None,
    typer.Option(
        metavar="N",
        help="Bits of weights and activations: 8; 16 (bfloat16); 4 (weights only, for size); auto; "
        "several, such as 4,8, to choose from for each operator; with --simulate also 2 to 7 and "
        "fp8, fp4.  [default: 8]",
    ),
]
ActivationBits = Annotated[
    str | None,
    typer.Option(metavar="N", help="Bits of activations where they differ; with --simulate."),
]
Simulate = Annotated[
    bool,
    typer.Option(
        "--simulate", help="Emulate formats that the target does not have: accuracy, not speed."
    ),
]
Reparam = Annotated[
    Literal["auto", "off", "all"] | None,
    typer.Option(
        help="Merge branches and chains of layers into one: where it cannot cost time, never, or "
        "wherever it is exact.  [default: auto]"
    ),
]
Train = Annotated[
    str | None,
    typer.Option(
        metavar="DATA",
        help="Data to train with if nothing cheaper repairs the accuracy; labels help.",
    ),
]
Sensitivity = Annotated[
    bool,
    typer.Option(
        "--sensitivity", help="Measure what each operator loses in int8: a table and a plot."
    ),
]
RepairTime = Annotated[
    float | None,
    typer.Option(
        "--repair-time",
        metavar="S",
        min=0,
        help="Seconds to repair accuracy where int8 loses more than --max-drop; 0 repairs "
        "nothing.  [default: 300]",
    ),
]
Calibration = Annotated[
    str | None,
    typer.Option(
        metavar="DATA",
        help=".npz, image folder, torch tensor file or MODULE:FUNCTION; without it, ranges "
        "come from the BatchNorm statistics and the report says so.",
    ),
]
MaxDrop = Annotated[
    str | None,
    typer.Option(metavar="X", help="Largest loss: 0.5% is points, 0.5%rel is relative."),
]
MinSpeedup = Annotated[
    float | None, typer.Option(metavar="S", help="Smallest gain, for example 1.5.")
]
Patches = Annotated[
    bool,
    typer.Option(
        "--patches", help="Also the peak with the first stage in patches, and what that costs."
    ),
]
MaxMemory = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        help="Most memory of activations at once, weights apart: 320kB, 2MiB.",
    ),
]
Directory = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="Artifact directory.  [default: NAME-TARGET]"),
]
Force = Annotated[bool, typer.Option("--force", help="Replace an existing artifact.")]
RecipeFile = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Passes from a recipe.yaml instead.")
]
Method = Annotated[
    Literal["minmax", "percentile", "mse", "entropy", "moving_average"] | None,
    typer.Option(help="How a range is chosen from the calibration data.  [default: mse]"),
]
CalibrationSamples = Annotated[
    int | None, typer.Option(metavar="N", min=1, help="Samples used at most.  [default: 128]")
]
Batch = Annotated[int, typer.Option(metavar="N", min=1, help="Batch size where it is dynamic.")]
Runs = Annotated[int, typer.Option(metavar="N", min=1, help="Profiled runs.")]
JsonFile = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE", help="Where the rows go as JSON.  [default: NAME-TARGET-profile.json]"
    ),
]
LatencySource = Annotated[
    Literal["auto", "measured", "table", "predicted", "analytical"] | None,
    typer.Option(
        "--source",
        help="Estimate the latency of the whole instead: measured in several sessions, from a "
        "table of sites timed alone, predicted from kernels that other networks taught, or from "
        "measured peaks; auto is predicted where that knows all kernels, else measured.",
        show_default=False,
    ),
]
BuildPredictor = Annotated[
    bool,
    typer.Option(
        "--build-predictor",
        help="Learn the times of this machine's kernels instead, for --source predicted. Goes on "
        "where it was stopped.",
    ),
]
Minutes = Annotated[
    float,
    typer.Option(metavar="M", min=0.05, max=600, help="For --build-predictor, all runtimes."),
]
PredictorFile = Annotated[
    Path | None,
    typer.Option(
        "--predictor",
        metavar="FILE",
        help="For --source predicted.  [default: this machine's in the cache]",
    ),
]
Others = Annotated[
    list[str] | None,
    typer.Argument(metavar="B", help="More of them, compared with A."),
]
Addresses = Annotated[
    list[str] | None,
    typer.Option(
        "--device",
        metavar="ADDRESS",
        help="Measure there: ssh://user@host[:port] or adb://serial; ?python=/path/to/python "
        "behind it names another Python. Repeatable.",
    ),
]
Second = Annotated[str, typer.Argument(metavar="B", help="The other one.", show_default=False)]

# For `run`, None leaves the word to the recipe and then to the default.
RecipeTarget = Annotated[
    str | None,
    typer.Option(
        "--target", metavar="NAME", help="Where it will run; see `targets`.  [default: cpu]"
    ),
]
TargetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--target-option",
        metavar="NAME=VALUE",
        help="Option of the target, for example workspace_mib=8192. Repeatable.",
    ),
]
RecipeLayout = Annotated[
    Literal["auto", "nchw", "nhwc"] | None,
    typer.Option("--layout", help="Axes of the images in the data.  [default: auto]"),
]
RecipeSeconds = Annotated[
    float | None,
    typer.Option(
        "--seconds", metavar="S", min=0.5, max=3600, help="Measuring time.  [default: 10]"
    ),
]
RecipeSeed = Annotated[
    int | None,
    typer.Option("--seed", metavar="N", min=0, help="Seed of everything random.  [default: 0]"),
]
RecipeBatch = Annotated[
    int | None,
    typer.Option(
        "--batch", metavar="N", min=1, help="Batch size where it is dynamic.  [default: 1]"
    ),
]
Objective = Annotated[
    Literal["latency", "throughput"] | None,
    typer.Option(help="One request at a time, or several in flight.  [default: latency]"),
]
SheetOrDevices = Annotated[
    list[str] | None,
    typer.Option(
        "--device",
        metavar="DEVICE",
        help="Measure the candidates there: ssh://user@host[:port] or adb://serial. Repeatable. Or "
        "the name of a device sheet (`targets --devices`), which adds predicted latencies.",
    ),
]
DeviceSheets = Annotated[bool, typer.Option("--devices", help="List the device sheets instead.")]
Time = Annotated[
    float | None,
    typer.Option(
        "--time",
        metavar="S",
        min=0,
        help="Seconds to look for the fastest placement of int8 and the fastest settings; 0 tries "
        "whole models only.  [default: 60]",
    ),
]
Candidate = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", help="An artifact directory or a model file.", show_default=False
    ),
]
Against = Annotated[
    str | None,
    typer.Option(
        metavar="BASELINE",
        help="A directory that `compress baseline` wrote, an artifact or a model file.",
    ),
]
BudgetFile = Annotated[
    Path | None,
    typer.Option("--budget", metavar="FILE", help="Limits: a budgets.yaml (see examples/ci)."),
]
MaxSlowdown = Annotated[
    str | None,
    typer.Option(
        metavar="X", help="Largest rise of the median latency, such as 5%.  [default: 2.5%]"
    ),
]
CannotTell = Annotated[
    Literal["pass", "fail"],
    typer.Option(help="What becomes of a verdict that stays open when the time is up."),
]
CheckTime = Annotated[
    float,
    typer.Option("--time", metavar="S", min=0.5, max=3600, help="Longest time to measure."),
]
CheckThreads = Annotated[
    int | None,
    typer.Option("--threads", metavar="N", min=1, help="Of both.  [default: as recorded, or all]"),
]
Junit = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Write JUnit XML, one test case per limit.")
]
BaselineDirectory = Annotated[
    Path | None,
    typer.Option("--out", metavar="DIR", help="Directory to write.  [default: NAME-baseline]"),
]
ForceBaseline = Annotated[bool, typer.Option("--force", help="Replace a baseline and a budget.")]
StartingBudget = Annotated[
    Path | None,
    typer.Option("--budget", metavar="FILE", help="Also write limits from what was measured."),
]
Plotted = Annotated[
    Path,
    typer.Argument(
        metavar="DIR|JSON",
        help="An artifact directory, or what `compress profile --out` wrote.",
        show_default=False,
    ),
]
PlottedToo = Annotated[
    list[Path] | None,
    typer.Argument(metavar="[DIR]...", help="More artifacts, with --kind gap.", show_default=False),
]
PlotKinds = Annotated[
    list[str] | None,
    typer.Option(
        "--kind",
        metavar="KIND",
        help="kernels, roofline, waterline, gap, sensitivity or predictions. Repeatable.  "
        "[default: all that there is something for]",
    ),
]
PlotFolder = Annotated[
    Path | None,
    typer.Option(
        "--out",
        metavar="DIR",
        help="Folder of the PNG files.  [default: the artifact, or beside the JSON]",
    ),
]
