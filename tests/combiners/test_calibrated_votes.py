"""Votes and single members with a temperature of their own, beside the raw ones."""

from __future__ import annotations

import numpy as np
import pytest
from combiner_cases import facts_of

from utils.combiners.calibrated_votes import (
    CalibratedBestSingle,
    CalibratedLogitAveraging,
    CalibratedSoftVoting,
    calibrated_probabilities,
)
from utils.combiners.protocol import fit_crossfitted
from utils.core.config import Config
from utils.ensemble_methods import LogitAveraging, SoftVoting
from utils.numeric.metrics import clipped_log, log_loss, softmax
from utils.numeric.uniform_mixture import mixed_with_uniform

PAIRS = [(SoftVoting, CalibratedSoftVoting), (LogitAveraging, CalibratedLogitAveraging)]


def overconfident(seed=0, *, members=3, rows=400, classes=4, factor=3.0):
    """Members whose logits are `factor` times too large, with labels and folds."""
    rng = np.random.default_rng(seed)
    logits = 2 * rng.normal(size=(rows, classes))
    labels = (rng.gumbel(size=logits.shape) + logits).argmax(axis=1)
    return factor * (logits + rng.normal(size=(members, rows, classes)) / 4), labels, np.arange(rows) % 5


@pytest.mark.parametrize(("raw", "calibrated"), PAIRS)
def test_a_calibrated_vote_predicts_the_same_classes_at_a_lower_loss(raw, calibrated):
    logits, labels, folds = overconfident()
    before = raw().fit(logits, labels, folds).predict_proba(logits)
    fitted = calibrated().fit(logits, labels, folds)
    after = fitted.predict_proba(logits)
    np.testing.assert_array_equal(after.argmax(axis=1), before.argmax(axis=1))
    np.testing.assert_allclose(
        after,  # members are clipped at 1e-12 one by one
        mixed_with_uniform(softmax(clipped_log(before) / fitted.temperature), fitted.uniform_weight),
        atol=1e-4,
    )
    assert fitted.temperature > 1.5
    unseen = fit_crossfitted(calibrated(), logits, labels, folds)
    assert log_loss(unseen, labels) < log_loss(before, labels) - 0.1


@pytest.mark.parametrize("raw", [SoftVoting, LogitAveraging])
def test_a_raw_vote_reads_no_label(raw):
    logits, labels, folds = overconfident()
    fitted = raw().fit(logits, labels, folds)
    assert not fitted.learns
    assert fitted.state() == {}
    assert fitted.predict_proba(logits).max() > 1 - 1e-4


def test_logit_averaging_of_an_earlier_version_keeps_its_temperatures():
    logits, _, _ = overconfident()
    state = {"temperature": np.array([2.0]), "member_temperatures": np.array([1.0, 1.5, 1.0])}
    earlier = LogitAveraging.from_state(state)
    expected = softmax((logits / state["member_temperatures"][:, None, None]).mean(axis=0) / 2)
    np.testing.assert_allclose(earlier.predict_proba(logits), expected, atol=1e-12)
    np.testing.assert_array_equal(earlier.state()["member_temperatures"], state["member_temperatures"])
    np.testing.assert_array_equal(earlier.restricted(np.array([False, True, True])).member_temperatures, [1.5, 1.0])


def test_the_best_single_is_the_best_once_each_member_has_its_temperature():
    logits, labels, folds = overconfident(rows=1000)
    rng = np.random.default_rng(5)
    logits[0] = logits[0] / 3 + 1.0 * rng.normal(size=logits[0].shape)  # calibrated, and worse
    logits[1] += 2 * rng.normal(size=logits[1].shape)
    raw = [log_loss(softmax(each), labels) for each in logits]
    assert np.argmin(raw) == 0
    fitted = CalibratedBestSingle().fit(logits, labels, folds)
    np.testing.assert_array_equal(fitted.used(3), [False, False, True])
    alone = fitted.restricted(fitted.used(3)).predict_proba(logits[2:])
    scaled = softmax(clipped_log(softmax(logits[2])) / fitted.temperature)
    expected = mixed_with_uniform(scaled, fitted.uniform_weight)
    np.testing.assert_allclose(alone, expected, atol=1e-9)


def test_a_members_calibrated_probabilities_are_cross_fitted():
    logits, labels, folds = overconfident(members=1)
    before = calibrated_probabilities(logits[0], labels, folds)
    changed = np.where(folds == 2, (labels + 1) % 4, labels)
    after = calibrated_probabilities(logits[0], changed, folds)
    np.testing.assert_array_equal(after[folds == 2], before[folds == 2])
    assert not np.array_equal(after[folds != 2], before[folds != 2])
    assert log_loss(before, labels) < log_loss(softmax(logits[0]), labels) - 0.1


def test_each_member_may_have_a_temperature_before_the_vote():
    logits, labels, folds = overconfident()
    logits[1] *= 2
    config = Config.model_validate({"runs": {"score_ensemble": {"temperature": "per_member"}}})
    fitted = CalibratedLogitAveraging.configured(config, facts_of(3)).fit(logits, labels, folds)
    assert fitted.member_temperatures[1] == pytest.approx(2 * fitted.member_temperatures[0], rel=0.1)
    assert fitted.report(("a", "b", "c"))["member_temperatures"]["b"] == fitted.member_temperatures[1]


@pytest.mark.parametrize("kind", [CalibratedSoftVoting, CalibratedLogitAveraging, CalibratedBestSingle])
def test_one_fold_or_one_class_gives_no_temperature(kind):
    logits, labels, folds = overconfident()
    assert kind().fit(logits, labels, np.zeros_like(folds)).temperature == 1
    assert kind().fit(logits, np.zeros_like(labels), folds).temperature == 1


def confused(seed, **sizes):
    """Overconfident members that take one class for another."""
    logits, labels, folds = overconfident(seed, **sizes)
    logits[..., 1] += 0.8 * logits[..., 0]
    return logits, labels, folds


@pytest.mark.parametrize("kind", [CalibratedSoftVoting, CalibratedLogitAveraging, CalibratedBestSingle])
def test_held_out_folds_may_choose_more_than_a_temperature(kind):
    import torch

    logits, labels, folds = confused(1, rows=300, classes=3)
    config = Config.model_validate({"runs": {"score_ensemble": {"calibration": "auto"}}})
    recipe = kind.configured(config, facts_of(3))
    unseen = fit_crossfitted(recipe, logits, labels, folds)
    assert log_loss(unseen, labels) < log_loss(fit_crossfitted(kind(), logits, labels, folds), labels) - 0.02
    assert recipe.report(("a", "b", "c"))["class_scaling"] == "dirichlet"
    probabilities = recipe.predict_proba(logits)
    np.testing.assert_array_equal(kind.from_state(recipe.state()).predict_proba(logits), probabilities)
    used = recipe.used(3)
    np.testing.assert_allclose(recipe.restricted(used).predict_proba(logits[used]), probabilities, atol=1e-12)
    batch = torch.from_numpy(logits.transpose(1, 0, 2).astype(np.float32))
    np.testing.assert_allclose(recipe.to_module()(batch).numpy(), probabilities, atol=1e-4)
    changed = np.where(folds == 2, (labels + 1) % 3, labels)
    after = fit_crossfitted(recipe, logits, changed, folds)
    np.testing.assert_array_equal(after[folds == 2], unseen[folds == 2])


def test_a_fit_without_class_scaling_forgets_that_of_an_earlier_one():
    logits, labels, folds = confused(1)
    recipe = CalibratedSoftVoting(scales_classes=True).fit(logits, labels, folds)
    assert recipe.scaling is not None
    recipe.fit(logits, labels, np.zeros_like(folds))
    assert recipe.scaling is None
    assert "class_scaling" not in recipe.report(("a", "b", "c"))
