"""Folds and groups of rows, the score of a selection, its widening, and the cheapest of near-best candidates."""

from __future__ import annotations

import numpy as np
import pytest

from utils.building.selection_rule import RowUnits, after_selection, nearest_by_cost, selection_widening
from utils.numeric.means import standard_error


@pytest.mark.parametrize("order", [(0, 1, 2), (1, 0, 2), (2, 1, 0)])
def test_a_row_without_a_group_is_a_group_by_itself(order):
    keys = [("train", name) for name in "abc"]
    units = RowUnits({}, {("train", "b"): 0, ("train", "c"): 1, ("val", "d"): 1})
    assert len(set(units.groups_of([keys[n] for n in order]).tolist())) == 3


@pytest.mark.parametrize(
    ("folds", "expected"),
    [
        ([0, 0, 1, 1, 0, 1, 0], [0, 0, 1, 1, 0, 1, 0]),
        ([1, 1, 2, 2, 1, 2, 1], [1, 1, 2, 2, 1, 2, 1]),
        ([3, 3, 3, 3, 3, 3, 3], [0, 1, 2, 3, 4, 0, 1]),
        ([0, 0, 2, 2, 0, 2, None], [0, 1, 2, 3, 4, 0, 1]),
    ],
)
def test_rows_without_folds_take_five_in_turn(folds, expected):
    keys = [("train", str(n)) for n in range(7)]
    fold_of = {key: fold for key, fold in zip(keys, folds, strict=True) if fold is not None}
    assert RowUnits(fold_of, {}).folds_of(keys).tolist() == expected


def test_groups_without_folds_take_five_in_turn():
    keys = [("train", str(n)) for n in range(7)]
    units = RowUnits({}, dict(zip(keys, [8, 8, 3, 3, 8, 9, 8], strict=True)))
    assert units.folds_of(keys).tolist() == [1, 1, 0, 0, 1, 2, 1]


@pytest.mark.parametrize(("groups", "rows_of_fold"), [(None, 20), (None, 30), (np.arange(60) // 2, 20)])
def test_the_widening_is_that_of_literally_repeated_selections(groups, rows_of_fold):
    rng = np.random.default_rng(4)
    losses, folds = rng.gamma(1.0, 0.5, (8, 60)), np.arange(60) // rows_of_fold
    units = np.arange(60) if groups is None else groups
    count = units.max() + 1
    means = []
    for times in np.random.default_rng(0).multinomial(count, np.full(count, 1 / count), 300):
        rows = np.repeat(np.arange(60), times[units])
        means.append(after_selection(losses[:, rows], losses[:, rows] > 0, folds[rows])[0].mean())
    plain = standard_error(after_selection(losses, losses > 0, folds)[0], groups)
    excess = np.var(means) / plain**2 - 1
    assert excess > 0.2
    assert selection_widening(losses, folds, groups) == pytest.approx(np.sqrt(1 + excess / 2))


def test_nothing_is_widened_without_a_selection_or_a_spread():
    losses = np.random.default_rng(4).gamma(1.0, 0.5, (8, 60))
    assert selection_widening(losses, np.zeros(60, dtype=int), None) == 1
    assert selection_widening(np.ones((3, 60)), np.arange(60) % 2, None) == 1
    assert selection_widening(losses[:1], np.arange(60) % 2, None) == pytest.approx(1, abs=0.05)


def test_of_equally_cheap_ones_the_lower_loss_wins():
    rng = np.random.default_rng(0)
    base, noise = rng.gamma(1.0, 0.3, 200), rng.normal(size=200)
    losses = np.stack([base, base + 0.002 * (noise - noise.mean()) + 0.0001, base])
    assert nearest_by_cost(losses, 0, [5.0, 1.0, 1.0], None) == 2
    assert nearest_by_cost(losses, 0, [None, 2.0, None], None) == 1
