"""The `compress` command. Work is imported inside the commands, so that help is instant."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from compress.commands import make, look, measure, about  # isort: skip - the order of the help
from compress.commands.app import app

__all__ = ["about", "app", "look", "main", "make", "measure"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the console script."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if "--debug" in given:
        os.environ["COMPRESS_DEBUG"] = "1"
    app([argument for argument in given if argument != "--debug"], prog_name="compress")


if __name__ == "__main__":
    main()
