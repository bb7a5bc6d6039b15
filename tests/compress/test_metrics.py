from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from compress.data import load_data
from compress.errors import DataError, EngineError, UsageError
from compress.fidelity import fidelity
from compress.max_drop import MaxDrop, parse_max_drop
from compress.metrics import Accuracy, paired_drop, resolve_evaluator, top1
from compress.model import Arrays, TensorSpec
from compress.target import Engine, Kernel, KernelTime

rng = np.random.default_rng(0)
WEIGHT = rng.standard_normal((6, 3)).astype(np.float32)
X = rng.standard_normal((50, 6)).astype(np.float32)
Y = (X @ WEIGHT).argmax(1)


@dataclass
class Linear:
    """A linear classifier in numpy that refuses any other batch than its own."""

    weight: np.ndarray
    batch: int | str = "batch"
    name: str = "linear"
    outputs: tuple[str, ...] = ("logits",)
    extra: np.ndarray | None = None
    largest_batch: int = 0

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        return (TensorSpec("x", (self.batch, len(self.weight))),)

    def __call__(self, inputs: Mapping[str, np.ndarray]) -> Arrays:
        x = inputs["x"]
        if isinstance(self.batch, int) and len(x) != self.batch:
            raise ValueError(f"Got {len(x)} samples, expected {self.batch}")
        self.largest_batch = max(self.largest_batch, len(x))
        found = {self.outputs[0]: x @ self.weight}
        if self.extra is not None:
            found[self.outputs[1]] = np.broadcast_to(self.extra, (len(x), *self.extra.shape))
        return found

    def save(self, directory: Path) -> list[Path]:
        path = directory / "weight.npy"
        np.save(path, self.weight)
        return [path]

    def kernels(self) -> tuple[Kernel, ...]:
        return ()

    def profile(self, inputs: Mapping[str, np.ndarray], runs: int = 20) -> tuple[KernelTime, ...]:
        return ()


SPECS = Linear(WEIGHT).inputs


def test_linear_is_an_engine():
    assert isinstance(Linear(WEIGHT), Engine)


@pytest.mark.parametrize("batch", ["batch", 1, 7, 64])
def test_top1_with_any_batch(batch):
    labels = Y.copy()
    labels[:5] = (labels[:5] + 1) % 3
    found = top1(Linear(WEIGHT, batch), load_data((X, labels), SPECS), batch=16)
    np.testing.assert_array_equal(found.correct, np.arange(50) >= 5)
    assert found.value == pytest.approx(0.9)
    assert found.n == 50
    assert found.standard_error == pytest.approx((0.9 * 0.1 / 50) ** 0.5)
    assert str(found) == "90.00% of 50"


def test_top1_keeps_to_the_batch_asked_for():
    engine = Linear(WEIGHT)
    top1(engine, load_data((X, Y), SPECS), batch=16)
    assert engine.largest_batch == 16


def test_nan_is_never_right():
    weight = WEIGHT.copy()
    weight[:, 0] = np.nan
    assert top1(Linear(weight), load_data((X, np.zeros_like(Y)), SPECS)).value == 0


def test_the_first_output_with_classes_counts():
    engine = Linear(WEIGHT, outputs=("logits", "map"), extra=np.zeros((2, 2)))
    assert top1(engine, load_data((X, Y), SPECS)).value == 1


@pytest.mark.parametrize(
    ("engine", "labels", "message"),
    [
        pytest.param(Linear(WEIGHT), None, "no labels", id="unlabelled"),
        pytest.param(Linear(WEIGHT), Y + 1, r"label 3.*3 classes.*subtract 1", id="from one"),
        pytest.param(Linear(WEIGHT), Y + 10, r"label 12.*3 classes", id="other classes"),
        pytest.param(Linear(WEIGHT[:, :1]), Y, r"\(N, classes\).*module:function", id="one output"),
    ],
)
def test_what_has_no_top1_is_refused(engine, labels, message):
    with pytest.raises(DataError, match=message):
        top1(engine, load_data(X if labels is None else (X, labels), SPECS))


def test_a_failing_engine_is_named():
    class Broken(Linear):
        def __call__(self, inputs):
            raise RuntimeError("no kernel")

    with pytest.raises(EngineError, match=r"linear failed .* no kernel"):
        top1(Broken(WEIGHT), load_data((X, Y), SPECS))


def bits(right: int, wrong: int) -> np.ndarray:
    return np.repeat([True, False], [right, wrong])


def test_drop_of_equal_results_is_exactly_zero():
    accuracy = Accuracy(bits(92, 8))
    drop = paired_drop(accuracy, accuracy)
    assert (drop.points, drop.low, drop.high, drop.agreement) == (0, 0, 0, 1)


def test_pairing_resolves_what_separate_accuracies_do_not():
    before = Accuracy(bits(900, 100))
    after = Accuracy(bits(890, 110))  # loses ten of the same samples and gains none
    drop = paired_drop(before, after)
    assert drop.points == pytest.approx(1.0)
    assert 0.3 < drop.low < drop.high < 1.8
    assert 100 * before.standard_error * 1.96 > 1.0  # unpaired it would drown
    assert drop.agreement == pytest.approx(0.99)
    assert str(drop).startswith("+1.00 points [+0.")


@given(st.integers(0, 2**32 - 1))
def test_drop_is_antisymmetric(seed):
    draw = np.random.default_rng(seed)
    a, b = (Accuracy(draw.random(80) < 0.7) for _ in range(2))
    there, back = paired_drop(a, b), paired_drop(b, a)
    assert there.points == pytest.approx(-back.points)
    assert there.points == pytest.approx(100 * (a.value - b.value))
    assert there.low <= there.points <= there.high
    assert there.agreement == back.agreement


def test_the_interval_covers_the_true_drop_95_times_in_100():
    draw, hits = np.random.default_rng(1), 0
    for _ in range(300):
        before = draw.random(500) < 0.8
        after = before & (draw.random(500) < 0.95)  # true drop: 0.8 * 5 % = 4 points
        drop = paired_drop(Accuracy(before), Accuracy(after))
        hits += drop.low <= 4 <= drop.high
    assert 0.91 <= hits / 300 <= 0.98


def test_accuracies_on_other_data_cannot_be_paired():
    with pytest.raises(DataError, match="10 and on 20"):
        paired_drop(Accuracy(bits(5, 5)), Accuracy(bits(10, 10)))


def test_fidelity_equals_the_formulas_on_the_whole():
    other = WEIGHT + rng.standard_normal(WEIGHT.shape).astype(np.float32) * 0.05
    found = fidelity(Linear(WEIGHT), Linear(other), load_data(X, SPECS), batch=8)
    a, b = (X @ WEIGHT).astype(np.float64), (X @ other).astype(np.float64)
    assert found.samples == 50
    assert found.source == "calibration data"
    assert found.cosine == pytest.approx((a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b))
    assert found.sqnr_db == pytest.approx(10 * np.log10((a**2).sum() / ((a - b) ** 2).sum()))
    assert found.max_abs_difference == pytest.approx(np.abs(a - b).max(), rel=1e-5)
    assert found.top1_agreement == np.mean(a.argmax(1) == b.argmax(1))


def test_identical_engines_are_identical_and_json_can_say_so():
    found = fidelity(Linear(WEIGHT), Linear(WEIGHT, batch=4), load_data(X, SPECS))
    assert (found.cosine, found.sqnr_db, found.max_abs_difference) == (1, np.inf, 0)
    read = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert read["identical"] is True
    assert read["sqnr_db"] is None
    assert read["per_output"]["logits"]["cosine"] == 1


def test_without_data_it_says_random_inputs():
    found = fidelity(Linear(WEIGHT), Linear(WEIGHT * 1.01), samples=40, batch=16)
    assert (found.source, found.samples) == ("random inputs", 40)
    assert found.sqnr_db == pytest.approx(40, abs=0.01)  # 20 log10(1 / 0.01)


def test_random_inputs_keep_to_a_fixed_batch():
    engine = Linear(WEIGHT, batch=8)
    assert fidelity(engine, engine, samples=20).samples == 24


def test_the_worst_output_speaks_for_all():
    first = Linear(WEIGHT, outputs=("logits", "map"), extra=np.ones((2, 2)))
    second = Linear(WEIGHT, outputs=("logits", "map"), extra=np.ones((2, 2)) * 2)
    found = fidelity(first, second, load_data(X, SPECS))
    assert found.per_output["logits"].sqnr_db == np.inf
    assert found.sqnr_db == found.per_output["map"].sqnr_db == pytest.approx(0)
    assert found.max_abs_difference == 1


@pytest.mark.parametrize(
    ("reference", "candidate", "cosine", "sqnr_db", "largest"),
    [
        pytest.param([0.0, 0], [0.0, 0], 1, np.inf, 0, id="both zero"),
        pytest.param([0.0, 0], [0.0, 1], 0, -np.inf, 1, id="reference zero"),
        pytest.param([1.0, 2], [0.0, 0], 0, 0, 2, id="candidate zero"),
        pytest.param([1.0, 2], [-1.0, -2], -1, -6.0206, 4, id="sign"),
        pytest.param([1.0, -np.inf], [1.0, -np.inf], 1, np.inf, 0, id="same mask"),
        pytest.param([1.0, 2], [1.0, np.nan], 0, -np.inf, np.inf, id="nan"),
        pytest.param([1.0, np.nan], [1.0, np.nan], 1, np.inf, 0, id="both nan"),
    ],
)
def test_special_outputs(reference, candidate, cosine, sqnr_db, largest):
    engines = [
        Linear(WEIGHT, outputs=("logits", "other"), extra=np.array(extra))
        for extra in (reference, candidate)
    ]
    found = fidelity(*engines, load_data(X, SPECS)).per_output["other"]
    assert found.cosine == pytest.approx(cosine)
    assert found.sqnr_db == pytest.approx(sqnr_db, abs=1e-3)
    assert found.max_abs_difference == largest
    json.dumps(fidelity(*engines).to_dict(), allow_nan=False)


def test_outputs_of_other_names_are_matched_by_position():
    found = fidelity(Linear(WEIGHT), Linear(WEIGHT, outputs=("output_0",)))
    assert list(found.per_output) == ["logits"]


def test_outputs_of_another_shape_are_refused():
    with pytest.raises(EngineError, match="cannot be compared"):
        fidelity(Linear(WEIGHT), Linear(WEIGHT[:, :2]))


def test_no_agreement_without_classes():
    found = fidelity(Linear(WEIGHT[:, :1]), Linear(WEIGHT[:, :1]))
    assert found.top1_agreement is None


def mean_margin(engine):
    """The kind of function that `--eval module:function` names."""
    logits = np.sort(engine({"x": X})["logits"], axis=1)
    return np.float32((logits[:, -1] - logits[:, -2]).mean())


def test_a_function_scores_an_engine():
    evaluator = resolve_evaluator(mean_margin, SPECS)
    score = evaluator(Linear(WEIGHT))
    assert evaluator.data is None
    assert (score.unit, score.n, score.accuracy) == ("score", None, None)
    assert score.value == pytest.approx(float(mean_margin(Linear(WEIGHT))))


def test_a_function_by_name(tmp_path, monkeypatch):
    (tmp_path / "my_scores.py").write_text("def bias(engine):\n    return len(engine.name)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    evaluator = resolve_evaluator("my_scores:bias", SPECS)
    assert evaluator.name == "my_scores:bias"
    assert evaluator(Linear(WEIGHT)).value == 6


def test_data_give_top1(tmp_path):
    np.savez(tmp_path / "d.npz", x=X, y=Y)
    evaluator = resolve_evaluator(tmp_path / "d.npz", SPECS, limit=20)
    score = evaluator(Linear(WEIGHT))
    assert (score.value, score.unit, score.n) == (1.0, "top-1", 20)
    assert score.accuracy.correct.all()
    assert len(evaluator.data) == 20
    assert resolve_evaluator(evaluator, SPECS) is evaluator


@pytest.mark.parametrize(
    ("function", "message"),
    [
        pytest.param(lambda engine: None, "returned None", id="none"),
        pytest.param(lambda engine: float("nan"), "finite", id="nan"),
        pytest.param(lambda engine: True, "finite number", id="bool"),
        pytest.param(lambda engine: "0.9", "finite number", id="text"),
        pytest.param(lambda engine: engine({})["logits"], "KeyError", id="raises"),
        pytest.param(lambda engine: np.ones(2), "failed on linear", id="array"),
    ],
)
def test_functions_that_give_no_number_are_refused(function, message):
    with pytest.raises(DataError, match=message):
        resolve_evaluator(function, SPECS)(Linear(WEIGHT))


@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [
        pytest.param(X, DataError, "no labels", id="unlabelled"),
        pytest.param("no_such_module:score", UsageError, "no_such_module", id="no module"),
        pytest.param("math:pi", DataError, "must be a function", id="no function"),
        pytest.param("missing.npz", DataError, "no file", id="no file"),
    ],
)
def test_evaluations_that_cannot_be_are_refused_at_once(spec, error, message):
    with pytest.raises(error, match=message):
        resolve_evaluator(spec, SPECS)


@pytest.mark.parametrize(
    ("value", "drop", "text"),
    [
        pytest.param("0.5%", MaxDrop(0.005), "0.5%", id="points"),
        pytest.param(" 0.5 % rel", MaxDrop(0.005, relative=True), "0.5%rel", id="relative"),
        pytest.param("0%", MaxDrop(0.0), "0%", id="none"),
        pytest.param("2%", MaxDrop(0.02), "2%", id="whole"),
        pytest.param(0.005, MaxDrop(0.005), "0.5%", id="fraction"),
        pytest.param(0, MaxDrop(0.0), "0%", id="zero"),
        pytest.param(MaxDrop(0.1), MaxDrop(0.1), "10%", id="itself"),
    ],
)
def test_max_drop(value, drop, text):
    assert parse_max_drop(value) == drop
    assert str(parse_max_drop(value)) == text
    assert parse_max_drop(text) == drop


def test_allowed_drop_is_absolute_or_of_the_baseline():
    assert parse_max_drop("0.5%").allowed(0.8) == pytest.approx(0.005)
    assert parse_max_drop("0.5%rel").allowed(0.8) == pytest.approx(0.004)
    assert parse_max_drop("0.5%rel").allowed(-40.0) == pytest.approx(0.2)


@pytest.mark.parametrize(
    "value",
    ["0.5", "0.005", "1", "", "-1%", "0.5%abs", "abc", "101%", "nan%", 1.5, -0.1, True, np.nan],
)
def test_nonsense_is_no_max_drop(value):
    with pytest.raises(UsageError):
        parse_max_drop(value)


def test_a_plain_number_is_asked_for_its_percent_sign():
    with pytest.raises(UsageError, match=r"needs a % sign.*0\.5%rel"):
        parse_max_drop("0.5")


class Recurrent(Linear):
    """Adds up a state (2, 1, 6) and one row of audio (1, 6): axis 0 is not the batch."""

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        return (TensorSpec("state", (2, 1, 6)), TensorSpec("x", (1, 6)))

    def __call__(self, inputs: Mapping[str, np.ndarray]) -> Arrays:
        assert inputs["state"].shape == (2, 1, 6)
        return super().__call__({"x": inputs["x"] + inputs["state"].sum(0)})


def test_where_axis_0_is_not_the_batch_samples_run_one_by_one():
    engine = Recurrent(WEIGHT)
    items = [{"state": np.zeros((2, 1, 6), np.float32), "x": row[None]} for row in X]
    labelled = [{**item, "y": label[None]} for item, label in zip(items, Y, strict=True)]
    assert top1(engine, load_data(labelled, engine.inputs)).value == 1
    on_data = fidelity(engine, engine, load_data(items, engine.inputs), samples=9)
    assert (on_data.samples, on_data.max_abs_difference) == (9, 0)
    assert engine.largest_batch == 1
    assert fidelity(engine, engine, samples=5).samples == 5
