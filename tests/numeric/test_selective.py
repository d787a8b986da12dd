"""Selective prediction: the risk-coverage curve, and thresholds that keep their target."""

from __future__ import annotations

import numpy as np
import pytest

from utils.core.errors import UserError
from utils.numeric import selective
from utils.numeric.metrics import softmax


def rows(rng, count, classes=5, strength=1.5):
    labels = rng.integers(0, classes, count)
    logits = rng.normal(size=(count, classes))
    logits[np.arange(count), labels] += strength
    return softmax(logits * strength), labels


def test_risk_and_coverage_by_hand():
    probabilities = np.array([[0.9, 0.1], [0.8, 0.2], [0.8, 0.2], [0.6, 0.4]])
    share, risk = selective.risk_coverage(probabilities, np.array([0, 1, 0, 1]))
    assert share.tolist() == [0.25, 0.5, 0.75, 1.0]
    # The two rows of 0.8 share their one error.
    assert risk.tolist() == [0.0, 0.25, pytest.approx(1 / 3), 0.5]
    found = selective.selective_metrics((probabilities, np.array([0, 1, 0, 1])), None)
    assert found["aurc"] == pytest.approx(risk.mean())
    assert (found["threshold"], found["answered"], found["error"]) == (None, None, None)


def test_the_last_threshold_whose_upper_bound_keeps_the_target():
    """100 rows without an error establish an error rate of 5%; one error among 100 does as well, two do not."""
    confidence = np.linspace(0.99, 0.5, 100)
    probabilities = np.stack([confidence, 1 - confidence], axis=1)
    labels = np.zeros(100, dtype=int)
    threshold = selective.confidence_threshold(probabilities, labels, 0.05)
    assert threshold == pytest.approx(0.5)
    labels[99] = 1
    assert selective.confidence_threshold(probabilities, labels, 0.05) == pytest.approx(0.5)
    labels[98] = 1
    assert selective.confidence_threshold(probabilities, labels, 0.05) == pytest.approx(confidence[94])
    labels[:3] = 1  # whatever is tested first fails
    assert selective.confidence_threshold(probabilities, labels, 0.05) is None
    with pytest.raises(UserError, match="target risk"):
        selective.confidence_threshold(probabilities, labels, 1.0)


def test_too_few_rows_establish_nothing():
    assert selective.min_rows(0.05) == 59
    assert selective.min_rows(0.0) is None
    certain = np.eye(2)[np.zeros(58, dtype=int)]
    assert selective.confidence_threshold(certain, np.zeros(58, dtype=int), 0.05) is None
    assert selective.confidence_threshold(certain, np.zeros(58, dtype=int), 0.0) is None


@pytest.mark.parametrize("count", [60, 200, 800])
def test_the_true_error_exceeds_the_target_in_few_cases(count):
    rng = np.random.default_rng(count)
    probabilities, labels = rows(rng, 100_000, strength=2.0)
    confidence, is_wrong = probabilities.max(axis=1), probabilities.argmax(axis=1) != labels
    exceeded = answered = 0
    for _ in range(200):
        limit = selective.confidence_threshold(*rows(rng, count, strength=2.0), 0.05)
        if limit is not None:
            exceeded += is_wrong[confidence >= limit].mean() > 0.05
            answered += 1
    assert exceeded / 200 <= 0.07
    assert answered / 200 > {60: -1, 200: 0.2, 800: 0.8}[count]


def test_rows_of_one_group_count_once():
    confidence = np.repeat(np.linspace(0.99, 0.5, 30), 10)
    probabilities = np.stack([confidence, 1 - confidence], axis=1)
    labels = np.zeros(300, dtype=int)
    assert selective.confidence_threshold(probabilities, labels, 0.05) == pytest.approx(0.5)
    assert selective.confidence_threshold(probabilities, labels, 0.05, np.repeat(np.arange(30), 10)) is None


def test_selective_keeps_at_most_50_points_and_measures_the_threshold_on_other_rows():
    rng = np.random.default_rng(3)
    calibration, evaluated = rows(rng, 2000), rows(rng, 3000)
    found = selective.selective_metrics(evaluated, calibration, target_risk=0.1)
    assert len(found["coverage"]) == len(found["risk"]) == 50
    assert (found["coverage"][-1], found["target_risk"], found["confidence"]) == (1.0, 0.1, 0.95)
    assert 0.04 < found["error"] < 0.11
    assert 0.1 < found["answered"] < 0.9
    assert selective.confidence_threshold(*calibration, 0.1) == found["threshold"]
