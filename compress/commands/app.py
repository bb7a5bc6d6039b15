"""What the commands share: the application, errors as sentences, options as values, output."""

from __future__ import annotations

import functools
import json
import os
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ParamSpec

import typer

from compress.errors import OutputError, UsageError
from compress.exits import explain

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
    2 wrong usage or input, 3 unexpected error, 4 prepared for `compress build`,
    5 `compress check --cannot-tell fail` could not tell, 130 stopped.
    """


def command(name: str, *examples: str) -> Callable[[Callable[P, None]], Callable[P, None]]:
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


def input_specs(texts: list[str] | None) -> tuple[TensorSpec, ...]:
    """Shapes of --input."""
    from compress.model import TensorSpec

    return tuple(TensorSpec.parse(text) for text in texts or ())


def numbers(text: str | None, option: str) -> tuple[float, ...] | None:
    """Numbers between commas.

    Raises:
        UsageError: they are none.
    """
    if text is None:
        return None
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise UsageError(
            f"{option} {text!r} is not a number or a comma-separated list of numbers. Write one "
            f"for all channels or one for each, for example {option} 0.485,0.456,0.406."
        ) from None


def progress() -> Progress:
    """Progress bars on stderr."""
    from compress.progress import terminal

    return terminal


def print_lines(lines: Sequence[str], to_stderr: bool) -> None:
    """Workflow commands, which the runner reads from either stream."""
    for line in lines:
        typer.echo(line, err=to_stderr)


def print_json(value: Any) -> None:
    """JSON on stdout."""
    typer.echo(json.dumps(value, indent=2))


def write_json(path: Path, value: Any) -> None:
    """JSON into a file, whole or not at all."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
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
