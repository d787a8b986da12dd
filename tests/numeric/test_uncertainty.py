"""Conformal sets, abstaining, disagreement and the hint at foreign rows."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import betabinom

from utils.core.errors import UserError
from utils.numeric import uncertainty
from utils.numeric.metrics import softmax
from utils.numeric.uncertainty import LabelledRows


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


@pytest.mark.parametrize("kind", ["lac", "aps", "raps"])
def test_coverage_pooled_over_ten_resplits_is_as_promised(kind):
    covered = total = low = high = 0.0
    probabilities, labels = rows(np.random.default_rng(0), 600)
    for seed in range(10):
        shuffled = np.random.default_rng(seed).permutation(600)
        first, second = shuffled[:300], shuffled[300:]
        uniforms = uncertainty.uniform_numbers(map(str, range(600)))
        calibration, evaluated = [
            LabelledRows(probabilities[part], labels[part], uniforms[part]) for part in (first, second)
        ]
        found = uncertainty.conformal_metrics(kind, calibration, evaluated)
        covered += found["coverage"] / 10
        total += found["n"]
        low, high = found["coverage_interval"]
        assert found["mean_size"] > 1
    assert total == 3000
    scores, _ = evaluated.nonconformity(kind)
    by_rank = ((probabilities[second].argmax(axis=1) == labels[second]) & (scores > found["threshold"])).sum()
    assert (low, high) == tuple((betabinom(300, 271, 30).ppf([0.025, 0.975]) + by_rank) / 300)
    assert low <= covered
    if kind != "aps":
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
    rows = LabelledRows(certain, wrong)
    found = uncertainty.conformal_metrics("lac", rows, rows)
    assert (found["threshold"], found["coverage"], found["mean_size"]) == (1.0, 1.0, 4.0)


def test_too_few_rows():
    few = LabelledRows(*rows(np.random.default_rng(1), 8))
    assert uncertainty.conformal_metrics("lac", few, few) is None


def test_rows_that_are_covered_by_rank_alone_raise_the_interval():
    rng = np.random.default_rng(0)
    inside = 0
    for _ in range(300):
        parts = []
        for _ in range(2):
            logits = 20 * rng.normal(size=(360, 10))
            labels = (rng.gumbel(size=logits.shape) + logits).argmax(axis=1)
            parts.append(LabelledRows(softmax(logits), labels))
        found = uncertainty.conformal_metrics("lac", *parts)
        low, high = found["coverage_interval"]
        assert high <= 1
        inside += low <= found["coverage"] <= high
    assert found["coverage"] > 0.92  # above the nominal 0.9: the most probable class is nearly always the true one
    assert 0.92 <= inside / 300 <= 0.985


def test_each_class_has_its_own_threshold_and_too_few_rows_are_said():
    rng = np.random.default_rng(2)
    calibration, evaluated = rows(rng, 400, classes=3), rows(rng, 400, classes=3)
    rare = calibration[1] != 2
    rare[np.flatnonzero(~rare)[:5]] = True
    calibration = (calibration[0][rare], calibration[1][rare])
    names = ("a", "b", "c")
    found = uncertainty.class_conditional_metrics("lac", LabelledRows(*calibration), LabelledRows(*evaluated), names)
    found = found["classes"]
    for name in "ab":
        low, high = found[name]["coverage_interval"]
        assert low <= found[name]["coverage"] <= high
        assert found[name]["note"] is None
    assert found["c"]["threshold"] is None
    assert found["c"]["coverage"] == 1.0
    assert found["c"]["note"].startswith("too few rows: 5 val rows, and 0.1 needs 9")
    other = (evaluated[0][evaluated[1] != 1], evaluated[1][evaluated[1] != 1])
    absent = uncertainty.class_conditional_metrics("lac", LabelledRows(*calibration), LabelledRows(*other), names)
    absent = absent["classes"]["b"]
    assert (absent["coverage"], absent["coverage_interval"]) == (None, None)


def test_randomised_scores_by_hand():
    probabilities = np.array([[0.5, 0.2, 0.3], [1.0, 0.0, 0.0]])
    found = uncertainty.raps_scores(probabilities, np.array([0.25, 0.5]))
    np.testing.assert_allclose(found, [[0.125, 0.86, 0.575], [0.5, 1.0, 1.01]])
    np.testing.assert_allclose(uncertainty.raps_scores(probabilities)[1], found[1])


def test_the_random_number_of_a_name_repeats_and_is_uniform():
    names = [f"{number}.png" for number in range(2000)]
    numbers = uncertainty.uniform_numbers(names)
    assert numbers.tolist() == uncertainty.uniform_numbers(names).tolist()
    assert 0 <= numbers.min() < numbers.max() < 1
    np.testing.assert_allclose(np.quantile(numbers, [0.25, 0.5, 0.75]), [0.25, 0.5, 0.75], atol=0.03)


def test_the_threshold_of_groups_covers_rows_of_new_groups():
    """20 groups of very different size, easy or hard as a whole: rows as units miss far too many of the new groups."""
    rng = np.random.default_rng(5)
    covered = {"groups": [], "rows": []}
    for _ in range(300):
        sizes = np.append(rng.integers(1, 60, 20), 1)
        scores = rng.random(21).repeat(sizes) + 0.01 * rng.random(sizes.sum())
        groups = np.arange(21).repeat(sizes)
        limits = {
            "groups": uncertainty.conformal_threshold(scores[:-1], 0.1, groups[:-1]),
            "rows": uncertainty.conformal_threshold(scores[:-1], 0.1),
        }
        for name, limit in limits.items():
            covered[name].append(scores[-1] <= limit)
    assert np.mean(covered["groups"]) >= 0.87
    assert np.mean(covered["rows"]) < np.mean(covered["groups"])
    assert uncertainty.conformal_threshold(np.arange(80.0), 0.1, np.arange(80) // 10) is None  # eight groups


def test_groups_have_no_interval_of_the_coverage():
    few = LabelledRows(*rows(np.random.default_rng(1), 120), groups=np.arange(120) // 3)
    found = uncertainty.conformal_metrics("lac", few, few)
    assert found["coverage_interval"] is None
    assert found["coverage"] >= 0.85


def test_the_hint_tells_foreign_rows_and_is_silent_about_log_probabilities():
    rng = np.random.default_rng(4)
    known, alike = (rng.normal(size=(1000, 5)) + 6 * np.eye(5)[rng.integers(0, 5, 1000)] for _ in range(2))
    foreign = rng.normal(size=(1000, 5))
    of_known = uncertainty.ood_scores(known)
    for name in ("energy", "max_logit"):
        found = uncertainty.ood_summary(uncertainty.ood_scores(alike), of_known)
        assert found[name]["beyond"] == pytest.approx(0.05, abs=0.03)
        assert uncertainty.ood_summary(uncertainty.ood_scores(foreign), of_known)[name]["beyond"] > 0.9
    assert found["max_logit"]["reference"] == pytest.approx(np.quantile(known.max(axis=1), 0.05), rel=0.01)
    log_probabilities = uncertainty.ood_scores(np.log(softmax(known)))
    assert uncertainty.ood_summary(log_probabilities, log_probabilities) is None


def test_few_groups_are_no_ood_reference():
    of_rows = uncertainty.ood_scores(np.random.default_rng(5).normal(size=(90, 3)))
    assert uncertainty.ood_summary(of_rows, of_rows, np.arange(90) % 9) is None
    assert uncertainty.ood_summary(of_rows, of_rows, np.arange(90) % 10) == uncertainty.ood_summary(of_rows, of_rows)


@pytest.mark.parametrize("count", [30, 60])
def test_rows_like_the_reference_are_beyond_it_as_often_as_stated(count):
    rng = np.random.default_rng(8)
    beyond = [
        uncertainty.ood_summary(*(uncertainty.ood_scores(rng.normal(size=(count, 3))) for _ in range(2)))
        for _ in range(500)
    ]
    assert 0.03 < np.mean([summary["energy"]["beyond"] for summary in beyond]) < 0.055


def test_no_row_is_covered_by_its_rank_unless_that_is_said():
    assert uncertainty.coverage_interval(99, 50) == uncertainty.coverage_interval(99, 50, covered_by_rank=0)
    assert uncertainty.coverage_interval(99, 50) < uncertainty.coverage_interval(99, 50, covered_by_rank=1)


@pytest.mark.parametrize(("calibrated", "rows"), [(99, 1), (99, 5), (19, 40), (60, 200)])
def test_the_interval_of_the_coverage_is_that_of_the_beta_binomial_distribution(calibrated, rows):
    below = math.ceil((calibrated + 1) * 0.9)
    expected = betabinom.ppf([0.025, 0.975], rows, below, calibrated + 1 - below) / rows
    assert uncertainty.coverage_interval(calibrated, rows) == pytest.approx(expected)


def test_a_score_that_equals_the_reference_is_not_beyond_it():
    reference = uncertainty.ood_scores(np.random.default_rng(5).normal(size=(99, 3)))
    bounds = np.sort(reference, axis=1)[:, 94]  # the 95th of 99 scores
    found = uncertainty.ood_summary(np.stack([bounds, bounds + 1e-6], axis=1), reference)
    assert [found[name]["beyond"] for name in ("energy", "max_logit")] == [0.5, 0.5]
    assert [found["energy"]["reference"], -found["max_logit"]["reference"]] == bounds.tolist()
