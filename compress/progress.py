"""Progress of long steps: one callable that makes a tracker, silent by default."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol


class Tracker(Protocol):
    """Receives how far a step has come."""

    def __call__(self, advance: float = 1, note: str = "") -> None:
        """Move on by `advance` units; `note` replaces the text beside the bar."""


class Progress(Protocol):
    """Opens a tracker for one long step; leaving the context ends the step."""

    def __call__(self, title: str, total: float | None = None) -> AbstractContextManager[Tracker]:
        """`total` in units of the tracker's `advance`; None where nobody knows."""


def _ignore(advance: float = 1, note: str = "") -> None:
    return None


@contextmanager
def silent(title: str, total: float | None = None) -> Iterator[Tracker]:
    """Progress that shows nothing: the default of the Python API."""
    yield _ignore


@contextmanager
def terminal(title: str, total: float | None = None) -> Iterator[Tracker]:
    """A rich progress bar on stderr; on something that is not a terminal, one line per step."""
    import rich.console
    import rich.progress as bars

    console = rich.console.Console(stderr=True)
    if not console.is_terminal:
        console.print(title, highlight=False)
        yield _ignore
        return
    columns = (
        bars.TextColumn("{task.description}"),
        bars.BarColumn(),
        bars.TaskProgressColumn(),
        bars.TimeElapsedColumn(),
        bars.TimeRemainingColumn(),
        bars.TextColumn("{task.fields[note]}"),
    )
    with bars.Progress(*columns, console=console) as live:
        task = live.add_task(title, total=total, note="")

        def advance(advance: float = 1, note: str = "") -> None:
            if note:
                live.update(task, advance=advance, note=note)
            else:
                live.update(task, advance=advance)

        yield advance
        if total is not None:
            live.update(task, completed=total)
