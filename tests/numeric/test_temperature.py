"""Temperatures against a fine grid, and when they are kept."""

from __future__ import annotations

import numpy as np
import pytest

from utils.numeric import pools, temperature
from utils.numeric.metrics import log_loss, softmax


def calibrated(rows, classes, *, seed=0, scale=2.0):
    """Logits (N, C) and labels (N,) drawn from their soft-max: the best temperature is near 1."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(scale=scale, size=(rows, classes))
    drawn = (softmax(logits).cumsum(axis=1) > rng.uniform(size=(rows, 1))).argmax(axis=1)
    return logits, drawn


def folds_of(rows, count=4):
    return np.arange(rows) % count


@pytest.mark.parametrize("factor", [0.2, 1.0, 5.0])
def test_it_is_the_best_of_a_fine_grid(factor):
    logits, labels = calibrated(300, 4)
    found = temperature.fit_temperature(logits * factor, labels)
    grid = np.geomspace(temperature.MIN_TEMPERATURE, temperature.MAX_TEMPERATURE, 2001)
    losses = [log_loss(softmax(logits * factor / value), labels) + (1 / value + np.log(value)) / 300 for value in grid]
    assert found == pytest.approx(grid[np.argmin(losses)], rel=0.005)
    assert found == pytest.approx(factor, rel=0.25)


def test_probabilities_serve_as_logits_do():
    logits, labels = calibrated(100, 3)
    expected = temperature.fit_temperature(3 * logits, labels)
    assert temperature.fit_temperature(np.log(softmax(3 * logits)), labels) == pytest.approx(expected)


def test_it_stays_within_its_bounds_where_the_data_ask_for_more():
    labels = np.arange(3000) % 3
    tiny = 0.02 * np.eye(3)[labels]  # always right by little: many rows ask for a temperature near 0
    assert temperature.fit_temperature(tiny, labels) == pytest.approx(temperature.MIN_TEMPERATURE)
    wrong = np.eye(3)[(labels + 1) % 3]
    assert temperature.fit_temperature(wrong, labels) == pytest.approx(temperature.MAX_TEMPERATURE)
    assert pytest.approx((0.05, 20)) == (temperature.MIN_TEMPERATURE, temperature.MAX_TEMPERATURE)


@pytest.mark.parametrize(("rows", "expected"), [(10, 0.68), (100, 0.53), (1000, 0.43), (10_000, 0.35)])
def test_rows_that_are_all_correct_get_a_temperature_that_falls_slowly_with_their_number(rows, expected):
    labels = np.arange(rows) % 7
    found = temperature.fit_temperature(4.6 * np.eye(7)[labels], labels)  # each row with probability 0.94
    assert found == pytest.approx(expected, abs=0.01)


def test_rows_that_are_all_wrong_get_a_finite_temperature():
    logits = 0.2 * np.eye(3)[[0, 1, 2, 1]]
    assert 1 < temperature.fit_temperature(logits, np.array([1, 2, 0, 2])) < 2


@pytest.mark.parametrize("classes", [2, 10, 100, 1000])
@pytest.mark.parametrize("rows", [20, 200])
def test_the_prior_costs_calibrated_rows_next_to_nothing(rows, classes):
    # The loss of a fit on other rows, in the mean over draws, beside that of the true temperature.
    unseen, labels = calibrated(2000, classes, seed=99)
    fitted = [temperature.fit_temperature(*calibrated(rows, classes, seed=seed)) for seed in range(20)]
    losses = [log_loss(softmax(unseen / value), labels) for value in fitted]
    assert np.mean(losses) - log_loss(softmax(unseen), labels) < 1 / rows


def test_it_is_kept_where_held_out_rows_gain():
    logits, labels = calibrated(400, 4)
    found = temperature.select_temperature(4 * logits, labels, folds_of(400))
    assert found.temperature == temperature.fit_temperature(4 * logits, labels)
    assert found.held_out_loss < found.initial_loss == pytest.approx(log_loss(softmax(4 * logits), labels), abs=1e-6)


def test_a_rows_temperature_is_fitted_on_the_other_folds_alone():
    logits, labels = calibrated(90, 3)
    folds = folds_of(90, 3)
    found = temperature.select_temperature(4 * logits, labels, folds)
    for fold in range(3):
        expected = temperature.fit_temperature(4 * logits[folds != fold], labels[folds != fold])
        np.testing.assert_array_equal(found.row_temperatures[folds == fold], expected)
    unseen = softmax(4 * logits / found.row_temperatures[:, None])
    assert found.held_out_loss == pytest.approx(log_loss(unseen, labels), abs=1e-9)


def test_it_is_dropped_where_held_out_rows_do_not_gain():
    # The folds contradict one another: in one the members are too sure, in the other too timid.
    logits = np.tile(np.array([[1.0, 0.0]]), (40, 1))
    folds = np.repeat([0, 1], 20)
    labels = np.where(folds == 0, np.arange(40) % 2, 0)
    assert temperature.fit_temperature(logits, labels) != pytest.approx(1, abs=0.05)
    found = temperature.select_temperature(logits, labels, folds)
    assert found.held_out_loss > found.initial_loss
    assert found.temperature == 1
    np.testing.assert_array_equal(found.row_temperatures, 1)


def test_one_fold_leaves_nothing_to_judge_by():
    logits, labels = calibrated(50, 3)
    found = temperature.select_temperature(5 * logits, labels, np.zeros(50, dtype=np.int64))
    assert (found.temperature, found.initial_loss) == (1, found.held_out_loss)


def test_each_member_gets_its_own():
    logits, labels = calibrated(600, 3)
    found = temperature.select_member_temperatures(np.stack([logits / 3, logits * 4]), labels, folds_of(600))
    assert found == pytest.approx([1 / 3, 4], rel=0.15)


@pytest.mark.parametrize("rows", [61, 4000, 16_000])  # in one batch, in several, and each fit alone
def test_fits_have_the_same_result_together_and_alone(rows):
    sets = np.stack([calibrated(rows, 10, seed=7)[0] * factor for factor in (0.1, 0.7, 1.0, 3.0, 40.0)])
    labels, folds = calibrated(rows, 10, seed=7)[1], np.arange(rows) % 3
    together = temperature.select_temperatures(sets, labels, folds)
    for scores, choice in zip(sets, together, strict=True):
        alone = temperature.select_temperature(scores, labels, folds)
        assert (choice.temperature, choice.initial_loss, choice.held_out_loss) == (
            *(alone.temperature, alone.initial_loss, alone.held_out_loss),
        )
        np.testing.assert_array_equal(choice.row_temperatures, alone.row_temperatures)
        if choice.temperature != 1:
            expected = 1 / pools.fit_log_linear(scores[None], labels).weights[0]  # not batched
            assert choice.temperature == pytest.approx(expected, rel=1e-9)
            for fold in range(3):
                others = scores[None, folds != fold], labels[folds != fold]
                expected = 1 / pools.fit_log_linear(*others).weights[0]
                assert choice.row_temperatures[folds == fold] == pytest.approx(expected, rel=1e-9)
    assert len({choice.temperature for choice in together} - {1.0}) >= 3


def test_huge_logits_are_no_trouble():
    logits = np.array([[1e30, 0.0, -1e30], [0.0, 1e30, 0.0]])
    assert np.isfinite(temperature.fit_temperature(logits, np.array([0, 0])))
