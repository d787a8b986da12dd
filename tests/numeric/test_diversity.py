"""Measures of diversity: a table worked out by hand, the literal definitions, and members that never err."""

from __future__ import annotations

import numpy as np
import pytest

from utils.numeric import diversity
from utils.numeric.diversity import pairwise_diversity


def test_a_table_worked_out_by_hand():
    # Both right on 4 rows, the first alone on 3, the second alone on 2, neither on 1.
    hits = np.array([[1] * 4 + [1] * 3 + [0] * 2 + [0], [1] * 4 + [0] * 3 + [1] * 2 + [0]], dtype=bool)
    found = pairwise_diversity(hits)
    assert found.disagreement[0, 1] == pytest.approx(5 / 10)
    assert found.double_fault[0, 1] == pytest.approx(1 / 10)
    assert found.q_statistic[0, 1] == pytest.approx((4 * 1 - 3 * 2) / (4 * 1 + 3 * 2))
    assert found.error_correlation[0, 1] == pytest.approx((4 * 1 - 3 * 2) / np.sqrt(7 * 3 * 6 * 4))
    assert found.mean_among([0, 1]) == {
        "disagreement": pytest.approx(0.5),
        "double_fault": pytest.approx(0.1),
        "q_statistic": pytest.approx(-0.2),
        "error_correlation": pytest.approx(-2 / np.sqrt(504)),
    }


def test_any_members_against_the_literal_definitions(monkeypatch):
    monkeypatch.setattr(diversity, "BLOCK_ROWS", 64)
    hits = np.random.default_rng(3).random((6, 200)) < np.array([0.5, 0.6, 0.7, 0.8, 0.9, 0.95])[:, None]
    found = pairwise_diversity(hits)
    for first in range(6):
        for second in range(6):
            pairs = list(zip(hits[first].tolist(), hits[second].tolist(), strict=True))
            both, neither = pairs.count((True, True)), pairs.count((False, False))
            one, other = pairs.count((True, False)), pairs.count((False, True))
            assert found.disagreement[first, second] == pytest.approx((one + other) / 200)
            assert found.double_fault[first, second] == pytest.approx(neither / 200)
            q = (both * neither - one * other) / (both * neither + one * other)
            assert found.q_statistic[first, second] == pytest.approx(q)
            correlation = np.corrcoef(~hits[first], ~hits[second])[0, 1]
            assert found.error_correlation[first, second] == pytest.approx(correlation)


def test_where_there_is_nothing_to_divide_by_equal_members_are_alike_and_others_independent():
    hits = np.array([[1, 1, 1], [1, 1, 1], [0, 0, 0], [1, 0, 1], [1, 0, 1]], dtype=bool)
    found = pairwise_diversity(hits)
    for measure in (found.q_statistic, found.error_correlation):
        assert (np.diag(measure) == 1).all()
        assert measure[0, 1] == measure[3, 4] == 1
        assert measure[0, 2] == measure[0, 3] == measure[2, 3] == 0
    assert found.disagreement[0, 2] == 1


def test_means_are_over_the_pairs_of_those_named():
    hits = np.array([[1, 1, 1, 1], [1, 1, 1, 0], [1, 0, 0, 0]], dtype=bool)
    assert pairwise_diversity(hits).mean_among([0, 1, 2])["disagreement"] == pytest.approx((0.25 + 0.75 + 0.5) / 3)
    assert pairwise_diversity(hits).mean_among([0, 2])["disagreement"] == pytest.approx(0.75)
    assert pairwise_diversity(hits).mean_among([1]) is None
