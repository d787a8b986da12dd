"""Tests of methods over data sets: the worked example of Demsar (2006), scipy, and simulation."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from demsar import AREAS, METHODS
from scipy import stats

from utils.numeric import rank_tests
from utils.numeric.statistics import holm

RANKS = rank_tests.ranks(AREAS, higher_is_better=True)
MEANS = RANKS.mean(axis=0)


def test_mean_ranks_and_friedmans_test_of_the_example():
    assert np.round(MEANS, 3).tolist() == [3.143, 2.0, 2.893, 1.964]
    found = rank_tests.friedman(RANKS)
    assert round(found.chi_square, 2) == 9.28
    assert round(found.f, 2) == 3.69
    assert found.degrees == (3, 39)
    assert found.f_p < 0.05  # 2.85 is the paper's critical value
    assert found.f_p == pytest.approx(stats.f.sf(found.f, 3, 39))
    assert found.chi_square_p == pytest.approx(stats.chi2.sf(found.chi_square, 3))


def test_nemenyis_critical_differences_of_the_example():
    assert round(rank_tests.critical_difference(14, 4), 2) == 1.25
    assert round(rank_tests.critical_difference(14, 4, alpha=0.10), 2) == 1.12
    assert rank_tests.nemenyi_p(rank_tests.critical_difference(14, 4), 14, 4) == pytest.approx(0.05, abs=1e-6)
    worst, best = MEANS[0], MEANS[3]
    assert 0.05 < rank_tests.nemenyi_p(worst - best, 14, 4) < 0.10  # "not significant at 0.05", as the paper says
    assert rank_tests.nemenyi_p(0.0, 14, 4) == 1.0


def test_differences_to_a_control_with_holms_correction():
    p_values = rank_tests.rank_difference_p(MEANS[0] - MEANS[1:], 14, 4)
    assert np.round(p_values, 3).tolist() == [0.019, 0.608, 0.016]  # z = 2.342, 0.512 and 2.416; 0.607 in the paper
    corrected = holm(dict(zip(METHODS[1:], p_values.tolist(), strict=True)))
    assert {name for name, p in corrected.items() if p < 0.05} == {"C4.5+m", "C4.5+m+cf"}


def test_wilcoxons_test_of_the_example():
    found = rank_tests.signed_rank(AREAS[:, 1] - AREAS[:, 0])
    assert (found.positive, found.negative) == (93.0, 12.0)
    assert found.p_value < 0.05  # 12 is below the critical value 21


def test_the_signed_rank_test_is_exact():
    rng = np.random.default_rng(0)
    differences = rng.normal(0.4, 1, 9)
    expected = stats.wilcoxon(differences, method="exact")
    assert rank_tests.signed_rank(differences).p_value == pytest.approx(expected.pvalue)
    tied = np.array([1.0, -1.0, 2.0, 2.0, 3.0, 0.5, 0.0, 0.0])
    ranked = stats.rankdata(np.abs(tied))
    signed = ranked[tied != 0]
    sums = [signed[np.array(signs)].sum() for signs in product([False, True], repeat=6)]
    lower = min(signed[tied[tied != 0] > 0].sum(), signed[tied[tied != 0] < 0].sum())
    expected = 2 * np.mean(np.array(sums) <= lower)
    assert rank_tests.signed_rank(tied).p_value == pytest.approx(expected)
    assert rank_tests.signed_rank(np.zeros(7)).p_value == 1.0
    assert rank_tests.signed_rank([0.0]).p_value == 1.0
    assert rank_tests.signed_rank(np.ones(6)).p_value == pytest.approx(2 / 64)


def test_equal_methods_differ_in_one_of_twenty_cases():
    rng = np.random.default_rng(1)
    friedman, signed = [], []
    for _ in range(600):
        scores = rng.normal(size=(8, 4))
        friedman.append(rank_tests.friedman(rank_tests.ranks(scores, higher_is_better=True)).f_p < 0.05)
        signed.append(rank_tests.signed_rank(scores[:, 0] - scores[:, 1]).p_value < 0.05)
    assert 0.02 < np.mean(friedman) < 0.08
    assert np.mean(signed) < 0.07


def test_ranks_of_losses_and_of_the_same_order_everywhere():
    ranked = rank_tests.ranks([[0.1, 0.2, 0.3]] * 5, higher_is_better=False)
    assert ranked[0].tolist() == [1, 2, 3]
    found = rank_tests.friedman(ranked)
    assert (found.f, found.f_p) == (None, 0.0)
    assert rank_tests.ranks([[0.3, 0.1 + 0.2]], higher_is_better=True).tolist() == [[1.5, 1.5]]
