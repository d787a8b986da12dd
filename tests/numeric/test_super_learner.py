"""The super learner against a generic solver, and what it shrinks to."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import minimize

from utils.numeric import super_learner
from utils.numeric.metrics import log_loss_per_row, log_softmax, softmax

N, C, INPUTS = 400, 4, 7


@pytest.fixture
def rows():
    """Log-probabilities (I, N, C) of inputs that err alike, the last of which is the best, labels and folds."""
    rng = np.random.default_rng(4)
    labels = rng.integers(0, C, N)
    scores = rng.normal(size=(INPUTS, N, C)) + rng.normal(size=(1, N, C))
    scores[:, np.arange(N), labels] += np.linspace(0.5, 2.5, INPUTS)[:, None]
    return log_softmax(scores), labels, np.arange(N) % 5


def by_scipy(scores, labels, best, strength):
    """Value and weights (I,) of the same problem by a solver that knows nothing of it but its gradient."""
    penalties = np.full(len(scores), strength)
    penalties[best] = 0

    def value_and_gradient(weights):
        total, index = weights.sum(), np.arange(len(labels))
        pooled = log_softmax(np.tensordot(weights, scores, axes=1))
        errors = np.exp(pooled)
        errors[index, labels] -= 1
        value = -pooled[index, labels].mean() + (total - np.log(total) - 1) / len(labels) + penalties @ weights
        slopes = (scores * errors).sum(axis=(1, 2)) / len(labels)
        return value, slopes + (1 - 1 / total) / len(labels) + penalties

    bounds, options = [(0, None)] * len(scores), {"maxiter": 10_000, "ftol": 1e-15, "gtol": 1e-11}
    start = np.full(len(scores), 0.3)
    solved = minimize(value_and_gradient, start, jac=True, bounds=bounds, method="L-BFGS-B", options=options)
    return solved.fun, solved.x


@pytest.mark.parametrize("strength", [0.3, 0.03, 0.003, 0.0])
def test_weights_are_those_of_a_generic_convex_solver(rows, strength):
    scores, labels, _ = rows
    for best in (INPUTS - 1, 0):
        start = np.eye(INPUTS)[best]
        solution = super_learner.fit_weights(scores, labels, best, strength, start=start)
        value, weights = by_scipy(scores, labels, best, strength)
        assert solution.value == pytest.approx(value, abs=1e-6)
        np.testing.assert_allclose(solution.weights, weights, atol=1e-4)
        assert solution.gap < 1e-8


def test_the_chosen_strength_has_the_least_held_out_loss_and_few_weights(rows):
    scores, labels, folds = rows
    fitted = super_learner.fit(scores, labels, folds)
    chosen = super_learner.STRENGTHS.index(fitted.strength)
    assert fitted.held_out_losses[chosen] == fitted.held_out_losses.min()
    assert fitted.best == INPUTS - 1
    assert 1 < (fitted.weights > 0).sum() < INPUTS
    assert fitted.weights.min() == 0
    _, weights = by_scipy(scores, labels, fitted.best, fitted.strength)
    np.testing.assert_allclose(fitted.weights, weights, atol=1e-4)


def test_held_out_losses_are_those_of_copies_without_the_fold(rows):
    scores, labels, folds = rows
    fitted = super_learner.fit(scores, labels, folds)
    index = super_learner.STRENGTHS.index(0.01)
    losses = np.empty(N)
    for fold in range(5):
        inside = folds == fold
        _, weights = by_scipy(scores[:, ~inside], labels[~inside], INPUTS - 1, 0.01)
        pooled = softmax(np.tensordot(weights, scores[:, inside], axes=1))
        losses[inside] = log_loss_per_row(pooled, labels[inside])
    assert fitted.held_out_losses[index] == pytest.approx(losses.mean(), abs=1e-5)


def test_others_that_add_nothing_leave_the_best_alone_with_a_temperature():
    rng = np.random.default_rng(2)
    labels = rng.integers(0, C, N)
    best = rng.normal(size=(N, C))
    best[np.arange(N), labels] += 3
    useless = rng.normal(size=(3, N, C)) * 3
    fitted = super_learner.fit(log_softmax(np.stack([*useless, best * 6])), labels, np.arange(N) % 5)
    np.testing.assert_array_equal(fitted.weights > 0, [False, False, False, True])
    assert 0.4 < fitted.weights[3] < 0.6  # 3 times the outputs are the log-odds, so that 6 times are twice too sure


def test_a_single_input_keeps_its_ranking_and_gets_a_temperature(rows):
    scores, labels, folds = rows
    fitted = super_learner.fit(scores[:1] * 3, labels, folds)
    assert fitted.best == 0
    assert fitted.strength == np.inf
    assert 0 < fitted.weights[0] < 1


def test_with_a_single_fold_the_best_input_answers_alone(rows):
    scores, labels, _ = rows
    fitted = super_learner.fit(scores, labels, np.zeros(N, dtype=int))
    np.testing.assert_array_equal(np.flatnonzero(fitted.weights), [INPUTS - 1])
    assert np.isnan(fitted.held_out_losses).all()


def test_of_equal_inputs_the_first_has_all_the_weight(rows):
    scores, labels, folds = rows
    once = super_learner.fit(scores, labels, folds)
    twice = super_learner.fit(np.concatenate([scores, scores]), labels, folds)
    np.testing.assert_array_equal(twice.weights, [*once.weights, *np.zeros(INPUTS)])
    assert twice.best == once.best


def test_rows_that_are_all_right_and_a_class_that_is_absent_give_finite_weights():
    rng = np.random.default_rng(6)
    labels = rng.integers(0, C - 1, 50)
    scores = log_softmax(rng.normal(size=(3, 50, C)) / 10 + 40 * np.eye(C)[labels])
    fitted = super_learner.fit(np.maximum(scores, np.log(1e-12)), labels, np.arange(50) % 5)
    assert 0 < fitted.weights.sum() < 20
    np.testing.assert_allclose(softmax(np.tensordot(fitted.weights, scores, axes=1)).sum(axis=1), 1)
