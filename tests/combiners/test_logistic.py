"""Both forms of logistic regression: optimal, and each in its limits what its name says."""

from __future__ import annotations

import numpy as np
import pytest

from utils.combiners.logistic import LogisticLearner, fit_path
from utils.combiners.stacking_features import KINDS, centred_log, features, standardisation
from utils.numeric import pools
from utils.numeric.metrics import log_loss, log_softmax, softmax

M, N, C = 3, 200, 4


@pytest.fixture
def rows():
    rng = np.random.default_rng(5)
    labels = rng.integers(0, C, N)
    logits = rng.normal(size=(M, N, C)).astype(np.float32)
    logits[:, np.arange(N), labels] += np.array([0.5, 1.5, 2.5])[:, None].astype(np.float32)
    return logits, labels


def test_a_strong_ridge_is_the_log_linear_pool(rows):
    logits, labels = rows
    (model,) = fit_path(logits, labels, form="shrunk_to_pool", kind=KINDS[0], strengths=[1e6])
    pool = pools.fit_log_linear(log_softmax(logits), labels)
    np.testing.assert_allclose(model.weights, pool.weights, atol=1e-3)
    assert log_loss(model.predict_proba(logits), labels) == pytest.approx(pool.value, abs=1e-5)


def test_the_plain_form_is_scikit_learns(rows):
    from sklearn.linear_model import LogisticRegression

    logits, labels = rows
    x = features(logits, KINDS[0])
    centre, scale = standardisation(x, [M * C])
    strength = 0.01
    peer = LogisticRegression(C=1 / (strength * N), tol=1e-10, max_iter=5000).fit((x - centre) / scale, labels)
    (model,) = fit_path(logits, labels, form="ridge", kind=KINDS[0], strengths=[strength])
    found, expected = model.predict_proba(logits), peer.predict_proba((x - centre) / scale)
    np.testing.assert_allclose(found, expected, atol=2e-3)


@pytest.mark.parametrize("form", ["shrunk_to_pool", "ridge"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_weaker_ridge_fits_the_rows_better(rows, form, kind):
    logits, labels = rows
    path = fit_path(logits, labels, form=form, kind=kind, strengths=[10, 0.1, 0.001])
    losses = [log_loss(model.predict_proba(logits), labels) for model in path]
    assert losses == sorted(losses, reverse=True)
    assert losses[0] - losses[-1] > 0.005


def test_weights_of_the_pool_are_never_negative(rows):
    logits, labels = rows
    logits[0] = -logits[2]
    for model in fit_path(logits, labels, form="shrunk_to_pool", kind=KINDS[0], strengths=[10, 0.01]):
        assert (model.weights >= 0).all()


def test_a_setting_fitted_again_is_the_model_of_the_path(rows):
    logits, labels = rows
    learner = LogisticLearner(KINDS[:1], strengths=(1.0, 0.1, 0.01))
    settings = learner.settings()
    on_path = learner.predictions(logits, labels, logits)
    for place in (0, 2, 4):
        again = learner.fit(logits, labels, settings[place]).predict_proba(logits)
        np.testing.assert_allclose(again, on_path[place], atol=1e-6)


def test_features_say_what_their_kind_says():
    logits = np.log(np.array([[[0.7, 0.3]], [[0.2, 0.8]]], dtype=np.float32))
    np.testing.assert_allclose(features(logits, "probabilities"), [[0.7, 0.3, 0.2, 0.8]], atol=1e-6)
    centred = features(logits, "log_probabilities")[0]
    np.testing.assert_allclose(centred[:2], [0.5 * np.log(7 / 3), -0.5 * np.log(7 / 3)], atol=1e-6)
    more = features(logits, "log_probabilities+disagreement")[0]
    assert len(more) == 4 + 3 + 2
    entropy = lambda *p: -sum(x * np.log(x) for x in p)  # noqa: E731
    mean = (entropy(0.7, 0.3) + entropy(0.2, 0.8)) / 2
    total = entropy(0.45, 0.55)
    np.testing.assert_allclose(more[4:], [total, mean, total - mean, 0.25, 0.25], atol=1e-6)


def test_logits_and_their_log_probabilities_are_the_same_features(rows):
    logits = rows[0]
    plain = logits - logits.mean(axis=2, keepdims=True)
    np.testing.assert_allclose(centred_log(softmax(logits)), plain, atol=1e-5)


def test_a_constant_feature_stays_finite():
    centre, scale = standardisation(np.ones((5, 3)), [2, 1])
    np.testing.assert_array_equal(scale, 1)
    np.testing.assert_array_equal(centre, 1)
