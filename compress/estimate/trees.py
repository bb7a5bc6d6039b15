"""Boosted trees as arrays: plain JSON, evaluated by numpy, so that predicting needs no XGBoost."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from compress.errors import LoadError, MissingExtraError

MOST_NODES = 5_000_000


@dataclass(frozen=True, eq=False)
class Trees:
    """The sum of regression trees over features (rows, features) in float32.

    A node is a leaf where `left` is -1; elsewhere a row goes to `left` if its feature is below
    the threshold and to `right` otherwise. Children follow their parents.

    Attributes:
        base: that the leaves are added to.
        roots: index of each tree's first node (trees,).
        feature: column that a node looks at (nodes,) int32.
        threshold: of it, and in a leaf its value (nodes,) float32.
        left: index of a child, or -1 (nodes,) int32.
        right: of the other one.
    """

    base: float
    roots: np.ndarray
    feature: np.ndarray
    threshold: np.ndarray
    left: np.ndarray
    right: np.ndarray

    def predict(self, rows: np.ndarray) -> np.ndarray:
        """Sums (rows,) in float32, added tree by tree as XGBoost adds them."""
        rows = np.asarray(rows, np.float32)
        at = np.broadcast_to(self.roots, (len(rows), len(self.roots))).copy()
        line = np.arange(len(rows))[:, None]
        while True:
            inner = self.left[at] >= 0
            if not inner.any():
                break
            below = rows[line, self.feature[at]] < self.threshold[at]
            at = np.where(inner, np.where(below, self.left[at], self.right[at]), at)
        total = np.full(len(rows), self.base, np.float32)
        for values in self.threshold[at].T:
            total += values
        return total

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; float32 numbers come back exactly."""
        return {
            "base": self.base,
            "roots": self.roots.tolist(),
            "feature": self.feature.tolist(),
            "threshold": [float(f"{value:.9g}") for value in self.threshold.tolist()],
            "left": self.left.tolist(),
            "right": self.right.tolist(),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], features: int) -> Trees:
        """Read what `to_dict` made, and refuse everything that could not be evaluated.

        Raises:
            LoadError: it is something else.
        """
        try:
            base = float(values["base"])
            roots, feature, left, right = (
                _whole(values[name]) for name in ("roots", "feature", "left", "right")
            )
            threshold = np.array(values["threshold"], np.float32)
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise LoadError(f"These are no trees: {error!r}.") from error
        trees = cls(base, roots, feature, threshold, left, right)
        problem = trees._problem(features)
        if problem:
            raise LoadError(f"These trees are damaged: {problem}.")
        return trees

    def _problem(self, features: int) -> str:
        nodes = len(self.feature)
        arrays = (self.feature, self.threshold, self.left, self.right)
        if any(a.ndim != 1 or len(a) != nodes for a in arrays) or self.roots.ndim != 1:
            return "their arrays have different lengths"
        if not (math.isfinite(self.base) and np.isfinite(self.threshold).all()):
            return "a number is not finite"
        if nodes > MOST_NODES:
            return f"there are more than {MOST_NODES} nodes"
        if len(self.roots) and (self.roots.min() < 0 or self.roots.max() >= nodes):
            return "a root is outside"
        if nodes and (self.feature.min() < 0 or self.feature.max() >= features):
            return f"a feature is not one of {features}"
        inner = self.left >= 0
        places = np.arange(nodes)
        for child in (self.left, self.right):
            # Children behind their parents: no way down is endless.
            if (child[inner] <= places[inner]).any() or (child[inner] >= nodes).any():
                return "a child does not follow its parent"
        return ""


def _whole(values: Any) -> np.ndarray:
    found = np.array(values)
    if found.size and found.dtype.kind not in "iu":
        raise ValueError("whole numbers are expected")
    return found.astype(np.int32).reshape(-1) if found.ndim <= 1 else found


def fit_trees(
    rows: np.ndarray,
    values: np.ndarray,
    weights: np.ndarray,
    *,
    rounds: int = 200,
    depth: int = 5,
    seed: int = 0,
) -> Trees:
    """Fit gradient-boosted trees with XGBoost (Chen & Guestrin 2016, arXiv 1603.02754).

    Args:
        rows: features (rows, features).
        values: to predict (rows,).
        weights: of the rows (rows,).
        rounds: number of trees.
        depth: of each at most.
        seed: of the rows and columns that each tree sees.

    Raises:
        MissingExtraError: XGBoost is not installed.
    """
    xgboost = import_xgboost()
    settings = {
        "objective": "reg:squarederror",
        "max_depth": depth,
        "eta": 0.06,
        "subsample": 0.8,
        "colsample_bytree": 0.8,
        "min_child_weight": 2.0 * float(np.mean(weights)),
        "lambda": 1.0,
        "base_score": 0.0,
        "nthread": 1,
        "seed": seed,
        "verbosity": 0,
    }
    table = xgboost.DMatrix(rows.astype(np.float32), label=values, weight=weights)
    return from_xgboost(xgboost.train(settings, table, num_boost_round=rounds))


def from_xgboost(booster: Any) -> Trees:
    """The arrays of a fitted booster, read from its JSON."""
    document = json.loads(bytes(booster.save_raw("json")))["learner"]
    model = document["gradient_booster"]["model"]
    base = str(document["learner_model_param"]["base_score"]).strip("[]")
    roots, feature, threshold, left, right = [], [], [], [], []
    start = 0
    for tree in model["trees"]:
        roots.append(start)
        size = len(tree["left_children"])
        feature += tree["split_indices"]
        threshold += tree["split_conditions"]
        left += [start + child if child >= 0 else -1 for child in tree["left_children"]]
        right += [start + child if child >= 0 else -1 for child in tree["right_children"]]
        start += size
    integers = (np.array(one, np.int32) for one in (roots, feature, left, right))
    root_array, feature_array, left_array, right_array = integers
    return Trees(
        float(base),
        root_array,
        feature_array,
        np.array(threshold, np.float32),
        left_array,
        right_array,
    )


def import_xgboost() -> Any:
    """The package.

    Raises:
        MissingExtraError: it is not installed.
    """
    try:
        import xgboost
    except ImportError as error:
        raise MissingExtraError(
            "Building a predictor needs XGBoost (using one does not), and it is not installed. "
            "Install it with: pip install 'hwcompress[predictor]'"
        ) from error
    return xgboost
