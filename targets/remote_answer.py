"""What a device sends: read as from a stranger, numbers checked and nothing unpickled."""

from __future__ import annotations

import io
import json
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from compress.errors import DeviceError
from compress.latency import Blocks
from compress.model import Arrays
from compress.remote import Answer, Packed
from targets.process import Ran
from targets.remote_folder import SAYS
from targets.remote_runner import MARK

_FACTS = ("cpu", "architecture", "cores", "load", "os", "python", "versions")
_MOST_FACTS = 10_000
_OUTPUT = re.compile(r"\d+/output-\d+\.npy")


def lines_of(out: bytes) -> dict[str, list[str]]:
    """Lines that begin with `SAYS`, by their first word; start-up files may print others."""
    said: dict[str, list[str]] = defaultdict(list)
    for line in out.decode(errors="replace").replace("\r", "").splitlines():
        if line.startswith(SAYS):
            key, _, rest = line.removeprefix(SAYS).partition(" ")
            said[key].append(rest)
    return said


def result_of(ran: Ran, address: str) -> Mapping[str, Any]:
    """The JSON object that the runner printed.

    Raises:
        DeviceError: there is none.
    """
    lines = ran.out.decode(errors="replace").splitlines()
    line = next((one for one in reversed(lines) if one.startswith(MARK)), "")
    try:
        result = json.loads(line.removeprefix(MARK))
    except ValueError:
        result = None
    if not isinstance(result, dict):
        said = " ".join(ran.err.split())[-300:]
        raise DeviceError(f"{address} sent no result of the measurement. It said: {said or '-'}")
    return result


def answer_of(result: Mapping[str, Any], runs: Sequence[Packed], address: str) -> Answer:
    """The numbers.

    Raises:
        DeviceError: they make no sense.
    """
    names = {one.name for one in runs}
    try:
        sessions = [
            {name: _blocks(values) for name, values in session.items() if name in names}
            for session in result["sessions"]
        ]
        rounds = [{len(one.medians_ms) for one in session.values()} for session in sessions]
        if any(len(found) != 1 for found in rounds):
            raise ValueError("a model has other rounds than the others")
        failures = {name: str(result["failures"][name])[:500] for name in result["failures"]}
        machine = {name: result["machine"][name] for name in _FACTS if name in result["machine"]}
        seconds = float(result["seconds"])
        if len(json.dumps([machine, seconds], allow_nan=False)) > _MOST_FACTS:
            raise ValueError("it tells more about itself than anybody asked for")
        return Answer(sessions, {}, failures, machine, seconds)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DeviceError(f"{address} sent numbers that make no sense: {error!r}.") from error


def _blocks(values: Mapping[str, Any]) -> Blocks:
    medians, p90 = np.asarray(values["medians_ms"], np.float64), float(values["p90_ms"])
    if (
        medians.ndim != 1
        or not medians.size
        or not np.all(np.isfinite(medians) & (medians > 0))
        or not 0 < p90 < 1e9
    ):
        raise ValueError("a time is no positive number")
    return Blocks(medians, p90, int(values["runs"]), bool(values["warm"]))


def files_of(result: Mapping[str, Any], packed: Packed, address: str) -> list[tuple[str, int]]:
    """Names and sizes of the outputs of one model; empty where it failed.

    Raises:
        DeviceError: they are no names of outputs, or much larger than the outputs here.
    """
    try:
        files = [(str(name), int(size)) for name, size in result["outputs"].get(packed.name, [])]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DeviceError(f"{address} sent no list of outputs: {error!r}.") from error
    most = 2 * packed.output_bytes + 4096 * len(packed.outputs)
    strange = [name for name, size in files if not _OUTPUT.fullmatch(name) or size < 0]
    if strange or sum(size for _, size in files) > most:
        raise DeviceError(f"{address} has other outputs of {packed.name} than this one: {files}")
    return files


def arrays_of(
    content: bytes, files: Sequence[tuple[str, int]], packed: Packed, address: str
) -> Arrays:
    """Outputs by name from the `.npy` files one after the other.

    Raises:
        DeviceError: they are no arrays, or not as many as there should be.
    """
    arrays, start = [], 0
    try:
        for _, size in files:
            stream = io.BytesIO(content[start : start + size])
            arrays.append(np.lib.format.read_array(stream, allow_pickle=False))
            start += size
        return dict(zip(packed.outputs, arrays, strict=True))
    except ValueError as error:
        raise DeviceError(f"{address} sent damaged outputs of {packed.name}: {error}") from error
