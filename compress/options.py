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
Built = Annotated[
    str,
    typer.Argument(metavar="A", help="An artifact directory or a model file.", show_default=False),
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
