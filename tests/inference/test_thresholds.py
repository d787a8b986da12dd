"""Prediction sets and abstention from measured thresholds."""

from __future__ import annotations

import numpy as np

from utils.inference.thresholds import Thresholds

PROBABILITIES = np.array([[0.7, 0.2, 0.1], [0.4, 0.35, 0.25]])
CLASSES = ("a", "b", "c")


def test_a_set_holds_the_classes_whose_scores_are_within_the_limit():
    rows = Thresholds("lac", limit=0.7, abstain=None).apply(PROBABILITIES, CLASSES, [])
    assert [row["set"] for row in rows] == [["a"], ["a", "b"]]
    assert [row["abstain"] for row in rows] == [None, None]


def test_the_model_abstains_below_the_threshold_and_not_at_it():
    rows = Thresholds("lac", limit=None, abstain=0.7).apply(PROBABILITIES, CLASSES, [])
    assert [row["abstain"] for row in rows] == [False, True]
    assert [row["set"] for row in rows] == [None, None]


def test_the_most_probable_class_is_in_every_set():
    rows = Thresholds("aps", limit=0.0, abstain=None).apply(PROBABILITIES, CLASSES, [])
    assert [row["set"] for row in rows] == [["a"], ["a"]]


def test_randomised_sets_are_drawn_by_the_content_of_an_image(tmp_path):
    """The second class joins the set of the second image by chance alone, which its content decides."""
    images = [tmp_path / f"{number}.png" for number in range(40)]
    for number, path in enumerate(images):
        path.write_bytes(bytes([number % 20]))
    probabilities = np.repeat(PROBABILITIES[1:], 40, axis=0)
    thresholds = Thresholds("raps", limit=0.6, abstain=None)
    sets = [row["set"] for row in thresholds.apply(probabilities, CLASSES, images)]
    assert sets[:20] == sets[20:]
    assert {len(names) for names in sets} == {1, 2}
    assert sets == [row["set"] for row in thresholds.apply(probabilities, CLASSES, images)]
