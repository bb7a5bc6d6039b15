"""What networks without labels decide on real data, and how often another engine decides otherwise.

An engine's decisions are integers, one row per image or frame, with 0 where nothing is found. Two
engines are compared where at least one of them finds something, so that the thousands of anchors
in which both rightly see nothing do not count as agreement. The thresholds and the preparation of
the inputs are those of the networks' own demos. Nothing is suppressed as overlapping: an anchor
that crosses the threshold is a change, also where a neighbour shows the same object.
"""

from __future__ import annotations

import wave
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from benchmarks.common import SHARED, shared_module
from compress.export import to_onnx
from compress.loading import load
from compress.model import Arrays
from compress.target import Engine
from targets.onnxruntime import OnnxRuntime

Judge = Callable[[Engine], np.ndarray]
"""Lets an engine decide about all images or frames of one part of the data."""
FRAME, CONTEXT, RATE = 512, 64, 16_000
"""Of the voice detector: new samples in a call, those before them that it sees again, and Hz."""


@dataclass(frozen=True)
class Changed:
    """Decisions that differ from the reference's.

    Attributes:
        points: their share, in percentage points.
        low: lower end of the 95 % interval, from a bootstrap over images or frames.
        high: upper end.
        count: how many differ.
        n: decisions that were compared.
        rows: images or frames in which the reference or the other finds something.
    """

    points: float
    low: float
    high: float
    count: int
    n: int
    rows: int


def changed(reference: np.ndarray, got: np.ndarray) -> Changed:
    """Compare the decisions of two engines on the same data."""
    differing = (reference != got).sum(1)
    compared = ((reference != 0) | (got != 0)).sum(1)
    picked = np.random.default_rng(0).integers(len(reference), size=(2000, len(reference)))
    shares = differing[picked].sum(1) / np.maximum(1, compared[picked].sum(1))
    low, high = np.quantile(shares, (0.025, 0.975)) * 100
    count, n = int(differing.sum()), int(compared.sum())
    return Changed(
        count * 100 / max(1, n), float(low), float(high), count, n, int((compared > 0).sum())
    )


@dataclass(frozen=True)
class Decisions:
    """One network and its data, whose three parts have no image or frame in common.

    Attributes:
        source: the ONNX file.
        inputs: shapes that the file leaves open.
        meaning: what one decision is.
        calibration: samples to calibrate with.
        agreement: share of an engine's decisions that are float32's, for the choice of a candidate.
        test: decisions to report.
    """

    source: Path
    inputs: list[str]
    meaning: str
    calibration: list[Arrays]
    agreement: Callable[[Engine], float]
    test: Judge


def decisions(name: str) -> Decisions:
    """Those of `silero_vad`, `face_rfb320` or `fastestdet`."""
    source = SHARED / "models" / f"{name}.onnx"
    inputs = ["input:1x576", "state:2x1x128", "sr:scalar:int64"] if name == "silero_vad" else []
    exported = to_onnx(load(source, inputs=inputs), 21)
    float32 = OnnxRuntime(threads=1).build(exported)
    if name == "silero_vad":
        audio = _audio()
        first, second = 512 * FRAME, 1024 * FRAME
        calibration = [given for given, _ in _listen(float32, audio[:first])][::4]
        parts = [partial(_speech, audio=part) for part in (audio[first:second], audio[second:])]
        meaning = "speech or not in a frame, threshold 0.5; every engine carries its own state"
    else:
        images, read, meaning = _DETECTORS[name]()
        prepared = [{exported.inputs[0].name: image[None]} for image in images]
        calibration = prepared[:50]
        parts = [
            partial(_found, images=part, read=read) for part in (prepared[50:150], prepared[150:])
        ]
    select, test = parts
    expected = select(float32)

    def agreement(engine: Engine) -> float:
        return 1 - changed(expected, select(engine)).points / 100

    return Decisions(source, inputs, meaning, calibration, agreement, test)


def _audio() -> np.ndarray:
    with wave.open(str(SHARED / "data" / "silero_test.wav")) as file:
        samples = np.frombuffer(file.readframes(file.getnframes()), "<i2")
    return samples.astype(np.float32) / 32768


def _listen(engine: Engine, audio: np.ndarray) -> Iterator[tuple[Arrays, Arrays]]:
    """Inputs and outputs of every frame, the state going from each call to the next."""
    padded = np.concatenate([np.zeros(CONTEXT, np.float32), audio])
    state = np.zeros((2, 1, 128), np.float32)
    for start in range(0, len(audio) - FRAME + 1, FRAME):
        frame = padded[None, start : start + CONTEXT + FRAME]
        given = {"input": frame, "state": state, "sr": np.array(RATE)}
        outputs = engine(given)
        state = outputs["stateN"]
        yield given, outputs


def _speech(engine: Engine, *, audio: np.ndarray) -> np.ndarray:
    """2 for speech and 1 for none: here the absence is a finding as well."""
    return np.stack([1 + (outputs["output"][0] >= 0.5) for _, outputs in _listen(engine, audio)])


def _found(
    engine: Engine, *, images: list[Arrays], read: Callable[[Arrays], np.ndarray]
) -> np.ndarray:
    return np.stack([read(engine(image)) for image in images])


def _images(height: int, width: int) -> np.ndarray:
    """The 250 images in 0..255, stretched as the detectors' demos do, in a random order."""
    images, _ = shared_module("data/load.py").imagenet250(crop=None)
    order = np.random.default_rng(0).permutation(len(images))
    raw = torch.from_numpy((images[order] + 1) * 127.5)
    resized = torch.nn.functional.interpolate(raw, (height, width), mode="bilinear")
    return np.asarray(resized.numpy(), np.float32)


Detector = tuple[np.ndarray, Callable[[Arrays], np.ndarray], str]
"""Images, how to read decisions from the outputs, and what they mean."""


def _face_rfb320() -> Detector:
    images = (_images(240, 320) - 127) / 128
    return images, _faces, "a face at an anchor, score of at least 0.7"


def _faces(outputs: Arrays) -> np.ndarray:
    return (outputs["scores"][0, :, 1] >= 0.7).astype(np.int64)


def _fastestdet() -> Detector:
    images = np.ascontiguousarray(_images(352, 352)[:, ::-1]) / 255  # BGR
    return images, _objects, "an object and its class in a cell, score of at least 0.65"


def _objects(outputs: Arrays) -> np.ndarray:
    """1 + class; the score is objectness^0.6 times class^0.4, as demos of the network have it."""
    objectness, classes = outputs["758"][0, 0], outputs["758"][0, 5:]
    scores = objectness**0.6 * classes.max(0) ** 0.4
    return np.where(scores >= 0.65, 1 + classes.argmax(0), 0).ravel()


_DETECTORS: dict[str, Callable[[], Detector]] = {
    "face_rfb320": _face_rfb320,
    "fastestdet": _fastestdet,
}
