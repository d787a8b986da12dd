"""Convex pools against scipy, against losses written out row by row, and against their own proof."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import minimize

from utils.numeric import pools, weight_search
from utils.numeric.metrics import log_softmax


def members_of(members, rows, classes, *, seed=0, skill=1.5, sharpness=1.0):
    """Log-probabilities (M, N, C) of unequally good and unequally calibrated members, and labels (N,)."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, rows)
    shared = rng.normal(size=(rows, classes))
    shared[np.arange(rows), labels] += skill
    own = rng.normal(size=(members, rows, classes)) * rng.uniform(0.5, 1.5, (members, 1, 1))
    logits = sharpness * rng.uniform(0.5, 3, (members, 1, 1)) * (shared + own)
    scores = logits - np.log(np.exp(logits).sum(axis=2, keepdims=True))
    return np.maximum(scores, np.log(1e-12)), labels


def penalty(weights, strength):
    return strength * np.sum((weights - np.mean(weights)) ** 2)


def linear_reference(scores, labels, weights, strength=0.0):
    """Log-loss of the mixture, one row at a time."""
    losses = [-np.log(np.dot(weights, np.exp(scores[:, n, label]))) for n, label in enumerate(labels)]
    return np.mean(losses) + penalty(weights, strength)


def brier_reference(scores, labels, weights, strength=0.0):
    """Brier score of the mixture, one row at a time."""
    truth = np.eye(scores.shape[2])
    losses = [np.sum((weights @ np.exp(scores[:, n]) - truth[label]) ** 2) for n, label in enumerate(labels)]
    return np.mean(losses) + penalty(weights, strength)


def log_linear_reference(scores, labels, weights, strength=0.0):
    """Log-loss of the soft-max of the weighted sum, one row at a time, with the prior on the sum of the weights."""
    losses = []
    for n, label in enumerate(labels):
        pooled = weights @ scores[:, n]
        losses.append(pooled.max() + np.log(np.exp(pooled - pooled.max()).sum()) - pooled[label])
    prior = (np.sum(weights) - np.log(np.sum(weights)) - 1) / len(labels)
    return np.mean(losses) + prior + penalty(weights, strength)


def solve_linear(scores, labels, **options):
    return pools.fit_linear(np.exp(scores[:, np.arange(len(labels)), labels]), **options)


def solve_brier(scores, labels, **options):
    return pools.fit_linear_brier(np.exp(scores), labels, **options)


POOLS = {
    "linear": (solve_linear, linear_reference, (1.0, 1.0)),
    "brier": (solve_brier, brier_reference, (1.0, 1.0)),
    "log_linear": (pools.fit_log_linear, log_linear_reference, pools.SUM_BOUNDS),
}
INPUTS = {
    "plain": members_of(5, 60, 3),
    "many members": members_of(12, 24, 4, seed=1),
    "one member": members_of(1, 30, 3, seed=2),
    "fewer rows than classes": members_of(4, 3, 5, seed=3),
    "one row": members_of(3, 1, 4, seed=4),
    "saturated": members_of(4, 30, 3, seed=5, sharpness=30),
    "chance": members_of(4, 40, 3, seed=6, skill=0),
    "separable": members_of(3, 24, 3, seed=7, skill=8),
}


@pytest.fixture(params=sorted(POOLS))
def pool(request):
    return POOLS[request.param]


def by_scipy(reference, scores, labels, sums, strength):
    """The best of a few starts of SLSQP on the loss that is written out, with numerical slopes."""
    members = len(scores)
    limits = [
        {"type": "ineq", "fun": lambda weights: weights.sum() - sums[0]},
        {"type": "ineq", "fun": lambda weights: sums[1] - weights.sum()},
    ]
    if sums[0] == sums[1]:
        limits = [{"type": "eq", "fun": lambda weights: weights.sum() - sums[0]}]
    found = np.inf
    for start in (np.full(members, 1 / members), *np.eye(members)[:2] * 0.7 + 0.3 / members):
        ended = minimize(
            lambda weights: reference(scores, labels, np.clip(weights, 0, None), strength),
            start,
            method="SLSQP",
            bounds=[(0, sums[1])] * members,
            constraints=limits,
            options={"ftol": 1e-13, "maxiter": 300},
        )
        weights = np.clip(ended.x, 0, None)
        weights *= np.clip(weights.sum(), *sums) / weights.sum()
        found = min(found, reference(scores, labels, weights, strength))
    return found


@pytest.mark.filterwarnings("ignore:Values in x were outside bounds")
@pytest.mark.parametrize("strength", [0.0, 0.03])
@pytest.mark.parametrize("name", sorted(INPUTS))
def test_weights_are_as_good_as_scipys(pool, name, strength):
    solve, reference, sums = pool
    scores, labels = INPUTS[name]
    found = solve(scores, labels, strength=strength)
    assert found.gap <= weight_search.TOLERANCE
    assert (found.weights >= 0).all()
    assert sums[0] - 1e-12 <= found.weights.sum() <= sums[1] + 1e-12
    assert found.value == pytest.approx(reference(scores, labels, found.weights, strength), abs=1e-12)
    assert found.value == pytest.approx(by_scipy(reference, scores, labels, sums, strength), abs=1e-8)


@pytest.mark.parametrize("tolerance", [1.0, 1e-2, 1e-4])
def test_a_search_that_ends_early_proves_no_more_than_is_true(pool, tolerance):
    solve, _, _ = pool
    scores, labels = INPUTS["many members"]
    least = solve(scores, labels).value
    early = solve(scores, labels, tolerance=tolerance)
    assert early.gap <= tolerance
    assert least <= early.value <= least + early.gap
    assert tolerance < 1 or early.value > least + 1e-6  # there was something to prove


def test_the_gap_bounds_the_loss_of_all_weights(pool):
    _, reference, sums = pool
    scores, labels = INPUTS["plain"]
    weights = np.array([0.4, 0.0, 0.1, 0.3, 0.2])
    ahead = [reference(scores, labels, weights + step) for step in 1e-6 * np.eye(5)]
    back = [reference(scores, labels, weights - step) for step in 1e-6 * np.eye(5)]
    gap = weight_search.duality_gap(weights, (np.array(ahead) - back) / 2e-6, sums)
    shares = np.random.default_rng(0).dirichlet(np.full(5, 0.4), size=400)
    others = shares * np.random.default_rng(1).uniform(*sums, size=(400, 1))
    lowest = min(reference(scores, labels, other) for other in others)
    assert lowest < reference(scores, labels, weights)
    assert lowest >= reference(scores, labels, weights) - gap


@pytest.mark.parametrize("strength", [0.0, 0.01])
def test_weights_follow_the_members_when_these_change_places(pool, strength):
    solve, _, _ = pool
    scores, labels = INPUTS["plain"]
    order = np.array([3, 0, 4, 1, 2])
    expected = solve(scores, labels, strength=strength).weights[order]
    np.testing.assert_allclose(solve(scores[order], labels, strength=strength).weights, expected, atol=1e-6)


def test_the_order_of_rows_does_not_matter(pool):
    solve, _, _ = pool
    scores, labels = INPUTS["plain"]
    found = solve(scores[:, ::-1], labels[::-1]).weights
    np.testing.assert_allclose(found, solve(scores, labels).weights, atol=1e-6)


@pytest.mark.parametrize("strength", [0.0, 0.01])
def test_equal_members_get_equal_weights_that_are_worth_one(pool, strength):
    solve, _, _ = pool
    scores, labels = INPUTS["plain"]
    doubled = solve(scores[[0, 1, 0, 2, 3, 4, 0]], labels, strength=strength)
    assert doubled.weights[0] == doubled.weights[2] == doubled.weights[6] > 0
    if not strength:
        single = solve(scores, labels)
        assert doubled.value == pytest.approx(single.value, abs=1e-9)
        assert doubled.weights[[0, 2, 6]].sum() == pytest.approx(single.weights[0], abs=1e-5)


def test_members_that_are_nearly_equal_are_not_taken_for_equal(pool):
    solve, _, _ = pool
    scores, labels = INPUTS["plain"]
    near = scores[1].copy()
    near[np.arange(len(labels)), labels] += 1e-7  # no longer sums to 1, and a little better on every row
    found = solve(np.concatenate([scores, near[None]]), labels)
    assert found.gap <= weight_search.TOLERANCE
    assert found.weights[1] != found.weights[5]


def test_members_that_are_all_equal_share_equally(pool):
    solve, _, sums = pool
    scores, labels = INPUTS["plain"]
    found = solve(np.repeat(scores[:1], 6, axis=0), labels)
    assert len(set(found.weights)) == 1
    assert found.gap <= weight_search.TOLERANCE
    if sums[0] != sums[1]:
        assert found.weights.sum() == pytest.approx(pools.fit_log_linear(scores[:1], labels).weights[0], abs=1e-5)


def test_a_strong_penalty_leads_to_equal_weights(pool):
    solve, _, _ = pool
    scores, labels = INPUTS["plain"]
    apart = [np.ptp(solve(scores, labels, strength=strength).weights) for strength in (0, 0.1, 10, 1e4, np.inf)]
    assert apart == sorted(apart, reverse=True)
    assert apart[0] > 0.1
    assert apart[-2] < 1e-4
    assert apart[-1] == 0


def test_an_infinite_penalty_leaves_the_log_linear_pool_its_temperature():
    scores, labels = INPUTS["saturated"]
    found = pools.fit_log_linear(scores, labels, strength=np.inf)
    scales = np.geomspace(*pools.SUM_BOUNDS, 500)
    losses = [log_linear_reference(scores.mean(axis=0, keepdims=True), labels, np.array([scale])) for scale in scales]
    assert found.value == pytest.approx(min(losses), abs=1e-4)
    assert found.weights.sum() == pytest.approx(scales[np.argmin(losses)], rel=0.02)


def test_a_warm_start_ends_at_the_same_weights_in_fewer_steps(pool):
    solve, _, _ = pool
    scores, labels = INPUTS["many members"]
    cold = solve(scores, labels, strength=0.01)
    warm = solve(scores, labels, strength=0.01, start=cold.weights)
    assert warm.steps <= 1 <= cold.steps
    assert warm.steps < cold.steps or cold.steps == 1  # a quadratic takes one
    np.testing.assert_allclose(warm.weights, cold.weights, atol=1e-6)
    far = solve(scores, labels, strength=0.01, start=np.eye(12)[3] * 50)  # outside the bounds of the sum
    np.testing.assert_allclose(far.weights, cold.weights, atol=1e-4)


@pytest.mark.parametrize("seed", range(40))
def test_the_optimum_is_found_from_where_the_loss_is_steep_and_flat(seed):
    # Logits up to the hundreds, sums of weights up to 20: the soft-max is saturated, most of all where it is wrong.
    rng = np.random.default_rng(seed)
    scores = 10 ** rng.uniform(0, 2) * rng.normal(size=(rng.integers(1, 4), rng.integers(2, 12), rng.integers(2, 4)))
    labels = rng.integers(0, scores.shape[2], scores.shape[1])
    for total in (0.05, 1, 20):
        found = pools.fit_log_linear(scores, labels, start=total * rng.dirichlet(np.ones(len(scores))))
        assert found.gap <= weight_search.TOLERANCE


def test_the_only_member_that_is_right_where_all_others_fail_keeps_what_this_is_worth():
    # Row 7: all but member 4 give 1e-12. The weight w of member 4 costs 0.69 w / 0.99 a row and gains log(w) / 1000.
    of_truth = np.full((5, 1000), 0.9)
    of_truth[0], of_truth[4] = 0.99, 0.3
    of_truth[:4, 7] = 1e-12
    found = pools.fit_linear(of_truth)
    assert found.gap <= weight_search.TOLERANCE
    np.testing.assert_array_equal(found.weights[1:4], 0)
    share = np.linspace(1e-4, 0.01, 100_000)
    losses = -(999 * np.log(0.99 - 0.69 * share) + np.log(0.3 * share)) / 1000
    assert found.weights[4] == pytest.approx(share[losses.argmin()], abs=1e-6)


def test_separable_rows_end_at_the_sum_where_prior_and_loss_balance():
    scores, labels = INPUTS["separable"]
    found = pools.fit_log_linear(scores, labels)
    total = found.weights.sum()
    assert 1 < total < 3  # without the prior it runs to its bound
    losses = pools.LogLinearLogLoss(scores, labels)
    step = found.weights * 1e-6
    slope = (losses.value(found.weights + step) - losses.value(found.weights - step)) / (2e-6 * total)
    assert slope == pytest.approx(-(1 - 1 / total) / len(labels), abs=1e-6)


def test_slopes_and_curvature_of_the_objective_are_those_of_its_values():
    scores, labels = INPUTS["plain"]
    loss, at = pools.LogLinearObjective(scores, labels), np.array([0.4, 0.1, 0.2, 0.3, 0.2])
    value, gradient, hessian = loss.derivatives(at)
    assert value == loss.value(at) == pytest.approx(log_linear_reference(scores, labels, at), abs=1e-12)
    steps = 1e-5 * np.eye(5)
    numeric = [(loss.value(at + step) - loss.value(at - step)) / 2e-5 for step in steps]
    np.testing.assert_allclose(gradient, numeric, atol=1e-8)
    numeric = [(loss.derivatives(at + step)[1] - loss.derivatives(at - step)[1]) / 2e-5 for step in steps]
    np.testing.assert_allclose(hessian, numeric, atol=1e-8)


def test_the_prior_of_the_sum_is_finite_and_convex_down_to_zero():
    totals = np.linspace(0, 3, 301)
    values, slopes, curvatures = np.array([pools.scale_prior(float(total), 10) for total in totals]).T
    assert np.isfinite(values).all()
    assert values.min() == pytest.approx(0)
    assert totals[values.argmin()] == pytest.approx(1)
    assert (np.diff(slopes) >= 0).all()
    assert (curvatures >= 0).all()
    np.testing.assert_allclose(np.diff(values) / 0.01, (slopes[1:] + slopes[:-1]) / 2, atol=0.05)


def test_scores_may_be_logits():
    scores, labels = INPUTS["plain"]
    moved = scores + np.random.default_rng(0).normal(size=(5, 60, 1))
    np.testing.assert_allclose(
        pools.fit_log_linear(moved, labels).weights, pools.fit_log_linear(scores, labels).weights
    )


def test_the_same_rows_give_the_same_bytes(pool):
    solve, _, _ = pool
    scores, labels = INPUTS["plain"]
    assert solve(scores, labels).weights.tobytes() == solve(scores.copy(), labels.copy()).weights.tobytes()


@pytest.mark.parametrize("scale", [0.02, 1.0, 40.0])
@pytest.mark.parametrize("start", [0.05, 1.0, 20.0])
def test_the_weight_of_one_member_is_the_least_of_a_grid_from_any_start(scale, start):
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 80)
    scores = (rng.normal(size=(80, 3)) + 1.5 * np.eye(3)[labels]) * scale
    solution = pools.fit_log_linear(scores[None], labels, start=np.array([start]))
    loss = pools.LogLinearObjective(scores[None], labels)
    grid = np.geomspace(*pools.SUM_BOUNDS, 4001)
    losses = [loss.value(np.array([weight])) for weight in grid]
    assert solution.value <= min(losses) + 1e-12
    assert solution.weights[0] == pytest.approx(grid[int(np.argmin(losses))], rel=2e-3)
    assert solution.gap <= weight_search.TOLERANCE
    assert solution.steps <= 12


def test_many_classes_are_summed_along_themselves_to_the_same_derivatives(monkeypatch):
    rng = np.random.default_rng(3)
    scores, labels = rng.normal(size=(4, 50, pools.MANY_CLASSES)), rng.integers(0, pools.MANY_CLASSES, 50)
    weights = np.array([0.1, 0.7, 0.0, 0.4])
    many = pools.LogLinearLogLoss(scores, labels)
    monkeypatch.setattr(pools, "MANY_CLASSES", pools.MANY_CLASSES + 1)
    few = pools.LogLinearLogLoss(scores, labels)
    assert (many.axis, few.axis) == (1, 0)
    assert many.value(weights) == pytest.approx(few.value(weights), abs=1e-13)
    for found, expected in zip(many.derivatives(weights), few.derivatives(weights), strict=True):
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-13)
    log_probabilities = log_softmax(np.tensordot(weights, scores, axes=1))[np.arange(50), labels]
    assert many.value(weights) == pytest.approx(-log_probabilities.mean(), abs=1e-12)
