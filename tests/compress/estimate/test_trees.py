from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import xgboost
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.errors import LoadError
from compress.estimate.trees import Trees, fit_trees, from_xgboost


@settings(max_examples=15)
@given(
    seed=st.integers(0, 1000),
    features=st.integers(1, 6),
    depth=st.integers(1, 6),
    rounds=st.integers(1, 30),
    base=st.floats(-3, 3, width=32),
)
def test_own_evaluation_equals_xgboost(
    seed: int, features: int, depth: int, rounds: int, base: float
) -> None:
    rng = np.random.default_rng(seed)
    rows = rng.integers(0, 9, (60, features)).astype(np.float32)
    options = {"max_depth": depth, "base_score": base, "nthread": 1, "verbosity": 0}
    table = xgboost.DMatrix(rows, label=rng.standard_normal(60))
    booster = xgboost.train(options, table, num_boost_round=rounds)
    trees = Trees.from_dict(json.loads(json.dumps(from_xgboost(booster).to_dict())), features)
    # On thresholds too: the rows' own values are where trees split.
    unseen = np.concatenate([rows, rng.standard_normal((40, features)).astype(np.float32) * 5])
    expected = booster.predict(xgboost.DMatrix(unseen))
    np.testing.assert_allclose(trees.predict(unseen), expected, rtol=2e-6, atol=2e-6)


def fitted() -> dict[str, Any]:
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((80, 3)).astype(np.float32)
    return fit_trees(rows, rows[:, 0] * 2, np.ones(80), rounds=4, depth=3).to_dict()


def test_fit_follows_the_data() -> None:
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((300, 3)).astype(np.float32)
    trees = fit_trees(rows, rows[:, 0] * 2, np.ones(300))
    assert np.abs(trees.predict(rows) - rows[:, 0] * 2).mean() < 0.2


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("left", lambda v: [0] * len(v)),  # a child before its parent: an endless way down
        ("right", lambda v: [10**6 if x >= 0 else x for x in v]),
        ("feature", lambda v: [3] * len(v)),
        ("threshold", lambda v: [*v[:-1], float("nan")]),
        ("threshold", lambda v: v[:-1]),
        ("roots", lambda v: [10**6]),
        ("roots", lambda v: ["a"]),
        ("feature", lambda v: [0.5] * len(v)),
        ("base", lambda v: float("inf")),
        ("left", lambda v: None),
    ],
)
def test_broken_trees_are_refused(name: str, change: Any) -> None:
    values = fitted()
    values[name] = change(values[name])
    with pytest.raises(LoadError):
        Trees.from_dict(values, 3)


def test_trees_of_other_features_are_refused() -> None:
    with pytest.raises(LoadError, match="feature"):
        Trees.from_dict(fitted() | {"feature": [5] * len(fitted()["feature"])}, 3)
