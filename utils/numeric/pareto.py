"""Pareto fronts: the items that no other item dominates."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray


def pareto_front(costs: ArrayLike, *, tolerance: float = 0.0) -> NDArray[np.bool_]:
    """Return which items, bool (N,), are on the Pareto front of their costs (N, K), where lower is better.

    An item is dominated if another one is at most `tolerance` above it in every cost, and more than `tolerance` below
    it in at least one. Equal items do not dominate each other. The comparison of two items ignores a cost that is NaN
    for either of them. Negate quantities where higher is better.
    """
    values = np.asarray(costs, dtype=np.float64)
    first, second = values[:, None], values[None, :]
    is_missing = np.isnan(first) | np.isnan(second)
    is_no_worse = (is_missing | (first <= second + tolerance)).all(axis=2)
    is_better = (first < second - tolerance).any(axis=2)  # comparisons with NaN are false
    is_dominated = np.asarray((is_no_worse & is_better).any(axis=0))
    return ~is_dominated
