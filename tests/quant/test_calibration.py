from __future__ import annotations

import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from compress.data import Data, load_data
from compress.errors import DataError
from compress.model import Model
from compress.progress import Tracker
from compress.reference import reference_session, run
from quant import calibration
from quant.calibration import observe

BODY = "[a] c = Conv<pads=[1,1,1,1]>(x, w) [r] d = Relu(c) [b] y = Conv(d, v)"
NAMES = ("x", "c", "d", "y")


@pytest.fixture(scope="module")
def model(onnx_model: Callable[..., Model]) -> Model:
    text = f"g (float[batch,3,8,8] x) => (float[batch,4,6,6] y) {{{BODY}}}"
    return onnx_model(text, w=(8, 3, 3, 3), v=(4, 8, 3, 3))


@pytest.fixture(scope="module")
def fixed(onnx_model: Callable[..., Model]) -> Model:
    text = f"g (float[4,3,8,8] x) => (float[4,4,6,6] y) {{{BODY}}}"
    return onnx_model(text, w=(8, 3, 3, 3), v=(4, 8, 3, 3))


def images(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, 3, 8, 8)).astype(np.float32)


def data_of(model: Model, count: int, seed: int = 0) -> Data:
    return load_data(images(count, seed), model.inputs)


def as_dicts(found: dict[str, calibration.HistogramObserver]) -> dict[str, object]:
    return {name: observer.to_dict() for name, observer in found.items()}


def test_streaming_equals_one_look_at_everything(model: Model) -> None:
    x = images(70)
    found = observe(model, NAMES, load_data(x, model.inputs), samples=70)
    graph = calibration._with_outputs(model.graph_model, NAMES)
    runtime = reference_session(graph, optimize=True)
    pieces = [{"x": part} | run(runtime, {"x": part}) for part in np.split(x, [32, 64])]
    for name, observer in found.items():
        whole = calibration.HistogramObserver(name)
        whole.update(np.concatenate([piece[name] for piece in pieces]))
        streamed = calibration.HistogramObserver(name)
        for piece in pieces:
            streamed.update(piece[name])
        assert observer.to_dict() == streamed.to_dict()
        # Only the moving averages depend on how the data are cut.
        averages = {"average_low": whole.average_low, "average_high": whole.average_high}
        assert {**observer.to_dict(), **averages} == whole.to_dict()


def test_observers_see_the_range_of_the_float_model(model: Model) -> None:
    x = images(40)
    found = observe(model, ["y", "x"], load_data(x, model.inputs), samples=40)
    y = run(reference_session(model.graph_model), {"x": x})["y"]
    assert (found["x"].low, found["x"].high) == (x.min(), x.max())
    assert (found["y"].low, found["y"].high) == pytest.approx((y.min(), y.max()), rel=1e-5)


@pytest.mark.parametrize("samples", [1, 7, 32, 33, 50, 1000])
def test_samples_are_honoured_exactly(model: Model, samples: int) -> None:
    found = observe(model, ["x"], data_of(model, 50), samples=samples)
    assert found["x"].count == min(samples, 50) * 3 * 8 * 8


def test_a_fixed_batch_uses_whole_batches(fixed: Model) -> None:
    found = observe(fixed, ["x", "y"], data_of(fixed, 11), samples=11)
    assert found["x"].count == 8 * 3 * 8 * 8
    assert found["y"].count == 8 * 4 * 6 * 6


def test_too_few_samples_for_a_fixed_batch(fixed: Model) -> None:
    with pytest.raises(DataError, match="takes batches of 4") as caught:
        observe(fixed, ["x"], data_of(fixed, 3), samples=3)
    assert "3 samples" in str(caught.value)


def test_a_scalar_input_has_no_batch(onnx_model: Callable[..., Model]) -> None:
    body = "[m] z = Mul(x, s) [a] y = Conv(z, w)"
    model = onnx_model(
        f"g (float s, float[batch,3,8,8] x) => (float[batch,4,6,6] y) {{{body}}}", w=(4, 3, 3, 3)
    )
    data = load_data({"s": np.float32(2), "x": images(40)}, model.inputs)
    found = observe(model, ["z", "s"], data, samples=35)
    assert found["z"].count == 35 * 3 * 8 * 8
    assert found["z"].high == pytest.approx(2 * images(40)[:35].max())


def test_a_network_that_overflows_is_refused(onnx_model: Callable[..., Model]) -> None:
    text = "g (float[batch,3,8,8] x) => (float[batch,3,8,8] y) {[e] e = Exp(x) [f] y = Exp(e)}"
    model = onnx_model(text)
    with pytest.raises(DataError, match="NaN or infinity in tensor 'y'"):
        observe(model, ["e", "y"], load_data(images(4) + 5, model.inputs), samples=4)


def test_progress_counts_samples(model: Model) -> None:
    seen: list[float] = []

    @contextmanager
    def progress(title: str, total: float | None = None) -> Iterator[Tracker]:
        def advance(advance: float = 1, note: str = "") -> None:
            seen.append(advance)

        assert (title, total) == ("Calibrate", 50)
        yield advance

    observe(model, ["x"], data_of(model, 50), samples=50, progress=progress)
    assert sum(seen) == 50


def test_zero_bins_keep_the_range_only(model: Model) -> None:
    found = observe(model, ["y"], data_of(model, 8), samples=8, bins=0)
    assert found["y"].counts.size == 0
    assert found["y"].low < 0 < found["y"].high


def counting(model: Model, count: int) -> tuple[Data, list[int]]:
    """Data that note every pass over them; the first is the check when they are opened."""
    passes: list[int] = []

    def batches() -> Iterator[np.ndarray]:
        passes.append(1)
        yield images(count)

    return load_data(batches, model.inputs), passes


def test_the_second_time_statistics_come_from_the_cache(model: Model, tmp_path: Path) -> None:
    data, passes = counting(model, 12)
    first = observe(model, NAMES, data, samples=12, cache=tmp_path)
    read = len(passes)
    second = observe(model, NAMES, data, samples=12, cache=tmp_path)
    assert len(passes) == read
    assert as_dicts(first) == as_dicts(second)
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("change", ["weights", "data", "samples", "bins", "tensors", "attribute"])
def test_the_cache_knows_what_it_was_made_from(
    model: Model, tmp_path: Path, change: str, onnx_model: Callable[..., Model]
) -> None:
    observe(model, ["y"], data_of(model, 12), samples=12, cache=tmp_path)
    settings: dict[str, int] = {"samples": 12, "bins": 2048}
    names, data, other = ["y"], data_of(model, 12), model
    if change == "weights":
        text = f"g (float[batch,3,8,8] x) => (float[batch,4,6,6] y) {{{BODY}}}"
        other = onnx_model(text, w=(8, 3, 3, 3), v=np.ones((4, 8, 3, 3), np.float32))
    elif change == "data":
        data = data_of(model, 12, seed=1)
    elif change == "tensors":
        names = ["y", "c"]
    elif change == "attribute":
        body = BODY.replace("pads=[1,1,1,1]", "pads=[2,2,0,0]")
        text = f"g (float[batch,3,8,8] x) => (float[batch,4,6,6] y) {{{body}}}"
        other = onnx_model(text, w=(8, 3, 3, 3), v=(4, 8, 3, 3))
    else:
        settings[change] //= 2
    cached = observe(other, names, data, cache=tmp_path, **settings)
    assert as_dicts(cached) == as_dicts(observe(other, names, data, **settings))
    assert len(list(tmp_path.iterdir())) == (1 if change == "tensors" else 2)


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "null", '{"y": 1}', '{"y": {"low": 0}}', '{"other": {}}', "\xff"],
    ids=["empty", "cut", "list", "null", "number", "fields missing", "other tensor", "bytes"],
)
def test_a_damaged_cache_is_ignored(model: Model, tmp_path: Path, content: str) -> None:
    expected = observe(model, ["y"], data_of(model, 8), samples=8, cache=tmp_path)
    (file,) = tmp_path.iterdir()
    file.write_bytes(content.encode("latin-1"))
    found = observe(model, ["y"], data_of(model, 8), samples=8, cache=tmp_path)
    assert as_dicts(found) == as_dicts(expected)


def test_a_cache_that_cannot_be_written_is_no_error(model: Model, tmp_path: Path) -> None:
    # A file where the folder should be: refused to root as well, unlike a read-only folder.
    blocked = tmp_path / "file"
    blocked.write_text("")
    found = observe(model, ["y"], data_of(model, 8), samples=8, cache=blocked / "cache")
    assert found["y"].count == 8 * 4 * 6 * 6


def test_memory_does_not_grow_with_the_data(model: Model) -> None:
    def batches(count: int) -> Callable[[], Iterator[np.ndarray]]:
        return lambda: (images(16, seed) for seed in range(count // 16))

    def peak_bytes(count: int) -> int:
        data = load_data(batches(count), model.inputs)
        tracemalloc.start()
        observe(model, NAMES, data, samples=count)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak

    peak_bytes(32)  # imports and caches of the first call
    assert peak_bytes(512) < 1.25 * peak_bytes(64)


def test_batches_shrink_for_large_activations(onnx_model: Callable[..., Model]) -> None:
    def size(side: int, samples: int) -> int:
        text = f"g (float[batch,3,{side},{side}] x) => (float[batch,3,{side},{side}] y)"
        return calibration._batch_size(onnx_model(f"{text} {{y = Relu(x)}}"), ["x", "y"], samples)

    assert size(8, samples=128) == 32
    assert size(8, samples=5) == 5
    # 2 tensors of 3 x 1500 x 1500 float32 are 54 MB a sample, and the budget is 256 MB.
    assert size(1500, samples=128) == 4
    assert size(10_000, samples=128) == 1
