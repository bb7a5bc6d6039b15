from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest

from compress.data import Data, load_data
from compress.errors import UnsupportedError, UsageError
from compress.model import Model
from compress.passes import Context
from compress.recovery import Recover, recover, squared_error
from compress.reference import reference_session, run
from compress.registry import create_pass, create_target
from compress.rewrites import with_constants
from compress.testing import PassContract, tiny_exported

TARGET = create_target("onnxruntime", threads=1)
Build = Callable[..., Model]


def damaged(model: Model, factor: float = 0.3) -> Model:
    """The model with noise on every weight."""
    rng = np.random.default_rng(0)
    arrays = {}
    for name, value in model.graph_model.graph.initializers.items():
        assert value.const_value is not None
        array = value.const_value.numpy()
        if array.ndim > 1:
            noise = rng.normal(0, factor * array.std(), array.shape)
            arrays[name] = (array + noise).astype(np.float32)
    return dataclasses.replace(model, program=with_constants(model.graph_model, arrays))


def images(model: Model, count: int = 64, labels: bool = False) -> Data:
    inputs = model.example(count)
    x = next(iter(inputs.values()))
    if not labels:
        return load_data(x, model.inputs)
    found = run(reference_session(model.graph_model), inputs)
    return load_data((x, next(iter(found.values())).argmax(1)), model.inputs)


def distance(model: Model, teacher: Model) -> float:
    inputs = teacher.example(32, seed=5)
    got, expected = (run(reference_session(m.graph_model), inputs) for m in (model, teacher))
    return max(squared_error(got[name], array) for name, array in expected.items())


@pytest.mark.parametrize("labels", [False, True])
def test_a_damaged_network_comes_back_towards_its_original(labels: bool) -> None:
    teacher = tiny_exported(21)
    worse = damaged(tiny_exported(21))
    data = images(teacher, labels=labels)
    done = recover(worse, data, teacher=teacher, steps=60, batch=16, learning_rate=3e-3)
    if not labels:  # these pull the scores apart, beyond the teacher's
        assert distance(done, teacher) < 0.6 * distance(worse, teacher)
    details = done.history[-1].details
    assert details["steps"] == 60
    assert details["last_loss"] < details["first_loss"]
    assert details["held_out"]["measure"] == ("top-1" if labels else "agreement with float")
    assert details["held_out"]["after"] >= details["held_out"]["before"]
    assert distance(worse, teacher) == distance(damaged(tiny_exported(21)), teacher)


def test_outputs_without_classes_are_compared_by_their_error(onnx_model: Build) -> None:
    text = """net (float[n, 3, 8, 8] x) => (float[n, 2, 8, 8] y) {
        h = Conv<pads=[1,1,1,1]>(x, w, b)
        r = Relu(h)
        y = Conv(r, v)
    }"""
    teacher = onnx_model(text, w=(6, 3, 3, 3), b=(6,), v=(2, 6, 1, 1))
    worse = damaged(teacher)
    steps = {"steps": 80, "batch": 16, "learning_rate": 1e-2}
    done = recover(worse, images(teacher), teacher=teacher, **steps)
    assert distance(done, teacher) < 0.5 * distance(worse, teacher)


def test_scores_before_a_softmax_may_have_another_name(onnx_model: Build) -> None:
    text = """net (float[n, 6] x) => (float[n, 4] y) {{
        {name} = Gemm(x, w, b)
        y = Softmax({name})
    }}"""
    teacher = onnx_model(text.format(name="scores"), w=(6, 4), b=(4,))
    student = damaged(onnx_model(text.format(name="other"), w=(6, 4), b=(4,)), 1.0)
    done = recover(
        student, images(teacher), teacher=teacher, steps=80, batch=16, learning_rate=1e-2
    )
    assert distance(done, teacher) < 0.5 * distance(student, teacher)


def test_a_network_that_equals_its_original_is_left_alone() -> None:
    model = tiny_exported(21)
    context = Context(target=TARGET, original=tiny_exported(21), training=images(model))
    done = Recover(steps=5).apply(model, context)
    assert done.history[-1].details["steps"] == 0
    assert "what its original does" in done.history[-1].details["stopped"]


def test_the_pass_teaches_with_the_original(onnx_model: Build) -> None:
    original = tiny_exported(21)
    worse = damaged(tiny_exported(21))
    context = Context(target=TARGET, original=original, calibration=images(original))
    done = Recover(steps=60, batch=16, learning_rate=3e-3).apply(worse, context)
    assert distance(done, original) < 0.6 * distance(worse, original)


def test_without_data_there_is_nothing_to_train_with() -> None:
    model = tiny_exported(21)
    with pytest.raises(UsageError, match="Pass recover trains, and there are no data"):
        Recover().apply(model, Context(target=TARGET, original=model))


def test_options_are_checked() -> None:
    for given in ({"epochs": 0}, {"steps": 0}, {"alpha": 2}, {"augment": "rotate"}):
        with pytest.raises(UsageError, match="recover"):
            Recover(**given)  # type: ignore[arg-type]
    assert create_pass("recover", epochs=0.5) == Recover(epochs=0.5)


def test_a_network_without_weights_cannot_be_trained(onnx_model: Build) -> None:
    model = onnx_model("net (float[n, 3] x) => (float[n, 3] y) { y = Relu(x) }")
    with pytest.raises(UnsupportedError, match="no weights"):
        recover(model, images(model), teacher=model, steps=1)


class TestRecover(PassContract):
    step = Recover(steps=3, batch=8)
    target = TARGET

    def model(self) -> Model:
        return damaged(tiny_exported(21))

    def context(self, model: Model) -> Context:
        original = tiny_exported(21)
        return Context(target=self.target, original=original, calibration=images(original, 32))
