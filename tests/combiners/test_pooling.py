"""What held-out folds decide about weights, against the same decisions written out."""

from __future__ import annotations

import numpy as np
import pytest

from utils.combiners import pooling
from utils.combiners.pooled_members import LOWEST_SCORE, POOLS
from utils.combiners.pooling import Weighting
from utils.numeric import temperature, weight_search
from utils.numeric.metrics import METRICS, log_loss, log_softmax, softmax


def members_of(members, rows, classes, *, seed=0, skill=1.5, calibration=(1.0, 1.0)):
    """Scores (M, N, C) of members whose logits are right up to a factor from `calibration`, labels and 4 folds (N,)."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, rows)
    logits = rng.normal(size=(members, rows, classes)) + 0.7 * rng.normal(size=(rows, classes))
    logits[:, np.arange(rows), labels] += skill
    logits *= rng.uniform(*calibration, size=(members, 1, 1))
    return np.maximum(log_softmax(logits), LOWEST_SCORE), labels, np.arange(rows) % 4


@pytest.fixture(params=sorted(POOLS))
def pool(request):
    return POOLS[request.param]


def output(pool, scores, weights):
    """Probabilities (N, C), a row at a time."""
    if pool.name == "linear":
        return np.array([weights @ np.exp(scores[:, n]) for n in range(scores.shape[1])])
    return np.array([softmax(weights @ scores[:, n]) for n in range(scores.shape[1])])


def brier_rows(probabilities, labels):
    return np.sum((probabilities - np.eye(probabilities.shape[1])[labels]) ** 2, axis=1)


@pytest.mark.parametrize("metric", ["log_loss", "brier"])
def test_the_penalty_is_the_best_on_folds_left_out(pool, metric):
    scores, labels, folds = members_of(5, 120, 3, calibration=(0.5, 3))
    found = pooling.tuned_weights(pool, scores, labels, folds, metric, calibrate=False)
    held_out = {}
    for strength in pooling.STRENGTHS:
        crossfit = np.empty((120, 3))
        for fold in range(4):
            inside = folds == fold
            loss = pool.loss(pool.parts(scores[:, ~inside]), labels[~inside], metric)
            fitted = weight_search.minimise(loss, strength=strength, sum_bounds=pool.sums)
            crossfit[inside] = output(pool, scores[:, inside], fitted.weights)
        held_out[strength] = METRICS[metric].function(crossfit, labels)
        if strength == found.strength:
            np.testing.assert_allclose(np.exp(found.crossfit), crossfit, atol=2e-3)
    assert held_out[found.strength] == pytest.approx(min(held_out.values()), abs=1e-5)
    assert len({round(value, 4) for value in held_out.values()}) > 3  # there was something to choose
    last = weight_search.minimise(
        pool.loss(pool.parts(scores), labels, metric), strength=found.strength, sum_bounds=pool.sums
    )
    np.testing.assert_allclose(found.weights, last.weights, atol=1e-4)


def test_few_rows_of_equals_stay_together_and_many_rows_tell_members_apart(pool):
    scores, labels, folds = members_of(8, 40, 3, seed=3, skill=0.5)
    few = pooling.tuned_weights(pool, scores, labels, folds, "log_loss", calibrate=False)
    assert np.ptp(few.weights) / few.weights.mean() < 0.2
    scores, labels, folds = members_of(8, 2000, 3, seed=3, skill=0.5)
    scores[2] = log_softmax(2 * scores[0] + 3 * np.eye(3)[labels])
    many = pooling.tuned_weights(pool, scores, labels, folds, "log_loss", calibrate=False)
    assert many.weights[2] > 0.8 * many.weights.sum()
    assert many.strength < few.strength


def test_a_mixture_is_judged_at_the_temperature_that_it_will_have():
    scores, labels, folds = members_of(5, 400, 3, seed=1, calibration=(0.2, 0.3))  # all of them too timid
    found = pooling.tuned_weights(POOLS["linear"], scores, labels, folds, "log_loss", calibrate=True)
    raw = pooling.tuned_weights(POOLS["linear"], scores, labels, folds, "log_loss", calibrate=False)
    assert raw.temperature == 1
    assert found.temperature < 0.5
    assert log_loss(np.exp(found.crossfit), labels) < log_loss(np.exp(raw.crossfit), labels) - 0.05
    plain = np.empty((400, 3))
    for fold, weights in enumerate(found.fold_weights):
        plain[folds == fold] = np.log(output(POOLS["linear"], scores[:, folds == fold], weights))
    choice = temperature.select_temperature(plain, labels, folds)
    assert choice.temperature == pytest.approx(found.temperature)
    np.testing.assert_allclose(np.exp(found.crossfit), softmax(plain / choice.row_temperatures[:, None]), atol=1e-9)


def test_a_log_linear_pool_gets_no_second_temperature(monkeypatch):
    monkeypatch.delattr(temperature, "select_temperature")
    scores, labels, folds = members_of(4, 200, 3, calibration=(0.2, 0.3))
    found = pooling.tuned_weights(POOLS["log_linear"], scores, labels, folds, "log_loss", calibrate=True)
    assert found.temperature == 1
    assert found.weights.sum() > 2


def test_equal_weights_win_where_they_clearly_hit_more():
    # Member 0 is sure and mostly right; the other two are timid, right together on every row, and cost log-loss.
    labels = np.arange(400) % 2
    wrong = np.arange(400) % 5 == 0
    of_truth = np.array([np.where(wrong, 0.45, 0.97), np.full(400, 0.6), np.full(400, 0.6)])
    scores = np.log(np.stack([np.where(labels == k, of_truth, 1 - of_truth) for k in (0, 1)], axis=2))
    folds = np.arange(400) // 5 % 4
    smooth = pooling.tuned_weights(POOLS["linear"], scores, labels, folds, "log_loss", calibrate=False)
    assert smooth.weights[0] > 0.9
    found = pooling.tuned_weights(POOLS["linear"], scores, labels, folds, "accuracy", calibrate=False)
    np.testing.assert_array_equal(found.weights, 1 / 3)
    assert METRICS["accuracy"].function(np.exp(found.crossfit), labels) == 1


@pytest.mark.parametrize(
    ("gained", "lost", "expected"),
    [(9, 0, True), (9, 5, True), (9, 6, False), (0, 0, False), (0, 9, False)],
)
def test_more_correct_rows_are_clear_beyond_one_standard_error(gained, lost, expected):
    """Of 100 rows, the first is right alone on some and wrong alone on others."""
    labels = np.arange(100) % 2
    right = np.log(np.where(np.eye(2)[labels] == 1, 0.9, 0.1))
    first, second = right.copy(), right.copy()
    first[50 : 50 + lost] = right[50 : 50 + lost, ::-1]
    second[:gained] = right[:gained, ::-1]
    assert pooling._hits_more(first, second, labels, "accuracy") == expected
    gains = np.repeat([1, -1, 0], [gained, lost, 100 - gained - lost])
    assert (gains.mean() > gains.std(ddof=1) / 10) == expected


def test_equal_weights_are_those_of_the_infinite_penalty(monkeypatch):
    """All finite penalties prefer member 0, which is right alone on fewer rows."""
    labels, folds = np.arange(400) % 2, np.arange(400) // 5 % 4
    of_truth = np.array([np.where(np.arange(400) % 5 == 0, 0.45, 0.97), np.full(400, 0.6), np.full(400, 0.6)])
    scores = np.log(np.stack([np.where(labels == k, of_truth, 1 - of_truth) for k in (0, 1)], axis=2))
    path = np.array([[1 / 3] * 3, *[[1.0, 0, 0]] * (len(pooling.STRENGTHS) - 1)])
    monkeypatch.setattr(pooling, "_path", lambda *_: path)
    found = pooling.tuned_weights(POOLS["linear"], scores, labels, folds, "accuracy", calibrate=False)
    assert found.strength == np.inf
    np.testing.assert_array_equal(found.weights, 1 / 3)


@pytest.mark.parametrize("metric", ["log_loss", "brier"])
def test_members_without_any_loss_are_weighted_equally(pool, metric):
    labels, folds = np.arange(40) % 2, np.arange(40) // 2 % 4
    scores = np.where(np.eye(2)[labels] == 1, 0.0, LOWEST_SCORE)[None].repeat(3, axis=0)
    found = pooling.tuned_weights(pool, scores, labels, folds, metric, calibrate=False)
    assert np.ptp(found.weights) < 1e-9 < found.weights.min()
    assert (found.crossfit.argmax(axis=1) == labels).all()


@pytest.mark.parametrize(("rows", "step"), [(200, 1), (201, 2), (500, 3), (600, 3)])
def test_rows_that_select_a_penalty_are_evenly_spaced_in_folds_and_classes(monkeypatch, rows, step):
    monkeypatch.setattr(pooling, "MAX_TUNING_ROWS", 200)
    rng = np.random.default_rng(0)
    labels, folds = rng.integers(0, 3, rows), rng.integers(0, 5, rows)
    taken = np.arange(rows)[pooling.tuning_rows(labels, folds, 9)]
    assert (np.diff(taken) > 0).all()
    for fold in range(5):
        assert (folds[taken] == fold).sum() == -(-(folds == fold).sum() // step)
        for label in range(3):
            inside = (labels == label) & (folds == fold)
            assert abs(inside[taken].sum() - inside.sum() / step) < 1


@pytest.mark.parametrize(
    ("members", "classes", "count"), [(15, 13, 10_000), (200, 10, 10_000), (5, 4_000, 1_000), (20, 5_000, 500)]
)
def test_many_classes_select_a_penalty_by_fewer_rows(members, classes, count):
    rows = np.arange(20_000)
    assert len(rows[pooling.tuning_rows(rows % 7, rows % 5, members * classes)]) == count


def test_penalties_are_tried_from_equal_weights_to_none():
    assert pooling.STRENGTHS[0] == np.inf
    assert pooling.STRENGTHS[-1] == 0
    assert list(pooling.STRENGTHS) == sorted(set(pooling.STRENGTHS), reverse=True)


def weighting_with(losses, pool="linear"):
    """Two classes, every row of class 0 with this loss."""
    of_truth = np.exp(-np.asarray(losses))
    return Weighting(POOLS[pool], np.ones(1), crossfit=np.log(np.stack([of_truth, 1 - of_truth], axis=1)))


@pytest.mark.parametrize(("gain", "expected"), [(0.021, "log_linear"), (0.019, "linear"), (-0.05, "linear")])
def test_the_linear_pool_stays_within_one_standard_error(gain, expected):
    # Gains of mean `gain` and standard deviation 0.2 over 100 rows: their standard error is 0.02.
    apart = 0.2 * np.resize([1.0, -1.0], 100) * np.sqrt(99 / 100)
    linear, other = weighting_with(np.full(100, 1.0)), weighting_with(1 - gain - apart, "log_linear")
    assert pooling.preferred_pool(linear, other, np.zeros(100, dtype=int), "log_loss").pool.name == expected


def test_the_two_pools_are_compared_by_the_metrics_own_loss():
    linear, other = weighting_with([0.1, 4.0] * 50), weighting_with([0.5, 2.0] * 50, "log_linear")
    labels = np.zeros(100, dtype=int)
    expected = [brier_rows(np.exp(found.crossfit), labels) for found in (linear, other)]
    np.testing.assert_allclose(pooling.pooled_losses(linear.crossfit, labels, "brier"), expected[0])
    gains = expected[0] - expected[1]
    clear = gains.mean() > gains.std(ddof=1) / 10
    assert (pooling.preferred_pool(linear, other, labels, "brier") is other) == clear
    assert pooling.preferred_pool(linear, other, labels, "log_loss") is other


def literally_added(pool, scores, labels, weights, metric, seed):
    """The mean over bags of greedy additions, one candidate at a time."""
    rng, moved = np.random.default_rng(seed), np.zeros(len(weights))
    for _ in range(pooling.BAGS):
        rows = np.sort(rng.integers(len(labels), size=len(labels)))
        counts = pooling.VOTES * weights / weights.sum()

        def judged(counts, rows=rows):
            shares = counts / counts.sum() * weights.sum()
            found = output(pool, scores[:, rows], shares)
            return METRICS[metric].function(found, labels[rows]), -log_loss(found, labels[rows])

        reached = judged(counts)[0]
        for _ in range(pooling.ADDITIONS):
            best = max(range(len(weights)), key=lambda m: (*judged(counts + np.eye(len(weights))[m]), -m))
            score = judged(counts + np.eye(len(weights))[best])[0]
            if score <= reached + 1e-12:
                break
            reached, counts = score, counts + np.eye(len(weights))[best]
        moved += counts / counts.sum() / pooling.BAGS
    return moved * weights.sum()


@pytest.mark.parametrize("metric", ["accuracy", "f1_macro"])
def test_additions_are_those_of_a_literal_search(pool, metric, monkeypatch):
    monkeypatch.setattr(pooling, "_score", lambda crossfit, labels, metric: next(rising))
    monkeypatch.setattr(pooling, "VOTES", 4)
    moved = []
    drawn = [(60, 0, 10), (60, 1, 1), (60, 2, 2), (24, 4, 10), (24, 11, 10), (40, 1, 10), (40, 8, 10), (40, 13, 10)]
    for rows, seed, additions in drawn:  # with fewer rows, more members tie
        monkeypatch.setattr(pooling, "ADDITIONS", additions)
        rising = iter([2.0, 1.0])  # held-out folds are made to gain, so that the additions are kept
        scores, labels, folds = members_of(5, rows, 3, seed=seed, skill=0.8, calibration=(0.5, 2))
        weights = np.array([0.5, 0.0, 0.3, 0.2, 0.0]) * (1.6 if pool.scales else 1)
        start = Weighting(pool, weights, crossfit=np.zeros((rows, 3)), fold_weights=(weights,) * 4)
        found = pooling.with_members_added(start, scores, labels, folds, metric, seed=seed, calibrate=False)
        expected = literally_added(pool, scores, labels, weights, metric, seed)
        np.testing.assert_allclose(found.weights, expected, atol=1e-12)
        moved.append(np.abs(expected - weights).max() > 0.01 * weights.sum())
    assert sum(moved) > 5


@pytest.fixture
def nearly_right():
    """Scores (2, 300, 2), labels and folds: on each fifth row member 0 is just wrong; member 1 is timid and right."""
    labels = np.arange(300) % 2
    wrong = np.arange(300) % 5 == 0
    of_truth = np.array([np.where(wrong, 0.495, 0.95), np.full(300, 0.7)])
    scores = np.log(np.stack([np.where(labels == k, of_truth, 1 - of_truth) for k in (0, 1)], axis=2))
    return scores, labels, np.arange(300) // 5 % 4


def with_additions(pool, scores, labels, folds, weights):
    start = pooling.fixed_weights(pool, scores, labels, folds, weights, calibrate=False)
    start = Weighting(pool, weights, crossfit=start.crossfit, fold_weights=(weights,) * 4)
    return start, pooling.with_members_added(start, scores, labels, folds, "accuracy", seed=0, calibrate=False)


def test_members_that_raise_accuracy_are_added_where_held_out_folds_gain(pool, nearly_right):
    scores, labels, folds = nearly_right
    start, found = with_additions(pool, scores, labels, folds, np.array([1.0, 0.0]))
    assert found.added
    np.testing.assert_allclose(found.weights, [20 / 21, 1 / 21])
    assert METRICS["accuracy"].function(np.exp(start.crossfit), labels) == 0.8
    assert METRICS["accuracy"].function(np.exp(found.crossfit), labels) == 1


def test_members_that_are_equal_are_added_equally(pool, nearly_right):
    scores, labels, folds = nearly_right
    _, found = with_additions(pool, scores[[0, 1, 1]], labels, folds, np.array([1.0, 0.0, 0.0]))
    np.testing.assert_allclose(found.weights, [20 / 21, 0.5 / 21, 0.5 / 21])
    assert found.weights[1] == found.weights[2]


@pytest.mark.parametrize("metric", ["accuracy", "f1_macro"])
def test_additions_never_lower_the_score_of_held_out_folds(pool, metric):
    kept = []
    for seed in range(8):
        scores, labels, folds = members_of(6, 80, 3, seed=seed, skill=0.8)
        start = pooling.tuned_weights(pool, scores, labels, folds, metric, calibrate=False)
        found = pooling.with_members_added(start, scores, labels, folds, metric, seed=0, calibrate=False)
        before, after = (METRICS[metric].function(np.exp(each.crossfit), labels) for each in (start, found))
        assert after > before if found.added else found is start
        kept.append(found.added)
    assert not all(kept)  # fitted to the sample, they were turned down


def test_of_many_rows_a_sample_chooses_the_strength_and_all_fit_the_weights(monkeypatch):
    rng = np.random.default_rng(5)
    labels, folds = np.arange(600) % 3, np.arange(600) // 3 % 5
    logits = rng.normal(size=(4, 600, 3))
    logits[:, np.arange(600), labels] += np.array([0.2, 0.8, 1.4, 2.0])[:, None]
    scores = log_softmax(logits)
    fitted_on = []
    path = pooling._path
    monkeypatch.setattr(pooling, "_path", lambda *given: (fitted_on.append(given[2]), path(*given))[1])
    monkeypatch.setattr(pooling, "MAX_TUNING_ROWS", 200)
    pool = POOLS["linear"]
    found = pooling.tuned_weights(pool, scores, labels, folds, "log_loss", calibrate=False)
    assert [len(truth) for truth in fitted_on] == [160] * 5  # 200 rows, less a fold's
    assert found.gap <= 1e-8
    assert found.crossfit.shape == (600, 3)
    for number, weights in enumerate(found.fold_weights):
        outside = folds != number
        loss = pool.loss(pool.parts(scores[:, outside]), labels[outside], "log_loss")
        best = weight_search.minimise(loss, strength=found.strength).weights
        np.testing.assert_allclose(weights, best, atol=1e-2)
        mixed = np.tensordot(weights, np.exp(scores[:, ~outside]), axes=1)
        np.testing.assert_allclose(np.exp(found.crossfit[~outside]), mixed, atol=1e-9)


@pytest.mark.parametrize("metric", ["log_loss", "brier"])
def test_losses_of_several_pools_are_those_of_each(metric):
    rng = np.random.default_rng(9)
    log_probabilities, labels = log_softmax(rng.normal(size=(2, 7, 3))), rng.integers(0, 3, 7)
    expected = [pooling.pooled_losses(values, labels, metric) for values in log_probabilities]
    np.testing.assert_allclose(pooling.pooled_losses(log_probabilities, labels, metric), expected, atol=1e-12)
    if metric == "brier":
        distances = ((np.exp(log_probabilities) - np.eye(3)[labels]) ** 2).sum(axis=2)
        np.testing.assert_allclose(expected, distances, atol=1e-12)
