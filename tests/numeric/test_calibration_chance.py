"""The calibration error that chance alone gives, and the words on calibration that follow from it."""

from __future__ import annotations

import numpy as np
import pytest

from utils.numeric.calibration_chance import calibration_verdict, chance_ece
from utils.numeric.metrics import ece, softmax

GOOD = {"well calibrated", "compatible with perfect calibration"}


def rows(rng, count, sharpness=1.0, classes=4):
    """Probabilities and labels that are drawn from them; `sharpness` above 1 makes the model overconfident."""
    probabilities = softmax(rng.normal(size=(count, classes)) * 2)
    labels = (rng.random(count)[:, None] > probabilities.cumsum(axis=1)).sum(axis=1)
    return softmax(sharpness * np.log(probabilities)), labels


@pytest.mark.parametrize("count", [60, 1000])
def test_a_perfect_model_is_rarely_called_badly_calibrated(count):
    rng = np.random.default_rng(count)
    verdicts, errors = [], []
    for _ in range(200):
        probabilities, labels = rows(rng, count)
        errors.append(ece(probabilities, labels))
        verdicts.append(calibration_verdict(errors[-1], chance_ece(probabilities, labels)))
    assert np.mean([verdict not in GOOD for verdict in verdicts]) <= 0.08
    chance = chance_ece(*rows(rng, count))
    assert chance["mean"] == pytest.approx(np.mean(errors), rel=0.1)
    assert chance["quantile"] == pytest.approx(np.quantile(errors, 0.95), rel=0.15)


def test_an_overconfident_model_is_told_where_there_are_rows_enough():
    probabilities, labels = rows(np.random.default_rng(1), 2000, sharpness=3.0)
    assert calibration_verdict(ece(probabilities, labels), chance_ece(probabilities, labels)) == "not well calibrated"


def test_groups_whose_rows_are_alike_give_more_by_chance():
    rng = np.random.default_rng(2)
    probabilities, labels = rows(rng, 200)
    repeated, groups = np.repeat(np.arange(200), 5), np.repeat(np.arange(200), 5)
    alone = chance_ece(probabilities[repeated], labels[repeated])
    grouped = chance_ece(probabilities[repeated], labels[repeated], groups)
    assert grouped["quantile"] == pytest.approx(alone["quantile"] * 5**0.5, rel=0.05)
