"""How a command ends: exit codes, and exceptions as one paragraph each."""

from __future__ import annotations

from compress.errors import CompressError

NOT_MET = 1
USAGE = 2
UNEXPECTED = 3
PREPARED = 4
"""The input of the build was written; the engine has to be built on another machine."""
CANNOT_TELL = 5
"""`compress check --cannot-tell fail` could not tell, which is neither kept nor broken."""
STOPPED = 130


def explain(error: BaseException) -> tuple[int, str]:
    """Exit code and one paragraph for an exception that ends a command."""
    match error:
        case KeyboardInterrupt():
            return STOPPED, "Stopped; no artifact was written."
        case CompressError():
            return USAGE, f"Error: {error}"
        case OSError():
            where = f" {str(error.filename)!r}" if error.filename else ""
            return USAGE, (
                f"Error: the operating system refused{where}: {error.strerror or error}. "
                f"Check the path, its permissions and the free space, then run it again."
            )
        case _ if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
            return UNEXPECTED, (
                "Error: this machine ran out of memory; nothing was written. Use fewer "
                "--calibration-samples, a smaller --input or a machine with more memory."
            )
        case _:
            return UNEXPECTED, (
                f"Unexpected {type(error).__name__}: {str(error).strip() or 'no message'}. This "
                f"is a defect of hwcompress or of a library below it. Run the same command with "
                f"--debug and report the traceback together with `compress doctor --json`."
            )
