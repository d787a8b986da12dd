"""Prediction sets and abstention from measured thresholds."""

from __future__ import annotations

import numpy as np

from utils.inference.thresholds import Thresholds

PROBABILITIES = np.array([[0.7, 0.2, 0.1], [0.4, 0.35, 0.25]])
CLASSES = ("a", "b", "c")


def test_a_set_holds_the_classes_whose_scores_are_within_the_limit():
    rows = Thresholds("lac", limit=0.7, abstain=None).apply(PROBABILITIES, CLASSES)
    assert [row["set"] for row in rows] == [["a"], ["a", "b"]]
    assert [row["abstain"] for row in rows] == [None, None]


def test_the_model_abstains_below_the_threshold_and_not_at_it():
    rows = Thresholds("lac", limit=None, abstain=0.7).apply(PROBABILITIES, CLASSES)
    assert [row["abstain"] for row in rows] == [False, True]
    assert [row["set"] for row in rows] == [None, None]


def test_the_most_probable_class_is_in_every_set():
    rows = Thresholds("aps", limit=0.0, abstain=None).apply(PROBABILITIES, CLASSES)
    assert [row["set"] for row in rows] == [["a"], ["a"]]
