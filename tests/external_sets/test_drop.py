"""Differences between test and external figures: Newcombe's interval, and its coverage by simulation."""

from __future__ import annotations

import numpy as np
import pytest

from utils.external_sets.drop import change
from utils.numeric.proportions import wilson_interval


def of_rates(hits, rows, test_hits, test_rows):
    rate, test_rate = hits / rows, test_hits / test_rows
    return change(rate, wilson_interval(rate, rows), test_rate, wilson_interval(test_rate, test_rows))


@pytest.mark.parametrize(
    ("hits", "rows", "others", "other_rows", "low", "high"),
    [  # Newcombe (1998), table II, method 10
        (56, 70, 48, 80, 0.0524, 0.3339),
        (9, 10, 3, 10, 0.1705, 0.8090),
        (6, 7, 2, 7, 0.0582, 0.8062),
        (5, 56, 0, 29, -0.0381, 0.1926),
        (10, 10, 0, 20, 0.6791, 1.0),
    ],
)
def test_of_accuracies_it_is_newcombes_interval(hits, rows, others, other_rows, low, high):
    interval = of_rates(hits, rows, others, other_rows)["ci95"]
    assert interval == pytest.approx([low, high], abs=5e-5)


def test_it_covers_a_drop_in_19_of_20_cases():
    generator = np.random.default_rng(0)
    tests, externals = generator.binomial(60, 0.93, 4000), generator.binomial(200, 0.75, 4000)
    covered = 0
    for test_hits, hits in zip(tests, externals, strict=True):
        low, high = of_rates(hits, 200, test_hits, 60)["ci95"]
        covered += low <= 0.75 - 0.93 <= high
    assert 0.935 <= covered / 4000 <= 0.97


def test_without_an_interval_of_either_side_there_is_none():
    assert change(0.5, None, 0.6, (0.5, 0.7)) == {
        "test": 0.6,
        "external": 0.5,
        "change": pytest.approx(-0.1),
        "ci95": None,
    }
