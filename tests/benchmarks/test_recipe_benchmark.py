"""The trials of the training recipe: which of their values decide a training, and what stopping early keeps."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import recipe

from utils.numeric.temperature import fit_temperature


def test_trials_that_differ_in_what_takes_no_part_are_one_training():
    peak, floor = replace(recipe.USUAL, peak=3.0), replace(recipe.USUAL, floor=0.0)
    smoothing = recipe.TRIALS["smoothing 0.1"]
    for transformer, same, others in ((True, (peak, smoothing), (floor,)), (False, (floor,), (peak, smoothing))):
        usual = recipe.USUAL.values(transformer=transformer)
        assert all(trial.values(transformer=transformer) == usual for trial in same)
        assert all(trial.values(transformer=transformer) != usual for trial in others)


@pytest.mark.parametrize(
    ("accuracies", "expected"),
    [
        ([0.9] + 19 * [0.5], (15, 0)),  # five epochs after the middle
        ([0.5] * 12 + [0.9] + 7 * [0.6], (17, 12)),
        ([0.5] * 14 + [0.9] + 5 * [0.6], (19, 14)),
        ([0.9] + 11 * [0.5], (11, 0)),  # too short to stop
    ],
)
def test_a_training_stops_five_epochs_after_the_later_of_its_best_and_its_middle(accuracies, expected):
    assert recipe.stopped_early([(accuracy, -1.0) for accuracy in accuracies]) == expected


def test_scores_are_those_of_test_after_a_temperature_fitted_on_val():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 40)
    logits = 9 * np.eye(3)[labels] + rng.normal(0, 6, (40, 3))
    outcome = {"last/val": logits, "labels/val": labels, "last/test": logits[::-1], "labels/test": labels[::-1]}
    scores = recipe.scores_of(outcome, "last")
    scaled = logits / fit_temperature(logits, labels)
    losses = np.log(np.exp(scaled).sum(axis=1)) - scaled[np.arange(40), labels]
    assert scores["accuracy"] == pytest.approx((logits.argmax(axis=1) == labels).mean())
    assert scores["log_loss"] == pytest.approx(losses.mean(), abs=1e-6)
