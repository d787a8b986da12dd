"""Stackers: what they may read, what they gain, and what they fall back to."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import pytest

from utils.combiners.forest import ForestLearner
from utils.combiners.protocol import MemberFacts, fit_nested
from utils.core.config import validate
from utils.meta_methods import FUSERS
from utils.numeric import nested_cv
from utils.numeric.metrics import log_loss, softmax
from utils.numeric.uniform_mixture import mixed_with_uniform, uniform_weight
from utils.stacking_methods import COMBINERS, Calibration, calibrate

pytestmark = pytest.mark.usefixtures("short_searches")

M, N, C = 3, 200, 3
FACTS = MemberFacts(("a", "b", "c"), np.full(M, 0.7), np.full(M, np.nan), np.full(M, np.nan))
QUICK = {
    "runs": {
        "stacking": {"mlp_config": {"hidden_dims": [8], "epochs": 10, "lr": 0.01}, "xgb_config": {"n_estimators": 10}},
        "meta_fuser": {
            "mlp_config": {"hidden_dims": [8], "epochs": 10, "lr": 0.01},
        },
    }
}
CONFIG = validate(QUICK, source=Path("of the test"))


@pytest.fixture(scope="module")
def rows():
    """Two members that confuse the last two classes, and one that tells those apart alone: a stacker can gain."""
    rng = np.random.default_rng(11)
    labels = rng.integers(0, C, N)
    logits = rng.normal(size=(M, N, C)).astype(np.float32)
    first = labels == 0
    logits[:2, first, 0] += 3
    logits[:2, ~first, 1:] += 3
    third = np.where(labels == 2, 2, 1)
    logits[2, np.arange(N), third] += 3
    return logits, labels, rng.integers(0, 5, N)


@pytest.fixture(params=[2_000, 50])
def enough_rows(request, monkeypatch):
    """Rows from which the neighbours of a fold select: more than there are, and fewer."""
    monkeypatch.setattr(nested_cv, "ENOUGH_ROWS", request.param)
    return request.param


@pytest.fixture(params=sorted(COMBINERS))
def method(request):
    return request.param


def changed(labels, folds):
    """Other labels in one fold."""
    return np.where(folds == 2, (labels + 1) % C, labels)


@pytest.fixture(scope="module")
def fitted(rows):
    """A stacker fitted on the rows, and the predictions of its copies: once for all tests that only ask it.

    `is_changed`: with other labels in one fold.
    """
    logits, labels, folds = rows

    @cache
    def fit(method, has_few_rows, is_changed):
        recipe = COMBINERS[method].configured(CONFIG, FACTS)
        return recipe, fit_nested(recipe, logits, changed(labels, folds) if is_changed else labels, folds)

    # With few rows all folds select for one another.
    return lambda method, is_changed=False: fit(method, nested_cv.ENOUGH_ROWS > N, is_changed)


def test_a_fold_is_answered_by_what_has_not_read_its_labels(method, rows, fitted):
    folds = rows[2]
    before, after = fitted(method)[1].crossfit, fitted(method, is_changed=True)[1].crossfit
    np.testing.assert_array_equal(after[folds == 2], before[folds == 2])
    assert not np.array_equal(after[folds != 2], before[folds != 2])


def test_inner_copies_of_a_fold_have_read_none_of_its_labels(method, rows, fitted, enough_rows):
    logits, labels, folds = rows
    before, after = fitted(method)[1], fitted(method, is_changed=True)[1]
    np.testing.assert_array_equal(after.inner[2], before.inner[2])
    assert not np.array_equal(after.inner[1], before.inner[1])
    known, mean = np.isfinite(before.inner[2]).all(axis=1), softmax(logits).mean(axis=0)
    np.testing.assert_array_equal(known, np.isin(folds, (1, 2, 3)) if enough_rows < N else np.ones(N, dtype=bool))
    assert log_loss(before.inner[2][known], labels[known]) < log_loss(mean[known], labels[known]) - 0.02


def test_copies_without_two_folds_are_the_recipe_fitted_on_the_other_folds(rows):
    """Of a learner with one setting, without temperature and mean, nothing else decides them."""
    logits, labels, folds = rows
    recipe = COMBINERS["stacking_rf"].configured(CONFIG, FACTS)
    recipe.use_temperature = recipe.fallback = False
    recipe.learner = _OneForest(CONFIG.seed)
    inner = fit_nested(recipe, logits, labels, folds).inner
    outside = ~np.isin(folds, (1, 3))
    copy = recipe.learner.fit(logits[:, outside], labels[outside], recipe.learner.settings()[0])
    for fold, other in ((1, 3), (3, 1)):
        inside = folds == other
        expected = mixed_with_uniform(copy.predict_proba(logits[:, inside]), uniform_weight(int(outside.sum()), C))
        np.testing.assert_allclose(inner[fold][inside], expected, atol=1e-6)


class _OneForest(ForestLearner):
    """Has the first setting alone."""

    def settings(self):
        return super().settings()[:1]

    def predictions(self, logits, labels, held_out):
        return super().predictions(logits, labels, held_out)[:1]


def test_a_stacker_beats_the_plain_mean_where_there_is_something_to_learn(method, rows, fitted):
    logits, labels, _ = rows
    unseen = fitted(method)[1].crossfit
    assert log_loss(unseen, labels) < log_loss(softmax(logits).mean(axis=0), labels) - 0.05


def test_the_report_tells_what_was_chosen_and_its_two_scores(method, fitted):
    stacker = fitted(method)[0]
    report = stacker.report(FACTS.names)
    assert report["selection_score"] < report["cross_validated_log_loss"]
    assert 0 < report["settings_tried"] <= len(stacker.learner.settings())
    assert report["setting"] in [dict(setting) for setting in stacker.learner.settings()]


def test_useless_learners_fall_back_to_the_mean():
    rng = np.random.default_rng(1)
    labels = rng.integers(0, C, N)
    mean = np.full((N, C), 0.1)
    mean[np.arange(N), labels] = 0.8
    noise = rng.dirichlet(np.ones(C), N)
    folds = np.arange(N) % 5
    with_fallback = calibrate(noise, mean, labels, folds, use_temperature=True, fallback=True)
    assert with_fallback.weight < 0.02
    without = calibrate(noise, mean, labels, folds, use_temperature=True, fallback=False)
    assert without.weight == 1


def test_the_mean_that_a_stacker_falls_back_to_has_a_temperature_of_its_own():
    rng = np.random.default_rng(1)
    logits = 2 * rng.normal(size=(N, C))
    labels = (rng.gumbel(size=logits.shape) + logits).argmax(axis=1)
    mean = softmax(4 * logits)  # overconfident
    noise = rng.dirichlet(np.ones(C), N)
    calibration = calibrate(noise, mean, labels, np.arange(N) % 5, use_temperature=True, fallback=True)
    assert calibration.mean_temperature > 2
    assert log_loss(calibration.apply(noise, mean), labels) < log_loss(mean, labels) - 0.1
    raw = calibrate(noise, mean, labels, np.arange(N) % 5, use_temperature=False, fallback=True)
    assert raw.mean_temperature == 1


def test_a_stacker_of_an_earlier_version_has_no_temperature_of_the_mean(fitted):
    stacker = fitted("stacking_lr")[0]
    state = {name: values for name, values in stacker.state().items() if name != "mean_temperature"}
    assert type(stacker).from_state(state).calibration.mean_temperature == 1
    assert type(stacker).from_state(stacker.state()).calibration == stacker.calibration


def test_temperature_and_weight_are_applied_in_this_order():
    probabilities, mean = np.array([[0.8, 0.2]]), np.array([[0.5, 0.5]])
    calibrated = Calibration(temperature=2.0, weight=0.25).apply(probabilities, mean)
    tempered = np.sqrt(0.8) / (np.sqrt(0.8) + np.sqrt(0.2))
    assert calibrated[0, 0] == pytest.approx(0.25 * tempered + 0.75 * 0.5)


def test_attention_weights_sum_to_one_and_depend_on_the_image(rows):
    logits, labels, folds = rows
    gate = FUSERS["attention"].configured(CONFIG, FACTS).fit(logits, labels, folds).model
    weights = gate.weights(logits)
    assert weights.shape == (N, M)
    np.testing.assert_allclose(weights.sum(axis=1), 1, atol=1e-12)
    assert weights.std(axis=0).max() > 1e-3
