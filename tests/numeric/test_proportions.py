"""Intervals and tests of fractions: against scipy, full enumeration, and simulations of known truth."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from scipy.stats import binomtest, norm

from utils.core.errors import UserError
from utils.numeric import proportions

GROUPS = np.repeat(np.arange(40), 10)


def grouped_hits(rng, accuracy=0.8):
    """400 hits of this expected accuracy in 40 groups of 10, which are easy or hard as a whole."""
    of_group = rng.beta(4 * accuracy, 4 * (1 - accuracy), 40)
    return rng.random(400) < of_group[GROUPS]


def test_the_interval_of_an_accuracy_is_wilsons():
    for hits, count in ((54, 60), (60, 60), (0, 12), (3, 10)):
        expected = binomtest(hits, count).proportion_ci(method="wilson")
        found = proportions.proportion_interval(np.arange(count) < hits)
        assert found == pytest.approx((expected.low, expected.high), abs=1e-12)
    assert proportions.proportion_interval(np.ones(9)) is None


def test_the_interval_of_a_high_accuracy_holds_it_where_the_bootstrap_does_not():
    rng = np.random.default_rng(0)
    held = resampled = 0
    for _ in range(600):
        hits = rng.random(360) < 0.99
        low, high = proportions.proportion_interval(hits)
        held += low <= 0.99 <= high
        bounds = np.quantile(rng.binomial(360, hits.mean(), 500) / 360, [0.025, 0.975])
        resampled += bounds[0] <= 0.99 <= bounds[1]
    assert held / 600 >= 0.93 > resampled / 600


def test_the_interval_of_an_accuracy_counts_groups():
    rng = np.random.default_rng(1)
    held = {"groups": 0, "rows": 0}
    for _ in range(400):
        hits = grouped_hits(rng)
        for name, groups in (("groups", GROUPS), ("rows", None)):
            low, high = proportions.proportion_interval(hits, groups)
            held[name] += low <= 0.8 <= high
    assert 0.92 <= held["groups"] / 400 <= 0.98
    assert held["rows"] / 400 < 0.85
    assert proportions.proportion_interval(np.ones(400), GROUPS) == proportions.proportion_interval(
        np.ones(40), np.arange(40)
    )
    assert proportions.proportion_interval(np.ones(400), GROUPS // 5) is None


@pytest.mark.parametrize("count", [60, 400])
def test_the_interval_of_a_difference_holds_it_as_often_as_it_says(count):
    rng = np.random.default_rng(2)
    held = []
    for _ in range(500):
        drawn = rng.choice(4, count, p=[0.8, 0.04, 0.08, 0.08])
        bounds = proportions.difference_interval((drawn == 0) | (drawn == 1), (drawn == 0) | (drawn == 2))
        held += [] if bounds is None else [bounds[0] <= -0.04 <= bounds[1]]
    assert len(held) > 300
    assert 0.93 <= np.mean(held) <= 0.985
    same = np.arange(count) % 3 > 0
    assert proportions.difference_interval(same, same) is None
    other = same.copy()
    other[:6] = ~other[:6]
    low, high = proportions.difference_interval(same, other)
    assert low < same.mean() - other.mean() < high
    assert proportions.count_differing(same, other) == 6
    assert proportions.difference_interval(same, other, np.arange(count) // 2) is None  # three groups


def test_half_a_row_is_added_to_each_count_of_a_difference():
    counts = (30, 9, 3, 18)  # rows that both, the first alone, the second alone and neither get right
    hits, others = (np.repeat(right, counts) for right in ([1, 1, 0, 0], [1, 0, 1, 0]))
    first, second = 9.5 / 62, 3.5 / 62
    half = norm.ppf(0.975) * np.sqrt((first + second - (first - second) ** 2) / 62)
    assert proportions.difference_interval(hits, others) == pytest.approx(
        (first - second - half, first - second + half)
    )


def test_a_null_difference_in_groups_is_rarely_significant():
    """Two classifiers of equal accuracy that differ by group: today's failure was 23 to 30%."""
    rng = np.random.default_rng(3)
    significant = {"groups": 0, "rows": 0}
    excluded = 0
    for _ in range(400):
        first, second = grouped_hits(rng), grouped_hits(rng)
        significant["groups"] += proportions.sign_flip_p(first, second, GROUPS) <= 0.05
        significant["rows"] += proportions.sign_flip_p(first, second) <= 0.05
        low, high = proportions.difference_interval(first, second, GROUPS)
        excluded += not low <= 0 <= high
    assert significant["groups"] / 400 <= 0.07
    assert excluded / 400 <= 0.07
    assert significant["rows"] / 400 > 0.15


def test_without_groups_the_test_is_mcnemars():
    rng = np.random.default_rng(5)
    for count in (6, 30, 500, 20_000):
        hits, others = rng.random(count) < 0.8, rng.random(count) < 0.78
        alone, other = int((hits & ~others).sum()), int((others & ~hits).sum())
        expected = binomtest(alone, alone + other).pvalue if alone + other else 1.0
        assert proportions.sign_flip_p(hits, others) == pytest.approx(expected, rel=1e-6, abs=1e-12)
    assert proportions.sign_flip_p(np.ones(6), np.ones(6)) == 1.0
    with pytest.raises(UserError, match="same rows"):
        proportions.sign_flip_p(np.ones(6), np.ones(7))


def test_with_groups_every_exchange_of_whole_groups_is_counted():
    rng = np.random.default_rng(6)
    for _ in range(20):
        hits, others, groups = rng.random(60) < 0.8, rng.random(60) < 0.6, rng.integers(0, 9, 60)
        sums = np.bincount(groups, weights=hits.astype(float) - others, minlength=9)
        flipped = [abs(np.dot(signs, sums)) >= abs(sums.sum()) - 1e-9 for signs in product([-1, 1], repeat=9)]
        assert proportions.sign_flip_p(hits, others, groups) == pytest.approx(np.mean(flipped), abs=1e-9)
    assert proportions.sign_flip_p(hits, others, groups // 2) is None  # five groups give no p below 0.06


def test_the_upper_bound_of_an_error_rate_is_clopper_pearsons():
    for errors, rows in ((0, 59), (3, 60), (60, 60)):
        expected = binomtest(errors, rows, alternative="less").proportion_ci(method="exact").high
        assert proportions.upper_bound(errors, rows, confidence=0.95) == pytest.approx(expected)
