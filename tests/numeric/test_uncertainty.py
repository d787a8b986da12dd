"""Conformal sets, abstaining, disagreement and the hint at foreign rows."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import betabinom

from utils.core.errors import UserError
from utils.numeric import uncertainty
from utils.numeric.metrics import softmax


def rows(rng, count, classes=5, strength=1.5):
    labels = rng.integers(0, classes, count)
    logits = rng.normal(size=(count, classes))
    logits[np.arange(count), labels] += strength
    return softmax(logits), labels


def test_scores_by_hand():
    probabilities = np.array([[0.5, 0.2, 0.3], [0.4, 0.4, 0.2], [1.0, 0.0, 0.0]])
    np.testing.assert_allclose(uncertainty.lac_scores(probabilities)[0], [0.5, 0.8, 0.7])
    expected = [[0.5, 1.0, 0.8], [0.8, 0.8, 1.0], [1.0, 1.0, 1.0]]
    np.testing.assert_allclose(uncertainty.aps_scores(probabilities), expected)


def test_the_threshold_is_the_right_order_statistic():
    scores = np.arange(1, 100) / 100
    assert uncertainty.conformal_threshold(scores, 0.1) == 0.9  # the 90th of 99
    assert uncertainty.conformal_threshold(scores[:9], 0.1) == 0.09  # nine rows are the fewest: the largest
    assert uncertainty.conformal_threshold(scores[:8], 0.1) is None
    assert uncertainty.min_calibration_rows(0.1) == 9
    assert uncertainty.min_calibration_rows(0.05) == 19
    for alpha in (0, 1, 1.5):
        with pytest.raises(UserError, match="alpha: found"):
            uncertainty.conformal_threshold(scores, alpha)


@pytest.mark.parametrize("kind", ["lac", "aps"])
def test_coverage_pooled_over_ten_resplits_is_as_promised(kind):
    covered = total = low = high = 0.0
    probabilities, labels = rows(np.random.default_rng(0), 600)
    for seed in range(10):
        shuffled = np.random.default_rng(seed).permutation(600)
        first, second = shuffled[:300], shuffled[300:]
        calibration, evaluated = [(probabilities[part], labels[part]) for part in (first, second)]
        found = uncertainty.conformal_metrics(kind, calibration, evaluated)
        covered += found["coverage"] / 10
        total += found["n"]
        low, high = found["coverage_interval"]
        assert found["mean_size"] > 1
    assert total == 3000
    assert (low, high) == tuple(betabinom(300, 271, 30).ppf([0.025, 0.975]) / 300)
    assert low <= covered
    if kind == "lac":
        assert covered <= high


def test_sets_hold_the_top_class_and_grow_with_the_threshold():
    probabilities = np.array([[0.6, 0.3, 0.1], [0.34, 0.33, 0.33]])
    for kind in uncertainty.NONCONFORMITY_SCORES:
        none = uncertainty.prediction_sets(kind, probabilities, 0.0)
        assert none.tolist() == [[True, False, False], [True, False, False]]
        assert uncertainty.prediction_sets(kind, probabilities, 1.0).all()
    assert uncertainty.prediction_sets("lac", probabilities, 0.7).tolist()[0] == [True, True, False]
    assert uncertainty.prediction_sets("aps", probabilities, 0.9).tolist()[0] == [True, True, False]
    by_class = uncertainty.prediction_sets("lac", probabilities, [0.0, 0.0, math.nan])
    assert by_class.tolist() == [[True, False, True], [True, False, True]]


def test_probabilities_of_exactly_0_and_1_cover_everything_they_must():
    certain = np.eye(4)[np.arange(40) % 4]
    wrong = (np.arange(40) + (np.arange(40) < 20)) % 4  # half of the labels are another class
    found = uncertainty.conformal_metrics("lac", (certain, wrong), (certain, wrong))
    assert (found["threshold"], found["coverage"], found["mean_size"]) == (1.0, 1.0, 4.0)


def test_too_few_rows():
    probabilities, labels = rows(np.random.default_rng(1), 8)
    assert uncertainty.conformal_metrics("lac", (probabilities, labels), (probabilities, labels)) is None


def test_each_class_has_its_own_threshold_and_too_few_rows_are_said():
    rng = np.random.default_rng(2)
    calibration, evaluated = rows(rng, 400, classes=3), rows(rng, 400, classes=3)
    rare = calibration[1] != 2
    rare[np.flatnonzero(~rare)[:5]] = True
    calibration = (calibration[0][rare], calibration[1][rare])
    found = uncertainty.class_conditional_metrics("lac", calibration, evaluated, ("a", "b", "c"))["classes"]
    for name in "ab":
        low, high = found[name]["coverage_interval"]
        assert low <= found[name]["coverage"] <= high
        assert found[name]["note"] is None
    assert found["c"]["threshold"] is None
    assert found["c"]["coverage"] == 1.0
    assert found["c"]["note"].startswith("too few rows: 5 val rows, and 0.1 needs 9")
    other = (evaluated[0][evaluated[1] != 1], evaluated[1][evaluated[1] != 1])
    absent = uncertainty.class_conditional_metrics("lac", calibration, other, ("a", "b", "c"))["classes"]["b"]
    assert (absent["coverage"], absent["coverage_interval"]) == (None, None)


def test_risk_and_coverage_by_hand():
    probabilities = np.array([[0.9, 0.1], [0.8, 0.2], [0.8, 0.2], [0.6, 0.4]])
    share, risk = uncertainty.risk_coverage(probabilities, np.array([0, 1, 0, 1]))
    assert share.tolist() == [0.25, 0.5, 0.75, 1.0]
    # The two rows of 0.8 share their one error.
    assert risk.tolist() == [0.0, 0.25, pytest.approx(1 / 3), 0.5]
    found = uncertainty.selective_metrics((probabilities, np.array([0, 1, 0, 1])), None)
    assert found["aurc"] == pytest.approx(risk.mean())
    assert (found["threshold"], found["answered"], found["error"]) == (None, None, None)


def test_the_lowest_confidence_that_keeps_the_target_risk():
    confidence = np.array([0.95, 0.9, 0.9, 0.8, 0.7, 0.6])
    probabilities = np.stack([confidence, 1 - confidence], axis=1)
    labels = np.array([0, 0, 1, 0, 0, 1])
    assert uncertainty.confidence_threshold(probabilities, labels, 0.2) == 0.7  # one of five is wrong
    assert uncertainty.confidence_threshold(probabilities, labels, 0.19) == 0.95
    assert uncertainty.confidence_threshold(probabilities, labels, 0.4) == 0.6
    assert uncertainty.confidence_threshold(probabilities, 1 - labels, 0.1) is None
    with pytest.raises(UserError, match="target risk"):
        uncertainty.confidence_threshold(probabilities, labels, 1.0)


def test_selective_keeps_at_most_50_points_and_judges_the_threshold_on_other_rows():
    rng = np.random.default_rng(3)
    calibration, evaluated = rows(rng, 2000), rows(rng, 3000)
    found = uncertainty.selective_metrics(evaluated, calibration, target_risk=0.1)
    assert len(found["coverage"]) == len(found["risk"]) == 50
    assert (found["coverage"][-1], found["target_risk"]) == (1.0, 0.1)
    assert found["error"] == pytest.approx(0.1, abs=0.03)
    assert 0.1 < found["answered"] < 0.9
    assert uncertainty.confidence_threshold(*calibration, 0.1) == found["threshold"]


def test_the_hint_tells_foreign_rows_and_is_silent_about_log_probabilities():
    rng = np.random.default_rng(4)
    known, alike = (rng.normal(size=(1000, 5)) + 6 * np.eye(5)[rng.integers(0, 5, 1000)] for _ in range(2))
    foreign = rng.normal(size=(1000, 5))
    of_known = uncertainty.ood_scores(known)
    for name in ("energy", "max_logit"):
        found = uncertainty.ood_summary(uncertainty.ood_scores(alike), of_known)
        assert found[name]["beyond"] == pytest.approx(0.05, abs=0.03)
        assert uncertainty.ood_summary(uncertainty.ood_scores(foreign), of_known)[name]["beyond"] > 0.9
    assert found["max_logit"]["reference"] == pytest.approx(np.quantile(known.max(axis=1), 0.05))
    log_probabilities = uncertainty.ood_scores(np.log(softmax(known)))
    assert uncertainty.ood_summary(log_probabilities, log_probabilities) is None
