"""ExecuTorch in a process that others use too: its imports, its output and its threads.

Importing it configures the root logger and the environment, it writes to the terminal from native
code, and all its programs share one thread pool. None of that may reach the user or the other
runtimes.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import sys
import tempfile
import threading
import warnings
from collections.abc import Iterator, Sequence
from typing import IO, Any

import numpy as np
import torch

_LOCK = threading.RLock()
"""One program runs at a time: all share the threads, and calls hold Python's lock anyway."""


@contextlib.contextmanager
def _untouched() -> Iterator[None]:
    """Leave warnings, the root logger and the environment as they were before."""
    root = logging.getLogger()
    handlers, level, environment = list(root.handlers), root.level, dict(os.environ)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        root.handlers[:], root.level = handlers, level
        for added in os.environ.keys() - environment.keys():
            del os.environ[added]


@contextlib.contextmanager
def quiet() -> Iterator[IO[bytes]]:
    """Keep warnings, logs and native output off the terminal; what was written can be read.

    Output of other threads of this process is kept back as well, for as long as this takes.
    """
    log = logging.getLogger("executorch")
    before, streams = log.level, [one for one in (sys.stdout, sys.stderr) if one is not None]
    with _LOCK, tempfile.TemporaryFile() as written, _untouched():
        log.setLevel(logging.CRITICAL)
        for stream in streams:
            stream.flush()
        kept = [os.dup(number) for number in (1, 2)]
        try:
            for number in (1, 2):
                os.dup2(written.fileno(), number)
            yield written
        finally:
            for stream in streams:
                stream.flush()
            for number, copy in zip((1, 2), kept, strict=True):
                os.dup2(copy, number)
                os.close(copy)
            log.setLevel(before)


def imported(name: str) -> Any:
    """A module of executorch, without what its import writes and sets."""
    if name in sys.modules:
        return sys.modules[name]
    with quiet():
        return importlib.import_module(name)


def last_words(written: IO[bytes]) -> str:
    """The last line of native output, for an error that does not tell enough; or ""."""
    written.seek(0)
    lines = written.read().decode(errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


class _Threads:
    """The thread pool: one for all programs, and a program keeps the pool that it was loaded with.

    Attributes:
        generation: grows with every new pool, which leaves programs of the one before unusable.
    """

    def __init__(self) -> None:
        self.generation = 0
        self._started = False

    def use(self, count: int) -> int:
        """Have a pool of that size; its generation."""
        runtime = imported("executorch.extension.pybindings.portable_lib")
        if not self._started:
            with quiet():  # the first look makes the pool
                runtime._threadpool_get_thread_count()
            self._started = True
        if runtime._threadpool_get_thread_count() != count:
            with quiet():
                runtime._unsafe_reset_threadpool(count)
            self.generation += 1
        return self.generation


_THREADS = _Threads()


class Method:
    """A program in memory, ready to run with a number of threads."""

    def __init__(self, data: bytes, threads: int) -> None:
        """Load it.

        Args:
            data: the program.
            threads: of one call; this process runs all programs with those of the last call.

        Raises:
            RuntimeError: the runtime refuses the program.
        """
        self._data, self._threads, self._generation = data, threads, 0
        self._method: Any = None
        with _LOCK:
            self._ready()

    def __call__(self, arguments: Sequence[torch.Tensor]) -> list[np.ndarray]:
        """Run once.

        Raises:
            RuntimeError: the runtime fails.
        """
        with _LOCK:
            self._ready()
            # The runtime gives copies: the next call writes elsewhere.
            return [output.numpy() for output in self._method.execute(list(arguments))]

    def _ready(self) -> None:
        """Load the program again if another number of threads was used in between."""
        generation = _THREADS.use(self._threads)
        if self._method is None or self._generation != generation:
            self._method = None
            runtime = imported("executorch.runtime").Runtime.get()
            with quiet() as written:
                try:
                    self._method = runtime.load_program(self._data).load_method("forward")
                except Exception as error:
                    raise RuntimeError(f"{error} {last_words(written)}") from error
            self._generation = generation
