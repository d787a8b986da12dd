"""Generalised canonical correlations against scikit-learn's, and views that hardly are any."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.cross_decomposition import CCA

from utils.numeric import cca
from utils.numeric.cca import principal_axes, shared_space

ROWS = 300


def views(count, rows=ROWS, noise=1.0):
    rng = np.random.default_rng(0)
    common = rng.normal(size=(rows, 3))
    return [
        common @ rng.normal(size=(3, width)) + noise * rng.normal(size=(rows, width)) + 5
        for width in (6, 5, 7, 4)[:count]
    ]


def mapped(found, given):
    return [(view - centre) @ own for view, centre, own in zip(given, found.centres, found.maps, strict=True)]


def test_two_views_without_shrinkage_are_scikit_learns_cca_up_to_the_sign():
    given = views(2)
    found = shared_space(given, 4, shrinkage=0.0)
    theirs = CCA(4, max_iter=5000, tol=1e-12).fit(*given).transform(*given)
    for own, other in zip(mapped(found, given), theirs, strict=True):
        correlation = [abs(np.corrcoef(own[:, place], other[:, place])[0, 1]) for place in range(4)]
        np.testing.assert_allclose(correlation, 1, atol=1e-6)
    expected = [np.corrcoef(theirs[0][:, place], theirs[1][:, place])[0, 1] for place in range(4)]
    np.testing.assert_allclose(found.correlations, expected, atol=1e-6)


def test_mapped_views_sum_to_uncorrelated_variates_of_unit_variance():
    given = views(4)
    total = sum(mapped(shared_space(given, 5), given))
    np.testing.assert_allclose(total.T @ total / ROWS, np.eye(5), atol=1e-9)


def test_what_four_views_share_comes_first_and_is_found_again():
    given = views(4, noise=0.3)
    found = shared_space(given, 8)
    assert (found.correlations[:3] > 0.8).all()
    assert (found.correlations[3:] < 0.3).all()
    common = np.random.default_rng(0).normal(size=(ROWS, 3))
    first = sum(mapped(found, given))[:, :3]
    explained = first @ np.linalg.lstsq(first, common - common.mean(axis=0), rcond=None)[0]
    assert np.square(explained).sum() > 0.95 * np.square(common - common.mean(axis=0)).sum()


def test_the_iterative_way_finds_what_the_dense_one_does(monkeypatch):
    given = views(4)
    dense = shared_space(given, 3)
    monkeypatch.setattr(cca, "MAX_DENSE_SIZE", 0)
    again = shared_space(given, 3)
    for own, other in zip(again.maps, dense.maps, strict=True):
        np.testing.assert_allclose(own, other, atol=1e-8)


def test_more_columns_than_rows_are_shrunk_so_that_chance_is_not_taken_for_correlation():
    rng = np.random.default_rng(1)
    given = [rng.normal(size=(40, 60)) for _ in range(3)]
    assert shared_space(given, 2, shrinkage=0.0).correlations[0] > 0.99
    found = shared_space(given, 2)
    assert found.correlations[0] < 0.9  # on the rows fitted on; alone they can be made to agree wholly
    assert (found.shrinkage > 0.5).all()


@pytest.mark.parametrize(
    "odd",
    [
        np.zeros((ROWS, 3)),
        np.full((ROWS, 2), 7.0),
        np.arange(ROWS, dtype=float)[:, None],
        np.outer(np.arange(ROWS), [1.0, 2.0, 3.0]),
        np.full((ROWS, 2), 1e30),
    ],
    ids=["zeros", "constant", "one column", "rank one", "huge"],
)
def test_a_view_that_hardly_varies_does_no_harm(odd):
    given = [*views(2), odd]
    found = shared_space(given, 4)
    for own in mapped(found, given):
        assert np.isfinite(own).all()
    assert len(found.correlations) == 4


def test_views_that_do_not_vary_share_one_variate_that_is_zero():
    found = shared_space([np.ones((5, 2)), np.ones((5, 3))], 4)
    assert [own.shape for own in found.maps] == [(2, 1), (3, 1)]
    assert not any(own.any() for own in found.maps)


def test_principal_axes_keep_the_variance_and_point_one_way():
    rng = np.random.default_rng(2)
    values = rng.normal(size=(50, 80)) * np.r_[[9.0] * 3, [0.1] * 77]
    values -= values.mean(axis=0)
    axes = principal_axes(values, 3)
    assert axes.shape == (80, 3)
    np.testing.assert_allclose(axes.T @ axes, np.eye(3), atol=1e-9)
    assert np.square(values @ axes).sum() > 0.99 * np.square(values).sum()
    np.testing.assert_allclose(principal_axes(-values, 3), axes, atol=1e-9)
    assert principal_axes(np.zeros((4, 6)), 2).shape == (6, 1)
