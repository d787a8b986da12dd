"""Intervals of the figures of each class: they hold the truth, widen with groups, and are missing for few rows."""

from __future__ import annotations

import numpy as np

from utils.numeric.class_intervals import class_intervals
from utils.numeric.metrics import point_metrics, softmax
from utils.numeric.proportions import wilson_interval

FIGURES = {
    *("sensitivity", "specificity", "positive_predictive_value", "negative_predictive_value"),
    *("average_precision", "roc_auc"),
}


def rows(rng, count, classes=3, strength=1.5):
    labels = rng.integers(0, classes, count)
    logits = rng.normal(size=(count, classes))
    logits[np.arange(count), labels] += strength
    return softmax(logits), labels


def test_they_hold_the_truth_as_often_as_they_say():
    rng = np.random.default_rng(0)
    truth = point_metrics(*rows(rng, 100_000), "abc")["per_class"]
    held = {name: [] for name in FIGURES}
    for _ in range(150):
        for name, found in zip("abc", class_intervals(*rows(rng, 120)), strict=True):
            for figure, (low, high) in found.items():
                held[figure].append(low <= truth[name][figure] <= high)
    for figure, hits in held.items():
        assert len(hits) > 400
        assert np.mean(hits) >= 0.93, figure


def test_a_rate_has_the_interval_of_wilson_and_groups_widen_it():
    probabilities, labels = rows(np.random.default_rng(1), 200)
    found = class_intervals(probabilities, labels)
    hits, support = ((labels == 1) & (probabilities.argmax(axis=1) == 1)).sum(), (labels == 1).sum()
    assert tuple(found[1]["sensitivity"]) == wilson_interval(hits / support, support)
    twice = np.repeat(np.arange(200), 4)
    grouped = class_intervals(probabilities[twice], labels[twice], twice)
    independent = class_intervals(probabilities[twice], labels[twice])
    for figure in FIGURES:
        wide, narrow = (low_high[1][figure] for low_high in (grouped, independent))
        assert wide[1] - wide[0] > 1.5 * (narrow[1] - narrow[0]), figure


def test_few_rows_have_none():
    probabilities, labels = rows(np.random.default_rng(2), 40)
    labels = np.where(np.arange(40) < 4, 2, labels % 2)
    found = class_intervals(probabilities, labels)
    assert not {"sensitivity", "roc_auc", "average_precision"} & found[2].keys()
    assert {"specificity", "negative_predictive_value"} <= found[2].keys()
    assert class_intervals(np.full((3, 1001), 1 / 1001), [0, 1, 2]) is None


def test_a_class_that_is_told_apart_without_error_has_the_interval_of_its_rows():
    rng = np.random.default_rng(3)
    labels = np.arange(59) % 4
    probabilities = softmax(8 * np.eye(4)[labels] + rng.normal(size=(59, 4)))
    for found, support in zip(class_intervals(probabilities, labels), np.bincount(labels), strict=True):
        for area in ("roc_auc", "average_precision"):
            assert tuple(found[area]) == wilson_interval(1.0, support)
