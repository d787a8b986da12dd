"""Adaptive calibration error and reliability diagrams, by hand."""

from __future__ import annotations

import numpy as np
import pytest

from utils.numeric import metrics


def two_classes(confidence, right):
    """Rows that predict class 0 with the given confidence, and whether that is their label."""
    confidence = np.array(confidence)
    return np.stack([confidence, 1 - confidence], axis=1), np.where(right, 0, 1)


def test_adaptive_error_by_hand_with_confidence_of_exactly_1():
    # 30 rows in 15 bins of two. The ten rows of confidence 1.0, eight of them right, fill the last five bins, and each
    # of these holds two tenths of all ten: gap |0.8 - 1|. The twenty below are all right at 0.9: gap 0.1.
    probabilities, labels = two_classes([0.9] * 20 + [1.0] * 10, [True] * 20 + [True] * 8 + [False] * 2)
    assert metrics.ece_adaptive(probabilities, labels) == pytest.approx((20 * 0.1 + 10 * 0.2) / 30, abs=1e-12)
    # Whatever the order of the rows.
    shuffled = np.random.default_rng(0).permutation(30)
    assert metrics.ece_adaptive(probabilities[shuffled], labels[shuffled]) == pytest.approx(4 / 30, abs=1e-12)


def test_adaptive_bins_hold_equally_many_rows():
    # 15 rows of different confidence are 15 bins; 0.6 right, 0.61 wrong ...: each gap counts by itself.
    confidence = 0.6 + 0.01 * np.arange(15)
    right = np.arange(15) % 2 == 0
    expected = np.abs(right - confidence).mean()
    assert metrics.ece_adaptive(*two_classes(confidence, right)) == pytest.approx(expected, abs=1e-12)
    # 30 rows: neighbours share a bin, so that their gaps cancel.
    confidence = 0.6 + 0.01 * np.arange(30)
    right = np.arange(30) % 2 == 0
    expected = np.abs((right - confidence).reshape(15, 2).sum(axis=1)).sum() / 30
    assert metrics.ece_adaptive(*two_classes(confidence, right)) == pytest.approx(expected, abs=1e-12)


def test_a_row_on_the_bound_of_two_bins_belongs_to_both_in_part():
    # 16 rows, 15 bins of 16/15 rows: the first bin holds row 0 and a fifteenth of row 1.
    confidence = 0.6 + 0.01 * np.arange(16)
    right = np.zeros(16, dtype=bool)
    right[0] = True
    gaps = right - confidence
    expected = (abs(gaps[0] + gaps[1] / 15) + abs(gaps[1:].sum() - gaps[1] / 15)) / 16
    assert metrics.ece_adaptive(*two_classes(confidence, right)) == pytest.approx(expected, abs=1e-12)


def test_one_row_and_all_rows_alike():
    assert metrics.ece_adaptive(np.array([[1.0, 0.0]]), np.array([1])) == 1.0
    probabilities, labels = two_classes([0.75] * 8, [True] * 6 + [False] * 2)
    assert metrics.ece_adaptive(probabilities, labels) == pytest.approx(0, abs=1e-12)


def test_reliability_by_hand():
    probabilities, labels = two_classes([1.0, 1.0, 0.95, 0.6], [True, False, True, False])
    found = metrics.reliability(probabilities, labels)
    assert [len(found[key]) for key in ("confidence", "accuracy", "count")] == [15, 15, 15]
    assert found["count"][14] == 3  # 0.95 and 1.0 lie in (14/15, 1]
    assert found["accuracy"][14] == pytest.approx(2 / 3)
    assert found["confidence"][14] == pytest.approx(2.95 / 3)
    assert (found["count"][8], found["accuracy"][8]) == (1, 0.0)  # (8/15, 9/15] holds 0.6
    assert (found["count"][0], found["accuracy"][0]) == (0, None)
    assert found["confidence"][0] == pytest.approx(0.5 / 15)
    gaps = [
        count * abs(accuracy - confidence)
        for count, accuracy, confidence in zip(found["count"], found["accuracy"], found["confidence"], strict=True)
        if count
    ]
    assert sum(gaps) / 4 == pytest.approx(metrics.ece(probabilities, labels))
