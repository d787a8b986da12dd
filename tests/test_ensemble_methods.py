"""The three ways of voting against a reference written out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from utils.ensemble_methods import HardVoting, LogitAveraging, SoftVoting
from utils.numeric.metrics import softmax
from utils.numeric.uniform_mixture import mixed_with_uniform


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


def overconfident(seed=0, members=3, count=400, classes=4):
    """Members whose logits are three times too large, with labels drawn from what they should have said."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(count, classes)) * 2
    labels = (rng.gumbel(size=logits.shape) + logits).argmax(axis=1)
    return 3 * (logits + rng.normal(size=(members, count, classes)) / 10), labels, np.arange(count) % 5


def test_averaged_logits_carry_a_temperature_where_held_out_rows_gain():
    from utils.core.config import Config

    rows = overconfident()
    settings = Config()
    fitted = LogitAveraging.configured(settings, None).fit(*rows)
    assert fitted.temperature == pytest.approx(3, rel=0.15)
    mean = rows[0].mean(axis=0)
    expected = mixed_with_uniform(softmax(mean / fitted.temperature), fitted.uniform_weight)
    np.testing.assert_allclose(fitted.predict_proba(rows[0]), expected, atol=1e-12)
    assert LogitAveraging(calibration="off").fit(*rows).temperature == 1
    right = overconfident()[0] / 3, *rows[1:]
    assert LogitAveraging().fit(*right).temperature == pytest.approx(1, abs=0.15)
    one_fold = rows[0], rows[1], np.zeros(400, dtype=int)
    assert LogitAveraging().fit(*one_fold).temperature == 1
    one_class = rows[0], np.zeros(400, dtype=int), rows[2]
    assert LogitAveraging().fit(*one_class).temperature == 1


def test_each_member_may_have_a_temperature_of_its_own():
    logits, labels, folds = overconfident()
    logits[1] *= 2
    fitted = LogitAveraging(calibration="per_member").fit(logits, labels, folds)
    assert fitted.member_temperatures[1] == pytest.approx(2 * fitted.member_temperatures[0], rel=0.05)
    report = fitted.report(("a", "b", "c"))
    assert report["member_temperatures"]["b"] == fitted.member_temperatures[1]
    used = np.array([True, True, False])
    np.testing.assert_array_equal(fitted.restricted(used).member_temperatures, fitted.member_temperatures[:2])
