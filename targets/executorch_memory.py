"""What ExecuTorch allocates for activations: the program's own plan, and XNNPACK's workspace.

    python -m targets.executorch_memory PROGRAM.pte INPUTS.npz

prints the bytes of the workspace as JSON, in a process without any other program, as programs of
one process may share a workspace.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from compress.errors import EngineError
from targets.executorch_runtime import Method, imported
from targets.heap import heap_in_use

_SECONDS = 120


def planned_bytes(program: bytes) -> int:
    """Buffers that the program's memory plan asks for: inputs, outputs and what lies between."""
    exir = imported("executorch.exir._serialize._program")
    found = exir.deserialize_pte_binary(program).program
    (plan,) = found.execution_plan
    # The first buffer stands for constants and is empty.
    return int(sum(plan.non_const_buffer_sizes))


def workspace_bytes(program: bytes, arguments: Sequence[np.ndarray]) -> int | None:
    """What the first run of a program takes and keeps; None where the C library does not count.

    Raises:
        EngineError: the program does not run.
    """
    if heap_in_use() is None:
        return None
    with tempfile.TemporaryDirectory(prefix="hwcompress-") as folder:
        path, inputs = Path(folder) / "model.pte", Path(folder) / "inputs.npz"
        path.write_bytes(program)
        np.savez(inputs, *arguments)
        command = [sys.executable, "-m", "targets.executorch_memory", str(path), str(inputs)]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=_SECONDS, check=True
            )
            return int(json.loads(done.stdout.splitlines()[-1])["workspace"])
        except (subprocess.SubprocessError, ValueError, LookupError) as error:
            raise EngineError(f"ExecuTorch's workspace cannot be measured: {error}") from error


def main() -> None:
    """Run the program once, and print what that took."""
    import torch

    method = Method(Path(sys.argv[1]).read_bytes(), threads=1)
    with np.load(sys.argv[2]) as arrays:
        arguments = [torch.from_numpy(arrays[f"arr_{i}"]) for i in range(len(arrays.files))]
    before = heap_in_use() or 0
    outputs = method(arguments)
    after = heap_in_use() or 0
    # The outputs are copies for the caller.
    kept = after - before - sum(array.nbytes for array in outputs)
    print(json.dumps({"workspace": max(kept, 0)}))


if __name__ == "__main__":
    main()
