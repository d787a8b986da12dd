"""The Pareto front of costs."""

from __future__ import annotations

import numpy as np

from utils.numeric.pareto import pareto_front

NAN = float("nan")


def test_dominated_items_are_left_out_and_equal_items_stay():
    costs = [(1, -0.7), (3, -0.9), (3, -0.8), (4, -0.9), (1, -0.7), (2, -0.6)]
    assert pareto_front(costs).tolist() == [True, True, False, False, True, False]


def test_differences_within_the_tolerance_do_not_count():
    costs = np.array([(1.0, 2.0), (1.0 - 1e-13, 2.0), (0.5, 2.0 + 1e-13)])
    assert pareto_front(costs, tolerance=1e-12).tolist() == [False, False, True]
    assert pareto_front(costs[:2], tolerance=1e-12).tolist() == [True, True]
    assert pareto_front(costs[:2]).tolist() == [False, True]


def test_unknown_costs_are_left_out_of_a_comparison():
    assert pareto_front([(1.0, NAN), (2.0, 1.0), (NAN, 0.5)]).tolist() == [True, False, True]
    assert pareto_front([(NAN, NAN), (1.0, 1.0)]).tolist() == [True, True]


def test_one_item_is_on_the_front():
    assert pareto_front([(1.0, 2.0)]).tolist() == [True]
