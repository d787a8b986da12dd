"""Losses without each member against the mean of the others, scored by the metric itself."""

from __future__ import annotations

import numpy as np
import pytest

from utils.numeric import removal_losses
from utils.numeric.metrics import METRICS, softmax
from utils.numeric.removal_losses import REMOVAL_SCORERS, make_removal_scorer


def zoo(members=7, rows=90, classes=4, seed=0):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, rows)
    logits = rng.normal(size=(members, rows, classes)) + rng.normal(size=(1, rows, classes))
    logits[:, np.arange(rows), labels] += rng.uniform(1, 3, members)[:, None]
    return softmax(logits).astype(np.float32), labels


def literal(probabilities, labels, inside, metric):
    """The metric as a loss without each member, one after the other."""
    members = np.flatnonzero(inside)
    found = np.full(len(inside), np.inf)
    for member in members if len(members) > 1 else ():
        others = probabilities[members[members != member]].astype(np.float64).mean(axis=0)
        score = METRICS[metric].function(others, labels)
        found[member] = 1 - score if METRICS[metric].higher_is_better else score
    return found


@pytest.mark.parametrize("metric", sorted(REMOVAL_SCORERS))
@pytest.mark.parametrize("block", [2**18, 50])
def test_removing_one_after_the_other_equals_the_literal_metric(metric, block, monkeypatch):
    monkeypatch.setattr(removal_losses, "BLOCK", block)
    for seed in range(3):
        probabilities, labels = zoo(seed=seed)
        inside = np.array([True, True, False, True, True, True, True])
        ours = make_removal_scorer(probabilities, labels, inside, metric)
        for member in (4, 0, 6, 1, 3):
            np.testing.assert_allclose(ours.losses(), literal(probabilities, labels, inside, metric), atol=1e-12)
            ours.remove(member)
            inside[member] = False
        assert np.isinf(ours.losses()).all()  # nothing would be left


@pytest.mark.parametrize("metric", sorted(REMOVAL_SCORERS))
def test_the_members_given_stay_as_they_are(metric):
    probabilities, labels = zoo()
    inside = np.ones(7, dtype=bool)
    before = probabilities.copy()
    ours = make_removal_scorer(probabilities, labels, inside, metric)
    ours.losses()
    ours.remove(2)
    assert inside.all()
    assert (probabilities == before).all()


@pytest.mark.parametrize("metric", ["accuracy", "f1_macro"])
def test_sure_members_that_agree_are_decided_without_looking_at_them(metric):
    labels = np.array([0, 1, 0, 1])
    one = np.array([[0.98, 0.02], [0.03, 0.97], [0.99, 0.01], [0.96, 0.04]], dtype=np.float32)
    probabilities = np.stack([one] * 4)
    ours = make_removal_scorer(probabilities, labels, np.ones(4, dtype=bool), metric)
    expected = literal(probabilities, labels, np.ones(4, dtype=bool), metric)
    np.testing.assert_allclose(ours.losses(), expected, atol=1e-15)
    assert expected[0] > 0  # the last row is wrong


def test_a_truth_that_nobody_believes_in_costs_what_log_loss_clips_at():
    probabilities = np.zeros((3, 20, 2), dtype=np.float32)
    probabilities[:, :, 1] = 1
    losses = make_removal_scorer(
        probabilities, np.zeros(20, dtype=np.int64), np.ones(3, dtype=bool), "log_loss"
    ).losses()
    np.testing.assert_allclose(losses, -np.log(1e-12))
