"""Pareto fronts: the items that no other item dominates."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray


def pareto_front(costs: ArrayLike, *, tolerance: float = 0.0) -> NDArray[np.bool_]:
    """Whether each item (N,) is on the Pareto front of its costs (N, K), where lower is better.

    An item is dominated when another one is at most `tolerance` above it in every cost, and more than `tolerance` below
    it in at least one. Equal items do not dominate each other. A cost that is NaN for either of two items is left out
    when these two are compared. Negate what is to be as high as possible.
    """
    values = np.asarray(costs, dtype=np.float64)
    first, second = values[:, None], values[None, :]
    unknown = np.isnan(first) | np.isnan(second)
    no_worse = (unknown | (first <= second + tolerance)).all(axis=2)
    better = (first < second - tolerance).any(axis=2)  # comparisons with NaN are false
    dominated: NDArray[np.bool_] = (no_worse & better).any(axis=0)
    return ~dominated
