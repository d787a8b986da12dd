"""Means of rows in groups: standard errors, and intervals that hold the truth as often as they say."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import t as student

from utils.numeric import means

GROUPS = np.repeat(np.arange(40), 10)


def grouped_values(rng):
    """400 values of mean 0 in 40 groups of 10, whose rows have most of their spread in common."""
    return rng.normal(size=40)[GROUPS] + 0.5 * rng.normal(size=400)


def test_one_standard_error_is_that_of_the_paired_difference():
    lowest, one_off, three_off = np.zeros(8), np.zeros(8), np.zeros(8)
    one_off[0] = three_off[:3] = 1
    is_within = means.is_within_one_standard_error
    assert is_within(one_off, lowest)  # 1/8 above, and the error is 1/8
    assert not is_within(three_off, lowest)  # 3/8 above, and the error is 0.18
    assert is_within(three_off, lowest, groups=[0, 0, 0, 1, 1, 1, 1, 1])  # all from one of two groups
    assert is_within(lowest, lowest)
    assert is_within(lowest, one_off)
    assert not is_within(one_off[:1], lowest[:1])


def test_the_standard_error_of_groups_is_that_of_their_sums():
    values = np.random.default_rng(0).normal(size=400)
    of_groups = values.reshape(40, 10).mean(axis=1)
    assert means.standard_error(values, GROUPS) == pytest.approx(of_groups.std(ddof=1) / np.sqrt(40))
    assert means.standard_error(values) == pytest.approx(values.std(ddof=1) / 20)
    assert means.standard_error(values[:1]) == 0.0
    shuffled = np.random.default_rng(1).permutation(400)
    assert means.standard_error(values[shuffled], GROUPS[shuffled] * 7) == pytest.approx(
        means.standard_error(values, GROUPS)
    )


@pytest.mark.parametrize("groups", [None, GROUPS], ids=["rows", "groups"])
def test_intervals_hold_the_mean_as_often_as_they_say(groups):
    rng = np.random.default_rng(2)
    held = 0
    for _ in range(400):
        values = grouped_values(rng) if groups is not None else rng.normal(size=400)
        low, high = means.mean_interval(values, groups)
        held += low <= 0 <= high
    assert 0.92 <= held / 400 <= 0.98


def test_intervals_of_paired_differences_hold_0_where_two_models_are_equal():
    """Losses of 99% accurate models on 200 rows: corrected for the skewness of the sample, 0 was outside in 15%."""
    rng = np.random.default_rng(4)
    held = {"paired": 0, "skewed": 0}
    for _ in range(400):
        gain = np.subtract(*(rng.gamma(0.05, 0.5, (2, 200)) + (rng.random((2, 200)) < 0.01) * 3))
        for name, interval in (("paired", means.paired_interval), ("skewed", means.mean_interval)):
            low, high = interval(gain)
            held[name] += low <= 0 <= high
    assert held["paired"] / 400 >= 0.93
    assert held["skewed"] / 400 < 0.9
    assert means.paired_interval(np.arange(90.0), np.arange(90) % 9) is None


@pytest.mark.parametrize("interval", [means.mean_interval, means.paired_interval])
def test_without_skewness_the_interval_is_students(interval):
    values = 1 + np.array([-3.0, -2, -1, -0.5, -0.1, 0.1, 0.5, 1, 2, 3])
    expected = student.interval(0.95, 9, values.mean(), values.std(ddof=1) / np.sqrt(10))
    assert interval(values) == pytest.approx(expected)


def test_too_few_rows_or_groups_have_no_interval():
    assert means.mean_interval(np.arange(9.0)) is None
    assert means.mean_interval(np.arange(10.0)) is not None
    assert means.mean_interval(np.arange(90.0), np.arange(90) % 9) is None


def test_the_design_effect_is_the_size_of_groups_whose_rows_are_equal():
    values = np.random.default_rng(3).normal(size=40)[GROUPS]
    assert means.design_effect(values, GROUPS) == pytest.approx(10, rel=0.03)
    assert means.design_effect(values, None) == means.design_effect(np.ones(400), GROUPS) == 1.0


def test_a_small_mean_has_an_interval_of_its_own_scale():
    values = 1e-6 * (1 + np.random.default_rng(3).normal(size=100))
    low, high = means.mean_interval(values)
    assert 1e-7 < high - low < 1e-6


def test_the_bounds_of_a_ratio_are_where_the_interval_of_what_is_left_ends_at_0():
    """Fieller's theorem, against Student's interval of the differences."""
    rng = np.random.default_rng(5)
    wholes = 0.6 + grouped_values(rng)
    parts = 0.5 * wholes + 0.3 * grouped_values(rng)
    for groups in (None, GROUPS):
        low, high = means.ratio_interval(parts, wholes, groups)
        assert low < parts.mean() / wholes.mean() < high
        assert means.paired_interval(parts - low * wholes, groups)[0] == pytest.approx(0, abs=1e-12)
        assert means.paired_interval(parts - high * wholes, groups)[1] == pytest.approx(0, abs=1e-12)
    assert means.ratio_interval(0.5 * wholes, wholes) == pytest.approx((0.5, 0.5))


def test_a_ratio_whose_denominator_may_be_0_has_no_interval():
    wholes = np.random.default_rng(6).normal(size=100)
    wholes += 0.05 - wholes.mean()
    low, high = means.paired_interval(wholes)
    assert means.ratio_interval(wholes, wholes - low - 1e-6) is None
    assert means.ratio_interval(wholes, wholes - low + 1e-6) is not None
    assert means.ratio_interval(wholes, wholes - high - 1) is None  # surely below 0
    assert means.ratio_interval(np.ones(9), np.ones(9)) is None
    assert means.ratio_interval(np.ones(90), np.ones(90), np.arange(90) % 9) is None


def test_intervals_of_ratios_hold_the_truth_where_they_are_given():
    """Of gains that are clear in two thirds of the draws; the percentiles of a bootstrap held it in 88 to 92%."""
    rng = np.random.default_rng(7)
    held = []
    for _ in range(4000):
        noise = rng.normal(size=(2, 100))
        bounds = means.ratio_interval(0.125 + 0.6 * noise[0] + 0.8 * noise[1], 0.25 + noise[0])
        held += [] if bounds is None else [bounds[0] <= 0.5 <= bounds[1]]
    assert 2400 < len(held) < 3600
    assert 0.93 <= np.mean(held) <= 0.98
