"""Measuring on other machines: the same models and inputs, timed where they will run.

A device is found by the scheme of its address, `ssh://user@host` or `adb://serial`, through the
entry points `compress.devices`. Several devices work at the same time; one that drops out costs
its own numbers and nothing else.
"""

from __future__ import annotations

import dataclasses
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeVar, cast

from compress.errors import CompressError, DeviceError, UsageError
from compress.progress import Progress, silent
from compress.registry import available

if TYPE_CHECKING:
    from compress.fidelity import OutputFidelity
    from compress.latency import Blocks, Comparison
    from compress.model import Arrays
    from compress.target import Engine

T = TypeVar("T")
_PLAIN = (str, int, float, type(None))


@dataclass(frozen=True)
class Artifact:
    """A built model, and the settings that its runtime gets on the device."""

    engine: Engine
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Packed:
    """An artifact as it travels.

    Attributes:
        name: in tables.
        files: that the runtime needs, the model itself first.
        settings: plain values of the runtime's own; None means its default.
        inputs: names in the order of the model's arguments.
        outputs: names in the order of the model's results.
        output_bytes: of all outputs of one call here.
    """

    name: str
    files: tuple[Path, ...]
    settings: Mapping[str, Any]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    output_bytes: int


@dataclass(frozen=True)
class Job:
    """What a device is to measure.

    Attributes:
        artifacts: timed in turns; the first is the baseline.
        inputs: of one call, by name; real arrays, no pickles.
        seconds: of measuring, all artifacts and sessions together.
        sessions: how often every artifact is loaded anew.
        seed: of the order of the blocks.
    """

    artifacts: tuple[Packed, ...]
    inputs: Arrays
    seconds: float
    sessions: int = 1
    seed: int = 0


@dataclass(frozen=True)
class Answer:
    """What a device sends back.

    Attributes:
        sessions: for each one the blocks by name of artifact.
        outputs: by name of artifact, of one call; left out where the runner cannot write them.
        failures: why an artifact could not be run there, by its name.
        machine: what is known about the device.
        seconds: that measuring took there.
        notes: sentences for the reader.
    """

    sessions: Sequence[Mapping[str, Blocks]]
    outputs: Mapping[str, Arrays]
    failures: Mapping[str, str]
    machine: Mapping[str, Any]
    seconds: float
    notes: tuple[str, ...] = ()


class Device(Protocol):
    """A machine that is reached through a command of this one."""

    name: ClassVar[str]
    """The scheme of its addresses."""

    @property
    def address(self) -> str:
        """What errors and tables call it."""

    @classmethod
    def parse(cls, text: str) -> Device:
        """Read an address.

        Raises:
            UsageError: it is none, or holds something that a command could take for an option.
        """

    def check(self, stop: threading.Event) -> None:
        """See whether it answers and can measure anything.

        Raises:
            DeviceError: it does not.
        """

    def measure(self, job: Job, stop: threading.Event) -> Answer:
        """Copy, run, fetch and clean up; gives up soon once `stop` is set.

        Raises:
            DeviceError: it dropped out, or the baseline cannot be run there.
        """


@dataclass(frozen=True)
class OnDevice:
    """What measuring on one device found.

    Attributes:
        device: its address.
        comparison: latencies there; None where it dropped out.
        closeness: how close its outputs are to this machine's, by artifact.
        failures: why an artifact could not be run there, by its name.
        machine: what is known about the device.
        error: why it dropped out, or "".
    """

    device: str
    comparison: Comparison | None = None
    closeness: Mapping[str, OutputFidelity] = field(default_factory=dict)
    failures: Mapping[str, str] = field(default_factory=dict)
    machine: Mapping[str, Any] = field(default_factory=dict)
    error: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; an infinite figure becomes None."""
        close = {name: _finite(dataclasses.asdict(one)) for name, one in self.closeness.items()}
        return {
            "device": self.device,
            "comparison": self.comparison.to_dict() if self.comparison else None,
            "closeness": close,
            "failures": dict(self.failures),
            "machine": dict(self.machine),
            "error": self.error,
        }


def parse_device(text: str) -> Device:
    """The device at an address such as `ssh://user@host:22` or `adb://serial`.

    Raises:
        UsageError: no installed kind of device has such addresses.
    """
    scheme, separator, _ = text.partition("://")
    kinds = available("compress.devices")
    if not separator or scheme not in kinds:
        schemes = " or ".join(f"{kind}://..." for kind in kinds) or "none is installed"
        raise UsageError(
            f"--device {text!r} is no address of a device: {schemes}. For example "
            f"ssh://pi@192.168.1.7, or adb://SERIAL with a serial that `adb devices` shows."
        )
    return cast("Device", kinds[scheme].load().parse(text))


def parse_devices(texts: Sequence[str | Device]) -> tuple[Device, ...]:
    """Devices from addresses.

    Raises:
        UsageError: one is no address, or is given twice.
    """
    devices = tuple(parse_device(one) if isinstance(one, str) else one for one in texts)
    addresses = [device.address for device in devices]
    if len(set(addresses)) < len(addresses):
        raise UsageError(
            f"A device is given twice: {', '.join(addresses)}. Two measurements on one device "
            f"would disturb each other."
        )
    return devices


def sheet_and_devices(
    given: str | Device | Sequence[str | Device],
) -> tuple[str | None, tuple[Device, ...]]:
    """The name of a device sheet among them, and the devices that can be measured on.

    Raises:
        UsageError: there are several names, or as `parse_devices`.
    """
    several = [given] if isinstance(given, str) or not isinstance(given, Sequence) else given
    names = [one for one in several if isinstance(one, str) and "://" not in one]
    if len(names) > 1:
        raise UsageError(
            f"--device names {len(names)} device sheets: {', '.join(names)}. Give one, and any "
            f"number of addresses such as ssh://user@host."
        )
    devices = parse_devices([one for one in several if one not in names])
    return (names[0] if names else None), devices


def check_devices(devices: Sequence[Device]) -> None:
    """See before any work whether all of them answer.

    Raises:
        DeviceError: one does not.
    """
    stop = threading.Event()

    def check(device: Device) -> str:
        try:
            device.check(stop)
        except DeviceError as error:
            return str(error)
        return ""

    errors = [error for error in _at_once(devices, check, stop) if error]
    if errors:
        raise DeviceError(" ".join(errors))


def check_reachable(devices: Sequence[Device], objective: str) -> None:
    """As `check_devices`, for what is to be measured on them.

    Raises:
        UsageError: it is throughput.
        DeviceError: one does not answer.
    """
    if not devices:
        return
    if objective != "latency":
        raise UsageError(
            f"--device measures the latency of single requests, and --objective {objective} was "
            f"given. Leave one of them out."
        )
    check_devices(devices)


def measure_on(
    devices: Sequence[str | Device],
    artifacts: Mapping[str, Artifact],
    inputs: Arrays,
    *,
    seconds: float = 10.0,
    sessions: int = 1,
    margin: float = 0.0,
    seed: int = 0,
    progress: Progress = silent,
) -> tuple[OnDevice, ...]:
    """Time artifacts in turns on each device, and compare their outputs with this machine's.

    Args:
        devices: addresses or devices; all work at the same time.
        artifacts: by name; the first is the baseline.
        inputs: of one call, by name.
        seconds: of measuring on each device.
        sessions: how often every artifact is loaded anew within that time.
        margin: "faster" needs an interval above 1 + margin.
        seed: of the order of blocks and the bootstrap.
        progress: opens a tracker in devices.

    Returns:
        One result for each device, in their order; one that dropped out has an `error`.

    Raises:
        UsageError: an address is wrong, a device is given twice, or there is nothing to time.
        EngineError: an artifact cannot be run on this machine.
    """
    found = parse_devices(devices)
    if not found or not artifacts:
        raise UsageError("Give at least one device and at least one artifact to measure on it.")
    expected = {name: one.engine(inputs) for name, one in artifacts.items()}
    stop = threading.Event()
    with (
        tempfile.TemporaryDirectory(prefix="hwcompress-") as folder,
        progress("Measuring on devices", len(found)) as advance,
    ):
        packed = tuple(
            _pack(name, one, expected[name], Path(folder) / str(index))
            for index, (name, one) in enumerate(artifacts.items())
        )
        job = Job(packed, inputs, seconds, sessions, seed)

        def measure(device: Device) -> OnDevice:
            try:
                answer = device.measure(job, stop)
                return _result(device, answer, expected, margin, seed)
            except CompressError as error:
                return OnDevice(device.address, error=str(error))
            finally:
                advance()

        return _at_once(found, measure, stop)


def _at_once(
    devices: Sequence[Device], work: Callable[[Device], T], stop: threading.Event
) -> tuple[T, ...]:
    """One thread for each device; when this one is interrupted, they clean up before it goes on."""
    with ThreadPoolExecutor(len(devices), thread_name_prefix="compress-device") as pool:
        waiting = [pool.submit(work, device) for device in devices]
        try:
            return tuple(one.result() for one in waiting)
        except BaseException:
            stop.set()
            raise


def _pack(name: str, artifact: Artifact, expected: Arrays, folder: Path) -> Packed:
    folder.mkdir()
    engine = artifact.engine
    return Packed(
        name=name,
        files=tuple(engine.save(folder)),
        settings={k: v for k, v in artifact.settings.items() if isinstance(v, _PLAIN)},
        inputs=tuple(spec.name for spec in engine.inputs),
        outputs=tuple(engine.outputs),
        output_bytes=sum(array.nbytes for array in expected.values()),
    )


def _result(
    device: Device, answer: Answer, expected: Mapping[str, Arrays], margin: float, seed: int
) -> OnDevice:
    from compress.fidelity import closeness
    from compress.latency import FEWEST_ROUNDS, summarise
    from compress.sessions import combine

    baseline, sessions = next(iter(expected)), answer.sessions
    if not sessions or any(baseline not in blocks for blocks in sessions):
        reason = answer.failures.get(baseline, "it sent no times.")
        raise DeviceError(f"{device.address} cannot run {baseline}: {reason}")
    found = [
        summarise(
            blocks,
            baseline,
            seconds=answer.seconds / len(sessions),
            min_blocks=FEWEST_ROUNDS,
            margin=margin,
            seed=seed + index,
        )
        for index, blocks in enumerate(sessions)
    ]
    comparison = combine(found, margin=margin)
    notes = (*answer.notes, *comparison.notes)
    close = {
        name: closeness(expected[name], outputs, f"{name} on {device.address}")
        for name, outputs in answer.outputs.items()
    }
    return OnDevice(
        device.address,
        dataclasses.replace(comparison, notes=notes),
        close,
        answer.failures,
        answer.machine,
    )


def _finite(values: dict[str, float]) -> dict[str, float | None]:
    from math import isfinite

    return {name: value if isfinite(value) else None for name, value in values.items()}
