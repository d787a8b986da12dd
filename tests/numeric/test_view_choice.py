"""The choice of views: found where they help, not made where they do not, and blind to the labels it is judged on."""

from __future__ import annotations

import numpy as np
import pytest

from utils.numeric import view_choice
from utils.numeric.view_choice import ORIGINAL, ViewOutputs, choose_views

ROWS, CLASSES = 400, 4
COUNTS = {"good": 1, "noise": 3, "bad": 1}


def outputs(seed=0, *, good=1.5, rows=ROWS, networks=1, groups=None):
    """Logits with independent noise for each group of views; `good` is the strength of the signal in its views."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(CLASSES, size=rows)
    truth = np.eye(CLASSES)[labels]
    strengths = {ORIGINAL: 1.5, "good": good, "noise": 0.0, "bad": -1.5}
    logits = {
        name: strength * truth + rng.normal(size=(networks, rows, CLASSES)) for name, strength in strengths.items()
    }
    return ViewOutputs(logits, COUNTS, labels, np.arange(rows) % 5, groups)


def test_views_that_help_are_chosen_and_others_are_not():
    choice = choose_views(outputs())
    assert choice.views == choice.on_all_rows == ("good",)
    assert choice.gain > 0.05
    assert choice.gain_interval[0] > 0
    assert choice.accuracy_gain > 0


@pytest.mark.parametrize("networks", [1, 3])
def test_views_without_information_are_rarely_chosen(networks):
    chosen = [choose_views(outputs(seed, good=0.0, networks=networks)).views for seed in range(20)]
    assert sum(views != () for views in chosen) <= 1


def test_lower_confidence_alone_is_no_reason():
    """Views equal to the image, with smaller logits, lower the log-loss of an overconfident network."""
    base = outputs()
    logits = {name: values * 5 for name, values in base.logits.items()}
    logits["good"] = np.zeros_like(logits[ORIGINAL])
    choice = choose_views(ViewOutputs(logits, COUNTS, base.labels, base.folds))
    assert choice.views == choice.on_all_rows == ()
    assert choice.gain == 0


def test_a_choice_that_depends_on_two_folds_is_not_made():
    base = outputs(good=1.5)
    mixed = {name: values.copy() for name, values in base.logits.items()}
    outside = base.folds > 1  # views help in two folds of five alone, and hurt a little elsewhere
    mixed["good"][:, outside] = outputs(good=0.0).logits["good"][:, outside]
    mixed["good"][:, ~outside] = outputs(good=6.0).logits["good"][:, ~outside]
    choice = choose_views(ViewOutputs(mixed, COUNTS, base.labels, base.folds))
    assert choice.on_all_rows == ("good",)
    assert choice.views == ()


def test_the_choice_for_a_fold_reads_no_label_of_it():
    base = outputs()
    for fold in range(5):
        labels = base.labels.copy()
        labels[base.folds == fold] = (labels[base.folds == fold] + 1) % CLASSES
        altered = ViewOutputs(base.logits, COUNTS, labels, base.folds)
        others = frozenset(range(5)) - {fold}
        assert view_choice._Rule(altered).stable(others) == view_choice._Rule(base).stable(others) == ("good",)


def test_equal_rows_of_a_group_are_counted_once():
    base = outputs(rows=40, good=0.75)
    tenfold = {name: np.repeat(values, 10, axis=1) for name, values in base.logits.items()}
    labels, folds = np.repeat(base.labels, 10), np.repeat(base.folds, 10)
    counted = choose_views(ViewOutputs(tenfold, COUNTS, labels, folds, np.repeat(np.arange(40), 10)))
    naive = choose_views(ViewOutputs(tenfold, COUNTS, labels, folds))
    widths = [high - low for low, high in (counted.gain_interval, naive.gain_interval)]
    assert counted.views == () or widths[0] > 2 * widths[1]


def test_mean_logits_weight_every_view_alike():
    base = outputs(rows=6)
    expected = (base.logits[ORIGINAL] + base.logits["good"] + 3 * base.logits["noise"]) / 5
    np.testing.assert_allclose(base.mean_logits(("good", "noise")), expected)


def test_one_fold_chooses_nothing_it_cannot_check():
    base = outputs()
    choice = choose_views(ViewOutputs(base.logits, COUNTS, base.labels, np.zeros(ROWS, dtype=np.int64)))
    assert choice.gain == 0
