"""Verdicts on two models by paired intervals."""

from __future__ import annotations

import numpy as np

from utils.numeric.paired_comparison import compare_losses, compare_models

LABELS = np.arange(400) % 2


def model(hits, confidence=0.8):
    predicted = np.where(hits, LABELS, 1 - LABELS)
    return np.where(np.eye(2, dtype=bool)[predicted], confidence, 1 - confidence)


def test_a_clear_gain_is_better_and_the_reverse_is_worse():
    good, poor = model(np.arange(400) % 20 > 0), model(np.arange(400) % 5 > 0)
    assert compare_models(good, poor, LABELS).better == ["accuracy", "log-loss"]
    assert compare_models(poor, good, LABELS).worse == ["accuracy", "log-loss"]
    assert compare_models(good, good, LABELS).better == compare_models(good, good, LABELS).worse == []
    record = compare_models(good, poor, LABELS).as_record()
    assert record["accuracy_gain"] > 0 < record["accuracy_gain_interval"][0] < record["accuracy_gain_interval"][1]


def test_two_metrics_of_equal_models_are_rarely_told_apart():
    """With intervals of 95% each, one of the two does not contain 0 in up to a tenth of the cases."""
    rng = np.random.default_rng(0)
    claims = 0
    for _ in range(400):
        first, second = (model(rng.random(400) < 0.9, rng.uniform(0.75, 0.85, 400)[:, None]) for _ in range(2))
        compared = compare_models(first, second, LABELS)
        claims += bool(compared.better or compared.worse)
    assert claims / 400 <= 0.06


def test_several_comparisons_widen_the_intervals():
    rng = np.random.default_rng(1)
    losses = rng.gamma(1.0, 0.4, 400), rng.gamma(1.0, 0.4, 400)
    hits = losses[0] < 1, losses[1] < 1
    once, often = (compare_losses(hits, losses, comparisons=count) for count in (1, 8))
    for name in ("accuracy_interval", "log_loss_interval"):
        assert np.ptp(getattr(often, name)) > 1.15 * np.ptp(getattr(once, name))
    few = compare_losses(hits, losses, groups=np.arange(400) % 9)
    assert few.accuracy_interval is few.log_loss_interval is None
    assert few.better == few.worse == []
