"""Copies of a cross-fitting share fits on equal rows, and predict what copies without anything shared predict."""

from __future__ import annotations

from copy import deepcopy

import numpy as np
import pytest

from utils.combiners import greedy, pooling
from utils.combiners.greedy import GreedySelection
from utils.combiners.protocol import fit_crossfitted, fit_nested
from utils.combiners.shared_fits import SharedFits
from utils.combiners.weighting import WeightedPool

pytestmark = pytest.mark.usefixtures("short_searches")

FOLDS = 4
PAIRS, TRIPLES = 6, 4


@pytest.fixture(scope="module")
def rows():
    rng = np.random.default_rng(6)
    labels = rng.integers(0, 3, 200)
    logits = rng.normal(size=(4, 200, 3)).astype(np.float32)
    logits += np.eye(3, dtype=np.float32)[labels] * rng.uniform(0.5, 2, (4, 200, 1)).astype(np.float32)
    return logits, labels, np.arange(200) % FOLDS


def test_a_deep_copy_shares_results():
    shared, calls = SharedFits(), []
    rows = (np.arange(6.0),)
    for holder in (shared, deepcopy(shared), deepcopy([shared])[0]):
        assert holder.result("a", rows, lambda: calls.append(1) or len(calls)) == 1
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("settings", "values"),
    [
        ("b", np.arange(6.0)),
        ("a", np.arange(6.0).reshape(2, 3)),
        ("a", np.arange(6.0).view(np.int64)),
        ("a", np.arange(6.0)[::-1]),
    ],
)
def test_other_settings_shapes_types_and_values_are_other_results(settings, values):
    shared = SharedFits()
    assert shared.result("a", (np.arange(6.0),), lambda: 1) == 1
    assert shared.result(settings, (values,), lambda: 2) == 2


RECIPES = {
    "greedy": lambda: GreedySelection(metric="f1_macro"),
    "linear": lambda: WeightedPool(metric="log_loss", kind="linear"),
    "log_linear": lambda: WeightedPool(metric="log_loss", kind="log_linear"),
    "auto": lambda: WeightedPool(metric="accuracy"),
}


@pytest.mark.parametrize("name", RECIPES)
def test_predictions_are_those_of_copies_that_share_nothing(name, rows, monkeypatch):
    shared = fit_nested(RECIPES[name](), *rows)
    monkeypatch.setattr(SharedFits, "__deepcopy__", lambda *_: SharedFits())
    alone = fit_nested(RECIPES[name](), *rows)
    assert shared.crossfit.tobytes() == alone.crossfit.tobytes()
    assert [values.tobytes() for values in shared.inner.values()] == [
        values.tobytes() for values in alone.inner.values()
    ]


def test_selections_of_greedy_copies_are_made_once(rows, monkeypatch):
    """Without each fold and each pair of folds, with and without bags; on all rows, with one of them."""
    made = []
    original = greedy.select_members
    monkeypatch.setattr(greedy, "select_members", lambda *args, **options: made.append(1) or original(*args, **options))
    fit_crossfitted(GreedySelection(metric="log_loss"), *rows)
    assert len(made) == 2 * (FOLDS + PAIRS) + 1


def test_paths_of_weights_are_followed_once(rows, monkeypatch):
    made = []
    original = pooling._path
    monkeypatch.setattr(pooling, "_path", lambda *args: made.append(1) or original(*args))
    fit_crossfitted(WeightedPool(metric="log_loss", kind="linear"), *rows)
    assert len(made) == FOLDS + PAIRS
    made.clear()
    fit_nested(WeightedPool(metric="log_loss", kind="linear"), *rows)
    assert len(made) == FOLDS + PAIRS + TRIPLES


def test_copies_select_by_the_same_rows_of_a_fold(monkeypatch):
    """Where rows are sampled: the rows of a fold do not depend on which other folds there are."""
    monkeypatch.setattr(pooling, "MAX_TUNING_ROWS", 40)
    labels, folds = np.arange(107) % 4, np.arange(107) % 3  # 36, 36 and 35 rows
    without = {}
    for fold in range(3):
        inside = folds != fold
        without[fold] = np.flatnonzero(inside)[pooling.tuning_rows(labels[inside], folds[inside], 1)]
    of_second = [rows[folds[rows] == 1].tolist() for fold, rows in without.items() if fold != 1]
    assert of_second[0] == of_second[1]
    assert len(of_second[0]) == 18
