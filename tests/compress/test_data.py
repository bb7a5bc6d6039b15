from __future__ import annotations

import pickle
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from compress.data import load_data
from compress.errors import DataError, UsageError
from compress.model import TensorSpec

IMAGE = TensorSpec("input", ("batch", 3, 8, 10))
GREY = TensorSpec("input", ("batch", 1, 8, 8))
FLAT = TensorSpec("input", (1, 4))
IDS = TensorSpec("ids", ("batch", 5), "int64")

rng = np.random.default_rng(0)
FLOATS = rng.standard_normal((20, 3, 8, 10)).astype(np.float32)
PIXELS = rng.integers(0, 256, (20, 8, 10, 3)).astype(np.uint8)
LABELS = np.arange(20) % 4


class Touch:
    """Would create a file if it were unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def yields_pairs():
    """Batches of another size than anybody asks for, as `module:function` would."""
    for start in range(0, 20, 7):
        yield FLOATS[start : start + 7], LABELS[start : start + 7]


def everything(data, size=6):
    batches = list(data.batches(size))
    assert [len(b) for b in batches[:-1]] == [size] * (len(batches) - 1)
    arrays = {k: np.concatenate([b.inputs[k] for b in batches]) for k in batches[0].inputs}
    if batches[0].labels is None:
        return arrays, None
    return arrays, np.concatenate([b.labels for b in batches])


def saved(path, **arrays):
    np.savez(path, **arrays)
    return path


SOURCES = {
    "npz": lambda tmp: saved(tmp / "d.npz", x=FLOATS, y=LABELS),
    "npz without its suffix": lambda tmp: saved(tmp / "d.npz", x=FLOATS, y=LABELS).rename(
        tmp / "data"
    ),
    "compressed npz": lambda tmp: (
        np.savez_compressed(tmp / "d.npz", x=FLOATS, y=LABELS) or tmp / "d.npz"
    ),
    "npz with the input's name": lambda tmp: saved(tmp / "d.npz", input=FLOATS, y=LABELS),
    "string": lambda tmp: str(saved(tmp / "d.npz", x=FLOATS, y=LABELS)),
    "fortran order": lambda tmp: saved(tmp / "d.npz", x=np.asfortranarray(FLOATS), y=LABELS),
    "tensors": lambda tmp: (
        torch.save((torch.from_numpy(FLOATS), torch.from_numpy(LABELS)), tmp / "d.pt")
        or tmp / "d.pt"
    ),
    "tensors by name": lambda tmp: (
        torch.save({"x": torch.from_numpy(FLOATS), "y": torch.from_numpy(LABELS)}, tmp / "d")
        or tmp / "d"
    ),
    "pair": lambda tmp: (FLOATS, LABELS),
    "pair of tensors": lambda tmp: (torch.from_numpy(FLOATS), torch.from_numpy(LABELS)),
    "column of labels": lambda tmp: (FLOATS, LABELS[:, None]),
    "dict": lambda tmp: {"input": FLOATS, "y": LABELS},
    "channels last": lambda tmp: (FLOATS.transpose(0, 2, 3, 1), LABELS),
    "float64": lambda tmp: (FLOATS.astype(np.float64), LABELS),
    "function": lambda tmp: yields_pairs,
    "loader": lambda tmp: torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(torch.from_numpy(FLOATS), torch.from_numpy(LABELS)),
        batch_size=3,
    ),
}


@pytest.mark.parametrize("make", SOURCES.values(), ids=SOURCES)
def test_every_source_gives_the_same_samples(make, tmp_path):
    data = load_data(make(tmp_path), [IMAGE])
    arrays, labels = everything(data)
    np.testing.assert_array_equal(arrays["input"], FLOATS)
    np.testing.assert_array_equal(labels, LABELS)
    assert arrays["input"].dtype == np.float32
    assert labels.dtype == np.int64
    assert (len(data), data.labelled) == (20, True)


@pytest.mark.parametrize("make", SOURCES.values(), ids=SOURCES)
def test_a_second_pass_is_the_same(make, tmp_path):
    data = load_data(make(tmp_path), [IMAGE])
    first, second = everything(data), everything(data, size=20)
    np.testing.assert_array_equal(first[0]["input"], second[0]["input"])
    assert data.sha256 == load_data(make(tmp_path), [IMAGE]).sha256


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda tmp: FLOATS, id="array"),
        pytest.param(lambda tmp: torch.from_numpy(FLOATS).requires_grad_(), id="tensor"),
        pytest.param(lambda tmp: np.save(tmp / "x.npy", FLOATS) or tmp / "x.npy", id="npy"),
        pytest.param(lambda tmp: saved(tmp / "x.npz", x=FLOATS), id="npz"),
        pytest.param(lambda tmp: lambda: [FLOATS[:15], FLOATS[15:]], id="function"),
    ],
)
def test_data_without_labels(make, tmp_path):
    data = load_data(make(tmp_path), [IMAGE])
    arrays, labels = everything(data)
    assert labels is None
    assert not data.labelled
    np.testing.assert_array_equal(arrays["input"], FLOATS)


def test_a_large_uncompressed_array_stays_on_disk(tmp_path):
    data = load_data(saved(tmp_path / "d.npz", x=PIXELS, y=LABELS), [IMAGE])
    assert isinstance(data.columns["input"], np.memmap)


def test_pixels_become_floats_only_batch_by_batch():
    x = np.zeros((1000, 64, 64, 3), np.uint8)
    tracemalloc.start()
    for batch in load_data(x, [TensorSpec("input", (1, 3, 64, 64))]).batches(10):
        assert batch.inputs["input"].dtype == np.float32
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < x.nbytes  # all of it as float32 would be four times as much


def test_module_and_function_by_name(tmp_path, monkeypatch):
    (tmp_path / "digits_source.py").write_text(
        "import numpy as np\ndef batches():\n    yield {'ids': np.ones((3, 5), 'i4')}\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    data = load_data("digits_source:batches", [IDS])
    assert (data.name, len(data)) == ("digits_source:batches", 3)
    assert everything(data)[0]["ids"].dtype == np.int64


def test_pixels_are_scaled_and_normalized_per_channel():
    mean, std = [0.5, 0.4, 0.3], [0.2, 0.25, 0.5]
    arrays, _ = everything(load_data(PIXELS, [IMAGE], mean=mean, std=std))
    expected = (PIXELS / 255.0 - mean) / std
    np.testing.assert_allclose(arrays["input"], expected.transpose(0, 3, 1, 2), atol=1e-5)


def test_a_model_with_channels_last_normalizes_its_last_axis():
    spec = TensorSpec("input", (1, 8, 10, 3))
    arrays, _ = everything(load_data(PIXELS, [spec], mean=[0.5, 0.4, 0.3]))
    np.testing.assert_allclose(arrays["input"], PIXELS / 255.0 - [0.5, 0.4, 0.3], atol=1e-6)


def test_given_scale_replaces_the_default():
    arrays, _ = everything(load_data(PIXELS, [IMAGE], scale=1.0, mean=127.5, std=127.5))
    expected = (PIXELS.transpose(0, 3, 1, 2) - 127.5) / 127.5
    np.testing.assert_allclose(arrays["input"], expected, atol=1e-5)


def test_pixels_stay_pixels_for_an_integer_model():
    spec = TensorSpec("input", (1, 3, 8, 10), "uint8")
    arrays, _ = everything(load_data(PIXELS, [spec]))
    np.testing.assert_array_equal(arrays["input"], PIXELS.transpose(0, 3, 1, 2))


def test_a_grey_image_needs_no_channel_axis():
    x = rng.random((4, 8, 8))
    arrays, _ = everything(load_data(x, [GREY]))
    np.testing.assert_array_equal(arrays["input"], x[:, None].astype(np.float32))


@pytest.mark.parametrize(("layout", "axes"), [("nchw", (0, 1, 2, 3)), ("nhwc", (0, 3, 1, 2))])
def test_a_cube_needs_a_layout(layout, axes):
    x, spec = rng.random((2, 3, 3, 3)).astype(np.float32), TensorSpec("input", (1, 3, 3, 3))
    with pytest.raises(DataError, match="--layout"):
        load_data(x, [spec])
    arrays, _ = everything(load_data(x, [spec], layout=layout))
    np.testing.assert_array_equal(arrays["input"], x.transpose(axes))


def test_several_inputs_come_by_name(tmp_path):
    scalar = TensorSpec("rate", (), "int64")
    path = saved(tmp_path / "d.npz", ids=np.ones((7, 5), np.int32), input=np.ones((7, 4)), rate=16)
    data = load_data(path, [IDS, FLAT, scalar])
    (first, second) = data.batches(4)
    assert {k: v.shape for k, v in first.inputs.items()} == {
        "ids": (4, 5),
        "input": (4, 4),
        "rate": (),
    }
    assert second.inputs["rate"] == 16
    assert second.inputs["ids"].dtype == np.int64


def test_scalars_pass_through_a_stream():
    scalar = TensorSpec("rate", (), "int64")
    data = load_data(lambda: [{"input": np.ones((3, 4)), "rate": 8}] * 3, [FLAT, scalar])
    assert [len(b) for b in data.batches(5)] == [5, 4]
    assert all(b.inputs["rate"] == 8 for b in data.batches(5))


def images(folder: Path, names: list[str], size=(10, 8), mode="RGB") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for i, name in enumerate(names):
        shape = (size[1], size[0], 3) if mode == "RGB" else (size[1], size[0])
        pixels = np.full(shape, 10 * i, np.uint8)
        Image.fromarray(pixels).save(folder / name)


def test_class_folders_give_labels_in_alphabetical_order(tmp_path):
    images(tmp_path / "dog", ["a.png", "b.png"])
    images(tmp_path / "cat", ["z.png"])
    (tmp_path / "cow").mkdir()
    data = load_data(tmp_path, [IMAGE])
    arrays, labels = everything(data)
    assert labels.tolist() == [0, 2, 2]
    np.testing.assert_allclose(arrays["input"][2], 10 / 255, rtol=1e-6)


def test_flat_folder_has_no_labels_and_is_cropped_to_the_model(tmp_path):
    images(tmp_path, ["a.png", "b.jpg"], size=(40, 16))
    images(tmp_path, ["c.png"], size=(5, 7), mode="L")
    arrays, labels = everything(load_data(tmp_path, [IMAGE]))
    assert labels is None
    assert arrays["input"].shape == (3, 3, 8, 10)


def test_the_centre_of_an_image_is_kept(tmp_path):
    pixels = np.zeros((64, 128, 3), np.uint8)
    pixels[:, 32:96] = 200
    Image.fromarray(pixels).save(tmp_path / "a.png")
    arrays, _ = everything(load_data(tmp_path, [TensorSpec("x", (1, 3, 32, 32))], scale=1.0))
    np.testing.assert_allclose(arrays["x"], 200, atol=1)


def test_grey_models_get_grey_images(tmp_path):
    images(tmp_path, ["a.png"], size=(8, 8))
    arrays, _ = everything(load_data(tmp_path, [GREY]))
    assert arrays["input"].shape == (1, 1, 8, 8)


def test_take_keeps_the_proportions_of_sorted_and_of_alternating_classes():
    x = np.zeros((1000, 4), np.float32)
    for labels in (np.sort(np.arange(1000) % 10), np.arange(1000) % 10):
        _, taken = everything(load_data((x, labels), [FLAT]).take(100))
        assert len(taken) == 100
        assert np.bincount(taken, minlength=10).min() >= 4


def test_take_is_the_same_each_time_and_changes_the_hash():
    data = load_data((FLOATS, LABELS), [IMAGE])
    first, again = data.take(7), load_data((FLOATS, LABELS), [IMAGE], limit=7)
    assert len(first) == len(again) == 7
    assert first.sha256 == again.sha256 != data.sha256
    assert data.take(50) is data


def test_limit_on_a_stream_takes_the_first():
    data = load_data(yields_pairs, [IMAGE], limit=9)
    np.testing.assert_array_equal(everything(data)[0]["input"], FLOATS[:9])
    assert data.take(5).sha256 != data.sha256
    np.testing.assert_array_equal(everything(data.take(5))[1], LABELS[:5])


def test_limit_ends_an_endless_stream():
    def endless():
        while True:
            yield FLOATS[:3]

    assert len(load_data(endless, [IMAGE], limit=8)) == 8


@pytest.mark.parametrize(
    "options",
    [{"mean": 0.5}, {"std": 2.0}, {"scale": 0.5}],
    ids=["mean", "std", "scale"],
)
def test_the_hash_covers_samples_and_preparation(options):
    plain = load_data(PIXELS, [IMAGE]).sha256
    changed = PIXELS.copy()
    changed[3, 0, 0, 0] ^= 1
    assert load_data(changed, [IMAGE]).sha256 != plain
    assert load_data(PIXELS, [IMAGE], **options).sha256 != plain


def test_data_are_returned_as_they_are():
    data = load_data(FLOATS, [IMAGE])
    assert load_data(data, [IMAGE]) is data
    assert len(load_data(data, [IMAGE], limit=3)) == 3


@given(
    sizes=st.lists(st.integers(1, 7), min_size=1, max_size=8),
    wanted=st.integers(1, 9),
)
@settings(max_examples=40)
def test_streams_are_cut_anew_without_loss(sizes, wanted):
    x = np.arange(sum(sizes) * 4, dtype=np.float32).reshape(-1, 4)
    parts = np.split(x, np.cumsum(sizes)[:-1])
    arrays, _ = everything(load_data(lambda: parts, [FLAT]), size=wanted)
    np.testing.assert_array_equal(arrays["input"], x)


def broken(index, value):
    x = FLOATS.copy()
    x[index] = value
    return x


def fails():
    yield FLOATS[:2]
    raise KeyError("lost")


def changes_shape():
    yield FLOATS[:2]
    yield FLOATS[:2, :, :, :5]


BAD = {
    "other shape": (FLOATS[:, :, :4], r"3x4x10.*3x8x10"),
    "no batch axis": (FLOATS[0], r"3x8x10|8x10"),
    "NaN": (broken((7, 0, 0, 0), np.nan), r"1 values .* sample 7"),
    "infinite": (broken(slice(3, 5), np.inf), r"480 values .* sample 3"),
    "too large for float32": (FLOATS.astype(np.float64) * 1e300, r"infinite"),
    "integers": (FLOATS.astype(np.int64), r"int64.*float32.*scale"),
    "booleans": (FLOATS > 0, r"bool"),
    "objects": (np.array([{}, None]), r"object"),
    "text": (np.array(["a", "b"]), r"<U1"),
    "no samples": (FLOATS[:0], r"no samples"),
    "fewer labels": ((FLOATS, LABELS[:5]), r"20 of 'input', 5 of 'y'"),
    "negative label": ((FLOATS, LABELS - 1), r"label -1 of sample 0"),
    "one-hot labels": ((FLOATS, np.eye(4)[LABELS]), r"argmax"),
    "float labels": ((FLOATS, LABELS / 2), r"integers"),
    "missing key": ({"images": FLOATS, "labels": LABELS}, r"'images', 'labels'.*'x'"),
    "a number": (7, r"int is no data"),
    "iterator": (iter([FLOATS]), r"only once"),
    "empty function": (list, r"no samples"),
    "failing function": (fails, r"fails failed with KeyError"),
    "changing shape": (changes_shape, r"change from 3x8x10"),
    "labels come and go": (lambda: [FLOATS[:2], (FLOATS[:2], LABELS[:2])], r"always or never"),
    "three parts": (lambda: [(FLOATS, LABELS, LABELS)], r"tuple"),
    "unbatched samples": (lambda: list(FLOATS), r"8x10"),
    "missing file": ("no_such.npz", r"no file"),
}


@pytest.mark.parametrize(("source", "message"), BAD.values(), ids=BAD)
def test_bad_data_are_refused_with_a_reason(source, message):
    with pytest.raises(DataError, match=message):
        load_data(source, [IMAGE])


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def truncated(tmp: Path) -> Path:
    path = saved(tmp / "whole.npz", x=FLOATS)
    return write(tmp / "d.npz", path.read_bytes()[:-500])


def damaged(tmp: Path) -> Path:
    np.savez_compressed(tmp / "d.npz", x=FLOATS)
    content = bytearray((tmp / "d.npz").read_bytes())
    content[2000:2100] = bytes(100)
    return write(tmp / "d.npz", bytes(content))


def cut_npy(tmp: Path) -> Path:
    np.save(tmp / "whole.npy", FLOATS)
    return write(tmp / "d.npy", (tmp / "whole.npy").read_bytes()[:900])


BAD_FILES = {
    "empty": (lambda tmp: write(tmp / "d.npz", b""), r"empty"),
    "text": (lambda tmp: write(tmp / "d.npz", b"x,y\n1,2\n"), r"not a data file"),
    "other zip": (
        lambda tmp: zipfile.ZipFile(tmp / "d.npz", "w").writestr("a.txt", "a") or tmp / "d.npz",
        r"not a data file|cannot be read",
    ),
    "truncated npz": (truncated, r"cannot be read"),
    "damaged npz": (damaged, r"'x' in .* cannot be read"),
    "truncated npy": (cut_npy, r"cannot be read"),
    "no x": (lambda tmp: saved(tmp / "d.npz", images=FLOATS), r"'images'"),
    "empty folder": (lambda tmp: tmp, r"no images"),
    "broken image": (
        lambda tmp: write(tmp / "a.png", b"no png").parent,
        r"a\.png cannot be decoded",
    ),
    "both levels": (
        lambda tmp: images(tmp, ["a.png"]) or images(tmp / "c", ["b.png"]) or tmp,
        r"one sub-folder per class",
    ),
    "list of numbers": (lambda tmp: torch.save([1, 2, 3], tmp / "d") or tmp / "d", r"holds a list"),
}


@pytest.mark.parametrize(("make", "message"), BAD_FILES.values(), ids=BAD_FILES)
def test_bad_files_are_refused_with_a_reason(make, message, tmp_path):
    with pytest.raises(DataError, match=message):
        everything(load_data(make(tmp_path), [IMAGE]))


EVIL = {
    "npz of objects": lambda tmp, evil: saved(tmp / "d.npz", x=np.array([evil], object)),
    "npy of objects": lambda tmp, evil: (
        np.save(tmp / "d.npy", np.array([evil], object)) or tmp / "d.npy"
    ),
    "pickle": lambda tmp, evil: write(tmp / "d.pt", pickle.dumps(evil)),
    "torch.save": lambda tmp, evil: torch.save({"x": evil}, tmp / "d.pt") or tmp / "d.pt",
    "legacy torch.save": lambda tmp, evil: (
        torch.save({"x": evil}, tmp / "d.pt", _use_new_zipfile_serialization=False) or tmp / "d.pt"
    ),
}


@pytest.mark.parametrize("make", EVIL.values(), ids=EVIL)
def test_nothing_in_a_file_is_executed(make, tmp_path):
    trace = tmp_path / "trace"
    path = make(tmp_path, Touch(trace))
    with pytest.raises(DataError, match="execut"):
        load_data(path, [IMAGE])
    assert not trace.exists()


@pytest.mark.parametrize(
    ("source", "spec", "options", "message"),
    [
        pytest.param(PIXELS, IMAGE, {"mean": [123.7, 116.3, 103.5]}, "scale 1", id="mean of 255"),
        pytest.param(PIXELS, IMAGE, {"mean": [0.5, 0.5]}, "2 numbers", id="two channels"),
        pytest.param(PIXELS, IMAGE, {"std": 0.0}, "positive", id="std of 0"),
        pytest.param(PIXELS, IMAGE, {"mean": float("nan")}, "finite", id="mean of nan"),
        pytest.param(PIXELS, IMAGE, {"layout": "chw"}, "nchw", id="unknown layout"),
        pytest.param(PIXELS, IMAGE, {"limit": 0}, "at least 1", id="limit 0"),
        pytest.param(np.ones((2, 5), int), IDS, {"mean": 1.0}, "int64", id="integer model"),
        pytest.param("no_such_module:f", IMAGE, {}, "no_such_module", id="unknown module"),
        pytest.param("math:squrt", IMAGE, {}, "Did you mean 'sqrt'", id="unknown function"),
    ],
)
def test_contradicting_options_are_refused(source, spec, options, message):
    with pytest.raises(UsageError, match=message):
        load_data(source, [spec], **options)


def test_integers_must_fit_into_the_models_type():
    spec = TensorSpec("ids", (1, 1), "int32")
    with pytest.raises(DataError, match=r"1 values .* int32, the first in sample 2"):
        load_data(np.array([[1], [2], [2**40]]), [spec])


def test_several_inputs_need_names():
    with pytest.raises(DataError, match="'ids', 'input'"):
        load_data(FLOATS, [IDS, IMAGE])


def test_a_stream_that_changes_is_noticed():
    calls = []

    def shrinking():
        calls.append(1)
        return [FLOATS[: 5 - len(calls)]]

    data = load_data(shrinking, [IMAGE])
    with pytest.raises(DataError, match="4 samples on the first pass and 3 now"):
        everything(data)


RECURRENT = (
    TensorSpec("state", (2, 1, 3)),
    TensorSpec("audio", (1, 4)),
    TensorSpec("rate", (), "int64"),
)
STEPS = [
    {
        "state": np.full((2, 1, 3), step, np.float32),
        "audio": np.full((1, 4), step, np.float32),
        "rate": np.array(16000),
    }
    for step in range(5)
]


@pytest.mark.parametrize("source", [STEPS, lambda: iter(STEPS)], ids=["list", "function"])
@pytest.mark.parametrize("size", [1, 3])
def test_where_axis_0_is_not_the_batch_every_dict_is_one_sample(source, size):
    data = load_data(source, RECURRENT)
    assert len(data) == 5
    batches = list(data.batches(size))
    assert [len(batch) for batch in batches] == [1] * 5
    for batch, step in zip(batches, STEPS, strict=True):
        assert {k: v.shape for k, v in batch.inputs.items()} == {
            "state": (2, 1, 3),
            "audio": (1, 4),
            "rate": (),
        }
        assert all(np.array_equal(batch.inputs[name], step[name]) for name in step)
    assert len(data.take(2)) == len(list(data.take(2).batches(size))) == 2
    assert data.sha256 == load_data(list(STEPS), RECURRENT).sha256 != data.take(2).sha256


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"state": np.zeros((1, 1, 3), np.float32)}, "'state' has shape 1x1x3"),
        ({"rate": np.array([16000])}, "'rate' has shape 1"),
        ({"audio": np.full((1, 4), np.nan, np.float32)}, "NaN or infinite, the first in sample 0"),
        ({"y": np.array([1, 2])}, "2 labels"),
    ],
    ids=["shape", "scalar", "nan", "labels"],
)
def test_a_sample_that_is_not_exactly_the_inputs_is_refused(change, part):
    with pytest.raises(DataError, match=part):
        load_data([{**STEPS[0], **change}], RECURRENT)


def test_an_array_cannot_be_cut_into_samples_without_a_batch_axis():
    arrays = {name: np.stack([step[name] for step in STEPS]) for name in STEPS[0]}
    with pytest.raises(DataError, match="one dict of arrays in exactly these shapes"):
        load_data(arrays, RECURRENT)
