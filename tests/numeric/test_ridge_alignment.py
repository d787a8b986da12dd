"""Linear maps between spaces: exact ones are found, and what a map is worth is measured on rows left out."""

from __future__ import annotations

import numpy as np

from utils.numeric.ridge_alignment import RIDGE_STRENGTHS, fit_ridge_map, pearson_correlation


def rotation(width, seed=0):
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(width, width)))[0]


def test_a_rotated_and_shifted_space_is_found_from_a_few_rows():
    rng = np.random.default_rng(1)
    values = rng.normal(size=(60, 12)) * 3 + 2
    turned = values @ rotation(12) + 5
    found = fit_ridge_map(turned[:40], values[:40])
    np.testing.assert_allclose(found.apply(turned[40:]), values[40:], atol=1e-4)
    assert found.explained > 0.999


def test_what_it_explains_is_that_of_fits_without_the_row():
    rng = np.random.default_rng(2)
    inputs = rng.normal(size=(30, 8))
    targets = inputs @ rng.normal(size=(8, 3)) + 2 * rng.normal(size=(30, 3))
    found = fit_ridge_map(inputs, targets)
    strength = found.strength * np.linalg.svd(inputs - inputs.mean(axis=0), compute_uv=False)[0] ** 2
    errors, total = 0.0, 0.0
    for row in range(30):
        rest = np.arange(30) != row
        # The ridge of all rows but one, the centre being that of all rows, as the closed form has it.
        own = np.linalg.solve(
            (centred := inputs - inputs.mean(axis=0))[rest].T @ centred[rest] + strength * np.eye(8),
            centred[rest].T @ (targets[rest] - targets.mean(axis=0)),
        )
        errors += np.square(targets[row] - targets.mean(axis=0) - centred[row] @ own).sum()
        total += np.square(targets[row] - targets[rest].mean(axis=0)).sum()
    assert abs(found.explained - (1 - errors / total)) < 0.05
    assert found.strength in RIDGE_STRENGTHS


def test_unrelated_spaces_explain_nothing():
    rng = np.random.default_rng(3)
    found = fit_ridge_map(rng.normal(size=(60, 40)), rng.normal(size=(60, 5)))
    assert found.explained < 0.05
    fresh, truth = rng.normal(size=(200, 40)), rng.normal(size=(200, 5))
    assert abs(pearson_correlation(found.apply(fresh), truth)) < 0.2


def test_more_columns_than_rows_and_constant_columns_are_no_trouble():
    rng = np.random.default_rng(4)
    values = np.c_[rng.normal(size=(20, 50)), np.ones(20)]
    found = fit_ridge_map(values, values[:, :2])
    assert np.isfinite(found.apply(values)).all()
    constant = fit_ridge_map(np.ones((5, 3)), np.ones((5, 2)))
    np.testing.assert_allclose(constant.apply(np.ones((2, 3))), 1)


def test_agreement_is_the_correlation_of_all_entries():
    values = np.random.default_rng(5).normal(size=(40, 3))
    assert pearson_correlation(2 * values + 7, values) > 0.999999
    assert pearson_correlation(-values, values) < -0.999999
    assert pearson_correlation(np.zeros((40, 3)), values) == 0
