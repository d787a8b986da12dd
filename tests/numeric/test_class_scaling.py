"""Vector and Dirichlet scaling: what is found, and when a temperature alone is kept."""

from __future__ import annotations

import numpy as np
import pytest

from utils.numeric import class_scaling
from utils.numeric.metrics import log_loss, log_softmax, softmax
from utils.numeric.temperature import fit_temperature


def calibrated(seed, *, rows=600, classes=4):
    """Log-probabilities from which the labels were drawn, and folds."""
    rng = np.random.default_rng(seed)
    scores = log_softmax(2 * rng.normal(size=(rows, classes)))
    return scores, (rng.gumbel(size=scores.shape) + scores).argmax(axis=1), np.arange(rows) % 5


def confusing(seed, *, rows=600):
    """Calibrated scores of which class 0 has lost a part of its own to class 1."""
    scores, labels, folds = calibrated(seed, rows=rows)
    matrix = np.eye(4)
    matrix[1, 0] = 0.8
    return log_softmax(scores @ matrix.T), labels, folds


@pytest.mark.parametrize("kind", [class_scaling.VECTOR, class_scaling.DIRICHLET])
def test_a_strong_penalty_leaves_the_temperature_alone(kind):
    scores, labels, _ = confusing(0)
    found = class_scaling.fit(scores, labels, kind, 1e6)
    expected = log_softmax(scores / fit_temperature(scores, labels))
    np.testing.assert_allclose(found.apply(scores), expected, atol=1e-4)


def test_vector_scaling_finds_the_bias_of_classes_with_another_frequency():
    scores, labels, folds = calibrated(1, rows=4000)
    bias = np.array([2.0, 0.0, -1.0, -1.0])
    shifted = log_softmax(scores - bias)
    found = class_scaling.fit(shifted, labels, class_scaling.VECTOR, 1e-6)
    assert log_loss(softmax(found.apply(shifted)), labels) == pytest.approx(log_loss(softmax(scores), labels), abs=0.01)
    np.testing.assert_allclose(found.bias - found.bias.mean(), bias - bias.mean(), atol=0.25)
    selected = class_scaling.select(shifted, labels, folds)
    assert selected is not None


def test_dirichlet_scaling_has_the_least_loss_of_logistic_regression():
    from sklearn.linear_model import LogisticRegression

    scores, labels, _ = confusing(2, rows=1000)
    strength = 0.002
    found = class_scaling.fit(scores, labels, class_scaling.DIRICHLET, strength)
    at_temperature = log_softmax(scores / found.temperature)
    # The same objective for scikit-learn, which shrinks to 0: its coefficients are those of the offset alone.
    peer = LogisticRegression(C=1 / (2 * strength * len(labels)), fit_intercept=False, tol=1e-10, max_iter=10_000)
    design = np.hstack([at_temperature, np.ones((len(labels), 1))])
    own = np.hstack([found.matrix - np.eye(4), found.bias[:, None]])

    def objective(offsets):
        loss = log_loss(softmax(at_temperature + design @ offsets.T), labels)
        return loss + strength * (offsets**2).sum()

    assert objective(own) < objective(peer.fit(design, labels).coef_ - np.eye(4, 5))
    rng = np.random.default_rng(0)
    assert all(objective(own) <= objective(own + 1e-3 * rng.normal(size=own.shape)) for _ in range(20))


def test_held_out_folds_choose_it_where_classes_are_confused():
    scores, labels, folds = confusing(3)
    test_scores, truth, _ = confusing(4)
    selected = class_scaling.select(scores, labels, folds)
    assert selected is not None
    scaling, kind = selected
    assert kind == class_scaling.DIRICHLET
    alone = softmax(test_scores / fit_temperature(scores, labels))
    assert log_loss(softmax(scaling.apply(test_scores)), truth) < log_loss(alone, truth) - 0.02


def test_calibrated_scores_seldom_get_more_than_a_temperature():
    chosen = [class_scaling.select(*calibrated(seed, rows=200)) is not None for seed in range(20)]
    assert sum(chosen) <= 4


def test_one_fold_and_many_classes():
    scores, labels, folds = confusing(5)
    assert class_scaling.select(scores, labels, np.zeros_like(folds)) is None
    scores, labels, folds = calibrated(0, rows=200, classes=class_scaling.MAX_DIRICHLET_CLASSES + 1)
    shifted = log_softmax(scores - np.where(np.arange(scores.shape[1]) < 25, 2.0, 0.0))
    selected = class_scaling.select(shifted, labels, folds)
    assert selected is not None
    assert selected[1] == class_scaling.VECTOR
