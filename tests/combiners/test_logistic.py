"""Both forms of logistic regression: optimal, and each in its limits what its name says."""

from __future__ import annotations

import numpy as np
import pytest

from utils.combiners import logistic
from utils.combiners.logistic import LogisticLearner, fit_path
from utils.combiners.shared_fits import SharedFits
from utils.combiners.stacking_features import KINDS, FeatureRows, features, standardisation
from utils.numeric import pools
from utils.numeric.metrics import log_loss, log_softmax

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
    expected = pools.LogLinearLogLoss(log_softmax(logits), labels).value(pool.weights)
    assert log_loss(model.predict_proba(logits), labels) == pytest.approx(expected, abs=1e-5)


def test_rows_that_are_all_correct_leave_the_pools_sum_finite(rows):
    logits, labels = rows
    logits[:, np.arange(N), labels] += 8
    (model,) = fit_path(logits, labels, form="shrunk_to_pool", kind=KINDS[0], strengths=[1e6])
    assert model.weights.sum() == pytest.approx(
        pools.fit_log_linear(log_softmax(logits), labels).weights.sum(), abs=0.02
    )


def test_members_that_are_always_wrong_get_almost_no_weight_and_no_warning(rows):
    logits, labels = rows
    for model in fit_path(-20 * logits, labels, form="shrunk_to_pool", kind=KINDS[0], strengths=[1e6, 1.0]):
        assert np.isfinite(model.weights).all()
        assert model.weights.sum() < 0.05


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


def test_a_path_reads_its_rows_when_it_is_fitted(rows, monkeypatch):
    """A job on a cluster makes the paths of all fits and follows one."""
    read, standardisation = [], FeatureRows.standardisation
    monkeypatch.setattr(
        FeatureRows, "standardisation", lambda table, inside: read.append(1) or standardisation(table, inside)
    )
    folds = [np.arange(len(rows[1])) % 3 == fold for fold in range(3)]
    trainings = LogisticLearner(KINDS[:1]).trainings(0, *rows, folds)
    assert read == []
    for _ in range(2):
        trainings[1][1].advance([0])
    assert read == [1]


def test_fits_start_from_the_pool_of_their_own_rows(rows):
    logits, labels = rows
    learner, half = LogisticLearner(KINDS), len(labels) // 2
    learner.predictions(logits[:, :half], labels[:half], logits)
    other = labels[half:], logits[:, half:]
    fresh = LogisticLearner(KINDS).predictions(other[1], other[0], logits)
    assert learner.predictions(other[1], other[0], logits).tobytes() == fresh.tobytes()
    changed = np.concatenate([labels[:1], (labels[1:half] + 1) % C])  # equal rows with other labels
    fresh = LogisticLearner(KINDS).predictions(logits[:, :half], changed, logits)
    assert learner.predictions(logits[:, :half], changed, logits).tobytes() == fresh.tobytes()


def test_a_setting_fitted_again_is_the_model_of_the_path(rows):
    logits, labels = rows
    learner = LogisticLearner(KINDS[:1], strengths=(1.0, 0.1, 0.01))
    settings = learner.settings()
    on_path = learner.predictions(logits, labels, logits)
    for place in (0, 2, 4):
        again = learner.fit(logits, labels, settings[place]).predict_proba(logits)
        np.testing.assert_allclose(again, on_path[place], atol=1e-6)


@pytest.mark.parametrize("form", ["shrunk_to_pool", "ridge"])
@pytest.mark.parametrize("kind", KINDS)
def test_no_value_of_a_solution_can_lower_the_loss(rows, form, kind, monkeypatch):
    found = []
    minimise = logistic._Problem.minimise

    def noted(problem, strength, *start):
        values = minimise(problem, strength, *start)
        found.append(problem.slope(values, problem.loss_and_gradient(values, strength)[1]))
        return values

    monkeypatch.setattr(logistic._Problem, "minimise", noted)
    fit_path(*rows, form=form, kind=kind, strengths=logistic.STRENGTHS)
    assert max(found) <= logistic.TOLERANCE
    assert len(found) == len(logistic.STRENGTHS)


@pytest.mark.parametrize("form", ["shrunk_to_pool", "ridge"])
def test_coordinates_change_the_way_and_not_the_solution(rows, form, monkeypatch):
    options = {"form": form, "kind": KINDS[1], "strengths": [1.0, 0.01]}
    decomposed = fit_path(*rows, **options)
    monkeypatch.setattr(logistic, "DECOMPOSED", 0)
    for model, other in zip(fit_path(*rows, **options), decomposed, strict=True):
        np.testing.assert_allclose(
            model.predict_proba(rows[0]), other.predict_proba(rows[0]), atol=2e-3 if form == "ridge" else 5e-3
        )


@pytest.mark.parametrize(("dtype", "step", "error"), [(np.float64, 1e-6, 1e-6), (np.float32, 1e-2, 1e-4)])
def test_the_gradient_is_that_of_the_loss(rows, dtype, step, error):
    logits, labels = rows
    of_rows = logistic._Rows.of(logits, labels, "shrunk_to_pool", KINDS[1], SharedFits())
    x, pooled = (of_rows.table.raw / 5).astype(dtype), of_rows.centred.reshape(M, -1).astype(dtype)
    problem = logistic._Problem(x, pooled, labels, C)
    values = np.random.default_rng(0).uniform(0.1, 0.5, problem.start(SharedFits()).shape)
    gradient = problem.loss_and_gradient(values, 0.3)[1]
    assert gradient.dtype == np.float64
    for place in (0, M - 1, M + 7, len(values) - 1):
        change = np.zeros(len(values))
        change[place] = step
        beside = [problem.loss_and_gradient(values + sign * change, 0.3)[0] for sign in (1, -1)]
        assert gradient[place] == pytest.approx((beside[0] - beside[1]) / (2 * step), abs=error)


def test_many_rows_in_single_precision_give_the_probabilities_of_double_precision(rows, monkeypatch):
    options = {"form": "shrunk_to_pool", "kind": KINDS[1], "strengths": logistic.STRENGTHS[:4]}
    double = fit_path(*rows, **options)[-1].predict_proba(rows[0])
    monkeypatch.setattr(logistic, "SINGLE_PRECISION", 0)
    single = fit_path(*rows, **options)[-1].predict_proba(rows[0])
    assert not np.array_equal(single, double)
    np.testing.assert_allclose(single, double, atol=1e-3)
