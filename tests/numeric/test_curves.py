"""ROC and precision-recall curves: the points are scikit-learn's, and their number is bounded."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import auc, precision_recall_curve, roc_curve

from utils.numeric import curves
from utils.numeric.metrics import softmax


def rows(seed, count, classes=3):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, count)
    logits = rng.normal(size=(count, classes))
    logits[np.arange(count), labels] += 1
    return softmax(logits), labels


@pytest.mark.parametrize("decimals", [None, 1], ids=["all different", "many ties"])
def test_the_points_are_those_of_scikit_learn(decimals):
    probabilities, labels = rows(0, 80)
    if decimals:
        probabilities = probabilities.round(decimals)
        probabilities[:, 0] += 1 - probabilities.sum(axis=1)
    found = curves.class_curves(probabilities, labels, "abc")
    for index, name in enumerate("abc"):
        truth, scores, curve = labels == index, probabilities[:, index], found[name]
        false, true, thresholds = roc_curve(truth, scores, drop_intermediate=False)
        for key, values in zip(curves.POINT_KEYS, (thresholds, false, true), strict=False):
            np.testing.assert_allclose(curve[key], values[1:], atol=1e-12)
        precision, recall, _ = precision_recall_curve(truth, scores)
        np.testing.assert_allclose(curve["precision"], precision[:-1][::-1], atol=1e-12)
        np.testing.assert_allclose(curve["true_positive_rate"], recall[:-1][::-1], atol=1e-12)


def test_of_many_rows_few_points_are_kept_that_have_nearly_the_same_area():
    probabilities, labels = rows(1, 20_000)
    found = curves.class_curves(probabilities, labels, "abc")
    for index, name in enumerate("abc"):
        false, true, _ = roc_curve(labels == index, probabilities[:, index])
        kept = found[name]
        assert len(kept["threshold"]) <= curves.MAX_POINTS
        assert (kept["true_positive_rate"][-1], kept["false_positive_rate"][-1]) == (1.0, 1.0)
        area = auc([0, *kept["false_positive_rate"]], [0, *kept["true_positive_rate"]])
        assert area == pytest.approx(auc(false, true), abs=2e-4)


def test_many_classes_share_the_points_and_very_many_have_none():
    probabilities, labels = rows(2, 3000, classes=50)
    found = curves.class_curves(probabilities, labels, [str(index) for index in range(50)])
    assert max(len(curve["threshold"]) for curve in found.values()) == curves.MAX_ALL_POINTS // 50
    wide = np.full((4, 101), 1 / 101)
    assert curves.class_curves(wide, [0, 1, 2, 3], [str(index) for index in range(101)]) is None


def test_a_class_without_rows_or_with_all_has_no_curve():
    probabilities, _ = rows(3, 10)
    assert list(curves.class_curves(probabilities, [0] * 5 + [2] * 5, "abc")) == ["a", "c"]
    assert curves.class_curves(probabilities, [1] * 10, "abc") == {}
