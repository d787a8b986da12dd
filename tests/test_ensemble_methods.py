"""The three ways of voting against a reference written out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from utils.ensemble_methods import HardVoting, LogitAveraging, SoftVoting


def probabilities(row):
    exponentials = [np.exp(value - max(row)) for value in row]
    return [value / sum(exponentials) for value in exponentials]


def reference(kind, logits):
    """One row and one class at a time, in plain Python."""
    members, rows, classes = logits.shape
    found = np.zeros((rows, classes))
    for n in range(rows):
        for m in range(members):
            own = [float(value) for value in logits[m, n]]
            if kind == "soft":
                found[n] += np.array(probabilities(own)) / members
            elif kind == "hard":
                found[n, own.index(max(own))] += 1 / members
        if kind == "logit":
            found[n] = probabilities(
                [float(np.mean([logits[m, n, c] for m in range(members)])) for c in range(classes)]
            )
    return found


@pytest.mark.parametrize(("kind", "make"), [("soft", SoftVoting), ("hard", HardVoting), ("logit", LogitAveraging)])
@pytest.mark.parametrize("shape", [(5, 200, 7), (1, 30, 2), (2, 40, 13), (4, 60, 3)])
def test_voting_agrees_with_the_reference(kind, make, shape):
    logits = np.random.default_rng(sum(shape)).normal(scale=3, size=shape).astype(np.float64)
    np.testing.assert_allclose(make().predict_proba(logits), reference(kind, logits), rtol=0, atol=1e-6)


def test_a_tied_vote_goes_to_the_class_with_more_probability():
    # Two votes for class 2, two for class 0; those for class 2 are surer. Class 0 would win by its place alone.
    logits = np.array([[[0.1, 0, 0]], [[0.1, 0, 0]], [[0, 0, 5.0]], [[0, 0, 5.0]]])
    assert HardVoting().predict_proba(logits).argmax() == 2


def test_one_more_vote_beats_any_certainty():
    logits = np.array([[[0.01, 0]], [[0.01, 0]], [[0.01, 0]], [[0, 100.0]], [[0, 100.0]]])
    assert HardVoting().predict_proba(logits).argmax() == 0


def test_one_member_is_itself():
    logits = np.random.default_rng(0).normal(size=(1, 9, 4))
    np.testing.assert_allclose(SoftVoting().predict_proba(logits), LogitAveraging().predict_proba(logits), atol=1e-12)
